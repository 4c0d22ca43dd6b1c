"""Scores of queries against all entities, and what is taken from them without writing the B×E matrix.

A model is a query, an entity table and a reduction: `score = reduce(q, s ∘ e)` for every row e of the table, with an
optional per-query scale s. Higher is better; distances are negated.

    dot          Σ q·s·e
    l2           −√Σ (q − s·e)²
    l1           −Σ |q − s·e|
    complex_l1   −Σ of the moduli of q − s·e, stored as [real half, imaginary half]

Shapes: query and scale `[B, D]`, entity `[E, D]`, all of one floating dtype on one device; scores are float32, float64
for float64 tables. Targets and known answers are compared through the arithmetic of their rivals, so that ties are
ties. Extra memory is below 64 MB, whatever B and E. NaN scores rank last, are never among the best, and are reported.

A table too large for one device is split by rows over the processes of a group: `rank_all` and `topk_all` take this
process's rows and `group`, a torch.distributed process group (gloo, NCCL). Parts lie in rank order, may differ in size
and may be empty; queries, targets and known answers are the same on every process, their ids are those of the whole
table, and so is the result, exactly as without a group. Each target's score is summed out of one owner, then counts are
summed: 4·B numbers a call; the k best are gathered and merged: 2·k·B a process.

The scale of `dot` is multiplied into the query first, which must stay below 3.4e38 for finite scores, as the squares of
`l2` must (docs/numerics.md).

`backend`: "triton", "cpu" (C++), "eager" (torch), or None for the best there is. `precision`: of the products of `dot`
on a GPU, "ieee" (float32, the default, so that ranks mean the same everywhere), "tf32" or "bf16"; sums are float32
always.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import score
from dhns_fast.ops.operator import autocast
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.score import MAX_K
from dhns_fast.ops.score_eager import finish

if TYPE_CHECKING:
    from dhns_fast.data.filter import Ragged

logger = logging.getLogger(__name__)

# Scores that one_vs_all_loss keeps for its backward pass instead of making them again: a fifth of its time, and half of
# the extra memory.
KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Ranks:
    """Filtered ranks of B targets; every tie rule from one pass.

    Attributes:
        greater: rivals that score above the target, int64 [B].
        equal: rivals that score exactly as the target, int64 [B].
    """

    greater: Tensor
    equal: Tensor

    @property
    def optimistic(self) -> Tensor:
        """1 + greater, int64 [B]."""
        return 1 + self.greater

    @property
    def realistic(self) -> Tensor:
        """The arithmetic mean of the optimistic and the pessimistic rank, float64 [B]."""
        return 1 + self.greater + self.equal.double() / 2

    @property
    def pessimistic(self) -> Tensor:
        """1 + greater + equal, int64 [B]."""
        return 1 + self.greater + self.equal


@dataclass(frozen=True)
class _Shard:
    """The rows of the table that this process holds, and the sums and concatenations over the processes of a group."""

    first: int
    total: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, query: Tensor, entity: Tensor, group: dist.ProcessGroup | None) -> _Shard:
        if group is None:
            return cls(0, len(entity))
        own = torch.tensor([len(entity), *query.shape], device=query.device)
        shapes = torch.stack(cls(0, 0, group).gather(own))
        if (shapes[:, 1:] != own[1:]).any():
            raise InputError(
                "query",
                Shown(f"shapes {shapes[:, 1:].tolist()} on the processes of the group"),
                "the same [B, D] on all",
            )
        sizes = shapes[:, 0].tolist()
        if not any(sizes):
            raise InputError(
                "entity", Shown("an empty table [0, D] on every process of the group"), "at least one entity"
            )
        return cls(sum(sizes[: dist.get_rank(group)]), sum(sizes), group)

    def sum(self, part: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def gather(self, part: Tensor) -> list[Tensor]:
        """The parts of all processes, by rank."""
        if self.group is None:
            return [part]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return parts


def _alike(query: Tensor, entity: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tables in one dtype: autocast narrows what a product made and leaves what was looked up, and the wider of the
    two is meant.
    """
    checks.tensor(query=query, entity=entity)
    checks.instance(Tensor, "a torch.Tensor, or None", scale=scale)
    if query.dtype != entity.dtype and autocast(query.device):
        wide = torch.promote_types(query.dtype, entity.dtype)
        return query.to(wide), entity.to(wide), None if scale is None else scale.to(wide)
    return query, entity, scale


def _check_tables(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    target: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """The shapes that are needed before an operator looks; a process of a group may have no row of the table."""
    checks.shapes(query=(query, "B D"), entity=(entity, "E D"), scale=(scale, "B D"), target=(target, "B"))
    if not entity.shape[0] and group is None:
        raise InputError("entity", Shown(f"an empty table {list(entity.shape)}"), "at least one entity")
    checks.dtype(torch.int64, target=target)


def _options(backend: str | None, precision: str | None) -> tuple[str, str]:
    return backend or "", precision or "ieee"


def _out_of_range(ids: Tensor, num_entities: int) -> Tensor:
    return (ids < 0) | (ids >= num_entities)


def _target_error(target: Tensor, num_entities: int) -> InputError:
    worst = int(target[_out_of_range(target, num_entities)][0])
    return InputError("target", Shown(f"entity {worst}"), f"0 to {num_entities - 1}")


def _known_answers(known: Ragged | None, query: Tensor, num_entities: int) -> tuple[Tensor, Tensor]:
    """(offsets, ids) of `known`; ids are looked at where that costs nothing, and the operator looks at their order."""
    if known is None:
        return torch.zeros(len(query) + 1, dtype=torch.int64, device=query.device), query.new_empty(
            0, dtype=torch.int64
        )
    if not (hasattr(known, "offsets") and hasattr(known, "ids")):
        raise InputError("known", Shown(type(known).__name__), "a Ragged, as CSRFilter.tails and .heads give it")
    checks.tensor(**{"known.offsets": known.offsets, "known.ids": known.ids})
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        score.look_inside("known.ids", known.ids, num_entities)
    return known.offsets, known.ids


def score_all(
    query: Tensor,
    entity: Tensor,
    reduction: str = "dot",
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Scores of every entity, [B, E]. Differentiable in query, entity and scale; distances have gradient 0 at distance
    0.
    """
    query, entity, scale = _alike(query, entity, scale)
    return score.score_all(query, entity, scale, reduction, *_options(backend, precision))


def rank_all(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    reduction: str = "dot",
    known: Ragged | None = None,
    *,
    scale: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Ranks:
    """Filtered ranks of the targets among all entities. Of l2 squared distances are compared, some of which differ
    where their roots, the scores, are one number.

    Args:
        target: the true entity of each query, int64 [B].
        known: the known answers of each query, which are no rivals; the target may be among them and is left out once.
        group: the processes that hold the parts of the table, of which `entity` is one.

    A target whose score is NaN gets the worst rank; NaN scores are counted in one warning. Compiled code gives no
    warning, and passes over known answers that are no entities, which are refused elsewhere.
    """
    query, entity, scale = _alike(query, entity, scale)
    checks.tensor(target=target)
    options = (scale, reduction, *_options(backend, precision))
    if group is None and query.device.type == "cpu":
        # The operators look at everything that is to be looked at.
        at_target = score.target_scores(query, entity, target, *options)
        counts = score.rank_counts(
            query, entity, target, at_target, *_known_answers(known, query, len(entity)), *options
        )
        _report(at_target, counts, query)
        return Ranks(counts[0], counts[1])
    _check_tables(query, entity, scale, target, group)
    shard = _Shard.of(query, entity, group)
    counts, trouble = count_parts(
        query, lambda: ((shard.first, entity),), shard.total, target, reduction, known, scale=scale, group=group, backend=backend,
        precision=precision,
    )  # fmt: skip
    # The only look at results, after all the work has been queued: on a GPU it waits for the ranks, which the caller is
    # about to read.
    refuse_trouble(trouble, target, shard.total)
    return Ranks(counts[0], counts[1])


def count_parts(
    query: Tensor,
    parts: Callable[[], Iterable[tuple[int, Tensor]]],
    num_entities: int,
    target: Tensor,
    reduction: str = "dot",
    known: Ragged | None = None,
    *,
    goals: Tensor | None = None,
    scale: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`rank_all` counts, over a table that is never in memory as a whole, without a look at anything on a
    GPU.

    Args:
        parts: called twice, for the targets' scores and for their rivals'; gives (id of the first row, rows [n, D]) of
            parts that do not overlap. With a group, those of this process.
        num_entities: E, of the whole table.
        goals: where queries have several targets, each of which is ranked: int64 [B + 1], where those of each begin.
            `known`, where given, holds the targets then.

    Returns:
        rivals above, level and NaN, int64 [3, B], and what :func:`refuse_trouble` takes.
    """
    offsets, ids = _known_answers(known, query, num_entities)
    wrong = _out_of_range(target, num_entities)
    if query.device.type == "cpu" and wrong.any():
        raise _target_error(target, num_entities)
    shard = _Shard(0, num_entities, group)
    options = (reduction, *_options(backend, precision))
    row = None
    if goals is not None:
        row = torch.arange(len(query), device=goals.device).repeat_interleave(goals.diff(), output_size=len(target))
    at_target, counts = None, target.new_zeros(3, len(target))
    for first, part in parts():
        q, entity, s = _alike(query, part, scale)
        if row is not None:
            q, s = q[row], None if s is None else s[row]
        local = target - first
        if at_target is None:
            at_target = torch.zeros(len(q), dtype=accumulator(q.dtype), device=q.device)
        if len(entity):
            here = score.target_scores(q, entity, local.clamp(0, len(entity) - 1), s, *options)
            at_target = torch.where(_out_of_range(local, len(entity)), at_target, here)
    assert at_target is not None
    # One process has the target, the others add zeros: the sum has the bits of the score.
    shard.sum(at_target)
    for first, part in parts():
        q, entity, s = _alike(query, part, scale)
        if not len(entity):
            continue
        if goals is None:
            counts += score.rank_counts(q, entity, target - first, at_target, offsets, ids - first, s, *options)
        else:
            counts += score.rank_groups(q, entity, goals, at_target, offsets, ids - first, s, *options)
    shard.sum(counts)
    if goals is not None and known is None:
        # Each target has met itself: as an equal, or, NaN, as one of those that are above it.
        lost_itself = at_target.isnan().long()
        counts -= torch.stack([lost_itself, 1 - lost_itself, lost_itself])
    return counts, torch.stack([at_target.isnan().sum(), counts[2].sum(), wrong.sum()])


def refuse_trouble(trouble: Tensor, target: Tensor, num_entities: int) -> None:
    """Say how many scores were NaN, and refuse targets that are no entities.

    Args:
        trouble: int64 [3], of :func:`count_parts` or a sum of several: targets and rivals of NaN, targets out of range.
    """
    if trouble.is_meta or torch.compiler.is_compiling():
        return
    lost, rivals, invalid = trouble.tolist()
    if invalid:
        raise _target_error(target, num_entities)
    _warn(lost, rivals, len(target))


def _report(at_target: Tensor, counts: Tensor, query: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    rivals = int(counts[2].sum())
    if rivals or at_target.isnan().any():
        _warn(int(at_target.isnan().sum()), rivals, len(query))


def _warn(lost: int, rivals: int, queries: int) -> None:
    if lost or rivals:
        logger.warning(
            "NaN scores: %d targets of %d, which get the worst rank, and %d rivals, which rank last",
            lost,
            queries,
            rivals,
        )


@torch.no_grad()
def topk_all(
    query: Tensor,
    entity: Tensor,
    k: int,
    reduction: str = "dot",
    known: Ragged | None = None,
    *,
    scale: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best entities of each query, by score (of l2 by its square), then by id: (scores [B, k], ids int64 [B, k]).

    Args:
        k: 1 to min(E, 1024).
        known: entities to leave out.
        group: the processes that hold the parts of the table, of which `entity` is one.

    No gradient leads through them. NaN scores are left out. Where fewer than k entities remain, the rest has score −inf
    and id −1.
    """
    query, entity, scale = _alike(query, entity, scale)
    if group is None and query.ndim == entity.ndim == 2:
        # The operator looks at everything else.
        k = checks.count("k", k, 1, max(1, min(entity.shape[0], MAX_K)))
        known_answers = _known_answers(known, query, entity.shape[0])
        raw, best = score.topk_all(query, entity, k, *known_answers, scale, reduction, *_options(backend, precision))
        return finish(raw, reduction), best
    _check_tables(query, entity, scale, group=group)
    shard = _Shard.of(query, entity, group)
    k = checks.count("k", k, 1, min(shard.total, MAX_K))
    offsets, ids = _known_answers(known, query, shard.total)
    raw, best = query.new_empty(len(query), 0, dtype=accumulator(query.dtype)), ids.new_empty(len(query), 0)
    if own := min(k, len(entity)):
        raw, best = score.topk_all(
            query, entity, own, offsets, ids - shard.first, scale, reduction, *_options(backend, precision)
        )
    raw = F.pad(raw, (0, k - own), value=-torch.inf)
    best = F.pad(torch.where(best < 0, best, best + shard.first), (0, k - own), value=-1)
    # Ids rise with the rank, so that a stable sort leaves equal scores in the order of their ids.
    raw, order = torch.cat(shard.gather(raw), 1).sort(dim=1, descending=True, stable=True)
    raw, best = raw[:, :k], torch.cat(shard.gather(best), 1).gather(1, order[:, :k])
    return finish(raw, reduction), best


def hard_negatives(
    query: Tensor,
    entity: Tensor,
    num_negatives: int,
    pool: int,
    reduction: str = "dot",
    known: Ragged | None = None,
    *,
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Corruptions that the model itself takes for answers: N entities a query, int64 [B, N], drawn uniformly, with
    replacement, from the `pool` best by score. :func:`dhns_fast.loss.corruption_loss` takes them by index.

    Args:
        num_negatives: N.
        pool: 1 to min(E, 1024); a small one is hard, and richer in true triples that the graph lacks.
        known: entities to leave out: the known answers of each query in train (:class:`dhns_fast.data.CSRFilter`), the
            true one among them.
        generator: on the device of query; None for the device's own.

    Of a query of which no entity remains, all entities are drawn from.
    """
    checks.tensor(query=query, entity=entity)
    checks.shapes(query=(query, "B D"), entity=(entity, "E D"))
    num_negatives = checks.count("num_negatives", num_negatives)
    pool = checks.count("pool", pool, 1, max(1, min(len(entity), MAX_K)))
    checks.instance(torch.Generator, "a torch.Generator, or None", generator=generator)
    options = {"scale": scale, "backend": backend, "precision": precision}
    _, best = topk_all(query.detach(), entity.detach(), pool, reduction, known, **options)  # type: ignore[arg-type]
    left = (best >= 0).sum(1, keepdim=True)
    # float64: 53 random bits, and the product stays below the number after rounding.
    draw = torch.rand(len(query), num_negatives, generator=generator, device=query.device, dtype=torch.float64)
    place = (draw * torch.where(left > 0, left, len(entity))).long()
    return torch.where(left > 0, best.gather(1, place.clamp(max=pool - 1)), place)


def logsumexp_all(
    query: Tensor,
    entity: Tensor,
    reduction: str = "dot",
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """log Σ_e exp(score), [B]: the normaliser of a softmax over all entities.

    Differentiable in query, entity and scale; the backward pass computes the scores again instead of keeping them.
    """
    query, entity, scale = _alike(query, entity, scale)
    return score.logsumexp_all(query, entity, scale, reduction, *_options(backend, precision))


def one_vs_all_loss(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    reduction: str = "dot",
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Mean cross-entropy of the true entity of each query among all entities, a scalar (1-vs-all training).

    In plain torch: `cross_entropy(score_all(query, entity, reduction), target)`. Of the logits at most 32 MB are kept;
    more are made again in the backward pass. Differentiable in query, entity and scale; gradients are deterministic on
    every device. A target out of range raises InputError on the CPU and makes the loss NaN on a GPU, which looking
    would stall.
    """
    query, entity, scale = _alike(query, entity, scale)
    checks.tensor(target=target)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, entity, scale))
    shaped = query.ndim == entity.ndim == 2
    keep = learns and shaped and query.shape[0] * entity.shape[0] * accumulator(query.dtype).itemsize <= KEPT_BYTES
    wrong, inside = None, target
    if query.is_cuda and target.dtype == torch.int64 and shaped:
        wrong, inside = _out_of_range(target, entity.shape[0]), target.clamp(0, entity.shape[0] - 1)
    losses, *_ = score.one_vs_all(query, entity, inside, scale, reduction, keep, *_options(backend, precision))
    if not losses.shape[0]:
        raise InputError(
            "query", Shown(f"shape {list(query.shape)}"), "at least one query: a loss of nothing has no value"
        )
    return (losses if wrong is None else losses.masked_fill(wrong, torch.nan)).mean()
