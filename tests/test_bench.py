"""What is made of benchmark results: tables between markers, charts, and verdicts on a later run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dhns_fast.errors import DataError, InputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import harness  # noqa: E402
import report  # noqa: E402

ABOUT = {
    "device": "Some CPU", "threads": 2, "driver": None, "torch": "2.13.0", "commit": "abc", "date": "2026-11-22T18:13:06+00:00",
    "command": "pytest --benchmark", "ceilings": {"byte": 2e10, "flop": 1e11},
}  # fmt: skip


def row(provider: str = "ours", p50: float | None = 10.0, case: str = "add B4", **more: Any) -> dict[str, Any]:
    times = {} if p50 is None else {"p20": p50 * 0.98, "p50": p50, "p80": p50 * 1.02}
    return asdict(harness.Row(case, provider, **{**times, **more}))


def write(
    folder: Path, rows: list[dict[str, Any]], suite: str = "adding", on: str = "cpu", size: str = "small", **about: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{suite}-{on}-{size}.json"
    path.write_text(json.dumps({"suite": suite, "size": size, **ABOUT, **about, "rows": rows}))
    return path


def test_committed_tables_are_up_to_date() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert report.update(documents, ROOT / "bench" / "results", check=True) == [], "run python -m bench report"


def test_tables_are_filled_between_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demands = [
        {"what": "times as fast as oracle", "limit": 4, "most": False, "got": 5.0},
        {"what": "MB of peak memory", "limit": 64, "most": True, "got": 70.0},
        {"what": "% of the binding ceiling", "limit": 50, "most": False, "got": None},
    ]
    rows = [row(rate=2e9, percent=10.0, bound="byte", ratio=1.0, demands=demands), row("oracle", 50.0, ratio=5.0)]
    rows.append(row("liar", None, status="wrong: error 1e+00"))
    write(tmp_path / "r", rows, size="reference")
    write(tmp_path / "r", [row(case="a smaller one")], complete=False)
    document = tmp_path / "README.md"
    names = ("demands-cpu", "all-cpu", "adding-cpu-small", "demands-cuda", "all-cuda", "adding-cuda-reference", "aot")
    document.write_text(
        "# Title\n" + "".join(f"<!-- bench:{n} -->\nold\n<!-- /bench:{n} -->\nbetween\n" for n in names) + "end\n"
    )
    before = document.read_text()
    command = ["report", "--results", str(tmp_path / "r"), "--documents", str(tmp_path), "--charts", ""]
    assert report.main([*command, "--check"]) == 1
    assert capsys.readouterr().err == f"{document} is out of date; python -m bench report writes it\n"
    assert document.read_text() == before
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0
    text = document.read_text()
    assert text.startswith("# Title\n<!-- bench:demands-cpu -->\n| case |")
    assert text.endswith("between\nend\n")
    assert "| add B4, ours | at least 4 times as fast as oracle | 5 | met |" in text
    assert "| add B4, ours | at most 64 MB of peak memory | 70 | **not met** |" in text
    assert "| add B4, ours | at least 50 % of the binding ceiling | ok | **not met** |" in text
    tables = {name: text.split(f"bench:{name} -->\n")[1].split("\n<!-- /")[0] for name in names}
    assert (
        "| add B4 | ours | 10 (9.8–10.2) | 2 | 10 % byte |  | 1 |  |\n|  | oracle | 50 (49–51) |" in tables["all-cpu"]
    )
    assert "|  | liar |  |  |  |  |  | wrong: error 1e+00 |" in tables["all-cpu"]
    assert "Some CPU, 2 threads, torch 2.13.0; commit abc, 2026-11-22; `pytest --benchmark`" in tables["all-cpu"]
    # The small size only where there is no larger one.
    assert "a smaller one" not in tables["all-cpu"]
    assert "a smaller one" in tables["adding-cpu-small"]
    # A table of a run that did not end says so.
    assert [name for name in names[:3] if "stopped before its end" in tables[name]] == ["adding-cpu-small"]
    for name in names[3:]:
        assert tables[name] == "not yet measured"


def test_aot_table(tmp_path: Path) -> None:
    kernels = [
        {
            "kernel": "k",
            "arch": 80,
            "registers": 40,
            "spills": 0,
            "shared": 2048,
            "matrix": ["mma.sync"],
            "problem": "",
        },
        {
            "kernel": "k",
            "arch": 90,
            "registers": 41,
            "spills": 8,
            "shared": 0,
            "matrix": [],
            "problem": "spills 8 bytes",
        },
    ]
    (tmp_path / "aot.json").write_text(json.dumps({"triton": "3.9.0", "nvcc": None, "kernels": kernels}))
    text = report.render("aot", [], tmp_path)
    assert "| `k` | 40, 2 kB, mma.sync | 41, 0 kB, – **spills 8 bytes** |" in text
    assert "spilling: `k`." in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- bench:aot -->\n", r"d.md:2: marker <!-- bench:aot --> is not followed by <!-- /bench:aot -->"),
        ("<!-- bench:aot -->\n<!-- /bench:x -->\n", r"d.md:1: marker <!-- bench:aot --> is not followed"),
        ("<!-- /bench:aot -->\n", r"d.md:1: marker <!-- /bench:aot --> is not followed"),
        (
            "<!-- bench:aot-gpu -->\n<!-- /bench:aot-gpu -->\n",
            r"d.md:1: bench: got 'aot-gpu'; accepted: aot, does-it-help, demands-DEVICE, all-DEVICE and",
        ),
    ],
)
def test_bad_markers_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    document = tmp_path / "d.md"
    document.write_text(text)
    write(tmp_path / "r", [row()])
    with pytest.raises(DataError, match=message):
        report.update([document], tmp_path / "r")


def test_bad_results_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["compare", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"python -m bench: error: {tmp_path}/none: does not exist; pytest --benchmark writes"
    )
    for content in ("[]", "{", '{"rows": [], "suite": "x"}'):
        (tmp_path / "x-cpu-small.json").write_text(content)
        with pytest.raises(DataError, match=r"x-cpu-small.json: not a results file of pytest --benchmark"):
            report.load_results(tmp_path)
    (tmp_path / "aot.json").write_text("{}")
    with pytest.raises(DataError, match=r"aot.json: not a report of bench/aot.py"):
        report.render("aot", [], tmp_path)
    assert report.main(["report", "--documents", "nowhere"]) == 2
    assert "--documents: got 'nowhere'; accepted: Markdown files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([row()], [row(p50=10.3)], "same"),
        ([row()], [row(p50=12)], "slower"),
        ([row()], [row(p50=8)], "faster"),
        # The ranges touch.
        ([row(p80=12.0)], [row(p50=12)], "same"),
        # So is everybody else.
        ([row(), row("oracle", 50)], [row(p50=12), row("oracle", 60)], "same"),
        ([row(), row("oracle", 50)], [row(p50=12), row("oracle", 50)], "slower"),
        # A machine that became faster hides nothing: slower only where it is slower by the clock too.
        ([row(), row("oracle", 50)], [row(p50=10), row("oracle", 40)], "same"),
        ([row(peak_mb=10.0)], [row(peak_mb=13.0)], "more memory"),
        ([row(peak_mb=0.2)], [row(peak_mb=0.9)], "same"),
        ([row()], [row(p50=None, status="wrong: error 1")], "lost: wrong: error 1"),
        ([row(), row(case="b")], [row()], "lost: absent"),
        ([row(p50=None, status="unavailable: x")], [row()], "new"),
    ],
)
def test_verdicts(tmp_path: Path, before: list[dict[str, Any]], after: list[dict[str, Any]], verdict: str) -> None:
    write(tmp_path / "a", before)
    write(tmp_path / "b", after)
    changes = report.compare(report.load_results(tmp_path / "a"), report.load_results(tmp_path / "b"))
    assert all("ours" in change.case for change in changes)
    assert changes[-1].verdict == verdict
    expected = int(verdict not in ("same", "faster", "new"))
    assert report.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == expected


def test_only_runs_of_one_machine_are_compared(tmp_path: Path) -> None:
    a, b = (report.load_results(write(tmp_path, [row()], on=name)) for name in ("cpu", "cuda"))
    assert (a[0].device, b[0].device) == ("cpu", "cuda")
    with pytest.raises(InputError, match="after: got a run that shares no suite"):
        report.compare(a, b)
    other = report.load_results(write(tmp_path, [row()], device="Another"))
    with pytest.raises(
        InputError, match="adding-cpu-small: got measured on Some CPU and on Another; accepted: runs of one machine"
    ):
        report.compare(a, other)


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    work = {"byte": 1e6, "flop": 1e8}
    rows = [
        row(
            provider,
            10.0 * at,
            f"rank E{at}",
            work=work,
            peak_mb=1.0 * at,
            curve={"of": "rank", "against": "E", "at": at},
        )
        for at in (1, 10)
        for provider in ("ours", "product")
    ]
    rows.append(row(curve={"of": "rank", "against": "B", "at": 5}))
    write(tmp_path / "r", rows)
    assert (
        report.main(
            [
                "report",
                "--results",
                str(tmp_path / "r"),
                "--documents",
                str(ROOT / "CHANGELOG.md"),
                "--charts",
                str(tmp_path),
            ]
        )
        == 0
    )
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"roofline-cpu.png", "time-B-cpu.png", "time-E-cpu.png", "memory-E-cpu.png"}


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and coreutils")
@pytest.mark.parametrize("part", ["1", "2"])
def test_a_part_goes_on_after_a_failure_and_sums_up(part: str, tmp_path: Path) -> None:
    # A Python that can do nothing that a step asks for.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pytest*|*ops*|*tune*|*rows*) seq 9999; echo out of order; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "PART": part, "DRY": "1"}
    done = subprocess.run([ROOT / "bench" / "run_gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    steps = {"1": ("tune-compiles", "build", "kernel-tests", "graph-tests", "rows"), "2": ("headline", "optimiser")}[
        part
    ]
    planned = done.stdout.splitlines()[1 : 1 + len(steps)]
    assert [line.split()[0] for line in planned] == list(steps)
    summary = done.stdout.rpartition("\n\n")[2].splitlines()
    for name in steps:
        assert any(line.split()[:4] == [name, "failed,", "exit", "code"] for line in summary), name
    assert summary[-1].startswith(f"part {part}, cpu, ")
    # A reply may be cut to so much.
    assert done.stdout[-12_000:].count("--- ") == len(steps)
    with tarfile.open(tmp_path / "out" / f"part{part}.tar.gz") as archive:
        assert f"logs/{steps[-1]}.log" in archive.getnames()
    assert len(list((tmp_path / "out").iterdir())) <= 4  # of eight for both parts
    late = subprocess.run(
        [ROOT / "bench" / "run_gpu.sh"], env=environment | {"BUDGET": "60"}, capture_output=True, text=True, check=False
    )
    assert late.returncode == 2
    assert late.stdout.endswith("does not fit into BUDGET=60 s\n")


def test_the_parts_for_a_gpu_take_at_most_seven_minutes() -> None:
    text = (ROOT / "bench" / "run_gpu.sh").read_text()
    budget = int(re.search(r"BUDGET:-\$\(\((\d+) \*", text)[1])  # type: ignore[index]
    assert budget <= 420
    plans = re.findall(r"^ +plan ((?:[a-z-]+ \d+ ?)+)$", text, re.MULTILINE)
    assert len(plans) == 4
    for plan in plans:
        words = plan.split()
        assert sum(map(int, words[1::2])) <= budget
        begun = set(re.findall(r"^ *(?:step|pytest|suite) ([a-z-]+)", text, re.MULTILINE))
        begun |= {name for loop in re.findall(r"for \w+ in ([a-z ]+); do", text) for name in loop.split()}
        assert set(words[0::2]) <= begun, plan


def test_demands_measure_what_they_say() -> None:
    rows = {
        "ours": harness.Row("c", "ours", p50=2.0, peak_mb=1.0, percent=60.0),
        "oracle": harness.Row("c", "oracle", p50=9.0, peak_mb=4.0),
    }
    ours = rows["ours"]
    assert harness.times_as_fast("oracle", 4).of(rows, ours) == 4.5
    assert harness.percent_of_ceiling(50).of(rows, ours) == 60
    assert harness.peak_mb(64).of(rows, ours) == 1
    assert harness.memory_share("oracle", 0.5).of(rows, ours) == 0.25
    rows["oracle"].p50 = None
    assert harness.times_as_fast("oracle", 4).of(rows, ours) is None


def test_published_figures_are_of_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import published

    from dhns_fast import synthetic
    from dhns_fast.data import write
    from dhns_fast.train import TrainConfig, Trainer, prepare_graph, run

    given = {name: TrainConfig.load(published.CONFIGS / f"{name}.yaml") for name in published.PUBLISHED}
    assert [published.configuration_of(config) for config in given.values()] == list(given)
    write(synthetic(40, 3, 300, {}, valid_fraction=0.1, test_fraction=0.1), tmp_path / "graph")
    options = TrainConfig.load(
        published.CONFIGS / "wn18rr-kbc-rank16.yaml", data=str(tmp_path / "graph"), epochs=1, seed=3, device="cpu"
    )
    folder = run.new_folder(tmp_path / "run", options)
    trainer = Trainer(options, prepare_graph(options)[0], folder)
    run.train(trainer)
    published.main([str(folder), "--commit", "abc", "--cpu-seconds", "2.5", "--output", str(tmp_path / "out.json")])
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (found["configuration"], found["seed"], found["epochs"], found["cpu_seconds"]) == (
        "wn18rr-kbc-rank16",
        3,
        1,
        2.5,
    )
    assert found["test"]["mrr"] == trainer.validate("test")["mrr"]
    with pytest.raises(SystemExit, match="settings of none of wn18rr-kbc-rank16"):
        published.configuration_of(TrainConfig())
