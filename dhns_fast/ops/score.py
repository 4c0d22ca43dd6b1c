"""Operators of the scores against all entities: schema, fake, autograd, choice of the implementation.

`torch.ops.dhns_fast.{target_scores, rank_counts, topk_all, logsumexp_all, score_all, score_backward}`. An implementation has the
functions of `dhns_fast.ops.score_eager`, which says what they take and return; `dhns_fast.scoring` checks the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast.errors import BackendUnavailableError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import score_cpu, score_eager

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
    return query.new_empty(shape, dtype=score_eager.accumulator(query.dtype))


@torch.library.custom_op("dhns_fast::target_scores", mutates_args=())
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


@torch.library.custom_op("dhns_fast::rank_counts", mutates_args=())
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


@torch.library.custom_op("dhns_fast::topk_all", mutates_args=())
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


@torch.library.custom_op("dhns_fast::score_all", mutates_args=())
def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).score_all(query, entity, scale, reduction)


@score_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    return _like(query, query.shape[0], entity.shape[0])


@torch.library.custom_op("dhns_fast::logsumexp_all", mutates_args=())
def logsumexp_all(
    query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee"
) -> Tensor:
    with _no_autocast(query.device):
        return _implementation(query, backend, precision).logsumexp_all(query, entity, scale, reduction)


@logsumexp_all.register_fake
def _(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str, backend: str = "", precision: str = "ieee") -> Tensor:
    return _like(query, query.shape[0])


@torch.library.custom_op("dhns_fast::score_backward", mutates_args=())
def score_backward(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    grad: Tensor,
    logsumexp: Tensor | None,
    reduction: str,
    backend: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, entity and scale (empty without one); the scores are made again, a tile at a time.

    Args:
        grad: of the scores [B, E], or of the log-sum-exp [B] where `logsumexp` [B], the forward's result, is given.
    """
    implementation = _implementation(query, backend, precision)
    wide = score_eager.accumulator(query.dtype)
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
                again = logsumexp is not None or reduction == "l2"
                scores: Any = implementation.score_all(q, e, s, reduction) if again else None
                if logsumexp is None:
                    weight = grad[part, across].to(wide)
                else:
                    # exp(score − logsumexp) is the softmax: at most 1, whatever the scores.
                    weight = (scores - logsumexp[part, None]).exp_().mul_(grad[part, None])
                tile = implementation.tile_gradients(q, e, s, weight, scores, reduction)
                by_query[part] += tile[0]
                by_entity[across] += tile[1]
                if scale is not None:
                    by_scale[part] += tile[2]
    return by_query.to(query.dtype), by_entity.to(query.dtype), by_scale.to(query.dtype)


@score_backward.register_fake
def _(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    grad: Tensor,
    logsumexp: Tensor | None,
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
    by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, ctx.reduction, ctx.backend, ctx.precision)
    return by_query, by_entity, None if scale is None else by_scale, None, None, None


score_all.register_autograd(_backward, setup_context=_save)
logsumexp_all.register_autograd(_backward, setup_context=_save)
