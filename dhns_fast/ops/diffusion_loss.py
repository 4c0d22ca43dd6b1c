"""`torch.ops.dhns_fast.diffusion_loss`: Σ weight·mean|ε − ε_θ(x, t, c)| on folded weights, with every gradient in one pass.

The loss is a scalar, so its gradients are known up to a factor as soon as it is: they are computed beside it, a block of rows at a time while
the block's activations are in the cache, and autograd keeps no activation. With p = x·Vxᵀ + c·Vcᵀ + τ(t)·Vτᵀ, h = relu(p·s₁ + b₁′),
q = (h − mean h)·Gᵀ, ε_θ = q·s₂ + b₂′ and e = ∂L/∂ε_θ (see `dhns_fast.diffusion.folding` for the names):

    ∂h = (e·s₂)·G − h₀·s₂³·⟨e, q⟩/4D    ∂p = s₁·[h > 0]·∂h    ∂s₁ = ⟨∂h·[h > 0], h − b₁′⟩/s₁      h₀ = h − mean h

G's rows are centred, so that ∂h needs no centring. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS
from dhns_fast.diffusion.folding import Folded, Moments
from dhns_fast.ops.denoise import matmul_precision
from dhns_fast.ops.operator import operator

# Activations of a block on the CPU, 4D floats a row: three of them in a megabyte or two of cache. Elsewhere the batch is one block.
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
    return torch.ops.dhns_fast.diffusion_loss(
        *by_element,
        *by_row,
        *weights,
        precision,
        differentiable and any(w.requires_grad for w in weights),
        differentiable and (noisy.requires_grad or condition.requires_grad),
    )[0]


@operator("diffusion_loss")
def _diffusion_loss(
    noisy: Tensor,
    condition: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    state: Tensor,
    condition_weight: Tensor,
    time: Tensor,
    time_mean: Tensor,
    time_var: Tensor,
    bias1: Tensor,
    output: Tensor,
    bias2: Tensor,
    precision: str,
    with_weights: bool,
    with_inputs: bool,
) -> list[Tensor]:
    folded = Folded(state, condition_weight, time, Moments(time_mean, time_var), bias1, output, bias2)
    grads = _gradients(noisy, (*folded[:3], time_mean, time_var, *folded[4:]), with_weights, with_inputs)
    loss = noisy.new_zeros(())
    N, D = noisy.shape
    block = max(_CPU_BLOCK_ROWS_MIN, _CPU_BLOCK_ELEMENTS // (4 * D)) if noisy.device.type == "cpu" else max(N, 1)
    with matmul_precision(precision, noisy.device):
        if precision == "bf16":
            folded = folded._replace(state=state.bfloat16(), condition=condition_weight.bfloat16(), output=output.bfloat16())
        for first in range(0, N, block):
            part = slice(first, first + block)
            block_grads = [g[part] if k < 2 else g for k, g in enumerate(grads)]
            x, c, e, t, w = (x[part] for x in (noisy, condition, noise, timesteps, weight))
            _block(loss, block_grads, x, c, e, t, w, folded, with_weights, with_inputs)
    return [loss, *grads]


@_diffusion_loss.register_fake
def _(noisy: Tensor, condition: Tensor, noise: Tensor, timesteps: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    *weights, _, with_weights, with_inputs = rest
    return [noisy.new_empty(()), *_gradients(noisy, tuple(weights), with_weights, with_inputs)]


def _gradients(noisy: Tensor, weights: tuple[Tensor, ...], with_weights: bool, with_inputs: bool) -> list[Tensor]:
    """Room for the gradients of noisy, condition and the eight weights; empty where they are not wanted."""
    inputs = [torch.zeros_like(noisy) if with_inputs else noisy.new_empty(0) for _ in range(2)]
    return inputs + [torch.zeros_like(w) if with_weights else w.new_empty(0) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.with_weights, ctx.with_inputs = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    scaled = [
        grads[0] * g if wanted else None
        for g, wanted in zip(ctx.saved_tensors, [ctx.with_inputs] * 2 + [ctx.with_weights] * 8, strict=True)
    ]
    return (*scaled[:2], None, None, None, *scaled[2:], None, None, None)


_diffusion_loss.register_autograd(_backward, setup_context=_save)


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
        _add_rows(g_time, i, d)
        _add_rows(g_mean, i, (parts[1].mean - common).mul_(dv).mul_(2))
        _add_rows(g_var, i, dv)
    if with_inputs:
        dv.mul_(2 / D)
        for g, y, w in ((g_x, x, f.state), (g_c, c, f.condition)):
            add_product(torch.mul(y - common, dv, out=g), d, w)


def _add_bf16_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return out.add_(torch.mm(a.bfloat16(), b.bfloat16()))


def _add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index[k]] += rows[k], in one order on every device: CUDA's index_add_ adds as its threads come."""
    if table.device.type == "cpu":
        table.index_add_(0, index, rows)
    else:
        table.index_put_((index,), rows, accumulate=True)
