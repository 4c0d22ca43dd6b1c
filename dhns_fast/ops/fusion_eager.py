"""Fusion of modalities by attention in plain torch: any device, any floating dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dhns_fast.ops.fusion import FuseInputs, GradientInputs


def shares(embedding: Tensor, attention: Tensor, present: Tensor | None = None) -> Tensor:
    """a = softmax_m(w·tanh(e_m)) of e `[M, ..., D]` and w `[D]` -> `[M, ...]`; 0 where `present`, bool `[M, ...]`, is
    False.
    """
    # Summed row by row: a product of matrix and vector gives equal rows different bits at its edges, and ties of
    # entities go. The softmax too, over the last dimension: across rows its exponentials are vectors, and something
    # else at the ends.
    logits = (embedding.tanh() * attention).sum(-1)
    if present is not None:
        logits = logits.masked_fill(~present, float("-inf"))
    share = logits.movedim(0, -1).contiguous().softmax(-1).movedim(-1, 0)
    # Of an entity without any modality the softmax is NaN.
    return share if present is None else share.masked_fill(~present, 0)


def fuse(embedding: Tensor, attention: Tensor, present: Tensor | None = None) -> Tensor:
    """Σ_m a_m·e_m, `[M, ..., D]` -> `[..., D]`. An entity without any modality fuses to 0."""
    embedding = _of_present(embedding, present)
    return (shares(embedding, attention, present).unsqueeze(-1) * embedding).sum(0)


def _of_present(embedding: Tensor, present: Tensor | None) -> Tensor:
    # Before anything else: 0·NaN is NaN, so whatever stands in the place of an absent modality must not take part.
    return embedding if present is None else embedding.masked_fill(~present.unsqueeze(-1), 0)


def modalities(a: FuseInputs | GradientInputs) -> list[Tensor]:
    return [a.structure, *a.views]


def joint(a: FuseInputs) -> Tensor:
    return fuse(torch.stack(modalities(a)), a.attention, a.present)


def gradients(a: GradientInputs) -> list[Tensor]:
    embeddings = _of_present(torch.stack(modalities(a)), a.present)
    share = shares(embeddings, a.attention, a.present)
    along = (a.grad * embeddings).sum(-1)
    by_logit = (share * (along - (share * along).sum(0))).unsqueeze(-1)
    tangent = embeddings.tanh_()
    by_attention = (by_logit * tangent).sum((0, 1))
    by_modality = (share.unsqueeze(-1) * a.grad).addcmul_(by_logit * a.attention, 1 - tangent.square_())
    return [*(x.clone() for x in by_modality), by_attention]
