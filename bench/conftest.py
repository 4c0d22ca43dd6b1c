"""The fixture `race`, one results file a suite, and the table at the end."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from dhns_fast.files import write_json

Suites = dict[str, list[harness.Row]]
ROWS = pytest.StashKey[Suites]()
CEILINGS = pytest.StashKey[Callable[[], dict[str, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    # Measured once, when first needed: a run that times nothing measures nothing.
    measured: Callable[[], dict[str, float]] = functools.cache(
        functools.partial(harness.measure_ceilings, _device(config), _clock(config))
    )
    config.stash[CEILINGS] = measured


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[harness.Race]:
    """Times providers that do the same job, see :class:`harness.Race`."""
    config = request.config
    device = _device(config)
    suite = request.path.stem.removeprefix("bench_")
    benchmark.group = suite
    rows = config.stash[ROWS].setdefault(suite, [])
    torch.manual_seed(0)
    size, ceilings = config.getoption("benchmark_size"), config.stash[CEILINGS]
    yield harness.Race(benchmark, device, size, ceilings, rows, _clock(config), config.getoption("benchmark_without"))
    # Case by case: what a killed run has measured is kept.
    _write(config, suite, complete=False)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    suites = [name for name in config.stash[ROWS] if _rows(config, name)]
    for suite in suites:
        path, about = _write(config, suite, complete=exitstatus != pytest.ExitCode.INTERRUPTED)
        terminalreporter.section(f"{suite}, {about['device']}, {about['threads']} threads, {about['size']}")
        for line in harness.table(_rows(config, suite)):
            terminalreporter.line(line)
        terminalreporter.line(f"-> {os.path.relpath(path)}")
    if suites:
        measured = ", ".join(f"{name} {rate / 1e9:,.1f} G/s" for name, rate in config.stash[CEILINGS]().items())
        terminalreporter.line(f"ceilings of this run: {measured}")


def _rows(config: pytest.Config, suite: str) -> list[harness.Row]:
    """What is known; an interrupted race has rows without times."""
    return [row for row in config.stash[ROWS][suite] if row.p50 is not None or row.status != "ok"]


def _write(config: pytest.Config, suite: str, complete: bool) -> tuple[Path, dict[str, Any]]:
    device, size = _device(config), config.getoption("benchmark_size")
    about = harness.provenance(device, " ".join(["pytest", *config.invocation_params.args]))
    clock = config.getoption("benchmark_clock")
    about |= {"size": size, "clock": clock, "complete": complete, "ceilings": config.stash[CEILINGS]()}
    path = Path(config.getoption("benchmark_results")).resolve() / f"{suite}-{device.type}-{size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"suite": suite, **about, "rows": [asdict(row) for row in _rows(config, suite)]})
    return path, about


def _clock(config: pytest.Config) -> Callable[[], float]:
    if config.getoption("benchmark_clock") == "cpu" and _device(config).type == "cuda":
        raise pytest.UsageError("--benchmark-clock cpu: of a CUDA device only its own clock says anything")
    return harness.CLOCKS[config.getoption("benchmark_clock")]


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("benchmark_device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--benchmark-device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
