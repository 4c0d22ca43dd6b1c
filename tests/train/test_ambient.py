"""What a program sets for all of torch decides no run: its default dtype and device, modes without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.training import config, graph

from dhns_fast import NegativeSampler, evaluate, synthetic
from dhns_fast.data import Ragged, convert
from dhns_fast.data.write import write
from dhns_fast.export import export
from dhns_fast.items import evaluate_items, evaluate_relation
from dhns_fast.optim import LazyAdam, RowEmbedding
from dhns_fast.predict import complete, predict
from dhns_fast.sampler import DiffHEG
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


@pytest.mark.parametrize("around", ["float64", "meta"])
def test_what_is_asked_of_a_run_is_the_same_within(around: str, tmp_path: Path) -> None:
    """Answers, metrics of items, files and a step of one's own loop."""
    trainer = trained("dhns")
    model, kg = trainer.model, trainer.kg
    rows = Ragged(torch.tensor([0, 1, 2]), torch.tensor([1, 0]))
    h, r, t = kg.train[:3].unbind(1)
    generator, times = trainer.generator, torch.ones(3, dtype=torch.int64)
    assert generator is not None

    def asked(name: str) -> list[Any]:
        table = RowEmbedding(4, 2)
        table.uniform_(1.0, torch.Generator().manual_seed(0))
        optimizer = LazyAdam([table], lr=0.1)
        table(torch.tensor([1], device="cpu")).sum().backward()
        optimizer.step()
        convert(tmp_path / "kg", tmp_path / name)
        return [
            predict(model, kg, "e1", "r1", "?"),
            complete(model, kg, kg.test[:2].clone().index_fill_(1, torch.tensor([1], device="cpu"), -1)),
            evaluate_items(model.table()[:2].detach(), model.table().detach(), rows, metrics=("mrr", "recall@2")),
            evaluate_relation(model, kg, int(kg.test[0, 1])),
            [path.read_bytes() for path in export(model, kg, "npy", tmp_path / f"{name}-out")],
            [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.npy"))],
            table.weight.tolist(),
            generator.betas.tolist(),
            DiffHEG(4, 7, 4, 6.0, 2.0, sampling_steps=3)._steps,
            dict(evaluate(model, kg, filtered=False)),
            generator.denoise(model.embed(t), times, model.embed(h), model.relation(r), "tail").tolist(),
        ]

    write(kg, tmp_path / "kg")
    expected = asked("plain")
    with AROUND[around]():
        found = asked("around")
    assert found == expected
