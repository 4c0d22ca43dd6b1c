"""Triton kernels of dhns_fast: one file an operator, kernel then launcher; no autograd, no modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """A kernel as it is launched, for compilation ahead of time (bench/aot.py); a kernel module lists its own in `compile_cases()`.

    Args:
        types: Triton type of every argument that is no constant, "*fp32", "i64", ...
        constants: value of every constexpr argument.
        matrix: whether matrix instructions are expected.
        aligned: integer arguments that are multiples of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    aligned: tuple[str, ...] = ()
