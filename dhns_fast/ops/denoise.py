"""`torch.ops.dhns_fast.denoise_chain`: the sampler's chain on folded weights. Schema, fake, choice of the implementation.

The operator takes the fields of `dhns_fast.diffusion.folding.Factors` one by one; `chain` is the same with the tuple. Nothing here is
differentiable: generated embeddings carry no gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dhns_fast.diffusion.folding import Factors, Moments
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import denoise_eager
from dhns_fast.ops.denoise_eager import Noise
from dhns_fast.ops.noise import HEAD, MAX_MODALITIES, MAX_STEPS, TAIL, X_T, X_T_HEAD
from dhns_fast.ops.operator import operator

BACKENDS = (backends.TRITON, backends.CPU, backends.EAGER)


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Run library matmuls on `device` at `precision`, whatever autocast and the process-wide TF32 switch say."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def chain(
    condition_head: Tensor,
    condition_tail: Tensor,
    factors: Factors,
    levels: Sequence[int],
    release: bool,
    precision: str,
    noise: Noise,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Conditions `[M, B, D]` -> (heads, tails): two lists of fresh `[M, B, D]`, one for each of `levels`.

    Args:
        condition_head, condition_tail: c of the heads and of the tails to be generated.
        factors: weights, see :func:`dhns_fast.diffusion.folding.factors`.
        levels: states to return; level s is what the step at t = s + 1 produced.
        release: the head is one more step from the tail's new state; otherwise it has a chain of its own.
        precision: "ieee", "tf32" or "bf16" operands.
        noise: see :class:`Noise`.
        backend: "triton", "cpu" (C++), "eager", or None for the best there is.

    Raises:
        InputError: more modalities, steps or rows than noise has addresses for.
        BackendUnavailableError: `backend` was named and cannot run here.
    """
    if noise.row_offset < 0:
        raise InputError(f"row_offset: got {noise.row_offset}; accepted are values >= 0")
    # Beyond these the counter of a drawn normal would be another's.
    for name, value, limit in (("modalities", len(condition_tail), MAX_MODALITIES), ("T", len(factors.time), MAX_STEPS - 1)):
        if value > limit:
            raise InputError(f"{name}: got {value}; accepted are up to {limit}")
    out = torch.ops.dhns_fast.denoise_chain(
        condition_head,
        condition_tail,
        *(w.detach() for w in _flat(factors)),
        list(levels),
        release,
        precision,
        noise.seed,
        noise.row_offset,
        *noise.fixed,
        backend or "",
    )
    return out[: len(levels)], out[len(levels) :]


@operator("denoise_chain")
def _denoise_chain(
    condition_head: Tensor,
    condition_tail: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    time: Tensor,
    time_mean: Tensor,
    time_var: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    bias2: Tensor,
    levels: list[int],
    release: bool,
    precision: str,
    seed: Tensor,
    row_offset: int,
    x_T: Tensor | None,
    x_T_head: Tensor | None,
    noise_tail: Tensor | None,
    noise_head: Tensor | None,
    backend: str = "",
) -> list[Tensor]:
    heads, tails = ([condition_tail.new_empty(condition_tail.shape) for _ in levels] for _ in range(2))
    factors = Factors(weight1, scale1, shift1, time, Moments(time_mean, time_var), bias1, weight2, scale2, shift2, bias2)
    noise = Noise(seed, row_offset, x_T, x_T_head, noise_tail, noise_head, backend="eager" if backend == "eager" else None)
    if condition_tail.numel():
        run = _CHAINS[choose(backend or None, time.device, time.dtype, precision)]
        with matmul_precision(precision, time.device):
            run(heads, tails, condition_head, condition_tail, factors, levels, release, precision, noise)
    return heads + tails


@_denoise_chain.register_fake
def _(condition_head: Tensor, condition_tail: Tensor, *rest: Any) -> list[Tensor]:
    levels = rest[11]
    return [condition_tail.new_empty(condition_tail.shape) for _ in (*levels, *levels)]


def _flat(factors: Factors) -> tuple[Tensor, ...]:
    return (*factors[:4], *factors.time_moments, *factors[5:])


def check(backend: str) -> None:
    """Refuse a backend that this operator has on no device of this machine (see :func:`dhns_fast.ops.backend.resolve`)."""
    on_cuda = torch.cuda.is_available() and any(entry.name == backend and entry.device == "cuda" for entry in BACKENDS)
    backends.resolve(backend, torch.device("cuda" if on_cuda else "cpu"), BACKENDS)


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, precision: str) -> str:
    """The backend for operands of `dtype` and a matmul `precision`; float64 is plain torch's."""
    available: tuple[backends.Backend, ...] = BACKENDS if dtype == torch.float32 else (backends.EAGER,)
    return backends.resolve(backend, device, available)


def _native(
    heads: list[Tensor],
    tails: list[Tensor],
    condition_head: Tensor,
    condition_tail: Tensor,
    factors: Factors,
    levels: Sequence[int],
    release: bool,
    precision: str,
    noise: Noise,
) -> None:
    schedule = Schedule.linear(len(factors.time))
    torch.ops.dhns_fast_native.denoise_chain(
        heads,
        tails,
        condition_head.contiguous(),
        condition_tail.contiguous(),
        *(w.contiguous() for w in _flat(factors)),
        list(schedule.mean_scale),
        list(schedule.noise_scale),
        list(schedule.sigma),
        list(levels),
        noise.seed,
        noise.row_offset,
        *(None if x is None else x.contiguous() for x in noise.fixed),
        release,
        precision == "bf16",
    )


@functools.cache
def _graphs() -> Any:
    from dhns_fast.kernels.denoise import Graphs

    return Graphs()


def _triton(
    heads: list[Tensor],
    tails: list[Tensor],
    condition_head: Tensor,
    condition_tail: Tensor,
    factors: Factors,
    levels: Sequence[int],
    release: bool,
    precision: str,
    noise: Noise,
) -> None:
    from dhns_fast.kernels import denoise as kernels

    folded, schedule = factors.folded(), Schedule.linear(len(factors.time))
    columns = schedule.mean_scale, schedule.noise_scale, schedule.sigma
    streams = (X_T, TAIL), (X_T_HEAD, HEAD)

    def body(heads: list[Tensor], tails: list[Tensor], inputs: Sequence[Tensor]) -> None:
        c_tail, c_head, address, state, condition, time, mean, var, bias1, output, bias2, *given = inputs
        operands = [state, condition, output]
        if precision == "bf16":
            # Triton's interpreter, where tensors are not on CUDA, has no bfloat16 arithmetic.
            operands = [w.bfloat16() if w.is_cuda else w.bfloat16().float() for w in operands]
        weights = *operands, time, mean, var, bias1, bias2
        noises: list[Tensor | None] = list(given) or [None] * 4
        conditions = c_tail, c_head
        kernels.Chain(heads, tails, conditions, weights, columns, levels, release, precision, address, noises, streams).run()

    address = torch.cat([noise.seed.reshape(1), noise.seed.new_full((1,), noise.row_offset)])
    given = [x for x in noise.fixed if x is not None]
    inputs = [condition_tail, condition_head, address, *folded[:3], *folded.time_moments, *folded[4:], *given]
    inputs = [x.contiguous() for x in inputs]
    if not folded.time.is_cuda or given or torch.cuda.is_current_stream_capturing():
        body(heads, tails, inputs)
        return
    with torch.cuda.device(condition_tail.device):
        _graphs().run(heads, tails, inputs, (tuple(levels), release, precision), body)


_CHAINS: dict[str, Callable[..., None]] = {"triton": _triton, "cpu": _native, "eager": denoise_eager.chain}
