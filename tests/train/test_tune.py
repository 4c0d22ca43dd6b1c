"""Hyperparameter search: what a folder holds is the search that is asked for, and a break changes nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.training import config

from dhns_fast import files, synthetic
from dhns_fast.data.write import write
from dhns_fast.errors import InputError
from dhns_fast.train import TrainConfig

pytest.importorskip("optuna")
from dhns_fast.train.tune import tune

BASE = config(
    model="distmult", method="uniform", data="synthetic:entities=40,relations=3,triples=300", epochs=2, validate_every=1
)
SPACE: dict[str, Any] = {"learning_rate": {"low": 0.001, "high": 0.1, "log": True}, "num_negatives": [2, 4, 8]}


def trials(folder: Path) -> list[list[str]]:
    with (folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_search_that_goes_on_is_one_without_a_break(tmp_path: Path) -> None:
    whole = tune(BASE, 6, tmp_path / "whole", SPACE)
    said: list[str] = []
    for count in (2, 4, 6):
        parts = tune(BASE, count, tmp_path / "parts", SPACE, said.append)
    drawn = [[row[0], *row[3:]] for row in trials(tmp_path / "parts")]
    assert drawn == [[row[0], *row[3:]] for row in trials(tmp_path / "whole")]
    assert len({tuple(row[1:]) for row in drawn}) == 7
    assert len(said) == 6
    # All that the folder holds was found there, and nothing more is trained.
    assert tune(BASE, 6, tmp_path / "parts", SPACE, said.append) == parts
    assert len(said) == 6
    assert TrainConfig.load(tmp_path / "whole" / "best.yaml") == whole


def test_another_search_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(BASE, 1, tmp_path, SPACE)
    before = trials(tmp_path)
    for change, message in (
        ({"model": "transe"}, r"^output: got '.*', a search with model 'distmult'; accepted: another folder"),
        ({"data": "synthetic:entities=50,relations=3,triples=300"}, "a search with data 'synthetic:entities=40"),
        ({"epochs": 3}, "a search with epochs 2"),
    ):
        with pytest.raises(InputError, match=message):
            tune(dataclasses.replace(BASE, **change), 1, tmp_path, SPACE)
    with pytest.raises(InputError, match="a search with another space"):
        tune(BASE, 1, tmp_path, {**SPACE, "num_negatives": [2, 4]})
    other = synthetic(40, 3, 299)
    with monkeypatch.context() as patch:
        patch.setattr("dhns_fast.train.tune.prepare_graph", lambda _: (other, ()))
        with pytest.raises(InputError, match="a search with other data in the same place"):
            tune(BASE, 2, tmp_path, SPACE)
    assert trials(tmp_path) == before
    tune(dataclasses.replace(BASE, device="cpu"), 2, tmp_path, SPACE)
    assert len(trials(tmp_path)) == 3


def test_a_search_follows_its_graph(tmp_path: Path) -> None:
    for place in ("before", "after"):
        write(synthetic(40, 3, 300), tmp_path / place)
        best = tune(
            dataclasses.replace(BASE, data=str(tmp_path / place)),
            2 if place == "after" else 1,
            tmp_path / "search",
            SPACE,
        )
    assert len(trials(tmp_path / "search")) == 3
    assert best.data == str(tmp_path / "after")


@pytest.mark.parametrize("name", ["data", "features", "validation_from_train", "seed"])
def test_trials_share_their_graph(name: str, tmp_path: Path) -> None:
    """Or they would be said to be of graphs that they were not trained on."""
    with pytest.raises(InputError, match=rf"^{name}: got an option of the space; accepted: one value for all trials"):
        tune(BASE, 1, str(tmp_path / "search"), {name: [1, 2]})
    assert not (tmp_path / "search").exists()


def test_a_search_of_before_goes_on(tmp_path: Path) -> None:
    """What its journal says of where it ran does not count, nor how often it kept its weights."""
    tune(BASE, 1, tmp_path, SPACE)
    journal = tmp_path / "study.journal"
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if of := line.get("user_attr", {}).get("of"):
            of["options"] |= {"checkpoint_every": 60.0, "cuda_graph": None, "device": "cuda"}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "checkpoint_every" in journal.read_text(encoding="utf-8")
    tune(dataclasses.replace(BASE, checkpoint_every=1.0), 2, tmp_path, SPACE)
    assert len(trials(tmp_path)) == 3


def test_two_searches_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.owned(tmp_path):
        monkeypatch.setattr(files, "_held", set())  # as another thread's
        with pytest.raises(
            InputError, match=r"folder: got .* is writing to; accepted: a folder that no other run uses"
        ):
            tune(BASE, 1, tmp_path, SPACE)
