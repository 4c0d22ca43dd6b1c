"""Names that look like something else (CSV, HTML, Markdown, a formula, line breaks) leave every output as they are."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.training import config, graph

from dhns_fast import report
from dhns_fast.data import load, write
from dhns_fast.errors import InputError
from dhns_fast.export import export
from dhns_fast.train import Trainer, build, grid, load_run
from dhns_fast.train import run as runs
from dhns_fast.train.card import escaped
from dhns_fast.train.pack import pack

# The csv module of Python 3.10 neither writes nor reads it.
NUL = "x\0y" if sys.version_info >= (3, 11) else "x y"
# Of text files as well, the others of Python and of quoted CSV alone.
ODD = [
    "a,b", 'q"q', "=1+1", "+1", "@x", "-2", "</script><b>", "a|b", "a\\n", NUL, "\x1b[2J", "\u202e", "a\u2028b", " lead",
    "trail ", "#3", "'", "\U0001f388", "a\x85b", '"quoted"',
]  # fmt: skip
BROKEN = ["new\nline", "tab\tx", "back\r"]
RELATIONS = ['r,"=x', "</script>|", "`c`*", "#1"]


def odd(*more: str) -> list[str]:
    names = [*ODD, *more]
    return [*names, *(f"e{i}" for i in range(60 - len(names)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph `g` of such names in a folder, and a run `r` of it."""
    folder = tmp_path_factory.mktemp("names")
    kg = dataclasses.replace(graph(), entity_names=odd(), relation_names=RELATIONS, features={}, present={})
    write(kg, folder / "g")
    (folder / "r").mkdir()
    trainer = Trainer(config(data=str(folder / "g"), epochs=1, method="uniform"), load(folder / "g"), folder / "r")
    report.of_run(trainer, runs.train(trainer).results, folder / "r/report.html")
    return folder


def page(path: Path) -> dict[str, object]:
    """The data of a report, as a browser reads it: up to the first end of a script."""
    return json.loads(path.read_text().split('id="data">')[1].split("</script>")[0], parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def test_a_run_keeps_names_in_every_file(folder: Path) -> None:
    metrics = json.loads((folder / "r/metrics.json").read_text(), parse_constant=_refuse)
    assert set(metrics["trained"]["by_relation"]) <= set(RELATIONS)
    assert page(folder / "r/report.html")["near"]["names"] == odd()  # type: ignore[index]
    run = load_run(folder / "r")
    assert list(run.graph.entity_names) == odd()
    packed = load_run(pack(run, folder / "packed")).graph
    assert list(packed.entity_names) == odd()
    assert list(packed.relation_names) == RELATIONS
    export(run.model, run.graph, "npy", folder / "npy")
    rows = (folder / "npy/entities.tsv").read_text().split("\n")
    assert rows == [*(f"{i}\t{name}" for i, name in enumerate(odd())), ""]


def test_programs_get_names_whatever_the_locale(folder: Path) -> None:
    triples = folder / "triples.tsv"
    asked = [(odd()[i], RELATIONS[i % 4], odd()[-1]) for i in range(len(ODD))]
    triples.write_text("".join("\t".join(triple) + "\n" for triple in asked))
    program = (
        "import sys; from dhns_fast.cli import main\n"
        "for how in ('--csv', '--json'):\n"
        "    print(how); assert main(['score', '--run', sys.argv[1], '--triples', sys.argv[2], how]) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "r"), str(triples)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, check=True,
    )  # fmt: skip
    table, _, text = done.stdout.decode().partition("--json\n")
    for rows in (csv.DictReader(io.StringIO(table.removeprefix("--csv\n"), newline="")), json.loads(text)):
        assert [(row["head"], row["relation"], row["tail"]) for row in rows] == asked


def test_names_that_break_lines_are_kept_or_refused(tmp_path: Path) -> None:
    kg = dataclasses.replace(graph(), entity_names=odd(*BROKEN), relation_names=RELATIONS)
    run = build(config(), kg)
    assert list(load_run(pack(run, tmp_path / "packed")).graph.entity_names) == odd(*BROKEN)
    for to in ("npy", "word2vec", "projector"):
        with pytest.raises(InputError, match=r"^entity_names: got 'new\\nline' at 20; accepted: names without tabs"):
            export(run.model, kg, to, tmp_path / "out")
    with pytest.raises(InputError, match=r"^entity_names: got 'new\\nline' at 20"):
        write(kg, tmp_path / "g")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
    with pytest.raises(InputError, match=r"^entity_names: got '\\ud800' at 20; accepted: distinct strings of Unicode"):
        dataclasses.replace(graph(), entity_names=odd("\ud800"))
    with pytest.raises(InputError, match=r"^features: got '\\udcff'; accepted: modality names that are Unicode text"):
        dataclasses.replace(graph(), features={"\udcff": graph().features["text"]}, present={})


def test_markdown_shows_names_as_they_are(tmp_path: Path) -> None:
    assert escaped("a|b`*<i>[x](y)\\\n\x1b") == r"a\|b\`\*&lt;i&gt;\[x\](y)\\\\n\\x1b"
    result = dict.fromkeys((*grid.METRICS, *grid.KEPT), 0.5)
    (line,) = grid.markdown([grid.Row("data/a|b\n", "complex", "uniform", {0: result})])[2:]
    assert line.startswith(r"| a\|b\\n | complex |")
    assert len(re.findall(r"(?<!\\)\|", line)) == 12


def test_pages_hold_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    rows = [grid.Row("</script>", "complex", "uniform", {0: dict.fromkeys((*grid.METRICS, "epoch_seconds"), np.nan)})]
    path = report.of_grid(rows, ("data",), [["</script>"]], "<title>", tmp_path / "page.html")
    assert page(path)["tables"][1]["rows"] == [["</script>", "complex", "uniform", 0, None, None, None]]  # type: ignore[index]


def test_trained_by_hand(tmp_path: Path) -> None:
    """Names that only Python can have reach every file of a run."""
    kg = dataclasses.replace(graph(), entity_names=odd(*BROKEN), relation_names=["a\nb", "c\r", *RELATIONS[:2]])
    trainer = Trainer(config(epochs=1, method="uniform"), kg, tmp_path)
    runs.train(trainer)
    by_relation = json.loads((tmp_path / "metrics.json").read_text())["trained"]["by_relation"]
    assert set(by_relation) <= set(kg.relation_names)
    assert "\r" not in (tmp_path / "MODEL_CARD.md").read_text()
