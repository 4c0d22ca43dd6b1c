"""Which implementation of an operator runs: an explicit choice is obeyed or refused, an automatic one falls back.

An operator lists its backends, best first, and asks `resolve`. A further backend is one more entry in such a list.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from dhns_fast.errors import BackendUnavailableError, InputError

ENVIRONMENT = "DHNS_FAST_BACKEND"
# The most that C++ operators may use of an x86 processor, read in csrc/levels.h; the last is compiled wherever the one before it is.
ISA = "DHNS_FAST_ISA"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
Choice = TypeVar("Choice", bound=Callable[..., str])
logger = logging.getLogger("dhns_fast")


@dataclass(frozen=True)
class Backend:
    """One implementation of operators.

    Args:
        name: what users ask for.
        device: the device type on which an automatic choice considers it; None for every device.
        why_not: None when it can run on a device, otherwise the reason.
    """

    name: str
    device: str | None
    why_not: Callable[[torch.device], str | None]


def cpu_bf16() -> str | None:
    """What this processor multiplies bfloat16 with, None where it only rounds to it."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMX tiles" if has.get("amx_bf16") else "AVX-512 BF16" if has.get("avx512_bf16") else None


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on cuda tensors, these are on {device} (TRITON_INTERPRET=1 interprets it anywhere, slowly)"
    return None


def _why_not_compiled(device_type: str, device: torch.device) -> str | None:
    from dhns_fast.ops import build

    return f"it runs on {device_type} tensors, these are on {device}" if device.type != device_type else build.why_not(device_type)


TRITON = Backend("triton", "cuda", _why_not_triton)
CPU = Backend("cpu", "cpu", functools.partial(_why_not_compiled, "cpu"))
CUDA = Backend("cuda", "cuda", functools.partial(_why_not_compiled, "cuda"))
EAGER = Backend("eager", None, lambda device: None)
NAMES = ("auto", *(backend.name for backend in (TRITON, CUDA, CPU, EAGER)))


_preferred: list[str] = []


@contextlib.contextmanager
def preferring(backend: str | None) -> Iterator[None]:
    """Within it, `backend` stands in the place of the environment variable, for all operators of the process; None changes nothing.

    Of the process and not of a thread: backward passes of CUDA tensors run in threads of their own.
    """
    if backend is None:
        yield
        return
    _preferred.append(backend)
    try:
        yield
    finally:
        _preferred.pop()


def resolve(backend: str | None, device: torch.device, available: Sequence[Backend]) -> str:
    """The name of the backend to run.

    Args:
        backend: a name, "auto", or None for what the environment variable DHNS_FAST_BACKEND says ("auto" when unset). The variable
            speaks to all operators at once: one that does not have the backend it names chooses automatically.
        device: where the operands are.
        available: the operator's backends, best first.

    Raises:
        InputError: no backend of any operator has this name, or DHNS_FAST_ISA names no instruction set.
        BackendUnavailableError: the backend asked for cannot run here, or this operator does not have it.
    """
    asked = backend or (_preferred[-1] if _preferred else os.environ.get(ENVIRONMENT)) or "auto"
    if asked not in NAMES:
        raise InputError(f"{'backend' if backend else ENVIRONMENT}: got {asked!r}; accepted are {', '.join(NAMES)}")
    if (isa := os.environ.get(ISA)) and isa not in ISAS:
        raise InputError(f"{ISA}: got {isa!r}; accepted are {', '.join(ISAS)}")
    chosen = next((entry for entry in available if entry.name == asked), None)
    if chosen is not None:
        if reason := chosen.why_not(device):
            raise BackendUnavailableError(f"backend {asked!r}: {reason}")
        return asked
    if backend and asked != "auto":
        raise BackendUnavailableError(f"backend {asked!r}: this operator has {', '.join(entry.name for entry in available)}")
    for entry in available:
        if entry.device in (None, device.type):
            reason = entry.why_not(device)
            if reason is None:
                return entry.name
            log_once(f"backend {entry.name!r} is not available and something slower runs instead: {reason}")
    raise BackendUnavailableError(f"no backend of {', '.join(entry.name for entry in available)} runs on {device}")


def chosen_while_tracing(function: Choice) -> Choice:
    """Marks a function that returns the name of a backend: torch.compile calls it while tracing and takes the result for a constant.

    This is all that torch.compiler.assume_constant_result does, but that imports torch._dynamo, two seconds of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def log_once(message: str) -> None:
    logger.warning(message)
