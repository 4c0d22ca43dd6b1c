"""Joint embeddings of the entities that a step looks up, from their features, with every gradient: against the same in
eager torch and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import harness
import pytest
import torch
from torch import Tensor, nn

from dhns_fast.fusion import Fusion
from dhns_fast.reference import loss as reference
from dhns_fast.reference.models import project

# E, entities looked up, D, and the columns of each modality.
SIZES = {
    "small": (10_000, 8_000, 64, {"text": 64, "image": 64}),
    "reference": (100_000, 48_000, 128, {"text": 64, "image": 64}),
    "large": (100_000, 48_000, 512, {"text": 384, "image": 383}),
}


def linears(fusion: Fusion) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features, weight and bias of each modality."""
    projections = cast(Iterable[nn.Linear], fusion.projections)
    return [(f, p.weight, p.bias) for f, p in zip(fusion.features, projections, strict=True)]


def plain(fusion: Fusion, structure: Tensor, ids: Tensor) -> Tensor:
    """What one writes in torch."""
    e = torch.stack([structure, *(nn.functional.linear(f[ids], w, b) for f, w, b in linears(fusion))])
    assert fusion.attention is not None
    share = (e.tanh() @ fusion.attention).softmax(0)
    return (share.unsqueeze(-1) * e).sum(0)


def oracle(fusion: Fusion, structure: Tensor, ids: Tensor) -> Tensor:
    assert fusion.attention is not None
    parts = zip(structure.split(1000), ids.split(1000), strict=True)
    stacked = [torch.stack([x, *(project(f, part, w, b) for f, w, b in linears(fusion))]) for x, part in parts]
    return reference.fuse(torch.cat(stacked, 1), fusion.attention)


@pytest.mark.parametrize("modalities", [1, 2])
def test_joint(race: harness.Race, modalities: int) -> None:
    E, n, D, widths = SIZES[race.size]
    features = {name: torch.randn(E, K) for name, K in list(widths.items())[:modalities]}
    fusion = Fusion(features, D).to(race.device)
    structure = torch.randn(n, D, device=race.device).requires_grad_()
    ids = torch.randperm(E, device=race.device)[:n].sort().values
    cotangent = torch.randn(n, D, device=race.device)
    learned = [structure, *(p for p in fusion.parameters() if p.requires_grad)]

    def gradients(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            joint = function(structure, ids)
            return joint.detach(), *torch.autograd.grad(joint, learned, cotangent)

        return call

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda structure, ids: function(fusion, structure, ids)

    providers = {
        "ours": gradients(fusion),
        "torch": gradients(of(plain)),
        "torch.compile": gradients(of(torch.compile(plain, dynamic=False))),
    }
    if race.size == "small":
        providers["oracle"] = gradients(of(oracle))
    columns = sum(x.shape[1] for x in features.values())
    race(
        f"joint M{1 + modalities} n{n} D{D} E{E}", providers, truth="oracle" if race.size == "small" else "torch", tolerance=1e-4,
        demands=[harness.times_as_fast("torch", 4)],
        # Either pass reads features and structure; one writes joint embeddings, the other the structure's gradient.
        work={"byte": 4.0 * 2 * n * (columns + 2 * D), "flop": 4.0 * n * D * columns},
    )  # fmt: skip
