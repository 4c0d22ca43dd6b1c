"""Scores of positives against their corruptions, loss and gradients, by index against the gathered form in eager torch
and torch.compile; known answers looked up, against torch's searches.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.loss import corruption_loss
from dhns_fast.ops.sampling import find_ranges
from dhns_fast.reference import loss as reference

# B, N, D.
SIZES = {"small": (200, 16, 128), "reference": (2000, 64, 1024), "large": (8000, 256, 1024)}
ENTITIES = 15_000
# Triples that are known.
KNOWN = {"small": 10_000, "reference": 5_000_000, "large": 50_000_000}


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


def test_known_answers(race: harness.Race) -> None:
    n, E = KNOWN[race.size], 1_000_000
    packed = torch.randint(100 * E * E, (n,), device=race.device).sort()[0]

    def inputs(seed: int) -> tuple[Tensor]:
        source = torch.Generator(race.device).manual_seed(seed)
        return (packed[torch.randint(n, (1024,), generator=source, device=race.device)] // E * E,)

    def searches(lows: Tensor) -> tuple[Tensor, ...]:
        start = torch.searchsorted(packed, lows)
        return start, torch.searchsorted(packed, lows + E) - start

    race(
        f"find_ranges n{n}",
        {"ours": lambda lows: find_ranges(packed, lows, E), "two searches": searches},
        truth="two searches",
        make=inputs,
    )
