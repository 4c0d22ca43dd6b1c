"""Every method of the catalogue and every control trains, resumes, and is refused where it does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dhns_fast.catalogue import CONTROLS, METHODS
from dhns_fast.data import synthetic
from dhns_fast.errors import InputError
from dhns_fast.train import Trainer
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.run import train

BASE = TrainConfig(
    model="transe",
    dim=8,
    epochs=2,
    batch_size=40,
    num_negatives=6,
    diffusion_steps=8,
    behaviour="normalised",
    mu=0.5,
    validate_every=1,
)


@pytest.fixture(scope="module")
def graph():
    return synthetic(50, 3, 300, {"text": 5, "image": 4}, seed=1)


def trained(config: TrainConfig, graph, folder: Path | None = None) -> Trainer:
    trainer = Trainer(config, graph, folder)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_resumes_bit_for_bit(method: str, graph, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, method=method)
    whole = trained(config, graph)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in whole.progress.history)
    assert (whole.progress.history[0]["loss_hal"] > 0) == config.recipe.beside
    assert (whole.progress.history[0]["loss_diffusion"] > 0) == config.recipe.generator
    trained(dataclasses.replace(config, epochs=1), graph, tmp_path)
    again = Trainer(config, graph, tmp_path)
    again.restore()
    again.fit()
    for (name, a), b in zip(whole.built.state().items(), again.built.state().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.progress.history[1]["loss_kgc"] == again.progress.history[1]["loss_kgc"]


@pytest.mark.parametrize("method", [name for name, recipe in METHODS.items() if recipe.beside])
def test_controls_put_other_negatives_in_the_place_of_a_methods(method: str, graph) -> None:
    config = dataclasses.replace(BASE, method=method, epochs=1)
    possible = [c for c in CONTROLS if c != "gaussian" or config.recipe.conditioned]
    losses = {}
    for control in possible:
        trainer = Trainer(dataclasses.replace(config, control=control), graph)
        report = train(trainer)
        assert report.results.keys() == {"trained", "untrained", "relation frequency"}
        losses[control] = report.progress.history[0]["loss_hal"]
    assert len(set(losses.values())) == len(possible)
    assert losses["positive-only"] < min(loss for c, loss in losses.items() if c != "positive-only")


def test_the_loss_of_positives_alone_is_the_hardness_adaptive_loss_without_negatives(graph) -> None:
    """With generated negatives beyond any doubt the two are the same."""
    first = {}
    far = torch.full((4, 3, 200, 8), 1e4)
    for control in ("positive-only", "none"):
        trainer = Trainer(dataclasses.replace(BASE, method="dhns", control=control, batch_size=200), graph)
        trainer.model.normalize = False
        trainer.sampler.generate_from = lambda *_: (far, -far)  # type: ignore[union-attr]
        first[control] = trainer.step()["hal"].item()
    assert first["positive-only"] == pytest.approx(first["none"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grounded", "model": "pairre"}, "method: got 'grounded'; accepted: uniform, self-adversarial, "),
        ({"method": "modality-swap", "model": "cp"}, "method: got 'modality-swap'; accepted: uniform, "),
        (
            {"method": "nscaching", "loss": "one-vs-all"},
            "method: got 'nscaching'; accepted: uniform, dhns, near-misses, ",
        ),
        (
            {"method": "relation-constrained", "shared_negatives": 5},
            "shared_negatives: got 5; accepted: 0 for method relation-constrained",
        ),
        (
            {"method": "uniform", "control": "shuffled"},
            "control: got 'shuffled'; accepted: none for method uniform; the others for dhns, ",
        ),
        (
            {"method": "near-misses", "control": "gaussian"},
            "control: got 'gaussian'; accepted: none, shuffled, positive-only for method",
        ),
        ({"levels": [0, 1.5, 2, 3, 4]}, "levels: got [0, 1.5, 2, 3, 4]; accepted: one or more integers from 0 to 7"),
        ({"decay_after": 1.0}, "decay_after: got 1.0; accepted: shares above 0 and below 1"),
        ({"plateau_factor": 1.0}, "plateau_factor: got 1.0; accepted: shares above 0 and below 1"),
        ({"relation_dropout": 1.0}, "relation_dropout: got 1.0; accepted: shares from 0 to below 1"),
        ({"pool": 0}, "pool: got 0; accepted: 1 or more"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(BASE, **options)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)


def test_levels_as_shares_and_strided_chains_train(graph) -> None:
    changes = {"levels": [0.1, 0.5], "level_weights": [1.0, 1.0], "level_margins": [0.3, 0.9], "sampling_steps": 3}
    trainer = trained(dataclasses.replace(BASE, method="dhns", epochs=1, margin_schedule="signal", **changes), graph)
    assert trainer.generator is not None
    assert len(trainer.generator._steps.times) == 4
    assert trainer.margins().tolist() == pytest.approx([0.3, 0.9])


def test_the_learning_rate_falls_to_a_tenth_after_its_share_of_the_steps(graph) -> None:
    trainer = Trainer(dataclasses.replace(BASE, method="uniform", decay_after=0.5, epochs=2), graph)
    rates = []
    for _ in range(2 * trainer.steps_per_epoch):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    half = trainer.steps_per_epoch
    assert rates == [BASE.learning_rate] * half + [BASE.learning_rate * 0.1] * half


def test_plateaus_are_torchs(graph, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(BASE, method="uniform", plateau_factor=0.5, plateau_patience=1, plateau_threshold=0.01)
    trainer = Trainer(config, graph)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), mode="max", factor=0.5, patience=1, threshold=0.01
    )
    rates = set()
    for mrr in (0.0, 0.3, 0.302, 0.2, 0.304, 0.3, 0.1, 0.4, 0.403, 0.399, 0.4, 0.41, 0.3, 0.2):
        monkeypatch.setattr(trainer, "validate", lambda mrr=mrr: {"mrr": mrr, "hits@1": 0.0, "hits@10": 0.0})
        trainer._validate()
        trainer.step()
        theirs.step(mrr)
        rates.add(trainer.optimizer.param_groups[0]["lr"])
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(theirs.get_last_lr()[0])
    assert len(rates) == 5


def test_a_shuffled_epoch_takes_every_triple_once(graph) -> None:
    trainer = Trainer(dataclasses.replace(BASE, method="uniform", order="shuffled"), graph)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * trainer.steps_per_epoch, (epoch + 1) * trainer.steps_per_epoch)
        epochs.append(torch.cat([trainer._positives(number) for number in steps]).tolist())
    train = graph.train.tolist()
    for taken in epochs:
        assert len(taken) == trainer.steps_per_epoch * trainer.batch_size
        assert len(set(map(tuple, taken))) == len(taken)
        assert all(triple in train for triple in taken)
    assert epochs[0] != epochs[1]


def test_two_shuffled_epochs_ask_for_every_side_once(graph) -> None:
    config = dataclasses.replace(BASE, method="uniform", order="shuffled", corruption="mixed")
    trainer = Trainer(config, graph)
    asked: list[tuple[int, ...]] = []
    for number in range(2 * trainer.steps_per_epoch):
        parts = trainer._asked(trainer._positives(number), number)
        assert sum(len(part) for part, _ in parts) == trainer.batch_size
        asked += [(*triple, side == "head") for part, side in parts for triple in part.tolist()]
    assert len(set(asked)) == len(asked)
    assert 0.3 < sum(side for *_, side in asked) / len(asked) < 0.7
