"""The frame of bench/: correctness comes before time, and rows say what they must."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dhns_fast.errors import BackendUnavailableError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import harness


class Rounds:
    """pytest-benchmark's fixture as far as a race needs it."""

    def pedantic(self, target: Any, args: tuple[Any, ...], setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target(*args)


@pytest.fixture
def race() -> harness.Race:
    return harness.Race(Rounds(), torch.device("cpu"), "small", lambda: {"byte": 1e9, "flop": 1e9}, [])


def make(seed: int) -> tuple[torch.Tensor]:
    return (torch.randn(100, generator=torch.Generator().manual_seed(seed)),)


def test_a_slow_rival_is_called_no_more_than_it_must(race: harness.Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW", 0.05)
    calls = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append(time.sleep(0.06))
        return x + x

    rows = race("double", {"ours": lambda x: 2 * x, "slow": slow}, make, truth="ours", seconds=0.01)
    assert len(calls) == 2
    assert rows["slow"].rounds == 1
    assert rows["slow"].p20 == rows["slow"].p50 == rows["slow"].p80 >= 60
    assert rows["slow"].ratio == rows["slow"].p50 / rows["ours"].p50


def test_a_rival_is_left_out_by_name(race: harness.Race) -> None:
    race.without = "compile"
    calls = {"ours": lambda x: 2 * x, "sum": lambda x: x + x, "torch.compile": lambda x: 1 / 0}
    rows = race("double", calls, make, truth="sum", seconds=0.01)
    assert rows["torch.compile"].status == "unavailable: left out (--benchmark-without 'compile')"
    assert rows["sum"].ratio is not None


def test_a_clock_of_the_process_does_not_count_what_others_do(race: harness.Race) -> None:
    race.clock = harness.CLOCKS["cpu"]
    rows = race("wait", {"ours": lambda x: x * 1, "asleep": lambda x: (time.sleep(0.02), x)[1]}, make, truth="ours")
    asleep = rows["asleep"].p50
    assert asleep is not None
    assert asleep < 10


def test_a_rival_that_disagrees_is_wrong_and_not_timed(race: harness.Race) -> None:
    calls = {"liar": 0}

    def liar(x: torch.Tensor) -> torch.Tensor:
        calls["liar"] += 1
        return x * 2 + 1e-3

    def absent(x: torch.Tensor) -> torch.Tensor:
        raise BackendUnavailableError("no such device")

    providers = {"ours": lambda x: x + x, "liar": liar, "absent": absent, "oracle": lambda x: 2 * x}
    rows = race("double", providers, make, seconds=0.01, work={"byte": 800, "flop": 100})
    assert rows["liar"].status.startswith("wrong: error")
    assert rows["liar"].p50 is None
    assert calls["liar"] == 2
    assert rows["absent"].status == "unavailable: no such device"
    ours, oracle = rows["ours"], rows["oracle"]
    assert ours.rounds == oracle.rounds >= 3
    assert ours.p20 <= ours.p50 <= ours.p80
    assert ours.ratio == 1
    assert oracle.ratio == pytest.approx(oracle.p50 / ours.p50)
    assert (ours.bound, ours.rate) == ("byte", pytest.approx(800 / ours.p50 * 1e3))
    assert ours.percent == pytest.approx(100 * 800e-9 / (ours.p50 / 1e3))
    assert race.rows == list(rows.values())
    lines = harness.table(race.rows)
    assert len(lines) == 5
    assert "wrong: error" in lines[2]


def test_a_rival_whose_process_ends_is_a_row_that_says_so(race: harness.Race) -> None:
    def killed(x: torch.Tensor) -> torch.Tensor:
        raise ChildProcessError("its process ended with status -9")

    rows = race("double", {"ours": lambda x: x + x, "killed": killed, "oracle": lambda x: 2 * x}, make, seconds=0.01)
    assert rows["killed"].status == "unavailable: its process ended with status -9"
    assert rows["oracle"].p50


def test_ours_wrong_fails(race: harness.Race) -> None:
    with pytest.raises(AssertionError, match=r"double: ours cpu: wrong: error"):
        race("double", {"ours cpu": lambda x: x, "oracle": lambda x: 2 * x}, make)


def test_truth_may_be_a_function(race: harness.Race) -> None:
    rows = race("double", {"ours": lambda x: x + x}, make, truth=lambda x: 2 * x.double(), tolerance=1e-6, seconds=0.01)
    assert rows["ours"].status == "ok"


@pytest.mark.parametrize(
    ("result", "truth", "expected"),
    [
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])], 0.2),
        ({"a": torch.tensor([3])}, {"a": torch.tensor([3])}, 0.0),
        ({"a": torch.tensor([3])}, {"a": torch.tensor([4])}, float("inf")),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        (torch.tensor([float("nan"), 1.0]), torch.ones(2), float("inf")),
        ((torch.tensor([float("nan")]), torch.ones(1)), (torch.ones(1), torch.ones(1)), float("inf")),
    ],
)
def test_relative_error(result: Any, truth: Any, expected: float) -> None:
    assert harness.relative_error(result, truth) == pytest.approx(expected)


def test_memory_of_a_call() -> None:
    result, peak = harness.peak_memory(lambda: torch.ones(10_000_000).sum(), torch.device("cpu"))
    assert result == 10_000_000
    assert peak is None or 30 < peak < 80


def test_results_say_where_they_come_from() -> None:
    about = SimpleNamespace(**harness.provenance(torch.device("cpu"), "pytest --benchmark"))
    assert about.device
    assert about.torch == torch.__version__
    assert about.command == "pytest --benchmark"
    assert about.date.endswith("+00:00")
