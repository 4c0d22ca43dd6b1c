"""Memory for large results on a CPU, used again once nobody holds them.

The C library gives large pieces back to the system, which then hands them out page by page, at 1.4 µs each in a virtual machine on Sapphire Rapids: a
hardness-adaptive loss with 57 MB of gradients took 31 to 40 ms or 23, as it happened. On CUDA PyTorch's own cache serves.
"""

from __future__ import annotations

import collections
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller results the C library keeps by itself; of what is kept beyond this the kinds known longest go first.
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 28
# Taken and put back by single steps, which threads cannot come between.
_kept: dict[tuple[int, torch.dtype], collections.deque[Tensor]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty(shape, dtype=dtype, device=device)`, on a CPU in memory that earlier results of this size have left."""
    count = math.prod(shape)
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64) or not LEAST_BYTES <= count * dtype.itemsize <= MOST_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        block = _kept[count, dtype].pop()
    except LookupError:
        block = torch.empty(count, dtype=dtype)
    # The storage of what is returned holds this array, and lets go of it when its last tensor goes.
    array = block.view(tuple(shape)).numpy()
    weakref.finalize(array, _keep, block).atexit = False
    return torch.from_numpy(array)


def _keep(block: Tensor) -> None:
    _kept.setdefault((len(block), block.dtype), collections.deque()).append(block)
    for blocks in list(_kept.values()):
        while blocks and sum(b.nbytes for kept in list(_kept.values()) for b in list(kept)) > MOST_BYTES:
            blocks.popleft()


def release() -> None:
    """Gives back what is kept."""
    _kept.clear()
