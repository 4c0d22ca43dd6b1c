"""Every kernel compiles for the supported GPUs without spilling, within the chip, and uses its matrix units where it
should and nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dhns_fast.ops import build

ROOT = Path(__file__).resolve().parents[2]


CHIPS = {80: ("mma.sync", 163 << 10), 90: ("wgmma.mma_async", 227 << 10), 100: ("tcgen05.mma", 227 << 10)}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None,
    reason="needs Triton and the installed package",
)


def reported() -> list[dict[str, Any]]:
    return json.loads((ROOT / "bench" / "results" / "aot.json").read_text())["kernels"]


@needs_triton
def test_the_report_is_of_these_sources_and_finds_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling everything takes a quarter of an hour: `python bench/aot.py` does what has changed, and its report is
    committed.
    """
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    aot = importlib.import_module("aot")
    kernels = reported()
    assert [report for report in kernels if report["problem"] or report["spills"]] == []
    have = {(report["kernel"], report["arch"], report["source"]) for report in kernels}
    wanted = {(case.name, 90, aot._source(case)) for case in aot.cases() if 90 in (case.archs or CHIPS)}
    assert sorted(wanted - have) == [], "run python bench/aot.py"
    cuda = {aot.digest(source) for source in build.source_folder().glob("*.cu")}
    assert {report["source"] for report in kernels} >= cuda, "run python bench/aot.py"
    for report in kernels:
        instruction, shared = CHIPS[report["arch"]]
        assert report["registers"] > 0
        assert report["shared"] <= shared
        # Matrix instructions in products and nowhere else.
        product = "dot," in report["kernel"] or report["kernel"].startswith(
            ("denoise.hidden", "denoise.update", "denoise.condition")
        )
        if not report["kernel"].startswith("corruption") and product:
            assert report["matrix"] == [instruction], report["kernel"]
    # Floors are 2, 2 and 3 instructions for each dimension of a query and an entity.
    counts = {(aot.INSTANCE.search(report["kernel"])[2], report["issued"]) for report in kernels if report["issued"]}
    assert {reduction for reduction, _ in counts} == set(aot._REDUCTIONS)
    assert all(issued <= aot.MOST[aot._REDUCTIONS[reduction]] for reduction, issued in counts)
    meetings = [report["barriers"] for report in kernels if report["kernel"].startswith("hal_embeddings_kernel")]
    assert meetings
    assert all(1 <= count <= aot.MOST_BARRIERS for count in meetings)


@needs_triton
def test_kernels_compile_as_reported(aot: tuple[subprocess.Popen[str], Path]) -> None:
    """A sample of them, a product with bulk copies and a distance among it, compiled in a process beside the other
    tests.
    """
    process, output = aot
    _, complaint = process.communicate()
    assert output.exists(), complaint[-3000:]
    found = json.loads(output.read_text())
    assert [report for report in found if report["problem"]] == []
    assert len(found) >= 3
    if build._nvcc():
        assert {report["issued"] for report in found if report["issued"]}


@needs_triton
def test_every_launched_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    aot = importlib.import_module("aot")
    # A kernel is launched by its own name, or handed to a function that adds what its kind has in common.
    launch = re.compile(r"^\s+(_\w+)\[|launch\(\s*\w+, [^,]+, (_\w+)", re.MULTILINE)
    texts = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    launched = {own or handed for text in texts for own, handed in launch.findall(text)}
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


@needs_triton
def test_barriers_are_counted_in_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    aot = importlib.import_module("aot")

    def code(*lines: str) -> str:
        return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))

    row = ["FADD R1, R2, R3", "@P1 BRA 0x00", "BAR.SYNC.DEFER_BLOCKING 0x0", "BRA 0x00"]
    assert aot.barriers("hal_embeddings_kernel<x>", code(*row)) == (1, "")
    assert aot.barriers("hal_scores_kernel<x>", code(*row)) is None
    many = ["FADD R1, R2, R3", "@P1 BRA 0x00", *["BAR.SYNC.DEFER_BLOCKING 0x0"] * 9, "EXIT"]
    assert aot.barriers("hal_embeddings_kernel<x>", code(*many)) == (9, "9 barriers a row, at most 8")
    inner = ["BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA 0x00", "EXIT"]
    assert aot.barriers("hal_embeddings_kernel<x>", code(*inner))[1] == "a barrier in an innermost loop"


@needs_triton
def test_loops_are_read_from_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    aot = importlib.import_module("aot")
    lines = [
        "LDG.E R1, [R2]",
        "UTMALDG.2D [UR4]",
        "HGMMA.64x128x16.F32 R4",
        "@P0 BRA 0x10",
        "FADD R1, R2, R3",
        "@!P1 BRA 0x00",
        "EXIT",
    ]
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert aot.loops(code) == [{"UTMALDG": 1, "HGMMA": 1, "BRA": 1}]
    assert aot.of_products(code) == ""
    assert aot.of_products(code.replace("UTMALDG.2D", "LDG.E")) == "operands without bulk copies"
    assert aot.of_products(code.replace("FADD", "FMUL").replace("0x10", "0x00")) == "ordinary loads beside a product"
