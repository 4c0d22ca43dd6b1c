"""Starts the ahead-of-time compilation of a sample of kernels with the session, beside the tests before it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dhns_fast.ops import build

ROOT = Path(__file__).resolve().parents[2]
STARTED = pytest.StashKey[tuple["subprocess.Popen[str]", Path]]()
AOT = "test_kernels_compile_as_reported"
INSTANCE = """
#define DHNS_KERNEL_ONLY
#include "score.cu"
namespace dhns::kernels {
namespace {
template __global__ void distance_sweep_kernel<float, kComplexL1, kRank, false>(SweepArguments<float>);
}
}
"""
# The interpreter cannot be left within a process.
SAMPLE = """
import dataclasses, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import aot
wanted = "denoise.condition bf16", "noise.philox_normal", "score.rank[dot, narrow]"
found = [aot.compile_case(case, 90) for case in aot.cases() if case.name in wanted and 90 in (case.archs or (90,))]
found += [report for source in sys.argv[3:] for report in aot.compile_cuda(pathlib.Path(source), [90])]
pathlib.Path(sys.argv[2]).write_text(json.dumps([dataclasses.asdict(report) for report in found]))
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == AOT)


@pytest.fixture(scope="session")
def aot(request: pytest.FixtureRequest) -> tuple[subprocess.Popen[str], Path]:
    """The process that compiles, and the file where its reports will be."""
    return request.config.stash[STARTED]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    if session.config.option.collectonly or not any(item.name == AOT for item in session.items):
        return (yield)
    with tempfile.TemporaryDirectory(prefix="dhns-fast-aot-") as name:
        folder = Path(name)
        (folder / "instance.cu").write_text(INSTANCE)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        cuda = [str(folder / "instance.cu")] if build._nvcc() else []
        command = [sys.executable, "-c", SAMPLE, str(ROOT / "bench"), str(folder / "aot.json"), *cuda]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        session.config.stash[STARTED] = process, folder / "aot.json"
        try:
            return (yield)
        finally:
            process.kill()
            process.wait()
