"""`.npy` files that are written block by block and mapped back into memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast import files

INT64: np.dtype[Any] = np.dtype(np.int64)


def write_rows(path: Path, blocks: Iterable[np.ndarray], dtype: np.dtype[Any] = INT64, width: int | None = 3) -> Tensor:
    """A file [n, width] (None: [n]) of blocks of rows whose number nobody knows yet, and the tensor mapped from it."""
    count = 0
    with files.replacing(path) as file:
        file.write(_header(0, width, dtype))
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
            count += len(block)
        file.seek(0)
        file.write(_header(count, width, dtype))
    return mapped(path)


def mapped(path: Path) -> Tensor:
    """The array of a file, mapped; what is written to the tensor does not reach the file."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return torch.from_numpy(np.load(path, mmap_mode="c" if array.size else None, allow_pickle=False))


def _header(count: int, width: int | None, dtype: np.dtype[Any]) -> bytes:
    """The header of an `.npy` file of version 1.0, always 128 bytes."""
    shape = (count,) if width is None else (count, width)
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
