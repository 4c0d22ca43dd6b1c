"""What an adapter makes of another library's model: a query, an entity view and a reduction
(:class:`dhns_fast.ranking.Rankable`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhns_fast.catalogue import SIDES, Side
from dhns_fast.checks import one_of, whole
from dhns_fast.data import CSRFilter
from dhns_fast.data.filter import as_integers, as_triples
from dhns_fast.errors import InputError, Shown
from dhns_fast.ranking import RankingResult, categories_of, rank_side
from dhns_fast.scoring import topk_all

logger = logging.getLogger(__name__)

_said: set[tuple[str, str]] = set()


class ForeignModel(ABC):
    """A model of another library, whose scores are `finish(reduce(query, entities))`, higher is better; dropout and
    batch norms as in its eval mode.

    Args:
        name: what refusals and log lines call it.
        num_entities, num_relations: E and R, as ids of triples count them.
        reduction: of :mod:`dhns_fast.scoring`. A wrong one changes ranks without a word, so that the choice is logged,
            once a process.
    """

    def __init__(self, name: str, num_entities: int, num_relations: int, reduction: str) -> None:
        self.name, self.num_entities, self.num_relations, self.reduction = name, num_entities, num_relations, reduction
        if (name, reduction) not in _said:
            _said.add((name, reduction))
            logger.info("%s: scores are the reduction %r of its query and its entities", name, reduction)

    @abstractmethod
    def query(self, entity: Tensor, relation: Tensor, side: str) -> tuple[Tensor, Tensor | None]:
        """As :meth:`dhns_fast.models.KGEModel.query`."""

    @abstractmethod
    def entities(self, side: str) -> Tensor:
        """As :meth:`dhns_fast.models.KGEModel.entities`."""

    def finish(self, reduced: Tensor, entity: Tensor, relation: Tensor, side: str) -> Tensor:
        """The library's own scores `[B, k]` of reductions `[B, k]`."""
        return reduced

    def triples(self, given: Any, name: str = "triples") -> Tensor:
        """int64 `[n, 3]` on the CPU, of a tensor, array or list, or of whatever has `mapped_triples` (PyKEEN's triples
        factories).
        """
        return as_triples(getattr(given, "mapped_triples", given), self.num_entities, self.num_relations, name).cpu()

    def filter(self, known: Any, name: str = "known") -> Tensor:
        """All triples of `known`: triples as :meth:`triples` takes them, or a tuple or list of such."""
        if isinstance(known, (tuple, list)) and all(
            hasattr(part, "mapped_triples") or getattr(part, "ndim", 0) == 2 for part in known
        ):
            parts = [self.triples(part, f"{name}[{i}]") for i, part in enumerate(known)]
            return torch.cat([torch.empty(0, 3, dtype=torch.int64), *parts])
        return self.triples(known, name)

    @torch.no_grad()
    def evaluate(self, triples: Any, known: Any, batch_size: int = 4096) -> RankingResult:
        """Both sides of triples, ranked; see `evaluate` of the adapters."""
        table = self.triples(triples)
        if not len(table):
            raise InputError("triples", Shown("none"), "one or more")
        filtered = table[:0] if known is None else self.filter(known)
        if known is not None and not len(filtered):
            logger.warning(
                "no known triples are given: answers in training count as rivals (known=(training, ...), or None for raw ranks)"
            )
        index = CSRFilter.from_triples([filtered, table], self.num_entities, self.num_relations)
        head, tail = (
            rank_side(self, table, side, None if known is None else index, batch_size) for side in ("head", "tail")
        )
        seen = torch.full((self.num_entities,), not len(filtered))
        seen[filtered[:, 0]] = seen[filtered[:, 2]] = True
        unseen = ~(seen[table[:, 0]] & seen[table[:, 2]])
        return RankingResult(
            table, head, tail, categories_of(index), unseen, [str(r) for r in range(self.num_relations)]
        )

    @torch.no_grad()
    def predict(
        self, entity: Any, relation: Any, side: Side, k: int, known: Any, batch_size: int = 4096
    ) -> tuple[Tensor, Tensor]:
        """The k best answers; see `predict` of the adapters."""
        one_of("side", side, SIDES)
        whole("k", k, 1)
        asked = [
            as_integers(name, x, "an id, or a list of ids").reshape(-1).cpu()
            for name, x in (("entity", entity), ("relation", relation))
        ]
        if len(asked[0]) != len(asked[1]) and 1 not in (len(asked[0]), len(asked[1])):
            raise InputError(
                "relation", Shown(f"{len(asked[1])} ids"), f"one, or one for each of {len(asked[0])} entities"
            )
        entity, relation = torch.broadcast_tensors(*asked)
        index = CSRFilter.from_triples(self.filter(known), self.num_entities, self.num_relations)
        table = self.entities(side)
        scores, ids = [], []
        for e, r in zip(entity.split(batch_size), relation.split(batch_size), strict=True):
            answers = index.answers(side, e, r).to(table.device)
            e, r = e.to(table.device), r.to(table.device)
            query, scale = self.query(e, r, side)
            reduced, best = topk_all(query, table, k, self.reduction, known=answers, scale=scale)
            scores.append(self.finish(reduced, e, r, side))
            ids.append(best)
        return torch.cat(scores), torch.cat(ids)


def real(x: Tensor) -> Tensor:
    """Complex `[..., D]` as real `[..., 2D]`, the two parts of a component side by side: of a contiguous table a view.
    Real ones as they are.
    """
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def by_relation(vectors: Tensor, relation: Tensor, matrices: Callable[[Tensor], Tensor]) -> Tensor:
    """`vectors[b] @ matrices(relation)[b]`, `[B, d']`, with one matrix for every distinct relation instead of every
    row.

    Args:
        vectors: `[B, d]`.
        relation: int64 `[B]`.
        matrices: distinct relations int64 `[R']` -> `[R', d, d']`.
    """
    order = relation.argsort(stable=True)
    found, counts = relation[order].unique_consecutive(return_counts=True)
    parts = zip(vectors[order].split(counts.tolist()), matrices(found), strict=True)
    return torch.cat([vectors[:0], *(part @ matrix for part, matrix in parts)])[order.argsort()]
