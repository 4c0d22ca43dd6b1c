"""Starts the ahead-of-time compilation with the session: minutes of one core, while the other runs the tests before it."""

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
AOT = "test_kernels_compile_for_every_architecture"
# The largest of the CUDA C++ kernels; compiling all of them takes a minute an architecture.
INSTANCE = """
#define DHNS_KERNEL_ONLY
#include "hal.cu"
namespace {
template __global__ void hal_embeddings_kernel<dhns::cuda::RotatE, double, double>(HalArguments<double, double>);
}
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
        # The interpreter cannot be left within a process.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        cuda = [str(folder / "instance.cu")] if build._nvcc() else []
        command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--jobs", "1", "--output", str(folder / "aot.json"), "--cuda", *cuda]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        session.config.stash[STARTED] = process, folder / "aot.json"
        try:
            return (yield)
        finally:
            process.kill()
            process.wait()
