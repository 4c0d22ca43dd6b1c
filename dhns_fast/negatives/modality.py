"""Entities of which one modality is another's."""

from __future__ import annotations

import torch
from torch import Tensor

from dhns_fast.data.filter import CSRFilter
from dhns_fast.models import KGEModel
from dhns_fast.negatives.base import Sampler, check_query, draw_below


class ModalitySwap(Sampler):
    """Each negative is the true entity with the embedding of one of its modalities exchanged for that of another entity
    that has it: the structure stays, so that training has to tell whose text or image it is (Zhang et al.,
    "Modality-aware negative sampling for multi-modal knowledge graph embedding", IJCNN 2023, MANS-V for any modality).

    The modality is drawn uniformly from those that the entity has beside its structure, the other entity uniformly from
    those that have it. Of an entity without any, the structure is exchanged.

    Args:
        known: filter of the training triples.
        model: whose embeddings they are.
        num_negatives: L, as `levels` of equal hardness.

    Cost: L rows of M projections a triple and side.
    """

    by_id, by_embedding = False, True

    def __init__(self, known: CSRFilter, model: KGEModel, num_negatives: int = 4) -> None:
        super().__init__(known, num_negatives, model)
        device = known.device
        everyone = torch.ones(1, known.num_entities, dtype=torch.bool, device=device)
        present = everyone if model.fusion is None else model.fusion.mask().to(device)
        count = present.sum(1)
        # What one entity alone has cannot be exchanged.
        usable = present & (count > 1).unsqueeze(1)
        usable[0] &= ~usable[1:].any(0)
        self.register_buffer("_usable", usable, persistent=False)
        self.register_buffer("_count", count, persistent=False)
        # Entities that have each modality, its own first, and the place of each among them.
        self.register_buffer("_owners", (~present).int().argsort(dim=1, stable=True), persistent=False)
        self.register_buffer("_place", present.long().cumsum(1) - 1, persistent=False)

    @torch.no_grad()
    def generate(
        self, h: Tensor, r: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        check_query(self.known, h, r, t)
        return self._swap(h, generator), self._swap(t, generator)

    def donors(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(modality, entity that gives it) of each negative of entities int64 [B]: two int64 [B, L]."""
        usable = self.get_buffer("_usable")[:, ids].T
        kinds = usable.long().cumsum(1)
        chosen = draw_below(kinds[:, -1], self.num_negatives, generator)
        modality = torch.searchsorted(kinds, chosen, right=True)
        count, place = self.get_buffer("_count")[modality], self.get_buffer("_place")[modality, ids.unsqueeze(1)]
        draw = draw_below((count - 1).clamp_min(0).flatten(), 1, generator).view_as(count)
        return modality, self.get_buffer("_owners")[modality, draw + (draw >= place)]

    def _swap(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        modality, donor = self.donors(ids, generator)
        own = self.model.modalities(ids)
        other = self.model.modalities(donor.flatten()).unflatten(1, donor.shape)
        swapped = torch.arange(len(own), device=ids.device)[:, None, None] == modality
        return torch.where(swapped.unsqueeze(-1), other, own.unsqueeze(2)).permute(2, 0, 1, 3).contiguous()
