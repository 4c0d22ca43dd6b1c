"""Near misses: real entities next to the answer, or next to what the model asks for, by exact top-k."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.models import KGEModel
from dhns_fast.negatives.base import Sampler, answers, check_query
from dhns_fast.ops.score import MAX_K
from dhns_fast.scoring import hard_negatives


class Nearest(Sampler):
    """Entities drawn uniformly, with replacement, from the `pool` that are nearest among all, known answers left out.

    to="answer": nearest to the true answer by the Euclidean distance of what queries meet (TransE: normalised),
    whatever the relation: the nearest-neighbour sampler of Kotnis and Nastase ("Analysis of the impact of negative
    sampling on link prediction in knowledge graphs", 2017). to="query": those that the model itself ranks highest, its
    near misses. The embeddings are the model's own as they are now, where the paper has a second model trained before.

    Args:
        known: filter of the training triples.
        model: whose embeddings they are.
        num_negatives: N.
        pool: 1 to min(E, 1024); a small one is hard, and richer in true triples that the graph lacks.
        to: see above.

    Cost: the scores of all E entities for each triple (:func:`dhns_fast.scoring.topk_all`); nothing of size [B, E] is
    made.
    """

    def __init__(
        self,
        known: CSRFilter,
        model: KGEModel,
        num_negatives: int = 4,
        pool: int = 50,
        to: Literal["answer", "query"] = "answer",
    ) -> None:
        super().__init__(known, num_negatives, model)
        pool = checks.count("pool", pool, 1, min(known.num_entities, MAX_K))
        checks.one_of("to", to, ("answer", "query"))
        self.pool, self.to_ = pool, to

    @torch.no_grad()
    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        model, left_out = self.model, answers(self.known, h, r, t, side)
        table = model.entities(side)
        if self.to_ == "answer":
            return hard_negatives(
                table[t if side == "tail" else h],
                table,
                self.num_negatives,
                self.pool,
                "l2",
                left_out,
                generator=generator,
            )
        query, scale = model.query(h if side == "tail" else t, r, side)
        options = {"scale": scale, "generator": generator}
        return hard_negatives(query, table, self.num_negatives, self.pool, model.reduction, left_out, **options)  # type: ignore[arg-type]
