"""How time and memory grow with B, D and E: the curves of the report's charts."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.reference import scoring as reference
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import rank_all

# The size that grows, and the others, by size of the run.
RANKS = {
    "B": {"small": ([4, 32], 4_000, 64), "reference": ([1, 16, 128, 1024], 15_000, 256), "large": ([64, 1024, 16_384], 1_000_000, 256)},
    "D": {"small": ([16, 64], 4_000, 32), "reference": ([16, 64, 256, 1024], 15_000, 128), "large": ([64, 256, 1024], 1_000_000, 128)},
    "E": {"small": ([1_000, 8_000], 16, 64), "reference": ([1_000, 10_000, 100_000, 1_000_000], 64, 256), "large": ([5_000_000], 1000, 256)},
}  # fmt: skip
CHAINS = {
    "B": {"small": ([16, 64], 64), "reference": ([16, 64, 256, 1024], 256), "large": ([64, 512, 4096], 1024)},
    "D": {"small": ([16, 64], 64), "reference": ([32, 64, 128, 512], 128), "large": ([64, 256, 1024], 2000)},
}
T = 50
# Floats that the rival may keep in one piece.
LARGEST = 1 << 28


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("against", RANKS)
def test_rank_all(race: harness.Race, against: str, reduction: str, number: int) -> None:
    values, *others = RANKS[against][race.size]
    if number >= len(values) or (race.size == "small" and reduction != "complex_l1"):
        pytest.skip(f"size {race.size} has {len(values)} points, small one reduction: the others' curves look alike")
    at = values[number]
    # B, E and D: others in the order of what is not named.
    first, second = others
    B, E, D = {"B": (at, first, second), "D": (second, first, at), "E": (first, at, second)}[against]
    query, entity = (torch.randn(n, D, device=race.device) for n in (B, E))
    target = torch.randint(E, (B,), device=race.device)

    def ours() -> Tensor:
        ranks = rank_all(query, entity, target, reduction)
        return ranks.greater + ranks.equal

    def matrix() -> Tensor:
        scores = query @ entity.T if reduction == "dot" else reference.score_all(query, entity, reduction)
        return (scores >= scores.gather(1, target[:, None])).sum(1) - 1

    providers = {"ours": ours}
    if B * E * (1 if reduction == "dot" else D) <= LARGEST:
        providers["score matrix"] = matrix
    race(
        f"rank_all {reduction} B{B} E{E} D{D}",
        providers,
        truth="score matrix" if len(providers) > 1 else "ours",
        # Near ties fall either way.
        error=lambda result, truth: ((result - truth).abs().double().mean() / E).item(),
        seconds=0.5 if race.size == "small" else 2.0,
        curve=(f"rank_all {reduction}", against, at),
        work={"byte": 4.0 * (B + E) * D, "flop": harness.FLOPS[reduction] * B * E * D},
    )


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("against", CHAINS)
def test_sample(race: harness.Race, against: str, number: int) -> None:
    values, other = CHAINS[against][race.size]
    if number >= len(values):
        pytest.skip(f"size {race.size} has {len(values)} points")
    at = values[number]
    B, D = (at, other) if against == "B" else (other, at)
    generators = {
        name: DiffHEG(D, T, D, 12.0, 2.0, backend=backend).to(race.device)
        for name, backend in (("ours", None), ("eager", "eager"))
    }
    generators["eager"].load_state_dict(generators["ours"].state_dict())
    h, r, t = torch.randn(3, B, D, device=race.device)

    def sample(name: str) -> tuple[list[Tensor], list[Tensor]]:
        return generators[name].sample(h, r, t, generator=torch.Generator().manual_seed(1))

    race(
        f"sample release B{B} D{D} T{T}",
        {"ours": lambda: sample("ours"), "ours eager": lambda: sample("eager")},
        truth="ours eager",
        tolerance=1e-4 if race.device.type == "cpu" else 2e-3,
        seconds=1.0 if race.size == "small" else 4.0,
        min_rounds=2,
        curve=("sample", against, at),
        work={"byte": 4.0 * (12 * D * D + 10 * B * D), "flop": 16.0 * D * D * B * (T + 5)},
    )
