"""`torch.ops.dhns_fast.corruption_loss`: self-adversarial loss of queries against corruptions by index, without the
gathered [B, N, D].

Forward scores, weighs and computes the gradient of the queries while a query's rows are in the cache; backward goes
through the rows of the table, each written once. Arguments are those of `dhns_fast.loss.corruption_loss` but for `ids`,
[B, 1 + N]: the true answer, then the corruptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import corruption_eager, memory
from dhns_fast.ops.backend import Implementation, Unfit
from dhns_fast.ops.hal import refuse_empty
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.score import check_parts, look_inside


class LossInputs(NamedTuple):
    query: Tensor  # [B, D]
    table: Tensor  # [E, D]
    ids: Tensor  # int64 [B, 1 + N]
    reduction: str
    offset: float
    temperature: float
    backend: str = ""
    scale: Tensor | None = None  # [B, D]


class TableInputs(NamedTuple):
    grad: Tensor  # of the loss, a scalar
    query: Tensor
    table: Tensor
    ids: Tensor
    slope: Tensor  # [B, 1 + N], see corruption_loss
    reduction: str
    backend: str = ""
    scale: Tensor | None = None


def _check_tables(a: LossInputs | TableInputs) -> None:
    checks.one_of("reduction", a.reduction, REDUCTIONS)
    sizes = checks.shapes(query=(a.query, "B D"), table=(a.table, "E D"), ids=(a.ids, "B C"), scale=(a.scale, "B D"))
    check_parts(a.reduction, sizes["D"])
    if a.query.dtype not in (torch.float32, torch.float64):
        raise InputError("query", a.query, "torch.float32, torch.float64")
    checks.alike("query", a.query, table=a.table, scale=a.scale)
    checks.dtype(torch.int64, ids=a.ids)
    checks.on_device("query", a.query, ids=a.ids)


def check_loss(a: LossInputs) -> None:
    _check_tables(a)
    refuse_empty(query=a.query, table=a.table)
    if a.ids.shape[1] < 2:
        raise InputError("ids", a.ids, f"[{a.query.shape[0]}, 1 + N] with at least one corruption")


def _check_gradient(a: TableInputs) -> None:
    _check_tables(a)
    checks.shapes(grad=(a.grad, ""), slope=(a.slope, "B C"), ids=(a.ids, "B C"))
    checks.alike("query", a.query, slope=a.slope)
    checks.floating(grad=a.grad)
    checks.on_device("query", a.query, grad=a.grad)


def look(a: LossInputs | TableInputs) -> None:
    look_inside("answer, corrupt", a.ids, len(a.table))


def _fake_loss(a: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = a.query
    by_scale = query.new_empty(query.shape if a.scale is not None else (0,))
    return query.new_empty(()), query.new_empty(query.shape), query.new_empty(a.ids.shape), by_scale


def _fake_gradient(a: TableInputs) -> Tensor:
    return a.table.new_empty(a.table.shape)


def _no_scale(a: LossInputs | TableInputs) -> Iterator[str]:
    if a.scale is not None:
        yield "it takes no scale"


def _triton_loss(a: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dhns_fast.kernels import corruption as kernels

    outputs = kernels.corruption_loss(a.query, a.table, a.ids, a.reduction, a.offset, a.temperature)
    return *outputs, a.query.new_empty(0)


def _triton_gradient(a: TableInputs) -> Tensor:
    from dhns_fast.kernels import corruption as kernels

    return kernels.table_gradient(a.grad, a.query, a.table, a.ids, a.slope, a.reduction)


def _native_loss(a: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = a.query
    slope, by_query = query.new_empty(a.ids.shape), query.new_empty(query.shape)
    partial = query.new_empty(len(query), dtype=torch.float64)
    reduction = REDUCTIONS.index(a.reduction)
    run = torch.ops.dhns_fast_native.corruption_loss
    if not run(reduction, query, a.table, a.ids, a.offset, a.temperature, slope, by_query, partial):
        raise Unfit
    return partial.sum().to(query.dtype), by_query, slope, query.new_empty(0)


def _native_gradient(a: TableInputs) -> Tensor:
    out = memory.empty(a.table.shape, a.table.dtype, a.table.device)
    reduction = REDUCTIONS.index(a.reduction)
    run = torch.ops.dhns_fast_native.corruption_table_gradient
    if not run(reduction, a.grad.item(), a.query, a.table, a.ids, a.slope, out):
        raise Unfit
    return out


# Loss, its gradient in query, its derivative by each sum of terms [B, 1 + N] (for l2 by half the sum), which backward
# wants, and its gradient in scale (empty without one).
corruption_loss = Operator(
    "corruption_loss", LossInputs, tuple[Tensor, Tensor, Tensor, Tensor], check=check_loss, look=look, fake=_fake_loss,
    implementations=(
        Implementation(backends.TRITON, _triton_loss, _no_scale),
        Implementation(backends.CPU, _native_loss, _no_scale, looks=True),
        Implementation(backends.EAGER, corruption_eager.loss),
    ),
)  # fmt: skip

# grad · ∂loss/∂table, [E, D]; rows that no pair touches are zero.
corruption_table_gradient = Operator(
    "corruption_table_gradient", TableInputs, Tensor, check=_check_gradient, look=look, fake=_fake_gradient,
    implementations=(
        Implementation(backends.TRITON, _triton_gradient, _no_scale),
        Implementation(backends.CPU, _native_gradient, _no_scale, looks=True),
        Implementation(backends.EAGER, corruption_eager.table_gradient),
    ),
)  # fmt: skip


def _save(ctx: Any, a: LossInputs, output: tuple[Tensor, ...]) -> None:
    _, by_query, slope, by_scale = output
    ctx.save_for_backward(a.query, a.table, a.ids, a.scale, by_query, slope, by_scale)
    ctx.how = a.reduction, a.backend


def _backward(ctx: Any, grad: Tensor) -> LossInputs:
    query, table, ids, scale, by_query, slope, by_scale = ctx.saved_tensors
    for_query, for_table, *_, for_scale = ctx.needs_input_grad
    return corruption_loss.gradients(
        query=grad * by_query if for_query else None,
        table=corruption_table_gradient(grad, query, table, ids, slope, *ctx.how, scale) if for_table else None,
        scale=grad * by_scale if for_scale and scale is not None else None,
    )


corruption_loss.differentiate(_save, _backward)
