"""The operators of the losses, `torch.ops.dhns_fast.{hal_embeddings, hal_scores, self_adversarial}`: one pass gives a
loss and its gradients.

A forward call computes the gradients along with the loss, since it has everything at hand that they need; backward only
scales them, so that they are differentiable once. Arguments are those of `dhns_fast.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dhns_fast import checks
from dhns_fast.catalogue import CONDITIONED, MODELS
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import hal_eager, memory
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.precision import accumulator

ROWS_PER_BLOCK = 16  # of which one partial sum is made on the CPU; csrc/hal_cpu.h knows it as kRowsPerBlock
# On a GPU a block makes one, of at most so many rows; smaller batches get so many blocks, two a multiprocessor of an
# H100.
MOST_ROWS, BLOCKS = 8, 264
# The same of hal_scores, which has a score where hal_embeddings has a vector; kScoresPerBlock of csrc/hal_cpu.h.
SCORES_PER_BLOCK = 1024
# Threads of a block of the CUDA kernel, and bytes of sums that every chip from sm_80 on has room for, twice beside
# vectors.
MOST_THREADS, TABLE_BYTES = 512, 40 << 10
# By (interaction, p): the places of `Interaction` in csrc/reductions.h.
CODES = {("transe", 1): 0, ("transe", 2): 1, ("distmult", 1): 2, ("complex", 1): 3, ("rotate", 1): 4}


class EmbeddingInputs(NamedTuple):
    interaction: str
    head: Tensor  # [B, D], or [M, B, D] with attention
    relation: Tensor  # [B, D], or [B, D/2] of phases
    tail: Tensor  # as head
    neg_head: Tensor  # [L, M, B, D]
    neg_tail: Tensor  # [L, M, B, D]
    margin: Tensor  # [L], on any device
    weight: Tensor  # [L], on any device
    mu: float
    gamma: float
    attention: Tensor | None  # [D]
    normalize: bool
    p: int
    head_present: Tensor | None  # bool [M, B]
    tail_present: Tensor | None
    gradients: bool
    backend: str = ""


class ScoreInputs(NamedTuple):
    positive: Tensor  # [B]
    negative: Tensor  # [L, K, B]
    margin: Tensor  # [L], on any device
    weight: Tensor  # [L], on any device
    mu: float
    backend: str = ""


class SelfAdversarialInputs(NamedTuple):
    positive: Tensor  # [B]
    negative: Tensor  # [B, N]
    temperature: float
    backend: str = ""


def _level_values(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, accumulator(like.dtype)).contiguous()


def refuse_empty(**tensors: Tensor | None) -> None:
    """A loss of nothing is a mistake of the caller."""
    for name, x in tensors.items():
        if x is not None and 0 in x.shape:
            raise InputError(name, Shown(f"shape {list(x.shape)}"), "no empty dimension")


def _check_embeddings(a: EmbeddingInputs) -> None:
    checks.one_of("interaction", a.interaction, CONDITIONED)
    checks.one_of("p", a.p, (1, 2))
    if a.interaction != "transe" and (a.normalize or a.p != 1):
        given = f"normalize={a.normalize}, p={a.p} with {a.interaction!r}"
        raise InputError("normalize, p", Shown(given), "False and 1; only 'transe' has them")
    checks.floating(head=a.head, attention=a.attention, margin=a.margin, weight=a.weight)
    entity = "B D" if a.attention is None else "M B D"
    sizes = checks.shapes(
        head=(a.head, entity), tail=(a.tail, entity), relation=(a.relation, "B W"), neg_head=(a.neg_head, "L M B D"),
        neg_tail=(a.neg_tail, "L M B D"), margin=(a.margin, "L"), weight=(a.weight, "L"), attention=(a.attention, "D"),
        head_present=(a.head_present, "M B"), tail_present=(a.tail_present, "M B"),
    )  # fmt: skip
    kind = MODELS[a.interaction]
    if sizes["D"] % kind.parts:
        raise InputError("head", Shown(f"a last dimension of {sizes['D']}"), f"an even one for {a.interaction!r}")
    width = sizes["D"] // 2 if kind.phases else sizes["D"]
    if sizes["W"] != width:
        raise InputError("relation", Shown(f"shape {list(a.relation.shape)}"), f"[B = {sizes['B']}, {width}]")
    if not (sizes["B"] and sizes["D"] and sizes["L"] and sizes["M"]):
        refuse_empty(head=a.head, relation=a.relation, neg_head=a.neg_head)
    checks.alike(
        "head",
        a.head,
        relation=a.relation,
        tail=a.tail,
        neg_head=a.neg_head,
        neg_tail=a.neg_tail,
        attention=a.attention,
    )
    if a.head_present is None and a.tail_present is None:
        return
    if (a.head_present is None) != (a.tail_present is None) or (a.head_present is not None and a.attention is None):
        raise InputError(
            "head_present, tail_present",
            Shown("one mask, or masks without attention"),
            "both, with attention, or neither",
        )
    checks.dtype(torch.bool, head_present=a.head_present, tail_present=a.tail_present)
    checks.on_device("head", a.head, head_present=a.head_present, tail_present=a.tail_present)


def look_at_weights(weight: Tensor) -> None:
    """Refuse weights of levels (on the CPU) that are negative or not finite: a comparison would take NaN for a level
    that does not count.
    """
    if weight.device.type == "cpu" and not all(0 <= value < math.inf for value in weight.tolist()):
        raise InputError("weight", weight.tolist(), "values >= 0 and finite")


def _look(a: EmbeddingInputs | ScoreInputs) -> None:
    look_at_weights(a.weight)


def _fake_embeddings(a: EmbeddingInputs) -> tuple[Tensor, ...]:
    wide = accumulator(a.head.dtype)

    def empty(*shape: Any) -> Tensor:
        return a.head.new_empty(shape, dtype=wide)

    if not a.gradients:
        return empty(), empty(0), empty(0), empty(0), empty(0), empty(0)
    like = [empty(*x.shape) for x in (a.head, a.relation, a.tail)]
    return (
        empty(),
        like[0],
        like[1],
        like[2],
        empty(0 if a.attention is None else a.head.shape[-1]),
        empty(a.neg_head.shape[0]),
    )


_floats = backends.reads("head", torch.float32, torch.float64)


def _not_cuda(a: EmbeddingInputs) -> Iterator[str]:
    if a.head.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        yield f"it reads torch.float32, torch.float64 and torch.bfloat16, not {a.head.dtype}"
    (levels, modalities, _, dim), wide = a.neg_head.shape, accumulator(a.head.dtype)
    # A thread has 16 bytes of what is computed with of every vector, of each half of complex ones, whose blocks have
    # half as many threads (kRowThreads in csrc/hal.cu).
    most = MOST_THREADS * (16 // wide.itemsize)
    if dim > most:
        yield f"it takes D up to {most} of {wide}, not {dim}"
        return
    warps = -(-dim * wide.itemsize // (MODELS[a.interaction].parts * 16 * 32))
    needed = table_numbers(levels, modalities, a.attention is not None, a.normalize, warps) * wide.itemsize
    if needed > TABLE_BYTES:
        yield f"the sums of L = {levels} and M = {modalities} would need {needed} bytes of shared memory, more than {TABLE_BYTES}"


def table_numbers(levels: int, modalities: int, attention: bool, normalize: bool, warps: int) -> int:
    """Numbers that the CUDA kernel has in shared memory beside vectors: HalTables of csrc/hal_kernel.cuh."""
    pairs = 1 if attention else modalities
    shares = 2 * modalities * (1 + levels) if attention else 0
    factors = 3 + 2 * levels * pairs if normalize else 0
    scores = 1 + 3 * levels * pairs
    return warps * (2 * shares + 2 * factors + scores + 2 * max(shares, factors, scores))


def _compiled_embeddings(a: EmbeddingInputs) -> tuple[Tensor, ...]:
    levels, _, batch, dim = a.neg_head.shape
    wide = accumulator(a.head.dtype)
    learned = (a.head, a.relation, a.tail)
    grads = [memory.empty(x.shape, wide, x.device) for x in learned] if a.gradients else [None] * 3
    rows = ROWS_PER_BLOCK if a.head.device.type == "cpu" else min(MOST_ROWS, -(-batch // BLOCKS))
    columns = 1 + levels + (0 if a.attention is None else dim)
    partial = a.head.new_empty(-(-batch // rows), columns, dtype=torch.float64)
    margin, weight = _level_values(a.margin, a.head), _level_values(a.weight, a.head)
    torch.ops.dhns_fast_native.hal_embeddings(
        CODES[a.interaction, a.p], a.head, a.relation, a.tail, a.neg_head, a.neg_tail, margin, weight, a.mu, a.gamma, a.attention,
        a.normalize, a.head_present, a.tail_present, *grads, partial,
    )  # fmt: skip
    total = partial.sum(0).to(wide)
    if not a.gradients:
        return total[0].clone(), *(total.new_empty(0) for _ in range(5))
    by_attention = total.new_empty(0) if a.attention is None else total[1 + levels :].clone()
    return total[0].clone(), *grads, by_attention, total[1 : 1 + levels].clone()


def in_units(
    a: EmbeddingInputs, compiled: Callable[[EmbeddingInputs], tuple[Tensor, ...]] = _compiled_embeddings
) -> tuple[Tensor, ...]:
    """What the CUDA kernel gives, which reads vectors 16 bytes of what is computed with at a time: others are copied,
    with zeros behind each half. Zeros add nothing to any sum.
    """
    n, wide = a.head.shape[-1] // MODELS[a.interaction].parts, 16 // accumulator(a.head.dtype).itemsize
    vectors = {
        name: x
        for name in ("head", "relation", "tail", "neg_head", "neg_tail", "attention")
        if (x := getattr(a, name)) is not None
    }
    if n % wide == 0 and all(x.data_ptr() % (wide * x.itemsize) == 0 for x in vectors.values()):
        return compiled(a)
    more = -n % wide
    copies: dict[str, Any] = {
        name: pad(x.unflatten(-1, (x.shape[-1] // n, n)), (0, more)).flatten(-2).clone() for name, x in vectors.items()
    }
    loss, *found = compiled(a._replace(**copies))
    if not a.gradients:
        return loss, *found
    head, relation, tail, attention = (
        x.unflatten(-1, (-1, n + more))[..., :n].flatten(-2) if len(x) else x for x in found[:4]
    )
    return loss, head, relation, tail, attention, found[4]


# Loss and the gradients of head, relation, tail, attention and margin; empty tensors where `gradients` is False.
hal_embeddings = Operator(
    "hal_embeddings", EmbeddingInputs, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    check=_check_embeddings, look=_look, fake=_fake_embeddings,
    implementations=(
        Implementation(backends.CUDA, in_units, _not_cuda),
        Implementation(backends.CPU, _compiled_embeddings, _floats),
        Implementation(backends.EAGER, hal_eager.embeddings),
    ),
)  # fmt: skip


def _check_scores(a: ScoreInputs) -> None:
    checks.floating(positive=a.positive, negative=a.negative, margin=a.margin, weight=a.weight)
    checks.shapes(
        positive=(a.positive, "B"), negative=(a.negative, "L K B"), margin=(a.margin, "L"), weight=(a.weight, "L")
    )
    refuse_empty(positive=a.positive, negative=a.negative)
    checks.on_device("positive", a.positive, negative=a.negative)


def _together(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in the one dtype that the loss is computed in."""
    wide = accumulator(positive.dtype, negative.dtype)
    return positive.to(wide), negative.to(wide)


def _fake_scores(a: ScoreInputs | SelfAdversarialInputs) -> tuple[Tensor, ...]:
    wide = accumulator(a.positive.dtype, a.negative.dtype)

    def empty(shape: Any) -> Tensor:
        return a.positive.new_empty(shape, dtype=wide)

    outputs = empty(()), empty(a.positive.shape), empty(a.negative.shape)
    return (*outputs, empty(a.negative.shape[0])) if isinstance(a, ScoreInputs) else outputs


def _compiled_scores(a: ScoreInputs) -> tuple[Tensor, ...]:
    positive, negative = _together(a.positive, a.negative)
    blocks = max(1, -(-len(positive) // SCORES_PER_BLOCK))
    partial = positive.new_empty(blocks, 1 + negative.shape[0], dtype=torch.float64)
    grads = [memory.empty(x.shape, x.dtype, x.device) for x in (positive, negative)]
    values = _level_values(a.margin, positive), _level_values(a.weight, positive)
    torch.ops.dhns_fast_native.hal_scores(positive, negative, *values, a.mu, *grads, partial)
    total = partial.sum(0).to(positive.dtype)
    return total[0].clone(), *grads, total[1:].clone()


# Loss and the gradients of positive, negative and margin.
hal_scores = Operator(
    "hal_scores", ScoreInputs, tuple[Tensor, Tensor, Tensor, Tensor], check=_check_scores, look=_look, fake=_fake_scores,
    implementations=(
        Implementation(backends.CUDA, _compiled_scores),
        Implementation(backends.CPU, _compiled_scores),
        Implementation(backends.EAGER, lambda a: hal_eager.scores(*_together(a.positive, a.negative), a.margin, a.weight, a.mu)),
    ),
)  # fmt: skip


def _check_self_adversarial(a: SelfAdversarialInputs) -> None:
    checks.floating(positive=a.positive, negative=a.negative)
    checks.shapes(positive=(a.positive, "B"), negative=(a.negative, "B N"))
    refuse_empty(positive=a.positive, negative=a.negative)
    checks.on_device("positive", a.positive, negative=a.negative)


def _compiled_self_adversarial(a: SelfAdversarialInputs) -> tuple[Tensor, ...]:
    positive, negative = _together(a.positive, a.negative)
    partial = positive.new_empty(positive.shape[0], dtype=torch.float64)
    grads = positive.new_empty(positive.shape), negative.new_empty(negative.shape)
    torch.ops.dhns_fast_native.self_adversarial(positive, negative, a.temperature, *grads, partial)
    return partial.sum().to(positive.dtype), *grads


# Loss and the gradients of positive and negative.
self_adversarial = Operator(
    "self_adversarial", SelfAdversarialInputs, tuple[Tensor, Tensor, Tensor], check=_check_self_adversarial, fake=_fake_scores,
    implementations=(
        Implementation(backends.CUDA, _compiled_self_adversarial),
        Implementation(backends.CPU, _compiled_self_adversarial),
        Implementation(backends.EAGER, lambda a: hal_eager.self_adversarial(*_together(a.positive, a.negative), a.temperature)),
    ),
)  # fmt: skip


def _differentiate(operator: Operator[Any], *learned: str) -> None:
    """`learned`: the inputs whose gradients are the outputs after the loss, in their order."""

    def save(ctx: Any, a: Any, output: tuple[Tensor, ...]) -> None:
        # Detached: of an operator's own outputs autograd would hand back a new tensor each time, and take that for
        # nobody else's.
        ctx.save_for_backward(*(gradient.detach() for gradient in output[1:]))
        ctx.asked = getattr(a, "gradients", True)
        inputs = (getattr(a, name) for name in learned)
        ctx.targets = [None if x is None else (x.device, x.dtype) for x in inputs]

    def backward(ctx: Any, grad: Tensor) -> Any:
        operator.refuse_unasked(ctx, "gradients", ctx.asked, *learned)
        # In training the factor is 1, and a copy of the gradients would take as long as half the forward pass. They are
        # handed out as they are: autograd adds in place to what it alone holds, which these are not, and notices if
        # somebody else changes them.
        as_is = type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1
        # One that nobody asked for would still wait for the device where its input is on another.
        wanted = operator.wanted(ctx)
        return operator.gradients(**{
            name: (saved if as_is else grad * saved).to(*to)
            for name, saved, to in zip(learned, ctx.saved_tensors, ctx.targets, strict=True)
            if name in wanted
        })  # fmt: skip

    operator.differentiate(save, backward)


# Each gradient goes back in the dtype and to the device of the input it belongs to.
_differentiate(hal_embeddings, "head", "relation", "tail", "attention", "margin")
_differentiate(hal_scores, "positive", "negative", "margin")
_differentiate(self_adversarial, "positive", "negative")
