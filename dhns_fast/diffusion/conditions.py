"""Conditions c(entity that stays, relation) of the generator, one entry a knowledge-graph-embedding model, and the
complex algebra they share.

Complex vectors of D/2 components are stored as `[..., D]` real numbers, real parts first ([re, im]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """a ∘ b of complex vectors `[..., D]` stored [re, im]."""
    (ar, ai), (br, bi) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    return torch.cat([ar * br - ai * bi, ar * bi + ai * br], dim=-1)


def conjugate(a: Tensor) -> Tensor:
    """Complex conjugate of vectors `[..., D]` stored [re, im]."""
    re, im = a.chunk(2, dim=-1)
    return torch.cat([re, -im], dim=-1)


def unit_complex(phase: Tensor) -> Tensor:
    """e^{i·phase} as `[..., D]` stored [re, im], of phases `[..., D/2]` in radians."""
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


# (entity [..., D], relation [..., dim_r], side generated is the tail, behaviour is "release", RotatE's (γ + ε)/dim_r)
# -> c [..., D]
ConditionFn = Callable[[Tensor, Tensor, bool, bool, Tensor], Tensor]


@dataclass(frozen=True)
class Condition:
    """A condition: its formula and the relation width it expects for entities of width D."""

    formula: ConditionFn
    relation_divisor: int = 1  # D / dim_r
    has_relation_range: bool = False


def _distmult(entity: Tensor, relation: Tensor, tail: bool, release: bool, relation_range: Tensor) -> Tensor:
    return entity * relation


def _complex(entity: Tensor, relation: Tensor, tail: bool, release: bool, relation_range: Tensor) -> Tensor:
    return complex_product(entity, relation if tail else conjugate(relation))


def _rotate(entity: Tensor, relation: Tensor, tail: bool, release: bool, relation_range: Tensor) -> Tensor:
    phase = relation * (math.pi / relation_range)
    return complex_product(entity, unit_complex(phase if tail else -phase))


def _transe(entity: Tensor, relation: Tensor, tail: bool, release: bool, relation_range: Tensor) -> Tensor:
    # The release generates a tail from h − r and a head from t + r: the signs of the score h + r ≈ t, swapped.
    return entity + relation if tail != release else entity - relation


CONDITIONS: dict[str, Condition] = {
    "distmult": Condition(_distmult),
    "complex": Condition(_complex),
    "rotate": Condition(_rotate, relation_divisor=2, has_relation_range=True),
    "transe": Condition(_transe),
}
