"""The sampling chain on folded weights (`dhns_fast.diffusion.folding` has the formulas), two kernels a step.

    A   h = relu((x·Vxᵀ + c·Vcᵀ + τ·Vτᵀ)·s₁ + b₁′)                            [N, 4D], tiles [BM, BN]
    B   x ← mean_scale·x − noise_scale·((h·Gᵀ)·s₂ + b₂′) + sigma·z            [N, D],  tiles [BM, BN]

s₁ and s₂ are 1/σ of LayerNorm rows. Each tile leaves mean and M2 of its part of a row beside its values, and the kernel that needs a row's
variance merges them (Chan et al. 1983): no atomics, one order, so a row has the same bits in every batch. G's rows are centred, h's mean
drops out of the product. z is read, or drawn in the tile by the generator of `kernels/noise.py`. N = modalities · batch; float32 sums.

Where D is small, one program keeps a block of rows for the whole chain instead (`_whole`): the state never leaves the registers, h goes
into the second product tile by tile, and the weights (8D² values) come from the second-level cache in every step.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase
from dhns_fast.kernels.noise import normals
from torch import Tensor

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
    a_ptr, w_ptr, row, column, N, width, depth,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a [N, depth] · w [width, depth]ᵀ at rows [BM] and columns [BN], float32. w has its operand form already, a may be float32."""
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        b_a = tl.load(a_ptr + row[:, None] * depth + k[None, :], mask=(row < N)[:, None] & (k < depth)[None, :], other=0.0)  # [BM, BK]
        b_w = tl.load(w_ptr + column[None, :] * depth + k[:, None], mask=(k < depth)[:, None] & (column < width)[None, :], other=0.0)
        if b_a.dtype != b_w.dtype or ROUND == "emulated":
            b_a = _operand(b_a, ROUND)
        total = tl.dot(b_a, b_w, total, input_precision=PRECISION)
    return total


@triton.jit
def _store_moments(part_ptr, v, row, m_row, m_column, i_tile, tiles, BN: tl.constexpr):
    """Mean and M2 of a tile's rows to part [N, tiles, 2]."""
    count = tl.sum(m_column.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(m_column[None, :], v, 0.0), axis=1) / count
    d = tl.where(m_column[None, :], v - mean[:, None], 0.0)
    p_part = part_ptr + (row * tiles + i_tile) * 2
    tl.store(p_part, mean, mask=m_row)
    tl.store(p_part + 1, tl.sum(d * d, axis=1), mask=m_row)


@triton.jit
def _moments(part_ptr, row, m_row, tiles, width, TILE: tl.constexpr, TILES: tl.constexpr):
    """Mean and variance [BM] of rows of `width`, merged from parts of TILE columns."""
    t = tl.arange(0, TILES)
    p_part = part_ptr + (row[:, None] * tiles + t[None, :]) * 2
    m = m_row[:, None] & (t < tiles)[None, :]
    mean_t = tl.load(p_part, mask=m, other=0.0)  # [BM, TILES]
    m2_t = tl.load(p_part + 1, mask=m, other=0.0)
    count = tl.maximum(tl.minimum(width - t * TILE, TILE), 0).to(tl.float32)[None, :]
    mean = tl.sum(mean_t * count, axis=1) / width
    d = mean_t - mean[:, None]
    return mean, tl.sum(m2_t + d * d * count, axis=1) / width


@triton.jit
def _merged_rstd(x_mean, x_var, c_mean, c_var, t_mean, t_var):
    """1/σ over the concatenation of three equally wide parts."""
    mean = (x_mean + c_mean + t_mean) / 3.0
    dx, dc, dt = x_mean - mean, c_mean - mean, t_mean - mean
    return 1.0 / tl.sqrt_rn((x_var + c_var + t_var + dx * dx + dc * dc + dt * dt) / 3.0 + LAYER_NORM_EPS)


@triton.jit
def _noise(fixed_ptr, address_ptr, row, i_tile, N, batch, D, step, stream, FIXED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """z [BM, BN] of the tile's rows and columns: from fixed [N, D], or drawn for address = (seed, row_offset)."""
    if FIXED:
        column = i_tile * BN + tl.arange(0, BN)
        return tl.load(fixed_ptr + row[:, None] * D + column[None, :], mask=(row < N)[:, None] & (column < D)[None, :], other=0.0)
    else:
        modality = row // batch
        counter, last = row - modality * batch + tl.load(address_ptr + 1), (modality << 18) | (step << 2) | stream
        quad = i_tile * (BN // 4) + tl.arange(0, BN // 4)
        n0, n1, n2, n3 = normals(tl.load(address_ptr), counter[:, None], quad[None, :], last[:, None])
        return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BM, BN)


@triton.jit(do_not_specialize=["stream"])
def _start(
    x_ptr, part_ptr, fixed_ptr, address_ptr, N, batch, D, stream, tiles,
    FIXED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x_T and its moments."""
    i_tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = i_tile * BN + tl.arange(0, BN)
    m_row, m_column = row < N, column < D
    x = _noise(fixed_ptr, address_ptr, row, i_tile, N, batch, D, 0, stream, FIXED, BM, BN)
    tl.store(x_ptr + row[:, None] * D + column[None, :], x, mask=m_row[:, None] & m_column[None, :])
    _store_moments(part_ptr, x, row, m_row, m_column, i_tile, tiles, BN)


@triton.jit
def _condition(
    fixed_ptr, c_ptr, weight_ptr, N, D,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """c·Vcᵀ [N, 4D]; a library's product would have other bits in another batch. One of a chain's 100 products: one stage is enough."""
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    p = _product(c_ptr, weight_ptr, row, column, N, 4 * D, D, ROUND, PRECISION, BM, BN, BK)
    tl.store(fixed_ptr + row[:, None] * (4 * D) + column[None, :], p, mask=(row < N)[:, None] & (column < 4 * D)[None, :])


@triton.jit(do_not_specialize=["step"])
def _hidden(
    h_ptr, h_part_ptr, x_ptr, x_part_ptr, state_ptr, fixed_ptr, c_part_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias_ptr,
    N, D, step, x_tiles, h_tiles,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, X_TILE: tl.constexpr, X_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Kernel A. fixed = c·Vcᵀ [N, 4D], time [T, 4D]."""
    i_tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = i_tile * BN + tl.arange(0, BN)
    width = 4 * D
    m_row, m_column = row < N, column < width
    p = _product(x_ptr, state_ptr, row, column, N, width, D, ROUND, PRECISION, BM, BN, BK)
    m = m_row[:, None] & m_column[None, :]
    o_h = row[:, None] * width + column[None, :]
    i_time = (step - 1).to(tl.int64)
    p += tl.load(fixed_ptr + o_h, mask=m, other=0.0)
    p += tl.load(time_ptr + i_time * width + column, mask=m_column, other=0.0)[None, :]
    x_mean, x_var = _moments(x_part_ptr, row, m_row, x_tiles, D, X_TILE, X_TILES)
    c_mean, c_var = _moments(c_part_ptr, row, m_row, x_tiles, D, X_TILE, X_TILES)
    t_mean, t_var = tl.load(time_mean_ptr + i_time), tl.load(time_var_ptr + i_time)
    s1 = _merged_rstd(x_mean, x_var, c_mean, c_var, t_mean, t_var)
    v = p * s1[:, None] + tl.load(bias_ptr + column, mask=m_column, other=0.0)[None, :]
    v = tl.where(v < 0.0, 0.0, v)  # NaN stays NaN
    tl.store(h_ptr + o_h, _operand(v, ROUND), mask=m)
    _store_moments(h_part_ptr, v, row, m_row, m_column, i_tile, h_tiles, BN)


@triton.jit
def _between(noise, x, slope, width):
    """Predicted noise between slope·x − width and slope·x + width; NaN stays NaN."""
    centre = slope * x
    noise = tl.where(noise < centre - width, centre - width, noise)
    return tl.where(noise > centre + width, centre + width, noise)


@triton.jit(do_not_specialize=["step", "stream"])
def _update(
    out_ptr, out_part_ptr, level_ptr, x_ptr, h_ptr, h_part_ptr, output_ptr, bias_ptr, noise_ptr, address_ptr,
    N, batch, D, step, stream, mean_scale, noise_scale, sigma, slope, width, x_tiles, h_tiles,
    CLIP: tl.constexpr, NOISE: tl.constexpr, LEVEL: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    H_TILE: tl.constexpr, H_TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Kernel B. NOISE "drawn", "fixed" or "none" (the last step, and where sigma is 0); CLIP: slope and width count; LEVEL: the new state is
    a result too. out may be x."""
    i_tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = i_tile * BN + tl.arange(0, BN)
    m_row, m_column = row < N, column < D
    q = _product(h_ptr, output_ptr, row, column, N, D, 4 * D, ROUND, PRECISION, BM, BN, BK)
    _, h_var = _moments(h_part_ptr, row, m_row, h_tiles, 4 * D, H_TILE, H_TILES)
    s2 = 1.0 / tl.sqrt_rn(h_var + LAYER_NORM_EPS)
    noise = q * s2[:, None] + tl.load(bias_ptr + column, mask=m_column, other=0.0)[None, :]
    m = m_row[:, None] & m_column[None, :]
    o_x = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + o_x, mask=m, other=0.0)
    if CLIP:
        noise = _between(noise, x, slope, width)
    x = mean_scale * x - noise_scale * noise
    if NOISE != "none":
        x += sigma * _noise(noise_ptr, address_ptr, row, i_tile, N, batch, D, step, stream, NOISE == "fixed", BM, BN)
    tl.store(out_ptr + o_x, x, mask=m)
    if LEVEL:
        tl.store(level_ptr + o_x, x, mask=m)
    _store_moments(out_part_ptr, x, row, m_row, m_column, i_tile, x_tiles, BN)


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
    """The state after one step from x, [BM, BD] both. fixed = c·Vcᵀ [N, 4D], noise [T − 1, N, D] of the side at hand."""
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
        p += tl.load(fixed_ptr + row[:, None] * width + column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0)
        p += tl.load(time_ptr + (step - 1) * width + column, mask=m_column, other=0.0)[None, :]
        v = p * s1[:, None] + tl.load(bias1_ptr + column, mask=m_column, other=0.0)[None, :]
        v = tl.where(v < 0.0, 0.0, v)  # NaN stays NaN
        count = tl.minimum(width - start, BN).to(tl.float32)
        t_mean_h, t_var_h = _row_moments(v, m_column, count)
        d = t_mean_h - mean
        before = start + 0.0
        mean += d * (count / (before + count))
        m2 += t_var_h * count + d * d * (before * count / (before + count))
        g = tl.load(output_ptr + dim[None, :] * width + column[:, None], mask=m_dim[None, :] & m_column[:, None], other=0.0)  # [BN, BD]
        q = tl.dot(_operand(v, ROUND), g, q, input_precision=PRECISION)
    s2 = 1.0 / tl.sqrt_rn(m2 / width + LAYER_NORM_EPS)
    noise = q * s2[:, None] + tl.load(bias2_ptr + dim, mask=m_dim, other=0.0)[None, :]
    p_scale = scale_ptr + (step - 1) * 5
    if CLIP:
        noise = _between(noise, x, tl.load(p_scale + 3), tl.load(p_scale + 4))
    x = tl.load(p_scale) * x - tl.load(p_scale + 1) * noise
    if step > 1:
        fixed_noise_ptr = noise_ptr + (T - step).to(tl.int64) * N * D
        x += tl.load(p_scale + 2) * _noise(fixed_noise_ptr, address_ptr, row, 0, N, batch, D, step, stream, FIXED, BM, BD)
    return x


@triton.jit(do_not_specialize=["N", "T", "last", "slots", "turns"])
def _whole(
    out_ptr, slot_ptr, c_ptr, fixed_ptr, start_ptr, noise_ptr, streams_ptr,
    state_ptr, time_ptr, time_mean_ptr, time_var_ptr, bias1_ptr, output_ptr, bias2_ptr, scale_ptr, address_ptr,
    N, batch, D, T, last, slots, turns,
    CLIP: tl.constexpr, FIXED: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All steps T .. last + 1 of BM rows. Tail is side 0: c, fixed, start and noise [2, ...], out [2, slots, N, D]; slot_ptr [T]: where the state
    after step t goes, at t − 1, or −1; streams_ptr [2, 2]: of x_T and of the steps."""
    # "corrected": the sides are chains of their own, in programs of their own, 1 turn a step. "release": the head is read off the tail's
    # states, in a turn of its own: one place in the code for both, as written out twice it takes the registers of two.
    side = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dim = tl.arange(0, BD)
    m_row, m_dim = row < N, dim < D
    o = row[:, None] * D + dim[None, :]
    m = m_row[:, None] & m_dim[None, :]
    plane = N.to(tl.int64) * D
    c_mean, c_var = _row_moments(tl.load(c_ptr + side * plane + o, mask=m, other=0.0), m_dim, D)
    x = _noise(start_ptr + side * plane, address_ptr, row, 0, N, batch, D, 0, tl.load(streams_ptr + side * 2), FIXED, BM, BD)
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
class Tiles:
    """Launch configuration; a function of D and the precision alone, so that a row's bits do not depend on the batch it is in."""

    hidden_rows: int
    update_rows: int
    BN: int
    BK: int
    warps: int
    stages: int

    @classmethod
    def of(cls, D: int, precision: str) -> Tiles:
        # Three stages of both operands take 96 KB (bf16 128 x 128 x 64, tf32 128 x 128 x 32): within an A100's 163 KB, accumulators 64 registers
        # a thread of 8 warps. Kernel B draws noise beside its accumulators: with 128 rows ptxas spilt 216 to 312 bytes on sm_100, with 64 it
        # takes 163 registers. ieee has no matrix unit: 64 x 64 in 4 warps is 32 accumulators
        # a thread; a third stage spilt on sm_80.
        hidden, update, bn, bk, warps, stages = {
            "bf16": (128, 64, 128, 64, 8, 3),
            "tf32": (128, 64, 128, 32, 8, 3),
            "ieee": (64, 64, 64, 16, 4, 2),
        }[precision]
        small = max(16, triton.next_power_of_2(D))
        return cls(hidden, update, min(bn, small), min(bk, small), warps, stages)

    def constants(self, precision: str, rounding: str) -> dict[str, Any]:
        """What both kernels of a step are compiled for."""
        product = "tf32" if precision == "tf32" else "ieee"
        return {"BN": self.BN, "BK": self.BK, "ROUND": rounding, "PRECISION": product}


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
        # State, its next value and the noise being drawn take 16 registers a thread of 8 warps each at 64 x 64; at 64 x 128 ptxas spilt
        # hundreds of bytes, and on sm_80 so did a second stage of tf32 (448) and ieee (32) and tiles of 64 columns (416).
        rows, stages = {"bf16": (64, 2), "tf32": (64, 1), "ieee": (32, 1)}[precision]
        return cls(rows, 32, max(16, triton.next_power_of_2(D)), 8, stages)


# The widest D for `_whole`: registers end there. At 64, what no longer goes through memory in a step is x and h, 1.8 KB a row there and back
# in float32; in exchange each program of 64 rows reads the weights in every step, 64 KB in bf16, from the second-level cache. An estimate:
# not yet measured.
WHOLE_WIDTH = 64


@dataclass
class _Side:
    """State of one side: x [N, D], the parts of its moments [N, tiles, 2], and what its condition fixes."""

    x: Tensor
    part: Tensor
    fixed: Tensor
    c_part: Tensor
    start: Tensor | None
    noise: Tensor | None
    streams: tuple[int, int]


@dataclass(frozen=True)
class Chain:
    """What a chain is run on. Pairs are (tail, head).

    Args:
        heads, tails: the results, float32 [M, B, D] a level.
        conditions: c, float32 [M, B, D].
        weights: Vx, Vc [4D, D] and G [D, 4D] (bfloat16 or float32), τ·Vτᵀ [T, 4D], mean and variance of τ [T], b₁′ [4D], b₂′ [D] (float32).
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
        # The interpreter's bfloat16 arithmetic is wrong: there weights come rounded in float32 and activations are rounded by hand.
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
        (_chain_whole if self.tails[0].shape[-1] <= WHOLE_WIDTH else _chain_of_steps)(self)


# Kept for good: CUDA graphs read them, and copies from the host cannot be captured.
@functools.cache
def _tables(
    slots: tuple[int, ...], streams: tuple[tuple[int, int], ...], schedule: tuple[tuple[float, ...], ...], device: torch.device
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
    tiles, gemm = WholeTiles.of(D, call.precision), Tiles.of(D, call.precision)
    c = torch.stack(list(call.conditions))
    fixed = bias1.new_empty(2, N, 4 * D)
    for side in (0, 1):
        _condition[(triton.cdiv(4 * D, gemm.BN), triton.cdiv(N, gemm.hidden_rows))](
            fixed[side], c[side], condition, N, D, BM=gemm.hidden_rows, num_warps=gemm.warps, num_stages=1,
            **gemm.constants(call.precision, call.rounding),
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
        CLIP=call.clips, FIXED=not drawn, ROUND=call.rounding, PRECISION="tf32" if call.precision == "tf32" else "ieee",
        BM=tiles.BM, BN=tiles.BN, BD=tiles.BD, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    for side, results in enumerate((call.tails, call.heads)):
        for result, level in zip(results, call.levels, strict=True):
            result.copy_(made[side, slots.index(level)])


def _chain_of_steps(call: Chain) -> None:
    """Two kernels a step."""
    _, B, D, N, T = call.sizes
    state, condition, output, time, time_mean, time_var, bias1, bias2 = call.weights
    tiles = Tiles.of(D, call.precision)
    launch: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    gemm = {**tiles.constants(call.precision, call.rounding), **launch}
    x_tiles, h_tiles = triton.cdiv(D, tiles.BN), triton.cdiv(4 * D, tiles.BN)
    hidden_blocks, update_blocks = triton.cdiv(N, tiles.hidden_rows), triton.cdiv(N, tiles.update_rows)
    h = state.new_empty(N, 4 * D)
    h_part = bias1.new_empty(N, h_tiles, 2)
    width = {"BM": tiles.update_rows, "BN": tiles.BN, **launch}

    def side(c: Tensor, start: Tensor | None, noise: Tensor | None, streams: tuple[int, int]) -> _Side:
        x, fixed = bias1.new_empty(N, D), bias1.new_empty(N, 4 * D)
        part, c_part = (bias1.new_empty(N, x_tiles, 2) for _ in range(2))
        # x is scratch here: what is wanted are the moments of c.
        _start[(x_tiles, update_blocks)](x, c_part, c, call.address, N, B, D, 0, x_tiles, FIXED=True, **width)
        _condition[(h_tiles, hidden_blocks)](fixed, c, condition, N, D, BM=tiles.hidden_rows, **gemm | {"num_stages": 1})
        return _Side(x, part, fixed, c_part, start, noise, streams)

    def start(side: _Side) -> None:
        source = call.address if side.start is None else side.start
        drawn = side.start is None
        _start[(x_tiles, update_blocks)](
            side.x, side.part, source, call.address, N, B, D, side.streams[0], x_tiles, FIXED=not drawn, **width
        )

    def step(side: _Side, source: _Side, t: int, results: Sequence[Tensor]) -> None:
        _hidden[(h_tiles, hidden_blocks)](
            h, h_part, source.x, source.part, state, side.fixed, side.c_part, time, time_mean, time_var, bias1, N, D, t, x_tiles, h_tiles,
            X_TILE=tiles.BN, X_TILES=triton.next_power_of_2(x_tiles), BM=tiles.hidden_rows, **gemm,
        )  # fmt: skip
        kind = "none" if t == 1 or not call.schedule[2][t - 1] else "drawn" if side.noise is None else "fixed"
        z = side.noise[T - t] if side.noise is not None and t > 1 else call.address
        _update[(x_tiles, update_blocks)](
            side.x, side.part, results[0] if results else side.x, source.x, h, h_part, output, bias2, z, call.address,
            N, B, D, t, side.streams[1], *(column[t - 1] if column else 0.0 for column in call.schedule), x_tiles, h_tiles,
            CLIP=call.clips, NOISE=kind, LEVEL=bool(results), H_TILE=tiles.BN, H_TILES=triton.next_power_of_2(h_tiles), BM=tiles.update_rows, **gemm,
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

    A graph holds buffers for its inputs and results, hence the bound; a last batch of another size has a graph of its own.
    """

    def __init__(self, bound: int = 4) -> None:
        self.bound = bound
        self._graphs: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = OrderedDict()

    def run(self, heads: Sequence[Tensor], tails: Sequence[Tensor], inputs: Sequence[Tensor], key: Any, body: Any) -> None:
        """body(heads, tails, inputs) with the tensors given, as a graph of `key` and the inputs' shapes; it must depend on nothing else."""
        key = (key, tuple((x.shape, x.dtype, x.device) for x in inputs), torch.cuda.current_stream().device)
        if key not in self._graphs:
            static, results = [x.clone() for x in inputs], [torch.empty_like(x) for x in (*heads, *tails)]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                body(results[: len(heads)], results[len(heads) :], static)  # compiles the kernels: that cannot happen under capture
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


def compile_cases() -> list[CompileCase]:
    """The kernels with a product in every precision and the one that draws x_T, at D 1024; the whole chain at its widest."""
    D = 1024
    tiles = Tiles.of(D, "ieee")
    starts = {"x_ptr": "*fp32", "part_ptr": "*fp32", "fixed_ptr": "*i64", "address_ptr": "*i64"}
    starts |= dict.fromkeys(("N", "batch", "D", "stream", "tiles"), "i32")
    constants = {"FIXED": False, "BM": tiles.update_rows, "BN": tiles.BN}
    cases = [CompileCase("denoise.start", _start, starts, constants, tiles.warps, tiles.stages, False, ("N", "D"))]
    for precision in ("ieee", "tf32", "bf16"):
        tiles = Tiles.of(D, precision)
        gemm = tiles.constants(precision, "bf16" if precision == "bf16" else "none")
        x_tiles, h_tiles = (triton.next_power_of_2(triton.cdiv(width, tiles.BN)) for width in (D, 4 * D))
        operand = "*bf16" if precision == "bf16" else "*fp32"
        types = {"h_ptr": operand, "weight_ptr": operand, "state_ptr": operand, "output_ptr": operand, "address_ptr": "*i64"}
        types |= dict.fromkeys(("mean_scale", "noise_scale", "sigma", "slope", "width"), "fp32")
        for kernel, stages, constants in (
            (_condition, 1, {**gemm, "BM": tiles.hidden_rows}),
            (_hidden, tiles.stages, {**gemm, "BM": tiles.hidden_rows, "X_TILE": tiles.BN, "X_TILES": x_tiles}),
            (
                _update,
                tiles.stages,
                {**gemm, "BM": tiles.update_rows, "CLIP": True, "NOISE": "drawn", "LEVEL": True, "H_TILE": tiles.BN, "H_TILES": h_tiles},
            ),
        ):
            names = [name for name in kernel.arg_names if name not in constants]
            of = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
            name = f"denoise{kernel.fn.__name__.replace('_', '.')} {precision}"
            cases.append(CompileCase(name, kernel, of, constants, tiles.warps, stages, precision != "ieee", ("N", "D")))
        whole = WholeTiles.of(WHOLE_WIDTH, precision)
        constants = {
            "CLIP": True, "FIXED": False, "ROUND": gemm["ROUND"], "PRECISION": gemm["PRECISION"], "BM": whole.BM, "BN": whole.BN, "BD": whole.BD,
        }  # fmt: skip
        types |= {"slot_ptr": "*i32", "streams_ptr": "*i32"}
        names = [name for name in _whole.arg_names if name not in constants]
        of = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
        cases.append(
            CompileCase(f"denoise.whole {precision}", _whole, of, constants, whole.warps, whole.stages, precision != "ieee", ("D",))
        )
    return cases
