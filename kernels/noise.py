"""Counter-based normals: Philox-4x32-10 and Box–Muller, the addresses of `dhns_fast.ops.noise`.

    u₁ = ((w >> 8) + 1)·2⁻²⁴,  u₂ = (w' >> 8)·2⁻²⁴,  (r·cos 2πu₂, r·sin 2πu₂),  r = √(−2 ln u₁)

Logarithm, sine and cosine are polynomials: the hardware's logarithm has an absolute error, which next to u₁ = 1 would
be 5e-4 in r. `normals` is for other kernels too, which then need no noise from memory.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; polynomials of Cephes (logf, sinf, cosf).
"""

from __future__ import annotations

import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase
from torch import Tensor


@triton.jit
def _log_unit(n):
    """ln(n·2⁻²⁴) for n in 1 .. 2²⁴: n = 2^e·m with m in [√½, √2), a polynomial in m − 1, which is exact."""
    bits = n.to(tl.float32).to(tl.int32, bitcast=True)
    shift = (bits - 0x3F3504F3) >> 23
    f = (bits - (shift << 23)).to(tl.float32, bitcast=True) - 1.0
    e = (shift - 24).to(tl.float32)
    z = f * f
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * z + e * -2.12194440e-4 - 0.5 * z
    return f + y + e * 0.693359375


@triton.jit
def _box_muller(first, second):
    """Two int32 tensors of 24-bit integers, n and n', to two normals with u₁ = (n + 1)·2⁻²⁴ and u₂ = n'·2⁻²⁴."""
    radius = tl.sqrt_rn(-2.0 * _log_unit(first + 1))
    # Quarter turns and a rest within an eighth, split on the integer and therefore exactly.
    quarter = (second + (1 << 21)) >> 22
    x = (second - (quarter << 22)).to(tl.float32) * 3.7450704e-7  # (π/2)·2⁻²²
    z = x * x
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) == 1
    cosine = tl.where(odd, s, c) * (1 - ((quarter + 1) & 2)).to(tl.float32)
    sine = tl.where(odd, c, s) * (1 - (quarter & 2)).to(tl.float32)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, row, quad, last):
    """The normals of columns 4·quad .. 4·quad + 3 of the given rows, four float32 tensors.

    seed: int64 scalar. row: int64 tensor. quad: integer tensor of the same shape. last: modality·2¹⁸ + step·4 + stream.
    """
    c1, c2 = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad.to(tl.uint32), c1, c2, tl.zeros_like(c1) + last.to(tl.uint32))
    n0, n1 = _box_muller((w0 >> 8).to(tl.int32), (w1 >> 8).to(tl.int32))
    n2, n3 = _box_muller((w2 >> 8).to(tl.int32), (w3 >> 8).to(tl.int32))
    return n0, n1, n2, n3


@triton.jit(do_not_specialize=["last", "row_offset"])
def _philox_normal(out_ptr, seed_ptr, last, row_offset, rows, columns, BLOCK: tl.constexpr):
    quads = tl.cdiv(columns, 4)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] quads, rows one after the other
    row, quad = i // quads, i % quads
    n0, n1, n2, n3 = normals(tl.load(seed_ptr), row + row_offset, quad, tl.zeros([1], tl.int64) + last)
    n = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK, 4)
    column = quad[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
    tl.store(out_ptr + row[:, None] * columns + column, n, mask=(row[:, None] < rows) & (column < columns))


def philox_normal(out: Tensor, seed: Tensor, last: int, row_offset: int) -> None:
    """Fills out, float32 [rows, columns]; seed int64 with one element on the same device."""
    rows, columns = out.shape
    quads = rows * -(-columns // 4)
    if quads:
        # 256 quads in 4 warps: 8 normals a thread, some 60 registers, and 16-byte stores.
        block = 256
        _philox_normal[(triton.cdiv(quads, block),)](out, seed, last, row_offset, rows, columns, BLOCK=block)


def compile_cases() -> list[CompileCase]:
    """The kernel as it is launched."""
    types = {
        "out_ptr": "*fp32",
        "seed_ptr": "*i64",
        "last": "i64",
        "row_offset": "i64",
        "rows": "i32",
        "columns": "i32",
    }
    return [CompileCase("noise.philox_normal", _philox_normal, types, {"BLOCK": 256}, 4, 3, False, ("columns",))]
