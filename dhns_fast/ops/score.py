"""Operators of the scores against all entities: `torch.ops.dhns_fast.{target_scores, rank_counts, rank_groups,
topk_all, logsumexp_all, one_vs_all, score_all, score_backward}`.

An implementation has the functions of `dhns_fast.ops.score_eager`, which says what they take and return. What they are
given is row-major and on the current device, as `Operator` sees to; rows of a tile's weights and scores may be parts of
longer ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dhns_fast import checks
from dhns_fast.catalogue import PRECISIONS, REDUCTIONS
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import score_cpu, score_eager
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.precision import accumulator

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_K = 1024


class TargetInputs(NamedTuple):
    query: Tensor  # [B, D]
    entity: Tensor  # [E, D]
    target: Tensor  # int64 [B]
    scale: Tensor | None  # [B, D]
    reduction: str
    backend: str = ""
    precision: str = "ieee"


class RankInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    target: Tensor  # int64 [B]; outside of the table: of another shard
    at_target: Tensor  # raw scores [B]
    offsets: Tensor  # int64 [B + 1]
    ids: Tensor  # int64 [n], rising within a query; outside of the table: of another shard
    scale: Tensor | None
    reduction: str
    backend: str = ""
    precision: str = "ieee"


class GroupInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    goals: Tensor  # int64 [B + 1]: where in at_target those of each query begin
    at_target: Tensor  # raw scores [T]
    offsets: Tensor  # int64 [B + 1]
    ids: Tensor  # int64 [n], as of RankInputs
    scale: Tensor | None
    reduction: str
    backend: str = ""
    precision: str = "ieee"


class TopInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    k: int
    offsets: Tensor
    ids: Tensor
    scale: Tensor | None
    reduction: str
    backend: str = ""
    precision: str = "ieee"


class ScoreInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    scale: Tensor | None
    reduction: str
    backend: str = ""
    precision: str = "ieee"


class OneVsAllInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    target: Tensor
    scale: Tensor | None
    reduction: str
    keep: bool = False
    backend: str = ""
    precision: str = "ieee"


class BackwardInputs(NamedTuple):
    query: Tensor
    entity: Tensor
    scale: Tensor | None
    grad: Tensor
    logsumexp: Tensor | None
    target: Tensor | None
    kept: Tensor | None
    reduction: str
    backend: str = ""
    precision: str = "ieee"


def _check_tables(a: Any) -> dict[str, int]:
    checks.one_of("reduction", a.reduction, REDUCTIONS)
    checks.one_of("precision", a.precision, PRECISIONS)
    query, entity, scale = a.query, a.entity, a.scale
    sizes = checks.shapes(query=(query, "B D"), entity=(entity, "E D"), scale=(scale, "B D"))
    if not sizes["D"]:
        raise InputError("query", Shown(f"shape {list(query.shape)}"), "at least one dimension D")
    if not sizes["E"]:
        raise InputError("entity", Shown(f"an empty table {list(entity.shape)}"), "at least one entity")
    check_parts(a.reduction, sizes["D"])
    if query.dtype not in DTYPES:
        raise InputError("query", query, ", ".join(map(str, DTYPES)))
    checks.alike("query", query, entity=entity, scale=scale)
    return sizes


def check_parts(reduction: str, dim: int) -> None:
    """Refuses a width that has no two halves where the reduction is one of complex numbers."""
    if reduction == "complex_l1" and dim % 2:
        raise InputError(
            "query", Shown(f"dimension D of {dim}"), "an even one for complex_l1: [real half, imaginary half]"
        )


def _check_ids(name: str, ids: Tensor | None, size: int | torch.SymInt | None, query: Tensor) -> None:
    if ids is None:
        return
    if (
        ids.ndim != 1
        or ids.dtype != torch.int64
        or ids.device != query.device
        or (size is not None and ids.shape[0] != size)
    ):
        accepted = f"torch.int64 [{'n' if size is None else size}] on {query.device}"
        raise InputError(name, Shown(f"{ids.dtype} {list(ids.shape)} on {ids.device}"), accepted)


def _check_sums(name: str, x: Tensor, query: Tensor, *shape: Any) -> None:
    """Of scores and their gradients: in the dtype that they are computed in."""
    wide = accumulator(query.dtype)
    if x.dtype != wide or x.device != query.device or tuple(x.shape) != shape:
        raise InputError(
            name, Shown(f"{x.dtype} {list(x.shape)} on {x.device}"), f"{wide} {list(shape)} on {query.device}"
        )


def _check_target(a: TargetInputs | OneVsAllInputs) -> None:
    _check_ids("target", a.target, _check_tables(a)["B"], a.query)


def _check_known(a: RankInputs | GroupInputs | TopInputs) -> dict[str, int]:
    sizes = _check_tables(a)
    _check_ids("offsets", a.offsets, sizes["B"] + 1, a.query)
    _check_ids("ids", a.ids, None, a.query)
    return sizes


def _check_rank(a: RankInputs) -> None:
    sizes = _check_known(a)
    _check_ids("target", a.target, sizes["B"], a.query)
    _check_sums("at_target", a.at_target, a.query, sizes["B"])


def _check_groups(a: GroupInputs) -> None:
    sizes = _check_known(a)
    _check_ids("goals", a.goals, sizes["B"] + 1, a.query)
    if a.at_target.ndim != 1:
        raise InputError("at_target", a.at_target, "one dimension, [T]")
    _check_sums("at_target", a.at_target, a.query, a.at_target.shape[0])


def _check_top(a: TopInputs) -> None:
    checks.whole("k", a.k, 1, min(_check_known(a)["E"], MAX_K))


def _check_backward(a: BackwardInputs) -> None:
    sizes = _check_tables(a)
    B, E = sizes["B"], sizes["E"]
    _check_sums("grad", a.grad, a.query, *((B, E) if a.logsumexp is None else (B,)))
    if a.logsumexp is not None:
        _check_sums("logsumexp", a.logsumexp, a.query, B)
    _check_ids("target", a.target, B, a.query)
    if a.kept is not None and (not a.kept.ndim or len(a.kept)):
        _check_sums("kept", a.kept, a.query, B, E)


def look_inside(name: str, ids: Tensor, rows: int, least: int = 0) -> None:
    """Refuses indices (on the CPU) that are not rows of a table, or as low as `least`."""
    if ids.numel():
        lowest, highest = (int(x) for x in ids.aminmax())
        if lowest < least or highest >= rows:
            raise InputError(name, Shown(f"indices from {lowest} to {highest}"), f"{least} to {rows - 1}")


def _look_at_target(a: TargetInputs | OneVsAllInputs) -> None:
    look_inside("target", a.target, len(a.entity))


def _look_at_backward(a: BackwardInputs) -> None:
    if a.target is not None:
        look_inside("target", a.target, len(a.entity))


def _look_at_groups(a: GroupInputs) -> None:
    goals, count = a.goals, len(a.at_target)
    if int(goals[0]) != 0 or int(goals[-1]) != count or bool((goals.diff() < 0).any()):
        accepted = f"rising from 0 to {count}"
        raise InputError("goals", Shown("offsets that do not rise from 0 to the number of targets"), accepted)
    _look_at_known(a)


def _look_at_known(a: RankInputs | GroupInputs | TopInputs) -> None:
    offsets, ids = a.offsets, a.ids
    count = len(ids)
    if not count:
        if offsets.any():
            raise InputError("offsets", Shown(f"offsets up to {int(offsets.max())}"), "0 throughout, as ids are none")
        return
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((steps < 0).any()):
        raise InputError(
            "offsets", Shown("offsets that do not rise from 0 to the number of ids"), f"rising from 0 to {count}"
        )
    rising = ids.diff() > 0
    ends = offsets[1:-1]
    rising[ends[(ends > 0) & (ends < count)] - 1] = True
    if not rising.all():
        raise InputError("ids", Shown("known answers out of order"), "sorted and without duplicates within each query")


def _like(query: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return query.new_empty(shape, dtype=accumulator(query.dtype))


def _fake_per_query(a: TargetInputs | ScoreInputs) -> Tensor:
    return _like(a.query, a.query.shape[0])


def _fake_counts(a: RankInputs) -> Tensor:
    return a.target.new_empty(3, a.query.shape[0])


def _fake_groups(a: GroupInputs) -> Tensor:
    return a.goals.new_empty(3, a.at_target.shape[0])


def _fake_top(a: TopInputs) -> tuple[Tensor, Tensor]:
    return _like(a.query, a.query.shape[0], a.k), a.ids.new_empty(a.query.shape[0], a.k)


def _fake_matrix(a: ScoreInputs) -> Tensor:
    return _like(a.query, a.query.shape[0], a.entity.shape[0])


def _fake_one_vs_all(a: OneVsAllInputs) -> tuple[Tensor, Tensor, Tensor]:
    B, E = a.query.shape[0], a.entity.shape[0]
    return _like(a.query, B), _like(a.query, B), _like(a.query, B if a.keep else 0, E)


def _fake_gradients(a: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    by_scale = a.query.new_empty((0,) if a.scale is None else a.query.shape)
    return a.query.new_empty(a.query.shape), a.entity.new_empty(a.entity.shape), by_scale


def _not_ieee(a: Any) -> Iterator[str]:
    if a.precision != "ieee":
        yield f"its precision is 'ieee', not {a.precision!r}"


_float32 = backends.reads("query", torch.float32)


def _not_native(a: Any) -> Iterator[str]:
    yield from _float32(a)
    yield from _not_ieee(a)


def _not_triton(a: Any) -> Iterator[str]:
    # float64 is what gradient checks need, not speed.
    if a.query.dtype == torch.float64:
        yield "it has no float64"


def _not_cuda(a: Any) -> Iterator[str]:
    yield from _not_triton(a)
    if a.reduction == "dot":
        yield "its reductions are distances, products are Triton's"


def _consumers(backend: str, a: Any) -> Any:
    if backend == "cuda":
        from dhns_fast.ops import score_cuda

        return score_cuda.Scores()
    if backend == "triton":
        from dhns_fast.ops import score_triton

        return score_triton.Scores(a.precision)
    return score_cpu if backend == "cpu" else score_eager


def _implementations(
    run: Callable[[Any, Any], Any], empty: Callable[[Any], Any], looks: bool = False
) -> tuple[Implementation, ...]:
    """One function of (consumers, inputs) on every backend; without queries there is nothing to run. `looks`: C++ looks
    at ids itself.
    """

    def on(backend: str, a: Any) -> Any:
        return run(_consumers(backend, a), a) if a.query.shape[0] else empty(a)

    return (
        Implementation(backends.CUDA, functools.partial(on, "cuda"), _not_cuda),
        Implementation(backends.TRITON, functools.partial(on, "triton"), _not_triton),
        Implementation(backends.CPU, functools.partial(on, "cpu"), _not_native, looks),
        Implementation(backends.EAGER, functools.partial(on, "eager"), _not_ieee),
    )


def _plain(function: str) -> Callable[[Any, Any], Any]:
    """The consumers' own function, which takes all inputs but backend and precision."""
    return lambda consumers, a: getattr(consumers, function)(*a[:-2])


def _rank_groups(consumers: Any, a: GroupInputs) -> Tensor:
    if hasattr(consumers, "rank_groups"):
        found: Tensor = consumers.rank_groups(*a[:-2])
        return found
    # A query for every target. (No entity has the id −1.)
    known, count = a.offsets.diff(), a.goals.diff()
    row = torch.arange(len(count), device=count.device).repeat_interleave(count, output_size=len(a.at_target))
    offsets = F.pad(known[row].cumsum(0), (1, 0))
    shift = (a.offsets[row] - offsets[:-1]).repeat_interleave(known[row])
    ids = a.ids[shift + torch.arange(len(shift), device=shift.device)]
    scale = None if a.scale is None else a.scale[row]
    nobody = torch.full_like(row, -1)
    counts: Tensor = consumers.rank_counts(
        a.query[row], a.entity, nobody, a.at_target, offsets, ids, scale, a.reduction
    )
    return counts


def _one_vs_all(consumers: Any, a: OneVsAllInputs) -> tuple[Tensor, Tensor, Tensor]:
    at_target = consumers.target_scores(a.query, a.entity, a.target, a.scale, a.reduction)
    if a.keep:
        scores, total = consumers.scores_and_logsumexp(a.query, a.entity, a.scale, a.reduction)
    else:
        scores = _like(a.query, 0, len(a.entity))
        total = consumers.logsumexp_all(a.query, a.entity, a.scale, a.reduction)
    return total - score_eager.finish(at_target, a.reduction), total, scores


def _no_gradients(a: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    query, entity, scale = _fake_gradients(a)
    return query, entity.zero_(), scale


def _gradients(consumers: Any, a: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    query, entity, scale, reduction = a.query, a.entity, a.scale, a.reduction
    wide = accumulator(query.dtype)
    rows, columns = consumers.tile_shape(len(query), len(entity), query.shape[1], reduction)
    by_query = query.new_zeros(query.shape, dtype=wide)
    by_entity = query.new_zeros(entity.shape, dtype=wide)
    by_scale = query.new_zeros((0,) if scale is None else query.shape, dtype=wide)
    for row in range(0, len(query), rows):
        part = slice(row, row + rows)
        q, s = query[part].to(wide), None if scale is None else scale[part].to(wide)
        for column in range(0, len(entity), columns):
            across = slice(column, column + columns)
            e = entity[across].to(wide)
            scores: Any = None
            if a.kept is not None and len(a.kept):
                scores = a.kept[part, across]
            elif a.logsumexp is not None or reduction == "l2":
                scores = consumers.score_all(q, e, s, reduction)
            if a.logsumexp is None:
                weight = a.grad[part, across]
            else:
                weight = consumers.softmax(scores, a.logsumexp[part], a.grad[part])
            if a.target is not None:
                own = a.target[part] - column
                here = (own >= 0) & (own < len(e))
                weight.scatter_add_(1, own.clamp(0, len(e) - 1)[:, None], (here * -a.grad[part])[:, None])
            out = by_query[part], by_entity[across], None if scale is None else by_scale[part]
            consumers.add_gradients(q, e, s, weight, scores, reduction, out)
    return by_query.to(query.dtype), by_entity.to(query.dtype), by_scale.to(query.dtype)


Three = tuple[Tensor, Tensor, Tensor]

# Raw scores of the targets [B].
target_scores = Operator(
    "target_scores", TargetInputs, Tensor, check=_check_target, look=_look_at_target, fake=_fake_per_query,
    implementations=_implementations(_plain("target_scores"), _fake_per_query, looks=True),
)  # fmt: skip

# Rivals above the target, equal to it, and NaN: int64 [3, B].
rank_counts = Operator(
    "rank_counts", RankInputs, Tensor, check=_check_rank, look=_look_at_known, fake=_fake_counts,
    implementations=_implementations(_plain("rank_counts"), _fake_counts, looks=True),
)  # fmt: skip

# Of queries with several targets each: entities that are no known answers, and with a score above, equal to, and NaN:
# int64 [3, T]. In C++ a query is scored once for all its targets.
rank_groups = Operator(
    "rank_groups", GroupInputs, Tensor, check=_check_groups, look=_look_at_groups, fake=_fake_groups,
    implementations=_implementations(_rank_groups, _fake_groups),
)  # fmt: skip

# The k best raw scores [B, k] and their ids, int64 [B, k].
topk_all = Operator(
    "topk_all", TopInputs, tuple[Tensor, Tensor], check=_check_top, look=_look_at_known, fake=_fake_top,
    implementations=_implementations(_plain("topk_all"), _fake_top, looks=True),
)  # fmt: skip

# Scores [B, E].
score_all = Operator(
    "score_all", ScoreInputs, Tensor, check=_check_tables, fake=_fake_matrix,
    implementations=_implementations(_plain("score_all"), _fake_matrix),
)  # fmt: skip

# log Σ_e exp(score), [B].
logsumexp_all = Operator(
    "logsumexp_all", ScoreInputs, Tensor, check=_check_tables, fake=_fake_per_query,
    implementations=_implementations(_plain("logsumexp_all"), _fake_per_query),
)  # fmt: skip

# (log Σ_e exp(score) less the target's score [B], the former alone [B], the scores for the backward pass: [B, E] if
# `keep`, else [0, E]).
one_vs_all = Operator(
    "one_vs_all", OneVsAllInputs, Three, check=_check_target, look=_look_at_target, fake=_fake_one_vs_all,
    implementations=_implementations(_one_vs_all, _fake_one_vs_all, looks=True),
)  # fmt: skip

# Gradients in query, entity and scale (empty without one), a tile of scores at a time. No atomics: one input, one
# result. grad: of the scores [B, E], or of the log-sum-exp [B] where `logsumexp` [B], the forward's result, is given;
#   target: int64 [B], whose scores the forward has subtracted from the log-sum-exp; None: none;
#   kept: the scores [B, E], where the forward has kept them; None or no rows: they are made again.
score_backward = Operator(
    "score_backward", BackwardInputs, Three, check=_check_backward, look=_look_at_backward, fake=_fake_gradients,
    implementations=_implementations(_gradients, _no_gradients),
)  # fmt: skip


def _differentiate(operator: Operator[Any], summed: bool) -> None:
    """`summed`: the output is a log-sum-exp, which backward reads, and not the scores."""

    def save(ctx: Any, a: ScoreInputs, output: Tensor) -> None:
        ctx.save_for_backward(a.query, a.entity, a.scale, output if summed else None)
        ctx.options = a.reduction, a.backend, a.precision

    def backward(ctx: Any, grad: Tensor) -> Any:
        query, entity, scale, logsumexp = ctx.saved_tensors
        by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, None, None, *ctx.options)
        return operator.gradients(query=by_query, entity=by_entity, scale=None if scale is None else by_scale)

    operator.differentiate(save, backward)


def _save_one_vs_all(ctx: Any, a: OneVsAllInputs, output: Three) -> None:
    ctx.save_for_backward(a.query, a.entity, a.target, a.scale, *output[1:])
    ctx.options = a.reduction, a.backend, a.precision


def _backward_one_vs_all(ctx: Any, grad: Tensor) -> OneVsAllInputs:
    query, entity, target, scale, logsumexp, kept = ctx.saved_tensors
    by_query, by_entity, by_scale = score_backward(query, entity, scale, grad, logsumexp, target, kept, *ctx.options)
    return one_vs_all.gradients(query=by_query, entity=by_entity, scale=None if scale is None else by_scale)


_differentiate(score_all, summed=False)
_differentiate(logsumexp_all, summed=True)
one_vs_all.differentiate(_save_one_vs_all, _backward_one_vs_all)
