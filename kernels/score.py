"""Scores of queries against all entities, a tile at a time, and what is taken from a tile while it is in registers.

    dot Σ q·s·e    l2 −Σ (q − s·e)²    l1 −Σ |q − s·e|    complex_l1 −Σ √((Δre)² + (Δim)²)      (raw scores: l2 without its root)

Shapes: query and scale [B, D], entity [E, D] of float32, bfloat16 or float16, row-major; D = [real half, imaginary half] for complex_l1.
Sums are float32. One program takes BM queries through one share of the entities, BN at a time; a share's results are partial, the launchers
merge them. A score is the same sum in the same order wherever its pair stands in a tile: a target taken as column of a gathered tile has
the bits of its rivals. `l1`, `l2` and `complex_l1` keep dimensions along the first axis of a [BK, BM, BN] block, which a thread sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase
from torch import Tensor

_LOWEST = tl.constexpr(-(1 << 63))
_NEVER = tl.constexpr((1 << 63) - 1)


@triton.jit
def _difference(q_ptr, s_ptr, e_ptr, row, column, m_row, m_column, k, m_k, D, SCALED: tl.constexpr):
    """q − s·e as [BK, BM, BN] for dimensions k [BK]."""
    o_row = row[None, :] * D + k[:, None]
    b_q = tl.load(q_ptr + o_row, mask=m_k[:, None] & m_row[None, :], other=0.0).to(tl.float32)  # [BK, BM]
    b_e = tl.load(e_ptr + column[None, :] * D + k[:, None], mask=m_k[:, None] & m_column[None, :], other=0.0).to(tl.float32)  # [BK, BN]
    if SCALED:
        b_s = tl.load(s_ptr + o_row, mask=m_k[:, None] & m_row[None, :], other=0.0).to(tl.float32)
        return b_q[:, :, None] - b_s[:, :, None] * b_e[:, None, :]
    else:
        return b_q[:, :, None] - b_e[:, None, :]


@triton.jit
def _raw_tile(
    q_ptr, s_ptr, e_ptr, row, column, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Raw scores [BM, BN] of query rows [BM] and entities column [BN], both int64."""
    m_row, m_column = row < queries, (column >= 0) & (column < entities)
    raw = tl.zeros([BM, BN], tl.float32)
    half = D // 2
    if REDUCTION == "dot":
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            m_k = k < D
            o_q = row[:, None] * D + k[None, :]
            b_q = tl.load(q_ptr + o_q, mask=m_row[:, None] & m_k[None, :], other=0.0).to(tl.float32)  # [BM, BK]
            if SCALED:
                b_q *= tl.load(s_ptr + o_q, mask=m_row[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            o_e = column[None, :] * D + k[:, None]
            b_e = tl.load(e_ptr + o_e, mask=m_k[:, None] & m_column[None, :], other=0.0)  # [BK, BN]
            if PRECISION == "bf16":
                raw = tl.dot(b_q.to(tl.bfloat16), b_e.to(tl.bfloat16), raw)
            else:
                raw = tl.dot(b_q, b_e.to(tl.float32), raw, input_precision=PRECISION)
    elif REDUCTION == "complex_l1":
        for start in range(0, half, BK):
            k = start + tl.arange(0, BK)
            real = _difference(q_ptr, s_ptr, e_ptr, row, column, m_row, m_column, k, k < half, D, SCALED)
            imaginary = _difference(q_ptr, s_ptr, e_ptr, row, column, m_row, m_column, k + half, k < half, D, SCALED)
            raw -= tl.sum(tl.sqrt(real * real + imaginary * imaginary), axis=0)
    else:
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            d = _difference(q_ptr, s_ptr, e_ptr, row, column, m_row, m_column, k, k < D, D, SCALED)
            raw -= tl.sum(d * d if REDUCTION == "l2" else tl.abs(d), axis=0)
    return raw


@triton.jit
def _finish(raw, REDUCTION: tl.constexpr):
    return -tl.sqrt_rn(-raw) if REDUCTION == "l2" else raw


@triton.jit
def _first_at_least(ids_ptr, low, high, bound, steps):
    """Positions [BM] of the first of the rising ids[low:high] that is at least `bound`; `steps` halvings suffice."""
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(ids_ptr + middle, mask=low < high, other=0) < bound
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where((low < high) & ~below, middle, high)
    return low


@triton.jit
def _key(raw, column):
    """int64 [BM, BN] that orders by score, then by smaller id; all keys differ."""
    bits = (raw + 0.0).to(tl.int32, bitcast=True)  # −0 becomes 0: they are equal scores
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - column[None, :])


@triton.jit
def _sweep(
    q_ptr, s_ptr, e_ptr, offsets_ptr, ids_ptr, target_ptr, goal_ptr, out_ptr, more_ptr, queries, entities, D, share, steps, slots,
    CONSUMER: tl.constexpr, REDUCTION: tl.constexpr, SCALED: tl.constexpr, KNOWN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tiles share·i_share .. share·(i_share + 1) of the entities for BM queries.

    rank      goal: raw scores at the target [B];     out int32 [shares, 3, B]: greater, equal, NaN, of rivals
    maxima                                            out int64 [B, tiles]: the greatest key of each tile
    keys      target: int64 [B, tiles], slot or −1;   out int64 [B, slots, BN]: all keys of the tiles that have one
    logsumexp                                         out, more float32 [shares, B]: greatest score m, Σ exp(score − m)
    scores                                            out float32 [B, E]
    """
    i_share = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = row < queries
    first = i_share * share
    last = tl.minimum(first + share, tl.cdiv(entities, BN))
    if KNOWN:
        end = tl.load(offsets_ptr + row + 1, mask=m_row, other=0)
        position = _first_at_least(ids_ptr, tl.load(offsets_ptr + row, mask=m_row, other=0), end, first * BN, steps)
    if CONSUMER == "rank":
        goal = tl.load(goal_ptr + row, mask=m_row, other=0.0)
        target = tl.load(target_ptr + row, mask=m_row, other=-1)
        lost = goal != goal
        greater, equal, undefined = tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32)
    if CONSUMER == "logsumexp":
        shift = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    tiles = tl.cdiv(entities, BN)
    for tile in range(first, last):
        if CONSUMER == "keys":
            slot = tl.load(target_ptr + row * tiles + tile, mask=m_row, other=-1)
            wanted = tl.max(slot, axis=0) >= 0
        else:
            wanted = True
        if wanted:
            column = tile * BN + tl.arange(0, BN).to(tl.int64)
            raw = _raw_tile(q_ptr, s_ptr, e_ptr, row, column, queries, entities, D, REDUCTION, SCALED, PRECISION, BM, BN, BK)
            m = m_row[:, None] & (column < entities)[None, :]
            if KNOWN:
                known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
                while tl.min(known, axis=0) < (tile + 1) * BN:
                    m &= known[:, None] != column[None, :]
                    position += (known < (tile + 1) * BN).to(tl.int64)
                    known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
            if CONSUMER == "rank":
                m &= target[:, None] != column[None, :]
                greater += tl.sum((m & ((raw > goal[:, None]) | lost[:, None])).to(tl.int32), axis=1)
                equal += tl.sum((m & (raw == goal[:, None])).to(tl.int32), axis=1)
                undefined += tl.sum((m & (raw != raw)).to(tl.int32), axis=1)
            elif CONSUMER == "logsumexp":
                score = tl.where(m, _finish(raw, REDUCTION), float("-inf"))
                here = tl.maximum(shift, tl.max(score, axis=1))
                # Where all is −inf so far there is nothing to rescale, and −inf − −inf would be NaN.
                safe = tl.where(here == float("-inf"), 0.0, here)
                total = total * tl.exp(shift - safe) + tl.sum(tl.exp(score - safe[:, None]), axis=1)
                shift = here
            elif CONSUMER == "scores":
                tl.store(out_ptr + row[:, None] * entities + column[None, :], _finish(raw, REDUCTION), mask=m)
            else:
                # Comparisons with NaN do not hold.
                key = tl.where(m & (raw > float("-inf")), _key(raw, column), _LOWEST)
                if CONSUMER == "maxima":
                    tl.store(out_ptr + row * tiles + tile, tl.max(key, axis=1), mask=m_row)
                else:
                    o = (row * slots + slot)[:, None] * BN + tl.arange(0, BN)[None, :]
                    tl.store(out_ptr + o, key, mask=(slot >= 0)[:, None])
    if CONSUMER == "rank":
        o = i_share * 3 * queries + row
        tl.store(out_ptr + o, greater, mask=m_row)
        tl.store(out_ptr + o + queries, equal, mask=m_row)
        tl.store(out_ptr + o + 2 * queries, undefined, mask=m_row)
    elif CONSUMER == "logsumexp":
        tl.store(out_ptr + i_share * queries + row, shift, mask=m_row)
        tl.store(more_ptr + i_share * queries + row, total, mask=m_row)


@triton.jit
def _targets(
    q_ptr, s_ptr, e_ptr, target_ptr, out_ptr, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out float32 [B]: the raw score of each query's own target, the diagonal of tiles whose columns are targets."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    for part in tl.static_range(0, BM, BN):
        other = tl.program_id(0).to(tl.int64) * BM + part + tl.arange(0, BN)
        column = tl.load(target_ptr + other, mask=other < queries, other=0)
        raw = _raw_tile(q_ptr, s_ptr, e_ptr, row, column, queries, entities, D, REDUCTION, SCALED, PRECISION, BM, BN, BK)
        own = tl.sum(tl.where(row[:, None] == other[None, :], raw, 0.0), axis=1)
        tl.store(out_ptr + row, own, mask=(row < queries) & (row >= tl.min(other, axis=0)) & (row <= tl.max(other, axis=0)))


@triton.jit
def _gradient(
    q_ptr, s_ptr, e_ptr, w_ptr, out_ptr, scale_out_ptr, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, SIDE: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of Σ weight·score in BO rows of one side (and in the scale, on the query side), BK dimensions, over all of the other.

    weight float32 [B, E], for l2 divided by the distance. out: float32, as query or entity.
    """
    own = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    half = D // 2
    steps = half if REDUCTION == "complex_l1" else D
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = k < steps
    size, others = (queries, entities) if SIDE == "query" else (entities, queries)
    m_own = own < size
    sum0, sum1 = tl.zeros([BO, BK], tl.float32), tl.zeros([BO, BK], tl.float32)
    scale0, scale1 = tl.zeros([BO, BK], tl.float32), tl.zeros([BO, BK], tl.float32)
    for start in range(0, others, BS):
        other = start + tl.arange(0, BS).to(tl.int64)
        m_other = other < others
        # Blocks are [BS, BO, BK]: summed over the first axis by one thread.
        if SIDE == "query":
            o_q, o_e = own[None, :, None] * D + k[None, None, :], other[:, None, None] * D + k[None, None, :]
            m_q, m_e = m_own[None, :, None] & m_k[None, None, :], m_other[:, None, None] & m_k[None, None, :]
            o_w = own[None, :] * entities + other[:, None]
        else:
            o_q, o_e = other[:, None, None] * D + k[None, None, :], own[None, :, None] * D + k[None, None, :]
            m_q, m_e = m_other[:, None, None] & m_k[None, None, :], m_own[None, :, None] & m_k[None, None, :]
            o_w = other[:, None] * entities + own[None, :]
        w = tl.load(w_ptr + o_w, mask=m_other[:, None] & m_own[None, :], other=0.0)[:, :, None]
        e0 = tl.load(e_ptr + o_e, mask=m_e, other=0.0)
        s0 = tl.load(s_ptr + o_q, mask=m_q, other=0.0) if SCALED else 1.0
        d0 = tl.load(q_ptr + o_q, mask=m_q, other=0.0) - s0 * e0
        if REDUCTION == "complex_l1":
            e1 = tl.load(e_ptr + o_e + half, mask=m_e, other=0.0)
            s1 = tl.load(s_ptr + o_q + half, mask=m_q, other=0.0) if SCALED else 1.0
            d1 = tl.load(q_ptr + o_q + half, mask=m_q, other=0.0) - s1 * e1
            # 0 where the difference is 0. Just above the least normal number: what is below it Triton 3.7 takes for float64.
            factor = w * tl.rsqrt(tl.maximum(d0 * d0 + d1 * d1, 1.2e-38))
            d0, d1 = d0 * factor, d1 * factor
            if SIDE == "query":
                sum1 -= tl.sum(d1, axis=0)
                if SCALED:
                    scale1 += tl.sum(d1 * e1, axis=0)
            else:
                sum1 += tl.sum(d1 * s1, axis=0)
        elif REDUCTION == "l1":
            d0 = tl.where(d0 > 0, w, tl.where(d0 < 0, -w, 0.0))
        else:
            d0 = d0 * w
        if SIDE == "query":
            sum0 -= tl.sum(d0, axis=0)
            if SCALED:
                scale0 += tl.sum(d0 * e0, axis=0)
        else:
            sum0 += tl.sum(d0 * s0, axis=0)
    o = own[:, None] * D + k[None, :]
    m = m_own[:, None] & m_k[None, :]
    tl.store(out_ptr + o, sum0, mask=m)
    if REDUCTION == "complex_l1":
        tl.store(out_ptr + o + half, sum1, mask=m)
    if SCALED and SIDE == "query":
        tl.store(scale_out_ptr + o, scale0, mask=m)
        if REDUCTION == "complex_l1":
            tl.store(scale_out_ptr + o + half, scale1, mask=m)


@dataclass(frozen=True)
class Config:
    """A tile of BM queries and BN entities, BK dimensions at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def config(reduction: str, precision: str, consumer: str) -> Config:
    """Tiles by what binds: operand traffic for matrix units, registers for everything else. Consumers whose scores are compared with each
    other's ("rank" and the targets, "maxima" and "keys") must have the same tiles."""
    if reduction != "dot":
        # A thread holds BK·BM·BN/256 = 32 differences and 8 sums: some 100 registers.
        return Config(32, 64, 4, 8, 2)
    # 16 sums a thread without matrix units, 32 with them where a tile is summed or stored; 32 that are made 64-bit keys or compared with goals
    # would spill (104 bytes on sm_80 and sm_100, Triton 3.7).
    if precision == "ieee":
        return Config(64, 64, 16, 8, 2)
    return Config(128 if consumer in ("logsumexp", "scores") else 64, 64, 32, 8, 3)


def _launch(
    consumer: str, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, precision: str,
    out: list[Tensor], known: tuple[Tensor, Tensor] | None = None, target: Tensor | None = None, goal: Tensor | None = None, slots: int = 0,
) -> None:  # fmt: skip
    (queries, dim), entities = query.shape, len(entity)
    c = config(reduction, precision, consumer)
    shares, share = _shares(query, entity, c)
    offsets, ids = known or (query, query)
    _sweep[(-(-queries // c.BM), shares)](
        query, query if scale is None else scale, entity, offsets, ids, query if target is None else target,
        query if goal is None else goal, out[0], out[-1], queries, entities, dim, share, entities.bit_length(), slots,
        CONSUMER=consumer, REDUCTION=reduction, SCALED=scale is not None, KNOWN=known is not None and ids.numel() > 0,
        PRECISION=precision, BM=c.BM, BN=c.BN, BK=c.BK, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def _shares(query: Tensor, entity: Tensor, c: Config) -> tuple[int, int]:
    """(shares of the entities, tiles of a share): about four programs a multiprocessor."""
    programs = 4 * torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 2
    tiles = -(-len(entity) // c.BN)
    share = -(-tiles // min(tiles, max(1, programs // -(-len(query) // c.BM))))
    return -(-tiles // share), share


def target_scores(query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str, precision: str) -> Tensor:
    """Raw scores of the targets int64 [B]: float32 [B]."""
    c = config(reduction, precision, "rank")
    out = torch.empty(len(query), device=query.device)
    _targets[(-(-len(query) // c.BM),)](
        query, query if scale is None else scale, entity, target, out, len(query), len(entity), query.shape[1],
        REDUCTION=reduction, SCALED=scale is not None, PRECISION=precision, BM=c.BM, BN=c.BN, BK=c.BK,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def rank_counts(
    query: Tensor, entity: Tensor, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str,
    precision: str,
) -> Tensor:  # fmt: skip
    """int64 [3, B]: rivals with a raw score greater than at_target [B], equal to it, and NaN."""
    shares = _shares(query, entity, config(reduction, precision, "rank"))[0]
    counts = torch.empty(shares, 3, len(query), dtype=torch.int32, device=query.device)
    _launch("rank", query, entity, scale, reduction, precision, [counts], (offsets, ids), target, at_target)
    return counts.sum(0, dtype=torch.int64)


def topk_all(
    query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str, precision: str
) -> tuple[Tensor, Tensor]:
    """The k best: raw scores float32 [B, k], ids int64 [B, k]; −inf, −1 where there are fewer.

    The k best lie in the k tiles with the greatest best keys. A first sweep finds these, a second writes all keys of those tiles alone.
    """
    c = config(reduction, precision, "keys")
    tiles = -(-len(entity) // c.BN)
    slots = min(k, tiles)
    # 20 bytes for each query and tile, 24 for each key: 32 MB.
    rows = max(1, (32 << 20) // (20 * tiles + 24 * slots * c.BN))
    key = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        q, s, known = query[part], None if scale is None else scale[part], (offsets[start : start + rows + 1], ids)
        maxima = torch.empty(len(q), tiles, dtype=torch.int64, device=query.device)
        _launch("maxima", q, entity, s, reduction, precision, [maxima], known)
        slot = torch.full_like(maxima, -1)
        slot.scatter_(1, maxima.topk(slots).indices, torch.arange(slots, device=query.device).expand(len(q), -1))
        keys = torch.empty(len(q), slots * c.BN, dtype=torch.int64, device=query.device)
        _launch("keys", q, entity, s, reduction, precision, [keys], known, target=slot, slots=slots)
        key[part] = keys.topk(k).values
    order = (key >> 32).to(torch.int32)
    scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = key == -(1 << 63)
    return scores.masked_fill(nothing, -torch.inf), (0xFFFFFFFF - (key & 0xFFFFFFFF)).masked_fill(nothing, -1)


def logsumexp_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, precision: str) -> Tensor:
    """log Σ_e exp(score), float32 [B]."""
    shares = _shares(query, entity, config(reduction, precision, "logsumexp"))[0]
    out = torch.empty(2, shares, len(query), device=query.device)
    _launch("logsumexp", query, entity, scale, reduction, precision, [out[0], out[1]])
    return (out[0] + out[1].log()).logsumexp(0)


def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, precision: str) -> Tensor:
    """Scores float32 [B, E]."""
    out = torch.empty(len(query), len(entity), device=query.device)
    _launch("scores", query, entity, scale, reduction, precision, [out])
    return out


def gradients(query: Tensor, entity: Tensor, scale: Tensor | None, weight: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of Σ weight·score (not for dot; weight float32 [B, E], for l2 divided by the distance), float32."""
    by_query, by_entity = torch.empty_like(query), torch.empty_like(entity)
    by_scale = None if scale is None else torch.empty_like(query)
    dim = query.shape[1]
    steps = dim // 2 if reduction == "complex_l1" else dim
    for side, out in (("query", by_query), ("entity", by_entity)):
        # 16·32 sums a program, 4 terms of each at a time.
        _gradient[(-(-len(out) // 16), -(-steps // 32))](
            query, query if scale is None else scale, entity, weight, out, out if by_scale is None else by_scale,
            len(query), len(entity), dim, REDUCTION=reduction, SCALED=scale is not None, SIDE=side, BO=16, BS=4, BK=32, num_warps=4,
        )  # fmt: skip
    return by_query, by_entity, by_scale


def compile_cases() -> list[CompileCase]:
    """Every reduction, consumer and precision once, in the combinations that take most registers."""
    sizes = dict.fromkeys(("queries", "entities", "D", "share", "steps", "slots"), "i32")
    tables = dict.fromkeys(("q_ptr", "s_ptr", "e_ptr"), "*fp32")
    ids = dict.fromkeys(("offsets_ptr", "ids_ptr", "target_ptr"), "*i64")
    outputs = {"rank": "*i32", "maxima": "*i64", "keys": "*i64", "logsumexp": "*fp32", "scores": "*fp32"}
    cases = []
    sweeps = [("rank", "dot", "ieee"), ("rank", "complex_l1", "ieee"), ("rank", "dot", "tf32"), ("maxima", "l1", "ieee")]
    sweeps += [("maxima", "dot", "tf32"), ("keys", "dot", "tf32"), ("logsumexp", "dot", "bf16"), ("scores", "l2", "ieee")]
    for consumer, reduction, precision in sweeps:
        c = config(reduction, precision, consumer)
        types = {**tables, **ids, "goal_ptr": "*fp32", "out_ptr": outputs[consumer], "more_ptr": outputs[consumer], **sizes}
        constants = {"CONSUMER": consumer, "REDUCTION": reduction, "SCALED": False, "KNOWN": consumer in ("rank", "maxima", "keys")}
        constants |= {"PRECISION": precision, "BM": c.BM, "BN": c.BN, "BK": c.BK}
        name = f"score.{consumer}[{reduction}, {precision}]"
        cases.append(CompileCase(name, _sweep, types, constants, c.num_warps, c.num_stages, precision != "ieee", ("D",)))
    for precision in ("ieee", "tf32"):
        c = config("dot", precision, "rank")
        types = {**tables, "target_ptr": "*i64", "out_ptr": "*fp32", **sizes}
        constants = {"REDUCTION": "dot", "SCALED": False, "PRECISION": precision, "BM": c.BM, "BN": c.BN, "BK": c.BK}
        name = f"score.targets[dot, {precision}]"
        cases.append(CompileCase(name, _targets, types, constants, c.num_warps, c.num_stages, precision != "ieee", ("D",)))
    for side in ("query", "entity"):
        types = {**tables, "w_ptr": "*fp32", "out_ptr": "*fp32", "scale_out_ptr": "*fp32", **sizes}
        constants = {"REDUCTION": "complex_l1", "SCALED": False, "SIDE": side, "BO": 16, "BS": 4, "BK": 32}
        cases.append(CompileCase(f"score.gradient[complex_l1, {side}]", _gradient, types, constants, 4, 1, False, ("D",)))
    return cases
