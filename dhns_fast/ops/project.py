"""`torch.ops.dhns_fast.project`: linear views of rows of a feature matrix, W·x + b, in which equal rows come out equal.

Rows are read where they lie, and nothing is kept for backward but what was given. The C++ sums have one order, whatever
the number of threads and wherever a row stands; a library's have neither: in one plain product 29 of 200 small tables
had two bit patterns for equal entities in float64, and 6 in float32. Differentiable once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory, project_eager
from dhns_fast.ops.backend import Implementation, Unfit
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.score import look_inside


class ProjectInputs(NamedTuple):
    features: Tensor  # x, [E, K]
    ids: Tensor | None  # int64 [n]: which of its rows; None: all
    weight: Tensor  # W, [D, K]
    bias: Tensor  # b, [D]
    backend: str = ""


class GradientInputs(NamedTuple):
    grad: Tensor  # of the views, [n, D]
    features: Tensor
    ids: Tensor | None
    weight: Tensor
    with_features: bool
    backend: str = ""


def _check(a: ProjectInputs | GradientInputs, **more: tuple[Tensor, str]) -> None:
    rows = "E" if a.ids is None else "n"
    checks.shapes(
        features=(a.features, "E K"), ids=(a.ids, "n"), weight=(a.weight, "D K"),
        **{name: (x, shape.replace("rows", rows)) for name, (x, shape) in more.items()},
    )  # fmt: skip
    checks.floating(features=a.features)
    checks.alike("features", a.features, weight=a.weight, **{name: x for name, (x, _) in more.items()})
    if a.ids is not None:
        checks.dtype(torch.int64, ids=a.ids)
        checks.on_device("features", a.features, ids=a.ids)


def _check_views(a: ProjectInputs) -> None:
    _check(a, bias=(a.bias, "D"))


def _check_gradient(a: GradientInputs) -> None:
    _check(a, grad=(a.grad, "rows D"))


def _look(a: ProjectInputs | GradientInputs) -> None:
    if a.ids is not None:
        look_inside("ids", a.ids, len(a.features))


def _fake(a: ProjectInputs) -> Tensor:
    return a.features.new_empty(len(a.features if a.ids is None else a.ids), len(a.weight))


def _fake_gradient(a: GradientInputs) -> tuple[Tensor, Tensor, Tensor]:
    by_features = a.features.new_empty(a.features.shape if a.with_features else (0,))
    return a.weight.new_empty(a.weight.shape), a.weight.new_empty(len(a.weight)), by_features


_floats = backends.reads("features", torch.float32, torch.float64)


def _native(a: ProjectInputs) -> Tensor:
    if not a.weight.numel():  # nothing to multiply, and C++ would divide by a width of 0
        _look(a)
        return project_eager.views(a)
    rows = len(a.features if a.ids is None else a.ids)
    out = memory.empty((rows, len(a.weight)), a.weight.dtype, a.weight.device)
    if not torch.ops.dhns_fast_native.project(a.features, a.ids, a.weight.T.contiguous(), a.bias, out):
        raise Unfit
    return out


def _native_gradient(a: GradientInputs) -> tuple[Tensor, Tensor, Tensor]:
    if not a.weight.numel():  # as above
        _look(a)
        return project_eager.gradients(a)
    by_weight, by_bias = torch.zeros_like(a.weight), a.weight.new_zeros(len(a.weight))
    run = torch.ops.dhns_fast_native
    if not run.project_by_weight(a.grad, a.features, a.ids, by_weight, by_bias):
        raise Unfit
    if not a.with_features:
        return by_weight, by_bias, a.features.new_empty(0)
    by_rows = memory.empty((len(a.grad), a.weight.shape[1]), a.grad.dtype, a.grad.device)
    run.project_by_rows(a.grad, a.weight, by_rows)
    return by_weight, by_bias, project_eager.of_features(a, by_rows)


# W·x + b, [n, D].
project = Operator(
    "project", ProjectInputs, Tensor, check=_check_views, look=_look, fake=_fake,
    implementations=(
        Implementation(backends.CPU, _native, _floats, looks=True),
        Implementation(backends.EAGER, project_eager.views),
    ),
)  # fmt: skip

# The gradients of weight, of bias and, where `with_features`, of features; without, an empty tensor.
project_gradient = Operator(
    "project_gradient", GradientInputs, tuple[Tensor, Tensor, Tensor], check=_check_gradient, look=_look, fake=_fake_gradient,
    implementations=(
        Implementation(backends.CPU, _native_gradient, _floats, looks=True),
        Implementation(backends.EAGER, project_eager.gradients),
    ),
)  # fmt: skip


def _save(ctx: Any, a: ProjectInputs, output: Tensor) -> None:
    ctx.save_for_backward(a.features, a.ids, a.weight)
    ctx.backend = a.backend


def _backward(ctx: Any, grad: Tensor) -> ProjectInputs:
    features, ids, weight = ctx.saved_tensors
    with_features = ctx.needs_input_grad[0]
    by_weight, by_bias, by_features = project_gradient(grad, features, ids, weight, with_features, ctx.backend)
    return project.gradients(features=by_features if with_features else None, weight=by_weight, bias=by_bias)


project.differentiate(_save, _backward)
