"""The noise predictor ε_θ(x_t, t, c) as modules with the release's names, order of parameters and initial weights under
a seed.

The modules compute as they stand here when they are called; sampling and training go through the folded weights
(:mod:`.folding`) instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast.catalogue import SIDES
from dhns_fast.checks import one_of
from dhns_fast.diffusion.conditions import CONDITIONS, Condition

LAYER_NORM_EPS = 1e-5


class PositionalEncoding(nn.Module):
    """PE(t) = [sin(t·f), cos(t·f)], f_k = exp(−ln(10000)·k/(D/2 − 1)): int `[B]` or `[B, 1]` -> `[B, D]`, in float32
    unless told.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        half = self.dim // 2
        k = torch.arange(half, dtype=dtype, device=timesteps.device)
        angle = timesteps.to(dtype).view(-1, 1) * torch.exp(k * (-math.log(10000.0) / (half - 1)))
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class DenoiserBlock(nn.Module):
    """LayerNorm → Linear → ReLU → LayerNorm → Linear over [x_t, τ(t), c]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # In the release's order, by which a seed gives its weights and an optimiser's state finds its parameters.
        self.layer_norm1 = nn.LayerNorm(3 * dim, eps=LAYER_NORM_EPS)
        self.mlp1 = nn.Linear(3 * dim, 4 * dim)
        self.layer_norm2 = nn.LayerNorm(4 * dim, eps=LAYER_NORM_EPS)
        self.mlp2 = nn.Linear(4 * dim, dim)
        self.time_mlp = nn.Sequential(PositionalEncoding(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def time_table(self, T: int) -> Tensor:
        """τ(1..T), shape `[T, D]`: it depends on no row, so one table serves every row and modality of a call."""
        return self.time(torch.arange(1, T + 1, device=self.mlp1.weight.device))

    def time(self, timesteps: Tensor) -> Tensor:
        """τ(t), int `[B]` or `[B, 1]` -> `[B, D]`."""
        encoding, first, act, second = self.time_mlp
        weight: Tensor = first.weight  # type: ignore[assignment]
        return second(act(first(encoding(timesteps, weight.dtype))))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """States and conditions `[B, D]`, timesteps int `[B]` or `[B, 1]` -> `[B, D]`, before the output layer."""
        y = torch.cat([x_t, self.time(t), c], dim=-1)
        return self.mlp2(self.layer_norm2(F.relu(self.mlp1(self.layer_norm1(y)))))


class ScoringModule(nn.Module):
    """The condition c of an entity and a relation; for RotatE it holds (γ + ε)/dim_r under the name that release
    checkpoints give it.

    Args:
        condition: an entry of `CONDITIONS`.
        release: TransE's signs are the release's.
        relation_range: RotatE's (γ + ε)/dim_r.
    """

    def __init__(self, condition: Condition, release: bool, relation_range: float | None) -> None:
        super().__init__()
        self.condition, self.release = condition, release
        if relation_range is not None:
            self.rel_embedding_range = nn.Parameter(torch.tensor([relation_range]), requires_grad=False)

    def forward(self, ht: Tensor, r: Tensor, mode: str) -> Tensor:
        """c `[..., D]` of the entity that stays, `[..., D]`, the relation `[..., dim_r]`, and the side generated,
        "tail" or "head".
        """
        one_of("mode", mode, SIDES)
        scale = self.rel_embedding_range if self.condition.has_relation_range else r
        return self.condition.formula(ht, r, mode == "tail", self.release, scale)


class Denoiser(nn.Module):
    """ε_θ: shared by all modalities and by both sides."""

    def __init__(
        self,
        dim: int,
        relation_range: float | None,
        condition: Condition = CONDITIONS["distmult"],
        release: bool = True,
    ) -> None:
        super().__init__()
        self.scoring_module = ScoringModule(condition, release, relation_range)
        self.denoiser_block = DenoiserBlock(dim)
        self.output_layer = nn.Linear(dim, dim)

    def forward(self, x_t: Tensor, t: Tensor, x_ht: Tensor, x_r: Tensor, mode: str) -> Tensor:
        """Predicted noise `[B, D]` of states `[B, D]` at timesteps int `[B]` or `[B, 1]` in 1..T, layer by layer;
        `sample` is faster.

        Args:
            x_ht: the entity that stays: the head for mode "tail", the tail for mode "head".
            x_r: relation embeddings `[B, dim_r]`.
        """
        return self.output_layer(self.denoiser_block(x_t, t, self.scoring_module(x_ht, x_r, mode)))
