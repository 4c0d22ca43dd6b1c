"""The command line, in process: the whole way from a folder to answers, and one line for every bad input."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.training import SMALL, graph, triples
from jsonargparse import Namespace
from safetensors.torch import load_file, save_file

from dhns_fast import __version__, plots
from dhns_fast.catalogue import METHODS, MODELS
from dhns_fast.cli import commands, main
from dhns_fast.cli.commands import COMMANDS
from dhns_fast.cli.parser import build_parser, typed
from dhns_fast.data import TypeConstraints, load, write
from dhns_fast.ops import build
from dhns_fast.train import TrainConfig, Trainer, checkpoint, grid, run
from dhns_fast.train.trainer import Diverged

TRAIN = ["train", "--data", "g", *(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items())]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph `g` and a finished run `r` of it."""
    home = tmp_path_factory.mktemp("home")
    write(graph(), home / "g")
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main([*TRAIN, "--output", "r"]) == 0
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in `home`, without plots, which take longer than all the rest: (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(plots, "available", lambda: False)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def words(line: str) -> list[str]:
    return [word.replace("␣", " ") for word in line.split()]


def test_a_run_folder_holds_everything(home: Path, call: Call) -> None:
    folder = home / "r"
    assert {p.name for p in folder.iterdir()} >= {
        "best.safetensors",
        "config.yaml",
        "history.csv",
        "last.safetensors",
        "metrics.csv",
        "metrics.json",
    }
    assert not any(".tmp" in name or ".part" in name for name in files(home))
    assert TrainConfig.load(folder / "config.yaml") == TrainConfig(data=str(home / "g"), **SMALL)
    text = (folder / "config.yaml").read_text()
    assert "levels: null  # [0, 0, 0, 1, 3]\n" in text
    assert "fusion: null  # True\n" in text
    metrics = json.loads((folder / "metrics.json").read_text())
    code, out, err = call("evaluate", "--run", "r", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found.pop("openke") == metrics["trained"]["openke"]
    assert found == metrics["trained"]["test"]
    assert metrics["graph"] == {"name": "g", "entities": 60, "relations": 4, "report": []}
    assert (metrics["epochs"], metrics["ended"]) == (2, "all epochs")
    assert set(metrics["trained"]["by_relation"]) <= {"r0", "r1", "r2", "r3"}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["trained", "untrained", "relation frequency"]
    assert float(rows["trained"]["both.realistic.hits_at_10"]) == found["both.realistic.hits_at_10"]
    with (folder / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert max(float(row["valid_mrr"]) for row in history) == metrics["best_valid_mrr"]


def test_a_run_without_a_seen_test_entity_is_json(home: Path, call: Call) -> None:
    train = "".join(f"e{i % 20}\tr{i % 3}\te{i * 7 % 20}\n" for i in range(60))
    (home / "unseen").mkdir()
    for split, text in (("train", train), ("valid", train.split("\n")[0] + "\n"), ("test", "x\tr0\ty\ne1\tr1\tz\n")):
        (home / "unseen" / f"{split}.tsv").write_text(text)
    options = ("--data", "unseen", "--dim", "8", "--epochs", "1", "--method", "uniform", "--device", "cpu")
    assert call("train", *options, "--output", "of-unseen")[0] == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    metrics = json.loads((home / "of-unseen" / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["trained"]["entities_seen_in_train"] == {"triples": 0, "mrr": None}


def test_scores_that_overflow_are_no_reason_to_fail() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    plots._hierarchy(axis, {"positives": torch.tensor([torch.nan]), "level 0": torch.tensor([-torch.inf])}, {})
    assert axis.get_title() == "No score of positives or negatives is finite"
    plots._hierarchy(axis, {"positives": torch.randn(9), "level 0": torch.tensor([-torch.inf])}, {"level 0": 0.5})
    assert [label.get_text() for label in axis.get_xticklabels()] == ["positives"]
    pyplot.close(figure)


def test_plots_are_drawn(home: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = list((home / "r" / "plots").iterdir())
    assert {p.name for p in drawn} == {"training.png", "hierarchy.png", "attention.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and p.stat().st_size > 5000 for p in drawn)


def test_training_tells_what_it_does(call: Call) -> None:
    code, out, err = call(
        *TRAIN, "--output", "told", "--method", "uniform", "--epochs", "1", "--validation-from-train", "0.1"
    )
    assert (code, err) == (0, "")
    assert "note Validation: 10.0% of train held out (seed 0)" in out
    assert (
        "60 entities, 4 relations, 302/34/32 triples, modalities: image, text. complex (uniform, corrected), D 8" in out
    )
    assert re.search(r"epoch +1 .* kgc \d\.\d{4} .* valid MRR 0\.\d{4}", out)
    for name in ("trained", "untrained", "relation frequency"):
        assert re.search(rf"│ {name} +│ +32 │ 0\.\d{{4}} │", out)
    assert out.rstrip().endswith("Written to told")


def test_evaluate_prints_tables(call: Call) -> None:
    code, out, err = call("evaluate", "--run", "r", "--split", "valid")
    assert (code, err) == (0, "")
    for title in (
        "valid, filtered, both sides",
        "By rule for ties and side",
        "By relation category",
        "By relation, 4 most frequent of 4",
    ):
        assert title in out
    # Without ties every rule says the same; the frequencies of relations tie, and so do untrained features that repeat.
    assert re.search(r"│ (every|pessimistic) +│ tail │ 0\.\d{4}", out)


def test_every_command_that_trains_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    for name in COMMANDS:
        monkeypatch.setattr("dhns_fast.train.memory.keep_freed_memory", lambda name=name: kept.append(name))
        monkeypatch.setitem(COMMANDS, name, lambda *_: 0)
        assert commands.run(name, Namespace(), {}) == 0
    assert kept == ["train", "tune", "compare", "grid"]


def test_predict_marks_known_answers(home: Path, call: Call) -> None:
    h, r, t = (int(x) for x in graph().test[0])
    code, out, err = call("predict", "--run", "r", f"e{h}", f"#{r}", "?", "--top", "60")
    assert (code, err) == (0, "")
    assert re.search(rf"│ e{t} +│ +-?\d+\.\d{{3}} │ in test", out)
    code, out, _ = call("predict", "--run=r", f"E{h}", f"r{r}", "?", "--top=60", "--exclude-known")
    assert code == 0
    assert " in " not in out
    assert not re.search(rf"│ e{t} +│", out)
    assert len(re.findall(r"│ e\d+", call("predict", "--run", "r", "?", "r1", "e1")[1])) == 10
    assert len(re.findall(r"│ r\d+", call("predict", "--run", "r", "e2", "?", "e1")[1])) == 4


def test_many_queries_are_answered_by_one_call(home: Path, call: Call) -> None:
    kg = graph()
    (h, r, t), (_, r2, t2) = kg.test[:2].tolist()
    (home / "q.tsv").write_text(f"e{h}\tr{r}\t?\n?\t#{r2}\te{t2}\n\ne{h}\t?\te{t}\n")
    code, out, err = call("predict", "--run", "r", "--queries", "q.tsv", "--json", "--top", "5")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [item["query"] for item in found] == [
        {"head": f"e{h}", "relation": f"r{r}", "tail": "?"},
        {"head": "?", "relation": f"#{r2}", "tail": f"e{t2}"},
        {"head": f"e{h}", "relation": "?", "tail": f"e{t}"},
    ]
    assert [len(item["answers"]) for item in found] == [5, 5, 4]
    assert next(a["known"] for a in found[2]["answers"] if a["id"] == r) == "test"
    for item in found:
        assert item == json.loads(call("predict", "--run", "r", *item["query"].values(), "--json", "--top", "5")[1])[0]
        # The same figure as `score` gives to the completed triple.
        best = item["answers"][0]
        triple = [best["name"] if name == "?" else name for name in item["query"].values()]
        (home / "one.tsv").write_text("\t".join(triple) + "\n")
        code, out, err = call("score", "--run", "r", "--triples", "one.tsv")
        assert (code, err) == (0, "")
        assert out.rstrip("\n").split("\t")[:3] == triple
        assert float(out.split("\t")[3]) == pytest.approx(best["score"], rel=1e-4, abs=1e-5)
        assert json.loads(call("score", "--run", "r", "--triples", "one.tsv", "--json")[1])[0]["relation"] == triple[1]
    rows = list(
        csv.DictReader(io.StringIO(call("predict", "--run", "r", "--queries", "q.tsv", "--csv", "--top", "5")[1]))
    )
    assert len(rows) == 14
    assert rows[0]["name"] == found[0]["answers"][0]["name"]
    assert rows[0].keys() == {"head", "relation", "tail", "rank", "id", "name", "score", "known"}
    tables = call("predict", "--run", "r", "--queries", "q.tsv")[1]
    assert tables.count("answer") == 3


def test_triples_of_a_file_are_evaluated(home: Path, call: Call) -> None:
    kg = graph()
    (home / "t.tsv").write_text("".join(f"e{h}\tr{r}\te{t}\n" for h, r, t in kg.test.tolist()))
    assert json.loads(call("evaluate", "--run", "r", "--triples", "t.tsv", "--json")[1]) == json.loads(
        call("evaluate", "--run", "r", "--json")[1]
    )


def test_rivals_may_be_chosen_and_items_recommended(home: Path, call: Call) -> None:
    names = [f"e{i}" for i in range(60)]
    (home / "all.txt").write_text("\n".join(names) + "\n")
    said = json.loads(call("evaluate", "--run", "r", "--json")[1])
    assert json.loads(call("evaluate", "--run", "r", "--json", "--candidates", "all.txt")[1]) == said
    typed, raw = (
        json.loads(call("evaluate", "--run", "r", "--json", *more)[1])
        for more in (["--candidates", "types"], ["--raw"])
    )
    key = "both.realistic.arithmetic_mean_rank"
    assert typed[key] < said[key] < raw[key]
    (home / "few.txt").write_text("e1\ne2\n")
    code, _, err = call("evaluate", "--run", "r", "--candidates", "few.txt")
    assert (code, "candidates: got 2 without the head of triple [" in err) == (2, True)
    # OpenKE's file, by its path or beside the data: of the pseudo-types of train it says the same.
    code, _, err = call("evaluate", "--run", "r", "--candidates", "type_constrain")
    assert (code, f"got type_constrain, but {home}/g holds no type_constrain.txt; accepted: types" in err) == (2, True)
    kg = graph()
    types = TypeConstraints.of(kg.train, 60, 4)
    listed = [[r, len(x := types.members(r, side).tolist()), *x] for r in range(4) for side in ("head", "tail")]
    lines = ["4", *(" ".join(map(str, row)) for row in listed)]
    (home / "type_constrain.txt").write_text("\n".join(lines))
    shutil.copytree(home / "g", home / "typed")
    shutil.copy(home / "type_constrain.txt", home / "typed")
    for more in (["type_constrain.txt"], ["type_constrain", "--data", "typed"]):
        assert json.loads(call("evaluate", "--run", "r", "--json", "--candidates", *more)[1]) == typed
    (home / "type_constrain.txt").write_text("\n".join([*lines[:2], "0 1 60", *lines[3:]]))
    code, _, err = call("evaluate", "--run", "r", "--candidates", "type_constrain.txt")
    assert (code, "type_constrain.txt:3: entity 60 is out of range; accepted: 0 to 59" in err) == (2, True)
    code, out, err = call("evaluate", "--run", "r", "--relation", "r1", "--metrics", "recall@5,ndcg@5", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out).keys() == {"recall@5", "ndcg@5"}
    assert "ndcg@20" in call("evaluate", "--run", "r", "--relation", "r1")[1]
    assert call("evaluate", "--run", "r", "--relation", "r1", "--raw")[0] == 2


def test_a_run_moves_with_its_graph_or_in_one_file(home: Path, call: Call, tmp_path: Path) -> None:
    said = call("evaluate", "--run", "r", "--json")
    shutil.copytree(home / "r", tmp_path / "run")
    shutil.copytree(home / "g", tmp_path / "graph")
    assert (
        call("evaluate", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "graph"), "--device", "cpu", "--json")
        == said
    )
    code, out, err = call("pack", "--run", "r", "--output", str(tmp_path / "one.dhns"))
    assert (code, out, err) == (0, f"Written: {tmp_path}/one.dhns\n", "")
    shutil.rmtree(tmp_path / "graph")
    assert call("evaluate", "--run", str(tmp_path / "one.dhns"), "--json") == said
    code, _, err = call("evaluate", "--run", str(tmp_path / "one.dhns"), "--data", "g")
    assert (code, "accepted: nothing: " in err, "a packed run, which has its graph inside" in err) == (2, True, True)
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(str(home / "g"), str(tmp_path / "graph")))
    code, _, err = call("evaluate", "--run", str(tmp_path / "run"))
    assert (code, "where nothing is now; accepted: --data PATH" in err) == (2, True)
    assert call("sample", "--run", str(tmp_path / "one.dhns"), "e1", "r1", "e2") == call(
        "sample", "--run", "r", "e1", "r1", "e2"
    )
    (tmp_path / "one.dhns").write_bytes((tmp_path / "one.dhns").read_bytes()[:-9])
    code, _, err = call("evaluate", "--run", str(tmp_path / "one.dhns"))
    assert (code, err.count("\n")) == (2, 1)
    card = (home / "r" / "MODEL_CARD.md").read_text()
    assert "# ComplEx on g" in card
    assert f"| trained | {json.loads(said[1])['both.realistic.inverse_harmonic_mean_rank']:.4f} |" in card


def test_epochs_are_logged_while_they_pass(home: Path, call: Call) -> None:
    pytest.importorskip("tensorboard")
    assert call(*TRAIN, "--output", "logged", "--method", "uniform", "--log", "csv,tensorboard")[::2] == (0, "")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(home / "logged" / "events")).Reload()
    with (home / "logged" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [e.value for e in events.Scalars("loss/kgc")] == pytest.approx([float(row["loss_kgc"]) for row in rows])
    assert [e.step for e in events.Scalars("valid/mrr")] == [1, 2]


def test_tuning_continues(home: Path, call: Call) -> None:
    pytest.importorskip("optuna")
    (home / "space.yaml").write_text("learning_rate: {low: 0.001, high: 0.1, log: true}\nnum_negatives: [2, 8]\n")
    line = ["tune", *TRAIN[1:], "--method", "uniform", "--epochs", "1", "--space", "space.yaml", "--output", "tuned"]
    code, out, err = call(*line, "--trials", "2")
    assert (code, err) == (0, "")
    assert out.count("valid MRR 0.") == 2
    assert "train with: dhns-fast train --config tuned/best.yaml" in out
    assert call(*line, "--trials", "3")[1].count("valid MRR 0.") == 1
    with (home / "tuned" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["valid_mrr"]))
    config = TrainConfig.load(home / "tuned" / "best.yaml")
    assert config.data == str((home / "g").resolve())
    assert (config.learning_rate, config.num_negatives) == (float(best["learning_rate"]), int(best["num_negatives"]))
    for space, message in (
        ("learning_rate: 3\n", "learning_rate: got 3; accepted: a list of choices"),
        ("learning_rat: [3]\n", "option: got 'learning_rat'; accepted: data, "),
        ("learning_rat: [3]\n", "(did you mean 'learning_rate'?)"),
        ("mu: {low: 3, high: 0.3}\n", "accepted: numbers, low below high, and above 0 with log: true"),
        ("mu: {low: 0, high: 0.3, log: true}\n", "accepted: numbers, low below high, and above 0 with log: true"),
        ("model: [complex, distmul]\n", "model: got 'distmul'"),
        ("num_negatives: {low: 0, high: 9}\n", "num_negatives: got 0"),
    ):
        (home / "space.yaml").write_text(space)
        code, out, err = call(*line[:-1], "not-tuned")
        assert (code, out, message in err, (home / "not-tuned").exists()) == (2, "", True, False)


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="needs shtab")
def test_shells_complete_options(call: Call) -> None:
    code, out, err = call("completion", "bash")
    assert (code, err) == (0, "")
    script = (
        f"{out}\nCOMP_WORDS=(dhns-fast train --validation-f); COMP_CWORD=2; _shtab_dhns_fast; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--validation-from-train"], done.stderr


def test_sample_names_what_is_near(call: Call) -> None:
    first = call("sample", "--run", "r", "e1", "r1", "e2", "--top", "2")
    assert (first[0], first[2]) == (0, "")
    # Levels of weight > 0, twice a side; two entities each.
    assert len(re.findall(r"│ \d +│ (?:head|tail) +│ e\d+ \(\d+\.\d\d\), e\d+ \(\d+\.\d\d\)", first[1])) == 8
    assert call("sample", "--run", "r", "e1", "r1", "e2", "--top", "2") == first
    assert call("sample", "--run", "r", "e1", "r1", "e2", "--top", "2", "--seed", "1")[1] != first[1]


def test_data_describes_and_exports(home: Path, call: Call) -> None:
    code, out, err = call("data", "--data", "g", "--export", "copy")
    assert (code, err) == (0, "")
    assert "g: 60 entities, 4 relations" in out
    assert "modality text: 6 columns, 54 of 60 entities" in out
    assert "splits: clean" in out
    copy, kg = load(home / "copy"), graph()
    assert torch.equal(copy.train, kg.train)
    assert torch.equal(copy.features["image"], kg.features["image"])
    write(graph(valid=torch.cat([kg.valid, kg.train[:9]])), home / "dirty")
    assert "note valid is contaminated" in call("data", "--data", "dirty")[1]


def test_data_and_convert_write_what_is_mapped(home: Path, call: Call) -> None:
    code, out, err = call("data", "--data", "g", "--convert", "mapped", "--half")
    assert (code, err) == (0, "")
    assert "mapped: 60 entities, 4 relations" in out
    assert "Written to mapped" in out
    assert load(home / "mapped").features["image"].dtype == torch.float16
    assert call("convert", "g", "mapped")[2].startswith(
        "dhns-fast convert: error: target: got 'mapped', which is not empty; accepted: a new folder"
    )
    assert call("convert", "g", "again")[0] == 0
    assert load(home / "again").fingerprint() == load(home / "g").fingerprint()
    (home / "one.tsv").write_text("".join(f"a{i % 9}\tr\tb{i % 7}\n" for i in range(60)))
    for seed in ("0", "01"):
        assert call("convert", "one.tsv", f"one-{seed}", "--seed", seed)[0] == 0
    assert load(home / "one-01").fingerprint() == load(home / "one.tsv", seed=1).fingerprint()
    assert load(home / "one-0").fingerprint()["triples"] != load(home / "one-01").fingerprint()["triples"]
    (home / "v.pkl").write_bytes(pickle.dumps({"e1": np.ones(3)}))
    assert "accepted: --allow-pickle" in call("convert", "v.pkl", "v.safetensors")[2]
    code, out, err = call("convert", "v.pkl", "v.safetensors", "--allow-pickle")
    assert (code, err) == (0, "")
    assert "note v.pkl is unpickled" in out
    assert "Written to v.safetensors" in out
    code, out, _ = call("data", "--data", "synthetic:entities=50,relations=2,triples=300")
    assert "synthetic: 50 entities, 2 relations" in out


def test_numbers_are_decimal() -> None:
    parser = build_parser()
    line = "train --epochs 010 --seed=+07 --mu 1e-1 --levels 010,020 --level-weights [1,.5] --level-margins=0.5,+09"
    options = parser.parse_args(typed(parser, line.split())).train
    assert [options[name] for name in ("epochs", "seed", "mu", "levels", "level_weights", "level_margins")] == [
        10, 7, 0.1, [10.0, 20.0], [1.0, 0.5], [0.5, 9.0],
    ]  # fmt: skip


def test_a_comma_may_belong_to_a_synthetic_graph() -> None:
    from dhns_fast.cli.commands import _names

    names = ["g", "synthetic:entities=5,relations=1,triples=4, seed=1", "atlas"]
    assert _names(",".join(names)) == names
    assert _names("[a, b]") == ["a", "b"]


def test_doctor_and_version(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DHNS_FAST_BACKEND", "warp")
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["yes torch"].startswith(torch.__version__)
    assert lines["yes dhns-fast"].startswith(__version__)
    assert lines["no  DHNS_FAST_BACKEND"] == "set to 'warp'; accepted are auto, triton, cuda, cpu, eager"
    assert ("yes CUDA" in lines) == torch.cuda.is_available()
    assert call("--version") == (0, f"dhns-fast {__version__}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_options_as_they_are_typed(call: Call, command: str) -> None:
    code, out, err = call(*([command] if command else []), "--help")
    assert (code, err) == (0, "")
    assert re.findall(r"(?m)^ *(--\S*_\S*)", out) == []
    if command in ("train", "compare"):
        assert "--validation-from-train" in out


def test_compare_trains_once(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [
        "compare",
        *TRAIN[1:],
        "--epochs",
        "1",
        "--models",
        "distmult, transe",
        "--methods",
        "uniform,dhns-release",
        "--seeds",
        "2",
        "--output",
        "cmp",
    ]
    code, out, err = call(*line)
    assert (code, err) == (0, "")
    assert len(re.findall(r"(?m)^(?:distmult|transe)-\S+-seed[01]: MRR .*\(best epoch 1 of 1\)", out)) == 8
    table = re.findall(r"│ (distmult|transe) +│ (uniform|dhns-release) +│ (\d\.\d{4}) ± (\d\.\d{4})", out)
    assert [(m, how) for m, how, *_ in table] == [
        (m, how) for m in ("distmult", "transe") for how in ("uniform", "dhns-release")
    ]
    with (home / "cmp" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mrr = [float(row["mrr"]) for row in rows if (row["model"], row["method"]) == ("transe", "uniform")]
    assert table[2][2:] == (f"{sum(mrr) / 2:.4f}", f"{abs(mrr[0] - mrr[1]) / 2**0.5:.4f}")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "fit", refuse)
    code, again, _ = call(*line)
    assert code == 0
    assert again.count("(kept)") == 8
    assert re.findall(r"│ .* ± .*", again) == re.findall(r"│ .* ± .*", out)
    # What is trained with other options is another run, and a damaged result is named.
    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = call(*line, "--mu", "0.5")
    assert (code, err) == (
        130,
        "dhns-fast compare: interrupted; finished runs are kept in cmp, the same command continues\n",
    )
    damaged = next((home / "cmp").glob("*.json"))
    damaged.write_text("{")
    code, _, err = call(*line)
    assert (code, err) == (
        2,
        f"dhns-fast compare: error: cmp/{damaged.name}: not a result of compare or grid; remove it to train this run again\n",
    )


def test_a_single_seed_has_no_spread() -> None:
    row = grid.Row("atlas", "transe", "dhns", {0: {"mrr": 0.25, "epoch_seconds": 2.0}})
    assert (row.text("mrr"), row.seconds) == ("0.2500", 2.0)
    empty = grid.Row("atlas", "transe", "dhns")
    assert (empty.text("mrr"), empty.seconds) == ("–", None)


def test_a_grid_ends_with_its_budget_and_goes_on(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--epochs",
        "1",
        "--models",
        "distmult",
        "--methods",
        "uniform,self-adversarial",
        "--seeds",
        "2",
        "--output",
        "grid",
    ]
    train, clock = grid._train, [0.0]

    def slow(config: TrainConfig, path: Path) -> dict[str, float]:
        clock[0] += 60
        return train(config, path) | {"seconds": 60.0}

    monkeypatch.setattr(grid, "_train", slow)
    monkeypatch.setattr(grid.time, "monotonic", lambda: clock[0])
    shutil.copytree(home / "g", home / "other")
    line = ["grid", *TRAIN[1:], "--data", "g, other", *options]
    code, out, err = call(*line, "--budget", "5m")
    assert (code, err) == (0, "")
    assert out.count("left out, no time") == 3
    # Seed by seed: every row has its first before one has its second.
    assert re.findall(r"│ (g|other) +│ distmult +│ (\S+) +│.* (\d) +│ +\d+\.\d\d │", out) == [
        ("g", "uniform", "2"), ("g", "self-adversarial", "1"), ("other", "uniform", "1"), ("other", "self-adversarial", "1"),
    ]  # fmt: skip
    code, out, _ = call(*line, "--budget", "1h")
    assert code == 0
    assert out.count("(kept)") == 5
    with (home / "grid" / "grid.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((r["data"], r["method"], r["seed"]) for r in rows) == [
        (data, method, seed) for data in ("g", "other") for method in ("self-adversarial", "uniform") for seed in "01"
    ]

    def diverge(config: TrainConfig, path: Path) -> dict[str, float]:
        raise Diverged("loss_kgc is nan in step 3")

    monkeypatch.setattr(grid, "_train", diverge)
    code, out, _ = call(*line, "--mu", "0.5")
    assert code == 0
    assert out.count("loss_kgc is nan in step 3") == 8
    assert len(re.findall(r"│ +– │ +– │ +– │ +0 │ +– │", out)) == 4


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200), (" 3s ", 3)])
def test_times(text: str, seconds: float) -> None:
    assert grid.seconds_of(text) == seconds


def test_options_of_a_file_and_of_the_command_line(home: Path, call: Call) -> None:
    (home / "c.yaml").write_text("data: g\ndim: 8\nepochs: 3\nmethod: uniform\nlearning_rate: 1e-2\nbatch_size: 100\n")
    code, _, err = call(
        "train", "--config", "c.yaml", "--epochs", "1", "--output", "from-file", "--level-weights", "[1,1,1,1,0]"
    )
    assert (code, err) == (0, "")
    expected = TrainConfig(
        data=str(home / "g"),
        dim=8,
        epochs=1,
        method="uniform",
        learning_rate=0.01,
        batch_size=100,
        level_weights=[1.0, 1.0, 1.0, 1.0, 0.0],
    )
    assert TrainConfig.load(home / "from-file" / "config.yaml") == expected


def test_resume_may_raise_epochs(home: Path, call: Call) -> None:
    line = [*TRAIN, "--method", "self-adversarial"]
    assert call(*line, "--epochs", "1", "--output", "short")[0] == 0
    assert call(*line, "--epochs", "2", "--output", "long")[0] == 0
    code, out, err = call("train", "--resume", "short", "--epochs=2")
    assert (code, err) == (0, "")
    assert "Written to short" in out
    code, _, err = call("train", "--resume", "short", "--epochs=1")
    assert (code, err) == (2, "dhns-fast train: error: --epochs: got 1; accepted: 2, which short has done, or more\n")
    a, b = (load_file(home / name / "last.safetensors") for name in ("short", "long"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert TrainConfig.load(home / "short" / "config.yaml").epochs == 2


def test_a_run_of_another_machine_goes_on_here(home: Path, call: Call) -> None:
    """Its options name a GPU; its random numbers are of one, so they begin anew, from the seed and the step."""
    assert call(*TRAIN, "--epochs", "1", "--output", "cpu")[0] == 0
    shutil.copytree(home / "cpu", home / "gpu")
    text = (home / "gpu/config.yaml").read_text()
    for old, new in (("device: cpu", "device: cuda:1"), ("precision: null", "precision: tf32"), ("backend: null", "backend: cuda")):  # fmt: skip
        assert f"\n{old}" in text
        text = text.replace(f"\n{old}", f"\n{new}")
    (home / "gpu/config.yaml").write_text(text)
    path = home / "gpu/last.safetensors"
    tensors, meta = checkpoint.load(path, load(home / "g").fingerprint())
    checkpoint.save(path, tensors | {"rng": torch.zeros(16, dtype=torch.uint8)}, meta | {"device": "cuda"})
    shutil.copytree(home / "gpu", home / "gpu2")
    if not torch.cuda.is_available():
        assert "device: got 'cuda:1'; accepted: auto, cpu" in call("train", "--resume", "gpu", "--epochs", "2")[2]
    here = ("--device", "cpu", "--precision", "ieee", "--backend", "eager", "--epochs", "2")
    for folder in ("gpu", "gpu2"):
        assert call("train", "--resume", folder, *here)[::2] == (0, "")
    for name in ("last", "best"):
        paths = [home / folder / f"{name}.safetensors" for folder in ("gpu", "gpu2")]
        one, two = (checkpoint.load(path, load(home / "g").fingerprint())[0] for path in paths)
        assert all(torch.equal(one[key], two[key]) for key in one)
    config = TrainConfig.load(home / "gpu/config.yaml")
    assert (config.device, config.precision, config.backend, config.epochs) == ("cpu", "ieee", "eager", 2)
    assert call("evaluate", "--run", "gpu")[0] == 0


def test_names_are_printed_as_they_are(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"[red]:smile: e{i} [/x] \\[" for i in range(60)]
    write(graph(entity_names=names, relation_names=["[bold]a", "[/]", "c", "d"]), home / "[odd] g")
    code, out, err = call(*TRAIN, "--data", "[odd] g", "--output", "[b]run[/b]", "--epochs", "1", "--method", "uniform")
    assert (code, err) == (0, "")
    assert "[odd] g: 60 entities" in out
    assert "Written to [b]run[/b]" in out
    code, out, err = call("predict", "--run", "[b]run[/b]", names[3], "[/]", "?", "--top", "60")
    assert (code, err) == (0, "")
    assert f"({names[3]}, [/], ?)" in out
    assert all(name in out for name in names)
    assert "[bold]a" in call("evaluate", "--run", "[b]run[/b]", "--split", "train")[1]
    # An encoding that lacks a letter of a name is no reason to fail.
    write(graph(relation_names=["a", "b", "c", "größer"]), home / "letters")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["data", "--data", "letters"]) == 0
    assert main([*TRAIN, "--data", "letters", "--output", "lettered", "--epochs", "1", "--method", "uniform"]) == 0
    assert main(["evaluate", "--run", "lettered", "--split", "train"]) == 0
    stdout.flush()
    assert b"gr??er" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


# What stands in `home` for the errors below: file name -> content.
BROKEN = {
    "afile": "x",
    "badq": "?\tr1\te2\n?\tr1\te99\n",
    "badq3": "e1\tr1\n",
    "unknown.yaml": "dim: 8\nepohcs: 3\n",
    "syntax.yaml": "dim: 8\nlevels: [1\n",
    "type.yaml": "data: g\n\ndim: eight\n",
    "value.yaml": "data: g\nepochs: 0\n",
    "notrun/config.yaml": "data: g\ndim: 8\nmodel: nonsense\n",
    "unfinished/config.yaml": "data: g\ndim: 8\n",
    "moved/config.yaml": "data: gone\n",
    "ke/train2id.txt": "2\n0 1 0\n1 0\n",
    "ke/valid2id.txt": "0\n",
    "ke/test2id.txt": "0\n",
    "ke/entity2id.txt": "2\na 0\nb 1\n",
    "ke/relation2id.txt": "1\nr 0\n",
    "two/train.tsv": "a\tr\tb\na\tr\n",
}
ERRORS = [
    ("", 'expected "command" to be one of {train,evaluate,predict,sample,score, ...}'),
    ("nonsense", "argument COMMAND: invalid choice: 'nonsense'"),
    ("train --nonsense 3", "unrecognized arguments: --nonsense 3 (see"),
    ("train --epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs? (see"),
    ("grid --seed 3", "unrecognized arguments: --seed 3; did you mean --seeds? (see"),
    ("train --learnin-rate=3", "did you mean --learning-rate?"),
    ("trian", "invalid choice: 'trian'"),
    ("trian", "did you mean train?"),
    ("train --model complx", "did you mean complex?"),
    ("train --data g --log csv,wandb", "log: got 'wandb'; accepted: csv, tensorboard"),
    ("train --data g --levels 0,x", "--levels: "),
    ("train extra", "unrecognized arguments: extra"),
    ("train --dim", "argument --dim: expected one argument"),
    ("train --dim eight", "--dim: Expected int. Got value: eight"),
    ("train --epochs 1_0", "--epochs: Expected int. Got value: 1_0 (see"),
    ("train --seed=0x10", "--seed: Expected int. Got value: 0x10 (see"),
    ("train --margin 1:30", "--margin: Expected float, null. Got value: "),
    ("train --levels [0,1_0]", "--levels: Expected list[float], null. Got value: "),
    ("tune --trials 1_0", "--trials: Expected positive integer. Got value: 1_0 (see"),
    ("tune --trials -3", "--trials: Expected positive integer. Got value: -3 (see"),
    ("grid --data g --mus 1_0", "mus: got '1_0'; accepted: numbers separated by commas"),
    ("convert g x --seeds 1", "unrecognized arguments: --seeds 1; did you mean --seed? (see"),
    ("convert g x --epochs 1", "unrecognized arguments: --epochs 1 (see"),
    ("train --learning-rate x", "--learning-rate: Expected float. Got value: x"),
    ("train --margin x", "--margin: Expected float, null. Got value: x"),
    ("train --level-weights x", "--level-weights: Expected list"),
    ("train --model conve", f"--model: Expected one of {', '.join(map(repr, MODELS))}. "),
    ("train --data g --model pairre", "method: got 'dhns'; accepted: uniform, self-adversarial, nscaching, "),
    ("train --loss hinge", "--loss: Expected one of 'corruption', 'one-vs-all'. Got value: hinge"),
    ("train --norm 3", "--norm: Expected one of 1, 2. Got value: 3"),
    ("train --data g --dim 7", "dim: got 7; accepted: multiples of 2 for model complex and method dhns"),
    ("train --data g --epochs 0", "epochs: got 0; accepted: 1 or more"),
    (
        "train --data g --levels 0,1",
        "level_weights: got [0.0, 0.5, 1.0, 1.0, 0.5]; accepted: one value for each of the 2 levels [0, 1]",
    ),
    (
        "train --data nowhere",
        "data: got 'nowhere', which does not exist; accepted: a folder, a file of triples, synthetic:…, or one of atlas",
    ),
    ("train --data afile", "afile:1: found 1 columns, 'x'; accepted: three names, `head<TAB>relation<TAB>tail`"),
    ("train --data empty", "empty: holds no data set; found no files; looked for graph.json (converted); train2id.txt"),
    ("train --data ke", "ke/train2id.txt:3: "),
    ("train --data two", "two/train.tsv:2: found 2 columns"),
    ("train --data nan", "nan/text.npy: found nan in row 3, column 2; accepted: finite numbers up to 1e+15"),
    ("train --data rows", "rows/text.npy: found 59 rows; accepted: 60, one an entity"),
    ("train --data notrain", "notrain: train holds no triples"),
    ("train --data g --features sound", "features: got 'sound', which is not in g; accepted: image, text"),
    ("train --data g --device cuda:77", "device: got 'cuda:77'; accepted: auto, cpu"),
    ("train --data g --device warp", "device: got 'warp'; accepted: auto, cpu (a device of another kind)"),
    ("train --data g --margin -9 --model transe", "margin: got -9.0; accepted: numbers above -epsilon, -2.0"),
    (
        "train --data g --output r",
        "output: got 'r', which holds a run; accepted: a new folder; --resume r continues the run",
    ),
    ("train --data g --output g", "output: got 'g', which is not empty; accepted: a new folder"),
    ("train --data g --output afile", "output: got 'afile', a file; accepted: a new folder"),
    (
        "train --data g --output afile/run",
        "folder: got 'afile/run', which cannot be created or written to (Not a directory)",
    ),
    ("train --resume r --dim 8", "--resume: got r and --dim; accepted: the options of r/config.yaml and --epochs"),
    ("train --resume r --config c.yaml --level-weights=[1]", "--resume: got r and --config, --level-weights; accepted"),
    (
        "train --resume nowhere",
        "nowhere: does not exist; accepted: the folder of a run, or a file that `dhns-fast pack` made",
    ),
    ("train --resume r --epochs 0", "epochs: got 0; accepted: 1 or more"),
    ("train --resume unfinished", "unfinished/last.safetensors: no such checkpoint"),
    ("train --config nowhere.yaml", "nowhere.yaml: cannot be read (No such file or directory)"),
    ("train --config empty", "empty: cannot be read (Is a directory)"),
    ("train --config unknown.yaml", "unknown.yaml:2: option: got 'epohcs'; accepted: data, features, "),
    ("train --config syntax.yaml", "syntax.yaml:3: not valid YAML ("),
    ("train --config type.yaml", "type.yaml:3: dim: got 'eight'; accepted: integers"),
    ("train --config value.yaml", "value.yaml:2: epochs: got 0; accepted: 1 or more"),
    ("train --config value.yaml --epochs 1 --dim 3", "dim: got 3; accepted: 4 or more"),
    ("evaluate", "dhns-fast evaluate: error: the following arguments are required: --run"),
    (
        "sample --run r",
        "dhns-fast sample: error: the following arguments are required: head, relation, tail (see dhns-",
    ),
    ("score --run r", "dhns-fast score: error: the following arguments are required: --triples (see dhns-fast score"),
    ("plan", "dhns-fast plan: error: the following arguments are required: --entities, --relations (see"),
    (
        "evaluate --run nowhere",
        "nowhere: does not exist; accepted: the folder of a run, or a file that `dhns-fast pack` made",
    ),
    (
        "evaluate --run r --candidates typs",
        "candidates: got 'typs', which does not exist; accepted: types, type_constrain, the path of a type_constrain.txt",
    ),
    ("evaluate --run r --relation x", "relation: got 'x'; accepted: names of the graph: r0, r1, r2, r3"),
    ("evaluate --run r --relation r1 --metrics hits@10", "recall@k:gde (did you mean 'hit@k'?)"),
    ("evaluate --run g", "g: not a run folder (it holds no config.yaml)"),
    ("evaluate --run notrun", f"notrun/config.yaml:3: model: got 'nonsense'; accepted: {', '.join(MODELS)}"),
    ("evaluate --run unfinished", "unfinished/best.safetensors: no such checkpoint"),
    ("evaluate --run moved", "data: got 'gone', which does not exist"),
    ("evaluate --run r --split dev", "--split: Expected one of 'train', 'valid', 'test'. Got value: dev"),
    ("evaluate --run r --json yes", "unrecognized arguments: yes"),
    ("predict --run r e1", "triple: got e1; accepted: head, relation and tail with one '?', or --queries FILE"),
    ("predict --run r", "triple: got none; accepted: head,"),
    ("predict --run r e1 r1 ? --queries q", "triple: got e1 r1 ?; accepted: head,"),
    ("predict --run r --queries nowhere", "nowhere: cannot be read"),
    ("predict --run r --queries badq", "badq:2: tail: got 'e99'; accepted: names of the graph; similar"),
    (
        "predict --run r --queries badq3",
        "badq3:1: found 'e1\\tr1'; accepted: head, relation and tail of which 1 is '?'",
    ),
    (
        "score --run r --triples badq",
        "badq:1: found '?\\tr1\\te2'; accepted: head, relation and tail, none of them '?' (an unknown), tabs between them",
    ),
    ("export --run r --to npz --output n", "--to: Expected one of 'npy'"),
    ("export --run r --output afile", "folder: got 'afile', which cannot be created"),
    ("pack --run g --output n", "g: not a run folder"),
    ("predict --run r e1 r1 e2", "triple: got (e1, r1, e2); accepted: exactly one '?' in it"),
    ("predict --run r e99 r1 ?", "head: got 'e99'; accepted: names of the graph; similar: e9, e59, e49"),
    ("predict --run r e9 belongs␣to ?", "relation: got 'belongs to'; accepted: names of the graph: r0, r1, r2, r3"),
    ("predict --run r e9 r1 ? --top 0", "--top: "),
    ("sample --run r e1 r1 ?", "tail: got '?'; accepted: names"),
    (
        "sample --run plain e1 r1 e2",
        "run: got plain, trained with method 'uniform', which has no generator; accepted: a run of method 'dhns'",
    ),
    ("data --data nowhere", "data: got 'nowhere', which does not exist"),
    ("data --data g --export afile", "folder: got 'afile', which cannot be created or written to (File exists)"),
    ("compare --data g --models conve --output n", f"models: got 'conve'; accepted: {', '.join(MODELS)}"),
    (
        "compare --data g --methods dhns,x --output n",
        f"methods: got 'x'; accepted: {', '.join(METHODS)}; a behaviour may follow a hyphen",
    ),
    ("compare --data g --seeds 0 --output n", "--seeds: "),
    ("compare --data g --model transe --output n", "unrecognized arguments: --model transe"),
    ("compare --data nowhere --output n", "data: got 'nowhere', which does not exist"),
    (
        "compare --data g --models transe --dim 9 --output n",
        "dim: got 9; accepted: multiples of 2 for model complex and method dhns",
    ),
    ("compare --data g --device warp --output n", "device: got 'warp'; accepted: auto, cpu"),
    ("grid --data g,nowhere --output n", "data: got 'nowhere', which does not exist"),
    ("grid --data g --budget soon --output n", "budget: got 'soon'; accepted: a time such as 90s, 30m or 2h"),
    ("compare --data notest --output n", "data: got 'notest'; accepted: a graph with test triples to compare on"),
    ("compare --data g --output afile", "folder: got 'afile', which cannot be created or written to (File exists)"),
    ("doctor --deep", "unrecognized arguments: --deep"),
]


@pytest.fixture(scope="module")
def broken(home: Path) -> Path:
    for name, content in BROKEN.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(content)
    (home / "empty").mkdir()
    kg = graph(features={}, present={})
    for name, matrix in {
        "nan": np.where(np.arange(60 * 3).reshape(60, 3) == 11, np.nan, 1.0),
        "rows": np.ones((59, 3)),
    }.items():
        np.save(write(kg, home / name) / "text.npy", matrix)
    write(graph(train=triples(), features={}, present={}), home / "notrain")
    write(graph(test=triples(), features={}, present={}), home / "notest")
    run.new_folder(str(home / "plain"), TrainConfig())
    trainer = Trainer(TrainConfig(data=str(home / "g"), method="uniform", **SMALL), load(home / "g"), home / "plain")
    trainer.config.save(home / "plain" / "config.yaml")
    trainer._keep_best()
    return home


@pytest.mark.parametrize(("line", "message"), ERRORS, ids=[line for line, _ in ERRORS])
def test_bad_input_is_one_line_and_exit_code_2(broken: Path, call: Call, line: str, message: str) -> None:
    before = files(broken)
    code, out, err = call(*words(line))
    assert err.count("\n") == 1, err
    assert re.match(r"dhns-fast(?: [a-z]+)?: error: ", err)
    assert message in err
    assert "Traceback" not in err
    assert (code, out) == (2, "")
    assert files(broken) == before


PATHS = (
    "evaluate --run", "evaluate --run r --triples", "evaluate --run r --candidates",
    "predict --run r --queries", "export --run r --output", "pack --run r --output", "train --config", "train --resume", "train --data g --output",
    "tune --space", "data --data g --export", "data --data g --convert", "convert", "compare --data g --output",
)  # fmt: skip


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin"], ["stdin", "stdout", "stderr"]], ids=len)
def test_closed_streams_are_no_reason_to_fail(call: Call, monkeypatch: pytest.MonkeyPatch, closed: list[str]) -> None:
    for line, expected in (
        ("predict --run r e1 r1 ?", 0), ("predict --run r e1 r1 ? --csv", 0), ("evaluate --run r --json", 0), ("data --data nowhere", 2),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            for name in closed:
                patched.setattr(sys, name, None)
            assert main(words(line)) == expected, line
            for name in closed:
                # Nothing is left for Python to warn of at its end.
                assert not getattr(sys, name).buffer.raw.closefd


def test_paths_that_nobody_can_use(broken: Path, call: Call) -> None:
    (broken / "loop").symlink_to("loop")
    before = files(broken)
    bad = ("x" * 5000, "a\0b", "loop", "~nobody-of-this-name/x", "")
    for i, line in enumerate(PATHS):
        asked = [*words(line), bad[i % len(bad)], *["n"] * (line == "convert")]
        code, out, err = call(*asked)
        assert (code, out) == (2, ""), (line, out, err)
        assert err.count("\n") == 1, (line, err)
        assert len(err) < 400, (line, err)
        assert "accepted: a path" in err, (line, err)
    assert files(broken) == before
    (broken / "loop").unlink()


def test_homes_are_expanded_in_every_option(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell does it in --run=~/r."""
    monkeypatch.setenv("DHNS_FAST_CACHE", str(build.cache_folder()))
    monkeypatch.setenv("HOME", str(home))
    (home / "two triples").write_text("e1\tr1\te2\ne3\tr0\te4\n")
    (home / "asked").write_text("e1\tr1\t?\n")
    (home / "some").write_text("".join(f"e{i}\n" for i in range(60)))
    before = files(home)
    for line in (
        "evaluate --run=~/r/ --data=~/g --triples=~/two␣triples --candidates=~/some", "predict --run ~/r --queries=~/asked",
        "export --run=~/r --output=~/new/arrays", "pack --run=~/r --output=~/new/one",
        "data --data=~/g --export=~/new/tsv", "convert ~/g ~/new/mapped",
    ):  # fmt: skip
        code, _, err = call(*words(line))
        assert (code, err) == (0, ""), (line, err)
    made = {name.removeprefix("new/") for name in files(home) if name not in before}
    assert {"new", "arrays/entities.npy", "one", "tsv/train.tsv", "mapped/graph.json"} <= made
    assert call("evaluate", "--run=~/new/one", "--json") == call("evaluate", "--run", "r", "--json")
    code, _, err = call("evaluate", "--run", "r/best.safetensors")
    assert code == 2
    assert "a checkpoint without its graph; accepted: the run's folder, or a file of `dhns-fast pack`" in err
    code, _, err = call("pack", "--run", "r", "--output", "g")
    assert (code, "output: got 'g', a folder; accepted: the name of a file" in err) == (2, True)


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [("nonsense", 2, "DHNS_FAST_BACKEND: got 'nonsense'; accepted: auto"), ("cuda", 1, "backend 'cuda': ")],
)
def test_a_backend_that_is_not_there(
    broken: Path, call: Call, monkeypatch: pytest.MonkeyPatch, value: str, code: int, message: str
) -> None:
    before = files(broken)
    monkeypatch.setenv("DHNS_FAST_BACKEND", value)
    found, _, err = call(*TRAIN, "--output", "n")
    assert (found, err.count("\n")) == (code, 1)
    assert message in err
    assert files(broken) == before


def test_a_wrong_environment_is_no_fault_of_a_run(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("pack", "--run", "r", "--output", "packed.dhns")[0] == 0
    monkeypatch.setenv("DHNS_FAST_BACKEND", "nope")
    for run_of in ("r", "packed.dhns"):
        code, _, err = call("evaluate", "--run", run_of)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("dhns-fast evaluate: error: DHNS_FAST_BACKEND: got 'nope'; accepted: auto")
    (home / "packed.dhns").unlink()


def test_a_wrong_instruction_set_leaves_no_folder(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DHNS_FAST_ISA", "nope")
    for command in ((*TRAIN, "--output", "nowhere"), ("build",)):
        code, _, err = call(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "error: DHNS_FAST_ISA: got 'nope'; accepted: baseline, avx2, avx512, avx512_bf16" in err
    assert not (home / "nowhere").exists()


def test_the_eager_backend_trains(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DHNS_FAST_BACKEND", "eager")
    assert call(*TRAIN, "--epochs", "1", "--output", "eager")[::2] == (0, "")


def test_without_matplotlib_there_is_a_note(home: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = call(*TRAIN, "--epochs", "1", "--method", "uniform", "--output", "unplotted")
    assert (code, err) == (0, "")
    assert "note no plots: matplotlib cannot be imported (pip install 'dhns-fast[plot]')" in out
    assert not (home / "unplotted" / "plots").exists()


def test_other_errors_are_one_line_and_exit_code_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    error: BaseException = ZeroDivisionError("of a\n test")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(run, "load_run", fail)
    assert call("evaluate", "--run", "r") == (
        1,
        "",
        "dhns-fast evaluate: ZeroDivisionError: of a test (DHNS_FAST_DEBUG=1 shows where)\n",
    )
    monkeypatch.setenv("DHNS_FAST_DEBUG", "1")
    assert "Traceback" in call("evaluate", "--run", "r")[2]
    error = KeyboardInterrupt()
    assert call("evaluate", "--run", "r") == (130, "", "dhns-fast evaluate: interrupted\n")


def test_divergence_is_exit_code_1(call: Call) -> None:
    code, _, err = call(
        *TRAIN, "--output", "diverged", "--model", "distmult", "--learning-rate", "1e30", "--epochs", "9"
    )
    assert code == 1
    assert re.fullmatch(r"dhns-fast train: step \d+ \(epoch \d+\): term '\w+' is not finite.*\n", err)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("during", ["training", "evaluation", "plots"])
def test_ctrl_c_says_what_is_saved(call: Call, home: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    """SIGINT is sent by the program to itself, at a place where it knows to be."""
    target, name = {"training": (Trainer, "step"), "evaluation": (run, "baselines"), "plots": (plots, "draw_all")}[
        during
    ]
    monkeypatch.setattr(plots, "available", lambda: during == "plots")
    original = getattr(target, name)

    def interrupt(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(target, name, interrupt)
    before = signal.getsignal(signal.SIGINT)
    folder = f"stopped-{during}"
    code, _, err = call(*TRAIN, "--method", "uniform", "--output", folder)
    assert code == 130
    what = "interrupted after step 1, saved" if during == "training" else "interrupted, saved"
    assert (
        err == f"dhns-fast train: {what} {folder}/last.safetensors; continue with: dhns-fast train --resume {folder}\n"
    )
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(target, name, original)
    monkeypatch.setattr(plots, "available", lambda: False)
    assert call("train", "--resume", folder)[::2] == (0, "")
    whole = home / "uninterrupted"
    if not whole.exists():
        assert call(*TRAIN, "--method", "uniform", "--output", "uninterrupted")[0] == 0
    same_run(home / folder, whole)


def same_run(a: Path, b: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys()
        assert [key for key in x if not torch.equal(x[key], y[key])] == []
    x, y = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    assert x["trained"] == y["trained"]


def spawn(arguments: Sequence[str], cwd: Path, before: str = "") -> subprocess.Popen[str]:
    """The command line as a process of its own, after the statements `before`."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    script = f"import sys\n{before}\nfrom dhns_fast.cli import main\nsys.exit(main({list(arguments)!r}))"
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], cwd=cwd, env=environment, text=True, **streams)


# Step 7 waits for a line on stdin, so that the signal comes in the middle of it.
WAIT = """
from dhns_fast import plots
from dhns_fast.train import Trainer
plots.available = lambda: False
step = Trainer.step
def wait(trainer):
    if trainer.progress.step == 6:
        print("waiting", flush=True)
        sys.stdin.readline()
    return step(trainer)
Trainer.step = wait
"""


def test_sigint_from_outside(home: Path, call: Call) -> None:
    """As a user does it: a process of its own, stopped in the middle of training, continued by the command that it
    names.
    """
    process = spawn([*TRAIN, "--output", "outside"], home, WAIT)
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("go on\n", timeout=300)
    assert (process.returncode, "Traceback" in out + err) == (130, False)
    match = re.fullmatch(
        r"dhns-fast train: interrupted after step 7, saved (\S+); continue with: dhns-fast (train --resume outside)\n",
        err,
    )
    assert match, err
    assert (home / match[1]).is_file()
    assert call(*match[2].split())[::2] == (0, "")
    same_run(home / "outside", home / "r")


# A module that is two seconds in the making: libraries that call Python while they initialise end the process where an
# exception comes out of that, so Ctrl-C waits.
SLOW_IMPORT = """
import pathlib
pathlib.Path("slow_module.py").write_text(
    "import time\\nprint('begun', flush=True)\\nfor _ in range(200): time.sleep(0.01)\\ndone = True\\n"
)
sys.path.insert(0, ".")
def linger():
    import slow_module
    print(slow_module.done, flush=True)
"""
# Python drops what is raised in a destructor, so Ctrl-C comes again.
SLOW_DESTRUCTOR = """
class Thing:
    def __del__(self):
        print("begun", flush=True)
        for _ in range(3000):
            time.sleep(0.01)
def linger():
    Thing()
"""


@pytest.mark.parametrize(("before", "printed"), [(SLOW_IMPORT, "True\n"), (SLOW_DESTRUCTOR, "")])
def test_ctrl_c_where_an_exception_would_do_harm_or_nothing(home: Path, before: str, printed: str) -> None:
    run = "\ndef run(*_):\n    linger()\n    time.sleep(60)\ncommands.run = run"
    process = spawn(["doctor"], home, f"import time\nfrom dhns_fast.cli import commands\n{before}{run}")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, printed, "dhns-fast doctor: interrupted\n")


def test_a_closed_pipe_is_no_traceback(home: Path) -> None:
    process = spawn(["evaluate", "--run", "r", "--json"], home)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=120)
    assert (process.returncode, err) == (1, "")


def test_a_feature_file_may_be_replaced_by_one_of_another_width_only_with_an_error(home: Path, call: Call) -> None:
    write(graph(), home / "g2")
    assert call(*TRAIN, "--data", "g2", "--method", "uniform", "--epochs", "1", "--output", "wide")[0] == 0
    path = home / "g2" / "text.safetensors"
    save_file({name: x[:, :5].contiguous() if x.ndim == 2 else x for name, x in load_file(path).items()}, path)
    code, _, err = call("evaluate", "--run", "wide")
    assert code == 2
    assert (
        "wide/best.safetensors: was trained on another graph than the data is now; what differs: features of text"
        in err
    )
