"""The hardness-adaptive loss with its gradients against the oracle in eager torch and under torch.compile.

Bytes are what any way of computing it must read: the generated embeddings of the levels that count, once (from scores:
the scores, and their gradients written). The percentage is of the bandwidth of a copy in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast import loss
from dhns_fast.reference import loss as reference

# B, D.
SIZES = {"small": (200, 128), "reference": (2000, 1024), "large": (8000, 1024)}
M = 3
LEVELS: dict[str, Any] = {"margin": [0.6, 1.8, 3.0, 4.2, 5.4], "weight": [0.0, 0.5, 1.0, 1.0, 0.5]}
L, ACTIVE = len(LEVELS["weight"]), sum(w > 0 for w in LEVELS["weight"])
# Interaction, fused; the first as the release uses product models, with the mean of the modalities' scores.
MODELS = [("distmult", False), ("distmult", True), ("transe", True), ("complex", True), ("rotate", True)]


def on_device(race: harness.Race) -> dict[str, Any]:
    """Margins and weights as training has them: a list would be sent to a GPU in every call, and waited for."""
    return {name: torch.tensor(x, device=race.device) for name, x in LEVELS.items()}


def providers(
    ours: Callable[..., Tensor], oracle: Callable[..., Tensor], learned: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    """Loss and gradients of `learned` by each."""

    def with_gradients(function: Callable[..., Tensor]) -> Callable[[], Any]:
        def call() -> tuple[Tensor, ...]:
            value = function()
            return value.detach(), *torch.autograd.grad(value, learned)

        return call

    compiled = torch.compile(oracle, dynamic=False)
    return {"ours": with_gradients(ours), "oracle": with_gradients(oracle), "torch.compile": with_gradients(compiled)}


@pytest.mark.parametrize(("interaction", "fused"), MODELS, ids=[f"{i}-{'fused' if f else 'mean'}" for i, f in MODELS])
def test_embeddings(race: harness.Race, interaction: str, fused: bool) -> None:
    if race.size == "small" and fused and interaction != "rotate":
        pytest.skip("torch.compile takes a minute for it: from size reference on")
    B, D = SIZES[race.size]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=race.device).mul_(0.3)

    head, tail = (draw(*((M,) if fused else ()), B, D).requires_grad_() for _ in range(2))
    relation = draw(B, D // 2 if interaction == "rotate" else D).requires_grad_()
    attention = draw(D).requires_grad_() if fused else None
    made = draw(2, L, M, B, D)
    learned = [x for x in (head, relation, tail, attention) if x is not None]
    # TransE with the Euclidean norm: the sum of moduli has sign() for a gradient, which a rounding turns round.
    norm = {"normalize": True, "p": 2} if interaction == "transe" else {}
    options: dict[str, Any] = {"gamma": 6.0, "attention": attention, **norm}
    inputs: tuple[Any, ...] = (interaction, head, relation, tail, *made)
    ours = functools.partial(loss.hal_from_embeddings, *inputs, **(options | on_device(race)))
    oracle = functools.partial(reference.hal_from_embeddings, *inputs, **(options | LEVELS))
    wanted = (
        [harness.percent_of_ceiling(25 if fused else 50)]
        if race.device.type == "cpu"
        else [harness.percent_of_ceiling(70)]
    )
    demands = [harness.times_as_fast("oracle", 6), *wanted] if race.size == "reference" else []
    race(
        f"hal_embeddings {interaction}{' fused' * fused} B{B} D{D} M{M} L{L}", providers(ours, oracle, learned), demands=demands,
        work={"byte": 4.0 * 2 * ACTIVE * M * B * D},
    )  # fmt: skip


def test_scores(race: harness.Race) -> None:
    B, K = SIZES[race.size][0] * 100, 3
    positive, negative = (torch.randn(*shape, device=race.device).requires_grad_() for shape in ((B,), (L, K, B)))
    ours = functools.partial(loss.hardness_adaptive_loss, positive, negative, **on_device(race))
    oracle = functools.partial(reference.hardness_adaptive_loss, positive, negative, **LEVELS)
    work = {"byte": 4.0 * (2 * B + (ACTIVE + L) * K * B)}
    race(f"hal_scores B{B} L{L} K{K}", providers(ours, oracle, [positive, negative]), work=work)
