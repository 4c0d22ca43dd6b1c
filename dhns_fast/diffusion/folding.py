"""Exact rewriting of ε_θ that shares work between steps, rows and sides.

With V = W₁·diag(γ₁), its rows centred over all 3D inputs, V·y = V·(y − mean(y)): LayerNorm 1 needs only 1/σ of a row,
and the product splits into parts that depend on the state, on the step and on the condition alone:

    pre = (x·Vxᵀ + τ(t)·Vτᵀ + c·Vcᵀ)/σ + b₁′            b₁′ = b₁ + W₁·β₁

σ comes from the mean and variance of each part (Chan's merge, which does not cancel as E[y²] − E[y]² would). Nothing
nonlinear stands between LayerNorm 2, mlp2 and output_layer, so they are one matrix with centred rows and one bias:

    ε_θ = G·h/σ₂ + b₂′            G = centred(Wₒ·W₂·diag(γ₂)),  b₂′ = Wₒ·(W₂·β₂ + b₂) + bₒ

A row of a step costs 8D² multiply-adds for 19D². Folding takes 4D³ + 12D² once a call: it is repeated in every call,
because optimisers that write through `.data` leave no trace that a cache could be keyed on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS, Denoiser


class Moments(NamedTuple):
    """Mean and (biased) variance of the last dimension, kept: `[..., 1]`."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        # Mean, difference and norm are vectorised on every device; torch.var_mean on the CPU is not (measured ten times
        # slower, one thread of Zen 3).
        mean = x.mean(-1, keepdim=True)
        return cls(mean, torch.linalg.vector_norm(x - mean, dim=-1, keepdim=True).square() / x.shape[-1])

    def merged_rstd(self, *others: Moments) -> Tensor:
        """1/√(var + eps) over the concatenation of equally wide parts."""
        parts = (self, *others)
        n = len(parts)
        mean = sum(p.mean for p in parts) / n
        var: Any = sum(p.var + (p.mean - mean).square() for p in parts) / n
        return torch.rsqrt(var + LAYER_NORM_EPS)


class Folded(NamedTuple):
    """Folded weights of ε_θ; D is the embedding dimension, T the number of steps."""

    state: Tensor  # Vx [4D, D]
    condition: Tensor  # Vc [4D, D]
    time: Tensor  # τ(t)·Vτᵀ [T, 4D]
    time_moments: Moments  # of τ(t), [T, 1] each
    bias1: Tensor  # b₁′ [4D]
    output: Tensor  # G [D, 4D]
    bias2: Tensor  # b₂′ [D]


class Factors(NamedTuple):
    """The same, V and G by what they are made of: weight·diag(scale) − shift. Whoever reads a weight once needs no
    folded copy of it.
    """

    weight1: Tensor  # W₁ [4D, 3D], the parameter itself: columns of the state, of τ, of the condition
    scale1: Tensor  # γ₁ [3D], the parameter itself
    shift1: Tensor  # [4D, 1]
    time: Tensor
    time_moments: Moments
    bias1: Tensor
    weight2: Tensor  # Wₒ·W₂ [D, 4D]
    scale2: Tensor  # γ₂ [4D], the parameter itself
    shift2: Tensor  # [D, 1]
    bias2: Tensor

    def folded(self) -> Folded:
        """The folded weights; differentiable."""
        state, condition = (_third(self.weight1, self.scale1, self.shift1, part) for part in (0, 2))
        output = torch.addcmul(-self.shift2, self.weight2, self.scale2)
        return Folded(state, condition, self.time, self.time_moments, self.bias1, output, self.bias2)

    def at(self, index: Tensor) -> Factors:
        """With the rows of the timesteps that a chain asks for, in their order: int64 [T'], from 0."""
        if len(index) == len(self.time):
            return self
        return self._replace(time=self.time[index], time_moments=Moments(*(x[index] for x in self.time_moments)))

    def owned(self) -> Factors:
        """With copies of the parameters."""
        return self._replace(weight1=self.weight1.clone(), scale1=self.scale1.clone(), scale2=self.scale2.clone())


def factors(denoiser: Denoiser, T: int) -> Factors:
    """What the weights of `denoiser` fold into for T steps; differentiable in all of them."""
    block, out = denoiser.denoiser_block, denoiser.output_layer
    norm1, norm2, mlp1, mlp2 = block.layer_norm1, block.layer_norm2, block.mlp1, block.mlp2
    # The mean of a row of W₁·diag(γ₁), without the product of the two in memory.
    shift1 = torch.mv(mlp1.weight, norm1.weight / norm1.weight.numel())[:, None]
    tau = block.time_table(T)
    both = out.weight @ mlp2.weight
    return Factors(
        weight1=mlp1.weight,
        scale1=norm1.weight,
        shift1=shift1,
        time=tau @ _third(mlp1.weight, norm1.weight, shift1, 1).T,
        time_moments=Moments.of(tau),
        bias1=torch.addmv(mlp1.bias, mlp1.weight, norm1.bias),
        weight2=both,
        scale2=norm2.weight,
        shift2=torch.mv(both, norm2.weight / norm2.weight.numel())[:, None],
        bias2=torch.addmv(out.bias, both, norm2.bias) + out.weight @ mlp2.bias,
    )


def fold(denoiser: Denoiser, T: int) -> Folded:
    """The folded weights of `denoiser` for T steps; differentiable in all of them."""
    return factors(denoiser, T).folded()


def _third(weight: Tensor, scale: Tensor, shift: Tensor, part: int) -> Tensor:
    """A third of the columns of V: 0 of the state, 1 of τ, 2 of the condition."""
    return torch.addcmul(-shift, weight.chunk(3, dim=1)[part], scale.chunk(3)[part])
