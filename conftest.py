"""Set before anything imports torch and Triton: kernels run in the interpreter where there is no GPU, and processes
side by side (`-n`) have a thread each. And `pytest --benchmark`, which runs bench/.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

if "--benchmark" in sys.argv:
    # The interpreter is for correctness: what it takes is nobody's time.
    os.environ.pop("TRITON_INTERPRET", None)
elif "TRITON_INTERPRET" not in os.environ and shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many threads as cores in each of them would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption(
        "--benchmark", action="store_true", help="Run bench/ instead of the tests; results go to bench/results/."
    )
    group.addoption(
        "--benchmark-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="Where to measure; auto prefers CUDA.",
    )
    group.addoption(
        "--benchmark-size",
        choices=("small", "reference", "large"),
        default="small",
        help="small: all of bench/ in 5 minutes on 2 cores; reference: the shapes of the paper; large: what needs a GPU.",
    )
    group.addoption(
        "--benchmark-clock",
        choices=("wall", "cpu"),
        default="wall",
        help="What times are: wall-clock, or CPU seconds of the process (all threads), for a machine that others use.",
    )
    group.addoption(
        "--benchmark-without",
        default=None,
        metavar="RIVAL",
        help='Leaves out rivals with this in their names, "torch.compile" say.',
    )
    group.addoption(
        "--benchmark-results", default=str(Path(__file__).parent / "bench" / "results"), help="Folder of the results."
    )


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("benchmark")
    # Not among the project's own options: the tests run where pytest-benchmark is not installed.
    if config.pluginmanager.hasplugin("benchmark"):
        # One table at the end says more than the plugin's.
        config.option.benchmark_skip, config.option.benchmark_quiet = not asked, True
    elif asked:
        raise pytest.UsageError("--benchmark: needs pytest-benchmark, which is not installed here")
    if asked and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(Path(__file__).parent / "bench")]
