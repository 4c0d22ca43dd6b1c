"""What this machine can use, and what is missing and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import dhns_fast
from dhns_fast.ops import build
from dhns_fast.ops.backend import ENVIRONMENT, NAMES, cpu_bf16

NEEDED = ("numpy", "triton", "safetensors", "ninja", "rich", "jsonargparse")
# What each is for, and how to get it.
OPTIONAL = {
    "matplotlib": "plots; pip install 'dhns-fast[plot]'",
    "pytest-benchmark": "benchmarks; 'dhns-fast[test]'",
    "h5py": "features in .h5; 'dhns-fast[h5]'",
    "pyarrow": "export --to parquet; 'dhns-fast[export]'",
    "faiss-cpu": "export --to faiss; 'dhns-fast[export]'",
    "pandas": "to_frame()",
    "tensorboard": "--log tensorboard; 'dhns-fast[log]'",
    "optuna": "tune; 'dhns-fast[hpo]'",
    "shtab": "completion; 'dhns-fast[completion]'",
    "pykeen": "its models and loops; 'dhns-fast[rivals]'",
    "torch_geometric": "its models; 'dhns-fast[rivals]'",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is there or not, and what follows from it."""

    what: str
    ok: bool
    detail: str


def findings() -> list[Finding]:
    """Everything `dhns-fast doctor` prints. Looks only: nothing is built or loaded."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = f"vector instructions {capability}, bfloat16 by {cpu_bf16() or 'rounding'}"
    out = [
        Finding(
            "dhns-fast",
            True,
            f"{dhns_fast.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads, {vectors}"),
    ]
    for name in (*NEEDED, *OPTIONAL):
        try:
            out.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            out.append(Finding(name, False, f"not installed ({OPTIONAL.get(name, 'needed')})"))
    out.append(_cuda())
    status = build.status()
    out += [
        Finding(
            "C++ compiler",
            status.compiler is not None,
            status.compiler or "none found (set CXX); operators run in torch instead",
        ),
        Finding(
            "ninja",
            status.ninja is not None,
            status.ninja or "none found (pip install ninja); operators run in torch instead",
        ),
        Finding(
            "nvcc",
            status.nvcc is not None,
            status.nvcc or "none found (set CUDA_HOME); needed for CUDA C++ operators only",
        ),
        Finding("compiled operators", status.library is not None, _compiled(status)),
    ]
    out.append(_setting(ENVIRONMENT, NAMES, "the best backend is chosen"))
    out.append(_setting(build.ISA, build.ISAS, "all that the processor has is used"))
    return out


def _setting(variable: str, accepted: Sequence[str], otherwise: str) -> Finding:
    chosen = os.environ.get(variable)
    if not chosen:
        return Finding(variable, True, f"not set: {otherwise}")
    known = chosen in accepted
    return Finding(variable, known, f"set to {chosen!r}" + ("" if known else f"; accepted are {', '.join(accepted)}"))


def _compiled(status: build.BuildStatus) -> str:
    if status.reason is not None:
        return status.reason
    if status.library is None:
        return f"not built yet: on first use into {status.cache}, or with dhns-fast build"
    return f"{status.library}{'' if status.cuda else ' (CPU only)'}"


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding(
            "CUDA", False, "torch is a CPU build" if torch.version.cuda is None else "torch finds no device or driver"
        )
    names = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return Finding("CUDA", True, f"{torch.version.cuda}, {', '.join(names)}")
