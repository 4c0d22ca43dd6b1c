"""The sampling chain on folded weights (`dhns_fast.diffusion.folding` has the formulas), two kernels a step.

    A   h = relu((x·Vxᵀ + c·Vcᵀ + τ·Vτᵀ)·s₁ + b₁′)                            [N, 4D], tiles [BM, BN]
    B   x ← mean_scale·x − noise_scale·((h·Gᵀ)·s₂ + b₂′) + sigma·z            [N, D],  tiles [BM, BN]

s₁ and s₂ are 1/σ of LayerNorm rows. Each tile leaves mean and M2 of its part of a row beside its values, and the kernel
that needs a row's variance merges them (Chan et al. 1983): no atomics, one order, so a row has the same bits in every
batch. G's rows are centred, h's mean drops out of the product. z is read, or drawn in the tile by the generator of
`kernels/noise.py`. N = modalities · batch; float32 sums. B's product is a sum of four: of few rows each is a program's,
and a second kernel adds them in the same order (`_partial`, `_finish`), which leaves every bit as it is.

Where D is small, one program keeps a block of rows for the whole chain instead (`_whole`): the state never leaves the
registers, h goes into the second product tile by tile, and the weights (8D² values) come from the second-level cache in
every step.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase, chip, choice, multiprocessors
from dhns_fast.kernels.noise import normals
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LAYER_NORM_EPS = tl.constexpr(1e-5)


@triton.jit
def _operand(x, ROUND: tl.constexpr):
    """A float32 block as the matrix unit gets it: "bf16", "emulated" bf16 (rounded, in float32) or "none"."""
    if ROUND == "bf16":
        return x.to(tl.bfloat16)
    elif ROUND == "emulated":
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _product(
    a, w, row, first_row, first_column, N, width, depth, begin, end, group,
    GROUPED: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a [N, depth] · w [width, depth]ᵀ at rows row [BM] from first_row on and BN columns from first_column on, float32,
    over the depth from begin to end, which is the matrix's or a whole number of BK further; operands as they are.
    GROUPED: each `group` of the depth is a sum of its own, and these are added in turn.

    a and w are pointers, or descriptors of blocks [BM, BK] and [BN, BK]: bulk copies, which give 0 beyond the matrix.
    """
    total, of_group = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    left = group
    # One loop, as copies go on beyond the end of a group.
    for start in range(begin, end, BK):
        if DESCRIPTORS:
            of_group = tl.dot(
                a.load([first_row, start]), w.load([first_column, start]).T, of_group, input_precision=PRECISION
            )
        else:
            k = start + tl.arange(0, BK)
            column = first_column + tl.arange(0, BN)
            # [BM, BK]
            b_a = tl.load(
                a + row[:, None] * depth + k[None, :], mask=(row < N)[:, None] & (k < depth)[None, :], other=0.0
            )
            b_w = tl.load(
                w + column[None, :] * depth + k[:, None],
                mask=(k < depth)[:, None] & (column < width)[None, :],
                other=0.0,
            )
            of_group = tl.dot(b_a, b_w, of_group, input_precision=PRECISION)
        if GROUPED:
            left -= BK
            if (left == 0) | (start + BK >= end):
                total += of_group
                of_group = tl.zeros([BM, BN], tl.float32)
                left = group
    if GROUPED:
        return total
    else:
        return of_group


@triton.jit
def _sum(x, A: tl.constexpr, B: tl.constexpr, n: tl.constexpr):
    """Sums [A, B] of the last axis of [A, B, n], half added to half: one order however a tile lies in registers."""
    for i in tl.static_range(0, 6):  # parts are of 64 at most
        if n >> i > 1:
            x = tl.sum(tl.reshape(x, (A, B, 2, n >> (i + 1))), axis=2)
    return tl.reshape(x, (A, B))


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _store_moments(
    part_ptr,
    v,
    row,
    m_row,
    first_column,
    width,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Mean and M2 of each PART columns of a tile's rows to part [N, ceil(width / PART), 2]. EVEN: no column lies beyond
    `width`.
    """
    parts = tl.cdiv(width, PART)
    i_part = first_column // PART + tl.arange(0, BN // PART)
    p_part = part_ptr + (row[:, None] * parts + i_part[None, :]) * 2
    v = tl.reshape(v, (BM, BN // PART, PART))
    if EVEN:
        mean = _sum(v, BM, BN // PART, PART) * (1.0 / PART)  # [BM, BN / PART]
        d = v - mean[:, :, None]
        m_part = m_row[:, None]
    else:
        m = (first_column + tl.reshape(tl.arange(0, BN), (BN // PART, PART)) < width)[None, :, :]
        count = tl.maximum(tl.minimum(width - i_part * PART, PART), 1).to(tl.float32)
        # Of a whole part the quotient is a power of two: the bits of the other branch.
        mean = _sum(tl.where(m, v, 0.0), BM, BN // PART, PART) * tl.div_rn(tl.zeros_like(count) + 1.0, count)[None, :]
        d = tl.where(m, v - mean[:, :, None], 0.0)
        m_part = m_row[:, None] & (i_part < parts)[None, :]
    tl.store(p_part, mean, mask=m_part)
    tl.store(p_part + 1, _sum(d * d, BM, BN // PART, PART), mask=m_part)


@triton.jit
def _inside(m_row, column, width, EVEN: tl.constexpr):
    """Which of a tile's elements are inside the matrix."""
    if EVEN:
        return m_row[:, None]
    else:
        return m_row[:, None] & (column < width)[None, :]


@triton.jit
def _vector(ptr, column, width, EVEN: tl.constexpr):
    """[1, BN] of a vector of `width`."""
    if EVEN:
        return tl.load(ptr + column)[None, :]
    else:
        return tl.load(ptr + column, mask=column < width, other=0.0)[None, :]


@triton.jit
def _moments(part_ptr, row, m_row, width, PART: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr):
    """Mean and variance [BM] of rows of `width`, merged from parts of PART columns, sixteen at a time: beside a
    product's accumulators there is no room for more."""
    FEW: tl.constexpr = 16 if PARTS > 16 else PARTS
    parts = tl.cdiv(width, PART)
    p_part = part_ptr + (row[:, None] * parts + tl.arange(0, FEW)[None, :]) * 2
    mean = tl.zeros_like(m_row.to(tl.float32))
    for first in tl.static_range(0, PARTS, FEW):
        i_part = first + tl.arange(0, FEW)
        count = tl.maximum(tl.minimum(width - i_part * PART, PART), 0).to(tl.float32)[None, :]
        part_mean = tl.load(p_part + 2 * first, mask=m_row[:, None] & (i_part < parts)[None, :], other=0.0)
        mean += tl.reshape(_sum(tl.reshape(part_mean * count, (BM, 1, FEW)), BM, 1, FEW), (BM,))
    mean /= width
    m2 = tl.zeros_like(mean)
    for first in tl.static_range(0, PARTS, FEW):
        i_part = first + tl.arange(0, FEW)
        m = m_row[:, None] & (i_part < parts)[None, :]
        count = tl.maximum(tl.minimum(width - i_part * PART, PART), 0).to(tl.float32)[None, :]
        d = tl.load(p_part + 2 * first, mask=m, other=0.0) - mean[:, None]
        part_m2 = tl.load(p_part + 2 * first + 1, mask=m, other=0.0) + d * d * count
        m2 += tl.reshape(_sum(tl.reshape(part_m2, (BM, 1, FEW)), BM, 1, FEW), (BM,))
    return mean, m2 / width


@triton.jit
def _merge(out_ptr, part_ptr, N, width, PART: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr):
    """out [N, 2]: mean and variance of rows of `width` from their parts, for what stays the same in all steps."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = row < N
    mean, var = _moments(part_ptr, row, m_row, width, PART, PARTS, BM)
    tl.store(out_ptr + row * 2, mean, mask=m_row)
    tl.store(out_ptr + row * 2 + 1, var, mask=m_row)


@triton.jit
def _merged_rstd(x_mean, x_var, c_mean, c_var, t_mean, t_var):
    """1/σ over the concatenation of three equally wide parts."""
    mean = (x_mean + c_mean + t_mean) / 3.0
    dx, dc, dt = x_mean - mean, c_mean - mean, t_mean - mean
    return 1.0 / tl.sqrt_rn((x_var + c_var + t_var + dx * dx + dc * dc + dt * dt) / 3.0 + LAYER_NORM_EPS)


@triton.jit
def _noise(
    fixed_ptr,
    address_ptr,
    row,
    first_column,
    N,
    batch,
    D,
    step,
    stream,
    FIXED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """z [BM, BN] of the tile's rows and columns: from fixed [N, D], or drawn for address = (seed, row_offset)."""
    if FIXED:
        column = first_column + tl.arange(0, BN)
        return tl.load(
            fixed_ptr + row[:, None] * D + column[None, :], mask=(row < N)[:, None] & (column < D)[None, :], other=0.0
        )
    else:
        modality = row // batch
        counter, last = row - modality * batch + tl.load(address_ptr + 1), (modality << 18) | (step << 2) | stream
        quad = first_column // 4 + tl.arange(0, BN // 4)
        n0, n1, n2, n3 = normals(tl.load(address_ptr), counter[:, None], quad[None, :], last[:, None])
        return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BM, BN)


@triton.jit(do_not_specialize=["stream"])
def _start(
    x_ptr, operand_ptr, part_ptr, fixed_ptr, address_ptr, N, batch, D, stream,
    FIXED: tl.constexpr, KEEP: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """x_T, or what is in fixed: its moments, where KEEP itself, and unless ROUND is "none" as operand."""
    first_column = tl.program_id(0) * PART
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = first_column + tl.arange(0, PART)
    m_row = row < N
    m = m_row[:, None] & (column < D)[None, :]
    o = row[:, None] * D + column[None, :]
    x = _noise(fixed_ptr, address_ptr, row, first_column, N, batch, D, 0, stream, FIXED, BM, PART)
    if KEEP:
        tl.store(x_ptr + o, x, mask=m)
    if ROUND != "none":
        tl.store(operand_ptr + o, _operand(x, ROUND), mask=m)
    _store_moments(part_ptr, x, row, m_row, first_column, D, PART, False, BM, PART)


@triton.jit
def _place(tile, row_tiles, column_tiles):
    """(row tile, column tile): eight row tiles take turns with all columns, so that both operands stay in the
    second-level cache.
    """
    group = tile // (8 * column_tiles)
    size = tl.minimum(row_tiles - group * 8, 8)
    place = tile % (8 * column_tiles)
    return group * 8 + place % size, place // size


@triton.jit
def _condition_end(
    p, fixed_ptr, row, m_row, first_column, width, ROUND: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr
):
    column = first_column + tl.arange(0, BN)
    tl.store(
        fixed_ptr + row[:, None] * width + column[None, :], _operand(p, ROUND), mask=_inside(m_row, column, width, EVEN)
    )


@triton.jit
def _condition(
    fixed_ptr, c, weight, N, D,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """c·Vcᵀ [N, 4D], rounded as operands are; a library's product would have other bits in another batch."""
    width = 4 * D
    i_row, i_column = _place(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(width, BN))
    row = i_row.to(tl.int64) * BM + tl.arange(0, BM)
    p = _product(
        c, weight, row, i_row * BM, i_column * BN, N, width, D, 0, D, D, False, PRECISION, DESCRIPTORS, BM, BN, BK
    )
    if SPLITS > 1:
        left, right = _halves(p, BM, BN)
        _condition_end(left, fixed_ptr, row, row < N, i_column * BN, width, ROUND, EVEN, BN // 2)
        _condition_end(right, fixed_ptr, row, row < N, i_column * BN + BN // 2, width, ROUND, EVEN, BN // 2)
    else:
        _condition_end(p, fixed_ptr, row, row < N, i_column * BN, width, ROUND, EVEN, BN)


@triton.jit
def _hidden_end(
    p, s1, h_ptr, h_part_ptr, fixed_ptr, time_ptr, bias_ptr, row, m_row, first_column, width,
    ROUND: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h of a product's columns from first_column on, in SPLITS pieces one after the other. time [4D] is this step's."""
    if SPLITS > 1:
        left, right = _halves(p, BM, BN)
        half: tl.constexpr = BN // 2
        _hidden_end(
            left, s1, h_ptr, h_part_ptr, fixed_ptr, time_ptr, bias_ptr, row, m_row, first_column, width,
            ROUND, PART, SPLITS // 2, EVEN, BM, half,
        )  # fmt: skip
        _hidden_end(
            right, s1, h_ptr, h_part_ptr, fixed_ptr, time_ptr, bias_ptr, row, m_row, first_column + half, width,
            ROUND, PART, SPLITS // 2, EVEN, BM, half,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, BN)
        m = _inside(m_row, column, width, EVEN)
        o = row[:, None] * width + column[None, :]
        p += tl.load(fixed_ptr + o, mask=m, other=0.0).to(tl.float32)
        p += _vector(time_ptr, column, width, EVEN)
        v = p * s1[:, None] + _vector(bias_ptr, column, width, EVEN)
        v = tl.where(v < 0.0, 0.0, v)  # NaN stays NaN
        tl.store(h_ptr + o, _operand(v, ROUND), mask=m)
        _store_moments(h_part_ptr, v, row, m_row, first_column, width, PART, EVEN, BM, BN)


@triton.jit(do_not_specialize=["step", "programs"])
def _hidden(
    h_ptr, h_part_ptr, x, x_part_ptr, state, fixed_ptr, c_moments_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias_ptr,
    N, D, step, programs,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    X_PART: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Kernel A. x and state are operands, pointers or descriptors; fixed = c·Vcᵀ [N, 4D], c_moments [N, 2], time [T,
    4D]; PARTS of X_PART columns make a row of x. Where PERSISTENT, a program takes tiles tile, tile + programs, ..."""
    width = 4 * D
    row_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(width, BN)
    i_time = (step - 1).to(tl.int64)
    first = tl.program_id(0)
    for tile in range(
        first, row_tiles * column_tiles if PERSISTENT else first + 1, programs if PERSISTENT else 1
    ):  # fmt: skip
        i_row, i_column = _place(tile, row_tiles, column_tiles)
        row = i_row.to(tl.int64) * BM + tl.arange(0, BM)
        m_row = row < N
        p = _product(
            x, state, row, i_row * BM, i_column * BN, N, width, D, 0, D, D, False, PRECISION, DESCRIPTORS, BM, BN, BK
        )
        x_mean, x_var = _moments(x_part_ptr, row, m_row, D, X_PART, PARTS, BM)
        c_mean = tl.load(c_moments_ptr + row * 2, mask=m_row, other=0.0)
        c_var = tl.load(c_moments_ptr + row * 2 + 1, mask=m_row, other=0.0)
        s1 = _merged_rstd(x_mean, x_var, c_mean, c_var, tl.load(time_mean_ptr + i_time), tl.load(time_var_ptr + i_time))
        _hidden_end(
            p, s1, h_ptr, h_part_ptr, fixed_ptr, time_ptr + i_time * width, bias_ptr, row, m_row, i_column * BN, width,
            ROUND, PART, SPLITS, EVEN, BM, BN,
        )  # fmt: skip


@triton.jit
def _between(noise, x, slope, width):
    """Predicted noise between slope·x − width and slope·x + width; NaN stays NaN."""
    centre = slope * x
    noise = tl.where(noise < centre - width, centre - width, noise)
    return tl.where(noise > centre + width, centre + width, noise)


@triton.jit
def _update_end(
    q, s2, out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, bias_ptr, noise_ptr, address_ptr, row, m_row, first_column,
    N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width,
    CLIP: tl.constexpr, NOISE: tl.constexpr, LEVEL: tl.constexpr, ROUND: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The next state in a product's columns from first_column on, in SPLITS pieces one after the other: noise is drawn
    beside what is left of the accumulators."""
    if SPLITS > 1:
        left, right = _halves(q, BM, BN)
        half: tl.constexpr = BN // 2
        _update_end(
            left, s2, out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, bias_ptr, noise_ptr, address_ptr, row, m_row, first_column,
            N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width, CLIP, NOISE, LEVEL, ROUND, PART, SPLITS // 2, EVEN, BM, half,
        )  # fmt: skip
        _update_end(
            right, s2, out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, bias_ptr, noise_ptr, address_ptr, row, m_row,
            first_column + half,
            N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width, CLIP, NOISE, LEVEL, ROUND, PART, SPLITS // 2, EVEN, BM, half,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, BN)
        noise = q * s2[:, None] + _vector(bias_ptr, column, D, EVEN)
        m = _inside(m_row, column, D, EVEN)
        o = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + o, mask=m, other=0.0)
        if CLIP:
            noise = _between(noise, x, slope, width)
        x = mean_scale * x - noise_scale * noise
        if NOISE != "none":
            x += sigma * _noise(
                noise_ptr, address_ptr, row, first_column, N, batch, D, step, stream, NOISE == "fixed", BM, BN
            )
        tl.store(out_ptr + o, x, mask=m)
        if ROUND != "none":
            tl.store(operand_ptr + o, _operand(x, ROUND), mask=m)
        if LEVEL:
            tl.store(level_ptr + o, x, mask=m)
        _store_moments(out_part_ptr, x, row, m_row, first_column, D, PART, EVEN, BM, BN)


@triton.jit
def _hidden_rstd(part_ptr, row, m_row, width, PART: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr):
    """1/σ [BM] of rows of h."""
    _, var = _moments(part_ptr, row, m_row, width, PART, PARTS, BM)
    return 1.0 / tl.sqrt_rn(var + LAYER_NORM_EPS)


@triton.jit(do_not_specialize=["step", "stream", "programs"])
def _update(
    out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, h, h_part_ptr, output, bias_ptr, noise_ptr, address_ptr,
    N, batch, D, group, step, stream, mean_scale, noise_scale, sigma, slope, width, programs,
    CLIP: tl.constexpr, NOISE: tl.constexpr, LEVEL: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr, H_PART: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Kernel B. NOISE "drawn", "fixed" or "none" (the last step, and where sigma is 0); CLIP: slope and width count;
    LEVEL: the new state is a result too; PARTS of H_PART columns make a row of h; each `group` of the depth is a sum of
    its own. out may be x. Tiles as in A."""
    row_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(D, BN)
    first = tl.program_id(0)
    for tile in range(
        first, row_tiles * column_tiles if PERSISTENT else first + 1, programs if PERSISTENT else 1
    ):  # fmt: skip
        i_row, i_column = _place(tile, row_tiles, column_tiles)
        row = i_row.to(tl.int64) * BM + tl.arange(0, BM)
        m_row = row < N
        # Group by group, as `_partial` and `_finish` sum them.
        q = _product(
            h, output, row, i_row * BM, i_column * BN, N, D, 4 * D, 0, 4 * D, group, True, PRECISION, DESCRIPTORS, BM, BN, BK
        )  # fmt: skip
        s2 = _hidden_rstd(h_part_ptr, row, m_row, 4 * D, H_PART, PARTS, BM)
        _update_end(
            q, s2, out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, bias_ptr, noise_ptr, address_ptr, row, m_row, i_column * BN,
            N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width, CLIP, NOISE, LEVEL, ROUND, PART, SPLITS, EVEN, BM, BN,
        )  # fmt: skip


@triton.jit
def _partial(
    partial_ptr, h, output, N, D, group,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Kernel B's product for few rows: of program (tile, group) that group of the depth, to partial [groups, N, D]."""
    i_row, i_column = _place(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(D, BN))
    i_group = tl.program_id(1)
    row = i_row.to(tl.int64) * BM + tl.arange(0, BM)
    column = i_column * BN + tl.arange(0, BN)
    begin = i_group * group
    q = _product(
        h, output, row, i_row * BM, i_column * BN, N, D, 4 * D, begin, tl.minimum(begin + group, 4 * D), group, False,
        PRECISION, DESCRIPTORS, BM, BN, BK,
    )  # fmt: skip
    tl.store(
        partial_ptr + (i_group.to(tl.int64) * N + row[:, None]) * D + column[None, :], q,
        mask=(row < N)[:, None] & (column < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "stream"])
def _finish(
    out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, partial_ptr, h_part_ptr, bias_ptr, noise_ptr, address_ptr,
    N, batch, D, groups, step, stream, mean_scale, noise_scale, sigma, slope, width,
    CLIP: tl.constexpr, NOISE: tl.constexpr, LEVEL: tl.constexpr, ROUND: tl.constexpr, H_PART: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What kernel B does after its product, from partial [groups, N, D], in programs (row tile, column tile)."""
    first_column = tl.program_id(1) * BN
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = first_column + tl.arange(0, BN)
    m_row = row < N
    m = _inside(m_row, column, D, EVEN)
    q = tl.zeros([BM, BN], tl.float32)
    for group in range(0, groups):
        q += tl.load(partial_ptr + (group * N + row[:, None]) * D + column[None, :], mask=m, other=0.0)
    _update_end(
        q, _hidden_rstd(h_part_ptr, row, m_row, 4 * D, H_PART, PARTS, BM),
        out_ptr, operand_ptr, out_part_ptr, level_ptr, x_ptr, bias_ptr, noise_ptr, address_ptr, row, m_row, first_column,
        N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width, CLIP, NOISE, LEVEL, ROUND, PART, 1, EVEN, BM, BN,
    )  # fmt: skip


@triton.jit
def _row_moments(v, m_column, width):
    """Mean and variance [BM] of rows [BM, BN] that lie in registers whole."""
    mean = tl.sum(tl.where(m_column[None, :], v, 0.0), axis=1) / width
    d = tl.where(m_column[None, :], v - mean[:, None], 0.0)
    return mean, tl.sum(d * d, axis=1) / width


@triton.jit
def _whole_step(
    x, c_mean, c_var, fixed_ptr, noise_ptr, row,
    state_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias1_ptr, output_ptr, bias2_ptr, scale_ptr, address_ptr,
    N, batch, D, T, step, stream,
    CLIP: tl.constexpr, FIXED: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state after one step from x, [BM, BD] both. fixed = c·Vcᵀ [N, 4D], noise [T − 1, N, D] of the side at
    hand.
    """
    dim = tl.arange(0, BD)
    m_row, m_dim = row < N, dim < D
    width = 4 * D
    x_mean, x_var = _row_moments(x, m_dim, D)
    t_mean, t_var = tl.load(time_mean_ptr + step - 1), tl.load(time_var_ptr + step - 1)
    s1 = _merged_rstd(x_mean, x_var, c_mean, c_var, t_mean, t_var)
    operand = _operand(x, ROUND)
    q = tl.zeros([BM, BD], tl.float32)
    mean, m2 = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, width, BN):
        column = start + tl.arange(0, BN)
        m_column = column < width
        m_weight = m_dim[:, None] & m_column[None, :]
        w = tl.load(state_ptr + column[None, :] * D + dim[:, None], mask=m_weight, other=0.0)  # [BD, BN]
        p = tl.dot(operand, w, input_precision=PRECISION)
        p += tl.load(
            fixed_ptr + row[:, None] * width + column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
        ).to(tl.float32)
        p += tl.load(time_ptr + (step - 1) * width + column, mask=m_column, other=0.0)[None, :]
        v = p * s1[:, None] + tl.load(bias1_ptr + column, mask=m_column, other=0.0)[None, :]
        v = tl.where(v < 0.0, 0.0, v)  # NaN stays NaN
        count = tl.minimum(width - start, BN).to(tl.float32)
        t_mean_h, t_var_h = _row_moments(v, m_column, count)
        d = t_mean_h - mean
        before = start + 0.0
        mean += d * (count / (before + count))
        m2 += t_var_h * count + d * d * (before * count / (before + count))
        # [BN, BD]
        g = tl.load(
            output_ptr + dim[None, :] * width + column[:, None], mask=m_dim[None, :] & m_column[:, None], other=0.0
        )
        q = tl.dot(_operand(v, ROUND), g, q, input_precision=PRECISION)
    s2 = 1.0 / tl.sqrt_rn(m2 / width + LAYER_NORM_EPS)
    noise = q * s2[:, None] + tl.load(bias2_ptr + dim, mask=m_dim, other=0.0)[None, :]
    p_scale = scale_ptr + (step - 1) * 5
    if CLIP:
        noise = _between(noise, x, tl.load(p_scale + 3), tl.load(p_scale + 4))
    x = tl.load(p_scale) * x - tl.load(p_scale + 1) * noise
    if step > 1:
        fixed_noise_ptr = noise_ptr + (T - step).to(tl.int64) * N * D
        x += tl.load(p_scale + 2) * _noise(
            fixed_noise_ptr, address_ptr, row, 0, N, batch, D, step, stream, FIXED, BM, BD
        )
    return x


@triton.jit(do_not_specialize=["N", "T", "last", "slots", "turns"])
def _whole(
    out_ptr, slot_ptr, c_ptr, fixed_ptr, start_ptr, noise_ptr, streams_ptr,
    state_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias1_ptr, output_ptr, bias2_ptr, scale_ptr, address_ptr,
    N, batch, D, T, last, slots, turns,
    CLIP: tl.constexpr, FIXED: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All steps T .. last + 1 of BM rows. Tail is side 0: c, fixed, start and noise [2, ...], out [2, slots, N, D];
    slot_ptr [T]: where the state after step t goes, at t − 1, or −1; streams_ptr [2, 2]: of x_T and of the steps."""
    # "corrected": the sides are chains of their own, in programs of their own, 1 turn a step. "release": the head is
    # read off the tail's states, in a turn of its own: one place in the code for both, as written out twice it takes
    # the registers of two.
    side = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dim = tl.arange(0, BD)
    m_row, m_dim = row < N, dim < D
    o = row[:, None] * D + dim[None, :]
    m = m_row[:, None] & m_dim[None, :]
    plane = N.to(tl.int64) * D
    c_mean, c_var = _row_moments(tl.load(c_ptr + side * plane + o, mask=m, other=0.0), m_dim, D)
    x = _noise(
        start_ptr + side * plane, address_ptr, row, 0, N, batch, D, 0, tl.load(streams_ptr + side * 2), FIXED, BM, BD
    )
    b_mean, b_var = _row_moments(tl.load(c_ptr + plane + o, mask=m, other=0.0), m_dim, D)
    for turn in range(0, turns * (T - last)):
        step = T - turn // turns
        of_head = turn % turns
        this = side + of_head
        slot = tl.load(slot_ptr + step - 1)
        if (of_head == 0) | (slot >= 0):
            made = _whole_step(
                x, tl.where(of_head == 0, c_mean, b_mean), tl.where(of_head == 0, c_var, b_var),
                fixed_ptr + this * 4 * plane, noise_ptr + this * (T - 1) * plane, row,
                state_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias1_ptr, output_ptr, bias2_ptr, scale_ptr, address_ptr,
                N, batch, D, T, step, tl.load(streams_ptr + this * 2 + 1), CLIP, FIXED, ROUND, PRECISION, BM, BN, BD,
            )  # fmt: skip
            if slot >= 0:
                tl.store(out_ptr + (this * slots + slot) * plane + o, made, mask=m)
            if of_head == 0:
                x = made


@dataclass(frozen=True)
class Tile:
    """Launch configuration of a kernel with a product: rows × columns a tile, depth at a time.

    Args:
        descriptors: operands come by bulk copies, from sm_90 on and where rows are aligned.
        splits: pieces of a tile that the epilogue takes one after the other: 1, 2 or 4.
        persistent: as many programs as multiprocessors.
        divided: groups of the depth in programs of their own, and a kernel after them that adds them up; of kernel B.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    splits: int = 1
    persistent: bool = False
    divided: bool = False


# The first of a list is what runs where no table says otherwise: on an H100 (N 6000, D 1024) the best of 130 variants,
# in µs beside it. Depth is one for each precision: the products of "ieee" are summed block by block, and bits must not
# depend on a choice that the batch makes. Loads and products in warps of their own are no candidates: Triton, 3.6 and
# 3.9, does not compile these loops so.
CANDIDATES: dict[tuple[str, str], list[Tile]] = {
    ("hidden", "bf16"): [
        Tile(128, 256, 64, 8, 3, True, 2),  # 140
        Tile(128, 256, 64, 8, 3, True, 2, True),  # 160 with a float32 condition
        Tile(256, 128, 64, 8, 3, True, 2, True),  # 149 with a float32 condition
        Tile(128, 128, 64, 8, 4, True),  # 173 with a float32 condition
        Tile(128, 128, 64, 8, 4),
        Tile(64, 256, 64, 4, 4, True, 2),
    ],
    ("hidden", "tf32"): [
        Tile(128, 256, 32, 8, 3, True, 4),  # 262
        Tile(128, 256, 32, 8, 3, True, 2),  # 221, and 232 bytes of spills
        Tile(128, 256, 32, 8, 3, True, 2, True),  # 250
        Tile(128, 128, 32, 8, 4, True),  # 288
        Tile(128, 128, 32, 8, 3),  # 319
    ],
    ("hidden", "ieee"): [
        Tile(128, 64, 32, 4, 3, True),
        Tile(128, 64, 32, 4, 3),  # 728
        Tile(128, 128, 32, 8, 3, True),  # 758
    ],
    ("update", "bf16"): [
        Tile(128, 128, 64, 8, 4, True, 4),
        Tile(128, 128, 64, 8, 4, True, 4, True),
        Tile(128, 128, 64, 8, 4, True, 2, True),  # 134, and 64 bytes of spills
        Tile(128, 128, 64, 8, 4, True),  # 138, and 320
        Tile(128, 128, 64, 8, 4),  # 138
        Tile(64, 128, 64, 8, 3),  # 206
    ],
    ("update", "tf32"): [
        Tile(128, 128, 32, 8, 4, True, 4),
        Tile(128, 128, 32, 8, 4, True),  # 191
        Tile(64, 128, 32, 8, 3),  # 255
    ],
    ("update", "ieee"): [
        Tile(128, 128, 32, 8, 3, True, 4),  # 721 in one piece
        Tile(128, 64, 32, 4, 3, True, 2),
        Tile(128, 64, 32, 4, 3),  # 726
    ],
}
# Before sm_90 there are no bulk copies, and a tile of accumulators shares the registers with its operands: in one piece
# kernel A spills 3 to 45 KB on sm_80, kernel B 728 bytes.
_WITHOUT_DESCRIPTORS = {
    ("hidden", "bf16"): Tile(128, 128, 64, 8, 3, splits=2),
    ("hidden", "tf32"): Tile(128, 128, 32, 8, 3, splits=2),
    ("update", "bf16"): Tile(64, 128, 64, 8, 3),
    ("update", "tf32"): Tile(64, 128, 32, 8, 3, splits=2),
    ("hidden", "ieee"): Tile(64, 64, 32, 4, 2),
    ("update", "ieee"): Tile(64, 64, 32, 8, 2),  # of four warps 644 bytes of spills
}
# Rows that tiles of 128 would leave to a few multiprocessors: small tiles, and many stages, as each has memory's
# latency to itself. Sums and moments have the order of the others, and a row has the same bits. Of 64 rows of D 1024,
# kernel B is 16 such tiles, each of which reads 1 MB (bf16): four groups of the depth make them 64, for a launch more.
# Kernel A is 64 tiles that read 256 KB, and a second accumulator beside its tiles of 128 x 256 would not fit: its depth
# is one sum.
FEW_ROWS = 256
FEW_CANDIDATES: dict[tuple[str, str], list[Tile]] = {
    ("hidden", "bf16"): [Tile(64, 64, 64, 4, 6, True), Tile(64, 64, 64, 4, 4, True)],
    ("hidden", "tf32"): [Tile(64, 64, 32, 4, 6, True), Tile(64, 64, 32, 4, 4, True)],
    ("hidden", "ieee"): [Tile(64, 64, 32, 4, 4, True), Tile(64, 64, 32, 4, 3, True)],
    # Of four warps 64 bytes of spills on sm_100.
    ("update", "bf16"): [Tile(64, 64, 64, 8, 6, True, divided=True), Tile(64, 64, 64, 4, 6, True)],
    ("update", "tf32"): [Tile(64, 64, 32, 8, 6, True, divided=True), Tile(64, 64, 32, 4, 6, True)],
    ("update", "ieee"): [Tile(64, 64, 32, 4, 4, True, divided=True), Tile(64, 64, 32, 4, 4, True)],
}
# Rows and columns of a tile of `_finish`: 64 programs for 64 rows of D 1024.
FINISH = 16, 64
# Rows of a tile of x_T: with 64 the normals being drawn spill 48 bytes on sm_100.
START_ROWS = 32
# Columns of a part of the moments of x's and h's rows: what the least piece of a tile of kernel B and of kernel A has.
PARTS_OF = {"x": 32, "h": 64}


def tile(kernel: str, precision: str, D: int, rows: int, arch: int) -> Tile:
    """What "hidden" or "update" is launched with for `rows` rows of `D`; narrow states get narrow tiles."""
    few = rows <= FEW_ROWS
    if arch >= 90:
        name, candidates = ("denoise_few", FEW_CANDIDATES) if few else ("denoise", CANDIDATES)
        chosen = choice(f"{name}.{kernel}", precision, D, arch, candidates[kernel, precision])
    else:
        chosen = replace(_WITHOUT_DESCRIPTORS[kernel, precision], divided=few and kernel == "update")
    small = max(16, triton.next_power_of_2(D))
    columns = min(chosen.columns, small)
    aligned = D * (2 if precision == "bf16" else 4) % 16 == 0
    return replace(
        chosen,
        columns=columns,
        depth=min(chosen.depth, small),
        descriptors=chosen.descriptors and aligned,
        splits=min(chosen.splits, columns // part("h" if kernel == "hidden" else "x", D)),
    )


# Products and sums are those of the source, in whichever kernel they stand: where a compiler fuses them, it chooses
# which product of a sum keeps its last bits.
AS_WRITTEN = {"enable_fp_fusion": False}


def even(width: int, tile: Tile) -> bool:
    """Whether columns need no mask. Of two pieces they have one all the same: without it the loads of both are issued
    at once, and kernel A spills 96 bytes."""
    return width % tile.columns == 0 and tile.splits != 2


def group_depth(D: int, tile: Tile) -> int:
    """Depth of h's columns that kernel B sums apart from the others, whatever the batch: a quarter, in whole blocks."""
    return triton.cdiv(D, tile.depth) * tile.depth


def part(of: str, D: int) -> int:
    """Columns of a part of the moments of "x" or "h"."""
    return min(PARTS_OF[of], max(16, triton.next_power_of_2(D)))


def input_precision(precision: str, on_gpu: bool) -> str:
    """What the matrix unit does: "ieee" is three tf32 products, whose sum is nearer to float64 than a chain of fused
    operations (9e-8 and 3e-7 at depth 1024 on an H100) and five times as fast. An operand x is hi + lo, hi its nearest
    tf32 number. Infinities and NaN are hi's alone: the two small products are made zero where they are NaN. Beyond
    3.399e38 the nearest tf32 number is infinite.
    """
    return {"ieee": "tf32x3" if on_gpu else "ieee", "tf32": "tf32", "bf16": "ieee"}[precision]


@dataclass(frozen=True)
class WholeTiles:
    """Launch configuration of `_whole`; like :class:`Tiles` it must not depend on the batch."""

    BM: int
    BN: int
    BD: int
    warps: int
    stages: int

    @classmethod
    def of(cls, D: int, precision: str) -> WholeTiles:
        # State, its next value and the noise being drawn take 16 registers a thread of 8 warps each at 64 x 64; at 64 x
        # 128 ptxas spilt hundreds of bytes, and on sm_80 so did a second stage of tf32 (448) and ieee (32) and tiles of
        # 64 columns (416).
        # Of bf16 beyond 64, 32 rows fit: 220 registers at 128, 255 at 256.
        rows, stages = {"bf16": (64, 2) if D <= 64 else (32, 2), "tf32": (64, 1), "ieee": (32, 1)}[precision]
        return cls(rows, 32, max(16, triton.next_power_of_2(D)), 8, stages)


# The widest D for `_whole` by precision. What no longer goes through memory in a step is x and h, 1.8 KB a row there
# and back in float32 at 64; in exchange each program reads the weights in every step from the second-level cache, 8·D²
# values: 64 KB in bf16 at 64; 256 KB at 128, which a multiprocessor gets in 2.4 µs, where the two launches of a step
# take 6. At 256 it is 1 MB and 10 µs for 32 rows, and 6000 rows are two turns of that: no gain over two kernels. At 128
# ptxas spilt 676 bytes of tf32 (64 rows, 16 warps) and 336 of ieee. Estimates by count: not yet measured.
WHOLE_WIDTH = {"bf16": 128, "tf32": 64, "ieee": 64}


@dataclass
class _Side:
    """State of one side: x [N, D] and the same as operand, which the kernels see as matrix; the parts of its moments
    [N, parts, 2]; what its condition fixes."""

    x: Tensor
    operand: Tensor
    matrix: Any
    part: Tensor
    fixed: Tensor
    c_moments: Tensor
    start: Tensor | None
    noise: Tensor | None
    streams: tuple[int, int]


@dataclass(frozen=True)
class Chain:
    """The operands of one chain and its launches. Pairs are (tail, head).

    Args:
        heads, tails: the results, float32 [M, B, D] a level.
        conditions: c, float32 [M, B, D].
        weights: Vx, Vc [4D, D] and G [D, 4D] (bfloat16 or float32), τ·Vτᵀ [T, 4D], mean and variance of τ [T], b₁′
            [4D], b₂′ [D] (float32).
        schedule: mean_scale, noise_scale and sigma of each step, slope and width of the clip or empty ones.
        address: int64 [2], seed and row offset of drawn noise.
        given: x_T, x_T of the head [M, B, D], noise of tail and head [T − 1, M, B, D], or None to draw.
        streams: of x_T and of the steps.
    """

    heads: Sequence[Tensor]
    tails: Sequence[Tensor]
    conditions: Sequence[Tensor]
    weights: Sequence[Tensor]
    schedule: Sequence[Sequence[float]]
    levels: Sequence[int]
    release: bool
    precision: str
    address: Tensor
    given: Sequence[Tensor | None]
    streams: tuple[tuple[int, int], tuple[int, int]]

    @property
    def rounding(self) -> str:
        # The interpreter's bfloat16 arithmetic is wrong: there weights come rounded in float32 and activations are
        # rounded by hand.
        return "none" if self.precision != "bf16" else "bf16" if self.weights[0].dtype == torch.bfloat16 else "emulated"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """M, B, D, N and T."""
        M, B, D = self.tails[0].shape
        return M, B, D, M * B, len(self.schedule[0])

    @property
    def clips(self) -> bool:
        return bool(self.schedule[3])

    def run(self) -> None:
        """Fill `heads` and `tails`."""
        (_chain_whole if self.tails[0].shape[-1] <= WHOLE_WIDTH[self.precision] else _chain_of_steps)(self)


# Kept for good: CUDA graphs read them, and copies from the host cannot be captured.
@functools.cache
def _tables(
    slots: tuple[int, ...],
    streams: tuple[tuple[int, int], ...],
    schedule: tuple[tuple[float, ...], ...],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place of each step's result or −1, int32 [T]; streams, int32 [2, 2]; the schedule, float32 [T, 5]."""
    places = [slots.index(t) if t in slots else -1 for t in range(len(schedule[0]))]
    rows = list(zip(*(column or [0.0] * len(schedule[0]) for column in schedule), strict=True))
    return (
        torch.tensor(places, dtype=torch.int32, device=device),
        torch.tensor(streams, dtype=torch.int32, device=device),
        torch.tensor(rows, dtype=torch.float32, device=device),
    )


def _chain_whole(call: Chain) -> None:
    """One program a block of rows, for the whole chain."""
    M, B, D, N, T = call.sizes
    state, condition, output, time, time_mean, time_var, bias1, bias2 = call.weights
    arch = chip(bias1.device)
    tiles = WholeTiles.of(D, call.precision)
    product = {"ROUND": call.rounding, "PRECISION": input_precision(call.precision, arch > 0)}
    c = torch.stack(list(call.conditions))
    fixed = bias1.new_empty(2, N, 4 * D, dtype=output.dtype)
    operand = c.to(output.dtype) if call.rounding != "emulated" else c.bfloat16().float()
    gemm = replace(tile("hidden", call.precision, D, N, 0), stages=1)
    for side in (0, 1):
        _condition[(triton.cdiv(4 * D, gemm.columns) * triton.cdiv(N, gemm.rows),)](
            fixed[side], operand[side], condition, N, D, **product, DESCRIPTORS=False, SPLITS=1, EVEN=4 * D % gemm.columns == 0,
            BM=gemm.rows, BN=gemm.columns, BK=gemm.depth, num_warps=gemm.warps, num_stages=gemm.stages,
        )  # fmt: skip
    slots = tuple(sorted(set(call.levels)))
    made = bias1.new_empty(2, len(slots), M, B, D)
    slot_of, stream_of, scales = _tables(slots, call.streams, tuple(map(tuple, call.schedule)), bias1.device)
    x_T, x_T_head, *noise = call.given
    drawn = x_T is None or x_T_head is None
    start, z = (bias1, bias1) if drawn else (torch.stack([x_T, x_T_head]), torch.stack(noise))  # type: ignore[list-item,arg-type]
    _whole[(triton.cdiv(N, tiles.BM), 1 if call.release else 2)](
        made, slot_of, c, fixed, start, z, stream_of,
        state, time, time_mean, time_var, bias1, output, bias2, scales, call.address,
        N, B, D, T, slots[0], len(slots), 2 if call.release else 1,
        CLIP=call.clips, FIXED=not drawn, **product, BM=tiles.BM, BN=tiles.BN, BD=tiles.BD, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    for side, results in enumerate((call.tails, call.heads)):
        for result, level in zip(results, call.levels, strict=True):
            result.copy_(made[side, slots.index(level)])


def _chain_of_steps(call: Chain) -> None:
    """Two kernels a step."""
    _, B, D, N, T = call.sizes
    state, condition, output, time, time_mean, time_var, bias1, bias2 = call.weights
    arch = chip(bias1.device)
    hidden, update = (tile(kernel, call.precision, D, N, arch) for kernel in ("hidden", "update"))
    x_part_width, h_part_width = part("x", D), part("h", D)
    common = {"PRECISION": input_precision(call.precision, arch > 0), "ROUND": call.rounding}
    kind = output.dtype  # of operands; float32 buffers are their own
    copied = call.rounding != "none"
    x_parts, h_parts = triton.cdiv(D, x_part_width), triton.cdiv(4 * D, h_part_width)
    h, h_part = bias1.new_empty(N, 4 * D, dtype=kind), bias1.new_empty(N, h_parts, 2)
    group = group_depth(D, update)
    groups = triton.cdiv(4 * D, group)
    partial = bias1.new_empty(groups, N, D) if update.divided else bias1

    def matrix(x: Tensor, tile: Tile, rows: int) -> Any:
        return TensorDescriptor.from_tensor(x, [rows, tile.depth]) if tile.descriptors else x

    def launch(tile: Tile, columns: int, kernel: Any, *arguments: Any, **constants: Any) -> None:
        tiles = triton.cdiv(N, tile.rows) * triton.cdiv(columns, tile.columns)
        programs = min(tiles, multiprocessors(bias1.device)) if tile.persistent else tiles
        more: dict[str, Any] = {} if kernel is _condition else {"PERSISTENT": tile.persistent}
        kernel[(programs,)](
            *arguments, *(() if kernel is _condition else (programs,)), **common, **constants, **more, DESCRIPTORS=tile.descriptors,
            SPLITS=tile.splits, EVEN=even(columns, tile), BM=tile.rows, BN=tile.columns, BK=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, **AS_WRITTEN,
        )  # fmt: skip

    state_matrix, condition_matrix = (matrix(w, hidden, hidden.columns) for w in (state, condition))
    output_matrix, h_matrix = matrix(output, update, update.columns), matrix(h, update, update.rows)
    finish_rows, finish_columns = FINISH[0], min(FINISH[1], max(16, triton.next_power_of_2(D)))
    start_grid = x_parts, triton.cdiv(N, START_ROWS)
    start_constants = {"PART": x_part_width, "ROUND": call.rounding, "BM": START_ROWS, "num_warps": 4}

    def side(c: Tensor, start: Tensor | None, noise: Tensor | None, streams: tuple[int, int]) -> _Side:
        x, fixed = bias1.new_empty(N, D), bias1.new_empty(N, 4 * D, dtype=kind)
        operand = bias1.new_empty(N, D, dtype=kind) if copied else x
        x_part, c_moments = bias1.new_empty(N, x_parts, 2), bias1.new_empty(N, 2)
        # The places of the operand and of the moments hold c's until x_T is there.
        rounded = operand if copied else c.view(N, D)
        _start[start_grid](x, rounded, x_part, c, call.address, N, B, D, 0, FIXED=True, KEEP=False, **start_constants)
        _merge[(triton.cdiv(N, 64),)](
            c_moments, x_part, N, D, PART=x_part_width, PARTS=triton.next_power_of_2(x_parts), BM=64, num_warps=4
        )
        launch(hidden, 4 * D, _condition, fixed, matrix(rounded, hidden, hidden.rows), condition_matrix, N, D)
        return _Side(x, operand, matrix(operand, hidden, hidden.rows), x_part, fixed, c_moments, start, noise, streams)

    def start(side: _Side) -> None:
        drawn = side.start is None
        source = call.address if side.start is None else side.start
        _start[start_grid](
            side.x,
            side.operand,
            side.part,
            source,
            call.address,
            N,
            B,
            D,
            side.streams[0],
            FIXED=not drawn,
            KEEP=True,
            **start_constants,
        )

    def step(side: _Side, source: _Side, t: int, results: Sequence[Tensor]) -> None:
        launch(
            hidden, 4 * D, _hidden,
            h, h_part, source.matrix, source.part, state_matrix, side.fixed, side.c_moments, time, time_mean, time_var, bias1, N, D, t,
            X_PART=x_part_width, PART=h_part_width, PARTS=triton.next_power_of_2(x_parts),
        )  # fmt: skip
        noise = "none" if t == 1 or not call.schedule[2][t - 1] else "drawn" if side.noise is None else "fixed"
        z = side.noise[T - t] if side.noise is not None and t > 1 else call.address
        of_step = t, side.streams[1], *(column[t - 1] if column else 0.0 for column in call.schedule)
        kinds = {"CLIP": call.clips, "NOISE": noise, "LEVEL": bool(results)}
        kinds |= {"H_PART": h_part_width, "PART": x_part_width, "PARTS": triton.next_power_of_2(h_parts)}
        made = side.x, side.operand, side.part, results[0] if results else side.x, source.x
        if update.divided:
            tiles = triton.cdiv(N, update.rows) * triton.cdiv(D, update.columns)
            _partial[(tiles, groups)](
                partial, h_matrix, output_matrix, N, D, group,
                PRECISION=common["PRECISION"], DESCRIPTORS=update.descriptors, BM=update.rows, BN=update.columns, BK=update.depth,
                num_warps=update.warps, num_stages=update.stages, **AS_WRITTEN,
            )  # fmt: skip
            _finish[(triton.cdiv(N, finish_rows), triton.cdiv(D, finish_columns))](
                *made, partial, h_part, bias2, z, call.address, N, B, D, groups, *of_step,
                **kinds, ROUND=call.rounding, EVEN=D % finish_columns == 0, BM=finish_rows, BN=finish_columns,
                num_warps=4, **AS_WRITTEN,
            )  # fmt: skip
        else:
            launch(
                update, D, _update, *made, h_matrix, h_part, output_matrix, bias2, z, call.address, N, B, D, group, *of_step, **kinds
            )  # fmt: skip
        for copy in results[1:]:
            copy.copy_(results[0])

    tail, head = (side(call.conditions[k], call.given[k], call.given[2 + k], call.streams[k]) for k in (0, 1))
    start(tail)
    if not call.release:
        start(head)
    for t in range(T, min(call.levels), -1):
        wanted = [k for k, level in enumerate(call.levels) if level == t - 1]
        step(tail, tail, t, [call.tails[k] for k in wanted])
        # "release": the head is one more step from the tail's new state. "corrected": it has a chain of its own.
        if wanted or not call.release:
            step(head, tail if call.release else head, t, [call.heads[k] for k in wanted])


class Graphs:
    """The latest few chains as CUDA graphs: 110 launches become one, which is what a small batch waits for.

    A graph holds buffers for its inputs and results, hence the bound; a last batch of another size has a graph of its
    own.
    """

    def __init__(self, bound: int = 4) -> None:
        self.bound = bound
        self._graphs: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = OrderedDict()

    def run(
        self, heads: Sequence[Tensor], tails: Sequence[Tensor], inputs: Sequence[Tensor], key: Any, body: Any
    ) -> None:
        """body(heads, tails, inputs) with the tensors given, as a graph of `key` and the inputs' shapes; it must depend
        on nothing else.
        """
        key = (key, tuple((x.shape, x.dtype, x.device) for x in inputs), torch.cuda.current_stream().device)
        if key not in self._graphs:
            static, results = [x.clone() for x in inputs], [torch.empty_like(x) for x in (*heads, *tails)]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                # compiles the kernels: that cannot happen under capture
                body(results[: len(heads)], results[len(heads) :], static)
            with torch.cuda.graph(graph, stream=stream):
                body(results[: len(heads)], results[len(heads) :], static)
            torch.cuda.current_stream().wait_stream(stream)
            self._graphs[key] = graph, static, results
            while len(self._graphs) > self.bound:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, static, results = self._graphs[key]
        torch._foreach_copy_(static, list(inputs))
        graph.replay()
        torch._foreach_copy_([*heads, *tails], results)


def _operand_type(precision: str, tile: Tile, rows: int) -> str:
    kind = "bf16" if precision == "bf16" else "fp32"
    return f"tensordesc<{kind}[{rows}, {tile.depth}]>" if tile.descriptors else f"*{kind}"


def compile_case(
    kernel: str, precision: str, D: int, tile: Tile, archs: tuple[int, ...] = (), label: str = ""
) -> CompileCase:
    """ "hidden" or "update" as it is launched for states of D with a tile; of a divided one the product."""
    function = _hidden if kernel == "hidden" else _partial if tile.divided else _update
    operand = "*bf16" if precision == "bf16" else "*fp32"
    x_part, h_part = part("x", D), part("h", D)
    width, wide, parts = (4 * D, x_part, D) if kernel == "hidden" else (D, h_part, 4 * D)
    constants = {
        "ROUND": "bf16" if precision == "bf16" else "none", "PRECISION": input_precision(precision, True), "DESCRIPTORS": tile.descriptors,
        "PERSISTENT": tile.persistent, "SPLITS": tile.splits, "EVEN": even(width, tile),
        "PARTS": triton.next_power_of_2(triton.cdiv(parts, wide)), **({"X_PART": x_part, "PART": h_part} if kernel == "hidden" else
        {"H_PART": h_part, "PART": x_part}),
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth,
    }  # fmt: skip
    if kernel == "update":
        constants |= {"CLIP": True, "NOISE": "drawn", "LEVEL": True}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {
        "h_ptr": operand, "fixed_ptr": operand, "operand_ptr": operand, "address_ptr": "*i64", "noise_ptr": "*i64",
        **dict.fromkeys(("x", "h"), _operand_type(precision, tile, tile.rows)),
        **dict.fromkeys(("state", "output"), _operand_type(precision, tile, tile.columns)),
        **dict.fromkeys(("mean_scale", "noise_scale", "sigma", "slope", "width"), "fp32"),
    }  # fmt: skip
    names = [name for name in function.arg_names if name not in constants]
    of = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    name = f"denoise.{kernel} {precision}{label}"
    return CompileCase(
        name, function, of, constants, tile.warps, tile.stages, True, ("N", "D", "group"), archs, AS_WRITTEN
    )


def _compile_finish(precision: str, D: int) -> CompileCase:
    rounding = "bf16" if precision == "bf16" else "none"
    constants = {
        "CLIP": True, "NOISE": "drawn", "LEVEL": True, "ROUND": rounding, "H_PART": part("h", D), "PART": part("x", D),
        "PARTS": triton.next_power_of_2(triton.cdiv(4 * D, part("h", D))), "EVEN": True, "BM": FINISH[0], "BN": FINISH[1],
    }  # fmt: skip
    types = {"operand_ptr": "*bf16" if precision == "bf16" else "*fp32", "address_ptr": "*i64", "noise_ptr": "*i64"}
    types |= dict.fromkeys(("mean_scale", "noise_scale", "sigma", "slope", "width"), "fp32")
    names = [name for name in _finish.arg_names if name not in constants]
    of = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    return CompileCase(f"denoise.finish {precision}", _finish, of, constants, 4, 3, False, ("N", "D"), (), AS_WRITTEN)


def compile_cases() -> list[CompileCase]:
    """The kernels with a product in every precision and the one that draws x_T, at D 1024; the whole chain at 64 and at
    its widest.
    """
    D = 1024
    starts = {"x_ptr": "*fp32", "operand_ptr": "*bf16", "part_ptr": "*fp32", "fixed_ptr": "*i64", "address_ptr": "*i64"}
    starts |= dict.fromkeys(("N", "batch", "D", "stream"), "i32")
    constants: dict[str, Any] = {"FIXED": False, "KEEP": True, "ROUND": "bf16", "BM": START_ROWS, "PART": part("x", D)}
    cases = [CompileCase("denoise.start", _start, starts, constants, 4, 3, False, ("N", "D"))]
    merges = {"out_ptr": "*fp32", "part_ptr": "*fp32", "N": "i32", "width": "i32"}
    constants = {"PART": part("x", D), "PARTS": D // part("x", D), "BM": 64}
    cases.append(CompileCase("denoise.merge", _merge, merges, constants, 4, 3, False, ("N", "width")))
    for precision in ("ieee", "tf32", "bf16"):
        for kernel in ("hidden", "update"):
            cases.append(compile_case(kernel, precision, D, tile(kernel, precision, D, 6000, 80), (80,)))
            for arch in (90, 100):
                cases.append(compile_case(kernel, precision, D, tile(kernel, precision, D, 6000, arch), (arch,)))
            cases.append(
                compile_case(kernel, precision, D, tile(kernel, precision, D, FEW_ROWS, 90), (90, 100), " few rows")
            )
        divided = tile("update", precision, D, FEW_ROWS, 80)
        cases.append(compile_case("update", precision, D, divided, (80,), " few rows"))
        cases.append(_compile_finish(precision, D))
        for arch in (80, 90, 100):
            chosen = tile("hidden", precision, D, 6000, arch)
            constants = {
                "ROUND": "bf16" if precision == "bf16" else "none", "PRECISION": input_precision(precision, True),
                "DESCRIPTORS": chosen.descriptors, "SPLITS": chosen.splits, "EVEN": even(4 * D, chosen),
                "BM": chosen.rows, "BN": chosen.columns, "BK": chosen.depth,
            }  # fmt: skip
            types = {
                "fixed_ptr": "*bf16" if precision == "bf16" else "*fp32", "c": _operand_type(precision, chosen, chosen.rows),
                "weight": _operand_type(precision, chosen, chosen.columns), "N": "i32", "D": "i32",
            }  # fmt: skip
            name = f"denoise.condition {precision}"
            cases.append(
                CompileCase(
                    name,
                    _condition,
                    types,
                    constants,
                    chosen.warps,
                    chosen.stages,
                    True,
                    ("N", "D"),
                    (arch,),
                    AS_WRITTEN,
                )
            )
        for width in sorted({64, WHOLE_WIDTH[precision]}):
            cases.append(_compile_whole(precision, width))
    return cases


def _compile_whole(precision: str, width: int) -> CompileCase:
    whole = WholeTiles.of(width, precision)
    constants = {
        "CLIP": True, "FIXED": False, "ROUND": "bf16" if precision == "bf16" else "none", "PRECISION": input_precision(precision, True),
        "BM": whole.BM, "BN": whole.BN, "BD": whole.BD,
    }  # fmt: skip
    operand = "*bf16" if precision == "bf16" else "*fp32"
    types = {"state_ptr": operand, "output_ptr": operand, "fixed_ptr": operand}
    types |= {"address_ptr": "*i64", "slot_ptr": "*i32", "streams_ptr": "*i32"}
    names = [name for name in _whole.arg_names if name not in constants]
    of = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    # Tiles of 32 rows are below what Hopper's and Blackwell's own instructions take.
    matrix = "mma.sync" if whole.BM < 64 else True
    name = f"denoise.whole {precision}{'' if width == 64 else f' {width}'}"
    return CompileCase(name, _whole, of, constants, whole.warps, whole.stages, matrix, ("D",))
