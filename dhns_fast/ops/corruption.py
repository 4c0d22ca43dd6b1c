"""`torch.ops.dhns_fast.corruption_loss`: self-adversarial loss of queries against corruptions by index, without the gathered [B, N, D].

Forward scores, weighs and computes the gradient of the queries while a query's rows are in the cache; backward goes through the rows of
the table, each written once. Arguments are those of `dhns_fast.loss.corruption_loss`, checked there, but for `ids`, [B, 1 + N]: the true
answer, then the corruptions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.operator import operator

BACKENDS = (backends.TRITON, backends.CPU, backends.EAGER)
_CODES = {"dot": 0, "l1": 1, "l2": 2, "complex_l1": 3}


@backends.chosen_while_tracing
def choose(backend: str | None, device_type: str) -> str:
    """The backend on a device; under torch.compile decided while tracing."""
    return backends.resolve(backend, torch.device(device_type), BACKENDS)


@operator("corruption_loss")
def corruption_loss(
    query: Tensor, table: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient of the query, and the derivative of the loss by each sum of terms [B, 1 + N], which backward wants."""
    query, table, ids = query.contiguous(), table.contiguous(), ids.contiguous()
    if backend == "triton":
        from dhns_fast.kernels import corruption as kernels

        with torch.cuda.device_of(query):
            return kernels.corruption_loss(query, table, ids, reduction, offset, temperature)
    lowest, highest = (int(x) for x in ids.aminmax())
    if lowest < 0 or highest >= len(table):
        raise InputError(f"answer, corrupt: got indices from {lowest} to {highest}; accepted are 0 to {len(table) - 1}")
    slope, grad_query = query.new_empty(ids.shape), torch.empty_like(query)
    partial = query.new_empty(len(query), dtype=torch.float64)
    torch.ops.dhns_fast_native.corruption_loss(_CODES[reduction], query, table, ids, offset, temperature, slope, grad_query, partial)
    return partial.sum().to(query.dtype), grad_query, slope


@corruption_loss.register_fake
def _(
    query: Tensor, table: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(()), query.new_empty(query.shape), query.new_empty(ids.shape)


@operator("corruption_table_gradient")
def corruption_table_gradient(
    grad: Tensor, query: Tensor, table: Tensor, ids: Tensor, slope: Tensor, reduction: str, backend: str
) -> Tensor:
    """grad · ∂loss/∂table, [E, D]; rows that no pair touches are zero."""
    query, table, ids = query.contiguous(), table.contiguous(), ids.contiguous()
    if backend == "triton":
        from dhns_fast.kernels import corruption as kernels

        with torch.cuda.device_of(query):
            return kernels.table_gradient(grad, query, table, ids, slope, reduction)
    out = memory.empty(table.shape, table.dtype, table.device)
    torch.ops.dhns_fast_native.corruption_table_gradient(_CODES[reduction], grad.item(), query, table, ids, slope, out)
    return out


@corruption_table_gradient.register_fake
def _(grad: Tensor, query: Tensor, table: Tensor, ids: Tensor, slope: Tensor, reduction: str, backend: str) -> Tensor:
    return table.new_empty(table.shape)


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    query, table, ids, reduction, _, _, backend = inputs
    _, grad_query, slope = output
    ctx.save_for_backward(query, table, ids, slope, grad_query)
    ctx.how = reduction, backend  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    query, table, ids, slope, grad_query = ctx.saved_tensors  # type: ignore[attr-defined]
    for_query, for_table = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    grad_table = None
    if for_table:
        grad_table = torch.ops.dhns_fast.corruption_table_gradient(grad, query, table, ids, slope, *ctx.how)  # type: ignore[attr-defined]
    return grad * grad_query if for_query else None, grad_table, None, None, None, None, None


corruption_loss.register_autograd(_backward, setup_context=_save)
