"""Self-adversarial loss of queries against corruptions by index, without the gathered [B, N, D].

    score = offset + finish(Σ term(q, e))     dot q·e    l1 |q − e|    l2 (q − e)², finish −√    complex_l1 √((Δre)² +
    (Δim)²) loss  = 1/(2B) Σ_b [softplus(−score_b0) + Σ_{j > 0} softmax_j(a·score_bj)·softplus(score_bj)]

Shapes: query [B, D], table [E, D], ids int64 [B, C] with the true answer in column 0; float32 or float64, row-major,
which is also the type of the sums. D = [real half, imaginary half] for complex_l1. An index outside of the table scores
as a row of zeros and has no gradient. The gradient of a row is summed by one program in the order of `ids`, and terms
are symmetric in q and e: one kernel serves both sides.

Bytes of float32: the loss and the gradient of a query read each of its C rows once, 4·C·D, beside 8·D of the query and
its gradient and 12·C of ids and sums, which a second kernel reads and writes once more. The gradient of the table reads
a query for each pair, 4·D from the second-level cache (all queries are 4·B·D), and 12 of its place and slope, and for
each row of the table 8·D. Every access of a row is coalesced, 16 bytes a thread. Rows too long to lie in registers (see
`whole`) are read twice, once for the sums and once for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase
from torch import Tensor


@triton.jit
def _tile(ptr, row, m_row, k, m_k, D):
    """[BN, BK] of rows [BN] and dimensions k [BK]."""
    return tl.load(ptr + row[:, None] * D + k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)


@triton.jit
def _sums(q_ptr, e_ptr, ids_ptr, out_ptr, entities, D, C, REDUCTION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [B, C]: Σ term of a query and BN of its candidates."""
    i_b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    m_column = column < C
    row = tl.load(ids_ptr + i_b * C + column, mask=m_column, other=-1)
    m_row = (row >= 0) & (row < entities)
    half = D // 2
    steps = half if REDUCTION == "complex_l1" else D
    total = tl.zeros([BN], q_ptr.dtype.element_ty)
    for start in range(0, steps, BK):
        k = start + tl.arange(0, BK)
        m_k = k < steps
        b_q = tl.load(q_ptr + i_b * D + k, mask=m_k, other=0.0)[None, :]
        b_e = _tile(e_ptr, row, m_row, k, m_k, D)
        if REDUCTION == "dot":
            total += tl.sum(b_q * b_e, axis=1)
        elif REDUCTION == "l1":
            total += tl.sum(tl.abs(b_q - b_e), axis=1)
        elif REDUCTION == "l2":
            total += tl.sum((b_q - b_e) * (b_q - b_e), axis=1)
        else:
            re = b_q - b_e
            im = tl.load(q_ptr + i_b * D + half + k, mask=m_k, other=0.0)[None, :] - _tile(
                e_ptr, row, m_row, k + half, m_k, D
            )
            total += tl.sum(tl.sqrt(re * re + im * im), axis=1)
    tl.store(out_ptr + i_b * C + column, total, mask=m_column)


@triton.jit
def _finish(total, offset, REDUCTION: tl.constexpr):
    """(score, its derivative by the sum); an infinite score is an overflow and becomes NaN."""
    if REDUCTION == "dot":
        score, slope = total, tl.zeros_like(total) + 1.0
    elif REDUCTION == "l2":
        score = -tl.sqrt(total)
        slope = tl.where(score < 0, 1.0 / tl.where(score < 0, score, 1.0), 0.0)
    else:
        score, slope = -total, tl.zeros_like(total) - 1.0
    score += offset
    return (score - score) + score, slope


@triton.jit
def _softplus_sigmoid(x):
    """(ln(1 + eˣ), its derivative) from one exponential of −|x|, which cannot overflow."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # What 1 + e rounds away is added back.
    softplus = tl.where(x > 0, x, x * 0) + tl.log(u) + (e - (u - 1.0)) / u
    return softplus, tl.where(x >= 0, 1.0, e) / u


@triton.jit
def _compare(b_q0, b_q1, e_ptr, row, m_row, k, m_k, D, REDUCTION: tl.constexpr):
    """Σ term [N] of a query and whole rows [N], and what the gradient needs of them: e, or both parts of q − e, and
    their square.
    """
    b_e0 = _tile(e_ptr, row, m_row, k, m_k, D)
    if REDUCTION == "dot":
        return tl.sum(b_q0 * b_e0, axis=1), b_e0, b_e0, b_e0
    d0 = b_q0 - b_e0
    if REDUCTION == "l1":
        return tl.sum(tl.abs(d0), axis=1), d0, d0, d0
    if REDUCTION == "l2":
        return tl.sum(d0 * d0, axis=1), d0, d0, d0
    d1 = b_q1 - _tile(e_ptr, row, m_row, k + D // 2, m_k, D)
    square = d0 * d0 + d1 * d1
    return tl.sum(tl.sqrt(square), axis=1), d0, d1, square


@triton.jit
def _slopes(w, d0, d1, square, REDUCTION: tl.constexpr):
    """Σ w·∂term/∂q over rows, of each half."""
    w = w[:, None]
    if REDUCTION == "l1":
        d0 = tl.where(d0 > 0, w, tl.where(d0 < 0, -w, 0.0))
        return tl.sum(d0, axis=0), tl.sum(d0, axis=0)
    if REDUCTION == "complex_l1":
        w = tl.where(square > 0, w / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        return tl.sum(w * d0, axis=0), tl.sum(w * d1, axis=0)
    d0 = w * d0
    return tl.sum(d0, axis=0), tl.sum(d0, axis=0)


@triton.jit
def _whole_rows(
    q_ptr, e_ptr, ids_ptr, sum_ptr, out_ptr, offset: tl.float64, temperature: tl.float64, scale: tl.float64, entities, D, C,
    REDUCTION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """sum [B, C]: Σ term of a query and its candidates; out [B, D]: the loss's gradient by the query. BK ≥ D, or D/2.

    A row is read once, for its score and for its part of the gradient: the softmax's denominator and the gradient are
    sums relative to the greatest score so far, made smaller where a greater one comes.
    """
    i_b = tl.program_id(0).to(tl.int64)
    offset = tl.full([1], offset, q_ptr.dtype.element_ty)
    temperature = tl.full([1], temperature, q_ptr.dtype.element_ty)
    scale = tl.full([1], scale, q_ptr.dtype.element_ty)
    half = D // 2
    k = tl.arange(0, BK)
    m_k = k < (half if REDUCTION == "complex_l1" else D)
    b_q0 = tl.load(q_ptr + i_b * D + k, mask=m_k, other=0.0)[None, :]
    b_q1 = b_q0
    if REDUCTION == "complex_l1":
        b_q1 = tl.load(q_ptr + i_b * D + half + k, mask=m_k, other=0.0)[None, :]
    top = tl.full([1], float("-inf"), q_ptr.dtype.element_ty)
    total = tl.zeros([1], q_ptr.dtype.element_ty)
    sum0, sum1 = tl.zeros([BK], q_ptr.dtype.element_ty), tl.zeros([BK], q_ptr.dtype.element_ty)
    for start in range(1, C, BN):
        column = start + tl.arange(0, BN)
        m_column = column < C
        row = tl.load(ids_ptr + i_b * C + column, mask=m_column, other=-1)
        m_row = (row >= 0) & (row < entities)
        b_sum, d0, d1, square = _compare(b_q0, b_q1, e_ptr, row, m_row, k, m_k, D, REDUCTION)
        tl.store(sum_ptr + i_b * C + column, b_sum, mask=m_column)
        score, inner = _finish(b_sum, offset, REDUCTION)
        asked = tl.where(m_column, temperature * score, float("-inf"))
        here = tl.maximum(top, tl.max(asked, axis=0))
        smaller = tl.exp(top - here)
        part = tl.exp(asked - here)
        _, sigmoid = _softplus_sigmoid(score)
        part0, part1 = _slopes(tl.where(m_row, part * sigmoid * inner, 0.0), d0, d1, square, REDUCTION)
        total = total * smaller + tl.sum(part, axis=0)
        sum0 = sum0 * smaller + part0
        sum1 = sum1 * smaller + part1
        top = here
    # The true answer, as a tile of one.
    one = tl.zeros([1], tl.int32)
    row = tl.load(ids_ptr + i_b * C + one)
    m_row = (row >= 0) & (row < entities)
    b_sum, d0, d1, square = _compare(b_q0, b_q1, e_ptr, row, m_row, k, m_k, D, REDUCTION)
    tl.store(sum_ptr + i_b * C + one, b_sum)
    score, inner = _finish(b_sum, offset, REDUCTION)
    _, sigmoid = _softplus_sigmoid(-score)
    part0, part1 = _slopes(tl.where(m_row, -sigmoid * inner, 0.0), d0, d1, square, REDUCTION)
    tl.store(out_ptr + i_b * D + k, scale * (sum0 / total + part0), mask=m_k)
    if REDUCTION == "complex_l1":
        tl.store(out_ptr + i_b * D + half + k, scale * (sum1 / total + part1), mask=m_k)


@triton.jit
def _weigh(
    slope_ptr, partial_ptr, offset: tl.float64, temperature: tl.float64, scale: tl.float64, C, REDUCTION: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """slope [B, C]: from sums of terms to the loss's derivative by them, in place; partial [B]: the loss."""
    # Launched as float64: a Python float would arrive as float32 whatever the type of the sums.
    offset = tl.full([1], offset, slope_ptr.dtype.element_ty)
    temperature = tl.full([1], temperature, slope_ptr.dtype.element_ty)
    scale = tl.full([1], scale, slope_ptr.dtype.element_ty)
    i_b = tl.program_id(0).to(tl.int64)
    start_ptr = slope_ptr + i_b * C
    lane = tl.arange(0, BN)
    largest = tl.full([BN], float("-inf"), slope_ptr.dtype.element_ty)
    total = tl.zeros([BN], slope_ptr.dtype.element_ty)
    for start in range(1, C, BN):
        m = start + lane < C
        score, _ = _finish(tl.load(start_ptr + start + lane, mask=m, other=0.0), offset, REDUCTION)
        here = tl.where(m, tl.maximum(largest, temperature * score), largest)
        total = total * tl.exp(largest - tl.where(here == float("-inf"), 0.0, here))
        total += tl.exp(tl.where(m, temperature * score - here, float("-inf")))
        largest = here
    top = tl.max(largest, axis=0)
    whole = tl.sum(total * tl.exp(largest - top), axis=0)
    # The true answer, as a block of one.
    true, true_inner = _finish(tl.load(start_ptr + tl.zeros([1], tl.int32)), offset, REDUCTION)
    true_softplus, true_sigmoid = _softplus_sigmoid(-true)
    tl.store(start_ptr + tl.zeros([1], tl.int32), -scale * true_sigmoid * true_inner)
    loss = tl.sum(scale * true_softplus, axis=0)
    for start in range(1, C, BN):
        m = start + lane < C
        score, inner = _finish(tl.load(start_ptr + start + lane, mask=m, other=0.0), offset, REDUCTION)
        share = scale * tl.exp(tl.where(m, temperature * score - top, 0.0)) / whole
        softplus, sigmoid = _softplus_sigmoid(score)
        loss += tl.sum(tl.where(m, share * softplus, 0.0), axis=0)
        tl.store(start_ptr + start + lane, share * sigmoid * inner, mask=m)
    tl.store(partial_ptr + i_b, loss)


@triton.jit
def _gradient(
    own_ptr, other_ptr, ids_ptr, order_ptr, offsets_ptr, slope_ptr, grad_ptr, out_ptr, others, D, C,
    REDUCTION: tl.constexpr, SIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = grad·Σ slope·∂term/∂own over all pairs of one own row, BK dimensions of it.

    query: pairs are the row's of ids, the others entities; table: pairs are order[offsets[e] : offsets[e + 1]], the
    others queries.
    """
    i_own = tl.program_id(0).to(tl.int64)
    half = D // 2
    steps = half if REDUCTION == "complex_l1" else D
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = k < steps
    if SIDE == "query":
        first, last = i_own * C, (i_own + 1) * C
    else:
        first, last = tl.load(offsets_ptr + i_own), tl.load(offsets_ptr + i_own + 1)
    own = tl.load(own_ptr + i_own * D + k, mask=m_k, other=0.0)[None, :]
    sum0 = tl.zeros([BK], own_ptr.dtype.element_ty)
    if REDUCTION == "complex_l1":
        own1 = tl.load(own_ptr + i_own * D + half + k, mask=m_k, other=0.0)[None, :]
        sum1 = tl.zeros([BK], own_ptr.dtype.element_ty)
    for start in range(first, last, BN):
        position = start + tl.arange(0, BN)
        m = position < last
        if SIDE == "query":
            pair = position
            row = tl.load(ids_ptr + pair, mask=m, other=-1)
        else:
            pair = tl.load(order_ptr + position, mask=m, other=0)
            row = pair // C
        m_row = m & (row >= 0) & (row < others)
        w = tl.load(slope_ptr + pair, mask=m_row, other=0.0)[:, None]
        other = _tile(other_ptr, row, m_row, k, m_k, D)
        if REDUCTION == "dot":
            sum0 += tl.sum(w * other, axis=0)
        elif REDUCTION == "l1":
            d = own - other
            sum0 += tl.sum(tl.where(d > 0, w, tl.where(d < 0, -w, 0.0)), axis=0)
        elif REDUCTION == "l2":
            sum0 += tl.sum(w * (own - other), axis=0)
        else:
            re, im = own - other, own1 - _tile(other_ptr, row, m_row, k + half, m_k, D)
            square = re * re + im * im
            factor = tl.where(square > 0, w / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
            sum0 += tl.sum(factor * re, axis=0)
            sum1 += tl.sum(factor * im, axis=0)
    grad = tl.load(grad_ptr)
    tl.store(out_ptr + i_own * D + k, grad * sum0, mask=m_k)
    if REDUCTION == "complex_l1":
        tl.store(out_ptr + i_own * D + half + k, grad * sum1, mask=m_k)


# 16 elements a thread, 8 in float64: an operand and what is made of it fit in registers beside the sums, twice for
# complex numbers.
SCORES = {torch.float32: {"BN": 16, "BK": 128}, torch.float64: {"BN": 16, "BK": 64}}


def whole(D: int, reduction: str, dtype: torch.dtype) -> dict[str, int] | None:
    """The tile of whole rows, with its warps: 32 bytes of each a thread at most, of both halves together. None for
    rows too long."""
    parts = 2 if reduction == "complex_l1" else 1
    block = max(64, triton.next_power_of_2(D // parts))
    numbers = block * parts * dtype.itemsize // 4  # as float32
    if numbers > 4096:
        return None
    warps = max(1, min(8, numbers // 128))
    # 24 to 32 float32 of rows a thread.
    return {"BN": max(1, min(64, 1024 * warps // numbers)), "BK": block, "num_warps": warps}


def gradient_tile(D: int, reduction: str, dtype: torch.dtype) -> dict[str, int]:
    """8 rows of the other side, and of a row as much as there is, up to 1024 numbers of float32, two halves of 512."""
    most = 4096 // dtype.itemsize
    block = min(most, max(64, triton.next_power_of_2(D // 2 if reduction == "complex_l1" else D)))
    warps = max(1, block // 128)
    return {"BN": 8, "BK": min(block, most // 2) if reduction == "complex_l1" else block, "num_warps": warps}


def corruption_loss(
    query: Tensor, table: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the query, derivative of the loss by each sum of terms [B, C]."""
    (B, D), C = query.shape, ids.shape[1]
    slope, partial = query.new_empty(B, C), query.new_empty(B)
    tile = whole(D, reduction, query.dtype)
    if tile is not None:
        by_query = torch.empty_like(query)
        _whole_rows[(B,)](
            query, table, ids, slope, by_query, offset, temperature, 0.5 / B, len(table), D, C, REDUCTION=reduction, **tile
        )  # fmt: skip
    else:
        tile = SCORES[query.dtype]
        _sums[(B, triton.cdiv(C, tile["BN"]))](
            query, table, ids, slope, len(table), D, C, REDUCTION=reduction, **tile, num_warps=4
        )
    block = min(1024, triton.next_power_of_2(max(1, C - 1)))
    _weigh[(B,)](slope, partial, offset, temperature, 0.5 / B, C, REDUCTION=reduction, BN=block, num_warps=4)
    if "num_warps" not in tile:
        by_query = _launch_gradient("query", query.new_ones(()), query, table, ids, ids, ids, slope, reduction)
    return partial.double().sum().to(query.dtype), by_query, slope


def table_gradient(grad: Tensor, query: Tensor, table: Tensor, ids: Tensor, slope: Tensor, reduction: str) -> Tensor:
    """grad·∂loss/∂table [E, D]; pairs of a row are summed in the order of `ids`."""
    # One sort a batch, of 32 bits where they number the rows: half the passes of 64.
    numbers = ids.flatten().clamp(-1, len(table)).to(torch.int32 if len(table) < 1 << 31 else torch.int64)
    ordered, order = numbers.sort(stable=True)
    rows = torch.arange(len(table) + 1, device=ids.device, dtype=ordered.dtype)
    offsets = torch.searchsorted(ordered, rows)
    return _launch_gradient("table", grad.to(query.dtype), table, query, ids, order, offsets, slope, reduction)


def _launch_gradient(
    side: str,
    grad: Tensor,
    own: Tensor,
    other: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    slope: Tensor,
    reduction: str,
) -> Tensor:
    D = own.shape[1]
    out = torch.empty_like(own)
    tile = gradient_tile(D, reduction, own.dtype)
    grid = (len(own), triton.cdiv(D // 2 if reduction == "complex_l1" else D, tile["BK"]))
    _gradient[grid](
        own, other, ids, order, offsets, slope, grad, out, len(other), D, ids.shape[1], REDUCTION=reduction, SIDE=side, **tile
    )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """The reductions that take least and most, in both types, at D = 1024; sums of rows that are too long."""
    cases = []
    sizes = {"entities": "i32", "others": "i32", "D": "i32", "C": "i32"}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        pointers = (
            "q_ptr",
            "e_ptr",
            "own_ptr",
            "other_ptr",
            "slope_ptr",
            "sum_ptr",
            "partial_ptr",
            "grad_ptr",
            "out_ptr",
        )
        types: dict[str, str] = {**dict.fromkeys(pointers, f"*{name}"), **sizes}
        types |= dict.fromkeys(("ids_ptr", "order_ptr", "offsets_ptr"), "*i64")
        types |= dict.fromkeys(("offset", "temperature", "scale"), "fp64")
        for reduction in ("dot", "complex_l1"):
            in_one = whole(1024, reduction, dtype)
            assert in_one is not None
            kernels: list[tuple[str, Any, dict[str, Any]]] = [
                ("sums", _sums, {**SCORES[dtype], "num_warps": 4}),
                ("whole", _whole_rows, in_one),
                ("weigh", _weigh, {"BN": 64, "num_warps": 4}),
            ]
            for side in ("query", "table"):
                kernels.append(
                    (f"gradient, {side}", _gradient, {"SIDE": side, **gradient_tile(1024, reduction, dtype)})
                )
            for kind, kernel, tile in kernels:
                constants = {"REDUCTION": reduction, **tile}
                warps = constants.pop("num_warps")
                label = f"corruption.{kind}[{reduction}, {name}]"
                cases.append(CompileCase(label, kernel, types, constants, warps, 3, False, ("D",)))
    return cases
