"""What a first use costs: imports, the command line's answer, and the first call of an operator, each in a process of
its own.

The floor is the import of torch (of Python alone for the command line). Libraries are built before, and what they cost
is not in here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import harness
import pytest

FIRST_CALL = "import torch; from dhns_fast.scoring import rank_all; rank_all(torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64))"
CASES = {
    "import dhns_fast": ("import dhns_fast", "pass"),
    "import of sampler and trainer": ("import dhns_fast.sampler, dhns_fast.train.trainer", "import torch"),
    "first rank_all": (FIRST_CALL, "import torch"),
    "dhns-fast --help": ("from dhns_fast.cli import main; main(['--help'])", "pass"),
    "dhns-fast with a bad option": ("from dhns_fast.cli import main; main(['train', '--dim', '7'])", "pass"),
}


@pytest.mark.parametrize("name", CASES)
def test_first_use(race: harness.Race, name: str) -> None:
    ours, floor = CASES[name]

    def process(code: str) -> Callable[[], bool]:
        def run() -> bool:
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=False
            )
            assert "Traceback" not in done.stderr, done.stderr
            return True

        return run

    seconds, rounds = (2.0, 2) if race.size == "small" else (30.0, 5)
    rows = race(
        name, {"ours": process(ours), floor: process(floor)}, truth=lambda: True, seconds=seconds, min_rounds=rounds
    )
    # The process is another one: its memory is not this one's.
    for row in rows.values():
        row.peak_mb = None
