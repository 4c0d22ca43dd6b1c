"""The compiled operators with less than this processor has: the same tests in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
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
    "../scoring/test_scoring.py": "cpu and not gradcheck",
}


@pytest.mark.parametrize(
    "isa", [*list(build._levels())[:-1], *(["avx512_bf16"] if "avx512" in build._levels() else [])]
)
def test_operators_on_less(isa: str) -> None:
    chosen = " or ".join(f"({Path(name).name} and ({keywords}))" for name, keywords in TESTED.items())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *TESTED]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "DHNS_FAST_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_set_is_refused() -> None:
    code = "import torch; from dhns_fast.scoring import score_all; score_all(torch.ones(1, 2), torch.ones(3, 2))"
    environment = {**os.environ, "DHNS_FAST_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "InputError: DHNS_FAST_ISA: got 'avx3'; accepted: baseline, avx2, avx512, avx512_bf16" in done.stderr
