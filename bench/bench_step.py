"""One whole training step, every method, against the same step on plain torch operators (backend eager) and against the
oracle where DHNS is.

Steps draw the same batches, corruptions, timesteps and noise from the same weights: the losses of the first two steps
are what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import bench_epoch
import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.train import TrainConfig, Trainer

SIZES = {"small": (64, 500), "reference": (256, 2000), "large": (1024, 2000)}  # D and B


@pytest.mark.parametrize("method", ["uniform", "self-adversarial", "dhns"])
@pytest.mark.parametrize("model", ["transe", "distmult", "complex", "rotate"])
def test_step(race: harness.Race, model: str, method: str) -> None:
    if race.size == "small" and (model in ("transe", "complex") or method == "self-adversarial"):
        pytest.skip("5 minutes hold two models and two methods: all are from size reference on")
    kg = harness.mkg_y()
    D, B = SIZES[race.size]
    config = TrainConfig(model=model, method=method, dim=D, batch_size=B, num_negatives=64, device=race.device.type)
    with mock.patch.dict("os.environ", DHNS_FAST_BACKEND="eager"):
        # What a user of torch writes is launched kernel by kernel.
        plain = Trainer(dataclasses.replace(config, cuda_graph=False), kg)
    providers: dict[str, Callable[[], Tensor]] = {
        "ours": _steps(Trainer(config, kg)),
        "eager torch": _plain(_steps(plain)),
    }
    if method == "dhns":
        providers["oracle"] = _two(bench_epoch.Oracle(Trainer(config, kg)).step)
    race(
        f"step {kg.name} {model} {method} B{B} D{D} N64",
        providers,
        truth="eager torch",
        tolerance=1e-4,
        error=bench_epoch.term_error,
        seconds=None if race.size == "small" else 20.0,
    )


def _two(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Makes steps return the losses of the first two."""
    seen: list[Tensor] = []

    def call() -> Tensor:
        terms = step()
        if len(seen) < 2:
            seen.append(terms)
        return torch.stack(seen)

    return call


def _steps(trainer: Trainer) -> Callable[[], Tensor]:
    def step() -> Tensor:
        terms = trainer.step()
        return torch.stack([terms[name] for name in sorted(terms)])

    return _two(step)


def _plain(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def under_eager() -> Tensor:
        with mock.patch.dict("os.environ", DHNS_FAST_BACKEND="eager"):
            return call()

    return under_eager
