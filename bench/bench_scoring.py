"""Ranks against all entities against torch.compile of the plain formula and a library product with counting; and the softmax over entities.

The rivals of ranks are given less to do: torch.compile makes the scores alone, without ranks and filter. The plain formula is written both
ways round, dimensions last and entities last, as Inductor's vectors lie across one or the other.
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

# B, E, D; the second is one side of MKG-Y's test set.
SIZES = {"small": (96, 15_000, 256), "reference": (2_663, 15_000, 256), "large": (1_000, 5_000_000, 256)}
CHECKED = 16  # queries that are compared with the float64 oracle
FLOPS = {"dot": 2, "l2": 3, "l1": 3, "complex_l1": 3.5}  # an element; a square root counted as one


def tables(race: harness.Race) -> tuple[Tensor, Tensor, Tensor]:
    B, E, D = SIZES[race.size]
    query, entity = (torch.randn(n, D, device=race.device) for n in (B, E))
    return query, entity, torch.randint(E, (B,), device=race.device)


def true_scores(query: Tensor, entity: Tensor, reduction: str) -> Tensor:
    """float64 [CHECKED, E] on the CPU."""
    return torch.cat([reference.score_all(q[None].double().cpu(), entity.double().cpu(), reduction) for q in query[:CHECKED]])


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

    truth = true_scores(query, entity, reduction)

    def error(result: Any, _: Any) -> float:
        """Scores: relative error. Ranks: 0 if they lie between the true ranks at the target's true score ± 1e-5 of its size."""
        if isinstance(result, Tensor):
            return harness.relative_error(result[:CHECKED], truth)
        at_target, slack = truth.gather(1, target[:CHECKED, None].cpu()), 1e-5 * truth.abs().max()
        rivals = truth.scatter(1, target[:CHECKED, None].cpu(), -math.inf).index_fill(1, ids.cpu(), -math.inf)
        greater, equal = (x[:CHECKED].cpu() for x in result)
        low, high = (rivals > at_target + slack).sum(1), (rivals >= at_target - slack).sum(1)
        return 0.0 if bool(((greater >= low) & (greater + equal <= high)).all()) else math.inf

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
    rows = race(
        f"rank_all {reduction} B{B} E{E} D{D}", providers, truth=lambda: None, error=error, tolerance=1e-4,
        work={"flop": FLOPS[reduction] * B * E * D}, seconds=8.0,
    )  # fmt: skip
    for row in rows.values():
        if row.p50 is not None:
            row.extra["G elements/s"] = B * E * D / row.p50 / 1e6


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
    race(f"one_vs_all_loss {reduction} B{B} E{E} D{D}", providers, truth=truth, work={"flop": 4 * FLOPS[reduction] * B * E * D})


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
