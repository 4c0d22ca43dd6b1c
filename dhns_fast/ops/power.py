"""`torch.ops.dhns_fast.power_sum`: Σ|x|ᵖ, p 2 or 3, of which penalties of whole tables are made, in one pass, and its
gradient in another.

Plain torch writes a tensor as large as the table for each of absolute value, power, sign and products of its backward.
Differentiable once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator

# Of which one partial sum is made: kPowersPerBlock of csrc/power_cpu.h.
NUMBERS_PER_BLOCK = 4096


class SumInputs(NamedTuple):
    x: Tensor  # of any shape
    exponent: int
    backend: str = ""


class GradientInputs(NamedTuple):
    grad: Tensor  # of the sum, a scalar
    x: Tensor
    exponent: int
    backend: str = ""


def _check(a: SumInputs | GradientInputs) -> None:
    checks.floating(x=a.x)
    checks.one_of("exponent", a.exponent, (2, 3))


def _check_gradient(a: GradientInputs) -> None:
    _check(a)
    checks.shapes(grad=(a.grad, ""))
    checks.alike("x", a.x, grad=a.grad)


_floats = backends.reads("x", torch.float32, torch.float64)


def _native(a: SumInputs) -> Tensor:
    partial = a.x.new_empty(-(-a.x.numel() // NUMBERS_PER_BLOCK), dtype=torch.float64)
    torch.ops.dhns_fast_native.power_sum(a.x, a.exponent, partial)
    return partial.sum().to(a.x.dtype)


def _native_gradient(a: GradientInputs) -> Tensor:
    out = memory.empty(a.x.shape, a.x.dtype, a.x.device)
    torch.ops.dhns_fast_native.power_gradient(a.x, a.exponent, a.grad.item(), out)
    return out


def _eager(a: SumInputs) -> Tensor:
    return (a.x.square() if a.exponent == 2 else a.x.abs().pow(3)).sum()


def _eager_gradient(a: GradientInputs) -> Tensor:
    return a.x * (2 * a.grad) if a.exponent == 2 else (a.x * a.x.abs()).mul_(3 * a.grad)


# A scalar.
power_sum = Operator(
    "power_sum", SumInputs, Tensor, check=_check, fake=lambda a: a.x.new_empty(()),
    implementations=(Implementation(backends.CPU, _native, _floats), Implementation(backends.EAGER, _eager)),
)  # fmt: skip

# grad · ∂sum/∂x, shaped as x.
power_gradient = Operator(
    "power_gradient", GradientInputs, Tensor, check=_check_gradient, fake=lambda a: a.x.new_empty(a.x.shape),
    implementations=(
        Implementation(backends.CPU, _native_gradient, _floats),
        Implementation(backends.EAGER, _eager_gradient),
    ),
)  # fmt: skip


def _save(ctx: Any, a: SumInputs, output: Tensor) -> None:
    ctx.save_for_backward(a.x)
    ctx.how = a.exponent, a.backend


def _backward(ctx: Any, grad: Tensor) -> SumInputs:
    return power_sum.gradients(x=power_gradient(grad, *ctx.saved_tensors, *ctx.how))


power_sum.differentiate(_save, _backward)
