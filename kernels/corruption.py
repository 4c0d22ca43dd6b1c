"""Self-adversarial loss of queries against corruptions by index, without the gathered [B, N, D].

    score = offset + finish(Σ term(q, e))     dot q·e    l1 |q − e|    l2 (q − e)², finish −√    complex_l1 √((Δre)² +
    (Δim)²) loss  = 1/(2B) Σ_b [softplus(−score_b0) + Σ_{j > 0} softmax_j(a·score_bj)·softplus(score_bj)]

Shapes: query [B, D], table [E, D], ids int64 [B, C] with the true answer in column 0; float32 or float64, row-major,
which is also the type of the sums. D = [real half, imaginary half] for complex_l1. An index outside of the table scores
as a row of zeros and has no gradient. The gradient of a row is summed by one program in the order of `ids`, and terms
are symmetric in q and e: one kernel serves both sides.
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
GRADIENT = {"BN": 8, "BK": 256}


def corruption_loss(
    query: Tensor, table: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the query, derivative of the loss by each sum of terms [B, C]."""
    (B, D), C = query.shape, ids.shape[1]
    slope, partial = query.new_empty(B, C), query.new_empty(B)
    tile = SCORES[query.dtype]
    _sums[(B, triton.cdiv(C, tile["BN"]))](
        query, table, ids, slope, len(table), D, C, REDUCTION=reduction, **tile, num_warps=4
    )
    block = min(1024, triton.next_power_of_2(max(1, C - 1)))
    _weigh[(B,)](slope, partial, offset, temperature, 0.5 / B, C, REDUCTION=reduction, BN=block, num_warps=4)
    by_query = _launch_gradient("query", query.new_ones(()), query, table, ids, ids, ids, slope, reduction)
    return partial.double().sum().to(query.dtype), by_query, slope


def table_gradient(grad: Tensor, query: Tensor, table: Tensor, ids: Tensor, slope: Tensor, reduction: str) -> Tensor:
    """grad·∂loss/∂table [E, D]; pairs of a row are summed in the order of `ids`."""
    ordered, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(len(table) + 1, device=ids.device))
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
    grid = (len(own), triton.cdiv(D // 2 if reduction == "complex_l1" else D, GRADIENT["BK"]))
    _gradient[grid](
        own, other, ids, order, offsets, slope, grad, out, len(other), D, ids.shape[1], REDUCTION=reduction, SIDE=side, **GRADIENT, num_warps=4
    )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """The reductions that take least and most, in both types."""
    cases = []
    sizes = {"entities": "i32", "others": "i32", "D": "i32", "C": "i32"}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        floats: dict[str, str] = dict.fromkeys(
            ("q_ptr", "e_ptr", "own_ptr", "other_ptr", "slope_ptr", "partial_ptr", "grad_ptr", "out_ptr"), f"*{name}"
        )
        types = {**floats, **sizes, **dict.fromkeys(("ids_ptr", "order_ptr", "offsets_ptr"), "*i64")}
        types |= dict.fromkeys(("offset", "temperature", "scale"), "fp64")
        for reduction in ("dot", "complex_l1"):
            label = f"{reduction}, {name}"
            kernels: list[tuple[str, Any, dict[str, Any]]] = [
                ("sums", _sums, SCORES[dtype]),
                ("weigh", _weigh, {"BN": 64}),
            ]
            kernels += [(f"gradient, {side}", _gradient, {"SIDE": side, **GRADIENT}) for side in ("query", "table")]
            for kind, kernel, constants in kernels:
                cases.append(
                    CompileCase(
                        f"corruption.{kind}[{label}]",
                        kernel,
                        types,
                        {"REDUCTION": reduction, **constants},
                        4,
                        2,
                        False,
                        ("D",),
                    )
                )
    return cases
