"""Memory for large results on a CPU, used again once nobody holds them.

The C library gives large pieces back to the system, which then hands them out page by page, at 1.4 µs each in a virtual
machine on Sapphire Rapids: a hardness-adaptive loss with 57 MB of gradients took 31 to 40 ms or 23, as it happened. On
CUDA PyTorch's own cache serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# The C library keeps smaller results by itself. When more bytes than the second bound are kept, the oldest are freed.
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 28
# By id, oldest first. No lock: a thread that frees a result while it asks for one would take it twice. Instead each
# put and take is one operation on the dict (of two threads that want a block one gets it), and loops go over copies.
_kept: dict[int, Tensor] = {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty(shape, dtype=dtype, device=device)`, on a CPU in memory that earlier results of about this size have
    left.
    """
    count = math.prod(shape)
    if (
        device.type != "cpu"
        or dtype not in (torch.float32, torch.float64)
        or not LEAST_BYTES <= count * dtype.itemsize <= MOST_BYTES
    ):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = _rounded(count)
    fitting = (key for key, kept in reversed(tuple(_kept.items())) if kept.shape == (size,) and kept.dtype == dtype)
    taken = (block for key in fitting if (block := _kept.pop(key, None)) is not None)
    block = next(taken, None)
    if block is None:
        block = torch.empty(size, dtype=dtype)
    # The storage of what is returned holds this array, and lets go of it when its last tensor goes.
    array = block[:count].view(tuple(shape)).numpy()
    weakref.finalize(array, _keep, block).atexit = False
    return torch.from_numpy(array)


def _rounded(count: int) -> int:
    """A few sizes an octave: the rows that a step looks up are never quite as many as those of the step before."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def _keep(block: Tensor) -> None:
    _kept[id(block)] = block
    held = tuple(_kept.items())
    size = sum(kept.nbytes for _, kept in held)
    for key, kept in held:
        if size <= MOST_BYTES:
            break
        _kept.pop(key, None)
        size -= kept.nbytes


LARGE_PAGE = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros(shape, dtype=dtype, device=device)`, on a CPU in pages of 2 MB where it is that large and the system
    offers them; what is never written takes no memory.

    Rows anywhere in a table of hundreds of megabytes are in 4 kB pages that no processor keeps the places of: each
    look-up then waits for several more. What the C library hands out again would consist of small pages already.
    """
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if torch.device(device).type != "cpu" or size < LARGE_PAGE or advice is None:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    pages = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without
        pages.madvise(advice)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE_PAGE
    return whole[first : first + size].view(dtype).view(tuple(shape))


def release() -> None:
    """Gives back what is kept, here and by the C library."""
    _kept.clear()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
