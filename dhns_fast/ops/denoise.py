"""`torch.ops.dhns_fast.denoise_chain`: the sampler's chain on folded weights.

The operator takes the fields of `dhns_fast.diffusion.folding.Factors` and of `dhns_fast.diffusion.schedule.Steps` one
by one; `chain` is the same with the tuples. Nothing here is differentiable: generated embeddings carry no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import PRECISIONS
from dhns_fast.diffusion.folding import Factors, Moments
from dhns_fast.diffusion.schedule import Schedule, Steps
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import denoise_eager
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.noise import HEAD, MAX_MODALITIES, MAX_STEPS, TAIL, X_T, X_T_HEAD, Noise, check_seed
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.precision import matmul_precision

BACKENDS = (backends.TRITON, backends.CPU, backends.EAGER)


class ChainInputs(NamedTuple):
    condition_head: Tensor  # [M, B, D]
    condition_tail: Tensor  # [M, B, D]
    weight1: Tensor  # [4D, 3D]
    scale1: Tensor  # [3D]
    shift1: Tensor  # [4D, 1]
    time: Tensor  # [T, 4D]
    time_mean: Tensor  # [T, 1]
    time_var: Tensor  # [T, 1]
    bias1: Tensor  # [4D]
    weight2: Tensor  # [D, 4D]
    scale2: Tensor  # [4D]
    shift2: Tensor  # [D, 1]
    bias2: Tensor  # [D]
    levels: list[int]
    release: bool
    precision: str
    seed: Tensor  # int64 [1]
    row_offset: int
    x_T: Tensor | None  # [M, B, D], all four of them or none
    x_T_head: Tensor | None  # [M, B, D]
    noise_tail: Tensor | None  # [T − 1, M, B, D]
    noise_head: Tensor | None  # [T − 1, M, B, D]
    backend: str = ""
    mean_scale: list[float] | None = None  # [T] each, see Steps; None: the linear schedule
    noise_scale: list[float] | None = None
    sigma: list[float] | None = None
    slope: list[float] | None = None  # [T] both, see Steps; None or empty: no clip
    width: list[float] | None = None

    @property
    def factors(self) -> Factors:
        moments = Moments(self.time_mean, self.time_var)
        return Factors(*self[2:6], moments, *self[8:13])

    @property
    def noise(self) -> Noise:
        # Normals of the eager chain are eager too where it was asked for; otherwise the best there are, which give the
        # same numbers. On CUDA too: there 150 launches a draw took 15 of a chain's 15.3 s (H100).
        backend = "eager" if self.backend == "eager" and self.time.device.type != "cuda" else None
        return Noise(self.seed, self.row_offset, self.x_T, self.x_T_head, self.noise_tail, self.noise_head, backend)

    @property
    def columns(self) -> tuple[Sequence[float], ...]:
        """mean_scale, noise_scale and sigma; slope and width, empty without a clip."""
        clip = self.slope or (), self.width or ()
        if self.mean_scale is None or self.noise_scale is None or self.sigma is None:
            return (*Schedule.linear(len(self.time)).steps()[1:4], *clip)
        return (self.mean_scale, self.noise_scale, self.sigma, *clip)


def chain(
    condition_head: Tensor,
    condition_tail: Tensor,
    factors: Factors,
    steps: Steps,
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
        steps: coefficients of as many steps as the factors have times.
        levels: states to return; level s is what step s + 1 of T produced, step T being the first.
        release: the head is one more step from the tail's new state; otherwise it has a chain of its own.
        precision: "ieee", "tf32" or "bf16" operands.
        noise: see :class:`dhns_fast.ops.noise.Noise`.
        backend: "triton", "cpu" (C++), "eager", or None for the best there is.

    Raises:
        InputError: an argument does not fit, or there are more modalities, steps or rows than noise has addresses for.
        BackendUnavailableError: `backend` was named and cannot run here.
    """
    out = denoise_chain(
        condition_head,
        condition_tail,
        *(w.detach() for w in (*factors[:4], *factors.time_moments, *factors[5:])),
        list(levels),
        release,
        precision,
        noise.seed,
        noise.row_offset,
        *noise.fixed,
        backend or "",
        *map(list, steps[1:]),
    )
    return out[: len(levels)], out[len(levels) :]


def _check(a: ChainInputs) -> None:
    checks.one_of("precision", a.precision, PRECISIONS)
    tail = a.condition_tail
    sizes = checks.shapes(
        condition_tail=(tail, "M B D"), condition_head=(a.condition_head, "M B D"), bias1=(a.bias1, "H"), scale1=(a.scale1, "W"),
        weight1=(a.weight1, "H W"), shift1=(a.shift1, "H 1"), time=(a.time, "T H"), time_mean=(a.time_mean, "T 1"),
        time_var=(a.time_var, "T 1"), weight2=(a.weight2, "D H"), scale2=(a.scale2, "H"), shift2=(a.shift2, "D 1"), bias2=(a.bias2, "D"),
        x_T=(a.x_T, "M B D"), x_T_head=(a.x_T_head, "M B D"), noise_tail=(a.noise_tail, "S M B D"), noise_head=(a.noise_head, "S M B D"),
    )  # fmt: skip
    D, T = sizes["D"], sizes["T"]
    if not D or not T or sizes["H"] != 4 * D or sizes["W"] != 3 * D:
        raise InputError(
            "weight1", Shown(f"shape {list(a.weight1.shape)}"), f"[4D, 3D] of D = {D} > 0, for T = {T} > 0 steps"
        )
    floats = dict(zip(a._fields[:13], a[:13], strict=True))
    fixed = {"x_T": a.x_T, "x_T_head": a.x_T_head, "noise_tail": a.noise_tail, "noise_head": a.noise_head}
    checks.floating(condition_tail=tail)
    checks.alike("condition_tail", tail, **floats, **fixed)
    if len({x is None for x in fixed.values()}) > 1 or ("S" in sizes and sizes["S"] != T - 1):
        raise InputError(", ".join(fixed), Shown("some of the fixed noise"), f"all four, for {T - 1} steps, or none")
    check_seed(a.seed)
    checks.on_device("condition_tail", tail, seed=a.seed)
    if not a.levels or any(not 0 <= s < T for s in a.levels):
        raise InputError("levels", list(a.levels), f"one or more integers in 0..{T - 1}")
    if a.row_offset < 0:
        raise InputError("row_offset", a.row_offset, "values >= 0")
    # Beyond these the counter of a drawn normal would be another's.
    for name, value, limit in (("modalities", sizes["M"], MAX_MODALITIES), ("T", T, MAX_STEPS - 1)):
        if value > limit:
            raise InputError(name, value, f"up to {limit}")
    columns = a.mean_scale, a.noise_scale, a.sigma
    if len({None if x is None else len(x) for x in columns} | {None if columns[0] is None else T}) > 1:
        raise InputError(
            "mean_scale, noise_scale, sigma",
            [None if x is None else len(x) for x in columns],
            f"{T} numbers each, or None",
        )
    clip = [len(x or ()) for x in (a.slope, a.width)]
    if clip not in ([0, 0], [T, T]):
        raise InputError("slope, width", clip, f"{T} numbers each, or none")


def _fake(a: ChainInputs) -> list[Tensor]:
    return [a.condition_tail.new_empty(a.condition_tail.shape) for _ in (*a.levels, *a.levels)]


def _filled(run: Callable[[list[Tensor], list[Tensor], ChainInputs], None], a: ChainInputs) -> list[Tensor]:
    out = _fake(a)
    if a.condition_tail.numel():
        with matmul_precision(a.precision, a.condition_tail.device):
            run(out[: len(a.levels)], out[len(a.levels) :], a)
    return out


_float32 = backends.reads("time", torch.float32)


def _no_tf32(a: ChainInputs) -> Iterator[str]:
    if a.precision == "tf32" and a.time.device.type != "cuda":
        yield f"precision 'tf32' needs a CUDA device, the operands are on {a.time.device}"


def _not_native(a: ChainInputs) -> Iterator[str]:
    yield from _float32(a)
    yield from _no_tf32(a)


def _native(heads: list[Tensor], tails: list[Tensor], a: ChainInputs) -> None:
    fixed = a.x_T, a.x_T_head, a.noise_tail, a.noise_head
    torch.ops.dhns_fast_native.denoise_chain(
        heads,
        tails,
        *a[:13],
        *map(list, a.columns),
        a.levels,
        a.seed,
        a.row_offset,
        *fixed,
        a.release,
        a.precision == "bf16",
    )


@functools.cache
def _graphs() -> Any:
    from dhns_fast.kernels.denoise import Graphs

    return Graphs()


def forget_graphs() -> None:
    """Give back the memory of the chains that are CUDA graphs; the next call of each records it anew."""
    _graphs.cache_clear()


def _triton(heads: list[Tensor], tails: list[Tensor], a: ChainInputs) -> None:
    from dhns_fast.kernels import denoise as kernels

    folded, precision = a.factors.folded(), a.precision
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
        kernels.Chain(
            heads, tails, conditions, weights, a.columns, a.levels, a.release, precision, address, noises, streams
        ).run()

    address = torch.cat([a.seed.reshape(1), a.seed.new_full((1,), a.row_offset)])
    given = [x for x in a.noise.fixed if x is not None]
    inputs = [a.condition_tail, a.condition_head, address, *folded[:3], *folded.time_moments, *folded[4:], *given]
    inputs = [x.contiguous() for x in inputs]
    if not folded.time.is_cuda or given or torch.cuda.is_current_stream_capturing():
        body(heads, tails, inputs)
        return
    columns = tuple(tuple(column) for column in a.columns)
    _graphs().run(heads, tails, inputs, (tuple(a.levels), a.release, precision, columns), body)


def _eager(heads: list[Tensor], tails: list[Tensor], a: ChainInputs) -> None:
    denoise_eager.chain(
        heads,
        tails,
        a.condition_head,
        a.condition_tail,
        a.factors,
        a.columns,
        a.levels,
        a.release,
        a.precision,
        a.noise,
    )


denoise_chain = Operator(
    "denoise_chain", ChainInputs, list[Tensor], check=_check, fake=_fake,
    implementations=(
        Implementation(backends.TRITON, functools.partial(_filled, _triton), _float32),
        Implementation(backends.CPU, functools.partial(_filled, _native), _not_native),
        Implementation(backends.EAGER, functools.partial(_filled, _eager), _no_tf32),
    ),
)  # fmt: skip
