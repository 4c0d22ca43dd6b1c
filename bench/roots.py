"""The ceiling of a GPU's square roots: 32 for every number that is read, so that memory is not what is measured."""

import triton
import triton.language as tl
from torch import Tensor

ROOTS, BLOCK = 32, 1024


@triton.jit
def _kernel(x, out, n, ROOTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=1.0)
    for _ in tl.static_range(ROOTS):
        value = tl.sqrt(tl.abs(value) + 1.0)
    tl.store(out + at, value, mask=at < n)


def take(x: Tensor, out: Tensor) -> None:
    """32 roots of each number of x float32 `[n]`, one of the other, into out `[n]`."""
    _kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), ROOTS, BLOCK)
