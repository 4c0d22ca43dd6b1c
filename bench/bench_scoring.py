"""Ranks against all entities against torch.compile of the plain formula and a library product with counting; and the
softmax over entities.

The rivals of ranks are given less to do: torch.compile makes the scores alone, without ranks and filter. The plain
formula is written both ways round, dimensions last and entities last, as Inductor's vectors lie across one or the
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.data import Ragged
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import one_vs_all_loss, rank_all, topk_all

# B, E, D; the second is one side of MKG-Y's test set. On a CPU the large one is 1 M entities, see test_growth.
SIZES = {"small": (96, 15_000, 256), "reference": (2_663, 15_000, 256), "large": (1_000, 5_000_000, 256)}
GROWTH = (1_000, (100_000, 1_000_000), 256)
CHECKED = 16  # queries that are compared with the float64 oracle


def tables(race: harness.Race) -> tuple[Tensor, Tensor, Tensor]:
    if (race.device.type, race.size) == ("cpu", "large"):
        pytest.skip("5 M entities take minutes a call on a CPU: there test_growth is the large case")
    B, E, D = SIZES[race.size]
    query, entity = (torch.randn(n, D, device=race.device) for n in (B, E))
    return query, entity, torch.randint(E, (B,), device=race.device)


def true_scores(query: Tensor, entity: Tensor, reduction: str) -> Tensor:
    """float64 [CHECKED, E] on the CPU."""
    parts = []
    for part in entity.split(1 << 16):
        wide = part.double().cpu()
        parts.append(torch.cat([reference.score_all(q[None].double().cpu(), wide, reduction) for q in query[:CHECKED]]))
    return torch.cat(parts, 1)


def rank_error(truth: Tensor, target: Tensor, ids: Tensor) -> Callable[[Any, Any], float]:
    """Of scores: relative error. Of ranks: 0 if they lie between the true ranks at the target's true score ± 1e-5 of
    its size.
    """

    def error(result: Any, _: Any) -> float:
        if isinstance(result, Tensor):
            return harness.relative_error(result[:CHECKED], truth)
        at_target, slack = truth.gather(1, target[:CHECKED, None].cpu()), 1e-5 * truth.abs().max()
        rivals = truth.scatter(1, target[:CHECKED, None].cpu(), -math.inf).index_fill(1, ids.cpu(), -math.inf)
        greater, equal = (x[:CHECKED].cpu() for x in result)
        low, high = (rivals > at_target + slack).sum(1), (rivals >= at_target - slack).sum(1)
        return 0.0 if bool(((greater >= low) & (greater + equal <= high)).all()) else math.inf

    return error


def entities_last(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    def scores(query: Tensor, columns: Tensor) -> Tensor:
        difference = query[:, :, None] - columns[None]
        if reduction == "l2":
            return -difference.square().sum(1).sqrt()
        if reduction == "l1":
            return -difference.abs().sum(1)
        real, imaginary = difference.chunk(2, 1)
        return -(real * real + imaginary * imaginary).sqrt().sum(1)

    return scores


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_ranks(race: harness.Race, reduction: str) -> None:
    B, E, D = SIZES[race.size]
    query, entity, target = tables(race)
    # Eight known answers a query.
    ids = torch.arange(8, device=race.device) * (E // 8)
    known = Ragged(torch.arange(B + 1, device=race.device) * 8, ids.repeat(B))

    def ours() -> tuple[Tensor, Tensor]:
        ranks = rank_all(query, entity, target, reduction, known)
        return ranks.greater, ranks.equal

    def product() -> tuple[Tensor, Tensor]:
        scores = query @ entity.T
        own = scores.gather(1, target[:, None])
        scores[:, ids] = -math.inf
        return (scores > own).sum(1), (scores == own).sum(1) - (scores.gather(1, target[:, None]) == own).sum(1)

    providers: dict[str, Callable[..., Any]] = {"ours": ours}
    if reduction == "dot":
        providers["torch.mm and counting"] = product
    elif race.size != "large":
        columns = entity.T.contiguous()
        plain = torch.compile(lambda: reference.score_all(query, entity, reduction), dynamic=False)
        last = torch.compile(lambda: entities_last(reduction)(query, columns), dynamic=False)
        # Inductor has no complex numbers: their plain formula is the other one.
        providers |= {} if reduction == "complex_l1" else {"torch.compile, scores": plain}
        providers["torch.compile, entities last, scores"] = last
    demands = []
    if (race.device.type, race.size) == ("cpu", "reference"):
        # The faster way round of the plain formula, whichever it is.
        demands = [harness.times_as_fast(rival, 1.5 if reduction == "dot" else 0.9) for rival in list(providers)[1:]]
        demands.append(harness.peak_mb(64))
    elif (race.device.type, race.size) == ("cuda", "large"):
        demands = [harness.percent_of_ceiling(60)]
    rows = race(
        f"rank_all {reduction} B{B} E{E} D{D}", providers, truth=lambda: None, tolerance=1e-4,
        error=rank_error(true_scores(query, entity, reduction), target, ids), work=work(reduction, B, E, D), demands=demands,
        seconds=None if race.size == "small" else 8.0,
    )  # fmt: skip
    for row in rows.values():
        if row.p50 is not None:
            row.extra["G elements/s"] = B * E * D / row.p50 / 1e6


def work(reduction: str, B: int, E: int, D: int) -> dict[str, float]:
    amounts = {"flop": float(harness.FLOPS[reduction] * B * E * D)}
    # The tables are read once, at least.
    return amounts | {"byte": 4.0 * (B + E) * D} | ({"sqrt": B * E * D / 2} if reduction == "complex_l1" else {})


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_growth(race: harness.Race, reduction: str) -> None:
    """A million entities: time linear in their number, memory independent of it."""
    if race.size != "large":
        pytest.skip("a million entities take minutes: size large alone")
    B, (few, many), D = GROWTH
    query, entity = (torch.randn(n, D, device=race.device) for n in (B, many))
    target = torch.randint(few, (B,), device=race.device)
    ids = torch.arange(8, device=race.device) * (few // 8)
    known = Ragged(torch.arange(B + 1, device=race.device) * 8, ids.repeat(B))
    truth = true_scores(query, entity, reduction)
    errors = {E: rank_error(truth[:, :E], target, ids) for E in (few, many)}

    def ours(E: int) -> tuple[Tensor, Tensor, Tensor]:
        ranks = rank_all(query, entity[:E], target, reduction, known)
        return torch.tensor(E), ranks.greater, ranks.equal

    def times(short: float | None, long: float | None, share: float) -> float | None:
        return long / short * share if long and short else None

    fewer = f"ours, E{few}"
    growth = harness.Demand(
        "times the time linear in E", 1.5, lambda rows, own: times(rows[fewer].p50, own.p50, few / many), most=True
    )
    rows = race(
        f"rank_all {reduction} B{B} E{many} D{D}", {"ours": lambda: ours(many), fewer: lambda: ours(few)}, truth=lambda: None,
        error=lambda result, _: errors[int(result[0])](result[1:], None), tolerance=1e-4, work=work(reduction, B, many, D), min_rounds=2,
        demands=[growth, harness.peak_mb(64), harness.peak_mb(64, fewer)],
    )  # fmt: skip
    short = rows[fewer]
    if short.rate is not None and short.percent is not None:
        # Its work is a part of what the case states.
        short.rate, short.percent = short.rate * few / many, short.percent * few / many
    short.work = work(reduction, B, few, D)


@pytest.mark.parametrize("reduction", ["dot", "l1"])
def test_one_vs_all_loss(race: harness.Race, reduction: str) -> None:
    """Loss and gradients of queries and entities."""
    B, E, D = SIZES[race.size]
    query, entity, target = tables(race)

    def gradients(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, e = query.clone().requires_grad_(), entity.clone().requires_grad_()
        value = loss(q, e, target, reduction)
        return value.detach(), *torch.autograd.grad(value, (q, e))

    providers = {"ours": lambda: gradients(one_vs_all_loss)}
    if reduction == "dot" and race.size != "large":
        providers["logits and cross_entropy"] = lambda: gradients(
            lambda q, e, target, _: torch.nn.functional.cross_entropy(q @ e.T, target)
        )
    truth = "logits and cross_entropy" if len(providers) > 1 else "ours"
    race(
        f"one_vs_all_loss {reduction} B{B} E{E} D{D}",
        providers,
        truth=truth,
        work={"flop": 4 * harness.FLOPS[reduction] * B * E * D},
    )


def test_topk(race: harness.Race) -> None:
    B, E, D = SIZES[race.size]
    query, entity, _ = tables(race)
    providers: dict[str, Callable[..., Any]] = {"ours": lambda: topk_all(query, entity, 10)[0]}
    if race.size != "large":
        providers["torch.mm and topk"] = lambda: (query @ entity.T).topk(10).values
    truth = true_scores(query, entity, "dot").topk(10).values
    race(
        f"topk_all dot k10 B{B} E{E} D{D}", providers, truth=lambda: None, tolerance=1e-4, work={"flop": 2 * B * E * D},
        error=lambda result, _: harness.relative_error(result[:CHECKED], truth),
    )  # fmt: skip
