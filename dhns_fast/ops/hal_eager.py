"""The losses with their gradients in plain torch, any device and floating dtype: what runs where nothing is compiled.

Formulas as in `dhns_fast.loss`. Losses of scores have their gradients written out; the one of embeddings is
differentiated by torch.func, since an operator runs below autograd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dhns_fast.diffusion.conditions import complex_product, unit_complex
from dhns_fast.ops.fusion_eager import fuse
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.score_eager import pair_scores

if TYPE_CHECKING:
    from dhns_fast.ops.hal import EmbeddingInputs


def finite_or_nan(score: Tensor) -> Tensor:
    """An infinite score is an overflow and no good or bad triple: it becomes NaN, so that the loss tells of it on every
    device.
    """
    return torch.where(score.isfinite(), score, torch.nan)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + eˣ); torch's own is off by e⁻²⁰ beyond 20."""
    return -F.logsigmoid(-x)


def self_adversarial(positive: Tensor, negative: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients in positive [B] and negative [B, N]."""
    positive, negative = finite_or_nan(positive), finite_or_nan(negative)
    share = torch.softmax(temperature * negative, -1)
    scale = 0.5 / len(positive)
    loss = scale * (softplus(-positive).double().sum() + (share * softplus(negative)).double().sum())
    return (
        loss.to(positive.dtype),
        torch.sigmoid(-positive).mul_(-scale),
        share.mul_(torch.sigmoid(negative)).mul_(scale),
    )


def scores(
    positive: Tensor, negative: Tensor, margin: Tensor, weight: Tensor, mu: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and its gradients in positive [B], negative [L, K, B] and margin [L]."""
    margin, weight = (x.to(positive.device, positive.dtype) for x in (margin, weight))
    positive = finite_or_nan(positive)
    _, K, B = negative.shape
    scale = mu / (2 * K * B) / (weight > 0).sum().clamp(min=1).to(weight.dtype)
    by_positive = torch.sigmoid(-positive).mul_(-scale * K * weight.clamp(min=0).sum())
    by_negative, by_margin = torch.zeros_like(negative), torch.zeros_like(margin)
    loss = K * weight.clamp(min=0).sum() * softplus(-positive).double().sum()
    for i in active_levels(weight):
        score = margin[i] + finite_or_nan(negative[i])
        loss = loss + weight[i] * softplus(score).double().sum()
        by_negative[i] = torch.sigmoid(score).mul_(scale * weight[i])
        by_margin[i] = by_negative[i].sum()
    return (scale * loss).to(positive.dtype), by_positive, by_negative, by_margin


def active_levels(weight: Tensor) -> list[int]:
    """The hardness levels that count; the others are neither read nor scored."""
    return [level for level, value in enumerate(weight.tolist()) if value > 0]


def moduli(difference: Tensor) -> Tensor:
    """√(re² + im²) of complex vectors [..., D] stored [re, im]: [..., D/2]; gradient 0 at 0, and as in C++ an overflow
    is one of the squares.
    """
    real, imaginary = difference.chunk(2, -1)
    squares = real.square() + imaginary.square()
    return torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())


def triple_score(
    interaction: str, head: Tensor, relation: Tensor, tail: Tensor, p: int = 1, normalize: bool = False
) -> Tensor:
    """Scores of triples, [..., D] -> [...], higher is better: a negated distance or a product.

    Args:
        relation: for "rotate" phases in radians, [..., D/2].
        normalize: "transe": each of the three is first brought to unit L2 norm.
        p: "transe": the norm, 1 or 2.
    """
    if normalize:
        head, relation, tail = (F.normalize(x, dim=-1) for x in (head, relation, tail))
    if interaction == "transe":
        return pair_scores(head + relation, tail, f"l{p}")
    if interaction == "distmult":
        return pair_scores(head * relation, tail, "dot")
    if interaction == "complex":
        return pair_scores(complex_product(head, relation), tail, "dot")
    return -moduli(complex_product(head, unit_complex(relation)) - tail).sum(-1)


def embeddings(a: EmbeddingInputs) -> tuple[Tensor, ...]:
    """Loss and its gradients in head, relation, tail, attention and margin; empty tensors where `a.gradients` is
    False.
    """
    wide = accumulator(a.head.dtype)
    weight = a.weight.to(a.head.device, wide)
    levels = active_levels(weight)
    neg_head, neg_tail = (x[levels].to(wide) for x in (a.neg_head, a.neg_tail))
    learned = {"head": a.head, "relation": a.relation, "tail": a.tail, "attention": a.attention, "margin": a.margin}
    values = {name: x.to(a.head.device, wide) for name, x in learned.items() if x is not None}

    def loss(values: dict[str, Tensor]) -> Tensor:
        head, relation, tail, attention = values["head"], values["relation"], values["tail"], values.get("attention")
        x, y = neg_head, neg_tail  # [L, M, B, D]
        if attention is not None:
            head, tail = fuse(head, attention, a.head_present), fuse(tail, attention, a.tail_present)
            masks = [None if mask is None else mask[:, None] for mask in (a.head_present, a.tail_present)]
            # [L, B, D]
            x, y = (fuse(z.transpose(0, 1), attention, mask) for z, mask in zip((x, y), masks, strict=True))

        def score(h: Tensor, t: Tensor) -> Tensor:
            return triple_score(a.interaction, h, relation, t, a.p, a.normalize)

        # [3, L, B], or [3, L, M, B] without fusion
        negative = torch.stack((score(x, tail), score(head, y), score(x, y)))
        if attention is None:
            negative = negative.mean(2)
        positive = softplus(-finite_or_nan(a.gamma + score(head, tail))).mean()
        false = softplus(values["margin"][levels, None] + finite_or_nan(negative)).mean(-1).sum(0)  # [L]
        return a.mu / (6 * max(len(levels), 1)) * (weight[levels] * (3 * positive + false)).sum()

    empty = weight.new_empty(0)
    if not a.gradients:
        return loss(values), *(empty.clone() for _ in range(5))
    by_name, value = torch.func.grad_and_value(loss)(values)
    return value.detach(), *(by_name.get(name, empty).detach() for name in learned)
