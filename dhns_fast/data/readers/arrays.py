"""Files of arrays: `.npy`, `.npz`, `.pth`, `.pt`, `.safetensors`, `.h5`. Shapes and types are known, and judged, before
numbers are read.

Nothing is unpickled but what torch's restricted unpickler allows: tensors, NumPy arrays, and containers of them.
"""

from __future__ import annotations

import errno
import importlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast.data.readers.lines import unreadable
from dhns_fast.errors import DataError, printable

SUFFIXES = (".npy", ".npz", ".pth", ".pt", ".safetensors", ".h5", ".hdf5")
# A file may hold arrays this many times its own size once they are larger than ROOM: more is not compression of
# features.
GROWTH, ROOM = 64, 1 << 28
# Dtypes of safetensors that are numbers here.
NUMBERS = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
)


class Foreign(DataError):
    """A file that is whole and holds something else than features: a model, pickled objects."""


@dataclass
class Array:
    """An array that is read when it is asked for.

    Attributes:
        shape: sizes.
        kind: "number", "bool", "name" (strings), or what else it is, in words.
        dtype: its name.
        read: gives the tensor; for names, the list of strings.
        view: whether it stands in its file as it is, so that reading takes no memory.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: str
    read: Callable[[], Any]
    view: bool = False

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


def open_arrays(path: Path) -> dict[str | int, Array]:
    """The arrays of a file by name; the only one of a file without names is called "".

    Raises:
        Foreign: pickled objects.
        DataError: unreadable, damaged, or it says that it holds far more than it is long.
    """
    suffix = path.suffix.lower()
    reader = {".npy": _npy, ".npz": _npz, ".pth": _torch, ".pt": _torch, ".safetensors": _safetensors}.get(suffix, _h5)
    if suffix not in SUFFIXES:
        raise DataError(path, f"found the extension {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    found = guarded(path, lambda: reader(path))
    stored = path.stat().st_size
    for key, array in found.items():
        size = math.prod(array.shape) * 4
        if size > ROOM and size > GROWTH * stored:
            what = f"`{printable(str(key))}` " if key != "" else ""
            accepted = f"at most {GROWTH} times the size of the file"
            raise DataError(
                path, f"{what}is {array}, {size / 1e9:.3g} GB in a file of {stored} bytes; accepted: {accepted}"
            )
    return found


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, with whatever the library of a format raises for a broken file as one DataError."""
    try:
        return read()
    except DataError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a map beyond the end of the file
            raise DataError(path, f"cannot be read as {path.suffix.lower()}: damaged, or cut off") from None
        if error.errno is not None:
            raise unreadable(path, error) from None
        raise _broken(path, error) from None
    except Exception as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> DataError:
    lines = str(error).strip().split("\n")
    # Of torch's sentences the first says what was found.
    reason = lines[0].split(". ")[0]
    # A key or a byte that was looked for in vain says nothing.
    if " " not in reason:
        reason = "damaged, or another kind of file"
    return DataError(path, f"cannot be read as {path.suffix.lower()}: {printable(reason[:200])}")


def _numpy(array: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any], view: bool = False) -> Array:
    """An array of NumPy's, its numbers in this machine's order and in a type that torch has."""
    if dtype.kind in "US":
        return Array(
            shape,
            "name",
            str(dtype),
            lambda: [x.decode() if isinstance(x, bytes) else str(x) for x in array().tolist()],
        )
    if dtype.kind not in "fiub":
        return Array(shape, f"of dtype {dtype}", str(dtype), array)
    native = dtype.newbyteorder("=")
    if (dtype.kind == "f" and dtype.itemsize > 8) or (dtype.kind == "u" and dtype.itemsize > 1):
        native = np.dtype(np.float64)  # torch has no long double, and next to nothing for unsigned integers
    as_is = native == dtype

    def read() -> Tensor:
        x = array()
        x = x if as_is else x.astype(native)
        if any(step < 0 for step in x.strides):
            x = np.ascontiguousarray(x)
        return torch.from_numpy(x if x.flags.writeable or view else x.copy())

    return Array(shape, "bool" if dtype.kind == "b" else "number", str(dtype), read, view and as_is)


def _npy(path: Path) -> dict[str | int, Array]:
    with path.open("rb") as file:
        shape, dtype = _header(path, file)
        if dtype.hasobject:
            raise Foreign(
                path,
                "holds pickled objects, which are not read; `dhns-fast convert --allow-pickle` makes safetensors of them",
            )
        size, have = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
    if size > have:
        raise DataError(
            path, f"cannot be read as .npy: {list(shape)} {dtype} takes {size} bytes, {have} follow the header"
        )
    # Copy on write: torch asks for memory that may be written to, and nobody writes.
    mapped = (
        (lambda: np.load(path, mmap_mode="c", allow_pickle=False))
        if size
        else (lambda: np.load(path, allow_pickle=False))
    )
    return {"": _numpy(mapped, shape, dtype, view=True)}


def _header(path: Path, file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise DataError(path, f"cannot be read as .npy: version {version}, which only tables of named columns need")
    shape, _, dtype = read(file)
    if any(n < 0 for n in shape):
        raise DataError(path, f"cannot be read as .npy: the shape is {shape}")
    return shape, dtype


def _npz(path: Path) -> dict[str | int, Array]:
    found: dict[str | int, Array] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            key = entry.filename.removesuffix(".npy")
            if key in found:
                raise DataError(path, f"cannot be read as .npz: {printable(key)!r} occurs twice")
            with archive.open(entry) as file:
                shape, dtype = _header(path, file)
                need = math.prod(shape) * dtype.itemsize
                # How the entry was packed may be a lie, too: what it says is compared, and no more than this is read.
                if not dtype.hasobject and need > entry.file_size:
                    raise DataError(
                        path,
                        f"cannot be read as .npz: {printable(key)!r} is {list(shape)} {dtype}, of {entry.file_size} bytes",
                    )
            if dtype.hasobject:
                found[key] = Array(shape, "pickled", "object", lambda: None)
            else:
                found[key] = _numpy(_Entry(path, entry.filename), shape, dtype)
    return found


@dataclass
class _Entry:
    path: Path
    name: str

    def __call__(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.name) as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return array


def load_torch(path: Path) -> Any:
    """What a file of torch.save holds, tensors mapped from it; nothing but tensors, arrays of numbers and containers is
    made.

    Raises:
        Foreign: other objects are in it.
        DataError: unreadable or damaged.
    """

    def read() -> Any:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise DataError(
                        path, "cannot be read as .pt: a compressed archive; accepted: what torch.save writes"
                    )
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)

    try:
        return guarded(path, read)
    except DataError as error:
        if (
            "WeightsUnpickler" in str(error.__cause__)
            or "Unsupported global" in str(error.__cause__)
            or "weights_only" in str(error.__cause__)
        ):
            reason = next(
                (line for line in str(error.__cause__).split("\n") if "GLOBAL" in line or "global" in line), ""
            )
            named = reason.split("GLOBAL ")[1].split(" ")[0].rstrip(".,") if "GLOBAL " in reason else ""
            what = f" ({printable(named)})" if named else ""
            raise Foreign(
                path,
                f"holds pickled objects{what}, which are not read; `dhns-fast convert --allow-pickle` makes safetensors of them",
            ) from None
        raise


def _safe() -> list[Any]:
    """What arrays of NumPy are made of in a pickle, under the names that NumPy 1 and 2 give them."""
    # By name: NumPy 1.26 has `_core` too, but empty until then.
    multiarray = importlib.import_module("numpy._core.multiarray")
    functions = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    return [*functions, np.ndarray, np.dtype, *dict.fromkeys(dtypes)]


_SAFE = _safe()


def _torch(path: Path) -> dict[str | int, Array]:
    content = load_torch(path)
    if isinstance(content, torch.nn.Parameter | Tensor | np.ndarray):
        content = {"": content}
    if not isinstance(content, dict):
        raise DataError(path, f"found a {type(content).__name__}; accepted: a matrix, or a dict of tensors")
    found: dict[str | int, Array] = {}
    for key, value in content.items():
        name = key if isinstance(key, (str, int)) and not isinstance(key, bool) else repr(key)
        if isinstance(value, np.ndarray):
            found[name] = _numpy(partial(_same, value), value.shape, value.dtype)
        elif isinstance(value, Tensor):
            found[name] = _tensor(value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(x, str) for x in value):
            found[name] = Array((len(value),), "name", "str", partial(list, value))
        else:
            found[name] = Array((), f"a {type(value).__name__}", type(value).__name__, partial(_same, value))
    return found


def _tensor(value: Tensor) -> Array:
    value = value.detach()
    dtype = str(value.dtype).removeprefix("torch.")
    odd = "nested" if value.is_nested else "quantized" if value.is_quantized else "meta" if value.is_meta else None
    if odd is None and value.layout != torch.strided:
        odd = str(value.layout).removeprefix("torch.")
    if odd is not None:
        return Array(
            () if value.is_nested else tuple(value.shape), f"a {odd} tensor", f"{dtype} ({odd})", lambda: value
        )
    if value.dtype == torch.bool:
        return Array(tuple(value.shape), "bool", dtype, lambda: value, True)
    if value.is_complex() or "x2" in dtype or "bits" in dtype or not _casts(value.dtype):
        return Array(tuple(value.shape), f"of dtype {dtype}", dtype, lambda: value)
    return Array(tuple(value.shape), "number", dtype, lambda: value, True)


def _casts(dtype: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=dtype).float()
    except (RuntimeError, TypeError):
        return False
    return True


def _safetensors(path: Path) -> dict[str | int, Array]:
    from safetensors import safe_open

    found: dict[str | int, Array] = {}
    with safe_open(path, framework="pt") as file:
        for key in list(file.keys()):
            part = file.get_slice(key)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            kind = "bool" if dtype == "BOOL" else "number" if dtype in NUMBERS else f"of dtype {dtype}"
            found[key] = Array(shape, kind, dtype, partial(_tensor_of, path, key), True)
    return found


def _tensor_of(path: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _same(value: Any) -> Any:
    return value


def _h5(path: Path) -> dict[str | int, Array]:
    try:
        import h5py
    except ImportError:
        raise Foreign(path, "is read by h5py, which is not installed; `pip install dhns-fast[h5]` brings it") from None
    found: dict[str | int, Array] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            shape = tuple(item.shape or ())
            found[name] = (
                _numpy(_Dataset(path, name), shape, item.dtype)
                if item.dtype.kind in "fiub"
                else Array(shape, f"of dtype {item.dtype}", str(item.dtype), lambda: None)
            )

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


@dataclass
class _Dataset:
    path: Path
    name: str

    def __call__(self) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r") as file:
            return np.asarray(file[self.name][()])
