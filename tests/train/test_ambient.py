"""What a program sets for all of torch decides no run: its default dtype and device, modes without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fixtures.training import config, graph

from dhns_fast import NegativeSampler, evaluate, synthetic
from dhns_fast.train import Trainer


@contextlib.contextmanager
def wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "float64": wide,
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def trained(method: str) -> Trainer:
    trainer = Trainer(config(method=method, epochs=1), graph())
    trainer.fit(lambda progress: None)
    return trainer


@pytest.fixture(scope="module")
def expected() -> dict[str, Trainer]:
    return {method: trained(method) for method in ("uniform", "dhns")}


@pytest.mark.parametrize("method", ["uniform", "dhns"])
@pytest.mark.parametrize("around", AROUND)
def test_a_run_is_the_same_within(around: str, method: str, expected: dict[str, Trainer]) -> None:
    with AROUND[around]():
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        found = trained(method)
        assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
    want = expected[method].built.state()
    for name, x in found.built.state().items():
        assert x.dtype == torch.float32
        assert not x.is_inference()
        assert torch.equal(x, want[name]), name
    # What came of it learns on.
    found.step()


@pytest.mark.parametrize("around", AROUND)
def test_graphs_and_ranks_are_the_same_within(around: str, expected: dict[str, Trainer]) -> None:
    model, kg = expected["uniform"].model, graph()
    with AROUND[around]():
        assert synthetic(60, 4, 400, {"text": 6}, seed=5).fingerprint() == FIRST
        ranks = [evaluate(model, kg, candidates=candidates)["mrr"] for candidates in (None, "types")]
        assert model.score_t([[0, 0]]).device.type == "cpu"
        assert NegativeSampler(kg.known(), 60, 4, "bernoulli").corrupt(kg.train[:3], "tail").max() < 60
    assert ranks == [evaluate(model, kg, candidates=candidates)["mrr"] for candidates in (None, "types")]


FIRST = synthetic(60, 4, 400, {"text": 6}, seed=5).fingerprint()
