"""Conversion: a graph of any layout to arrays that are mapped into memory, and pickled features to safetensors."""

from __future__ import annotations

import pickle
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast import files
from dhns_fast.data.filter import CSRFilter
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.load import EMBEDDED, load, read
from dhns_fast.data.names import MappedNames
from dhns_fast.data.readers import maps
from dhns_fast.data.readers.arrays import SUFFIXES
from dhns_fast.data.readers.folder import PICKLES
from dhns_fast.data.readers.lines import rows
from dhns_fast.data.readers.mapped import FILE, FILTER, FORMAT, VERSION
from dhns_fast.data.rows import mapped, write_rows
from dhns_fast.data.write import STORABLE, storable
from dhns_fast.errors import DataError, InputError, Shown, printable, shown
from dhns_fast.ops.ambient import plain

# Rows converted together.
ROWS = 1 << 18


@plain()
def convert(
    source: str | Path, target: str | Path, allow_pickle: bool = False, half: bool = False, seed: int = 0
) -> Path:
    """Converts a graph, or one file of features.

    A graph (a folder or file of any layout, or a name, as of :func:`load`) becomes a folder of arrays which `load` maps
    into memory: triples int64 [n, 3], the known answers of train, names, features and `present`, each as it is. Text is
    read and written in blocks: beside the ids of the names (some 150 bytes an entity) memory does not grow with the
    graph.

    A file of features (`.pkl`, `.pickle`, or any that holds pickled objects: a matrix, or a dict name → vector) becomes
    safetensors.

    Args:
        source: what to convert.
        target: the new folder, or one that is empty; of features, the `.safetensors` file.
        allow_pickle: open pickles. **They can run any program: only of those whom you trust.** A warning says so.
        half: keep features as float16 on disk.
        seed: of the split, where the data has none.

    Returns:
        `target`.

    Raises:
        InputError: a pickle without `allow_pickle`, or a target that cannot be written.
        DataError: as of :func:`load`.
    """
    path, target = files.expanded("source", source), files.expanded("target", target)
    suffix = path.suffix.lower()
    if suffix in (*PICKLES, *SUFFIXES) and path.is_file():
        return _features(path, target, allow_pickle)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            "target",
            Shown(f"{str(target)!r}, which {'is not empty' if target.is_dir() else 'is a file'}"),
            "a new folder",
        )
    made = not target.exists()
    files.make_folder(target)
    try:
        if path.exists() and str(source) not in EMBEDDED:
            spill = _Spill(target)
            kg = read(path, str(source), None, seed, spill.gather, spill.names)
        else:
            kg = load(source, seed=seed)
        _write(kg, target, half)
    except BaseException:
        # Nothing is left that looks like a graph, or like half of one.
        for name in list(target.rglob("*"))[::-1]:
            name.unlink() if name.is_file() else name.rmdir()
        if made:
            target.rmdir()
        raise
    return target


class _Spill:
    """Puts triples and names into their files while they are read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def gather(self, split: str, blocks: Iterable[np.ndarray]) -> Tensor:
        return write_rows(self.target / f"{split}.npy", blocks)

    def names(self, path: Path, what: str) -> Sequence[str]:
        """Names of a map whose ids are 0, 1, 2, …, without a list of them; another map is read as usual."""

        def in_order() -> Iterator[str]:
            named_first = "2id" in path.name
            for i, (_, row) in enumerate(rows(path), -1 if named_first else 0):
                if i < 0:
                    continue  # the count, which numbered.holds has seen
                cells = row.split("\t")
                if len(cells) != 2 or cells[named_first].strip(" ") != str(i):
                    raise LookupError
                yield cells[not named_first]

        try:
            return write_names(self.target, what, in_order(), path)
        except LookupError:
            return maps.read(path, what)


def _write(kg: KnowledgeGraph, target: Path, half: bool) -> None:
    for what, names in (("entities", kg.entity_names), ("relations", kg.relation_names)):
        if not (isinstance(names, MappedNames) and names.path.parent == target):
            write_names(target, what, names, None)
    for split, triples in kg.splits.items():
        if not (target / f"{split}.npy").exists() or len(np.load(target / f"{split}.npy", mmap_mode="r")) != len(
            triples
        ):
            write_rows(target / f"{split}.npy", (block.numpy() for block in triples.split(ROWS)))
    features = {}
    if kg.features:
        files.make_folder(target / "features")
    for name, matrix in kg.features.items():
        if Path(name).name != name or name.startswith("."):
            raise InputError("features", name, "modalities that are also file names")
        dtype = np.dtype(np.float16 if half or matrix.dtype == torch.float16 else np.float32)
        has = kg.present[name]
        # What stands in the rows of the absent is not kept.
        parts = (
            x.float().masked_fill(~p[:, None], 0).numpy()
            for x, p in zip(matrix.split(ROWS), has.split(ROWS), strict=True)
        )
        write_rows(
            target / "features" / f"{name}.npy", (_narrow(name, part, dtype) for part in parts), dtype, matrix.shape[1]
        )
        with files.replacing(target / "features" / f"{name}.present.npy") as file:
            np.save(file, has.numpy(), allow_pickle=False)
        features[name] = [matrix.shape[1], dtype.name]
    # From the file, so that what is sorted is all that is in memory.
    CSRFilter.from_triples(mapped(target / "train.npy"), kg.num_entities, kg.num_relations, target / FILTER)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "name": kg.name,
        "entities": kg.num_entities,
        "relations": kg.num_relations,
        "splits": {split: len(triples) for split, triples in kg.splits.items()},
        "features": features,
        "notes": list(kg.notes),
        "report": kg.report.to_dict(),
    }
    # Written last: a folder without it is no graph.
    files.write_json(target / FILE, meta)


def _narrow(name: str, part: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == np.float16 and (largest := float(np.abs(part).max(initial=0))) > 65504:
        raise InputError("half", Shown(f"{largest:.6g} in {name!r}"), "features up to 65504, which float16 can hold")
    return part.astype(dtype)


def write_names(target: Path, what: str, names: Iterable[str], source: Path | None) -> MappedNames:
    """The files of names in a converted folder; DataError (of `source`) or InputError for a name that is blank,
    repeated or no text.

    Repetitions are found by 64-bit hashes, 8 bytes a name, and then looked at.
    """
    begins, hashes = array("q", [0]), array("q")

    def refuse(got: str, accepted: str) -> Exception:
        return (
            InputError(what, Shown(got), accepted)
            if source is None
            else DataError(source, f"found {got}; accepted: {accepted}")
        )

    with files.replacing(target / f"{what}.names") as file:
        for i, name in enumerate(names):
            if not storable(name):
                raise refuse(f"{shown(name)} at {i}", STORABLE)
            begins.append(begins[-1] + file.write(name.encode() + b"\n"))
            hashes.append(hash(name))
    order = np.frombuffer(begins, np.int64)
    with files.replacing(target / f"{what}.begins.npy") as file:
        np.save(file, order, allow_pickle=False)
    if not hashes:
        raise refuse("none", "at least one name")
    out = MappedNames(target / f"{what}.names", order)
    values = np.frombuffer(hashes, np.int64)
    sorted_values = np.sort(values)
    for value in np.unique(sorted_values[1:][sorted_values[1:] == sorted_values[:-1]])[:1000]:
        first: dict[str, int] = {}
        for i in np.nonzero(values == value)[0].tolist():
            if first.setdefault(out[i], i) != i:
                raise refuse(f"{shown(out[i])} at {first[out[i]]} and again at {i}", "distinct names")
    return out


def _features(path: Path, target: Path, allow_pickle: bool) -> Path:
    """One file of features as safetensors."""
    if target.suffix != ".safetensors":
        raise InputError("target", str(target), "a file name that ends in .safetensors")
    if not allow_pickle:
        got = Shown(f"{str(path)!r}, which may hold a pickle")
        raise InputError(
            "source", got, "--allow-pickle, for a file from someone you trust: a pickle can run any program"
        )
    warnings.warn(f"{path} is unpickled: whatever program its author put into it runs now", stacklevel=3)
    content = _unpickled(path)
    tensors = (
        {"features": content}
        if not isinstance(content, Mapping)
        else {str(key): value for key, value in content.items()}
    )
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        try:
            x = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(_plain(value))
        except Exception:
            continue
        if x.ndim and x.layout == torch.strided and not x.is_complex() and x.numel():
            out[name] = x if str(x.dtype) in files.DTYPES else x.float()
    if not out:
        found = f"a {type(content).__name__}" + (
            f" with {', '.join(map(printable, list(tensors)[:5]))}" if isinstance(content, Mapping) else ""
        )
        raise DataError(path, f"found {found}; accepted: a matrix of numbers, or a dict of name → vector")
    files.make_folder(target.parent)
    files.write_tensors(target, out)
    return target


def _plain(value: Any) -> np.ndarray:
    """Numbers of any container as an array of a type that torch has."""
    x = np.asarray(value)
    if x.dtype == object:
        x = np.stack([np.asarray(part, np.float32) for part in x])
    if x.dtype.kind not in "fiub":
        raise TypeError(x.dtype)
    native = (
        np.float64
        if x.dtype.itemsize > 8 or (x.dtype.kind == "u" and x.dtype.itemsize > 1)
        else x.dtype.newbyteorder("=")
    )
    return np.ascontiguousarray(x, native)


def _unpickled(path: Path) -> Any:
    try:
        if path.suffix.lower() in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=False)
        if path.suffix.lower() in PICKLES:
            with path.open("rb") as file:
                return pickle.load(file)
        content: Any = np.load(path, allow_pickle=True)
        content = dict(content) if not isinstance(content, np.ndarray) else content
        return (
            content.item()
            if isinstance(content, np.ndarray) and content.dtype == object and not content.ndim
            else content
        )
    except Exception as error:
        reason = printable((str(error).strip().split("\n")[0] or type(error).__name__)[:200])
        raise DataError(path, f"cannot be unpickled: {reason}") from error
