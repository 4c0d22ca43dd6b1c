"""`torch.ops.dhns_fast.philox_normal`: standard normals that depend on a seed and an address, and on nothing else.

The address of a normal is (stream, modality, row, step, column). Philox-4x32-10 with the 64-bit seed as its key turns
the counter
    c0 = column // 4,  c1 = row mod 2³²,  c2 = row // 2³²,  c3 = modality·2¹⁸ + step·2² + stream
into the four words from which two Box–Muller transforms make the normals of columns 4·c0 .. 4·c0 + 3:
    u₁ = ((w >> 8) + 1)·2⁻²⁴,  u₂ = (w' >> 8)·2⁻²⁴,  r = √(−2 ln u₁),  (r·cos 2πu₂, r·sin 2πu₂)
so a batch may be split by rows at will, on any device: the integers are the same everywhere, the normals to 1e-6.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator

X_T, X_T_HEAD, TAIL, HEAD = range(4)
MAX_MODALITIES, MAX_STEPS = 1 << 14, 1 << 16

# Quads of a block of the eager form: on a CPU its dozen int64 temporaries then stay within a megabyte or two of cache;
# on a GPU, where a block is 150 launches, within 400 MB.
_BLOCK = {"cpu": 1 << 14, "cuda": 1 << 22}
_MASK = 0xFFFFFFFF


def philox_normal(
    seed: Tensor | int,
    stream: int,
    modality: int,
    row_offset: int,
    step: int,
    rows: int,
    columns: int,
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normals for rows row_offset .. row_offset + rows − 1 of one modality at one diffusion step, float32 [rows,
    columns].

    Args:
        seed: any 64-bit integer, or an int64 tensor with one element, whose device is then the result's; it is never
            read on the host.
        stream: which of the sampler's draws: `X_T`, `X_T_HEAD`, `TAIL` or `HEAD`.
        modality: 0 .. 2¹⁴ − 1.
        row_offset: global index of the first row, 0 .. 2⁶³ − 1.
        step: the diffusion time t, 0 .. 2¹⁶ − 1.
        device: of the result, when the seed is a number.
        backend: "cpu" (C++), "triton", "eager", or None for the best there is.

    Raises:
        InputError: an argument is out of range.
    """
    if not isinstance(seed, Tensor):
        # A number of 64 bits, signed or not: the tensor holds its two's complement.
        seed = torch.tensor((seed + (1 << 63)) % (1 << 64) - (1 << 63), dtype=torch.int64, device=device)
    return torch.ops.dhns_fast.philox_normal(seed, stream, modality, row_offset, step, rows, columns, backend or "")


class NormalInputs(NamedTuple):
    seed: Tensor  # int64, one element
    stream: int
    modality: int
    row_offset: int
    step: int
    rows: int
    columns: int
    backend: str = ""


def _check(a: NormalInputs) -> None:
    for name, value, limit in (
        ("stream", a.stream, 4),
        ("modality", a.modality, MAX_MODALITIES),
        ("step", a.step, MAX_STEPS),
    ):
        if not 0 <= value < limit:
            raise InputError(name, value, f"0 to {limit - 1}")
    for name, value in (("row_offset", a.row_offset), ("rows", a.rows), ("columns", a.columns)):
        if value < 0:
            raise InputError(name, value, "values >= 0")
    check_seed(a.seed)


def check_seed(seed: Tensor) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise InputError("seed", seed, "an int64 tensor with one element, or a number")


def _fake(a: NormalInputs) -> Tensor:
    return a.seed.new_empty((a.rows, a.columns), dtype=torch.float32)


def _filled(fill: Callable[[Tensor, Tensor, int, int], None], a: NormalInputs) -> Tensor:
    out = _fake(a)
    if out.numel():
        fill(out, a.seed, a.modality << 18 | a.step << 2 | a.stream, a.row_offset)
    return out


def philox_words(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of counters, int64 tensors of one shape that hold 32 bits each and are used as scratch, under a
    64-bit seed.
    """
    k0, k1 = seed.reshape(()) & _MASK, seed.reshape(()) >> 32 & _MASK
    for _ in range(10):
        product0, product1 = c0.mul_(0xD2511F53), c2.mul_(0xCD9E8D57)
        # An arithmetic shift of a wrapped product: only the lower 32 of the shifted bits count.
        c0, c2 = (product1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0), product0 >> 32
        c2.bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def fill_eager(out: Tensor, seed: Tensor, last: int, row_offset: int) -> None:
    """The operator in int64 torch operations, block by block and in place. `last` is c3."""
    rows, columns = out.shape
    device = out.device
    quads = -(-columns // 4)
    step = max(1, _BLOCK.get(device.type, 1 << 14) // max(quads, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        row = torch.arange(row_offset + start, row_offset + stop, device=device)[:, None]
        c0 = torch.arange(quads, device=device).repeat(stop - start, 1)
        c1, c2, c3 = (row & _MASK).repeat(1, quads), (row >> 32).repeat(1, quads), torch.full_like(c0, last)
        c0, c1, c2, c3 = philox_words(c0, c1, c2, c3, seed)
        normals = torch.empty(stop - start, quads, 4, device=device)
        _box_muller(c0, c1, normals[..., 0], normals[..., 1])
        _box_muller(c2, c3, normals[..., 2], normals[..., 3])
        out[start:stop] = normals.view(stop - start, -1)[:, :columns]


def _box_muller(first: Tensor, second: Tensor, out_cos: Tensor, out_sin: Tensor) -> None:
    radius = (first >> 8).add_(1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    # 2πu₂ is a number of quarter turns and a rest within an eighth: the reduction is done on the integer, so that it is
    # exact.
    angle = second >> 8
    quarter = (angle + (1 << 21)) >> 22
    rest = (angle - (quarter << 22)).float().mul_(math.pi / 2 * 2.0**-22)
    cosine, sine, odd = rest.cos(), rest.sin_(), (quarter & 1).bool()
    torch.mul(torch.where(odd, sine, cosine).mul_(1 - (quarter + 1 & 2)), radius, out=out_cos)
    torch.mul(torch.where(odd, cosine, sine).mul_(1 - (quarter & 2)), radius, out=out_sin)


def _fill_cpu(out: Tensor, seed: Tensor, last: int, row_offset: int) -> None:
    torch.ops.dhns_fast_native.philox_normal(out, seed, last, row_offset)


def _fill_triton(out: Tensor, seed: Tensor, last: int, row_offset: int) -> None:
    from dhns_fast.kernels import noise as kernel

    kernel.philox_normal(out, seed, last, row_offset)


_FILLS = ((backends.CPU, _fill_cpu), (backends.TRITON, _fill_triton), (backends.EAGER, fill_eager))

NORMAL = Operator(
    "philox_normal", NormalInputs, Tensor, check=_check, fake=_fake,
    implementations=tuple(Implementation(backend, functools.partial(_filled, fill)) for backend, fill in _FILLS),
)  # fmt: skip


class Noise(NamedTuple):
    """Noise of one call: fixed tensors, or a seed for `dhns_fast.ops.noise` where they are None."""

    seed: Tensor  # int64 [1]
    row_offset: int
    x_T: Tensor | None  # [M, B, D]
    x_T_head: Tensor | None  # [M, B, D]
    tail: Tensor | None  # [T − 1, M, B, D], row 0 for t = T
    head: Tensor | None  # [T − 1, M, B, D]
    backend: str | None = None  # of the normals that are drawn

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        return self.x_T, self.x_T_head, self.tail, self.head

    def start(self, tail: bool, m: int, first: int, like: Tensor) -> Tensor:
        """x_T of the rows of `like`, a fresh tensor."""
        fixed = self.x_T if tail else self.x_T_head
        if fixed is not None:
            return fixed[m, first : first + len(like)].clone()
        return self._normal(X_T if tail else X_T_HEAD, m, first, 0, like)

    def at(self, t: int, T: int, tail: bool, m: int, first: int, like: Tensor) -> Tensor:
        """Noise that the step at time t adds to the rows of `like`."""
        fixed = self.tail if tail else self.head
        if fixed is not None:
            return fixed[T - t, m, first : first + len(like)]
        return self._normal(TAIL if tail else HEAD, m, first, t, like)

    def _normal(self, stream: int, m: int, first: int, t: int, like: Tensor) -> Tensor:
        return philox_normal(self.seed, stream, m, self.row_offset + first, t, *like.shape, backend=self.backend).to(
            like.dtype
        )
