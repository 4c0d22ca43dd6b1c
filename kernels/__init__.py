"""Triton kernels of dhns_fast: one file an operator, kernel then launcher; no autograd, no modules.

A kernel's tiles, warps and stages are data beside it: `CANDIDATES`, the analytic rule first. `bench/tune.py` times them
on a chip and writes kernels/tuned/sm_*.json, which `choice` reads. A choice is a function of the kernel, the precision
and the width, and never of a batch: a row has the same bits in every batch.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

logger = logging.getLogger("dhns_fast")
TUNED = Path(__file__).resolve().parent / "tuned"
T = TypeVar("T")


@dataclass(frozen=True)
class CompileCase:
    """A kernel as it is launched, for compilation ahead of time (bench/aot.py); a kernel module lists its own in
    `compile_cases()`.

    Args:
        types: Triton type of every argument that is no constant, "*fp32", "i64", "tensordesc<fp32[128, 32]>", ...
        constants: value of every constexpr argument.
        matrix: whether the chip's matrix instructions are expected, or the name of others.
        aligned: integer arguments that are multiples of 16.
        archs: compute capabilities times ten it is launched on; () for all.
        options: of the compiler, beside warps and stages.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool | str
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@functools.cache
def chip(device: torch.device) -> int:
    """Compute capability times ten of a CUDA device; 0 elsewhere, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 2 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def bucket(width: int) -> int:
    """Widths that share a choice: up to the next power of two."""
    return 1 << max(width - 1, 0).bit_length()


@functools.cache
def _table(arch: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The tuned configurations of a chip; none where there is no table, or, with one line in the log, a damaged one."""
    path = TUNED / f"sm_{arch}.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {(str(x["kernel"]), str(x["precision"]), int(x["width"])): dict(x["configuration"]) for x in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning(
            "%s is no table of tuned kernels (%s: %s) and is passed over; python bench/tune.py writes a new one",
            path, type(error).__name__, error,
        )  # fmt: skip
        return {}


def choice(kernel: str, precision: str, width: int, arch: int, candidates: Sequence[T]) -> T:
    """What a kernel is launched with: of its candidates the one that was the fastest on this chip in this bucket of
    widths, or the first.
    """
    found = _table(arch).get((kernel, precision, bucket(width)))
    # A table of an earlier version may name what is no candidate any more, and nobody has compiled or checked.
    return next((x for x in candidates if found is not None and vars(x) == found), candidates[0])
