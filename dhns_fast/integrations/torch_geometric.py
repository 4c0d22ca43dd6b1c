"""PyTorch Geometric's knowledge-graph models under our operators: filtered ranks of both sides, its own `test`, and
prediction.

    from dhns_fast.integrations.torch_geometric import evaluate
    evaluate(model, test_triples, known=(train_triples, valid_triples))["mrr"]

Its `model.test` ranks tails only, raw, a triple at a time; `raw_test` gives the same three numbers. PyG's RotatE is the
Euclidean norm over all components, where the paper and :mod:`dhns_fast.models` sum the moduli; its TransE normalises
entities by its own norm. Which reduction stands for a model is logged once. A model that is not among `MODELS` is
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dhns_fast.catalogue import Side
from dhns_fast.diffusion.conditions import complex_product, conjugate, unit_complex
from dhns_fast.errors import InputError, Shown
from dhns_fast.integrations.foreign import ForeignModel
from dhns_fast.ranking import RankingResult, rank_side

__all__ = ["MODELS", "PyGModel", "evaluate", "predict", "raw_test"]

# Of torch_geometric.nn.kge, by class name; a subclass of one has a score of its own and is not meant.
MODELS = ("TransE", "DistMult", "ComplEx", "RotatE")


class PyGModel(ForeignModel):
    """A model of PyG as :func:`dhns_fast.ranking.evaluate` and the operators take it. Views of its tables are made
    once, here.

    Args:
        model: TransE (`p_norm` 1 or 2), DistMult, ComplEx or RotatE of `torch_geometric.nn.kge`.

    Raises:
        InputError: it is another model.
    """

    def __init__(self, model: Any) -> None:
        self.kind = type(model).__name__
        if not type(model).__module__.startswith("torch_geometric.nn.kge") or self.kind not in MODELS:
            raise InputError("model", Shown(self.kind), f"{', '.join(MODELS)} of torch_geometric.nn.kge")
        reduction = "dot"
        if self.kind == "TransE":
            if model.p_norm not in (1, 2):
                raise InputError("model", Shown(f"TransE with p_norm = {model.p_norm}"), "p_norm = 1 or 2")
            reduction = f"l{int(model.p_norm)}"
        elif self.kind == "RotatE":
            reduction = "l2"
        super().__init__(f"PyTorch Geometric's {self.kind}", model.num_nodes, model.num_relations, reduction)
        entity, relation = model.node_emb.weight.detach(), model.rel_emb.weight.detach()
        if self.kind in ("ComplEx", "RotatE"):
            entity = torch.cat([entity, model.node_emb_im.weight.detach()], 1)
        if self.kind == "ComplEx":
            relation = torch.cat([relation, model.rel_emb_im.weight.detach()], 1)
        if self.kind == "TransE":
            entity = F.normalize(entity, p=model.p_norm, dim=-1)
        self.table, self.relation = entity, relation
        self.offset = float(model.margin) if self.kind == "RotatE" else 0.0

    def query(self, entity: Tensor, relation: Tensor, side: str) -> tuple[Tensor, Tensor | None]:
        e, r, tail = self.table[entity], self.relation[relation], side == "tail"
        if self.kind == "TransE":
            return (e + r if tail else e - r), None
        if self.kind == "DistMult":
            return e * r, None
        if self.kind == "RotatE":
            r = unit_complex(r)
        return complex_product(e, r if tail else conjugate(r)), None

    def entities(self, side: str) -> Tensor:
        return self.table

    def finish(self, reduced: Tensor, entity: Tensor, relation: Tensor, side: str) -> Tensor:
        return reduced + self.offset


def evaluate(model: Any, triples: Any, known: Any = (), batch_size: int = 4096) -> RankingResult:
    """Rank the true head and tail of every triple among all entities.

    Args:
        model: of `torch_geometric.nn.kge`, see :class:`PyGModel`.
        triples: int `[n, 3]` (head, relation, tail).
        known: triples that are no rivals, usually those of training and validation; `triples` always are such. None:
            raw ranks.
        batch_size: queries at once.

    Returns:
        results keyed `both.realistic.inverse_harmonic_mean_rank`, or `mrr` for short, as
        :func:`dhns_fast.ranking.evaluate` gives them.
    """
    return PyGModel(model).evaluate(triples, known, batch_size)


def raw_test(
    model: Any,
    head_index: Tensor,
    rel_type: Tensor,
    tail_index: Tensor,
    batch_size: int = 4096,
    k: int = 10,
    log: bool = False,
) -> tuple[float, float, float]:
    """`model.test(head_index, rel_type, tail_index, batch_size, k)`: raw mean rank of tails (from 0), MRR and Hits@k.

    Ties count half, where PyG leaves them to the sort. There is nothing to `log`: it takes a fraction of a second.
    """
    triples = torch.stack([head_index, rel_type, tail_index], 1).cpu()
    ranks = rank_side(PyGModel(model), triples, "tail", None, batch_size).rank("realistic")
    return (ranks - 1).mean().item(), ranks.reciprocal().mean().item(), (ranks <= k).double().mean().item()


def predict(
    model: Any, entity: Any, relation: Any, side: Side = "tail", k: int = 10, known: Any = (), batch_size: int = 4096
) -> tuple[Tensor, Tensor]:
    """The k best answers of queries: PyG's scores `[B, k]`, best first, and entity ids int64 `[B, k]`.

    Args:
        entity, relation: ids, one or int `[B]`: of heads where tails are asked for, of tails where heads are.
        side: "tail" or "head", the side that is asked for.
        k: 1 to min(E, 1024).
        known: triples whose answers are left out.
    """
    return PyGModel(model).predict(entity, relation, side, k, known, batch_size)
