"""The losses in plain torch as their papers state them: the oracle of the operators.

Source: Niu & Zhang, "Diffusion-based Hierarchical Negative Sampling for Multimodal Knowledge Graph Completion", DASFAA
2025 (arXiv 2501.15393), and Sun et al., "RotatE", ICLR 2019 (arXiv 1902.10197), for the self-adversarial loss.
Every function works in the dtype of its inputs. Nothing is validated here: `dhns_fast.loss` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dhns_fast.reference.scoring import pair_scores

LevelValues: TypeAlias = Tensor | Sequence[float | Tensor]


def active_levels(weight: LevelValues) -> list[int]:
    """The hardness levels that count; the others are neither read nor scored."""
    values = weight.tolist() if isinstance(weight, Tensor) else weight
    return [level for level, value in enumerate(values) if value > 0]


def finite_or_nan(score: Tensor) -> Tensor:
    """An infinite score is an overflow and no good or bad triple: it becomes NaN, so that the loss tells of it on every
    device.
    """
    return torch.where(score.isfinite(), score, torch.nan)


def hardness_adaptive_loss(
    positive: Tensor, negative: Tensor, margin: LevelValues, weight: LevelValues, mu: float = 0.01
) -> Tensor:
    """μ / (K·#{w > 0}) · Σ_i w_i Σ_k ½·[−mean_b logσ(p_b) − mean_b logσ(−(m_i + n_ik,b))].

    Args:
        positive: scores of the positive triples, γ included, [B].
        negative: scores of the corruptions before the margin, [L, K, B].
        margin: m, [L].
        weight: w, [L].
    """
    levels = active_levels(weight)
    true = -F.logsigmoid(finite_or_nan(positive)).mean()
    total = positive.new_zeros(())
    for i in levels:
        false = -F.logsigmoid(-(margin[i] + finite_or_nan(negative[i]))).mean(-1)  # [K]
        total = total + weight[i] * 0.5 * (true + false).sum()
    return mu / (negative.shape[1] * max(len(levels), 1)) * total


def self_adversarial_loss(positive: Tensor, negative: Tensor, temperature: float = 0.5) -> Tensor:
    """½·[−mean_b logσ(p_b) − mean_b Σ_j softmax_j(a·n_bj)·logσ(−n_bj)], no gradient through the softmax.

    Args:
        positive: [B].
        negative: [B, N].
    """
    positive, negative = finite_or_nan(positive), finite_or_nan(negative)
    share = torch.softmax(temperature * negative.detach(), -1)
    false = -(share * F.logsigmoid(-negative)).sum(-1).mean()
    return 0.5 * (-F.logsigmoid(positive).mean() + false)


def corruption_loss(
    query: Tensor,
    table: Tensor,
    answer: Tensor,
    corrupt: Tensor,
    reduction: str = "dot",
    offset: float = 0.0,
    temperature: float = 0.5,
    scale: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """`self_adversarial_loss` of queries [B, D] against rows of a table [E, D].

    Args:
        answer: int64 [B].
        corrupt: int64 [B, N], or [N] for all queries.
        scale: [B, D] or None.
        exclude: bool [B, N], pairs that do not count, or None.
    """
    positive = offset + pair_scores(query, table[answer], reduction, scale)
    own = None if scale is None else scale[:, None]
    return self_adversarial_loss(
        positive, left_out(offset + pair_scores(query[:, None], table[corrupt], reduction, own), exclude), temperature
    )


def left_out(score: Tensor, exclude: Tensor | None) -> Tensor:
    """Scores so low where `exclude` is set that their weight and their loss are 0."""
    return score if exclude is None else score.masked_fill(exclude, -1e30)


def transe(head: Tensor, relation: Tensor, tail: Tensor, p: int = 1, normalize: bool = False) -> Tensor:
    """−‖h + r − t‖_p over the last dimension, each of h, r, t first brought to unit L2 norm when `normalize`."""
    if normalize:
        head, relation, tail = (F.normalize(x, dim=-1) for x in (head, relation, tail))
    return -torch.linalg.vector_norm(head + relation - tail, ord=p, dim=-1)


def distmult(head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Σ h∘r∘t over the last dimension."""
    return (head * relation * tail).sum(-1)


def complex_(head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Re Σ h∘r∘conj(t); all three stored [re, im]."""
    (h_re, h_im), (r_re, r_im), (t_re, t_im) = (x.chunk(2, -1) for x in (head, relation, tail))
    return ((h_re * r_re - h_im * r_im) * t_re + (h_re * r_im + h_im * r_re) * t_im).sum(-1)


def rotate(head: Tensor, phase: Tensor, tail: Tensor) -> Tensor:
    """−Σ |h∘e^{iθ} − t|, entities stored [re, im]: [..., D], θ in radians: [..., D/2]. A modulus of 0 has gradient
    0.
    """
    (h_re, h_im), (t_re, t_im) = head.chunk(2, -1), tail.chunk(2, -1)
    r_re, r_im = phase.cos(), phase.sin()
    difference = torch.stack((h_re * r_re - h_im * r_im - t_re, h_re * r_im + h_im * r_re - t_im))
    return -torch.linalg.vector_norm(difference, dim=0).sum(-1)


def triple_score(
    interaction: str, head: Tensor, relation: Tensor, tail: Tensor, p: int = 1, normalize: bool = False
) -> Tensor:
    """The score of triples, higher is better: a negated distance or a trilinear product. [..., D] -> [...]."""
    if interaction == "transe":
        return transe(head, relation, tail, p, normalize)
    return {"distmult": distmult, "complex": complex_, "rotate": rotate}[interaction](head, relation, tail)


def fuse(embedding: Tensor, attention: Tensor, present: Tensor | None = None) -> Tensor:
    """Σ_m a_m·e_m with a = softmax_m(w·tanh(e_m)); a modality that is not present has a = 0.

    Args:
        embedding: e, [M, ..., D].
        attention: w, [D].
        present: bool [M, ...], or None when every entity has every modality. An entity without any fuses to 0.
    """
    if present is not None:
        # Before anything else: 0·NaN is NaN, so whatever stands in the place of an absent modality must not take part.
        embedding = embedding.masked_fill(~present.unsqueeze(-1), 0)
    logit = embedding.tanh() @ attention
    if present is None:
        share = torch.softmax(logit, 0)
    else:
        share = torch.softmax(logit.masked_fill(~present, -torch.inf), 0).masked_fill(~present, 0)
    return (share.unsqueeze(-1) * embedding).sum(0)


def hal_from_embeddings(
    interaction: str,
    head: Tensor,
    relation: Tensor,
    tail: Tensor,
    neg_head: Tensor,
    neg_tail: Tensor,
    margin: LevelValues,
    weight: LevelValues,
    mu: float = 0.01,
    gamma: float = 0.0,
    attention: Tensor | None = None,
    normalize: bool = False,
    p: int = 1,
    present: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The hardness-adaptive loss of a batch from its embeddings and the generated ones; shapes as in
    `dhns_fast.loss`.
    """
    head_present, tail_present = present or (None, None)
    if attention is not None:
        head, tail = fuse(head, attention, head_present), fuse(tail, attention, tail_present)

    def score(h: Tensor, t: Tensor) -> Tensor:
        return triple_score(interaction, h, relation, t, p, normalize)

    levels = active_levels(weight)
    rows = []
    for i in levels:
        h, t = neg_head[i].detach(), neg_tail[i].detach()  # [M, B, D]
        if attention is not None:
            h, t = fuse(h, attention, head_present), fuse(t, attention, tail_present)
        scores = torch.stack((score(h, tail), score(head, t), score(h, t)))  # [3, B], or [3, M, B] without fusion
        rows.append(scores if attention is not None else scores.mean(1))
    positive = gamma + score(head, tail)
    negative = torch.stack(rows) if rows else positive.new_zeros(0, 3, positive.shape[0])
    margins: list[float | Tensor] = [margin[i] for i in levels]
    weights: list[float | Tensor] = [weight[i] for i in levels]
    return hardness_adaptive_loss(positive, negative, margins, weights, mu)
