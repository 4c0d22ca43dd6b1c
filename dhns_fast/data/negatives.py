"""Corruption of triples, exact and without loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import CORRUPTIONS, SIDES, Corruption, Side
from dhns_fast.data.filter import Answers, CSRFilter, as_integers
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import sampling


class NegativeSampler:
    """Draws corrupting entities uniformly, with replacement; filtered, from the entities that train does not know as an
    answer.

    With the known answers k_0 < k_1 < ... < k_{K-1} of a query and u uniform in [0, E - K), the u-th entity that is not
    known is `u + #{i : k_i - i <= u}`: a binary search, with no rejection, no host sync, and nothing of size [B, E].
    On a CPU it goes through the answers of the query (:mod:`dhns_fast.ops.sampling`); elsewhere, for all rows and draws
    at once, through `packed[j] - j` of the filter, which never falls.

    Memory: none beside the filter's on a CPU; elsewhere 16 bytes a distinct triple from the first filtered call on.

    Args:
        known: filter of the training triples.
        num_entities: E.
        num_negatives: N, corruptions a triple.
        strategy: which side `sides` proposes: "uniform", each with probability 1/2; "bernoulli", the head with
            probability tph / (tph + hpt) of its relation (tails per head, heads per tail; Wang et al., AAAI 2014),
            which makes fewer corruptions true.
        filtered: False draws from all entities, the true answer included.

    Raises:
        InputError: an argument is not acceptable.
    """

    def __init__(
        self,
        known: CSRFilter,
        num_entities: int,
        num_negatives: int = 64,
        strategy: Corruption = "uniform",
        filtered: bool = True,
    ) -> None:
        if not isinstance(known, CSRFilter):
            raise InputError("known", Shown(type(known).__name__), "a CSRFilter")
        num_entities, num_negatives = (
            checks.count("num_entities", num_entities),
            checks.count("num_negatives", num_negatives),
        )
        if num_entities != known.num_entities:
            raise InputError("num_entities", num_entities, f"{known.num_entities}, as in the filter `known`")
        checks.one_of("strategy", strategy, CORRUPTIONS)
        checks.flag(filtered=filtered)
        self.known, self.num_entities, self.num_negatives, self.strategy, self.filtered = (
            known,
            num_entities,
            num_negatives,
            strategy,
            filtered,
        )
        self._gaps: dict[Side, Tensor] = {}
        if strategy == "bernoulli":
            # With n triples of a relation, tph = n / heads and hpt = n / tails, hence tph / (tph + hpt) = tails /
            # (heads + tails).
            heads, tails = (
                side.groups()[0].remainder(known.num_relations).bincount(minlength=known.num_relations)
                for side in (known.tail, known.head)
            )
            self._head_share = torch.where(heads + tails > 0, tails / (heads + tails), 0.5).float()
        else:
            self._head_share = torch.full((known.num_relations,), 0.5, device=known.device)

    def to(self, device: torch.device | str) -> NegativeSampler:
        return NegativeSampler(
            self.known.to(device), self.num_entities, self.num_negatives, self.strategy, self.filtered
        )

    def corrupt(
        self, triples: Tensor, side: Side, generator: torch.Generator | None = None, part: slice | None = None
    ) -> Tensor:
        """Entities to put in place of one side of each triple.

        A triple whose query knows every entity is corrupted unfiltered, as nothing else is left.

        Args:
            triples: int64 [B, 3] (head, relation, tail) on the device of `known`, ids in range.
            side: "tail" or "head", the side that is replaced.
            generator: on the same device; None for the device's own.
            part: of the B triples, those to corrupt: they get the entities that they get among all. None: all.

        Returns:
            int64 [B, N], or fewer rows of a part.

        Raises:
            InputError: wrong shape, dtype or device, or an id out of range (on a GPU, where looking would stall the
                stream, a device-side assertion).
        """
        triples = self._check(triples, side, generator)
        shape, E, part = (len(triples), self.num_negatives), self.num_entities, part or slice(None)
        if not self.filtered:
            return torch.randint(E, shape, generator=generator, device=triples.device)[part]
        found = self._find(triples[part], side)
        draw = torch.rand(shape, generator=generator, device=triples.device, dtype=torch.float64)[part]
        if triples.device.type == "cpu":
            return sampling.corrupt(draw, self.known.side(side).packed, *found, E)
        return self._through_gaps(draw, side, found)

    def shared(
        self, triples: Tensor, side: Side, generator: torch.Generator | None = None, part: slice | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One set of entities to put in place of one side of every triple, and which pairs of triple and entity train
        knows as true.

        Args:
            triples, side, generator, part: as of `corrupt`.

        Returns:
            int64 [N], and bool [B, N] or, unfiltered, None.
        """
        triples = self._check(triples, side, generator)[part or slice(None)]
        entities = torch.randint(self.num_entities, (self.num_negatives,), generator=generator, device=triples.device)
        if not self.filtered:
            return entities, None
        _, count, base = self._find(triples, side)
        answers = self.known.side(side).packed
        if not len(answers):
            return entities, torch.zeros(len(triples), len(entities), dtype=torch.bool, device=triples.device)
        wanted = base.unsqueeze(1) + entities
        found = answers[torch.searchsorted(answers, wanted).clamp_(max=len(answers) - 1)]
        return entities, (found == wanted) & (count > 0).unsqueeze(1)

    def sides(self, triples: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which side of each triple [B, 3] to corrupt by the strategy: bool [B], True for the head."""
        share = self._head_share[self._check(triples, generator=generator)[:, 1]]
        return torch.rand(share.shape, generator=generator, device=share.device) < share

    def _check(self, triples: Any, side: str = "tail", generator: torch.Generator | None = None) -> Tensor:
        checks.instance(torch.Generator, "a torch.Generator, or None", generator=generator)
        checks.one_of("side", side, SIDES)
        accepted = "integers of shape [B, 3]"
        table = as_integers("triples", triples, accepted)
        if not table.numel():
            table = table.reshape(0, 3)
        if table.ndim != 2 or table.shape[1] != 3:
            raise InputError("triples", table, accepted)
        checks.on_device("the filter", self.known.tail.packed, triples=table)
        bad = (
            (table < 0).any(1) | (table[:, ::2] >= self.num_entities).any(1) | (table[:, 1] >= self.known.num_relations)
        )
        ranges = f"entities 0 to {self.num_entities - 1}, relations 0 to {self.known.num_relations - 1}"
        if table.device.type != "cpu":
            torch._assert_async(~bad.any(), f"triples: an id is out of range; accepted: {ranges}")
        elif bool(bad.any()):
            row = int(bad.int().argmax())
            raise InputError(
                "triples", Shown(f"row {row} (head, relation, tail) = {tuple(table[row].tolist())}"), ranges
            )
        return table

    def _find(self, triples: Tensor, side: Side) -> Answers:
        entity = triples[:, 0 if side == "tail" else 2]
        return self.known.side(side).find(entity * self.known.num_relations + triples[:, 1])

    def _through_gaps(self, draw: Tensor, side: Side, found: Answers) -> Tensor:
        """:func:`dhns_fast.ops.sampling.corrupt` by one search for all."""
        if side not in self._gaps:
            packed = self.known.side(side).packed
            self._gaps[side] = packed - torch.arange(len(packed), device=packed.device)
        u, count = sampling.free(draw, found.number, self.num_entities)
        # The number of those before the query's answers is `start`, however far below they lie.
        passed = torch.searchsorted(self._gaps[side], (found.base - found.start).unsqueeze(1) + u, right=True)
        return torch.where(count.unsqueeze(1) > 0, u + passed - found.start.unsqueeze(1), u)
