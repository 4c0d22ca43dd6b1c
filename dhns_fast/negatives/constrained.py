"""Entities that the relation is known to take on that side."""

from __future__ import annotations

import torch
from torch import Tensor

from dhns_fast.catalogue import SIDES, Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.negatives.base import Sampler, check_query, draw_below


class Constrained(Sampler):
    """Entities drawn uniformly from the pseudo-type of the relation and side, known answers left out: those that train
    has as heads (tails) of the relation (Krompaß et al., "Type-constrained representation learning in knowledge
    graphs", ISWC 2015, under the local closed world).

    The known answers of a query are all in its pseudo-type. At positions p_0 < p_1 < ... within it, the u-th entity
    that is no answer is at `u + #{i : p_i − i <= u}`: one binary search a draw, no rejection. A query whose pseudo-type
    has nothing but answers draws from all entities.

    Args:
        known: filter of the training triples.
        num_negatives: N.

    Cost: that of uniform corruptions. Memory: 8 bytes an entity of each pseudo-type and 8 a known answer.
    """

    def __init__(self, known: CSRFilter, num_negatives: int = 64) -> None:
        super().__init__(known, num_negatives)
        E, R = known.num_entities, known.num_relations
        for side in SIDES:
            rows = known.side(side)
            keys, counts = rows.groups()
            relation = keys.remainder(R).repeat_interleave(counts, output_size=len(rows.packed))
            typed = relation * E + rows.ids
            members = typed.unique()
            bounds = torch.searchsorted(members, torch.arange(R + 1, device=members.device) * E)
            self.register_buffer(f"_{side}_members", members % E, persistent=False)
            self.register_buffer(f"_{side}_bounds", bounds, persistent=False)
            # Positions within the pseudo-type in place of entities, in the order of the known answers.
            positions = torch.searchsorted(members, typed) - bounds[relation]
            packed = (rows.packed - rows.ids).add_(positions)
            self.register_buffer(f"_{side}_gaps", packed.sub_(_places(packed)), persistent=False)

    def members(self, relation: int, side: Side = "tail") -> Tensor:
        """The pseudo-type of a relation's side, rising int64 [n]."""
        first, end = self.get_buffer(f"_{side}_bounds")[relation : relation + 2].tolist()
        return self.get_buffer(f"_{side}_members")[first:end]

    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        members, bounds, gaps = (self.get_buffer(f"_{side}_{name}") for name in ("members", "bounds", "gaps"))
        entity = h if side == "tail" else t
        start, count, base = self.known.side(side).find(entity * self.known.num_relations + r)
        free = bounds[r + 1] - bounds[r] - count
        draw = draw_below(free, self.num_negatives, generator)
        passed = torch.searchsorted(gaps, (base - start).unsqueeze(1) + draw, right=True) - start.unsqueeze(1)
        place = bounds[r].unsqueeze(1) + draw + torch.where(count > 0, 1, 0).unsqueeze(1) * passed
        anyone = self.uniform.corrupt(torch.stack([h, r, t], 1), side, generator)
        if not len(members):
            return anyone
        return torch.where((free > 0).unsqueeze(1), members[place.clamp(max=len(members) - 1)], anyone)


def _places(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
