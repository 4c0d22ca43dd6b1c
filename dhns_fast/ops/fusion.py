"""`torch.ops.dhns_fast.fuse`: the joint embeddings of entities from their modalities, in one pass over these.

    a = softmax_m(w·tanh(e_m));    joint = Σ_m a_m·e_m

Plain torch writes a tensor as large as all modalities for each of tanh, product and sum, and three more for the
gradients. Here backward reads the modalities again, makes the weights anew, and writes nothing but what was asked for.
A modality that an entity lacks takes no part, whatever stands in its place. Differentiable once. Source: Niu & Zhang,
DASFAA 2025 (arXiv 2501.15393), §3.4; the mask is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import fusion_eager, memory
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.fusion_eager import modalities
from dhns_fast.ops.operator import Operator

# Of which one partial sum of the attention's gradient is made: kFusedRows of csrc/fusion_cpu.h.
ROWS_PER_BLOCK = 64


class FuseInputs(NamedTuple):
    structure: Tensor  # [n, D]
    views: list[Tensor]  # of the other modalities, each [n, D]
    attention: Tensor  # w, [D]
    present: Tensor | None = None  # bool [1 + views, n]; None: all
    backend: str = ""


class GradientInputs(NamedTuple):
    grad: Tensor  # of the joint embeddings, [n, D]
    structure: Tensor
    views: list[Tensor]
    attention: Tensor
    present: Tensor | None = None
    backend: str = ""


def _check(a: FuseInputs | GradientInputs) -> None:
    checks.floating(structure=a.structure)
    M = 1 + len(a.views)
    views = {f"views[{i}]": x for i, x in enumerate(a.views)}
    sizes = checks.shapes(
        structure=(a.structure, "n D"), attention=(a.attention, "D"), present=(a.present, f"{M} n"),
        **{name: (x, "n D") for name, x in views.items()},
    )  # fmt: skip
    if not sizes["D"]:
        raise InputError("structure", Shown(f"shape {list(a.structure.shape)}"), "[n, D] of D > 0")
    checks.alike("structure", a.structure, attention=a.attention, **views)
    if a.present is not None:
        checks.dtype(torch.bool, present=a.present)
        checks.on_device("structure", a.structure, present=a.present)


def _check_gradient(a: GradientInputs) -> None:
    _check(a)
    checks.shapes(structure=(a.structure, "n D"), grad=(a.grad, "n D"))
    checks.alike("structure", a.structure, grad=a.grad)


def _fake(a: FuseInputs) -> Tensor:
    return a.structure.new_empty(a.structure.shape)


def _fake_gradient(a: GradientInputs) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*modalities(a), a.attention)]


_floats = backends.reads("structure", torch.float32, torch.float64)


def _native(a: FuseInputs) -> Tensor:
    x = a.structure
    joint = memory.empty(x.shape, x.dtype, x.device)
    torch.ops.dhns_fast_native.fuse(modalities(a), a.attention, a.present, joint)
    return joint


def _native_gradient(a: GradientInputs) -> list[Tensor]:
    x, given = a.structure, modalities(a)
    gradients = [memory.empty(x.shape, x.dtype, x.device) for _ in given]
    partial = x.new_empty(-(-len(x) // ROWS_PER_BLOCK), x.shape[1], dtype=torch.float64)
    torch.ops.dhns_fast_native.fuse_gradient(a.grad, given, a.attention, a.present, gradients, partial)
    return [*gradients, partial.sum(0).to(x.dtype)]


# Joint embeddings [n, D]; 0 for an entity without any modality.
fuse = Operator(
    "fuse", FuseInputs, Tensor, check=_check, fake=_fake,
    implementations=(
        Implementation(backends.CPU, _native, _floats),
        Implementation(backends.EAGER, fusion_eager.joint),
    ),
)  # fmt: skip

# The gradients of structure, of each view and of attention; 0 where a modality is absent.
fuse_gradient = Operator(
    "fuse_gradient", GradientInputs, list[Tensor], check=_check_gradient, fake=_fake_gradient,
    implementations=(
        Implementation(backends.CPU, _native_gradient, _floats),
        Implementation(backends.EAGER, fusion_eager.gradients),
    ),
)  # fmt: skip


def _save(ctx: Any, a: FuseInputs, output: Tensor) -> None:
    ctx.save_for_backward(a.attention, a.present, *modalities(a))
    ctx.backend = a.backend


def _backward(ctx: Any, grad: Tensor) -> FuseInputs:
    attention, present, structure, *views = ctx.saved_tensors
    by_structure, *by_views, by_attention = fuse_gradient(grad, structure, views, attention, present, ctx.backend)
    return fuse.gradients(structure=by_structure, views=by_views, attention=by_attention)


fuse.differentiate(_save, _backward)
