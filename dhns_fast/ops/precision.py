"""The precision of what operators compute: of sums, and of library products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """What numbers of these dtypes are computed and summed in: float64 as soon as one has it, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Run library matmuls on `device` at `precision`, whatever autocast and the process-wide TF32 switch say."""
    # A meta tensor has no products to narrow, and torch no autocast for it.
    with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
