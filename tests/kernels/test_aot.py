"""Every Triton kernel compiles for the supported GPUs without spilling, and uses matrix units where it should and nowhere else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None,
    reason="needs Triton and the installed package",
)
def test_kernels_compile_for_every_architecture() -> None:
    # The interpreter cannot be left within a process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    reports = json.loads(done.stdout)
    assert {report["arch"] for report in reports} == {80, 90, 100}
    assert any(report["kernel"].startswith("score.rank") for report in reports)
    assert [report for report in reports if report["problem"]] == []
