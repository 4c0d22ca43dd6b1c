"""Row-wise optimisers in training: when they are chosen, what they refuse, resuming, tables in host memory, and
learning.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.training import config, graph

from dhns_fast import optim
from dhns_fast.catalogue import MODELS, ROW_METHODS
from dhns_fast.data import write
from dhns_fast.errors import InputError
from dhns_fast.export import export
from dhns_fast.optim import HostEmbedding, RowEmbedding, rows
from dhns_fast.train import TrainConfig, Trainer, load_run, prepare_graph
from dhns_fast.train.config import DENSE_ENTITIES

LIGHT = """
import sys
from fixtures.training import config, graph
from dhns_fast.train import Trainer
for options in ({"method": "kbgan"}, {"method": "dhns"}, {"method": "uniform", "optimiser": "adagrad"},
                {"method": "uniform", "optimiser": "lazy-adam"}, {"method": "uniform", "optimiser": "rowwise-adagrad"}):
    trainer = Trainer(config(**options), graph())
    trainer.fit()
    for _, optimizer in trainer._optimizers():
        optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_training_does_not_import_what_it_does_not_use() -> None:
    """torch._dynamo takes 144 MB and two seconds, in every process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", LIGHT], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_optimisers_have_names_of_their_own() -> None:
    """PyKEEN registers every subclass of Optimizer by its name, and refuses to be imported where two are equal."""

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    names = [kind.__name__.lower() for kind in below(torch.optim.Optimizer)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("ours", [optim.LightAdam, optim.LightAdagrad])
def test_dense_optimisers_are_those_of_torch(ours: type[torch.optim.Optimizer]) -> None:
    """The same bits and states, whichever class was used first in a process; a differentiable step is not meant."""
    theirs = getattr(torch.optim, ours.__name__.removeprefix("Light"))
    weights = [torch.arange(12.0).reshape(3, 4).requires_grad_() for _ in range(2)]
    optimizers = [kind([x], lr=0.1, fused=True) for kind, x in zip((theirs, ours), weights, strict=True)]
    for _ in range(3):
        for x, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            x.square().sum().backward()
            loss = optimizer.step(lambda: 5.0)
            assert loss == 5.0
    assert torch.equal(*weights)
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    optimizers[1].load_state_dict(states[0])
    assert weights[1].requires_grad


@pytest.mark.parametrize(
    ("options", "entities", "name"),
    [
        ({}, DENSE_ENTITIES, "adam"),
        ({}, DENSE_ENTITIES + 1, "lazy-adam"),
        ({"optimiser": "adam"}, 10**7, "adam"),
        ({"optimiser": "rowwise-adagrad"}, 5, "rowwise-adagrad"),
        ({"table_dtype": "bfloat16"}, 5, "lazy-adam"),
        ({"table_device": "host"}, 5, "lazy-adam"),
        ({"loss": "one-vs-all", "method": "uniform"}, 10**7, "adam"),
        ({"behaviour": "release"}, 10**7, "adam"),
        ({"behaviour": "release", "train_features": False}, 10**7, "lazy-adam"),
    ],
)
def test_dense_semantics_end_at_a_documented_size(options: dict[str, Any], entities: int, name: str) -> None:
    assert TrainConfig(**options).optimiser_for(entities) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "rowwise-adagrad", "loss": "one-vs-all", "method": "uniform"}, "accepted: auto, adam, adagrad"),
        ({"optimiser": "adagrad", "loss": "one-vs-all", "method": "uniform", "table_dtype": "bfloat16"}, "table_dtype"),
        ({"optimiser": "lazy-adam", "train_features": True}, "optimiser: got 'lazy-adam'"),
        ({"optimiser": "adam", "table_dtype": "bfloat16"}, "table_dtype: got 'bfloat16'"),
        ({"loss": "one-vs-all", "method": "uniform", "table_device": "host"}, "table_device: got 'host'"),
        ({"optimiser": "sgd"}, "optimiser: got 'sgd'"),
        ({"reciprocal": True}, "reciprocal: got True; accepted: false for method dhns"),
        ({"l2": -1.0}, "l2: got -1.0"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_a_penalty_of_the_table_needs_its_gradient() -> None:
    with pytest.raises(InputError, match=r"l2: got 0\.1; accepted: 0 with row-wise optimisers"):
        trained(0, l2=0.1, optimiser="lazy-adam")
    trained(1, l2=0.1, optimiser="lazy-adam", weighted_penalty=True)


def test_adagrad_over_whole_tables_is_torchs() -> None:
    trainer = trained(0, loss="one-vs-all", method="uniform", optimiser="adagrad", learning_rate=0.1, corruption="both")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            expected = before[name] - 0.1 * p.grad / (p.grad.abs() + 1e-10)
            torch.testing.assert_close(p.detach(), expected, msg=name)


def trained(steps: int = 4, **options: Any) -> Trainer:
    torch.manual_seed(5)
    trainer = Trainer(config(**options), graph())
    for _ in range(steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_the_gradients_of_dense_training(model: str) -> None:
    """Adagrad's first steps, where the untouched rows of dense Adagrad stay as well: row by row what torch's optimiser
    does.
    """
    options: dict[str, Any] = {
        "model": model,
        "method": "self-adversarial",
        "n3": 0.0,
        "fusion": True,
        "learning_rate": 0.05,
    }
    rows = Trainer(config(**options, optimiser="adagrad"), graph())
    dense = Trainer(config(**options, optimiser="adam"), graph())
    dense.model.load_state_dict(rows.model.state_dict())
    dense.optimizer = torch.optim.Adagrad([p for p in dense.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        losses = [t.step()["kgc"].item() for t in (rows, dense)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in dense.model.state_dict().items():
        assert torch.allclose(rows.model.state_dict()[name], value, atol=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "self-adversarial"},
        {"method": "self-adversarial", "n3": 1e-3, "weighted_penalty": True},
        {"method": "self-adversarial", "corruption": "both"},
        {"method": "uniform", "shared_negatives": 4},
        {"method": "nscaching"},
        {"method": "near-misses"},
        {"method": "kbgan"},
        {"method": "dhns", "behaviour": "normalised"},
        {"method": "grounded", "behaviour": "normalised"},
        {"method": "dhns", "control": "positive-only"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_when_rows_move_does_not_change_what_is_learned(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "model": "rotate",
        "features": "none",
        "fusion": False,
        "mu": 0.5,
        **options,
        "optimiser": "rowwise-adagrad",
    }
    weights, taken = [], []
    monkeypatch.setattr(rows, "SPARSE", {1: 0.0, 2: 0.0})  # the graph is small
    step = rows.corruption_step
    monkeypatch.setattr(rows, "corruption_step", lambda *a: taken.append(1) or step(*a))
    for at_once in (True, False):
        if not at_once:
            # Six steps of one loss each, or none where a step has several, or reads rows of other entities.
            several = {"near-misses", "kbgan", "grounded"} & {options["method"]} or {
                "corruption",
                "shared_negatives",
            } & set(options)
            assert len(taken) == (0 if several else 6)
            monkeypatch.setattr(Trainer, "_at_once", lambda *_: contextlib.nullcontext())
        trainer = Trainer(config(**options), graph())
        for _ in range(6):
            trainer.step()
        weights.append(trainer.model.state_dict())
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]), name


@pytest.mark.parametrize("optimiser", ROW_METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"corruption": "bernoulli", "table_dtype": "bfloat16"}, {"shared_negatives": 16, "n3": 1e-4}]
)
def test_resuming_continues_bit_by_bit(tmp_path: Path, optimiser: str, options: dict[str, Any]) -> None:
    # With DHNS: the generator's embeddings are look-ups too.
    options = {"model": "rotate", "optimiser": optimiser, "seed": 3, **options}
    whole = trained(6, **options)
    first = Trainer(config(**options), graph(), tmp_path)
    for _ in range(3):
        first.step()
    first.save()
    again = Trainer(config(**options), graph(), tmp_path)
    again.restore()
    for _ in range(3):
        again.step()
    assert again.model.entity.weight.dtype == (torch.bfloat16 if "table_dtype" in options else torch.float32)
    for name, value in whole.built.state().items():
        assert torch.equal(again.built.state()[name], value), name


@pytest.mark.parametrize("fusion", [False, True])
def test_a_table_in_host_memory_trains_the_same_model(device: torch.device, fusion: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": "complex",
        "optimiser": "lazy-adam",
        "device": device.type,
        "fusion": fusion,
        "learning_rate": 0.1,
    }
    here, there = trained(**options), trained(**options, table_device="host")
    assert isinstance(there.model.entity, HostEmbedding)
    assert there.model.entity.weight.device.type == "cpu"
    assert len(there.model.entity.hot) == 3
    # Before anything has gathered the table: the hot rows in `weight` are as they were in the beginning.
    ranks = dict(there.validate("test"))
    scores = there.model.score_hrt(graph().test)
    assert scores.device.type == device.type
    assert torch.allclose(scores, here.model.score_hrt(graph().test), atol=1e-4)
    # Rows that are scored where they lie have their gradients added up in another order.
    atol = 0 if device.type == "cpu" and fusion else 1e-5
    assert torch.allclose(here.model.structure_table(), there.model.structure_table(), atol=atol)
    there.model.entity.weight.data[there.model.entity.hot_rows] = 9.0  # stale, as long as nothing gathers them
    export(there.model, graph(), "npy", tmp_path)
    found = np.load(tmp_path / ("structure.npy" if fusion else "entities.npy"))
    assert np.allclose(found, here.model.structure_table().detach().cpu(), atol=1e-5)
    assert dict(here.validate("test")) == pytest.approx(ranks, abs=1e-6 if device.type == "cpu" else 0.05)


def test_a_run_is_chosen_saved_and_loaded(tmp_path: Path) -> None:
    write(graph(), tmp_path / "graph")
    folder = tmp_path / "run"
    folder.mkdir()
    chosen = config(data=str(tmp_path / "graph"), optimiser="rowwise-adagrad", learning_rate=0.2, epochs=4)
    trainer = Trainer(chosen, prepare_graph(chosen)[0], folder)
    chosen.save(folder / "config.yaml")
    trainer.fit()
    assert trainer._best is None  # in the file alone
    run = load_run(folder, device="cpu")
    assert isinstance(run.model.entity, RowEmbedding)
    assert dict(run.evaluate()) == dict(trainer.validate("test"))
    assert run.best_mrr == trainer.progress.best_mrr


@pytest.mark.parametrize(("optimiser", "rate"), [("lazy-adam", 0.05), ("adagrad", 0.5), ("rowwise-adagrad", 0.5)])
def test_learning_is_real(optimiser: str, rate: float) -> None:
    options: dict[str, Any] = {
        "method": "self-adversarial",
        "features": "none",
        "epochs": 30,
        "dim": 16,
        "validate_every": 30,
    }
    trainer = Trainer(config(**options, optimiser=optimiser, learning_rate=rate), graph(features={}, present={}))
    before = trainer.validate("train")["mrr"]
    trainer.fit()
    assert trainer.validate("train")["mrr"] > 3 * before
