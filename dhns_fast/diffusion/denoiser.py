"""The noise predictor ε_θ(x_t, t, c) as a module that holds its weights under the release's names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5


class PositionalEncoding(nn.Module):
    """PE(t) = [sin(t·f), cos(t·f)], f_k = exp(−ln(10000)·k/(D/2 − 1)): `[B]` -> `[B, D]` in the dtype of `like`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.dim // 2
        k = torch.arange(half, dtype=dtype, device=timesteps.device)
        angle = timesteps.to(dtype)[:, None] * torch.exp(k * (-math.log(10000.0) / (half - 1)))
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class DenoiserBlock(nn.Module):
    """LayerNorm → Linear → ReLU → LayerNorm → Linear over [x_t, τ(t), c]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Indices 1 and 3 of `time_mlp` are part of the release's state-dict names.
        self.time_mlp = nn.Sequential(PositionalEncoding(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.layer_norm1 = nn.LayerNorm(3 * dim, eps=LAYER_NORM_EPS)
        self.mlp1 = nn.Linear(3 * dim, 4 * dim)
        self.layer_norm2 = nn.LayerNorm(4 * dim, eps=LAYER_NORM_EPS)
        self.mlp2 = nn.Linear(4 * dim, dim)

    def time_table(self, T: int) -> Tensor:
        """τ(1..T), shape `[T, D]`: it depends on no row, so one table serves every row and modality of a call."""
        encoding, first, act, second = self.time_mlp
        weight: Tensor = first.weight  # type: ignore[assignment]
        steps = torch.arange(1, T + 1, device=weight.device)
        return second(act(first(encoding(steps, weight.dtype))))


class ScoringModule(nn.Module):
    """Holds RotatE's (γ + ε)/dim_r under the name that release checkpoints give it."""

    def __init__(self, relation_range: float) -> None:
        super().__init__()
        self.rel_embedding_range = nn.Parameter(torch.tensor([relation_range]), requires_grad=False)


class Denoiser(nn.Module):
    """ε_θ: shared by all modalities and by both sides."""

    def __init__(self, dim: int, relation_range: float | None) -> None:
        super().__init__()
        self.denoiser_block = DenoiserBlock(dim)
        self.output_layer = nn.Linear(dim, dim)
        if relation_range is not None:
            self.scoring_module = ScoringModule(relation_range)
