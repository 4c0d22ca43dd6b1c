"""Knowledge-graph-embedding models: a query, an entity view and a reduction each, and nothing else to write to add one.

    score(h, r, t) = offset + reduce(q, φ(e))

q = `query(known entity, relation, side)`; φ = `entities(side)` is a table that does not depend on the query; `reduction` names how the two meet
(see :mod:`dhns_fast.scoring`). Ranking, prediction, corruption scoring and the generated negatives all follow from these.
Complex vectors are stored as real numbers, real parts first ([re, im]).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast.diffusion.conditions import complex_product, conjugate, unit_complex
from dhns_fast.errors import InputError
from dhns_fast.fusion import Fusion
from dhns_fast.reference.scoring import pair_scores
from dhns_fast.scoring import score_all

__all__ = ["MODELS", "ComplEx", "DistMult", "KGEModel", "RotatE", "TransE"]

Query = tuple[Tensor, Tensor | None]


class KGEModel(nn.Module):
    """Base of the models: embedding tables, optional fusion of modalities, and scores made of query, entity view and reduction.

    Args:
        num_entities: E.
        num_relations: R.
        dim: D, width of entity embeddings; even for complex models.
        margin: γ. Distance models score γ − d; for all it sets the initial range of entities, ±(γ + ε)/D, and of relations, ±(γ + ε)/dim_r.
            None: 6 for distance models; for product models the γ that gives the release's range at D = 1024, γ = 200, whatever D is.
        epsilon: ε of the same formulas.
        fusion: modalities beside the structural embedding; None: none.

    Raises:
        InputError: an argument is out of range.
    """

    reduction: ClassVar[str]
    condition: ClassVar[str]
    distance: ClassVar[bool]
    even_dim: ClassVar[bool] = False

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        margin: float | None = None,
        epsilon: float = 2.0,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_entities", num_entities), ("num_relations", num_relations), ("dim", dim)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.even_dim and dim % 2:
            raise InputError(f"dim must be even for {type(self).__name__} (real and imaginary halves), got {dim}")
        if fusion is not None and (fusion.dim, fusion.num_entities) != (dim, num_entities):
            found = f"{fusion.num_entities} entities and dim {fusion.dim}"
            raise InputError(f"fusion is for {found}, the model has {num_entities} entities and dim {dim}")
        if margin is None:
            margin = 6.0 if self.distance else 202 / 1024 * dim - epsilon
        if margin + epsilon <= 0:
            raise InputError(f"margin + epsilon must be positive, got {margin} + {epsilon}")
        self.num_entities, self.num_relations, self.dim = num_entities, num_relations, dim
        self.margin, self.epsilon, self.fusion = float(margin), float(epsilon), fusion
        self.entity = nn.Embedding(num_entities, dim)
        self.relation = nn.Embedding(num_relations, self.relation_dim)
        nn.init.uniform_(self.entity.weight, -(margin + epsilon) / dim, (margin + epsilon) / dim)
        nn.init.uniform_(self.relation.weight, -self.relation_range, self.relation_range)

    @property
    def relation_dim(self) -> int:
        """dim_r, width of relation embeddings."""
        return self.dim

    @property
    def relation_range(self) -> float:
        """(γ + ε) / dim_r: the initial range of relations, which RotatE maps to phases of ±π."""
        return (self.margin + self.epsilon) / self.relation_dim

    @property
    def offset(self) -> float:
        """What a triple's score adds to the reduction: γ for distances (the reduction is a negated one), 0 for products."""
        return self.margin if self.distance else 0.0

    def table(self) -> Tensor:
        """Embeddings of all entities `[E, D]` as they are scored: joint where modalities are fused."""
        return self.entity.weight if self.fusion is None else self.fusion(self.entity.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[*ids, D]` as they are scored, of entities int64 `[*ids]`."""
        structure = self.entity(ids)
        return structure if self.fusion is None else self.fusion(structure.reshape(-1, self.dim), ids.reshape(-1)).view(structure.shape)

    def modalities(self, ids: Tensor) -> Tensor:
        """`[M, n, D]`: the structural embedding and every projected modality of entities `[n]`."""
        return self.entity(ids)[None] if self.fusion is None else self.fusion.modalities(self.entity(ids), ids)

    def view(self, embedding: Tensor) -> Tensor:
        """φ: what of an embedding `[..., D]` a query meets. The embedding itself unless a model says otherwise."""
        return embedding

    def compose(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        """q `[B, D]` (and a per-query scale or None) of viewed entities `[B, D]`, relation parameters `[B, dim_r]` and the side asked for."""
        raise TypeError(f"{type(self).__name__} must define compose")

    def query(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        """q `[B, D]` and a per-query scale or None, of known entities int64 `[B]`, relations int64 `[B]` and the side asked for.

        Args:
            side: "tail" when entities are heads and tails are asked for, "head" the other way round.
        """
        if side not in ("tail", "head"):
            raise InputError(f"side must be 'tail' or 'head', got {side!r}")
        return self.compose(self.view(self.embed(entity)), self.relation(relation), side)

    def entities(self, side: str) -> Tensor:
        """φ of all entities, `[E, D]`, as candidates for `side`."""
        return self.view(self.table())

    def match(self, query: Query, candidates: Tensor) -> Tensor:
        """offset + reduce(q, candidate): queries `[B, D]` against viewed candidates `[B, D]` -> `[B]`, or `[B, N, D]` -> `[B, N]`."""
        q, scale = query
        if candidates.ndim == 3:
            q, scale = q[:, None], None if scale is None else scale[:, None]
        return self.offset + pair_scores(q, candidates, self.reduction, scale)

    def score_hrt(self, triples: Tensor) -> Tensor:
        """Scores `[n]` of triples int64 `[n, 3]` (head, relation, tail), higher is better; γ − d for distances."""
        h, r, t = triples.unbind(1)
        return self.match(self.query(h, r, "tail"), self.view(self.embed(t)))

    def score_t(self, hr: Tensor) -> Tensor:
        """Scores `[n, E]` of all entities as tails of (head, relation) int64 `[n, 2]`."""
        q, scale = self.query(hr[:, 0], hr[:, 1], "tail")
        return self.offset + score_all(q, self.entities("tail"), self.reduction, scale=scale)

    def score_h(self, rt: Tensor) -> Tensor:
        """Scores `[n, E]` of all entities as heads of (relation, tail) int64 `[n, 2]`."""
        q, scale = self.query(rt[:, 1], rt[:, 0], "head")
        return self.offset + score_all(q, self.entities("head"), self.reduction, scale=scale)

    def hal_relation(self, relation: Tensor) -> Tensor:
        """Relation parameters `[B, dim_r]` as :func:`dhns_fast.loss.hal_from_embeddings` takes them (RotatE: phases)."""
        return relation

    def hal_options(self) -> dict[str, object]:
        """Options of :func:`dhns_fast.loss.hal_from_embeddings` that the model's score needs."""
        return {}


class TransE(KGEModel):
    """γ − ‖h + r − t‖_p (Bordes et al. 2013); h, r and t brought to unit L2 norm first when `normalize` is set, as the release does.

    Args:
        p: 1 or 2.
        normalize: see above. The other arguments are those of :class:`KGEModel`.
    """

    reduction: ClassVar[str] = "l1"
    condition: ClassVar[str] = "transe"
    distance: ClassVar[bool] = True

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        margin: float | None = None,
        epsilon: float = 2.0,
        fusion: Fusion | None = None,
        p: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__(num_entities, num_relations, dim, margin, epsilon, fusion)
        if p not in (1, 2):
            raise InputError(f"p must be 1 or 2, got {p}")
        self.p, self.normalize = p, normalize
        self.reduction = f"l{p}"  # type: ignore[misc]  # one class, two norms

    def view(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=-1) if self.normalize else embedding

    def compose(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        relation = self.view(relation)
        return (entity + relation if side == "tail" else entity - relation), None

    def hal_options(self) -> dict[str, object]:
        return {"p": self.p, "normalize": self.normalize}


class DistMult(KGEModel):
    """Σ h∘r∘t (Yang et al. 2015)."""

    reduction: ClassVar[str] = "dot"
    condition: ClassVar[str] = "distmult"
    distance: ClassVar[bool] = False

    def compose(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        return entity * relation, None


class ComplEx(KGEModel):
    """Re Σ h∘r∘conj(t) (Trouillon et al. 2016)."""

    reduction: ClassVar[str] = "dot"
    condition: ClassVar[str] = "complex"
    distance: ClassVar[bool] = False
    even_dim: ClassVar[bool] = True

    def compose(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        return complex_product(entity, relation if side == "tail" else conjugate(relation)), None


class RotatE(KGEModel):
    """γ − Σ|h∘e^{iθ} − t| with θ = r·π/range, range = (γ + ε)/dim_r, dim_r = D/2 (Sun et al. 2019)."""

    reduction: ClassVar[str] = "complex_l1"
    condition: ClassVar[str] = "rotate"
    distance: ClassVar[bool] = True
    even_dim: ClassVar[bool] = True

    @property
    def relation_dim(self) -> int:
        return self.dim // 2

    def compose(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        phase = self.hal_relation(relation)
        return complex_product(entity, unit_complex(phase if side == "tail" else -phase)), None

    def hal_relation(self, relation: Tensor) -> Tensor:
        return relation * (math.pi / self.relation_range)


MODELS: dict[str, type[KGEModel]] = {"transe": TransE, "distmult": DistMult, "complex": ComplEx, "rotate": RotatE}
