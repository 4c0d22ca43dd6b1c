"""Scores of positives against their corruptions, loss and gradients, by index against the gathered form in eager torch
and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.loss import corruption_loss
from dhns_fast.reference import loss as reference

# B, N, D.
SIZES = {"small": (200, 16, 128), "reference": (2000, 64, 1024), "large": (8000, 256, 1024)}
ENTITIES = 15_000


@pytest.mark.parametrize(("model", "reduction", "offset"), [("distmult", "dot", 0.0), ("rotate", "complex_l1", 6.0)])
def test_loss(race: harness.Race, model: str, reduction: str, offset: float) -> None:
    B, N, D = SIZES[race.size]
    query, table = (torch.randn(n, D, device=race.device).mul_(D**-0.25).requires_grad_() for n in (B, ENTITIES))
    answer, corrupt = (torch.randint(ENTITIES, shape, device=race.device) for shape in ((B,), (B, N)))

    def gradients(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            value = function(query, table, answer, corrupt, reduction, offset)
            return value.detach(), *torch.autograd.grad(value, (query, table))

        return call

    providers = {"ours": gradients(corruption_loss), "gathered": gradients(reference.corruption_loss)}
    if race.size != "large":
        providers["torch.compile, gathered"] = gradients(torch.compile(reference.corruption_loss, dynamic=False))
    wanted = [harness.times_as_fast("gathered", 5), harness.memory_share("gathered", 0.1)]
    race(
        f"corruption_loss {model} B{B} N{N} D{D} E{ENTITIES}", providers, truth="gathered",
        demands=wanted if race.size == "reference" and race.device.type == "cpu" else [],
        # Every row of a pair is read for the score and for either gradient.
        work={"byte": 4.0 * 3 * B * (N + 1) * D},
    )  # fmt: skip
