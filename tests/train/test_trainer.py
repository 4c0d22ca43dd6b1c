"""Runs: resuming, seeds, the best checkpoint, validation, divergence, checkpoints that do not belong."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.training import config, graph, triples
from torch import Tensor

from dhns_fast import catalogue
from dhns_fast.data import write
from dhns_fast.errors import DataError, InputError
from dhns_fast.ops import backend, operator
from dhns_fast.optim import ROW_OPTIMIZERS
from dhns_fast.train import Diverged, Interrupted, Trainer, checkpoint, load_run, prepare_graph
from dhns_fast.train import run as runs
from dhns_fast.train.assemble import pick_device
from dhns_fast.train.trainer import LOOK_EVERY, Progress


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that decides how training goes on."""
    out = {f"model.{name}": x for name, x in trainer.model.state_dict().items()}
    out |= {f"margins.{name}": x for name, x in trainer.margins.state_dict().items()}
    out |= checkpoint.flatten_optimizer("optimizer", trainer.optimizer)
    if trainer.generator is not None and trainer.generator_optimizer is not None:
        out |= {f"generator.{name}": x for name, x in trainer.generator.state_dict().items()}
        out |= checkpoint.flatten_optimizer("generator_optimizer", trainer.generator_optimizer)
    return {name: x.clone() for name, x in out.items()} | {"rng": trainer.rng.get_state()}


def history(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.progress.history]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def stop_after(trainer: Trainer, step: int) -> None:
    def look(progress: Progress) -> None:
        trainer.stop_requested = progress.step >= step

    with pytest.raises(Interrupted, match=f"interrupted after step {step}, saved .*last.safetensors"):
        trainer.fit(look)


# 336 triples in batches of 64: five steps an epoch. Interrupted in mid-epoch, at an epoch's end, and more than once.
STOPS = ((7,), (5,), (2, 9, 10))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "distmult", "behaviour": "release"},
        {"method": "uniform", "model": "transe"},
        {"model": "rotate", "margin_schedule": "learned"},
        {
            "method": "uniform",
            "loss": "one-vs-all",
            "corruption": "both",
            "reciprocal": True,
            "optimiser": "adagrad",
            "weighted_penalty": True,
            "dropout": 0.3,
            "relation_dropout": 0.2,
            "plateau_factor": 0.5,
            "plateau_patience": 0,
            "plateau_threshold": 1.0,
            "l2": 0.01,
            "order": "shuffled",
        },
    ],
    ids=["corrected", "release", "plain", "learned margins", "dropout, plateaus, Adagrad"],
)
def test_resumed_is_uninterrupted_tensor_for_tensor(tmp_path: Path, options: dict[str, Any]) -> None:
    kg, options = graph(), config(epochs=3, **options)
    whole = Trainer(options, kg)
    last: dict[str, Tensor] = {}
    whole.fit(on_epoch=lambda epoch: last.update(state(whole)))
    assert len(history(whole)) == 3
    for stops in STOPS:
        folder = tmp_path / str(stops)
        folder.mkdir()
        for stop in stops:
            part = Trainer(options, kg, folder)
            if stop != stops[0]:
                part.restore()
            stop_after(part, stop)
        resumed = Trainer(options, kg, folder)
        resumed.restore()
        assert resumed.progress.step == stops[-1]
        end: dict[str, Tensor] = {}
        resumed.fit(on_epoch=lambda epoch: end.update(state(resumed)))  # noqa: B023
        same(last, end)
        same(state(whole), state(resumed))
        assert history(whole) == history(resumed)
        assert whole.progress.best_epoch == resumed.progress.best_epoch
        assert dict(whole.validate("test")) == dict(resumed.validate("test"))


def test_one_seed_one_result() -> None:
    def run(seed: int) -> tuple[list[dict[str, float]], dict[str, float]]:
        torch.manual_seed(torch.seed())  # the process's own generator decides nothing
        trainer = Trainer(config(seed=seed), graph())
        trainer.fit()
        return history(trainer), dict(trainer.validate("test"))

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize(
    "options",
    [
        {"model": "distmult", "loss": "one-vs-all"},
        *({"model": name} for name in ("simple", "quate", "rescal", "cp", "pairre")),
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_training_finds_what_was_planted(options: dict[str, Any]) -> None:
    trainer = Trainer(config(method="uniform", epochs=15, learning_rate=0.05, validate_every=15, **options), graph())
    untrained = trainer.validate("train")["mrr"]
    trainer.fit()
    assert trainer.validate("train")["mrr"] > 2 * untrained


def test_construction_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Trainer(config(), graph()).step()
    assert torch.equal(before, torch.get_rng_state())


def test_the_best_weights_are_kept_and_evaluated(tmp_path: Path) -> None:
    # A rate this high ruins the model soon: the best validation is not the last.
    trainer = Trainer(config(method="uniform", epochs=40, patience=3, learning_rate=1.0), graph(), tmp_path)
    weights: dict[int, Tensor] = {}
    progress = trainer.fit(
        on_epoch=lambda epoch: weights.update({epoch.epoch: trainer.model.entity.weight.detach().clone()})
    )
    mrr = {int(row["epoch"]): row["valid_mrr"] for row in progress.history}
    assert progress.best_mrr == mrr[progress.best_epoch] == max(mrr.values())
    # Three validations without a better one, and no more.
    assert progress.epoch == progress.best_epoch + 3 < 40
    assert torch.equal(trainer.model.entity.weight, weights[progress.best_epoch])
    assert not torch.equal(trainer.model.entity.weight, weights[progress.epoch])
    assert trainer.validate()["mrr"] == progress.best_mrr
    reopened = Trainer(trainer.config, trainer.kg, tmp_path)
    reopened.load_best()
    assert torch.equal(reopened.model.entity.weight, weights[progress.best_epoch])
    # Stopped is stopped, and continuing continues from the last weights, not from the best.
    reopened.restore()
    assert torch.equal(reopened.model.entity.weight, weights[progress.epoch])
    reopened.fit()
    assert reopened.progress.epoch == progress.epoch
    assert torch.equal(reopened.model.entity.weight, weights[progress.best_epoch])


def test_patience_zero_never_stops() -> None:
    trainer = Trainer(config(method="uniform", epochs=6, patience=0, learning_rate=1.0), graph())
    assert trainer.fit().epoch == 6


def test_a_summary_says_why_training_ended() -> None:
    trainer = Trainer(config(method="uniform", epochs=40, patience=2, learning_rate=1.0), graph())
    progress = trainer.fit()
    assert runs.summary(trainer, runs.Report({}, progress))["ended"] == "2 validations without a better one"
    trainer = Trainer(config(method="uniform", epochs=2), graph())
    assert runs.summary(trainer, runs.Report({}, trainer.fit()))["ended"] == "all epochs"


def test_progress_is_on_stderr_unless_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    options = config(method="uniform", epochs=2, validate_every=1)
    Trainer(options, graph()).fit()
    out, err = capsys.readouterr()
    assert (out, err.count("valid MRR")) == ("", 2)
    Trainer(options, graph()).fit(show=False)
    assert capsys.readouterr() == ("", "")


def test_without_validation_the_last_weights_are_the_result(tmp_path: Path) -> None:
    kg = graph(valid=triples())
    first = Trainer(config(method="uniform", epochs=1), kg, tmp_path)
    first.fit()
    more = Trainer(config(method="uniform", epochs=3), kg, tmp_path)
    more.restore()
    more.fit()
    assert more.progress.best_epoch == 3
    whole = Trainer(config(method="uniform", epochs=3), kg)
    whole.fit()
    assert torch.equal(more.model.entity.weight, whole.model.entity.weight)
    assert "valid_mrr" not in whole.progress.history[-1]


def test_validation_happens_every_k_epochs_and_at_the_end() -> None:
    trainer = Trainer(config(method="uniform", epochs=5, validate_every=2), graph())
    assert [row["epoch"] for row in trainer.fit().history if "valid_mrr" in row] == [2, 4, 5]


def test_a_batch_is_never_larger_than_train() -> None:
    kg = graph(train=graph().train[:10])
    trainer = Trainer(config(batch_size=1000, epochs=1), kg)
    assert (trainer.batch_size, trainer.steps_per_epoch) == (10, 1)
    trainer.fit()
    with pytest.raises(InputError, match="train of synthetic: got 0; accepted: one triple or more"):
        Trainer(config(), graph(train=triples()))


@pytest.mark.parametrize(
    ("poison", "term"),
    [
        ("entity.weight", "kgc"),
        ("relation.weight", "kgc"),
        ("fusion.attention", "kgc"),
        ("unused", "n3"),
        ("generator", "diffusion"),
        ("chain", "hal"),
    ],
)
def test_divergence_names_the_step_and_the_first_bad_term(
    poison: str, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Entity 59 is in no triple of this train: nothing but the penalty on whole tables reads its embedding.
    train = graph().train
    kg = (
        graph(train=train[(train != 59).all(1)], valid=triples(), test=triples(), features={}, present={})
        if poison == "unused"
        else graph()
    )
    trainer = Trainer(config(model="complex", num_negatives=1, fusion=None if kg.features else False), kg)
    for _ in range(6):
        trainer.step()
    assert trainer.generator is not None
    with torch.no_grad():
        if poison == "unused":
            monkeypatch.setattr(trainer.negatives, "corrupt", lambda batch, side, rng, part: batch[:, :1])
            trainer.model.entity.weight[59] = torch.nan
        elif poison == "generator":
            trainer.generator.denoiser.output_layer.bias.fill_(torch.inf)
        elif poison == "chain":
            sample = trainer.generator.sample
            monkeypatch.setattr(
                trainer.generator, "sample", lambda *a, **k: [[x * torch.nan for x in side] for side in sample(*a, **k)]
            )
        else:
            trainer.model.get_parameter(poison).fill_(torch.nan)
    with pytest.raises(Diverged, match=rf"^step 7 \(epoch 2\): term '{term}' is not finite.*--learning-rate"):
        trainer.step()


@pytest.mark.parametrize("first", [1, 2, 49])
def test_where_looking_stalls_the_first_bad_step_is_named_at_the_next_look(first: int) -> None:
    """On a GPU nobody looks at the loss between every LOOK_EVERY-th step; what is said then is where it began."""
    trainer = Trainer(config(method="uniform"), graph())
    trainer.device = torch.device("meta")
    fine, bad = torch.tensor(1.0), torch.tensor(torch.inf)
    for step in range(1, LOOK_EVERY):
        trainer._number.fill_(step - 1)
        trainer._account({"kgc": bad if step > first else fine, "n3": bad if step >= first else fine})
        trainer.progress.step = step
        trainer._look()
    trainer.progress.step = LOOK_EVERY
    with pytest.raises(
        Diverged,
        match=rf"^step {first} \(epoch {(first - 1) // trainer.steps_per_epoch + 1}\): term 'n3' is not finite",
    ):
        trainer._look()


def test_features_beyond_measure_are_named_where_a_run_diverges() -> None:
    kg = graph()
    kg = dataclasses.replace(kg, features={name: 1e10 * x for name, x in kg.features.items()})
    trainer = Trainer(config(model="complex", num_negatives=1, method="uniform", fusion=True), kg)
    trainer.model.get_parameter("entity.weight").data.fill_(torch.nan)
    with pytest.raises(
        Diverged, match=r"usually helps, and numbers of order 1 in features '\w+', which go up to \d\S+e\+10$"
    ):
        trainer.step()


def test_divergence_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(config(method="uniform"), graph(), tmp_path)

    def poison(progress: Progress) -> None:
        if progress.step == 6:
            trainer.model.entity.weight.data.fill_(torch.nan)

    with pytest.raises(Diverged, match=r"step 7 \(epoch 2\)"):
        trainer.fit(poison)
    again = Trainer(trainer.config, trainer.kg, tmp_path)
    again.restore()
    assert again.progress.epoch == 1
    assert again.model.entity.weight.isfinite().all()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a run of one epoch."""
    trainer = Trainer(config(epochs=1), graph(), tmp_path)
    trainer.fit()
    return tmp_path


def test_damaged_and_foreign_checkpoints(run: Path) -> None:
    def refuse(message: str, trainer: Trainer | None = None, best: bool = False) -> None:
        trainer = trainer or Trainer(config(epochs=2), graph(), run)
        before = state(trainer)
        name = "best" if best else "last"
        with pytest.raises(DataError, match=rf"{name}\.safetensors: .*{message}"):
            trainer.load_best() if best else trainer.restore()
        same(before, state(trainer))

    other = graph(train=graph().train[1:])
    refuse("another graph", Trainer(config(), other, run))
    refuse("another graph", Trainer(config(), other, run), best=True)
    refuse("another graph", Trainer(config(), graph(features={}, present={}), run))
    for options in (
        {"dim": 12},
        {"model": "rotate"},
        {"method": "uniform"},
        {"fusion": False},
        {"train_features": True},
    ):
        refuse("do not fit the model", Trainer(config(**options), graph(), run))
    last = run / "last.safetensors"
    whole = last.read_bytes()
    for part in (whole[:-50], whole[:4], b"", b"x" * 100):
        last.write_bytes(part)
        refuse("not a readable checkpoint")
    rng = random.Random(0)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        last.write_bytes(flipped)
        refuse("")
    shutil.copy(run / "best.safetensors", last)
    refuse("no state of training")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, last)
    refuse("not a checkpoint of dhns_fast")
    last.unlink()
    refuse("no such checkpoint")
    with pytest.raises(InputError, match="folder: got None; accepted: the folder of a run, to restore"):
        Trainer(config(), graph()).restore()
    with pytest.raises(InputError, match="folder: got None; accepted: the folder of a run, to load"):
        Trainer(config(), graph()).load_best()


def test_saving_leaves_the_old_checkpoint_where_it_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "last.safetensors").read_bytes()
    trainer = Trainer(config(epochs=2), graph(), run)
    trainer.restore()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert (run / "last.safetensors").read_bytes() == before
    assert sorted(p.name for p in run.iterdir()) == ["best.safetensors", "last.safetensors"]


@pytest.mark.parametrize(
    ("valid", "option", "held_out", "note"),
    [
        ("own", None, 0, None),
        ("own", 0.1, 34, r"Validation: 10\.0% of train held out \(seed 0\) in place of the graph's own, as asked\."),
        ("empty", None, 17, r"Validation: 5% of train held out \(seed 0\).*--validation-from-train decides\."),
        ("contaminated", None, 17, r"Validation: 5% of train held out"),
        ("contaminated", 0.0, 0, None),
        ("empty", 0.0, 0, None),
    ],
)
def test_validation_is_held_out_of_train(
    tmp_path: Path, valid: str, option: float | None, held_out: int, note: str | None
) -> None:
    kg = graph()
    kg = {
        "own": kg,
        "empty": graph(valid=triples()),
        "contaminated": graph(valid=torch.cat([kg.valid, kg.train[:30]])),
    }[valid]
    folder = str(write(kg, tmp_path / "g"))
    got, notes = prepare_graph(config(data=folder, validation_from_train=option))
    again, _ = prepare_graph(config(data=folder, validation_from_train=option))
    other, _ = prepare_graph(config(data=folder, validation_from_train=option, seed=1))
    assert len(kg.train) - len(got.train) == held_out
    assert torch.equal(got.valid, again.valid)
    said = [line for line in notes if line.startswith("Validation:")]
    if note is None:
        assert said == []
        assert torch.equal(got.valid, kg.valid)
    else:
        import re

        assert re.match(note, said[0])
        assert len(got.valid) == held_out
        assert not torch.equal(got.valid, other.valid)
        rest = {tuple(row) for row in got.train.tolist()}
        assert rest.isdisjoint(map(tuple, got.valid.tolist()))
        assert rest | {tuple(row) for row in got.valid.tolist()} == {tuple(row) for row in kg.train.tolist()}
    if valid == "contaminated":
        assert any("valid is contaminated" in line for line in notes)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("all", ["image", "text"]),
        ("none", []),
        ("text", ["text"]),
        ("text, image", ["text", "image"]),
        (["image"], ["image"]),
        ([], []),
    ],
)
def test_modalities_are_chosen_by_name(tmp_path: Path, features: Any, expected: list[str]) -> None:
    folder = str(write(graph(), tmp_path / "g"))
    kg, _ = prepare_graph(config(data=folder, features=features))
    assert list(kg.features) == expected
    trainer = Trainer(config(data=folder, features=features, epochs=1), kg)
    assert (trainer.model.fusion is None) == (not expected)
    trainer.fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device: got 'cuda:99'; accepted: "),
        ({"device": "nonsense"}, "device: got 'nonsense'; accepted: auto, cpu"),
        ({"device": "meta"}, "device: got 'meta'; accepted: auto, cpu"),
        ({"precision": "tf32"}, "precision: got 'tf32'; accepted: ieee and bf16 on cpu"),
        ({"margin": -3.0}, "margin: got -3.0; accepted: numbers above -epsilon"),
    ],
)
def test_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(config(**options), graph())


def test_a_backend_of_the_environment_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DHNS_FAST_BACKEND", "nonsense")
    with pytest.raises(InputError, match="DHNS_FAST_BACKEND: got 'nonsense'"):
        Trainer(config(), graph())


def test_auto_is_a_device_that_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_load_run_needs_no_trainer(tmp_path: Path) -> None:
    kg = graph()
    write(kg, tmp_path / "g")
    options = config(data=str(tmp_path / "g"), epochs=1, backend="eager")
    folder = tmp_path / "r"
    folder.mkdir()
    options.save(folder / "config.yaml")
    trainer = Trainer(options, prepare_graph(options)[0], folder)
    trainer.fit()
    run = load_run(str(tmp_path / "r"))
    assert (run.config.data, run.best_epoch, run.best_mrr) == (options.data, 1, trainer.progress.best_mrr)
    assert {k: v.tolist() for k, v in run.state().items()} == {k: v.tolist() for k, v in trainer.built.state().items()}
    assert run.generator is not None
    assert dict(run.evaluate()) == dict(trainer.validate("test"))
    (tmp_path / "g").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"data: got .*, where training found it and where nothing is now"):
        load_run(tmp_path / "r")
    assert dict(load_run(tmp_path / "r", data=str(tmp_path / "moved"), device="cpu").evaluate()) == dict(run.evaluate())


def test_a_backend_reaches_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = backend.choose

    def noted(*arguments: Any) -> backend.Implementation:
        chosen = choose(*arguments)
        asked.append(chosen.backend.name)
        return chosen

    monkeypatch.setattr(operator, "choose", noted)
    trainer = Trainer(config(backend="eager"), graph())
    trainer.step()
    trainer.validate()
    assert set(asked) == {"eager"}
    assert len(asked) > 5
    implementations = [backend.Implementation(entry, print) for entry in (backend.CPU, backend.EAGER)]
    with backend.preferring("eager"), backend.preferring(None):
        assert choose("", torch.device("cpu"), implementations, None).backend.name == "eager"


def test_the_catalogue_names_every_optimiser() -> None:
    assert ("auto", "adam", *ROW_OPTIMIZERS) == catalogue.OPTIMISERS
