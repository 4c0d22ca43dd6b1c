"""Every kernel compiles for the supported GPUs without spilling, within the chip, and uses its matrix units where it should and nowhere else."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from dhns_fast.ops import build

ROOT = Path(__file__).resolve().parents[2]


CHIPS = {80: ("mma.sync", 163 << 10), 90: ("wgmma.mma_async", 227 << 10), 100: ("tcgen05.mma", 227 << 10)}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None,
    reason="needs Triton and the installed package",
)


@needs_triton
def test_kernels_compile_for_every_architecture(aot: tuple[subprocess.Popen[str], Path]) -> None:
    process, output = aot
    _, complaint = process.communicate()
    assert output.exists(), complaint[-3000:]
    reports = json.loads(output.read_text())["kernels"]
    assert [report for report in reports if report["problem"]] == []
    assert process.returncode == 0
    names = {report["kernel"] for report in reports}
    for name in names:
        by_arch = {report["arch"]: report for report in reports if report["kernel"] == name}
        assert set(by_arch) == set(CHIPS), name
        for arch, (instruction, shared) in CHIPS.items():
            report = by_arch[arch]
            # Matrix instructions where operands are rounded, and nowhere else.
            assert report["matrix"] == ([instruction] if "tf32" in name or "bf16" in name else []), name
            assert report["spills"] == 0
            assert report["registers"] > 0
            assert report["shared"] <= shared
    if build._nvcc():
        assert any("double" in name for name in names)


@needs_triton
def test_every_launched_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    aot = importlib.import_module("aot")
    launched = {name for path in (ROOT / "kernels").glob("*.py") for name in re.findall(r"^\s+(\w+)\[\(", path.read_text(), re.MULTILINE)}
    assert launched
    assert launched == {case.kernel.__name__ for case in aot.cases()}


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    pytest.importorskip("triton")
    aot = importlib.import_module("aot")
    account = "Used 40 registers\n8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"
    report = aot._report("k", 90, account, 300_000, ("mma.sync",), "wgmma.mma_async")
    assert (report.registers, report.spills) == (40, 20)
    assert report.problem == (
        "spills 20 bytes; shared memory 300000 of 232448 bytes; matrix instructions mma.sync, expected wgmma.mma_async"
    )
    assert aot._report("k", 80, "Used 40 registers", 0, (), None).problem == ""
