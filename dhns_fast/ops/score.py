"""Operators of the scores against all entities: schema, fake, autograd, choice of the implementation.

`torch.ops.dhns_fast.{target_scores, rank_counts, topk_all, logsumexp_all, score_all, score_backward}`. An implementation is a module
with these functions (`dhns_fast.ops.score_eager` says what they take and return); `dhns_fast.scoring` checks the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast.ops import score_eager
from dhns_fast.ops.score_eager import accumulator


def _no_autocast(device: torch.device) -> torch.autocast:
    # A matmul inside an operator would be narrowed by the caller's autocast, and ranks with it.
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op("dhns_fast::target_scores", mutates_args=())
def target_scores(query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    with _no_autocast(query.device):
        return score_eager.target_scores(query, entity, target, scale, reduction)


@target_scores.register_fake
def _(query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    return query.new_empty(query.shape[:1], dtype=accumulator(query.dtype))


@torch.library.custom_op("dhns_fast::rank_counts", mutates_args=())
def rank_counts(
    query: Tensor, entity: Tensor, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(query.device):
        greater, equal, undefined = score_eager.rank_counts(query, entity, target, at_target, offsets, ids, scale, reduction)
    return greater.clone(), equal.clone(), undefined.clone()


@rank_counts.register_fake
def _(
    query: Tensor, entity: Tensor, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(target), torch.empty_like(target), torch.empty_like(target)


@torch.library.custom_op("dhns_fast::topk_all", mutates_args=())
def topk_all(
    query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    with _no_autocast(query.device):
        return score_eager.topk_all(query, entity, k, offsets, ids, scale, reduction)


@topk_all.register_fake
def _(query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=accumulator(query.dtype)), query.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("dhns_fast::score_backward", mutates_args=())
def score_backward(
    query: Tensor, entity: Tensor, scale: Tensor | None, grad: Tensor, logsumexp: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(query.device):
        by_query, by_entity, by_scale = score_eager.backward(query, entity, scale, grad, logsumexp, reduction)
    return by_query, by_entity, query.new_empty(0) if by_scale is None else by_scale


@score_backward.register_fake
def _(
    query: Tensor, entity: Tensor, scale: Tensor | None, grad: Tensor, logsumexp: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(entity), query.new_empty(0) if scale is None else torch.empty_like(scale)


@torch.library.custom_op("dhns_fast::score_all", mutates_args=())
def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    with _no_autocast(query.device):
        return score_eager.score_all(query, entity, scale, reduction)


@score_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    return query.new_empty((query.shape[0], entity.shape[0]), dtype=accumulator(query.dtype))


@torch.library.custom_op("dhns_fast::logsumexp_all", mutates_args=())
def logsumexp_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    with _no_autocast(query.device):
        return score_eager.logsumexp_all(query, entity, scale, reduction)


@logsumexp_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    return query.new_empty(query.shape[:1], dtype=accumulator(query.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, entity, scale, ctx.reduction = inputs
    ctx.save_for_backward(query, entity, scale, output if output.ndim == 1 else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, entity, scale, logsumexp = ctx.saved_tensors
    by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, ctx.reduction)
    return by_query, by_entity, None if scale is None else by_scale, None


score_all.register_autograd(_backward, setup_context=_save)
logsumexp_all.register_autograd(_backward, setup_context=_save)
