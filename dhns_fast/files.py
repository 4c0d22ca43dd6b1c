"""Writing files so that a crash, a full disk or a second process can never leave half of one: everything that the
package writes goes through here.

A file is written under a name of its own in the folder it is meant for, synced, and renamed; then the folder is synced.
Its mode follows the umask. While it is written its process holds a lock on it, which the system drops when the process
dies: files without a lock that carry such a name are leftovers, and the next writer in the folder removes them.
Importable without torch.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dhns_fast.errors import DhnsError, InputError, Shown, is_text, printable

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks, hence no leftovers that could be told from files being written
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

PREFIX, SUFFIX = ".dhns_fast-", ".part"
LOCK = ".lock"
CHECKSUM = "sha256"
# Names of dtypes in safetensors files.
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64",
    "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
_swept: set[tuple[int, Path]] = set()
# Of a thread: files that are written and wait for their names.
_waiting = threading.local()
# Folders that a thread of this process holds.
_held: set[tuple[int, int, Path]] = set()


class WriteError(DhnsError, OSError):
    """A file could not be written; what stood under its name before is unchanged."""

    def __str__(self) -> str:
        return f"{self.filename} could not be written: {self.strerror} (what it held before is unchanged)"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the name `path`, whole and on disk, when the block ends without an error.

    Raises:
        WriteError: it cannot be written, or the disk is full; `path` is what it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        sweep(path.parent)
        temporary, file = _temporary(path.parent)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if (staged := getattr(_waiting, "files", None)) is not None:
                # A second descriptor keeps the lock until it has its name.
                staged.append((temporary, path, os.dup(file.fileno())))
            else:
                # Renamed before it is closed: the lock goes with the file.
                os.replace(temporary, path)
        temporary = None
        if staged is None:
            sync(path.parent)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def together(folder: Path | None = None) -> Iterator[None]:
    """Within it, files that this thread writes wait for one another: at the end all take their names, one right after
    the other, and after an error none does. A `folder` is made first, and goes again after an error if it is new.

    Raises:
        InputError: the folder cannot be made.
        WriteError: a name cannot be taken.
    """
    new = None if folder is None or folder.exists() else folder
    if folder is not None:
        make_folder(folder)
    if getattr(_waiting, "files", None) is not None:
        yield
        return
    staged: list[tuple[Path, Path, int]] = []
    _waiting.files = staged
    try:
        yield
        for temporary, path, _ in staged:
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
        for parent in {path.parent for _, path, _ in staged}:
            sync(parent)
    finally:
        _waiting.files = None
        for temporary, _, descriptor in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(descriptor)
        if new is not None:
            # A folder that holds something stays: the system refuses.
            with contextlib.suppress(OSError):
                new.rmdir()


def _temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked, whose mode the umask decides."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        file = path.open("xb")
        # Between the two calls a sweeper may have taken it for a leftover.
        if _lock(file.fileno()) and os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting; False where another one holds it. Systems without locks count as locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def sweep(folder: Path) -> None:
    """Remove what killed processes have left of their files in a folder; once a process and folder."""
    key = (os.getpid(), folder.absolute())
    if fcntl is None or key in _swept:
        return
    _swept.add(key)
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            # No `_lock`: where locks do not work every file would look like a leftover.
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def sync(folder: Path) -> None:
    """Make the names of a folder durable; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8. A file that holds it already is left as it is.

    Raises:
        WriteError: see :func:`replacing`; also for text that UTF-8 cannot hold.
    """
    data = text.encode()
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    write_text(path, as_json(content, indent=1, ensure_ascii=False) + "\n")


def as_json(content: Any, **options: Any) -> str:
    """`json.dumps`, with null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def digest(content: Any) -> str:
    """SHA-256 in hexadecimal of what can be written as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 in hexadecimal of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file with a column for every key that occurs."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file whose header holds `metadata` and a checksum of everything in it (:func:`checksum`).

    Tensors go to the file one after the other: the library's own writer needs a copy of all of them in memory, and
    leaves mode 0600.

    Args:
        tensors: by name, of any layout and on any device.
        metadata: texts for the header.
    """
    import torch

    # Wide elements first, so that each begins at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    parts = {name: tensors[name].detach().cpu().contiguous() for name in names}
    given = dict(metadata or {})
    header: dict[str, Any] = {"__metadata__": given | {CHECKSUM: checksum(parts, given)}}
    offset = 0
    for name, x in parts.items():
        header[name] = {
            "dtype": DTYPES[str(x.dtype)],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for x in parts.values():
            file.write(x.reshape(-1).view(torch.uint8).numpy().data)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal of names, dtypes, shapes and bytes of tensors on the CPU, and of the other texts of a
    header. 1.7 GB/s on a Sapphire Rapids core.
    """
    import torch

    digest = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != CHECKSUM)).encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def expanded(argument: str, path: str | Path) -> Path:
    """The path with `~` and `~user` replaced, as a shell would have done.

    Raises:
        InputError: it is no path, there is no such user, or the system refuses to look at it (a name that is too long,
            a loop of links, a folder that is closed to this user). That nothing is there is no reason.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(argument, path, "a path")
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise InputError(argument, str(path), "a path whose `~` names the home of a user of this machine") from None
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise closed(argument, path, error) from None
    return found


def closed(argument: str, path: str | Path, error: Exception) -> InputError:
    """What to say of a path that the system does not let us look at."""
    text = repr(str(path)) if len(str(path)) <= 60 else f"a path of {len(str(path))} characters"
    why = getattr(error, "strerror", None) or error
    return InputError(argument, Shown(f"{text}, which cannot be looked at ({why})"), "a path that can be read")


def make_folder(folder: Path) -> None:
    """Make a folder for output, or InputError where that is not possible, or where files could be written and not read
    again: the library of safetensors takes no path that is not UTF-8.
    """
    if not is_text(str(folder)):
        raise InputError("folder", str(folder), "a path in UTF-8")
    try:
        # Before `mkdir`, which makes the folders on the way one by one.
        expanded("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        got = Shown(f"{str(folder)!r}, which cannot be created or written to ({error.strerror})")
        raise InputError("folder", got, "a folder that can be written to") from None


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds a folder for this thread alone, as long as the block runs or the process lives; a thread may hold a folder
    several times over.

    Raises:
        InputError: another process or thread holds it; the message names the process.
        WriteError: the folder cannot be written to.
    """
    key = (os.getpid(), threading.get_ident(), folder.resolve())
    if fcntl is None or key in _held:
        yield
        return
    path = folder / LOCK
    descriptor = _open_lock(path)
    _held.add(key)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, its message says less
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        sweep(folder)
        yield
    finally:
        _held.discard(key)
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """The lock file of a folder, open and locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(path)) from error
        if not _lock(descriptor):
            holder = printable(os.read(descriptor, 200).decode(errors="replace").strip())
            os.close(descriptor)
            got = Shown(f"{str(path.parent)!r}, which {holder or 'another process'} is writing to")
            raise InputError("folder", got, "a folder that no other run uses; wait for it to end, or give another one")
        # The last holder may have removed the file between the two calls.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
