"""Noise schedules, and the coefficients that sampling and training read from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dhns_fast.catalogue import SCHEDULES
from dhns_fast.checks import count, one_of
from dhns_fast.errors import InputError

# Steps of the diffusion that β from 1e-4 to 0.02 was made for (Ho et al. 2020).
BASE_STEPS = 1000
LARGEST_BETA = 0.999


class Steps(NamedTuple):
    """What the S steps of a chain read, as Python floats (made in float64); entry i belongs to step i + 1, and the
    chain begins with step S.

    Sampling needs them as scalars of host code, so that a step launches no gather and reads nothing back from the
    device.

        x ← `mean_scale`·x − `noise_scale`·ε + `sigma`·z,    ε = ε_θ(x, `times`) between `slope`·x − `width` and
        `slope`·x + `width`

    with z = 0 in step 1. The bounds of ε are those of the clean embedding that it predicts, |x̂₀| ≤ C; without a clip
    there are none (`slope` and `width` are empty).
    """

    times: tuple[int, ...]
    mean_scale: tuple[float, ...]
    noise_scale: tuple[float, ...]
    sigma: tuple[float, ...]
    slope: tuple[float, ...] = ()
    width: tuple[float, ...] = ()

    def place(self, levels: Sequence[int]) -> list[int]:
        """The step before which each level's state is, 0 for the end: step i + 1 lands on time `times[i - 1]`, step 1
        on time 0.
        """
        landings = (0, *self.times[:-1])
        return [landings.index(level) for level in levels]


@dataclass(frozen=True)
class Schedule:
    """β and ᾱ of T diffusion steps (made in float64): entry i belongs to timestep i + 1, x_t = √ᾱ·x_0 + √(1 − ᾱ)·ε."""

    beta: tuple[float, ...]
    alpha_bar: tuple[float, ...]

    @classmethod
    def of(cls, name: str, T: int) -> Schedule:
        """A schedule by its name.

        Args:
            name: "linear": β from 1e-4 to 0.02 whatever T is, as the release has it; at T = 50 the signal's share √ᾱ_T
                is still .78. "scaled": the same times 1000/T (at most .999), which ends in noise at any T. "cosine":
                √ᾱ_t = cos(π/2·(t/T + s)/(1 + s)) relative to t = 0 with s = .008 (Nichol and Dhariwal, ICML 2021).
            T: at least 1.
        """
        one_of("schedule", name, SCHEDULES)
        T = count("T", T)
        even = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")
        if name == "cosine":
            bar = even(0, 1, T + 1).add(0.008).div(1.008).mul(math.pi / 2).cos().square()
            beta = 1 - bar[1:] / bar[:-1]
        else:
            beta = even(1e-4, 0.02, T) * (BASE_STEPS / T if name == "scaled" else 1)
        beta = beta.clamp(max=LARGEST_BETA)
        return cls(tuple(beta.tolist()), tuple((1 - beta).cumprod(0).tolist()))

    @classmethod
    def linear(cls, T: int) -> Schedule:
        """The release's, see :meth:`of`."""
        return cls.of("linear", T)

    @property
    def T(self) -> int:
        return len(self.beta)

    def forward_coefficients(self) -> Tensor:
        """√ᾱ and √(1 − ᾱ) as a float64 tensor `[T, 2]`."""
        bar = torch.tensor(self.alpha_bar, dtype=torch.float64, device="cpu")
        return torch.stack([bar.sqrt(), (1 - bar).sqrt()], dim=1)

    def lost(self, level: int) -> float:
        """1 − √ᾱ at a level: the share of the clean embedding that noise has replaced."""
        return 1 - self.alpha_bar[level - 1] ** 0.5 if level else 0.0

    def level_of(self, share: float) -> int:
        """The level in 0..T − 1 whose :meth:`lost` share is nearest to the one given."""
        return min(range(self.T), key=lambda level: abs(self.lost(level) - share))

    def levels(self, given: Sequence[float]) -> tuple[float, ...]:
        """Levels as times: a number between 0 and 1 is a share of lost signal, and means the level nearest to it; the
        others are times already.
        """
        return tuple(self.level_of(x) if 0 < x < 1 else x for x in given)

    def steps(self, number: int | None = None, levels: Sequence[int] = (0,), clip: float | None = None) -> Steps:
        """The steps of a chain from time T down to its lowest level.

        Args:
            number: None: T steps of the ancestral chain (Ho et al. 2020, algorithm 2). Otherwise the number of steps of
                a deterministic DDIM chain (Song et al., ICLR 2021, η = 0) that lands on every level; of the times
                between, the widest gaps are halved first.
            levels: states that are read, in 0..T − 1.
            clip: C, the largest magnitude of the predicted clean embedding x̂₀ = (x − √(1 − ᾱ)·ε)/√ᾱ; None: no bound.

        Raises:
            InputError: fewer steps than levels, or more than there are.
        """
        bar = torch.tensor(self.alpha_bar, dtype=torch.float64, device="cpu")
        if number is None:
            beta = torch.tensor(self.beta, dtype=torch.float64, device="cpu")
            times = range(1, self.T + 1)
            columns = [(1 - beta).rsqrt(), beta / ((1 - bar) * (1 - beta)).sqrt(), beta.sqrt()]
        else:
            times = self._strided(number, levels)  # type: ignore[assignment]
            bar = bar[[time - 1 for time in times]]
            after = torch.cat([bar.new_ones(1), bar[:-1]])
            scale = (after / bar).sqrt()
            columns = [scale, scale * (1 - bar).sqrt() - (1 - after).sqrt(), torch.zeros_like(bar)]
        if clip is not None:
            if not hasattr(clip, "__float__") or not clip > 0:
                raise InputError("clip", clip, "None or a number above 0")
            columns += [(1 - bar).rsqrt(), clip * (bar / (1 - bar)).sqrt()]
        return Steps(tuple(times), *(tuple(c.tolist()) for c in columns))

    def _strided(self, number: int, levels: Sequence[int]) -> list[int]:
        lowest = min(levels)
        times = sorted({lowest, *levels, self.T})
        least, most = len(times) - 1, self.T - lowest
        number = count("sampling_steps", number, least, most)
        while len(times) - 1 < number:
            gap, i = max((times[i + 1] - times[i], i) for i in range(len(times) - 1))
            times.insert(i + 1, times[i] + gap // 2)
        # A lowest level above 0 is where the chain ends; it keeps its place, so that the step after it lands on it.
        return times if lowest else times[1:]
