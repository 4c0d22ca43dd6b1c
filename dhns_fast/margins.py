"""Adaptive margins: what each hardness level adds to its scores in the hardness-adaptive loss, as factors of the
model's γ.

A negative of level i weighs half once its score reaches −m_i, that is once its distance is down to m_i: the margin says
how close to being true a negative of that level may look before the loss minds. Hard negatives may come closer than
easy ones, so factors rise with the level. Product models have no γ in their scores, and no margins.

Source: Niu & Zhang, DASFAA 2025 (arXiv 2501.15393), whose factors are constants; the schedules beside "table" are our
own reading of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.errors import InputError, Shown


class TableMargins(nn.Module):
    """The factors as they are given: the paper's .1, .3, .5, .7, .9.

    Args:
        levels: s, the diffusion time of each level, hardest first.
        factors: m_i/γ, one a level.
        weights: w_i, one a level; a level of weight 0 has no margin.
        steps: T.
        schedule: name of the noise schedule.

    Calling it gives the factors of the levels of weight > 0, float32.

    Raises:
        InputError: the numbers of levels, factors and weights differ.
    """

    factors: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        factors: Sequence[float],
        weights: Sequence[float],
        steps: int,
        schedule: str = "linear",
    ) -> None:
        super().__init__()
        self.noise = Schedule.of(schedule, steps)
        if not len(levels) == len(factors) == len(weights):
            found = Shown(f"{len(levels)}, {len(factors)} and {len(weights)}")
            raise InputError("levels, factors, weights", found, "one of each a level")
        values = self.at(levels, factors, steps)
        active = [value for value, weight in zip(values, weights, strict=True) if weight > 0]
        # Not in checkpoints: the configuration says them.
        self.register_buffer("factors", torch.tensor(active, dtype=torch.float32), persistent=False)

    def at(self, levels: Sequence[int], factors: Sequence[float], steps: int) -> Sequence[float]:
        return factors

    def forward(self) -> Tensor:
        return self.factors


class LinearMargins(TableMargins):
    """Linear in the diffusion time, between the factors of the first and of the last level: a level's margin grows as
    its time does.

    At T = 50 .1, .26, .29, .48, .9: the second and the third level, one step apart, are no longer .2 apart.
    """

    def place(self, level: int, steps: int) -> float:
        return level / steps

    def at(self, levels: Sequence[int], factors: Sequence[float], steps: int) -> Sequence[float]:
        places = [self.place(level, steps) for level in levels]
        length = (places[-1] - places[0]) or 1.0
        return [factors[0] + (factors[-1] - factors[0]) * (place - places[0]) / length for place in places]


class SignalMargins(LinearMargins):
    """Linear in 1 − √ᾱ_s, the share of the clean embedding that noise has replaced at time s, between the first and the
    last level's factors: what was easy to denoise counts as hard to tell from the truth. Early levels lie closer
    together than by time, as noise sets in slowly.
    """

    def place(self, level: int, steps: int) -> float:
        return self.noise.lost(level)


class LearnedMargins(TableMargins):
    """The factors' sum, divided among the levels by a softmax of learned logits that start at the factors.

    The sum is kept since the loss rises with every margin: free ones would fall without end. Dividing it, the minimum
    is where all levels push equally, w_i·mean σ(m_i + n_i) the same for each, which is one point as the loss is convex
    in the margins.

    Raises:
        InputError: a factor of a level of weight > 0 is not positive.
    """

    def __init__(
        self,
        levels: Sequence[int],
        factors: Sequence[float],
        weights: Sequence[float],
        steps: int,
        schedule: str = "linear",
    ) -> None:
        super().__init__(levels, factors, weights, steps, schedule)
        if not (self.factors > 0).all():
            raise InputError(
                "factors",
                self.factors.tolist(),
                "numbers above 0 at the levels of weight > 0, for margins to be learned",
            )
        self.logits = nn.Parameter(self.factors.log())

    def forward(self) -> Tensor:
        return self.factors.sum() * self.logits.softmax(0)


MARGIN_SCHEDULES: dict[str, type[TableMargins]] = {
    "table": TableMargins,
    "linear": LinearMargins,
    "signal": SignalMargins,
    "learned": LearnedMargins,
}
