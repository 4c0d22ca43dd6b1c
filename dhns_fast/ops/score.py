"""Operators of the scores against all entities: schema, fake, autograd, choice of the implementation.

`torch.ops.dhns_fast.{target_scores, rank_counts, topk_all, logsumexp_all, one_vs_all, score_all, score_backward}`. An implementation has the
functions of `dhns_fast.ops.score_eager`, which says what they take and return; `dhns_fast.scoring` checks the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast.errors import BackendUnavailableError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import score_cpu, score_eager
from dhns_fast.ops.operator import operator
from dhns_fast.ops.score_eager import accumulator

# The compiled kernels read float32, Triton's narrower tables too; float64 is what the oracle and gradcheck need, not speed.
_NARROW = (backends.TRITON, backends.EAGER)
_BACKENDS = {
    torch.float32: (backends.TRITON, backends.CPU, backends.EAGER),
    torch.bfloat16: _NARROW,
    torch.float16: _NARROW,
    torch.float64: (backends.EAGER,),
}
PRECISIONS = ("ieee", "tf32", "bf16")


def _implementation(query: Tensor, backend: str, precision: str) -> Any:
    name = backends.resolve(backend or None, query.device, _BACKENDS[query.dtype])
    if name == "triton":
        from dhns_fast.ops import score_triton

        return score_triton.Scores(precision)
    if precision != "ieee":
        raise BackendUnavailableError(f"precision {precision!r}: backend {name!r} has 'ieee' alone; 'triton' has {', '.join(PRECISIONS)}")
    return score_cpu if name == "cpu" else score_eager


def _no_autocast(device: torch.device) -> torch.autocast:
    # A matmul inside an operator would be narrowed by the caller's autocast, and ranks with it.
    return torch.autocast(device.type, enabled=False)


def _like(query: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return query.new_empty(shape, dtype=accumulator(query.dtype))


@operator("target_scores")
def target_scores(
    query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee"
) -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).target_scores(query, entity, target, scale, reduction)


@target_scores.register_fake
def _(
    query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee"
) -> Tensor:
    return _like(query, query.shape[0])


@operator("rank_counts")
def rank_counts(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    at_target: Tensor,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).rank_counts(query, entity, target, at_target, offsets, ids, scale, reduction)


@rank_counts.register_fake
def _(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    at_target: Tensor,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> Tensor:
    return target.new_empty(3, query.shape[0])


@operator("topk_all")
def topk_all(
    query: Tensor,
    entity: Tensor,
    k: int,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).topk_all(query, entity, k, offsets, ids, scale, reduction)


@topk_all.register_fake
def _(
    query: Tensor,
    entity: Tensor,
    k: int,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    return _like(query, query.shape[0], k), ids.new_empty(query.shape[0], k)


@operator("score_all")
def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).score_all(query, entity, scale, reduction)


@score_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    return _like(query, query.shape[0], entity.shape[0])


@operator("logsumexp_all")
def logsumexp_all(
    query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee"
) -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).logsumexp_all(query, entity, scale, reduction)


@logsumexp_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    return _like(query, query.shape[0])


@operator("one_vs_all")
def one_vs_all(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    scale: Tensor | None,
    reduction: str,
    keep: bool = False,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """(log Σ_e exp(score) less the target's score [B], the former alone [B], the scores for the backward pass: [B, E] if `keep`, else [0, E])."""
    with _no_autocast(query.device):
        implementation = _implementation(query, backend, precision)
        at_target = implementation.target_scores(query, entity, target, scale, reduction)
        if keep:
            scores, total = implementation.scores_and_logsumexp(query, entity, scale, reduction)
        else:
            scores = _like(query, 0, len(entity))
            total = implementation.logsumexp_all(query, entity, scale, reduction)
        return total - score_eager.finish(at_target, reduction), total, scores


@one_vs_all.register_fake
def _(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    scale: Tensor | None,
    reduction: str,
    keep: bool = False,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    B, E = query.shape[0], entity.shape[0]
    return _like(query, B), _like(query, B), _like(query, B if keep else 0, E)


@operator("score_backward")
def score_backward(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    grad: Tensor,
    logsumexp: Tensor | None,
    target: Tensor | None,
    kept: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, entity and scale (empty without one), a tile of scores at a time. No atomics: one input, one result.

    Args:
        grad: of the scores [B, E], or of the log-sum-exp [B] where `logsumexp` [B], the forward's result, is given.
        target: int64 [B], whose scores the forward has subtracted from the log-sum-exp; None: none.
        kept: the scores [B, E], where the forward has kept them; None or no rows: they are made again.
    """
    implementation = _implementation(query, backend, precision)
    wide = accumulator(query.dtype)
    rows, columns = implementation.tile_shape(len(query), len(entity), query.shape[1], reduction)
    by_query = torch.zeros_like(query, dtype=wide)
    by_entity = torch.zeros_like(entity, dtype=wide)
    by_scale = query.new_zeros(0 if scale is None else query.shape, dtype=wide)
    with _no_autocast(query.device):
        for row in range(0, len(query), rows):
            part = slice(row, row + rows)
            q, s = query[part].to(wide), None if scale is None else scale[part].to(wide)
            for column in range(0, len(entity), columns):
                across = slice(column, column + columns)
                e = entity[across].to(wide)
                scores: Any = None
                if kept is not None and len(kept):
                    scores = kept[part, across]
                elif logsumexp is not None or reduction == "l2":
                    scores = implementation.score_all(q, e, s, reduction)
                if logsumexp is None:
                    weight = grad[part, across].to(wide)
                else:
                    weight = implementation.softmax(scores, logsumexp[part], grad[part])
                if target is not None:
                    own = target[part] - column
                    here = (own >= 0) & (own < len(e))
                    weight.scatter_add_(1, own.clamp(0, len(e) - 1)[:, None], (here * -grad[part])[:, None])
                out = by_query[part], by_entity[across], None if scale is None else by_scale[part]
                implementation.add_gradients(q, e, s, weight, scores, reduction, out)
    return by_query.to(query.dtype), by_entity.to(query.dtype), by_scale.to(query.dtype)


@score_backward.register_fake
def _(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    grad: Tensor,
    logsumexp: Tensor | None,
    target: Tensor | None,
    kept: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(entity), query.new_empty(0 if scale is None else query.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, entity, scale, ctx.reduction, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(query, entity, scale, output if output.ndim == 1 else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, entity, scale, logsumexp = ctx.saved_tensors
    options = (ctx.reduction, ctx.backend, ctx.precision)
    by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, None, None, *options)
    return by_query, by_entity, None if scale is None else by_scale, None, None, None


def _save_one_vs_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, entity, target, scale, ctx.reduction, _, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(query, entity, target, scale, *output[1:])


def _backward_one_vs_all(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, entity, target, scale, logsumexp, kept = ctx.saved_tensors
    options = (ctx.reduction, ctx.backend, ctx.precision)
    by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, target, kept, *options)
    return by_query, by_entity, None, None if scale is None else by_scale, None, None, None, None


score_all.register_autograd(_backward, setup_context=_save)
logsumexp_all.register_autograd(_backward, setup_context=_save)
one_vs_all.register_autograd(_backward_one_vs_all, setup_context=_save_one_vs_all)
