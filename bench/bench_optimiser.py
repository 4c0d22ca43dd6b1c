"""Adam on a model's tables: the trainer's choice against torch's other implementations and the formula as it reads. And
row-wise optimisers of large tables: loss and update at once, or one after the other.

The gradient of an embedding table is dense here: N3 touches every row. Work is what Adam moves at least: parameter,
both moments and gradient read, the first three written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.catalogue import ROW_METHODS
from dhns_fast.data import synthetic
from dhns_fast.loss import corruption_loss
from dhns_fast.optim import ROW_OPTIMIZERS, RowEmbedding, rows
from dhns_fast.train import TrainConfig, Trainer

# E, R and D of a ComplEx model; MKG-Y's at reference.
SIZES = {"small": (15_000, 28, 64), "reference": (15_000, 28, 1024), "large": (2_000_000, 1_000, 256)}
RATE, BETAS, EPSILON = 0.002, (0.9, 0.999), 1e-8


def plain(parameters: list[Tensor]) -> Callable[[], None]:
    """Kingma & Ba, ICLR 2015, algorithm 1."""
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        with torch.no_grad():
            for p, (m, v) in zip(parameters, moments, strict=True):
                assert p.grad is not None
                m.copy_(BETAS[0] * m + (1 - BETAS[0]) * p.grad)
                v.copy_(BETAS[1] * v + (1 - BETAS[1]) * p.grad * p.grad)
                p -= RATE * (m / (1 - BETAS[0] ** number)) / ((v / (1 - BETAS[1] ** number)).sqrt() + EPSILON)

    return step


def test_adam(race: harness.Race) -> None:
    E, R, D = SIZES[race.size]
    start = [torch.randn(n, D, device=race.device) for n in (E, R)]
    gradients = [torch.randn_like(p) for p in start]

    def copies() -> list[Tensor]:
        parameters = [p.clone().requires_grad_() for p in start]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        return parameters

    def provider(make: Callable[[list[Tensor]], Callable[[], object]]) -> Callable[[], list[Tensor]]:
        parameters = copies()
        step = make(parameters)
        calls = 0

        def call() -> list[Tensor]:
            nonlocal calls
            step()
            calls += 1
            # The second call is the one that is compared.
            return [p.detach().clone() for p in parameters] if calls == 2 else []

        return call

    graph = synthetic(200, 4, 2_000, {})
    ours = Trainer(TrainConfig(method="uniform", device=race.device.type), graph).optimizer
    kept = {name: ours.defaults[name] for name in ("foreach", "fused", "capturable")}

    def adam(**options: Any) -> Callable[[], list[Tensor]]:
        return provider(lambda p: torch.optim.Adam(p, lr=RATE, betas=BETAS, eps=EPSILON, **options).step)

    amount = sum(p.numel() for p in start)
    race(
        f"Adam step E{E} R{R} D{D}",
        {
            "ours": adam(**kept),
            "torch foreach": adam(foreach=True),
            "torch loop": adam(foreach=False, fused=False),
            "formula": provider(plain),
        },
        truth="formula",
        tolerance=1e-5,
        work={"byte": 7 * 4.0 * amount, "flop": 14.0 * amount},
    )


# Entities; 1024 queries of 64 corruptions, D 128.
ROWS = {"small": (20_000,), "reference": (100_000, 1_000_000), "large": (5_000_000,)}


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("number", range(2))
def test_at_once(race: harness.Race, number: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RowOptimizer.at_once` where it pays and where it does not: the rule for that is set aside here."""
    if race.device.type != "cpu" or number >= len(ROWS[race.size]):
        pytest.skip("a case of the CPU" if race.device.type != "cpu" else "no other point of this size")
    monkeypatch.setattr(rows, "SPARSE", {1: 0.0, 2: 0.0})
    E, B, N, D = ROWS[race.size][number], 1024, 64, 128
    g = torch.Generator().manual_seed(0)
    query = 0.1 * torch.randn(B, D, generator=g)
    batches = [torch.randint(E, (B, 1 + N), generator=g) for _ in range(20)]
    nothing = batches[0][:0, 0]

    def provider(at_once: bool) -> Callable[[], Tensor]:
        table = RowEmbedding(E, D).uniform_(0.2, torch.Generator().manual_seed(1))
        optimizer = ROW_OPTIMIZERS[method]([table], lr=0.05)
        number = 0

        def call() -> Tensor:
            nonlocal number
            ids = batches[number % len(batches)]
            number += 1
            with optimizer.at_once(table, nothing) if at_once else contextlib.nullcontext():
                loss = corruption_loss(query.clone().requires_grad_(), table, ids[:, 0], ids[:, 1:])
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call

    race(
        f"loss and {method} E{E} B{B} N{N} D{D}",
        {"ours at once": provider(True), "ours apart": provider(False)},
        truth="ours apart",
        tolerance=1e-6,
        seconds=4.0 if race.size == "small" else 10.0,
        work={"byte": 2.0 * 4 * min(E, B * (1 + N)) * D},
    )
