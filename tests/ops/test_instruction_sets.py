"""The compiled operators with less than this processor has: the same tests in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dhns_fast.ops import backend as backends
from dhns_fast.ops import build

REASON = backends.CPU.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
TESTED = {
    "test_denoise.py": "cpu",
    "test_noise.py": "cpu",
    "test_hal.py": "embeddings or modalities or scores",
    "test_corruption.py": "cpu",
    "test_fuse.py": "cpu",
    "test_project.py": "cpu",
    "test_power.py": "cpu",
    "../scoring/test_scoring.py": "cpu and not gradcheck",
}


BEST = build.best_instructions()
LESSER = list(build.INSTRUCTION_SETS)[: list(build.INSTRUCTION_SETS).index(BEST)]
# The same library with less of bfloat16 than the other tests run with, for what multiplies it (csrc/bf16_cpu.h).
WITH_LESS = {"AMX tiles": ["avx512", "avx512_bf16"], "AVX-512 BF16": ["avx512"]}.get(backends.cpu_bf16() or "", [])
MULTIPLIED = {"test_denoise.py": "cpu"}
SETS = [*LESSER, *(WITH_LESS if BEST == "avx512" else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """The processes of all sets, which run side by side, and what they print."""
    out, started = tmp_path_factory.mktemp("sets"), {}
    for isa in SETS:
        tested = TESTED if isa in LESSER else MULTIPLIED
        # How an operator is registered and traced is the same with any instructions.
        chosen = " or ".join(
            f"({Path(name).name} and ({keywords}) and not soundly and not compile)" for name, keywords in tested.items()
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
        with (out / isa).open("wb") as file:
            environment = {**os.environ, "DHNS_FAST_ISA": isa}
            process = subprocess.Popen(
                [*command, *tested], cwd=Path(__file__).parent, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        started[isa] = process, out / isa
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("isa", SETS)
def test_operators_on_less(isa: str, runs: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, printed = runs[isa]
    assert process.wait() == 0, printed.read_text(errors="replace")[-4000:]


def test_an_unknown_set_is_refused() -> None:
    code = "import torch; from dhns_fast.scoring import score_all; score_all(torch.ones(1, 2), torch.ones(3, 2))"
    environment = {**os.environ, "DHNS_FAST_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "InputError: DHNS_FAST_ISA: got 'avx3'; accepted: baseline, avx2, avx512, avx512_bf16" in done.stderr
