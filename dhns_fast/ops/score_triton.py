"""The consumers of scores against all entities in Triton: the functions of `dhns_fast.ops.score_eager` as methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dhns_fast.kernels import score as kernels
from dhns_fast.ops import score_eager
from dhns_fast.ops.precision import matmul_precision

TILE_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Scores:
    """The consumers.

    Args:
        precision: of the products of `dot`: "ieee" (float32), "tf32" or "bf16"; sums are float32 always.
    """

    precision: str = "ieee"

    def target_scores(
        self, query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str
    ) -> Tensor:
        return kernels.target_scores(query, entity, target, scale, reduction, self.precision)

    def rank_counts(
        self,
        query: Tensor,
        entity: Tensor,
        target: Tensor,
        at_target: Tensor,
        offsets: Tensor,
        ids: Tensor,
        scale: Tensor | None,
        reduction: str,
    ) -> Tensor:
        return kernels.rank_counts(query, entity, target, at_target, offsets, ids, scale, reduction, self.precision)

    def topk_all(
        self, query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
    ) -> tuple[Tensor, Tensor]:
        return kernels.topk_all(query, entity, k, offsets, ids, scale, reduction, self.precision)

    def logsumexp_all(self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
        return kernels.logsumexp_all(query, entity, scale, reduction, self.precision)

    def scores_and_logsumexp(
        self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str
    ) -> tuple[Tensor, Tensor]:
        scores = self.score_all(query, entity, scale, reduction)
        return scores, scores.logsumexp(1)

    def score_all(self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
        return kernels.score_all(query, entity, scale, reduction, self.precision)

    def tile_shape(self, queries: int, entities: int, dim: int, reduction: str) -> tuple[int, int]:
        """A tile of the backward pass has weights and scores of this shape, and nothing of D times its size: 32 MB
        each, which stay in a GPU's second-level cache, and rows enough for the library's products."""
        rows = min(max(256, TILE_ELEMENTS // max(entities, 1)), max(queries, 1))
        return rows, max(1, min(entities, TILE_ELEMENTS // rows))

    def softmax(self, scores: Tensor, logsumexp: Tensor, grad: Tensor) -> Tensor:
        return score_eager.softmax(scores, logsumexp, grad)

    def add_gradients(
        self,
        query: Tensor,
        entity: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        scores: Tensor | None,
        reduction: str,
        out: score_eager.Gradients,
    ) -> None:
        if reduction == "dot":
            with matmul_precision(self.precision, query.device):
                return score_eager.add_gradients(query, entity, scale, weight, scores, reduction, out)
        if reduction == "l2" and scores is not None:
            weight = score_eager.over_distance(weight, scores)
        found = kernels.gradients(query, entity, scale, weight.contiguous(), reduction)
        for total, part in zip(out, found, strict=True):
            if total is not None:
                total += part
