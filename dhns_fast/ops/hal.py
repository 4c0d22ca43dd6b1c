"""The operators of the losses, `torch.ops.dhns_fast.{hal_embeddings, hal_scores, self_adversarial}`: one pass gives a loss and its gradients.

A forward call computes the gradients along with the loss, since it has everything at hand that they need; backward only scales them.
Arguments are those of `dhns_fast.loss`, checked there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.operator import operator

BACKENDS = (backends.CUDA, backends.CPU, backends.EAGER)
# Rows of which one partial sum is made, and on a GPU one block: as many blocks as fill it, and no more sums than needed.
ROWS_PER_BLOCK = {"cpu": 16, "cuda": 4}  # csrc/hal_cpu.h knows the first as kRowsPerBlock
# The same of hal_scores, which has a score where hal_embeddings has a vector; kScoresPerBlock of csrc/hal_cpu.h.
SCORES_PER_BLOCK = 1024
# Shared memory that a block may have on every architecture from sm_80 on (99 kB), less what is not vectors.
SHARED_BYTES = 96 << 10
_CODES = {("transe", 1): 0, ("transe", 2): 1, ("distmult", 1): 2, ("complex", 1): 3, ("rotate", 1): 4}


@backends.chosen_while_tracing
def choose_for_embeddings(backend: str | None, device_type: str, dim: int, itemsize: int) -> str:
    """The backend of hal_embeddings; under torch.compile decided while tracing. The CUDA kernel keeps 11 vectors in shared memory."""
    fits = 11 * dim * itemsize <= SHARED_BYTES
    return backends.resolve(backend, torch.device(device_type), BACKENDS if fits else BACKENDS[1:])


@backends.chosen_while_tracing
def choose_for_scores(backend: str | None, device_type: str) -> str:
    """The backend of hal_scores and self_adversarial."""
    return backends.resolve(backend, torch.device(device_type), BACKENDS)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _level_values(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, _wide(like)).contiguous()


@operator("hal_embeddings")
def hal_embeddings(
    interaction: str,
    head: Tensor,
    relation: Tensor,
    tail: Tensor,
    neg_head: Tensor,
    neg_tail: Tensor,
    margin: Tensor,
    weight: Tensor,
    mu: float,
    gamma: float,
    attention: Tensor | None,
    normalize: bool,
    p: int,
    head_present: Tensor | None,
    tail_present: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and the gradients of head, relation, tail, attention and margin; empty tensors where `gradients` is False."""
    head, relation, tail, neg_head, neg_tail = (x.contiguous() for x in (head, relation, tail, neg_head, neg_tail))
    head_present, tail_present = (None if x is None else x.contiguous() for x in (head_present, tail_present))
    levels, _, batch, dim = neg_head.shape
    wide = _wide(head)
    grads = [memory.empty(x.shape, wide, x.device) for x in (head, relation, tail)] if gradients else [None] * 3
    partial = head.new_empty(-(-batch // ROWS_PER_BLOCK[head.device.type]), 1 + levels + dim, dtype=torch.float64)
    torch.ops.dhns_fast_native.hal_embeddings(
        _CODES[interaction, p],
        *(head, relation, tail, neg_head, neg_tail),
        *(_level_values(margin, head), _level_values(weight, head)),
        mu,
        gamma,
        None if attention is None else attention.contiguous(),
        normalize,
        head_present,
        tail_present,
        *grads,
        partial,
    )
    total = partial.sum(0).to(wide)
    empty = total.new_empty(0)
    if not gradients:
        return total[0].clone(), empty, empty.clone(), empty.clone(), empty.clone(), empty.clone()
    grad_attention = empty if attention is None else total[1 + levels :].clone()
    return total[0].clone(), *grads, grad_attention, total[1 : 1 + levels].clone()


@hal_embeddings.register_fake
def _(
    interaction: str,
    head: Tensor,
    relation: Tensor,
    tail: Tensor,
    neg_head: Tensor,
    neg_tail: Tensor,
    margin: Tensor,
    weight: Tensor,
    mu: float,
    gamma: float,
    attention: Tensor | None,
    normalize: bool,
    p: int,
    head_present: Tensor | None,
    tail_present: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(head)
    empty = lambda *shape: head.new_empty(shape, dtype=wide)  # noqa: E731
    if not gradients:
        return empty(), empty(0), empty(0), empty(0), empty(0), empty(0)
    like = [empty(*x.shape) for x in (head, relation, tail)]
    return empty(), like[0], like[1], like[2], empty(0 if attention is None else head.shape[-1]), empty(neg_head.shape[0])


def _save_embeddings(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, output[1:], (inputs[1], inputs[2], inputs[3], inputs[10], inputs[6]))


def _embeddings_backward(ctx: FunctionCtx, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    head, relation, tail, attention, margin = _scaled(ctx, grad)
    return None, head, relation, tail, None, None, margin, None, None, None, attention, None, None, None, None, None


@operator("hal_scores")
def hal_scores(positive: Tensor, negative: Tensor, margin: Tensor, weight: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and the gradients of positive, negative and margin."""
    wide = _wide(positive)
    positive, negative = positive.to(wide).contiguous(), negative.to(wide).contiguous()
    blocks = max(1, -(-len(positive) // SCORES_PER_BLOCK))
    partial = positive.new_empty(blocks, 1 + negative.shape[0], dtype=torch.float64)
    grads = memory.empty(positive.shape, wide, positive.device), memory.empty(negative.shape, wide, negative.device)
    values = _level_values(margin, positive), _level_values(weight, positive)
    torch.ops.dhns_fast_native.hal_scores(positive, negative, *values, mu, *grads, partial)
    total = partial.sum(0).to(wide)
    return total[0].clone(), *grads, total[1:].clone()


@hal_scores.register_fake
def _(positive: Tensor, negative: Tensor, margin: Tensor, weight: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = lambda shape: positive.new_empty(shape, dtype=_wide(positive))  # noqa: E731
    return empty(()), empty(positive.shape), empty(negative.shape), empty(negative.shape[0])


def _save_scores(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, output[1:], inputs[:3])


def _scores_backward(ctx: FunctionCtx, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_scaled(ctx, grad), None, None


@operator("self_adversarial")
def self_adversarial(positive: Tensor, negative: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of positive and negative."""
    wide = _wide(positive)
    positive, negative = positive.to(wide).contiguous(), negative.to(wide).contiguous()
    partial = positive.new_empty(positive.shape[0], dtype=torch.float64)
    grads = torch.empty_like(positive), torch.empty_like(negative)
    torch.ops.dhns_fast_native.self_adversarial(positive, negative, temperature, *grads, partial)
    return partial.sum().to(wide), *grads


@self_adversarial.register_fake
def _(positive: Tensor, negative: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    empty = lambda shape: positive.new_empty(shape, dtype=_wide(positive))  # noqa: E731
    return empty(()), empty(positive.shape), empty(negative.shape)


def _save_self_adversarial(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, output[1:], inputs[:2])


def _self_adversarial_backward(ctx: FunctionCtx, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_scaled(ctx, grad), None


def _save(ctx: FunctionCtx, gradients: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> None:
    """Keeps the gradients of a scalar output; each goes back in the dtype and to the device of the input it belongs to."""
    # Detached: of an operator's own outputs autograd would hand back a new tensor each time, and take that for nobody else's.
    ctx.save_for_backward(*(gradient.detach() for gradient in gradients))
    ctx.targets = [None if x is None else (x.device, x.dtype) for x in inputs]  # type: ignore[attr-defined]


def _scaled(ctx: FunctionCtx, grad: Tensor) -> list[Tensor | None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    targets = ctx.targets  # type: ignore[attr-defined]
    # In training the factor is 1, and a copy of the gradients would take as long as half the forward pass. They are handed out as they
    # are: autograd adds in place to what it alone holds, which these are not, and notices if somebody else changes them.
    as_is = type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1
    return [None if to is None else (gradient if as_is else grad * gradient).to(*to) for gradient, to in zip(saved, targets, strict=True)]


hal_embeddings.register_autograd(_embeddings_backward, setup_context=_save_embeddings)
hal_scores.register_autograd(_scores_backward, setup_context=_save_scores)
self_adversarial.register_autograd(_self_adversarial_backward, setup_context=_save_self_adversarial)
