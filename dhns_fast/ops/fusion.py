"""`torch.ops.dhns_fast.fuse`: the joint embeddings of entities from their modalities, in one pass over these.

    a = softmax_m(w·tanh(e_m));    joint = Σ_m a_m·e_m

Plain torch writes a tensor as large as all modalities for each of tanh, product and sum, and three more for the
gradients. Here backward reads the modalities again, makes the weights anew, and writes nothing but what was asked for.
A modality that an entity lacks takes no part, whatever stands in its place. Differentiable once. Source: Niu & Zhang,
DASFAA 2025 (arXiv 2501.15393), §3.4; the mask is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import fusion_eager, memory
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator

# Of which one partial sum of the attention's gradient is made: kFusedRows of csrc/fusion_cpu.h.
ROWS_PER_BLOCK = 64


class FuseInputs(NamedTuple):
    embeddings: Tensor  # e, [M, n, D]
    attention: Tensor  # w, [D]
    present: Tensor | None = None  # bool [M, n]; None: all
    backend: str = ""


class GradientInputs(NamedTuple):
    grad: Tensor  # of the joint embeddings, [n, D]
    embeddings: Tensor
    attention: Tensor
    present: Tensor | None = None
    backend: str = ""


def _check(a: FuseInputs | GradientInputs) -> None:
    checks.floating(embeddings=a.embeddings)
    sizes = checks.shapes(embeddings=(a.embeddings, "M n D"), attention=(a.attention, "D"), present=(a.present, "M n"))
    if not sizes["M"] or not sizes["D"]:
        raise InputError("embeddings", Shown(f"shape {list(a.embeddings.shape)}"), "[M, n, D] of M > 0 and D > 0")
    checks.alike("embeddings", a.embeddings, attention=a.attention)
    if a.present is not None:
        checks.dtype(torch.bool, present=a.present)
        checks.on_device("embeddings", a.embeddings, present=a.present)


def _check_gradient(a: GradientInputs) -> None:
    _check(a)
    checks.shapes(embeddings=(a.embeddings, "M n D"), grad=(a.grad, "n D"))
    checks.alike("embeddings", a.embeddings, grad=a.grad)


def _fake(a: FuseInputs) -> Tensor:
    return a.embeddings.new_empty(a.embeddings.shape[1:])


def _fake_gradient(a: GradientInputs) -> tuple[Tensor, Tensor]:
    return a.embeddings.new_empty(a.embeddings.shape), a.attention.new_empty(a.attention.shape)


def _narrow(a: FuseInputs | GradientInputs) -> Iterator[str]:
    if a.embeddings.dtype not in (torch.float32, torch.float64):
        yield f"it reads torch.float32 and torch.float64, not {a.embeddings.dtype}"


def _native(a: FuseInputs) -> Tensor:
    e = a.embeddings
    joint = memory.empty(e.shape[1:], e.dtype, e.device)
    torch.ops.dhns_fast_native.fuse(e, a.attention, a.present, joint)
    return joint


def _native_gradient(a: GradientInputs) -> tuple[Tensor, Tensor]:
    e = a.embeddings
    by_embeddings = memory.empty(e.shape, e.dtype, e.device)
    partial = e.new_empty(-(-e.shape[1] // ROWS_PER_BLOCK), e.shape[2], dtype=torch.float64)
    torch.ops.dhns_fast_native.fuse_gradient(a.grad, e, a.attention, a.present, by_embeddings, partial)
    return by_embeddings, partial.sum(0).to(e.dtype)


# Joint embeddings [n, D]; 0 for an entity without any modality.
fuse = Operator(
    "fuse", FuseInputs, Tensor, check=_check, fake=_fake,
    implementations=(
        Implementation(backends.CPU, _native, _narrow),
        Implementation(backends.EAGER, fusion_eager.joint),
    ),
)  # fmt: skip

# The gradients of embeddings and of attention; 0 where a modality is absent.
fuse_gradient = Operator(
    "fuse_gradient", GradientInputs, tuple[Tensor, Tensor], check=_check_gradient, fake=_fake_gradient,
    implementations=(
        Implementation(backends.CPU, _native_gradient, _narrow),
        Implementation(backends.EAGER, fusion_eager.gradients),
    ),
)  # fmt: skip


def _save(ctx: Any, a: FuseInputs, output: Tensor) -> None:
    ctx.save_for_backward(a.embeddings, a.attention, a.present)
    ctx.backend = a.backend


def _backward(ctx: Any, grad: Tensor) -> FuseInputs:
    by_embeddings, by_attention = fuse_gradient(grad, *ctx.saved_tensors, ctx.backend)
    return fuse.gradients(embeddings=by_embeddings, attention=by_attention)


fuse.differentiate(_save, _backward)
