"""Run folders kept: what checkpoints say is believed only as far as it fits, one owner at a time, and signals."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.training import config, graph
from torch import Tensor

from dhns_fast import files
from dhns_fast.cli import signals
from dhns_fast.data import KnowledgeGraph, write
from dhns_fast.errors import DataError, InputError
from dhns_fast.train import Diverged, Trainer, checkpoint, distributed, grid, load_run
from dhns_fast.train import run as runs
from dhns_fast.train.distributed import Processes
from dhns_fast.train.pack import pack


def kept(**changes: Any) -> KnowledgeGraph:
    """The graph as a folder gives it back: modalities by name."""
    kg = graph()
    fields = {name: dict(sorted(getattr(kg, name).items())) for name in ("features", "present")}
    return graph(**(fields | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph `g` in a folder, and a finished run `r` of it."""
    folder = tmp_path_factory.mktemp("runs")
    write(kept(), folder / "g")
    (folder / "r").mkdir()
    runs.train(Trainer(config(data=str(folder / "g"), epochs=2), kept(), folder / "r"))
    return folder


def test_nothing_is_left_and_the_lock_is_gone(folder: Path) -> None:
    assert not [path.name for path in (folder / "r").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (
            lambda kg: {"features": kg.features | {"text": kg.features["text"].flip(0)}, "present": {}},
            "features of text",
        ),
        (lambda kg: {"present": kg.present | {"image": ~kg.present["image"]}}, "present of image"),
        (
            lambda kg: {name: dict(reversed(getattr(kg, name).items())) for name in ("features", "present")},
            "the order of modalities",
        ),
        (lambda kg: {"train": kg.train.flip(0)}, "triples"),
        (lambda kg: {"entity_names": [f"x{name}" for name in kg.entity_names]}, "names"),
    ],
    ids=["features", "present", "order", "triples", "names"],
)
def test_another_graph_is_refused_by_what_differs(
    folder: Path, change: Callable[[Any], dict[str, Any]], differs: str
) -> None:
    trainer = Trainer(config(), kept(**change(kept())), folder / "r")
    for action in (trainer.restore, trainer.load_best):
        with pytest.raises(DataError, match=rf"another graph than the data is now; what differs: .*{differs}"):
            action()


def bad(name: str, x: Tensor | None) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        tensors.pop(name)
        if x is not None:
            tensors[name] = x

    return change


def progress(**values: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, meta: meta["progress"].update(values)


def no_optimiser(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "short state": (bad("optimizer.0.exp_avg", torch.zeros(1)), "optimizer.0 does not fit its parameter in exp_avg"),
    "dtype of state": (
        bad("optimizer.0.step", torch.zeros((), dtype=torch.int64)),
        "optimizer.0 does not fit its parameter in step",
    ),
    "missing state": (bad("optimizer.0.exp_avg_sq", None), "optimizer.0 does not fit its parameter in exp_avg_sq"),
    "no optimiser": (no_optimiser, "its header names"),
    "foreign state": (lambda t, m: t.update({"optimizer.99.step": torch.zeros(())}), "belongs to no parameter"),
    "epoch": (progress(epoch=-5), "its progress has epoch -5; accepted: integers of at least 0"),
    "step": (progress(step=1.5), "its progress has step 1.5; accepted: integers of at least 0"),
    "no number": (progress(best_mrr=float("nan")), "its progress has best_mrr nan"),
    "history": (progress(history=[1]), "its progress has history"),
    "unknown": (progress(extra=1), "differs in extra"),
    "no object": (lambda t, m: m.update(progress=[1]), "its progress is list"),
    "random numbers": (bad("rng", torch.zeros(3)), "random numbers is damaged"),
    "sums": (bad("sums", torch.zeros(1)), "sums of losses"),
    "weights": (bad("model.entity.weight", torch.full((60, 8), torch.nan)), "not finite"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_a_checkpoint_says_must_fit(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    trainer = Trainer(config(epochs=3), kept(), tmp_path)
    tensors, meta = checkpoint.load(folder / "r" / "last.safetensors", kept().fingerprint())
    change(tensors, meta)
    checkpoint.save(tmp_path / "last.safetensors", tensors, meta)
    before = {name: x.clone() for name, x in trainer.built.state().items()}
    with pytest.raises(DataError, match=rf"last.safetensors: .*{message}"):
        trainer.restore()
    assert all(torch.equal(before[name], x) for name, x in trainer.built.state().items())
    assert not trainer.progress.epoch


class Trap:
    """What a pickle may ask for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("trap", "w")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_of_several_processes_have_checksums_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {"x": torch.arange(6.0).view(3, 2), "n": torch.tensor(3, dtype=torch.uint8)}

    def read() -> dict[str, torch.Tensor]:
        found = {name: torch.zeros_like(x) for name, x in tensors.items()}
        distributed.load(tmp_path, "last", found, {"triples": "g"}, Processes())
        return found

    path = distributed.save(tmp_path, "last", tensors, {"graph": {"triples": "g"}}, Processes())
    assert all(torch.equal(x, tensors[name]) for name, x in read().items())
    parts = [path, *(p for p in tmp_path.glob("last-*/*") if p.is_file())]
    assert len(parts) == 3
    for part in parts:
        whole = part.read_bytes()
        for at in range(0, len(whole), len(whole) // 20):
            part.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(DataError, match=r"damaged: its content does not have|not a checkpoint of dhns_fast"):
                read()
        part.unlink()
        with pytest.raises(DataError, match=r"no such checkpoint|not a readable checkpoint"):
            read()
        part.write_bytes(whole)
    # Whoever writes a checkpoint can write its checksums, too.
    described = next(tmp_path.glob("last-*/.metadata"))
    described.write_bytes(pickle.dumps(Trap()))
    said = json.loads(path.read_text())
    del said[files.CHECKSUM]
    said["files"][".metadata"] = files.digest_of(described)
    path.write_text(json.dumps(said | {files.CHECKSUM: files.digest(said)}))
    with pytest.raises(DataError, match=r"found _?io\.open; accepted: descriptions of tensors"):
        read()
    assert not (tmp_path / "trap").exists()


def test_a_folder_in_use_is_refused_and_names_the_process(folder: Path) -> None:
    trainer = Trainer(config(epochs=2), kept(), folder / "r")
    pid = os.fork()
    if pid == 0:
        with files.owned(folder / "r"):
            signal.pause()
    try:
        while not (folder / "r" / files.LOCK).exists() or not (folder / "r" / files.LOCK).read_text():
            pass
        with pytest.raises(InputError, match=f"which process {pid} on .* is writing to"):
            trainer.fit()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (folder / "r" / files.LOCK).unlink()


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    """One step an epoch: no loss has seen what the step has done."""
    trainer = Trainer(config(method="uniform", epochs=1, batch_size=1000, learning_rate=1e300), graph(), tmp_path)
    with pytest.raises(Diverged, match=r"step 1 \(epoch 1\): model\.\S+ is no longer finite"):
        trainer.fit()
    assert not list(tmp_path.iterdir())


def test_checkpoints_come_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(method="uniform", epochs=1, checkpoint_every=1e-9), graph(), tmp_path)
    seen = []
    trainer.fit(lambda state: seen.append((tmp_path / "last.safetensors").exists()))
    assert seen == [False, True, True, True, True]


def test_seconds_of_all_parts_are_kept(folder: Path) -> None:
    trainer = Trainer(config(epochs=3), kept(), folder / "r")
    trainer.restore()
    before = trainer.progress.seconds
    assert before > 0
    trainer.fit()
    assert trainer.progress.seconds > before


def test_test_has_no_say_in_the_epoch(tmp_path: Path) -> None:
    kg = graph()
    # Every answer that validation could confuse with the true one is in test.
    other = graph(
        test=torch.cat([kg.test, torch.stack([kg.valid[:, 0], kg.valid[:, 1], (kg.valid[:, 2] + 1) % 60], 1)])
    )
    first, second = (Trainer(config(method="uniform"), graph_, None) for graph_ in (kg, other))
    assert [row["valid_mrr"] for row in first.fit().history] == [row["valid_mrr"] for row in second.fit().history]
    assert torch.equal(first.model.entity.weight, second.model.entity.weight)
    assert first.built.evaluate("valid")["mrr"] != second.built.evaluate("valid")["mrr"]


def test_a_run_is_read_from_another_folder_and_where_its_data_has_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_run(folder / "r").evaluate()["mrr"]
    (folder / "g").rename(tmp_path / "moved")
    try:
        with pytest.raises(InputError, match="where nothing is now; accepted: --data PATH"):
            load_run(str(folder / "r"))
        assert load_run(str(folder / "r"), data="moved").evaluate()["mrr"] == expected
    finally:
        (tmp_path / "moved").rename(folder / "g")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_ask_once_and_raise_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, clock, asked = signals.Signals(), [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with handler.asking(lambda: not asked.append("asked")):
        handler(number, None)
        handler(number, None)
        assert asked == ["asked"]
        clock[0] += signals.SAME_WISH
        with pytest.raises(KeyboardInterrupt):
            handler(number, None)
    handler(number, None)
    clock[0] += signals.CLEANING_UP
    with pytest.raises(SystemExit, match=str(128 + number)):
        handler(number, None)
    assert asked == ["asked"]
    assert handler.code == 128 + number


def test_a_cell_of_a_grid_is_kept_while_its_graph_is_the_same(tmp_path: Path) -> None:
    lines: list[str] = []

    def compare() -> list[str]:
        lines.clear()
        base = config(data=str(tmp_path / "g"), epochs=1)
        grid.run_grid(base, [base.data], ["distmult"], ["uniform"], 1, tmp_path / "cells", on_run=lines.append)
        return [line.rpartition("(")[2] for line in lines]

    write(kept(), tmp_path / "g")
    assert compare() == ["best epoch 1 of 1)"]
    assert compare() == ["kept)"]
    features = kept().features
    write(kept(features=features | {"text": features["text"].flip(0)}, present={}), tmp_path / "g")
    assert compare() == ["best epoch 1 of 1)"]
    assert compare() == ["kept)"]
    (first, second) = (tmp_path / "cells").glob("*.json")
    options = config(data=str(tmp_path / "g"), epochs=1, model="distmult", method="uniform")
    for cell in (first, second):
        whole = cell.read_text()
        for damaged in (
            whole[:-9],
            whole.replace('"mrr": 0', '"mrr": 1'),
            "[]",
            "3",
            "",
            whole.replace('"epochs": 1', '"epochs": NaN'),
        ):
            cell.write_text(damaged)
            with pytest.raises(DataError, match="not a result of compare or grid; remove it to train this run again"):
                grid.kept(cell, options)
        cell.write_text(whole)
        assert grid.kept(cell, dataclasses.replace(options, checkpoint_every=3.0)) is not None
        with pytest.raises(DataError, match="not a result of compare"):
            grid.kept(cell, dataclasses.replace(options, seed=1))


def test_options_of_another_width_take_no_memory(folder: Path) -> None:
    """Not even where a file says so: the weights are looked at first."""
    path = folder / "r/config.yaml"
    whole = path.read_text()
    try:
        for change in ("dim: 1048576", "diffusion_steps: 99999999", f"seed: {1 << 64}"):
            path.write_text(re.sub(rf"^{change.partition(':')[0]}: .*$", change, whole, flags=re.MULTILINE))
            with pytest.raises(DataError, match=r"do not fit the model|config\.yaml:\d+: (diffusion_steps|seed): got"):
                load_run(folder / "r")
    finally:
        path.write_text(whole)


def test_metrics_that_are_none_are_named_when_a_run_is_packed(folder: Path, tmp_path: Path) -> None:
    path = folder / "r/metrics.json"
    whole = path.read_text()
    run = load_run(folder / "r")
    try:
        for content in (b"{", b"\xff", b"[" * 100_000):
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"metrics\.json: not the metrics of a run"):
                pack(run, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
    finally:
        path.write_text(whole)
