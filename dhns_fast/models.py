"""Knowledge-graph-embedding models: a query, an entity view and a reduction each, and nothing else to write to add one.

    score(h, r, t) = offset + reduce(q, φ(e))

q = `query(known entity, relation, side)`; φ = `entities(side)` is a table that does not depend on the query;
`reduction` names how the two meet (see :mod:`dhns_fast.scoring`). Ranking, prediction, corruption scoring and the
generated negatives all follow from these: a model writes `compose`, where needed `view`, and the name of its reduction.
Complex vectors are stored as real numbers, real parts first ([re, im]).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast import catalogue, checks
from dhns_fast.catalogue import Side
from dhns_fast.data.filter import as_integers
from dhns_fast.diffusion.conditions import complex_product, conjugate, unit_complex
from dhns_fast.errors import InputError, Shown
from dhns_fast.fusion import Fusion
from dhns_fast.ops.operator import autocast
from dhns_fast.ops.power import power_sum
from dhns_fast.ops.score import look_inside
from dhns_fast.ops.score_eager import pair_scores
from dhns_fast.optim import RowEmbedding
from dhns_fast.scoring import score_all

# Entities whose views are made at once when all are ranked: at least so many, or so many bytes of them.
PART_ROWS, PART_BYTES = 1 << 14, 1 << 26
Query = tuple[Tensor, Tensor | None]
Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autocast(method: Method) -> Method:
    """A narrowed query or table would have other ranks; only the arithmetic of the operators has a choice of
    precision.
    """

    @functools.wraps(method)
    def exact(self: KGEModel, *args: Any, **kwargs: Any) -> Any:
        device = self.compute_device
        if not autocast(device):
            return method(self, *args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, exact)


def _looked_up(what: str, table: nn.Embedding | RowEmbedding, ids: Tensor) -> Tensor:
    """Rows of a table, or InputError where ids are none."""
    checks.tensor(**{what: ids})
    checks.real("the table", table.weight, **{what: ids})
    try:
        rows: Tensor = table(ids)
    except (IndexError, RuntimeError):
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(what, ids, "torch.int64 or torch.int32") from None
        if ids.device == table.weight.device:
            look_inside(what, ids, len(table.weight))
        raise
    return rows


class Dropout:
    """Inverted dropout (Srivastava et al., JMLR 2014) of embeddings and of relation parameters: each number is 0 with
    the probability p, and 1/(1 − p) times itself otherwise.

    Args:
        entities, relations: p of either, from 0 to below 1.
        generator: of the draws, on the device of the model.
    """

    def __init__(self, entities: float, relations: float, generator: torch.Generator) -> None:
        self.entities, self.relations, self.generator = entities, relations, generator

    def of_entities(self, x: Tensor) -> Tensor:
        return self._of(x, self.entities)

    def of_relations(self, x: Tensor) -> Tensor:
        return self._of(x, self.relations)

    def _of(self, x: Tensor, share: float) -> Tensor:
        if not share:
            return x
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= share
        return x * kept.to(x.dtype).div_(1 - share)


class KGEModel(nn.Module, ABC):
    """Base of the models: embedding tables, optional fusion of modalities, and scores made of query, entity view and
    reduction.

    Args:
        num_entities: E.
        num_relations: R.
        dim: D, width of entity embeddings; a multiple of `parts`.
        margin: γ. Distance models score γ − d; for all it sets the initial range of entities, ±(γ + ε)/D, and of
            relations, ±(γ + ε)/dim_r. None: 6 for distance models; for product models the γ that gives the release's
            range at D = 1024, γ = 200, whatever D is.
        epsilon: ε of the same formulas.
        fusion: modalities beside the structural embedding; None: none.
        entity: the table of structural embeddings, a :class:`dhns_fast.optim.RowEmbedding` with values; None makes an
            `nn.Embedding`.

    Attributes:
        relation: relation parameters `[relation_rows, dim_r]`.
        reduction: how queries and entity views meet; a model of your own names it as a class attribute, one of the
            catalogue has it there.
        condition: name of the generator's condition and of the hardness-adaptive loss's interaction; empty for models
            without.
        parts: of which an embedding consists: 2 for [re, im] or [as head, as tail], 4 for quaternions.
        dropout: what a loss in training sets while it is computed; None outside of it.

    Raises:
        InputError: an argument is out of range.
    """

    reduction: str
    condition: ClassVar[str] = ""
    parts: ClassVar[int] = 1

    def __init_subclass__(cls, model: str | None = None, **options: object) -> None:
        """`model`: its name in the catalogue, whose entry has what the class needs not say again."""
        super().__init_subclass__(**options)
        if model is not None:
            known = catalogue.MODELS[model]
            cls.reduction, cls.parts, cls.condition = known.reduction, known.parts, model if known.dhns else ""

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        margin: float | None = None,
        epsilon: float = 2.0,
        fusion: Fusion | None = None,
        *,
        entity: RowEmbedding | None = None,
    ) -> None:
        super().__init__()
        num_entities, num_relations, dim = (
            checks.count(name, value)
            for name, value in (("num_entities", num_entities), ("num_relations", num_relations), ("dim", dim))
        )
        if dim % self.parts:
            raise InputError("dim", dim, f"multiples of {self.parts}, for {type(self).__name__}")
        checks.instance(Fusion, "a Fusion, or None", fusion=fusion)
        checks.instance(RowEmbedding, "a RowEmbedding, or None", entity=entity)
        if fusion is not None and (fusion.dim, fusion.num_entities) != (dim, num_entities):
            found = Shown(f"one for {fusion.num_entities} entities and dim {fusion.dim}")
            raise InputError("fusion", found, f"{num_entities} entities and dim {dim}, as the model has")
        checks.finite(epsilon=epsilon)
        if margin is None:
            margin = 6.0 if self.distance else 202 / 1024 * dim - epsilon
        checks.finite(margin=margin)
        if margin + epsilon <= 0:
            raise InputError("margin", margin, f"numbers above -epsilon, {-epsilon}")
        self.num_entities, self.num_relations, self.dim = num_entities, num_relations, dim
        self.margin, self.epsilon, self.fusion = float(margin), float(epsilon), fusion
        if entity is not None and entity.shape != (num_entities, dim):
            raise InputError("entity", Shown(f"a table of shape {list(entity.shape)}"), f"{[num_entities, dim]}")
        self.entity: nn.Embedding | RowEmbedding = nn.Embedding(num_entities, dim) if entity is None else entity
        self.relation = nn.Embedding(self.relation_rows, self.relation_dim)
        self.dropout: Dropout | None = None
        if entity is None:
            nn.init.uniform_(self.entity.weight, -self.entity_range, self.entity_range)
        nn.init.uniform_(self.relation.weight, -self.relation_range, self.relation_range)

    @property
    def entity_range(self) -> float:
        """(γ + ε) / D: the initial range of entities."""
        return (self.margin + self.epsilon) / self.dim

    @property
    def relation_dim(self) -> int:
        """dim_r, width of relation embeddings."""
        return self.dim

    @property
    def relation_rows(self) -> int:
        """Rows of the relation table: R, or 2R where a relation has a row for each direction (:func:`reciprocal`)."""
        return self.num_relations

    @property
    def relation_range(self) -> float:
        """(γ + ε) / dim_r: the initial range of relations, which RotatE maps to phases of ±π."""
        return (self.margin + self.epsilon) / self.relation_dim

    @property
    def distance(self) -> bool:
        """Whether scores are γ − d; otherwise they are products."""
        return self.reduction != "dot"

    @property
    def offset(self) -> float:
        """What a triple's score adds to the reduction: γ for distances (the reduction is a negated one), 0 for
        products.
        """
        return self.margin if self.distance else 0.0

    @property
    def compute_device(self) -> torch.device:
        """Where ids, queries and scores are; a table of entities may lie elsewhere, in host memory."""
        relation = getattr(self, "relation", None)
        return (next(self.parameters()) if relation is None else relation.weight).device

    def structure_table(self) -> Tensor:
        """The structural embeddings of all entities `[E, D]`; where several processes share them, of those here."""
        return self.entity.weight if isinstance(self.entity, nn.Embedding) else self.entity.whole()

    @_without_autocast
    def table(self) -> Tensor:
        """Embeddings of all entities `[E, D]` as they are scored: joint where modalities are fused."""
        structure = self.structure_table()
        return structure if self.fusion is None else self.fusion(structure)

    @_without_autocast
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[*ids, D]` as they are scored, of entities int64 `[*ids]`."""
        structure = _looked_up("entity", self.entity, ids)
        return (
            structure
            if self.fusion is None
            else self.fusion(structure.reshape(-1, self.dim), ids.reshape(-1)).view(structure.shape)
        )

    @_without_autocast
    def modalities(self, ids: Tensor) -> Tensor:
        """`[M, n, D]`: the structural embedding and every projected modality of entities `[n]`."""
        return self.entity(ids)[None] if self.fusion is None else self.fusion.modalities(self.entity(ids), ids)

    def view(self, embedding: Tensor, side: Side) -> Tensor:
        """φ: what of an embedding `[..., D]` a query for `side` meets. The embedding itself unless a model says
        otherwise.
        """
        return embedding

    @abstractmethod
    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        """q (and a per-query scale or None), as wide as views, of embeddings `[B, D]`, relations int64 `[B]` and the
        side asked for.
        """

    @_without_autocast
    def query(self, entity: Tensor, relation: Tensor, side: Side) -> Query:
        """q and a per-query scale or None, of known entities int64 `[B]`, relations int64 `[B]` and the side asked for.

        Args:
            side: "tail" when entities are heads and tails are asked for, "head" the other way round.
        """
        checks.one_of("side", side, catalogue.SIDES)
        checks.tensor(entity=entity, relation=relation)
        if entity.shape != relation.shape:
            raise InputError("relation", relation, f"a relation for each entity, {list(entity.shape)}")
        return self.compose(self.embed(entity), relation, side)

    @_without_autocast
    def entities(self, side: Side) -> Tensor:
        """φ of all entities, as candidates for `side`: `[E, D]`, or narrower where the view is."""
        checks.one_of("side", side, catalogue.SIDES)
        return self.view(self.table(), side)

    def entity_parts(self, side: Side) -> Iterator[tuple[int, Tensor]]:
        """φ of the entities as (id of the first, `[n, D]`), in parts: all of them, or those of this process where
        several share the table.

        Where φ is the table itself there is one part, which is no copy; elsewhere a part is made when its turn comes,
        and one is in memory at a time.
        """
        rows = self.entity.weight.detach()
        first = 0 if isinstance(self.entity, nn.Embedding) else self.entity.row_offset
        if self.as_stored(side):
            yield first, rows
            return
        count = max(PART_ROWS, PART_BYTES // (4 * self.dim))
        for begin in range(0, max(1, len(rows)), count):
            yield first + begin, self._part(begin, min(begin + count, len(rows)), first, side)

    def as_stored(self, side: Side) -> bool:
        """Whether φ of an entity is its row of the table, as it lies in memory."""
        rows, like = self.entity.weight.detach(), self.relation.weight
        nothing = rows[:0]
        fused = self.fusion is not None and self.fusion.attend
        same = rows.dtype == like.dtype and rows.device == like.device
        if isinstance(self.entity, RowEmbedding):
            same &= self.entity.complete
        return not fused and same and self.view(nothing, side) is nothing

    @_without_autocast
    def _part(self, begin: int, end: int, first: int, side: Side) -> Tensor:
        """φ of the rows begin .. end − 1 of those here, whose ids are `first` higher."""
        table = self.entity
        structure = table.weight[begin:end] if isinstance(table, nn.Embedding) else table.part(begin, end)
        if self.fusion is not None:
            structure = self.fusion(structure, torch.arange(first + begin, first + end, device=structure.device))
        return self.view(structure, side)

    def relation_table(self) -> Tensor:
        """All relations `[R, dim_r]` as scores use them (the phases of RotatE); of a reciprocal model `[2R, dim_r]`."""
        return self.hal_relation(self.relation.weight)

    @_without_autocast
    def match(self, query: Query, candidates: Tensor) -> Tensor:
        """offset + reduce(q, candidate): queries `[B, D]` against viewed candidates `[B, D]` -> `[B]`, or `[B, N, D]`
        -> `[B, N]`.
        """
        q, scale = query
        if candidates.ndim == 3:
            q, scale = q[:, None], None if scale is None else scale[:, None]
        return self.offset + pair_scores(q, candidates, self.reduction, scale)

    @_without_autocast
    def score_hrt(self, triples: Any) -> Tensor:
        """Scores `[n]` of triples, integers `[n, 3]` (head, relation, tail), higher is better; γ − d for distances.

        Args:
            triples: a tensor, an array, or a list of triples.

        Raises:
            InputError: they are no such table, or an id is out of range (looked for on a CPU).
        """
        h, r, t = self._columns("triples", triples, (self.num_entities, self.num_relations, self.num_entities))
        return self.match(self.query(h, r, "tail"), self.view(self.embed(t), "tail"))

    @_without_autocast
    def score_t(self, hr: Any) -> Tensor:
        """Scores `[n, E]` of all entities as tails of (head, relation), integers `[n, 2]`; arguments and errors as
        :meth:`score_hrt`.
        """
        h, r = self._columns("hr", hr, (self.num_entities, self.num_relations))
        q, scale = self.query(h, r, "tail")
        return self.offset + score_all(q, self.entities("tail"), self.reduction, scale=scale)

    @_without_autocast
    def score_h(self, rt: Any) -> Tensor:
        """Scores `[n, E]` of all entities as heads of (relation, tail), integers `[n, 2]`; arguments and errors as
        :meth:`score_hrt`.
        """
        r, t = self._columns("rt", rt, (self.num_relations, self.num_entities))
        q, scale = self.query(t, r, "head")
        return self.offset + score_all(q, self.entities("head"), self.reduction, scale=scale)

    def _columns(self, what: str, table: Any, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Columns of a table of ids on the model's device, each below its end."""
        accepted = f"integers of shape [n, {len(ends)}]"
        ids = as_integers(what, table, accepted).to(self.compute_device)
        if not ids.numel():
            ids = ids.reshape(0, len(ends))
        if ids.ndim != 2 or ids.shape[1] != len(ends):
            raise InputError(what, ids, accepted)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = ((ids < 0) | (ids >= torch.tensor(ends, device=ids.device))).any(1)
            if bool(bad.any()):
                row = int(bad.int().argmax())
                raise InputError(
                    what, Shown(f"{ids[row].tolist()} in row {row}"), f"ids below {', '.join(map(str, ends))}"
                )
        return ids.unbind(1)

    def relations(self, ids: Tensor) -> Tensor:
        """Relation parameters `[*ids, dim_r]`, as queries are composed of them."""
        return self.dropped_relations(_looked_up("relation", self.relation, ids))

    def dropped_relations(self, parameters: Tensor) -> Tensor:
        """Relation parameters, of which training with dropout leaves out a part."""
        return parameters if self.dropout is None else self.dropout.of_relations(parameters)

    def dropped(self, embedding: Tensor) -> Tensor:
        """Embeddings, of which training with dropout leaves out a part."""
        return embedding if self.dropout is None else self.dropout.of_entities(embedding)

    def asked_with(self, relation: Tensor, side: Side) -> Tensor:
        """Rows of the relation table, int64 `[B]`, that queries of relations int64 `[B]` for `side` are made with."""
        return relation

    def powers(self, parameters: Tensor, exponent: int) -> Tensor:
        """Σ |x|^exponent over entities or relation parameters `[n, dim]`, a scalar: the sum that penalties are made of.
        ComplEx takes the moduli of its complex numbers, as Lacroix et al. (ICML 2018) do.
        """
        total: Tensor = power_sum(parameters, exponent)
        return total

    def hal_relation(self, relation: Tensor) -> Tensor:
        """Relation parameters `[B, dim_r]` as :func:`dhns_fast.loss.hal_from_embeddings` takes them (RotatE:
        phases).
        """
        return relation

    def hal_options(self) -> dict[str, Any]:
        """Options of :func:`dhns_fast.loss.hal_from_embeddings` that the model's score needs."""
        return {}


class TransE(KGEModel, model="transe"):
    """γ − ‖h + r − t‖_p (Bordes et al. 2013); h, r and t brought to unit L2 norm first when `normalize` is set, as the
    release does.

    Args:
        p: 1 or 2.
        normalize: see above. The other arguments are those of :class:`KGEModel`.
    """

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
        *,
        entity: RowEmbedding | None = None,
    ) -> None:
        super().__init__(num_entities, num_relations, dim, margin, epsilon, fusion, entity=entity)
        checks.one_of("p", p, (1, 2))
        checks.flag(normalize=normalize)
        self.p, self.normalize = p, normalize = int(p), bool(normalize)
        self.reduction = f"l{p}"

    def view(self, embedding: Tensor, side: Side) -> Tensor:
        return F.normalize(embedding, dim=-1) if self.normalize else embedding

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        e, r = self.view(embedding, side), self.view(self.relations(relation), side)
        return (e + r if side == "tail" else e - r), None

    def relation_table(self) -> Tensor:
        return self.view(self.relation.weight, "tail")

    def hal_options(self) -> dict[str, Any]:
        return {"p": self.p, "normalize": self.normalize}


class DistMult(KGEModel, model="distmult"):
    """Σ h∘r∘t (Yang et al. 2015)."""

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        return embedding * self.relations(relation), None


class ComplEx(KGEModel, model="complex"):
    """Re Σ h∘r∘conj(t) (Trouillon et al. 2016)."""

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        r = self.relations(relation)
        return complex_product(embedding, r if side == "tail" else conjugate(r)), None

    def powers(self, parameters: Tensor, exponent: int) -> Tensor:
        # Of the squared modulus: a root has no gradient at zero.
        return parameters.unflatten(-1, (2, -1)).square().sum(-2).pow(exponent / 2).sum()


class RotatE(KGEModel, model="rotate"):
    """γ − Σ|h∘e^{iθ} − t| with θ = r·π/range, range = (γ + ε)/dim_r, dim_r = D/2 (Sun et al. 2019)."""

    @property
    def relation_dim(self) -> int:
        return self.dim // 2

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        phase = self.hal_relation(self.relations(relation))
        return complex_product(embedding, unit_complex(phase if side == "tail" else -phase)), None

    def hal_relation(self, relation: Tensor) -> Tensor:
        return relation * (math.pi / self.relation_range)


class CP(KGEModel, model="cp"):
    """Σ a∘r∘b of a, the head's embedding as head, and b, the tail's as tail (Hitchcock 1927; Lacroix et al. 2018).

    An embedding is [as head, as tail], dim_r = D/2: views and queries are half as wide.
    """

    @property
    def relation_dim(self) -> int:
        return self.dim // 2

    def view(self, embedding: Tensor, side: Side) -> Tensor:
        return embedding.chunk(2, -1)[side == "tail"]

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        return embedding.chunk(2, -1)[side == "head"] * self.relations(relation), None


class SimplE(KGEModel, model="simple"):
    """½·(Σ a(h)∘r∘b(t) + Σ a(t)∘r'∘b(h)), a and b the embeddings as head and as tail (Kazemi and Poole 2018).

    An embedding is [as head, as tail], a relation [r, r' of its inverse].
    """

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        a, b = embedding.chunk(2, -1)
        forward, inverse = self.relations(relation).chunk(2, -1)
        q = (b * inverse, a * forward) if side == "tail" else (b * forward, a * inverse)
        return 0.5 * torch.cat(q, -1), None


class RESCAL(KGEModel, model="rescal"):
    """hᵀRt with a matrix R `[D, D]` a relation, dim_r = D² (Nickel et al. 2011)."""

    @property
    def relation_dim(self) -> int:
        return self.dim**2

    @property
    def relation_range(self) -> float:
        """(γ + ε) / D^1.5: queries then spread as DistMult's do."""
        return (self.margin + self.epsilon) / self.dim**1.5

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        # One product a distinct relation: a matrix for every row would take B·D² numbers.
        checks.real("the table", self.relation.weight, relation=relation)
        order = relation.argsort(stable=True)
        found, counts = torch.stack(relation[order].unique_consecutive(return_counts=True)).tolist()
        matrices = self.dropped_relations(self.relation.weight).unflatten(1, (self.dim, self.dim)).unbind()
        parts = zip(embedding[order].split(counts), found, strict=True)
        q = torch.cat([e @ (matrices[r] if side == "tail" else matrices[r].T) for e, r in parts])
        return q[order.argsort()], None


class QuatE(KGEModel, model="quate"):
    """Σ (h ⊗ r/|r|)·t in quaternions, stored as four parts: real, i, j, k (Zhang et al. 2019)."""

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        p, q = (x.unflatten(-1, (4, -1)) for x in (embedding, self.relations(relation)))
        q = F.normalize(q, dim=-2)
        # h ⊗ r for tails; t ⊗ r̄ for heads, as (h ⊗ r)·t = h·(t ⊗ r̄).
        (a, b, c, d), (w, x, y, z) = (
            p.unbind(-2),
            (q if side == "tail" else torch.cat([q[..., :1, :], -q[..., 1:, :]], -2)).unbind(-2),
        )
        product = (
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        )
        return torch.cat(product, -1), None

    def relation_table(self) -> Tensor:
        return F.normalize(self.relation.weight.unflatten(-1, (4, -1)), dim=-2).flatten(-2)


class PairRE(KGEModel, model="pairre"):
    """γ − ‖h∘r − t∘r'‖₁, h and t of unit L2 norm (Chao et al. 2021). A relation is [r, r'], dim_r = 2D."""

    @property
    def relation_dim(self) -> int:
        return 2 * self.dim

    def view(self, embedding: Tensor, side: Side) -> Tensor:
        return F.normalize(embedding, dim=-1)

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        of_head, of_tail = self.relations(relation).chunk(2, -1)
        own, other = (of_head, of_tail) if side == "tail" else (of_tail, of_head)
        return self.view(embedding, side) * own, other


class HolE(KGEModel, model="hole"):
    """Σ_k r_k·(h ⋆ t)_k of the circular correlation (h ⋆ t)_k = Σ_i h_i·t_{k+i mod D} (Nickel et al. 2016)."""

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        e, r = torch.fft.rfft(embedding), torch.fft.rfft(self.relations(relation))
        return torch.fft.irfft(e * (r if side == "tail" else r.conj()), self.dim), None


class _Reciprocal(KGEModel):
    """See :func:`reciprocal`."""

    @property
    def relation_rows(self) -> int:
        return 2 * self.num_relations

    def asked_with(self, relation: Tensor, side: Side) -> Tensor:
        return relation if side == "tail" else relation + self.num_relations

    def compose(self, embedding: Tensor, relation: Tensor, side: Side) -> Query:
        return super().compose(embedding, self.asked_with(relation, side), "tail")  # type: ignore[safe-super]

    def view(self, embedding: Tensor, side: Side) -> Tensor:
        return super().view(embedding, "tail")


@functools.cache
def reciprocal(kind: type[KGEModel]) -> type[KGEModel]:
    """A model that asks for the heads of relation r as for the tails of an inverse relation of its own, row R + r of
    the relation table (Lacroix et al., ICML 2018; Kazemi and Poole, NeurIPS 2018). :meth:`KGEModel.score_hrt` is the
    score of the tail.

    Args:
        kind: a class of :data:`MODELS`, or of your own.

    Returns:
        a class with the same arguments, named Reciprocal and the name of `kind`.
    """
    return type(f"Reciprocal{kind.__name__}", (_Reciprocal, kind), {"__doc__": reciprocal.__doc__})


MODELS: dict[str, type[KGEModel]] = {name: globals()[model.title] for name, model in catalogue.MODELS.items()}
