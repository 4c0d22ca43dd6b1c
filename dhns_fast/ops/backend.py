"""The backends, and which of an operator's implementations runs. A further backend is an entry here and one in the
operators that have it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dhns_fast.errors import BackendUnavailableError, InputError

ENVIRONMENT = "DHNS_FAST_BACKEND"
logger = logging.getLogger("dhns_fast")
# Device types whose library is in the process, from which it does not go.
_loaded: set[str] = set()


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
    if device.type != device_type:
        return f"it runs on {device_type} tensors, these are on {device}"
    if device_type in _loaded:
        return None
    from dhns_fast.ops import build

    reason = build.why_not(device_type)
    if reason is None:
        _loaded.add(device_type)
    return reason


TRITON = Backend("triton", "cuda", _why_not_triton)
CPU = Backend("cpu", "cpu", functools.partial(_why_not_compiled, "cpu"))
CUDA = Backend("cuda", "cuda", functools.partial(_why_not_compiled, "cuda"))
EAGER = Backend("eager", None, lambda device: None)
BACKENDS = (TRITON, CUDA, CPU, EAGER)
NAMES = ("auto", *(backend.name for backend in BACKENDS))


_preferred: list[str] = []


@contextlib.contextmanager
def preferring(backend: str | None) -> Iterator[None]:
    """Within it, `backend` stands in the place of the environment variable, for all operators of the process; None
    changes nothing.

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


def wanted(asked: str | None) -> str:
    """The name that an operator goes by: its argument, else that of :func:`preferring`, else the environment's, else
    "auto".
    """
    return asked or (_preferred[-1] if _preferred else os.environ.get(ENVIRONMENT)) or "auto"


@dataclass(frozen=True)
class Implementation:
    """What one backend makes of one operator.

    Args:
        backend: whose it is.
        run: from the operator's inputs, dense and checked, to its outputs.
        why_not: from the inputs to the reasons why it cannot take them (a dtype, a width); no reasons: it can. None: it
            takes all.
        looks: it looks at values on the CPU by itself, faster than the operator's look would, and raises Unfit.
    """

    backend: Backend
    run: Callable[[Any], Any]
    why_not: Callable[[Any], Iterable[str]] | None = None
    looks: bool = False

    def reasons(self, inputs: Any) -> list[str]:
        return [] if self.why_not is None else list(self.why_not(inputs))


def reads(field: str, *dtypes: torch.dtype) -> Callable[[Any], Iterator[str]]:
    """A `why_not` of implementations that take these dtypes alone of the input `field`."""
    accepted = " and ".join(map(str, dtypes))

    def why_not(inputs: Any) -> Iterator[str]:
        if (found := getattr(inputs, field).dtype) not in dtypes:
            yield f"it reads {accepted}, not {found}"

    return why_not


class Unfit(Exception):
    """Compiled code found values that it cannot take; the operator's look says which."""


def choose(asked: str, device: torch.device, implementations: Sequence[Implementation], inputs: Any) -> Implementation:
    """The implementation to run: an explicit choice is obeyed or refused, an automatic one takes the first that can.

    Args:
        asked: a backend's name, "auto", or empty for what the environment variable DHNS_FAST_BACKEND says ("auto" when
            unset). The variable speaks to all operators at once: one that does not have the backend it names, or not
            for such inputs, chooses automatically.
        device: where the operands are.
        implementations: the operator's, best first.
        inputs: what `Implementation.why_not` looks at.

    Raises:
        InputError: no backend of any operator has this name, or DHNS_FAST_ISA names no instruction set.
        BackendUnavailableError: the backend asked for cannot run here, or this operator does not have it; every reason
            is named.
    """
    name = wanted(asked)
    if name not in NAMES:
        raise InputError("backend" if asked or _preferred else ENVIRONMENT, name, ", ".join(NAMES))
    if name != "auto":
        named = next((entry for entry in implementations if entry.backend.name == name), None)
        if named is not None:
            here, reasons = named.backend.why_not(device), named.reasons(inputs)
            if here is None and not reasons:
                return named
            if asked or here is not None:
                raise BackendUnavailableError(f"backend {name!r}: {'; '.join([*([here] if here else []), *reasons])}")
        elif asked:
            raise BackendUnavailableError(
                f"backend {name!r}: this operator has {', '.join(x.backend.name for x in implementations)}"
            )
    refused = []
    kind = device.type
    for entry in implementations:
        if entry.backend.device is not None and entry.backend.device != kind:
            refused.append(f"{entry.backend.name}: it is for {entry.backend.device} tensors")
            continue
        reasons = entry.reasons(inputs)
        if not reasons:
            here = entry.backend.why_not(device)
            if here is None:
                return entry
            log_once(f"backend {entry.backend.name!r} is not available and something slower runs instead: {here}")
            reasons.append(here)
        refused.append(f"{entry.backend.name}: {'; '.join(reasons)}")
    raise BackendUnavailableError(f"no backend runs this on {device}: {' | '.join(refused)}")


def check(asked: str | None, available: Iterable[Backend] | None = None) -> None:
    """Refuses, before there is anything to run, a backend's name that is unknown or stands for nothing that runs on a
    device of this machine.

    Args:
        asked: a name, or None for what the environment variable says; "auto" passes.
        available: the backends to choose from; None: all there are.
    """
    from dhns_fast.ops import build

    build.check_instructions()
    name = asked or os.environ.get(ENVIRONMENT) or "auto"
    if name not in NAMES:
        raise InputError("backend" if asked else ENVIRONMENT, name, ", ".join(NAMES))
    if name == "auto":
        return
    named = next((entry for entry in available or BACKENDS if entry.name == name), None)
    if named is None and not asked:
        return
    if named is None:
        raise BackendUnavailableError(
            f"backend {asked!r}: this operator has {', '.join(entry.name for entry in available or ())}"
        )
    device = torch.device(named.device if named.device == "cuda" and torch.cuda.is_available() else "cpu")
    if reason := named.why_not(device):
        raise BackendUnavailableError(f"backend {name!r}: {reason}")


@functools.cache
def log_once(message: str) -> None:
    logger.warning(message)
