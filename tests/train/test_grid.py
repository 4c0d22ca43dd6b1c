"""Variants, choice on validation, processes side by side, and the statistics of a grid."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dhns_fast.data import synthetic, write
from dhns_fast.errors import DataError, InputError
from dhns_fast.train import grid
from dhns_fast.train.config import TrainConfig

BASE = TrainConfig(dim=8, epochs=1, batch_size=40, num_negatives=4, diffusion_steps=6, validate_every=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(synthetic(40, 3, 300, {}, seed=1), tmp_path / "g")
    return tmp_path


def test_variants_name_method_behaviour_and_control() -> None:
    assert grid.variant("near-misses") == {"method": "near-misses"}
    assert grid.variant("dhns-release") == {"method": "dhns", "behaviour": "release"}
    assert grid.variant("grounded-normalised+gaussian") == {
        "method": "grounded",
        "behaviour": "normalised",
        "control": "gaussian",
    }
    assert grid.variant("near-misses+shuffled") == {"method": "near-misses", "control": "shuffled"}
    for wrong in ("dhns-new", "dhns+none+none", "self", "dhns+noise"):
        with pytest.raises(InputError, match=r"^methods: got"):
            grid.variant(wrong)


def test_each_row_has_what_validation_chose_at_seed_0(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[TrainConfig] = []

    def train(config: TrainConfig, path: Path) -> dict[str, float]:
        trained.append(config)
        # Test says the opposite of validation: choosing by it would show.
        valid = config.learning_rate * (1 if config.method == "uniform" else -1) - config.mu
        scores = dict.fromkeys(grid.METRICS, -valid)
        return {**scores, "valid_mrr": valid, "epoch_seconds": 1.0, "seconds": 1.0, "best_epoch": 1, "epochs": 1}

    monkeypatch.setattr(grid, "_train", train)
    given = {"learning_rate": (0.01, 0.1, 0.01), "mu": (0.3, 2.0), "n3": (0.0,)}
    data = [str(folder / "g")]
    rows = grid.run_grid(BASE, data, ["transe"] * 2, ["uniform", "near-misses"], 3, folder / "out", tuned=given)
    assert [row.chosen for row in rows] == [{"learning_rate": 0.1}, {"learning_rate": 0.01, "mu": 0.3}]
    assert [(c.seed, c.method, c.learning_rate) for c in trained[:6]] == [
        (0, "uniform", 0.01), (0, "uniform", 0.1), *[(0, "near-misses", rate) for rate in (0.01, 0.01, 0.1, 0.1)],
    ]  # fmt: skip
    assert [(c.seed, c.method, c.learning_rate, c.mu) for c in trained[6:]] == [
        (s, *x) for s in (1, 2) for x in (("uniform", 0.1, 0.01), ("near-misses", 0.01, 0.3))
    ]
    assert all(sorted(row.results) == [0, 1, 2] for row in rows)


@pytest.mark.parametrize(("option", "value"), [("mu", -1.0), ("n3", math.nan), ("learning_rate", 0.0)])
def test_a_value_that_no_method_could_have_is_refused(folder: Path, option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{grid.TUNED[option]}: got {value}"):
        grid.run_grid(
            BASE, [str(folder / "g")], ["transe"], ["uniform"], 1, folder / "out", tuned={option: (0.1, value)}
        )


def test_a_damaged_result_is_found_before_anything_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, arguments = folder / "damaged", (BASE, [str(folder / "g")], ["transe"], ["uniform", "self-adversarial"])
    grid.run_grid(*arguments, 2, out)
    of_seed_0, of_seed_1 = (sorted(out.glob(f"*seed{seed}*")) for seed in (0, 1))
    of_seed_0[0].unlink()
    monkeypatch.setattr(grid, "_train", lambda *_: pytest.fail("trained"))
    # Damaged, or whole and of another cell.
    for text in ("{}", of_seed_1[0].read_text()):
        of_seed_1[1].write_text(text)
        with pytest.raises(DataError, match=r"seed1-\w+\.json: not a result of compare or grid"):
            grid.run_grid(*arguments, 2, out)


def test_processes_side_by_side_give_the_same_results(folder: Path) -> None:
    data, methods = [str(folder / "g")], ["uniform", "dhns-normalised+gaussian"]
    one = grid.run_grid(BASE, data, ["transe"], methods, 1, folder / "one")
    two = grid.run_grid(BASE, data, ["transe"], methods, 1, folder / "two", processes=2)
    for a, b in zip(one, two, strict=True):
        assert a.results[0]["mrr"] == b.results[0]["mrr"]
    files = sorted((folder / "two").glob("*.json"))
    assert [f.name.rpartition("-")[0] for f in files] == [
        "transe-dhns-normalised-gaussian-seed0",
        "transe-uniform-corrected-seed0",
    ]
    kept = json.loads(files[0].read_text())
    assert kept["config"]["control"] == "gaussian"
    assert {"dhns_fast", "torch", "python", "device", "threads"} == set(kept["provenance"])
    assert kept["result"]["step_cpu_ms"] > 0


def children(process: int) -> list[int]:
    """Processes that a process has started and that run."""
    stats = [text for path in Path("/proc").glob("[0-9]*/stat") if (text := _read(path))]
    fields = [(int(text.split()[0]), text.rpartition(")")[2].split()) for text in stats]
    return [number for number, (state, parent, *_) in fields if int(parent) == process and state != "Z"]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_grid_that_is_ended_leaves_no_processes(folder: Path) -> None:
    line = f"grid --data {folder / 'g'} --models transe --methods uniform,self-adversarial --seeds 1 --processes 2 --output {folder / 'out'}"
    forever = "--dim 8 --epochs 10000000 --patience 0 --validate-every 10000000 --device cpu"
    command = [sys.executable, "-m", "dhns_fast", *line.split(), *forever.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # Two that train, and the one that keeps count of what they share.
    begin = time.monotonic()
    while len(started := children(process.pid)) < 3 and process.poll() is None and time.monotonic() - begin < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert "interrupted; finished runs are kept in" in err
    begin = time.monotonic()
    while left := [number for number in started if Path(f"/proc/{number}").exists()]:
        assert time.monotonic() - begin < 20, left
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_process_of_a_grid_ends_with_its_parent() -> None:
    """Which nobody can tell it where that is killed."""
    reading, writing = os.pipe()
    if (parent := os.fork()) == 0:
        parent = os.getpid()
        if os.fork() == 0:
            os.close(reading)
            grid._end_with(parent, 0.01)
            while True:
                time.sleep(1)
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    assert select.select([reading], [], [], 20)[0]
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_differences_are_paired_and_have_students_interval() -> None:
    row, other = (grid.Row("g", "transe", name) for name in ("a", "b"))
    for seed, (x, y) in enumerate([(0.31, 0.30), (0.33, 0.30), (0.41, 0.39), (0.5, None)]):  # type: ignore[misc]
        row.results[seed] = {"mrr": x}
        if y is not None:
            other.results[seed] = {"mrr": y}
    found = row.minus(other)
    assert found is not None
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(0.01 / 3**0.5)
    assert found.interval == pytest.approx((0.02 - 4.303 * found.error, 0.02 + 4.303 * found.error))
    assert found.better
    assert str(found) == "+0.0200 [-0.0048, +0.0448]"
    assert not other.minus(row).better  # type: ignore[union-attr]
    assert row.minus(grid.Row("g", "transe", "c", {0: {"mrr": 0.1}})) is None
    assert not grid.Difference(1.0, 0.1, 2).better
    reach = grid.Difference(0.0, 1.0, 21).interval[1]
    assert reach == pytest.approx(2.086, abs=0.01)


def test_markdown_compares_with_the_baseline_and_own_controls() -> None:
    rows = [
        grid.Row("path/g", "transe", name)
        for name in ("self-adversarial", "dhns", "dhns+gaussian", "dhns-normalised+gaussian")
    ]
    for k, row in enumerate(rows):
        row.results = {
            s: dict.fromkeys(grid.METRICS, 0.3 + 0.01 * k + 0.001 * s) | {"step_cpu_ms": 20.4} for s in range(3)
        }
    rows[1].chosen = {"learning_rate": 0.006, "mu": 1.0}
    lines = grid.markdown(rows)
    assert len(lines) == 6
    assert lines[3] == (
        "| g | transe | dhns | 0.3110 ± 0.0010 | 0.3110 ± 0.0010 | 0.3110 ± 0.0010 | 3 | learning_rate 0.006, mu 1 "
        "| **+0.0100 [+0.0100, +0.0100]** | gaussian -0.0100 [-0.0100, -0.0100] | 20 |"
    )
