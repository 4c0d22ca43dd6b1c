"""The precision of library products inside an operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


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
