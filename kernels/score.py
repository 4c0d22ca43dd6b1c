"""Scores of queries against all entities, a tile at a time, and what is taken from a tile while it is in registers.

    dot Σ q·s·e    l2 −Σ (q − s·e)²    l1 −Σ |q − s·e|    complex_l1 −Σ √((Δre)² + (Δim)²)      (raw scores: l2 without
    its root)

Shapes: query and scale [B, D], entity [E, D] of float32, bfloat16 or float16, row-major; D = [real half, imaginary
half] for complex_l1. Sums are float32. One program takes BM queries through one share of the entities, BN at a time; a
share's results are partial, the launchers merge them. A score is the same sum in the same order wherever its pair
stands in a tile: a target taken as column of a gathered tile has the bits of its rivals. `l1`, `l2` and `complex_l1`
keep dimensions along the first axis of a [BK, BM, BN] block, which a thread sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase, chip, choice, multiprocessors
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LOWEST = tl.constexpr(-(1 << 63))
_NEVER = tl.constexpr((1 << 63) - 1)


@triton.jit
def _difference(q_ptr, s_ptr, e_ptr, row, column, m_row, m_column, k, m_k, D, SCALED: tl.constexpr):
    """q − s·e as [BK, BM, BN] for dimensions k [BK]."""
    o_row = row[None, :] * D + k[:, None]
    b_q = tl.load(q_ptr + o_row, mask=m_k[:, None] & m_row[None, :], other=0.0).to(tl.float32)  # [BK, BM]
    # [BK, BN]
    b_e = tl.load(e_ptr + column[None, :] * D + k[:, None], mask=m_k[:, None] & m_column[None, :], other=0.0).to(
        tl.float32
    )
    if SCALED:
        b_s = tl.load(s_ptr + o_row, mask=m_k[:, None] & m_row[None, :], other=0.0).to(tl.float32)
        return b_q[:, :, None] - b_s[:, :, None] * b_e[:, None, :]
    else:
        return b_q[:, :, None] - b_e[:, None, :]


@triton.jit
def _raw_tile(
    q_ptr, s_ptr, e_ptr, row, column, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Raw scores [BM, BN] of query rows [BM] and entities column [BN], both int64."""
    m_row, m_column = row < queries, (column >= 0) & (column < entities)
    raw = tl.zeros([BM, BN], tl.float32)
    half = D // 2
    if REDUCTION == "complex_l1":
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
def _key(raw, id):
    """int64 that orders by score, then by smaller id."""
    bits = (raw + 0.0).to(tl.int32, bitcast=True)  # −0 becomes 0: they are equal scores
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - id.to(tl.int64))


@triton.jit(do_not_specialize=["queries", "entities", "share", "steps", "slots"])
def _sweep(
    q_ptr, s_ptr, e_ptr, offsets_ptr, ids_ptr, target_ptr, goal_ptr, out_ptr, more_ptr, queries, entities, D, share, steps, slots,
    CONSUMER: tl.constexpr, REDUCTION: tl.constexpr, SCALED: tl.constexpr, KNOWN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tiles share·i_share .. share·(i_share + 1) of the entities for BM queries.

    rank      goal: raw scores at the target [B];     out int32 [shares, 3, B]: greater, equal, NaN, of rivals
    doubt     more: int32 [B, slots], a bit a pair;   as rank, of the pairs whose bit is set
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
    if CONSUMER == "rank" or CONSUMER == "doubt":
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
        elif CONSUMER == "doubt":
            word = tile * (BN // 32) + tl.arange(0, BN // 32)
            m_word = m_row[:, None] & (word < slots)[None, :]
            asked = tl.load(more_ptr + row[:, None] * slots + word[None, :], mask=m_word, other=0)  # [BM, BN / 32]
            wanted = tl.max(tl.max((asked != 0).to(tl.int32), axis=1), axis=0) > 0
        else:
            wanted = True
        if wanted:
            column = tile * BN + tl.arange(0, BN).to(tl.int64)
            raw = _raw_tile(q_ptr, s_ptr, e_ptr, row, column, queries, entities, D, REDUCTION, SCALED, BM, BN, BK)
            m = m_row[:, None] & (column < entities)[None, :]
            if KNOWN:
                known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
                while tl.min(known, axis=0) < (tile + 1) * BN:
                    m &= known[:, None] != column[None, :]
                    position += (known < (tile + 1) * BN).to(tl.int64)
                    known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
            if CONSUMER == "doubt":
                bits = tl.load(more_ptr + row[:, None] * slots + (column // 32)[None, :], mask=m, other=0)
                m &= ((bits >> (column % 32).to(tl.int32)[None, :]) & 1) != 0
            if CONSUMER == "rank" or CONSUMER == "doubt":
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
                key = tl.where(m & (raw > float("-inf")), _key(raw, column[None, :]), _LOWEST)
                if CONSUMER == "maxima":
                    tl.store(out_ptr + row * tiles + tile, tl.max(key, axis=1), mask=m_row)
                else:
                    o = (row * slots + slot)[:, None] * BN + tl.arange(0, BN)[None, :]
                    tl.store(out_ptr + o, key, mask=(slot >= 0)[:, None])
    if CONSUMER == "rank" or CONSUMER == "doubt":
        o = i_share * 3 * queries + row
        tl.store(out_ptr + o, greater, mask=m_row)
        tl.store(out_ptr + o + queries, equal, mask=m_row)
        tl.store(out_ptr + o + 2 * queries, undefined, mask=m_row)
    elif CONSUMER == "logsumexp":
        tl.store(out_ptr + i_share * queries + row, shift, mask=m_row)
        tl.store(more_ptr + i_share * queries + row, total, mask=m_row)


@triton.jit(do_not_specialize=["queries", "entities"])
def _targets(
    q_ptr, s_ptr, e_ptr, target_ptr, out_ptr, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out float32 [B]: the raw score of each query's own target, the diagonal of tiles whose columns are targets."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    for part in tl.static_range(0, BM, BN):
        other = tl.program_id(0).to(tl.int64) * BM + part + tl.arange(0, BN)
        column = tl.load(target_ptr + other, mask=other < queries, other=0)
        raw = _raw_tile(q_ptr, s_ptr, e_ptr, row, column, queries, entities, D, REDUCTION, SCALED, BM, BN, BK)
        own = tl.sum(tl.where(row[:, None] == other[None, :], raw, 0.0), axis=1)
        tl.store(
            out_ptr + row, own, mask=(row < queries) & (row >= tl.min(other, axis=0)) & (row <= tl.max(other, axis=0))
        )


@triton.jit
def _dot_tile(
    q, e, row, first_row, column, first_column, queries, entities, D,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q·eᵀ [BM, BN] at rows row [BM], int64, and entities column [BN]; pointers, or descriptors of blocks [BM, BK] and
    [BN, BK].

    Two narrow tables of one type are multiplied as they are: their products are exact in float32. EMULATED is for the
    interpreter, whose bfloat16 arithmetic is wrong.
    """
    raw = tl.zeros([BM, BN], tl.float32)
    for start in range(0, D, BK):
        if DESCRIPTORS:
            b_q, b_e = q.load([first_row, start]), e.load([first_column, start]).T
        else:
            k = start + tl.arange(0, BK)
            m_k = k < D
            m_e = m_k[:, None] & (column < entities)[None, :]
            # [BM, BK]
            b_q = tl.load(q + row[:, None] * D + k[None, :], mask=(row < queries)[:, None] & m_k[None, :], other=0.0)
            b_e = tl.load(e + column.to(tl.int64)[None, :] * D + k[:, None], mask=m_e, other=0.0)  # [BK, BN]
        if PRECISION == "emulated":
            raw = tl.dot(b_q.to(tl.float32), b_e.to(tl.float32), raw, input_precision="ieee")
        elif PRECISION == "exact":
            raw = tl.dot(b_q, b_e, raw)
        else:
            raw = tl.dot(b_q.to(tl.float32), b_e.to(tl.float32), raw, input_precision=PRECISION)
    return raw


@triton.jit(do_not_specialize=["queries", "entities", "base", "share", "steps", "slots"])
def _dot_sweep(
    q, e, offsets_ptr, ids_ptr, target_ptr, goal_ptr, out_ptr, more_ptr, queries, entities, D, base, share, steps, slots,
    CONSUMER: tl.constexpr, KNOWN: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`_sweep` of dot products with entities base .. base + entities − 1, which e holds; known ids and targets count
    from 0 of the whole.

    Consumers as there, but for
        rank      out int32 [shares, 3, B]: greater, equal, NaN, of all but known answers: the target, whose score is
        goal, is among them best      out int64 [B, tiles]: the greatest key of each tile; more float32 [B, tiles·BN]:
        the scores, −inf where they do not count again     target int32 [B, tiles], slot or −1; out float32 [B, slots,
        BN]: the scores of the tiles that have one
    """
    i_share = tl.program_id(1)  # entities of one table are numbered in 32 bits, elements are not
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = row < queries
    tiles = tl.cdiv(entities, BN)
    first = i_share * share
    last = tl.minimum(first + share, tiles)
    if KNOWN:
        end = tl.load(offsets_ptr + row + 1, mask=m_row, other=0)
        position = _first_at_least(
            ids_ptr, tl.load(offsets_ptr + row, mask=m_row, other=0), end, base + first * BN, steps
        )
    if CONSUMER == "rank":
        goal = tl.load(goal_ptr + row, mask=m_row, other=0.0)
        target = tl.load(target_ptr + row, mask=m_row, other=-1)
        greater, equal, undefined = tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32)
        left_out, before = tl.zeros([BM], tl.int32), tl.full([BM], -1, tl.int64)
    if CONSUMER == "logsumexp":
        shift = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    for tile in range(first, last):
        if CONSUMER == "again":
            slot = tl.load(target_ptr + row * tiles + tile, mask=m_row, other=-1)
            wanted = tl.max(slot, axis=0) >= 0
        else:
            wanted = True
        if wanted:
            first_row, first_column = tl.program_id(0) * BM, tile * BN
            column = first_column + tl.arange(0, BN)
            raw = _dot_tile(
                q, e, row, first_row, column, first_column, queries, entities, D, PRECISION, DESCRIPTORS, BM, BN, BK
            )  # fmt: skip
            # What does not count is −inf from here on: a mask beside the accumulators would take as many registers
            # again.
            if (tile + 1) * BN > entities:
                raw = tl.where((column < entities)[None, :], raw, float("-inf"))
            if KNOWN:
                known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
                while tl.min(known, axis=0) < base + (tile + 1) * BN:
                    here = known < base + (tile + 1) * BN
                    if CONSUMER == "rank":
                        # Told twice it is left out once; the target is a known answer, and the launcher takes it out of
                        # the counts.
                        left_out += (here & (known != target) & (known != before) & (known < base + entities)).to(
                            tl.int32
                        )
                        before = tl.where(here, known, before)
                        place = tl.where(known == target, -1, known - base).to(tl.int32)
                    else:
                        place = (known - base).to(tl.int32)
                    raw = tl.where(place[:, None] == column[None, :], float("-inf"), raw)
                    position += here.to(tl.int64)
                    known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
            if CONSUMER == "rank":
                greater += tl.sum((raw > goal[:, None]).to(tl.int32), axis=1)
                equal += tl.sum((raw == goal[:, None]).to(tl.int32), axis=1)
                undefined += tl.sum((raw != raw).to(tl.int32), axis=1)
            elif CONSUMER == "logsumexp":
                here = tl.maximum(shift, tl.max(raw, axis=1))
                # Where all is −inf so far there is nothing to rescale, and −inf − −inf would be NaN.
                safe = tl.where(here == float("-inf"), 0.0, here)
                total = total * tl.exp(shift - safe) + tl.sum(tl.exp(raw - safe[:, None]), axis=1)
                shift = here
            elif CONSUMER == "scores":
                # In halves: addresses of a whole tile do not fit beside it.
                left, right = tl.split(tl.permute(tl.reshape(raw, (BM, 2, BN // 2)), (0, 2, 1)))
                here = first_column + tl.arange(0, BN // 2)
                p_out = out_ptr + row[:, None] * entities + here[None, :]
                tl.store(p_out, left, mask=m_row[:, None] & (here < entities)[None, :])
                tl.store(p_out + BN // 2, right, mask=m_row[:, None] & (here + BN // 2 < entities)[None, :])
            elif CONSUMER == "again":
                o = (row * slots + slot)[:, None] * BN + tl.arange(0, BN)[None, :]
                tl.store(out_ptr + o, tl.where(raw == raw, raw, float("-inf")), mask=(slot >= 0)[:, None])
            else:
                raw = tl.where(raw == raw, raw, float("-inf"))
                greatest = tl.max(raw, axis=1)
                least_id = tl.min(tl.where(raw == greatest[:, None], column[None, :], 0x7FFFFFFF), axis=1)
                tl.store(out_ptr + row * tiles + tile, _key(greatest, least_id), mask=m_row)
                if CONSUMER == "best":
                    tl.store(more_ptr + row[:, None] * (tiles * BN) + column[None, :], raw, mask=m_row[:, None])
    if CONSUMER == "rank":
        # Where the goal is not a number every rival is above it, and where it is −inf those left out look equal.
        columns = tl.maximum(tl.minimum(last * BN, entities) - first * BN, 0)
        beyond = (last - first) * BN - columns
        greater = tl.where(goal != goal, columns - left_out, greater)
        equal -= tl.where(goal == float("-inf"), left_out + tl.maximum(beyond, 0), 0)
        o = i_share.to(tl.int64) * 3 * queries + row
        tl.store(out_ptr + o, greater, mask=m_row)
        tl.store(out_ptr + o + queries, equal, mask=m_row)
        tl.store(out_ptr + o + 2 * queries, undefined, mask=m_row)
    elif CONSUMER == "logsumexp":
        tl.store(out_ptr + i_share.to(tl.int64) * queries + row, shift, mask=m_row)
        tl.store(more_ptr + i_share.to(tl.int64) * queries + row, total, mask=m_row)


@triton.jit(do_not_specialize=["queries", "entities", "base", "share", "steps", "words"])
def _near_sweep(
    q, e, square_ptr, e_square_ptr, offsets_ptr, ids_ptr, target_ptr, goal_ptr, out_ptr, doubt_ptr, queries, entities, D, base, share,
    steps, words, of_product, of_sum,
    KNOWN: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Raw scores of l2 as 2·q·e − |q|² − |e|², off by up to of_product·(|q|² + |e|²) + 1e-30, against goals, which are
    direct sums and off by up to of_sum·|goal|, as their rivals are.

    square, e_square: |q|² [B] and |e|² [E], float32. out int32 [shares, B]: rivals that are greater beyond doubt. doubt
    int32 [B, words]: bit c % 32 of word c // 32 where a direct sum has to tell how e_c compares; of known answers and
    the target it may be set too. Numbers whose squares come near the end of float32, and what is no number, are always
    in doubt.
    """
    i_share = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = row < queries
    first = i_share * share
    last = tl.minimum(first + share, tl.cdiv(entities, BN))
    if KNOWN:
        end = tl.load(offsets_ptr + row + 1, mask=m_row, other=0)
        position = _first_at_least(
            ids_ptr, tl.load(offsets_ptr + row, mask=m_row, other=0), end, base + first * BN, steps
        )
    goal = tl.load(goal_ptr + row, mask=m_row, other=0.0)
    target = (tl.load(target_ptr + row, mask=m_row, other=-1) - base).to(tl.int32)
    square = tl.load(square_ptr + row, mask=m_row, other=0.0)
    usual = (square < 1e37) & (tl.abs(goal) < 1e37)
    # 2·q·e − |e|²·(1 ± of_product) beyond these is a comparison without doubt; both bounds of a pair are two
    # instructions each.
    upper = goal + of_sum * tl.abs(goal) + square * (1 + of_product) + 1e-30
    lower = goal - of_sum * tl.abs(goal) + square * (1 - of_product) - 1e-30
    upper, lower = tl.where(usual, upper, float("inf")), tl.where(usual, lower, float("-inf"))
    greater = tl.zeros([BM], tl.int32)
    bit = tl.full([BN], 1, tl.int32) << (tl.arange(0, BN) % 32)
    for tile in range(first, last):
        first_row, first_column = tl.program_id(0) * BM, tile * BN
        column = first_column + tl.arange(0, BN)
        raw = _dot_tile(
            q, e, row, first_row, column, first_column, queries, entities, D, PRECISION, DESCRIPTORS, BM, BN, BK
        )  # fmt: skip
        # What does not count is −inf: never greater, and surely less than a usual goal.
        raw = tl.where((target[:, None] == column[None, :]) | (column >= entities)[None, :], float("-inf"), raw)
        if KNOWN:
            known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
            while tl.min(known, axis=0) < base + (tile + 1) * BN:
                raw = tl.where((known - base).to(tl.int32)[:, None] == column[None, :], float("-inf"), raw)
                position += (known < base + (tile + 1) * BN).to(tl.int64)
                known = tl.load(ids_ptr + position, mask=position < end, other=_NEVER)
        e_square = tl.load(e_square_ptr + column, mask=column < entities, other=0.0)
        few = e_square < 1e37
        above = 2 * raw - tl.where(few, e_square * (1 + of_product), float("inf"))[None, :] > upper[:, None]
        below = 2 * raw - tl.where(few, e_square * (1 - of_product), float("-inf"))[None, :] < lower[:, None]
        greater += tl.sum(above.to(tl.int32), axis=1)
        bits = tl.sum(tl.reshape(tl.where(above | below, 0, bit[None, :]), (BM, BN // 32, 32)), axis=2)
        word = tile * (BN // 32) + tl.arange(0, BN // 32)
        tl.store(doubt_ptr + row[:, None] * words + word[None, :], bits, mask=m_row[:, None] & (word < words)[None, :])
    tl.store(out_ptr + i_share.to(tl.int64) * queries + row, greater, mask=m_row)


@triton.jit(do_not_specialize=["queries"])
def _dot_targets(
    q, e, out_ptr, queries, D, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out float32 [B]: the products of rows of q and of e, both [B, D]: the diagonals of square tiles of the same form
    as all others.
    """
    first_row = tl.program_id(0) * BM
    row = first_row.to(tl.int64) + tl.arange(0, BM)
    column = first_row + tl.arange(0, BN)
    raw = _dot_tile(q, e, row, first_row, column, first_row, queries, queries, D, PRECISION, DESCRIPTORS, BM, BN, BK)
    tl.store(out_ptr + row, tl.sum(tl.where(row[:, None] == column[None, :], raw, 0.0), axis=1), mask=row < queries)


@triton.jit(do_not_specialize=["queries", "entities"])
def _gradient(
    q_ptr, s_ptr, e_ptr, w_ptr, out_ptr, scale_out_ptr, queries, entities, D,
    REDUCTION: tl.constexpr, SCALED: tl.constexpr, SIDE: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of Σ weight·score in BO rows of one side (and in the scale, on the query side), BK dimensions, over
    all of the other.

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
            # 0 where the difference is 0. Just above the least normal number: what is below it Triton 3.7 takes for
            # float64.
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
    """A tile of BM queries and BN entities, BK dimensions at a time; descriptors: operands of products come by bulk
    copies.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# Products by the kind of their operands. Targets are diagonals of tiles: these are square. All consumers have the same,
# as what one finds is compared with what another does.
CANDIDATES: dict[str, list[Config]] = {
    "tf32": [
        Config(128, 128, 32, 8, 3, True),
        Config(128, 128, 32, 8, 4, True),
        Config(128, 128, 32, 4, 3, True),
        Config(128, 128, 32, 8, 3),
    ],
    "ieee": [
        Config(128, 128, 32, 8, 3, True),
        Config(128, 128, 32, 8, 2, True),
        Config(64, 64, 32, 4, 3, True),
        Config(128, 128, 32, 8, 3),
    ],
    "narrow": [
        Config(128, 128, 64, 8, 3, True),
        Config(128, 128, 64, 8, 4, True),
        Config(128, 128, 64, 4, 3, True),
        Config(128, 128, 64, 8, 3),
    ],
}
# A thread of the other reductions holds BK·BM·BN/256 = 32 differences and 8 sums: some 100 registers.
DISTANCE = Config(32, 64, 4, 8, 2)
# Bytes of a table that are rounded to bfloat16 at a time, where precision says so.
ROUNDED_BYTES = 32 << 20
# Dimensions from which ranks of l2 are found by a product, and bytes of the bits that say which pairs are in doubt.
PRODUCT_FROM = 64
DOUBT_BYTES = 32 << 20
# Bytes that the selection of the best may take.
KEPT_BYTES = 48 << 20


def dot_config(kind: str, D: int, arch: int) -> Config:
    """Tiles of products of "tf32", "ieee" or "narrow" operands of D dimensions."""
    if arch >= 90:
        chosen = choice("score.dot", kind, D, arch, CANDIDATES[kind])
        return replace(chosen, descriptors=chosen.descriptors and D * (2 if kind == "narrow" else 4) % 16 == 0)
    if arch == 0:
        return Config(32, 32, 32, 4, 2)  # the interpreter has small tables
    # Before sm_90 there are no bulk copies. The three products of "ieee" hold operands in parts: with 32 dimensions
    # at a time the sweeps spill up to 16 kB on sm_80, with 16 nothing.
    return Config(128, 128, 16, 8, 2) if kind == "ieee" else Config(128, 128, 64 if kind == "narrow" else 32, 8, 3)


@dataclass(frozen=True)
class Product:
    """Operands of dot products as a kernel gets them."""

    query: Tensor
    entity: Tensor
    rounded: bool
    config: Config
    precision: str

    @classmethod
    def of(cls, query: Tensor, entity: Tensor, scale: Tensor | None, precision: str) -> Product:
        if scale is not None:
            query = query.float() * scale.float()
        # bfloat16 and float16 times the same are exact in float32: nothing is gained by widening them.
        rounded = precision == "bf16" and (query.dtype, entity.dtype) != (torch.bfloat16, torch.bfloat16)
        query = query.bfloat16() if rounded else query
        narrow = rounded or (query.dtype == entity.dtype and query.dtype != torch.float32)
        if not narrow:
            query = query.float()
        on_gpu = query.is_cuda
        how = "exact" if narrow else "tf32" if precision == "tf32" else "tf32x3" if on_gpu else "ieee"
        if how == "exact" and query.dtype == torch.bfloat16 and not on_gpu:
            how = "emulated"
        kind = "narrow" if narrow else "tf32" if precision == "tf32" else "ieee"
        config = dot_config(kind, query.shape[1], chip(query.device))
        if entity.dtype != query.dtype and not rounded:
            config = replace(config, descriptors=False)
        return cls(query, entity, rounded, config, how)

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(first entity, table): all of it, or a share at a time where it has to be rounded."""
        size = (
            max(self.config.BN, ROUNDED_BYTES // (2 * self.entity.shape[1]))
            if self.rounded
            else max(1, len(self.entity))
        )
        for base in range(0, len(self.entity), size):
            part = self.entity[base : base + size]
            yield base, part.bfloat16() if self.rounded else part

    def matrices(self, query: Tensor, entity: Tensor) -> tuple[Any, Any, dict[str, Any]]:
        """Both operands and the constants that say how they are read."""
        c = self.config
        # A view of a table may begin anywhere.
        aligned = c.descriptors and query.data_ptr() % 16 == 0 and entity.data_ptr() % 16 == 0
        constants = {
            "PRECISION": self.precision, "DESCRIPTORS": aligned, "BM": c.BM, "BN": c.BN, "BK": c.BK,
            "num_warps": c.num_warps, "num_stages": c.num_stages,
        }  # fmt: skip
        if not aligned:
            return query, entity, constants
        q, e = TensorDescriptor.from_tensor(query, [c.BM, c.BK]), TensorDescriptor.from_tensor(entity, [c.BN, c.BK])
        return q, e, constants

    def sweep(
        self, consumer: str, query: Tensor, entity: Tensor, base: int, out: list[Tensor],
        known: tuple[Tensor, Tensor] | None = None, target: Tensor | None = None, goal: Tensor | None = None, slots: int = 0,
    ) -> None:  # fmt: skip
        queries, D = query.shape
        shares, share = shares_of(query, entity, self.config)
        q, e, constants = self.matrices(query, entity)
        nothing = out[0]
        offsets, ids = known or (nothing, nothing)
        _dot_sweep[(-(-queries // self.config.BM), shares)](
            q, e, offsets, ids, nothing if target is None else target, nothing if goal is None else goal, out[0], out[-1],
            queries, len(entity), D, base, share, ids.numel().bit_length(), slots,
            CONSUMER=consumer, KNOWN=known is not None and ids.numel() > 0, **constants,
        )  # fmt: skip

    def shares(self, query: Tensor, entity: Tensor) -> int:
        return shares_of(query, entity, self.config)[0]


def _launch(
    consumer: str, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str,
    out: list[Tensor], known: tuple[Tensor, Tensor] | None = None, target: Tensor | None = None, goal: Tensor | None = None, slots: int = 0,
) -> None:  # fmt: skip
    (queries, dim), entities = query.shape, len(entity)
    c = DISTANCE
    shares, share = shares_of(query, entity, c)
    offsets, ids = known or (query, query)
    _sweep[(-(-queries // c.BM), shares)](
        query, query if scale is None else scale, entity, offsets, ids, query if target is None else target,
        query if goal is None else goal, out[0], out[-1], queries, entities, dim, share, ids.numel().bit_length(), slots,
        CONSUMER=consumer, REDUCTION=reduction, SCALED=scale is not None, KNOWN=known is not None and ids.numel() > 0,
        BM=c.BM, BN=c.BN, BK=c.BK, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def shares_of(query: Tensor, entity: Tensor, c: Config) -> tuple[int, int]:
    """(shares of the entities, tiles of a share): about four programs a multiprocessor."""
    programs = 4 * multiprocessors(query.device) if query.is_cuda else 2
    tiles = -(-len(entity) // c.BN)
    share = -(-tiles // min(tiles, max(1, programs // -(-len(query) // c.BM))))
    return -(-tiles // share), share


def by_product(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> bool:
    """Whether ranks of a distance are found by a product: with fewer dimensions the direct sums cost less than what
    surrounds it.
    """
    return reduction == "l2" and scale is None and query.shape[1] >= PRODUCT_FROM and len(entity) > 0 and len(query) > 0


def near_ranks(
    query: Tensor, entity: Tensor, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor,
    settle: Callable[[Tensor, int, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """`rank_counts` of l2 by the matrix unit: most rivals are told by |q|² − 2·q·e + |e|² and a bound of its error, the
    others by direct sums, as if all had been.

    Args:
        settle: (part of the entities, its first one, bits of the pairs in doubt int32 [B, words]) → counts of those
        pairs int32 [shares, 3, B].
    """
    product = Product.of(query, entity, None, "ieee")
    c, (queries, D) = product.config, product.query.shape
    size = max(1, 8 * DOUBT_BYTES // queries // c.BN) * c.BN
    # A sum of D terms, each step of it rounded to 24 bits, is off by D·2^-24 of the terms' moduli; a distance is, and
    # both sides of a comparison are distances. |q|² and |e|² are too. 2·q·e is a sum of moduli of at most |q|² + |e|².
    # Three tf32 products leave 9 units of 2^-23 of an operand out, and an instruction adds eight of their terms to the
    # sum of those before; that each of the nine is cut off at 2^-23 of the greatest is more than has been seen of it
    # (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021).
    of_product, of_sum = (4 * D + 64) * 2.0**-23, (D + 16) * 2.0**-23
    square = torch.linalg.vector_norm(query, dim=1, dtype=torch.float32).square()
    total = torch.zeros(3, queries, dtype=torch.int64, device=query.device)
    for base in range(0, len(entity), size):
        part = entity[base : base + size]
        shares, share = shares_of(query, part, c)
        above = torch.empty(shares, queries, dtype=torch.int32, device=query.device)
        doubt = torch.empty(queries, -(-len(part) // 32), dtype=torch.int32, device=query.device)
        q, e, constants = product.matrices(product.query, part)
        _near_sweep[(-(-queries // c.BM), shares)](
            q, e, square, torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).square(), offsets, ids, target, at_target, above,
            doubt, queries, len(part), D, base, share, ids.numel().bit_length(), doubt.shape[1], of_product, of_sum,
            KNOWN=ids.numel() > 0, **constants,
        )  # fmt: skip
        total += settle(part, base, doubt).sum(0, dtype=torch.int64)
        total[0] += above.sum(0, dtype=torch.int64)
    return total


def target_scores(
    query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str, precision: str
) -> Tensor:
    """Raw scores of the targets int64 [B]: float32 [B]."""
    out = torch.empty(len(query), device=query.device)
    if reduction == "dot":
        product = Product.of(query, entity, scale, precision)
        own = entity[target]
        q, e, constants = product.matrices(product.query, own.bfloat16() if product.rounded else own)
        _dot_targets[(-(-len(query) // product.config.BM),)](q, e, out, *query.shape, **constants)
        return out
    c = DISTANCE
    _targets[(-(-len(query) // c.BM),)](
        query, query if scale is None else scale, entity, target, out, len(query), len(entity), query.shape[1],
        REDUCTION=reduction, SCALED=scale is not None, BM=c.BM, BN=c.BN, BK=c.BK, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def rank_counts(
    query: Tensor, entity: Tensor, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str,
    precision: str,
) -> Tensor:  # fmt: skip
    """int64 [3, B]: rivals with a raw score greater than at_target [B], equal to it, and NaN."""
    if by_product(query, entity, scale, reduction):

        def settle(part: Tensor, base: int, doubt: Tensor) -> Tensor:
            counts = torch.empty(
                shares_of(query, part, DISTANCE)[0], 3, len(query), dtype=torch.int32, device=doubt.device
            )
            _launch(
                "doubt", query, part, None, reduction, [counts, doubt], (offsets, ids - base), target - base, at_target, doubt.shape[1]
            )  # fmt: skip
            return counts

        return near_ranks(query, entity, target, at_target, offsets, ids, settle)
    if reduction != "dot":
        shares = shares_of(query, entity, DISTANCE)[0]
        counts = torch.empty(shares, 3, len(query), dtype=torch.int32, device=query.device)
        _launch("rank", query, entity, scale, reduction, [counts], (offsets, ids), target, at_target)
        return counts.sum(0, dtype=torch.int64)
    product = Product.of(query, entity, scale, precision)
    total = torch.zeros(3, len(query), dtype=torch.int64, device=query.device)
    for base, part in product.parts():
        counts = torch.empty(product.shares(product.query, part), 3, len(query), dtype=torch.int32, device=query.device)
        product.sweep("rank", product.query, part, base, [counts], (offsets, ids), target, at_target)
        total += counts.sum(0, dtype=torch.int64)
    # The target, where it is in this table, is equal to its goal, or above it and no number where the goal is none.
    inside, lost = (target >= 0) & (target < len(entity)), at_target.isnan()
    total -= torch.stack([inside & lost, inside & ~lost, inside & lost]).to(torch.int64)
    return total


def topk_all(
    query: Tensor,
    entity: Tensor,
    k: int,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The k best: raw scores float32 [B, k], ids int64 [B, k]; −inf, −1 where there are fewer.

    The k best lie in the k tiles with the greatest best keys. Of a small table a sweep writes these keys and all
    scores; of a large one a second sweep makes the scores of those tiles again, which are few of all.
    """
    if reduction == "dot":
        return best(Product.of(query, entity, scale, precision), k, offsets, ids)
    return _scores_and_ids(_topk_distance(query, entity, k, offsets, ids, scale, reduction))


def _scores_and_ids(key: Tensor) -> tuple[Tensor, Tensor]:
    order = (key >> 32).to(torch.int32)
    scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = (key == -(1 << 63)) | (scores == -torch.inf)
    return scores.masked_fill(nothing, -torch.inf), (0xFFFFFFFF - (key & 0xFFFFFFFF)).masked_fill(nothing, -1)


def best(product: Any, k: int, offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`topk_all` by the sweeps of a :class:`Product`, or of what has its query, config, parts and sweep."""
    query, BN = product.query, product.config.BN
    keys: Tensor | None = None
    for base, part in product.parts():
        tiles = -(-len(part) // BN)
        slots = min(k, tiles)
        # 28 bytes for each score of a tile that is looked into. Of a small table all scores are kept, 4 bytes each.
        chosen = 28 * slots * BN
        keeps = 512 * (4 * tiles * BN + chosen) <= KEPT_BYTES
        rows = max(1, KEPT_BYTES // (8 * tiles + chosen + (4 * tiles * BN if keeps else 12 * tiles)))
        rows = max(rows // product.config.BM * product.config.BM, min(rows, product.config.BM))
        found = torch.empty(len(query), min(k, slots * BN), dtype=torch.int64, device=query.device)
        for start in range(0, len(query), rows):
            share, known = query[start : start + rows], (offsets[start : start + rows + 1], ids)
            found[start : start + rows] = _topk_rows(product, share, part, base, found.shape[1], slots, known, keeps)
        keys = (
            found if keys is None else torch.cat([keys, found], 1).topk(min(k, keys.shape[1] + found.shape[1])).values
        )
    assert keys is not None
    return _scores_and_ids(torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=-(1 << 63)))


def _topk_rows(
    product: Any, query: Tensor, part: Tensor, base: int, k: int, slots: int, known: tuple[Tensor, Tensor], keeps: bool
) -> Tensor:
    """Keys int64 [B, k] of some queries among entities from `base` on."""
    BN, device = product.config.BN, query.device
    tiles = -(-len(part) // BN)
    maxima = torch.empty(len(query), tiles, dtype=torch.int64, device=device)
    kept = torch.empty(len(query), tiles, BN, device=device) if keeps else None
    product.sweep("best" if keeps else "maxima", query, part, base, [maxima] if kept is None else [maxima, kept], known)
    chosen = maxima.topk(slots).indices  # [B, slots]
    if kept is not None:
        scores = kept.gather(1, chosen[:, :, None].expand(-1, -1, BN))
    else:
        slot = torch.full((len(query), tiles), -1, dtype=torch.int32, device=device)
        slot.scatter_(1, chosen, torch.arange(slots, dtype=torch.int32, device=device).expand(len(query), -1))
        scores = torch.empty(len(query), slots, BN, device=device)
        product.sweep("again", query, part, base, [scores], known, target=slot, slots=slots)
    bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0: they are equal scores
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    id = chosen[:, :, None] * BN + torch.arange(base, base + BN, device=device)
    return ((order << 32) | (0xFFFFFFFF - id)).flatten(1).topk(k).values


def _topk_distance(
    query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> Tensor:
    """Keys int64 [B, k]: a first sweep finds the tiles, a second writes all keys of those tiles alone."""
    c = DISTANCE
    tiles = -(-len(entity) // c.BN)
    slots = min(k, tiles)
    # 20 bytes for each query and tile, 24 for each key: 32 MB.
    rows = max(1, (32 << 20) // (20 * tiles + 24 * slots * c.BN))
    key = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        q, s, known = query[part], None if scale is None else scale[part], (offsets[start : start + rows + 1], ids)
        maxima = torch.empty(len(q), tiles, dtype=torch.int64, device=query.device)
        _launch("maxima", q, entity, s, reduction, [maxima], known)
        slot = torch.full_like(maxima, -1)
        slot.scatter_(1, maxima.topk(slots).indices, torch.arange(slots, device=query.device).expand(len(q), -1))
        keys = torch.empty(len(q), slots * c.BN, dtype=torch.int64, device=query.device)
        _launch("keys", q, entity, s, reduction, [keys], known, target=slot, slots=slots)
        key[part] = keys.topk(k).values
    return key


def logsumexp_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, precision: str) -> Tensor:
    """log Σ_e exp(score), float32 [B]."""
    if reduction != "dot":
        out = torch.empty(2, shares_of(query, entity, DISTANCE)[0], len(query), device=query.device)
        _launch("logsumexp", query, entity, scale, reduction, [out[0], out[1]])
        return (out[0] + out[1].log()).logsumexp(0)
    product = Product.of(query, entity, scale, precision)
    found = []
    for base, part in product.parts():
        out = torch.empty(2, product.shares(product.query, part), len(query), device=query.device)
        product.sweep("logsumexp", product.query, part, base, [out[0], out[1]])
        found.append(out[0] + out[1].log())
    return torch.cat(found).logsumexp(0)


def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, precision: str) -> Tensor:
    """Scores float32 [B, E]."""
    out = torch.empty(len(query), len(entity), device=query.device)
    if reduction != "dot":
        _launch("scores", query, entity, scale, reduction, [out])
        return out
    product = Product.of(query, entity, scale, precision)
    for base, part in product.parts():
        scores = out if len(part) == len(entity) else out.new_empty(len(query), len(part))
        product.sweep("scores", product.query, part, base, [scores])
        if scores is not out:
            out[:, base : base + len(part)] = scores
    return out


def gradients(
    query: Tensor, entity: Tensor, scale: Tensor | None, weight: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
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


def compile_dot(consumer: str, kind: str, D: int, c: Config, archs: tuple[int, ...] = ()) -> CompileCase:
    """A sweep, "targets" or "near", of products of "tf32", "ieee" or "narrow" (bfloat16) operands."""
    element = "bf16" if kind == "narrow" else "fp32"
    operands = {
        name: f"tensordesc<{element}[{rows}, {c.BK}]>" if c.descriptors else f"*{element}"
        for name, rows in (("q", c.BM), ("e", c.BN))
    }
    sizes = dict.fromkeys(("queries", "entities", "D", "base", "share", "steps", "slots", "words"), "i32")
    outputs = {"rank": "*i32", "maxima": "*i64", "best": "*i64", "near": "*i32"}
    targets = {"again": "*i32"}
    types = {
        **operands, **dict.fromkeys(("offsets_ptr", "ids_ptr"), "*i64"), "target_ptr": targets.get(consumer, "*i64"), "goal_ptr": "*fp32",
        "out_ptr": outputs.get(consumer, "*fp32"), "more_ptr": "*fp32", "square_ptr": "*fp32", "e_square_ptr": "*fp32",
        "doubt_ptr": "*i32", "of_product": "fp32", "of_sum": "fp32", **sizes,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "PRECISION": {"tf32": "tf32", "ieee": "tf32x3", "narrow": "exact"}[kind],
        "DESCRIPTORS": c.descriptors,
    }
    constants |= {"BM": c.BM, "BN": c.BN, "BK": c.BK}
    if consumer == "near":
        constants |= {"KNOWN": True}
    elif consumer != "targets":
        constants |= {"CONSUMER": consumer, "KNOWN": consumer not in ("logsumexp", "scores")}
    kernel = {"targets": _dot_targets, "near": _near_sweep}.get(consumer, _dot_sweep)
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    return CompileCase(
        f"score.{consumer}[dot, {kind}]", kernel, types, constants, c.num_warps, c.num_stages, True, ("D",), archs
    )


def compile_cases() -> list[CompileCase]:
    """Every reduction, consumer and precision once, in the combinations that take most registers."""
    sizes = dict.fromkeys(("queries", "entities", "D", "share", "steps", "slots"), "i32")
    tables = dict.fromkeys(("q_ptr", "s_ptr", "e_ptr"), "*fp32")
    ids = dict.fromkeys(("offsets_ptr", "ids_ptr", "target_ptr"), "*i64")
    outputs = {
        "rank": "*i32",
        "doubt": "*i32",
        "maxima": "*i64",
        "keys": "*i64",
        "logsumexp": "*fp32",
        "scores": "*fp32",
    }
    cases = []
    dots = [
        ("rank", "ieee"),
        ("rank", "tf32"),
        ("rank", "narrow"),
        ("targets", "ieee"),
        ("targets", "narrow"),
        ("best", "ieee"),
    ]
    dots += [("maxima", "narrow"), ("again", "tf32"), ("logsumexp", "ieee"), ("scores", "tf32")]
    dots += [("near", "ieee"), ("near", "narrow")]
    for consumer, kind in dots:
        for arch in (80, 90, 100):
            cases.append(compile_dot(consumer, kind, 256, dot_config(kind, 256, arch), (arch,)))
    for consumer, reduction in (
        ("rank", "complex_l1"),
        ("doubt", "l2"),
        ("maxima", "l1"),
        ("keys", "l1"),
        ("logsumexp", "l2"),
        ("scores", "l2"),
    ):
        c = DISTANCE
        types = {
            **tables,
            **ids,
            "goal_ptr": "*fp32",
            "out_ptr": outputs[consumer],
            "more_ptr": outputs[consumer],
            **sizes,
        }
        constants: dict[str, Any] = {"CONSUMER": consumer, "REDUCTION": reduction, "SCALED": False}
        constants |= {"KNOWN": consumer in ("rank", "doubt", "maxima", "keys"), "BM": c.BM, "BN": c.BN, "BK": c.BK}
        cases.append(
            CompileCase(
                f"score.{consumer}[{reduction}]", _sweep, types, constants, c.num_warps, c.num_stages, False, ("D",)
            )
        )
    types = {**tables, "target_ptr": "*i64", "out_ptr": "*fp32", **sizes}
    constants = {"REDUCTION": "l1", "SCALED": False, "BM": DISTANCE.BM, "BN": DISTANCE.BN, "BK": DISTANCE.BK}
    cases.append(
        CompileCase(
            "score.targets[l1]", _targets, types, constants, DISTANCE.num_warps, DISTANCE.num_stages, False, ("D",)
        )
    )
    for side in ("query", "entity"):
        types = {**tables, "w_ptr": "*fp32", "out_ptr": "*fp32", "scale_out_ptr": "*fp32", **sizes}
        constants = {"REDUCTION": "complex_l1", "SCALED": False, "SIDE": side, "BO": 16, "BS": 4, "BK": 32}
        cases.append(
            CompileCase(f"score.gradient[complex_l1, {side}]", _gradient, types, constants, 4, 1, False, ("D",))
        )
    return cases
