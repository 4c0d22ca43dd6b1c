"""What the diffusion generates, as it is or grounded in the real entities nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.models import KGEModel
from dhns_fast.negatives.base import Sampler, answers, check_query, fused
from dhns_fast.ops.score import MAX_K
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import topk_all


class Diffusion(Sampler):
    """The levels of a :class:`dhns_fast.sampler.DiffHEG`, hardest first (Niu & Zhang, DASFAA 2025, §3.3).

    Args:
        known: filter of the training triples.
        model: whose modalities are what is generated.
        diffusion: the generator; training updates it.

    Cost: a chain of T steps of 8D² multiply-adds a row, modality and side.
    """

    by_id, by_embedding = False, True

    def __init__(self, known: CSRFilter, model: KGEModel, diffusion: DiffHEG) -> None:
        super().__init__(known, len(diffusion.levels), model)
        # In a tuple: training keeps it beside the model, and so do checkpoints.
        self._generator = (diffusion,)

    @property
    def diffusion(self) -> DiffHEG:
        return self._generator[0]

    @torch.no_grad()
    def generate(
        self, h: Tensor, r: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        check_query(self.known, h, r, t)
        model = self.model
        return self.generate_from(model.modalities(h), model.relation(r), model.modalities(t), generator)

    def generate_from(
        self,
        head: Tensor,
        relation: Tensor,
        tail: Tensor,
        generator: torch.Generator | None = None,
        row_offset: int = 0,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`generate` for whoever has the embeddings at hand: heads and tails [M, B, D], relations [B, dim_r], the rows
        from `row_offset` on of a larger batch, with its `scales` (:meth:`dhns_fast.sampler.DiffHEG.sample`).
        """
        heads, tails = self.diffusion.sample(
            head, relation, tail, generator=generator, row_offset=row_offset, scales=scales
        )
        return torch.stack(heads), torch.stack(tails)


class Grounded(Diffusion):
    """Generated, then grounded: the real entities nearest to what was generated at each level, known answers left out.

    Embeddings are fused over the modalities first, and near is the Euclidean distance of what queries meet. A level
    whose every entity is a known answer draws uniformly.

    Args:
        known, model, diffusion: as of :class:`Diffusion`.
        nearest: k, entities for each level: N = L·k, the hardest level's first.

    Cost: that of :class:`Diffusion`, and L times the distances to all E entities.
    """

    by_id, by_embedding = True, True

    def __init__(self, known: CSRFilter, model: KGEModel, diffusion: DiffHEG, nearest: int = 1) -> None:
        super().__init__(known, model, diffusion)
        nearest = checks.count("nearest", nearest, 1, min(known.num_entities, MAX_K))
        self.nearest, self.num_negatives = nearest, len(diffusion.levels) * nearest
        self.uniform.num_negatives = self.num_negatives

    @torch.no_grad()
    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        heads, tails = self.generate(h, r, t, generator)
        return self.ground(tails if side == "tail" else heads, h, r, t, side, generator)

    @torch.no_grad()
    def ground(
        self, made: Tensor, h: Tensor, r: Tensor, t: Tensor, side: Side, generator: torch.Generator | None = None
    ) -> Tensor:
        """Entities int64 [B, L·k] next to embeddings `made` [L, M, B, D] in place of one side of each triple."""
        model, left_out = self.model, answers(self.known, h, r, t, side)
        table, own = model.entities(side), t if side == "tail" else h
        ids = [topk_all(model.view(fused(model, x, own), side), table, self.nearest, "l2", left_out)[1] for x in made]
        found = torch.cat(ids, 1)
        return torch.where(found >= 0, found, self.uniform.corrupt(torch.stack([h, r, t], 1), side, generator))
