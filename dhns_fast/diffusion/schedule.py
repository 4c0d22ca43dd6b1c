"""The noise schedule: β linear from 1e-4 to 0.02, and the coefficients that sampling and training read from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Coefficients of T diffusion steps as Python floats (computed in float64): entry i belongs to timestep i + 1.

    Sampling needs them as scalars of host code, so that a step launches no gather and reads nothing back from the device.
    x_{t−1} = `mean_scale`·x_t − `noise_scale`·ε_θ + `sigma`·z with z = 0 at t = 1, and x_t = √ᾱ·x_0 + √(1 − ᾱ)·ε (Ho et al. 2020, algorithm 2).
    """

    mean_scale: tuple[float, ...]
    noise_scale: tuple[float, ...]
    sigma: tuple[float, ...]
    alpha_bar: tuple[float, ...]

    @classmethod
    def linear(cls, T: int) -> Schedule:
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        alpha = 1 - beta
        bar = alpha.cumprod(0)
        columns = (alpha.rsqrt(), beta / ((1 - bar) * alpha).sqrt(), beta.sqrt(), bar)
        return cls(*(tuple(c.tolist()) for c in columns))

    @property
    def T(self) -> int:
        return len(self.sigma)

    def forward_coefficients(self) -> Tensor:
        """√ᾱ and √(1 − ᾱ) as a float64 tensor `[T, 2]`."""
        bar = torch.tensor(self.alpha_bar, dtype=torch.float64)
        return torch.stack([bar.sqrt(), (1 - bar).sqrt()], dim=1)


def default_levels(T: int) -> tuple[int, ...]:
    """The paper's five hardness levels, hardest first: level s is the state that the step at t = s + 1 produced."""
    return (0, T // 10, T // 8, T // 4, T // 2)
