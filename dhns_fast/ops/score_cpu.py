"""The consumers of scores against all entities in C++ (csrc/score_*): float32 on the CPU, the functions of
`dhns_fast.ops.score_eager`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.ops import score_eager
from dhns_fast.ops.backend import Unfit

# What one call of topk keeps takes at most 16 MB.
_TOPK_ENTRIES = 1 << 20


def _tables(
    query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    return query, entity, scale, REDUCTIONS.index(reduction)


def _fit(fit: bool) -> None:
    if not fit:
        raise Unfit


def target_scores(query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    out = query.new_empty(len(query))
    _fit(torch.ops.dhns_fast_native.score_targets(*_tables(query, entity, scale, reduction), target, out))
    return out


def rank_counts(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    at_target: Tensor,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
) -> Tensor:
    counts = target.new_empty(3, len(query))
    operands = target, at_target, offsets, ids
    _fit(torch.ops.dhns_fast_native.score_rank(*_tables(query, entity, scale, reduction), *operands, counts))
    return counts


def rank_groups(
    query: Tensor,
    entity: Tensor,
    goals: Tensor,
    at_target: Tensor,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
) -> Tensor:
    counts = goals.new_empty(3, len(at_target))
    operands = goals, at_target, offsets, ids
    _fit(torch.ops.dhns_fast_native.score_rank_groups(*_tables(query, entity, scale, reduction), *operands, counts))
    return counts


def topk_all(
    query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    scores, found = query.new_empty(len(query), k), offsets.new_empty(len(query), k)
    # Twice k, so that a selection serves k more entries; for small k more, as selecting has a cost of its own.
    room = k + max(k, 64)
    rows = _TOPK_ENTRIES // room
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        s = None if scale is None else scale[part]
        _fit(
            torch.ops.dhns_fast_native.score_topk(
                *_tables(query[part], entity, s, reduction), offsets, ids, start, room, scores[part], found[part]
            )
        )
    return scores, found


def logsumexp_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    out = query.new_empty(len(query))
    torch.ops.dhns_fast_native.score_logsumexp(*_tables(query, entity, scale, reduction), out, None)
    return out


def scores_and_logsumexp(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    scores, out = query.new_empty(len(query), len(entity)), query.new_empty(len(query))
    torch.ops.dhns_fast_native.score_logsumexp(*_tables(query, entity, scale, reduction), out, scores)
    return scores, out


def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    out = query.new_empty(len(query), len(entity))
    torch.ops.dhns_fast_native.score_matrix(*_tables(query, entity, scale, reduction), out)
    return out


def tile_shape(queries: int, entities: int, dim: int, reduction: str) -> tuple[int, int]:
    """A tile of the backward pass has weights and scores of this shape, and nothing of D times its size."""
    return score_eager.tile_shape(queries, entities, dim, "dot")


def softmax(scores: Tensor, logsumexp: Tensor, grad: Tensor) -> Tensor:
    out = scores.new_empty(scores.shape)
    torch.ops.dhns_fast_native.score_softmax(scores, logsumexp, grad, out)
    return out


def add_gradients(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    scores: Tensor | None,
    reduction: str,
    out: score_eager.Gradients,
) -> None:
    if reduction == "l2" and scores is not None:
        weight = score_eager.over_distance(weight, scores)
    torch.ops.dhns_fast_native.score_gradients(*_tables(query, entity, scale, reduction), weight.contiguous(), *out)
