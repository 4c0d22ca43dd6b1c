"""Views of features, and scores of triples by the models that :mod:`dhns_fast.reference.loss` does not have, as their
papers state them.

Embeddings broadcast over all dimensions but the last: h, t `[..., D]`, r `[..., dim_r]` -> `[...]`. Higher is better;
distances are negated. Any floating dtype; tests use float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(features: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """W·x + b of rows x `[n, K]` of a feature matrix `[E, K]`, all of them or those of ids; W `[D, K]`, b `[D]` ->
    `[n, D]`: an entity's view of a modality (Niu & Zhang, DASFAA 2025, §3.4).
    """
    rows = features if ids is None else features[ids]
    return (rows.unsqueeze(1) * weight).sum(-1) + bias


def simple(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """½·(⟨a(h), r, b(t)⟩ + ⟨a(t), r', b(h)⟩): entities stored [a, b], relations [r, r'] (Kazemi and Poole, NeurIPS
    2018).
    """
    (head_h, tail_h), (head_t, tail_t), (forward, inverse) = (x.chunk(2, -1) for x in (h, t, r))
    return ((head_h * forward * tail_t).sum(-1) + (head_t * inverse * tail_h).sum(-1)) / 2


def cp(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """⟨a(h), r, b(t)⟩: entities stored [a, b], r of half their width (Hitchcock 1927)."""
    return (h.chunk(2, -1)[0] * r * t.chunk(2, -1)[1]).sum(-1)


def rescal(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """hᵀRt: R stored row by row, `[..., D²]` (Nickel et al., ICML 2011)."""
    return torch.einsum("...i,...ij,...j->...", h, r.unflatten(-1, (h.shape[-1], h.shape[-1])), t)


# e_i·e_j = sign·e_k of the units 1, i, j, k, by (i, j): (k, sign).
UNITS = (
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((1, 1), (0, -1), (3, 1), (2, -1)),
    ((2, 1), (3, -1), (0, -1), (1, 1)),
    ((3, 1), (2, 1), (1, -1), (0, -1)),
)


def quate(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """(h ⊗ r/|r|)·t: quaternions stored in four parts, each of a relation brought to unit norm (Zhang et al., NeurIPS
    2019).
    """
    p, q, answer = (x.chunk(4, -1) for x in (h, r, t))
    norm = sum(x * x for x in q) ** 0.5
    total = torch.zeros(())
    for i, row in enumerate(UNITS):
        for j, (k, sign) in enumerate(row):
            total = total + sign * (p[i] * q[j] / norm * answer[k]).sum(-1)
    return total


def hole(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """Σ_k r_k Σ_i h_i·t_{k+i mod D} (Nickel et al., AAAI 2016)."""
    D = h.shape[-1]
    return sum(r[..., k] * (h * t.roll(-k, -1)).sum(-1) for k in range(D))  # type: ignore[return-value]


def pairre(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """−‖h∘r − t∘r'‖₁ of h and t brought to unit L2 norm; relations stored [r, r'] (Chao et al., ACL 2021)."""
    of_head, of_tail = r.chunk(2, -1)
    h, t = (x / (x * x).sum(-1, keepdim=True).sqrt() for x in (h, t))
    return -(h * of_head - t * of_tail).abs().sum(-1)
