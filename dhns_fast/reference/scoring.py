"""Scoring against all entities as the formulas read: the B×E matrix is written and everything is taken from it.

`score = reduce(q, s ∘ e)` for every row e of the entity table, higher is better:

    dot          Σ q·s·e                                DistMult, ComplEx, SimplE, RESCAL, CP
    l2           −√Σ (q − s·e)²                         TransE
    l1           −Σ |q − s·e|                           TransE, PairRE (with its scale)
    complex_l1   −Σ |q − s·e|, moduli of complex parts  RotatE; D = [real half, imaginary half]

Every function takes any floating dtype; tests use float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

REDUCTIONS = ("dot", "l2", "l1", "complex_l1")


class Known(Protocol):
    """The known answers of B queries: row b is `ids[offsets[b]:offsets[b + 1]]`, sorted and without duplicates."""

    offsets: Tensor
    ids: Tensor


def pair_scores(query: Tensor, entity: Tensor, reduction: str, scale: Tensor | None = None) -> Tensor:
    """Scores of `query` against `entity`, both broadcastable to [..., D], reduced over the last dimension: [...]."""
    if scale is not None:
        entity = entity * scale
    if reduction == "dot":
        return (query * entity).sum(-1)
    difference = query - entity
    if reduction == "l2":
        return -torch.linalg.vector_norm(difference, dim=-1)
    if reduction == "l1":
        return -difference.abs().sum(-1)
    real, imaginary = difference.chunk(2, dim=-1)
    # abs() of a complex number has gradient 0 at 0, where sqrt(re² + im²) has NaN.
    return -torch.complex(real, imaginary).abs().sum(-1)


def score_all(query: Tensor, entity: Tensor, reduction: str = "dot", scale: Tensor | None = None) -> Tensor:
    """Query [B, D], entity [E, D], scale [B, D] or None -> scores [B, E]."""
    return pair_scores(query[:, None], entity[None], reduction, None if scale is None else scale[:, None])


def known_mask(known: Known | None, num_queries: int, num_entities: int) -> Tensor:
    """[B, E], true where the entity is a known answer of the query."""
    mask = torch.zeros(num_queries, num_entities, dtype=torch.bool)
    if known is not None:
        for row in range(num_queries):
            mask[row, known.ids[known.offsets[row] : known.offsets[row + 1]]] = True
    return mask


def ranks_of(scores: Tensor, target: Tensor, known: Known | None = None) -> tuple[Tensor, Tensor]:
    """Filtered ranks from a score matrix.

    Args:
        scores: [B, E].
        target: the true entity of each query, int64 [B].
        known: entities that are no rivals; the target itself is never one.

    Returns:
        (greater, equal), int64 [B]: the rivals that score above and exactly at the target. A NaN rival counts in
        neither; a NaN target has every rival above it.
    """
    num_queries, num_entities = scores.shape
    rival = ~known_mask(known, num_queries, num_entities)
    rival[torch.arange(num_queries), target] = False
    at_target = scores.gather(1, target[:, None])
    greater = (scores > at_target) | at_target.isnan()
    return (greater & rival).sum(1), ((scores == at_target) & rival).sum(1)


def rank_all(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    reduction: str = "dot",
    known: Known | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ranks_of` the matrix of `score_all`."""
    return ranks_of(score_all(query, entity, reduction, scale), target, known)


def top_of(scores: Tensor, k: int, known: Known | None = None) -> tuple[Tensor, Tensor]:
    """The k best of each row, by score, then by id: scores [B, k] and ids int64 [B, k].

    Known answers and NaN are left out; where fewer than k entities remain, the rest is score −inf, id −1.
    """
    scores = scores.masked_fill(known_mask(known, *scores.shape) | scores.isnan(), -torch.inf)
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], ids[:, :k].masked_fill(best[:, :k] == -torch.inf, -1)


def topk_all(
    query: Tensor,
    entity: Tensor,
    k: int,
    reduction: str = "dot",
    known: Known | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`top_of` the matrix of `score_all`."""
    return top_of(score_all(query, entity, reduction, scale), k, known)


def logsumexp_all(query: Tensor, entity: Tensor, reduction: str = "dot", scale: Tensor | None = None) -> Tensor:
    """log Σ_e exp(score) [B]."""
    return score_all(query, entity, reduction, scale).logsumexp(1)


def one_vs_all_loss(
    query: Tensor, entity: Tensor, target: Tensor, reduction: str = "dot", scale: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the true entity among all: a scalar."""
    return torch.nn.functional.cross_entropy(score_all(query, entity, reduction, scale), target)
