"""`torch.ops.dhns_fast.diffusion_loss`: Σ weight·mean|ε − ε_θ(x, t, c)| on folded weights, with every gradient in one
pass.

The loss is a scalar, so its gradients are known up to a factor as soon as it is: they are computed beside it, a block
of rows at a time while the block's activations are in the cache, and autograd keeps no activation. With p = x·Vxᵀ +
c·Vcᵀ + τ(t)·Vτᵀ, h = relu(p·s₁ + b₁′), q = (h − mean h)·Gᵀ, ε_θ = q·s₂ + b₂′ and e = ∂L/∂ε_θ (see
`dhns_fast.diffusion.folding` for the names):

    ∂h = (e·s₂)·G − h₀·s₂³·⟨e, q⟩/4D    ∂p = s₁·[h > 0]·∂h    ∂s₁ = ⟨∂h·[h > 0], h − b₁′⟩/s₁      h₀ = h − mean h

G's rows are centred, so that ∂h needs no centring. The C++ sums have one order, whatever the number of threads.
Differentiable once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import PRECISIONS
from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS
from dhns_fast.diffusion.folding import Folded, Moments
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.precision import matmul_precision
from dhns_fast.ops.rows import add_rows

# Activations of a block on the CPU, 4D floats a row: three of them in a megabyte or two of cache. Elsewhere the batch
# is one block.
_CPU_BLOCK_ELEMENTS = 1 << 18
_CPU_BLOCK_ROWS_MIN = 128


def diffusion_loss(
    noisy: Tensor, condition: Tensor, noise: Tensor, timesteps: Tensor, weight: Tensor, folded: Folded, precision: str
) -> Tensor:
    """Σ weight·mean|noise − ε_θ(noisy, timesteps, condition)|, a scalar.

    Args:
        noisy, condition: `[..., D]`.
        noise: `[..., D]`, shaped as `noisy` or broadcast along its leading dimensions.
        timesteps: int64 in 1..T, one a row, `[...]` or broadcast.
        weight: of each row, `[...]` or broadcast; no gradient flows into it, nor into the noise.
        folded: weights, see :func:`dhns_fast.diffusion.folding.fold`.
        precision: "ieee", "tf32" or "bf16" operands.
    """
    rows, D = noisy.shape[:-1], noisy.shape[-1]
    by_row = (x.expand(rows).reshape(-1) for x in (timesteps, weight))
    by_element = (x.expand(*rows, D).reshape(-1, D) for x in (noisy, condition, noise))
    weights = (*folded[:3], *folded.time_moments, *folded[4:])
    differentiable = torch.is_grad_enabled()
    return OPERATOR(
        *by_element,
        *by_row,
        *weights,
        precision,
        differentiable and any(w.requires_grad for w in weights),
        differentiable and (noisy.requires_grad or condition.requires_grad),
    )[0]


class LossInputs(NamedTuple):
    noisy: Tensor  # [N, D]
    condition: Tensor  # [N, D]
    noise: Tensor  # [N, D]
    timesteps: Tensor  # int64 [N]
    weight: Tensor  # [N]
    state: Tensor  # [4D, D]
    condition_weight: Tensor  # [4D, D]
    time: Tensor  # [T, 4D]
    time_mean: Tensor  # [T, 1]
    time_var: Tensor  # [T, 1]
    bias1: Tensor  # [4D]
    output: Tensor  # [D, 4D]
    bias2: Tensor  # [D]
    precision: str
    with_weights: bool
    with_inputs: bool
    backend: str = ""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[5:13]


def _check(a: LossInputs) -> None:
    checks.one_of("precision", a.precision, PRECISIONS)
    sizes = checks.shapes(
        noisy=(a.noisy, "N D"), condition=(a.condition, "N D"), noise=(a.noise, "N D"), timesteps=(a.timesteps, "N"), weight=(a.weight, "N"),
        bias1=(a.bias1, "H"), state=(a.state, "H D"), condition_weight=(a.condition_weight, "H D"), time=(a.time, "T H"),
        time_mean=(a.time_mean, "T 1"), time_var=(a.time_var, "T 1"), output=(a.output, "D H"), bias2=(a.bias2, "D"),
    )  # fmt: skip
    if not sizes["D"] or not sizes["T"] or sizes["H"] != 4 * sizes["D"]:
        raise InputError(
            "state",
            Shown(f"shape {list(a.state.shape)}"),
            f"[4D, D] of D = {sizes['D']} > 0, for T = {sizes['T']} > 0 steps",
        )
    checks.floating(noisy=a.noisy)
    checks.dtype(torch.int64, timesteps=a.timesteps)
    checks.on_device("noisy", a.noisy, timesteps=a.timesteps)
    floats = {name: x for name, x in zip(a._fields[:13], a[:13], strict=True) if name != "timesteps"}
    checks.alike("noisy", a.noisy, **floats)


def _look(a: LossInputs) -> None:
    if a.timesteps.numel():
        lowest, highest = (int(x) for x in a.timesteps.aminmax())
        if lowest < 1 or highest > len(a.time):
            raise InputError("timesteps", Shown(f"values from {lowest} to {highest}"), f"1 to {len(a.time)}")


def _fake(a: LossInputs) -> tuple[Tensor, ...]:
    return a.noisy.new_empty(()), *_gradients(a)


def _gradients(a: LossInputs) -> list[Tensor]:
    """Room for the gradients of noisy, condition and the eight weights, zeros; empty where they are not wanted."""
    inputs = [a.noisy.new_zeros(a.noisy.shape if a.with_inputs else (0,)) for _ in range(2)]
    return inputs + [w.new_zeros(w.shape if a.with_weights else (0,)) for w in a.weights]


def _run(a: LossInputs) -> tuple[Tensor, ...]:
    state, condition, time, mean, var, bias1, output, bias2 = a.weights
    folded = Folded(state, condition, time, Moments(mean, var), bias1, output, bias2)
    grads = _gradients(a)
    loss = a.noisy.new_zeros(())
    N, D = a.noisy.shape
    block = max(_CPU_BLOCK_ROWS_MIN, _CPU_BLOCK_ELEMENTS // (4 * D)) if a.noisy.device.type == "cpu" else max(N, 1)
    with matmul_precision(a.precision, a.noisy.device):
        if a.precision == "bf16":
            folded = folded._replace(state=state.bfloat16(), condition=condition.bfloat16(), output=output.bfloat16())
        for first in range(0, N, block):
            part = slice(first, first + block)
            block_grads = [g[part] if k < 2 else g for k, g in enumerate(grads)]
            x, c, e, t, w = (x[part] for x in a[:5])
            _block(loss, block_grads, x, c, e, t, w, folded, a.with_weights, a.with_inputs)
    return loss, *grads


_floats = backends.reads("noisy", torch.float32, torch.float64)


def _not_native(a: LossInputs) -> Iterator[str]:
    yield from _floats(a)
    if a.precision != "ieee":
        yield f"its products are of precision 'ieee', not {a.precision!r}"


def _native(a: LossInputs) -> tuple[Tensor, ...]:
    grads = _gradients(a)
    loss = torch.zeros((), dtype=torch.float64)
    if a.noisy.numel():
        turned = [w.T.contiguous() for w in (a.state, a.condition_weight, a.output)]
        rows = [a.noisy, a.condition, a.noise, a.weight]
        torch.ops.dhns_fast_native.diffusion_loss(rows, a.timesteps, list(a.weights), turned, loss, grads)
    return loss.to(a.noisy.dtype), *grads


Eleven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# The loss and the gradients of noisy, condition and the eight weights; empty tensors for those that are not wanted.
OPERATOR = Operator(
    "diffusion_loss", LossInputs, Eleven, check=_check, look=_look, fake=_fake,
    implementations=(Implementation(backends.CPU, _native, _not_native), Implementation(backends.EAGER, _run)),
)  # fmt: skip


def _save(ctx: Any, a: LossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.with_weights, ctx.with_inputs = a.with_weights, a.with_inputs
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor) -> LossInputs:
    OPERATOR.refuse_unasked(ctx, "with_inputs", ctx.with_inputs, "noisy", "condition")
    OPERATOR.refuse_unasked(ctx, "with_weights", ctx.with_weights, *LossInputs._fields[5:13])
    wanted = dict.fromkeys(("noisy", "condition"), ctx.with_inputs) | dict.fromkeys(
        LossInputs._fields[5:13], ctx.with_weights
    )
    saved = zip(wanted.items(), ctx.saved_tensors, strict=True)
    return OPERATOR.gradients(**{name: grad * g if want else None for (name, want), g in saved})


OPERATOR.differentiate(_save, _backward)


def _block(
    loss: Tensor,
    grads: list[Tensor],
    x: Tensor,
    c: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    f: Folded,
    with_weights: bool,
    with_inputs: bool,
) -> None:
    """Add a block of rows to the loss and to the gradients of the weights, and fill the gradients of its own inputs."""
    D = x.shape[-1]
    add_product = _add_bf16_product if f.state.dtype == torch.bfloat16 else torch.Tensor.addmm_
    i = timesteps - 1
    parts = Moments.of(x), Moments(f.time_moments.mean[i], f.time_moments.var[i]), Moments.of(c)
    s1 = parts[0].merged_rstd(*parts[1:])
    p = f.time[i]
    add_product(p, x, f.state.T)
    add_product(p, c, f.condition.T)
    h = torch.addcmul(f.bias1, p, s1, out=p).relu_()
    h0 = h - h.mean(-1, keepdim=True)
    s2 = torch.linalg.vector_norm(h0, dim=-1, keepdim=True).square_().div_(4 * D).add_(LAYER_NORM_EPS).rsqrt_()
    q = add_product(torch.zeros_like(x), h0, f.output.T)
    error = torch.addcmul(f.bias2, q, s2).sub_(noise)
    loss += weight @ torch.linalg.vector_norm(error, ord=1, dim=-1).div_(D)
    if not (with_weights or with_inputs):
        return
    g_x, g_c, g_state, g_condition, g_time, g_mean, g_var, g_bias1, g_output, g_bias2 = grads
    e = error.sign_().mul_((weight / D)[:, None])
    along = (e * q).sum(-1, keepdim=True).mul_(s2.pow(3)).div_(-4 * D)
    if with_weights:
        g_bias2 += e.sum(0)
    e.mul_(s2)
    if with_weights:
        add_product(g_output, e.T, h0)
    d = add_product(h0.mul_(along), e, f.output)
    d = torch.ops.aten.threshold_backward(d, h, 0)  # 0 where h is
    ds1 = (d * h.sub_(f.bias1)).sum(-1, keepdim=True).div_(s1)
    if with_weights:
        g_bias1 += d.sum(0)
    d.mul_(s1)
    # s₁ = (v + eps)^−½ with v = Σ_parts (var + (mean − common)²)/3.
    common = (parts[0].mean + parts[1].mean + parts[2].mean) / 3
    dv = s1.pow(3).mul_(ds1).mul_(-1 / 6)
    if with_weights:
        add_product(g_state, d.T, x)
        add_product(g_condition, d.T, c)
        add_rows(g_time, i, d)
        add_rows(g_mean, i, (parts[1].mean - common).mul_(dv).mul_(2))
        add_rows(g_var, i, dv)
    if with_inputs:
        dv.mul_(2 / D)
        for g, y, w in ((g_x, x, f.state), (g_c, c, f.condition)):
            add_product(torch.mul(y - common, dv, out=g), d, w)


def _add_bf16_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return out.add_(torch.mm(a.bfloat16(), b.bfloat16()))
