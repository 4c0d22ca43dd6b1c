"""Entities drawn uniformly from those that the graph does not know as answers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dhns_fast.catalogue import Corruption, Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.data.negatives import NegativeSampler
from dhns_fast.negatives.base import Sampler, check_query


class Uniform(Sampler):
    """Every entity that is no known answer, with equal probability and replacement; tails and heads in turn, as
    training asks.

    Args:
        known: filter of the training triples.
        num_negatives: N.
        filtered: False draws from all entities, true answers included.

    Cost: N random numbers and N binary searches a triple.
    """

    strategy: ClassVar[Corruption] = "uniform"

    def __init__(self, known: CSRFilter, num_negatives: int = 64, filtered: bool = True) -> None:
        super().__init__(known, num_negatives)
        self.uniform = NegativeSampler(known, known.num_entities, num_negatives, self.strategy, filtered)

    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        return self.uniform.corrupt(torch.stack([h, r, t], 1), side, generator)

    def sides(self, r: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which side of triples with relations int64 [B] to replace: bool [B], True for the head; each with probability
        1/2.
        """
        return self.uniform.sides(torch.stack([r, r, r], 1), generator)


class Bernoulli(Uniform):
    """The same, and the head is replaced with probability tph / (tph + hpt) of its relation (tails per head, heads per
    tail): the side with more answers is replaced less often, which makes fewer corruptions true (Wang et al.,
    "Knowledge graph embedding by translating on hyperplanes", AAAI 2014).
    """

    strategy = "bernoulli"
