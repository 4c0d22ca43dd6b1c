"""Filtered link-prediction evaluation: both sides, every rule for ties, from one streamed pass over the entities.

Metric names are PyKEEN's (`both.realistic.inverse_harmonic_mean_rank`), with the short forms of the literature as
synonyms (`mrr`, `hits@10`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dhns_fast import checks
from dhns_fast.catalogue import SPLITS, Side
from dhns_fast.data import CSRFilter, KnowledgeGraph, Ragged
from dhns_fast.data.filter import as_ids, as_triples
from dhns_fast.data.types import TypeConstraints
from dhns_fast.errors import InputError, Shown
from dhns_fast.items import evaluate_items
from dhns_fast.scoring import count_parts, refuse_trouble

__all__ = ["Rankable", "RankingResult", "RelationFrequency", "evaluate", "evaluate_items", "relation_categories"]

SIDES: tuple[Literal["both"], Literal["head"], Literal["tail"]] = ("both", "head", "tail")
RULES = ("optimistic", "realistic", "pessimistic")
SYNONYMS = {
    "mrr": "inverse_harmonic_mean_rank",
    "mean_reciprocal_rank": "inverse_harmonic_mean_rank",
    "mr": "arithmetic_mean_rank",
    "mean_rank": "arithmetic_mean_rank",
    "amri": "adjusted_arithmetic_mean_rank_index",
    "adjusted_mean_rank_index": "adjusted_arithmetic_mean_rank_index",
}
METRICS = (
    "inverse_harmonic_mean_rank",
    "arithmetic_mean_rank",
    "hits_at_1",
    "hits_at_3",
    "hits_at_10",
    "adjusted_arithmetic_mean_rank_index",
)
HITS = re.compile(r"hits(?:_at_|@|_?)([1-9]\d*)")
# A relation has "many" answers on a side from this mean number on (Bordes et al. 2013).
MANY = 1.5
Categories = list[str] | Callable[[], list[str]]
# Queries at once over a table whose parts are made for each batch of them.
PARTS_BATCH = 1 << 15
# A split this many times as large as what is ranked is searched for what the filter needs, so many triples at a time.
SMALL_FILTER, PIECE = 4, 1 << 20


class Rankable(Protocol):
    """What evaluation needs of a model; every :class:`dhns_fast.models.KGEModel` has it."""

    @property
    def reduction(self) -> str: ...

    def query(self, entity: Tensor, relation: Tensor, side: Side) -> tuple[Tensor, Tensor | None]: ...

    def entities(self, side: Side) -> Tensor: ...


@dataclass(frozen=True)
class SideRanks:
    """Ranks of the n triples on one side, and what they are ranks among.

    Attributes:
        greater, equal: rivals above the true entity and level with it, int64 `[n]`.
        candidates: entities ranked, the true one included and known answers not, int64 `[n]`.
    """

    greater: Tensor
    equal: Tensor
    candidates: Tensor

    def rank(self, rule: str) -> Tensor:
        """Ranks from 1, float64 `[n]`: ties won ("optimistic"), lost ("pessimistic"), or the mean of the two
        ("realistic").
        """
        tie = {"optimistic": 0.0, "realistic": 0.5, "pessimistic": 1.0}[rule]
        return 1 + self.greater.double() + tie * self.equal.double()

    def select(self, index: Tensor) -> SideRanks:
        return SideRanks(self.greater[index], self.equal[index], self.candidates[index])


class RankingResult(Mapping[str, float]):
    """Metrics of an evaluation, keyed `side.rule.metric`: side both | head | tail, rule optimistic | realistic |
    pessimistic.

    `result["both.realistic.inverse_harmonic_mean_rank"]`, or `result["mrr"]` for short (both sides, realistic).
    `hits_at_k` takes any k.

    Attributes:
        triples: the triples ranked, int64 `[n, 3]`, on the CPU as everything here.
        head, tail: :class:`SideRanks` of the two sides.
        categories: "1-1", "1-n", "n-1" or "n-n" by relation id; counted when they are asked for first, where a function
            is given.
        unseen: bool `[n]`, triples that mention an entity which train does not.
        relation_names: by relation id.
    """

    def __init__(
        self,
        triples: Tensor,
        head: SideRanks,
        tail: SideRanks,
        categories: Categories,
        unseen: Tensor,
        relation_names: Sequence[str],
    ) -> None:
        # A copy: results by relation and category are looked up in it, whatever becomes of the caller's.
        self.triples, self.head, self.tail = triples.clone(), head, tail
        self._categories, self.unseen, self.relation_names = categories, unseen, relation_names

    @property
    def categories(self) -> list[str]:
        if callable(self._categories):
            self._categories = self._categories()
        return self._categories

    def __getitem__(self, key: str) -> float:
        side, rule, metric = self._parse(key)
        parts = [getattr(self, s) for s in (("head", "tail") if side == "both" else (side,))]
        ranks = torch.cat([part.rank(rule) for part in parts])
        if not len(ranks):
            return float("nan")
        if metric == "inverse_harmonic_mean_rank":
            return ranks.reciprocal().mean().item()
        if metric == "arithmetic_mean_rank":
            return ranks.mean().item()
        if metric == "adjusted_arithmetic_mean_rank_index":
            # 1 − (MR − 1)/(E[MR] − 1) under random scores (Berrendorf et al. 2020): 1 is perfect, 0 is chance.
            expected = torch.cat([part.candidates for part in parts]).double().add(1).div(2).mean()
            return 1.0 if expected <= 1 else (1 - (ranks.mean() - 1) / (expected - 1)).item()
        return (ranks <= int(metric.removeprefix("hits_at_"))).double().mean().item()

    def _parse(self, key: str) -> tuple[str, str, str]:
        if not isinstance(key, str):
            raise KeyError(f"{key!r}: accepted is the name of a metric")
        side, rule, metric = "both", "realistic", key
        for part in key.split(".")[:-1]:
            if part in SIDES:
                side = part
            elif part in RULES:
                rule = part
            else:
                raise KeyError(
                    f"{key!r}: {part!r} is neither a side ({', '.join(SIDES)}) nor a rule for ties ({', '.join(RULES)})"
                )
        metric = key.rpartition(".")[2].lower()
        metric = SYNONYMS.get(metric, metric)
        if hits := HITS.fullmatch(metric):
            metric = f"hits_at_{hits[1]}"
        elif metric not in METRICS:
            raise KeyError(
                f"{key!r}: unknown metric; known are {', '.join(METRICS)} (any k), and {', '.join(SYNONYMS)}"
            )
        return side, rule, metric

    def __iter__(self) -> Iterator[str]:
        return (f"{side}.{rule}.{metric}" for side in SIDES for rule in RULES for metric in METRICS)

    def __len__(self) -> int:
        return len(SIDES) * len(RULES) * len(METRICS)

    def __repr__(self) -> str:
        return f"RankingResult({len(self.triples)} triples, MRR {self['mrr']:.4f}, Hits@10 {self['hits@10']:.4f}, realistic)"

    def to_frame(self) -> Any:
        """A pandas DataFrame: a row a side and rule, a column a metric. Needs pandas."""
        import pandas

        rows = {
            (side, rule): [self[f"{side}.{rule}.{metric}"] for metric in METRICS] for side in SIDES for rule in RULES
        }
        return pandas.DataFrame(rows.values(), pandas.MultiIndex.from_tuples(rows, names=["side", "rule"]), METRICS)

    def openke(self) -> dict[str, float]:
        """MRR, MR and Hits as OpenKE and the papers built on it print them: ties always won, so comparable with those
        and no others.
        """
        names = {"mrr": "mrr", "mr": "mr", "hits10": "hits@10", "hits3": "hits@3", "hits1": "hits@1"}
        return {name: self[f"both.optimistic.{metric}"] for name, metric in names.items()}

    def select(self, index: Tensor) -> RankingResult:
        """The result of some of the triples: a bool mask `[n]` or positions."""
        parts = (self.triples[index], self.head.select(index), self.tail.select(index))
        return RankingResult(*parts, lambda: self.categories, self.unseen[index], self.relation_names)

    def sampled(self, negatives: int, seed: int = 0) -> RankingResult:
        """What the same weights get where each true entity is ranked among `negatives` others instead of all, as papers
        on large graphs do.

        The others are drawn uniformly, without replacement, from what the exact ranks are among (known answers left
        out). How many of them are above the true entity, and level with it, follows from the exact counts (a
        multivariate hypergeometric draw): nothing is scored again.

        Args:
            negatives: rivals of each true entity; all of them where there are fewer.
            seed: of the draw.

        Raises:
            InputError: `negatives` is below 1.
        """
        negatives, seed = checks.count("negatives", negatives), checks.count("seed", seed, 0, checks.SEEDS)
        generator = np.random.default_rng(seed)

        def draw(side: SideRanks) -> SideRanks:
            greater, equal, rivals = (x.numpy() for x in (side.greater, side.equal, side.candidates - 1))
            count = np.minimum(rivals, negatives)
            above = generator.hypergeometric(greater, rivals - greater, count)
            # Of the rest that was drawn, from what is left of the rest.
            level = generator.hypergeometric(equal, rivals - greater - equal, count - above)
            return SideRanks(torch.from_numpy(above), torch.from_numpy(level), torch.from_numpy(count + 1))

        head, tail = draw(self.head), draw(self.tail)
        return RankingResult(self.triples, head, tail, lambda: self.categories, self.unseen, self.relation_names)

    def per_relation(self) -> dict[str, RankingResult]:
        """Results by relation name, of the relations that occur."""
        relation = self.triples[:, 1]
        return {self.relation_names[r]: self.select(relation == r) for r in relation.unique().tolist()}

    def per_category(self) -> dict[str, RankingResult]:
        """Results by relation category, of the categories that occur. A side of 1-n is as hard as it looks: read head
        and tail apart.
        """
        of_triple = [self.categories[r] for r in self.triples[:, 1].tolist()]
        found = {c: torch.tensor([x == c for x in of_triple], dtype=torch.bool) for c in ("1-1", "1-n", "n-1", "n-n")}
        return {c: self.select(mask) for c, mask in found.items() if mask.any()}


def relation_categories(kg: KnowledgeGraph) -> list[str]:
    """ "1-1", "1-n", "n-1" or "n-n" by relation id (head side first), from the mean number of heads a tail and tails a
    head in train.
    """
    return categories_of(CSRFilter.from_triples(kg.train, kg.num_entities, kg.num_relations))


def categories_of(known: CSRFilter) -> list[str]:
    """:func:`relation_categories` of the triples that a filter was built from."""
    categories = []
    # Of each distinct (h, r) and (r, t): its relation. (unique(dim=0) of the triples took a sixth of an evaluation of
    # MKG-Y.)
    (of_heads, answers), (of_tails, _) = (
        (keys % known.num_relations, counts) for keys, counts in (side.groups() for side in (known.tail, known.head))
    )
    heads, tails = (relations.bincount(minlength=known.num_relations) for relations in (of_heads, of_tails))
    triples = torch.zeros_like(heads).index_add_(0, of_heads, answers)
    for n, h, t in zip(triples.tolist(), heads.tolist(), tails.tolist(), strict=True):
        many_heads, many_tails = n >= MANY * max(t, 1), n >= MANY * max(h, 1)
        categories.append(f"{'n' if many_heads else '1'}-{'n' if many_tails else '1'}")
    return categories


@torch.no_grad()
def rank_side(
    model: Rankable,
    triples: Tensor,
    side: Side,
    known: CSRFilter | None,
    batch_size: int = 4096,
    candidates: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> SideRanks:
    """Ranks of the true entities of one side. Triples that ask the same, of (head, relation) or (relation, tail), are
    ranked by one scoring of that query.

    Args:
        model: see :func:`evaluate`.
        triples: int64 `[n, 3]`.
        side: "head" or "tail", the side that is asked for.
        known: what is left out of the rivals, the triples themselves among them; None: nothing (raw ranks).
        batch_size, on_batch, group, backend, precision: as in :func:`evaluate`.
        candidates: entities to rank among, distinct and rising, int64 `[C]`; None: all. True entities must be among
            them.
    """
    made, device = getattr(model, "entity_parts", None), getattr(model, "compute_device", None)
    if made is None or device is None or candidates is not None:
        table = model.entities(side)
        device, total, in_parts = table.device, len(table), lambda: ((0, table),)
    else:
        # As many queries as there are, within reason: parts are made anew for each batch.
        batch_size, in_parts = max(batch_size, PARTS_BATCH), lambda: made(side)
        total = model.num_entities  # type: ignore[attr-defined]
    if known is not None and total != known.num_entities:
        raise InputError(
            "model", Shown(f"one that scores {total} entities"), f"one of {known.num_entities}, as the graph has"
        )
    place = None
    if candidates is not None:
        place = torch.full((total,), -1, device=triples.device)
        place[candidates.to(triples.device)] = torch.arange(len(candidates), device=triples.device)
        table, total = table[candidates.to(device)], len(candidates)
    # A GPU is asked once, at the end: what a batch needs is sent ahead, and its ranks stay there.
    counts, targets, troubles, left_out, places = [], [], [], [], []
    for rows, goals in _groups(triples, side, batch_size) if device.type == "cpu" else _alone(triples, batch_size):
        # Of each query the first triple stands for all.
        h, r, t = triples[rows[goals[:-1]]].unbind(1)
        entity, target = h if side == "tail" else t, triples[rows, 2 if side == "tail" else 0]
        answers = None
        if known is not None:
            answers = known.answers(side, entity, r)
        if place is not None:
            target = place[target]
            answers = None if answers is None else _among(answers, place)
        # The true entity is a candidate though it is a known answer.
        fewer = torch.zeros(len(h), dtype=torch.int64, device="cpu") if answers is None else answers.counts().cpu() - 1
        left_out.append(fewer.repeat_interleave(goals.diff()))
        target = sent(target, device)
        query, scale = model.query(sent(entity, device), sent(r, device), side)
        found, trouble = count_parts(
            query, in_parts, total, target, model.reduction,
            None if answers is None else Ragged(sent(answers.offsets, device), sent(answers.ids, device)),
            goals=goals if len(goals) <= len(rows) else None,
            scale=scale, group=group, backend=backend, precision=precision,
        )  # fmt: skip
        counts.append(found)
        targets.append(target)
        troubles.append(trouble)
        places.append(rows)
        if on_batch is not None:
            on_batch(len(rows))
    refuse_trouble(torch.stack(troubles).sum(0), torch.cat(targets), total)
    greater, equal, _ = torch.cat(counts, 1).cpu()
    found_at = torch.cat(places).argsort()
    return SideRanks(greater, equal, total - torch.cat(left_out)).select(found_at)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; to a GPU by a copy that nothing waits for."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _alone(triples: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`_groups` with a query for every triple: a GPU's kernels have one true entity each."""
    for rows in torch.arange(len(triples)).split(size):
        yield rows, torch.arange(len(rows) + 1)


def _groups(triples: Tensor, side: Side, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of the triples, in batches of at most `size`, those of one query one behind the other, and where each
    query's begin, int64 [queries + 1]. A query is in one batch, unless it has more triples than that.
    """
    known, relation = triples[:, 0 if side == "tail" else 2].cpu(), triples[:, 1].cpu()
    key = known * (int(relation.max()) + 1 if len(relation) else 1) + relation
    order = key.argsort(stable=True)
    starts = F.pad(key[order].unique_consecutive(return_counts=True)[1].cumsum(0), (1, 0))
    first = 0
    if not len(order):
        yield order, starts
    while first < len(order):
        end = min(first + size, len(order))
        whole = int(starts[torch.searchsorted(starts, end, right=True) - 1])
        end = whole if whole > first else end
        inside = starts[torch.searchsorted(starts, first, right=True) : torch.searchsorted(starts, end)]
        yield order[first:end], torch.cat([starts.new_zeros(1), inside - first, starts.new_tensor([end - first])])
        first = end


def _among(answers: Ragged, place: Tensor) -> Ragged:
    """The answers that have a place, by it."""
    ids = place[answers.ids]
    kept = ids >= 0
    counts = torch.zeros(len(answers), dtype=torch.int64, device=ids.device).index_add_(0, answers.rows(), kept.long())
    return Ragged(F.pad(counts.cumsum(0), (1, 0)), ids[kept])


@torch.no_grad()
def evaluate(
    model: Rankable,
    kg: KnowledgeGraph,
    split: str = "test",
    batch_size: int = 4096,
    triples: Any = None,
    on_batch: Callable[[int], None] | None = None,
    *,
    candidates: Tensor | TypeConstraints | Literal["types"] | None = None,
    filtered: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    precision: str | None = None,
    filter_by: Sequence[str] = SPLITS,
) -> RankingResult:
    """Rank the true entity of every triple of a split on both sides among all entities, known answers of all splits
    left out.

    Args:
        model: a KGE model, or anything with `query`, `entities` and `reduction` (:class:`Rankable`).
        kg: the graph.
        split: "train", "valid" or "test".
        batch_size: queries at once. Scores are streamed whatever it is; it bounds the known answers held at a time.
        triples: integers `[n, 3]` to rank instead of a split: a tensor, an array, or a list of (head, relation, tail).
        on_batch: called with the number of queries done after each batch, for progress bars.
        candidates: entities to rank among, int64 `[C]`, the true ones among them; on each side of a relation those of
            :class:`~dhns_fast.data.types.TypeConstraints`, or "types": those that train has there, and in both cases
            the true ones of the relation's triples (all where there are none); None: all.
        filtered: False ranks known answers like any other entity ("raw").
        group: the processes that share the model's entity table, all of which evaluate, with one result.
        backend, precision: of :func:`dhns_fast.rank_all`.
        filter_by: the splits whose triples are known answers, beside those that are ranked. Training chooses its best
            epoch on "valid" by ("train", "valid"), so that test has no say in it.

    Raises:
        InputError: a split is unknown or has no triples, an id is out of range, a true entity is no candidate, or the
            model is for another number of entities.
    """
    checks.instance(KnowledgeGraph, "a KnowledgeGraph", kg=kg)
    for name in ("query", "entities", "reduction"):
        if not hasattr(model, name):
            raise InputError("model", Shown(type(model).__name__), "something with query, entities and reduction")
    relations = getattr(model, "num_relations", kg.num_relations)
    if relations != kg.num_relations:
        raise InputError(
            "model", Shown(f"one of {relations} relations"), f"one of {kg.num_relations}, as the graph has"
        )
    batch_size = checks.count("batch_size", batch_size)
    checks.flag(filtered=filtered)
    for name in (split, *filter_by):
        checks.one_of("split", name, SPLITS)
    chosen = getattr(kg, split) if triples is None else as_triples(triples, kg.num_entities, kg.num_relations).cpu()
    if not len(chosen):
        raise InputError("triples", Shown(f"none (split {split} of {kg.name})"), "one or more")
    if group is not None and candidates is not None:
        raise InputError(
            "candidates", Shown("some"), "None with a group: every process ranks among its part of all entities"
        )
    known = None
    if filtered:
        known = CSRFilter.from_triples([*answering(kg, chosen, filter_by), chosen], kg.num_entities, kg.num_relations)
    options = {
        "batch_size": batch_size,
        "on_batch": on_batch,
        "group": group,
        "backend": backend,
        "precision": precision,
    }
    rank: Callable[..., SideRanks] = functools.partial(rank_side, known=known, **options)  # type: ignore[arg-type]
    if isinstance(candidates, str):
        checks.one_of("candidates", candidates, ("types",))
        candidates = TypeConstraints.of(kg.train, kg.num_entities, kg.num_relations)
    sides = {}
    for side in SIDES[1:]:
        if isinstance(candidates, TypeConstraints):
            sides[side] = _by_type(_Fixed(model, side), candidates, chosen, side, rank)
        else:
            sides[side] = rank(model, chosen, side, candidates=_holding(candidates, chosen, side, kg.num_entities))
    seen = torch.zeros(kg.num_entities, dtype=torch.bool, device=kg.train.device)
    seen[kg.train[:, 0]] = seen[kg.train[:, 2]] = True
    unseen = ~(seen[chosen[:, 0]] & seen[chosen[:, 2]])
    return RankingResult(
        chosen, sides["head"], sides["tail"], functools.partial(relation_categories, kg), unseen, kg.relation_names
    )


def answering(kg: KnowledgeGraph, triples: Tensor, splits: Sequence[str] = SPLITS) -> list[Tensor]:
    """Of each of the splits the triples that answer a query of `triples` on either side, so that the filter of a few
    queries is small; all of a split that is no larger than a few times those.
    """
    R = kg.num_relations
    wanted = [(known * R + triples[:, 1]).unique() for known in (triples[:, 0], triples[:, 2])]
    parts = []
    for split in (getattr(kg, name) for name in splits):
        if len(split) > SMALL_FILTER * len(triples):
            pieces = split.split(PIECE)
            split = torch.cat(
                [piece[_asked(piece, 0, R, wanted[0]) | _asked(piece, 2, R, wanted[1])] for piece in pieces]
            )
        parts.append(split)
    return parts


def _asked(triples: Tensor, column: int, num_relations: int, wanted: Tensor) -> Tensor:
    """Whether the query of each triple, from the entity in a column, is among those wanted, which rise."""
    key = triples[:, column] * num_relations + triples[:, 1]
    return wanted[torch.searchsorted(wanted, key).clamp_(max=len(wanted) - 1)] == key


class _Fixed:
    """A model whose entity view of one side is computed once."""

    def __init__(self, model: Rankable, side: Side) -> None:
        self.reduction, self.query, self._table = model.reduction, model.query, model.entities(side)

    def entities(self, side: Side) -> Tensor:
        return self._table


def _by_type(
    model: Rankable, types: TypeConstraints, triples: Tensor, side: Side, rank: Callable[..., SideRanks]
) -> SideRanks:
    column = 0 if side == "head" else 2
    rows, parts = [], []
    for r in triples[:, 1].unique().tolist():
        chosen = (triples[:, 1] == r).nonzero()[:, 0]
        members = types.members(r, side)
        # Of a relation without a type everyone is a candidate: among its few answers alone it would rank first.
        there = torch.cat([members, triples[chosen, column]]).unique() if len(members) else None
        rows.append(chosen)
        parts.append(rank(model, triples[chosen], side, candidates=there))
    order = torch.cat(rows).argsort()
    return SideRanks(
        *(torch.cat([getattr(p, name) for p in parts])[order] for name in ("greater", "equal", "candidates"))
    )


def _holding(candidates: Tensor | None, triples: Tensor, side: Side, num_entities: int) -> Tensor | None:
    """Candidates, distinct and rising, that hold every true entity."""
    if candidates is None:
        return None
    candidates = as_ids("candidates", candidates, "'types', TypeConstraints, or integers of shape [C]", num_entities)
    missing = ~torch.isin(triples[:, 0 if side == "head" else 2], candidates)
    if missing.any():
        first = triples[missing][0].tolist()
        raise InputError(
            "candidates",
            Shown(f"{len(candidates)} without the {side} of triple {first}"),
            "all true entities, and others",
        )
    return candidates


class RelationFrequency:
    """Baseline without a parameter: entities ranked by how often they answer a relation's side in train.

    It is a query (one relation), an entity view (counts) and a reduction ("dot") like any model; memory is `[E, R]` a
    side.
    """

    reduction = "dot"

    def __init__(self, kg: KnowledgeGraph) -> None:
        self.num_relations = kg.num_relations
        h, r, t = kg.train.unbind(1)
        self.counts = {side: self._count(answer, r, kg) for side, answer in (("head", h), ("tail", t))}

    @staticmethod
    def _count(answer: Tensor, relation: Tensor, kg: KnowledgeGraph) -> Tensor:
        flat = torch.bincount(answer * kg.num_relations + relation, minlength=kg.num_entities * kg.num_relations)
        return flat.view(kg.num_entities, kg.num_relations).float()

    def query(self, entity: Tensor, relation: Tensor, side: Side) -> tuple[Tensor, Tensor | None]:
        return torch.nn.functional.one_hot(relation, self.num_relations).float(), None

    def entities(self, side: Side) -> Tensor:
        return self.counts[side]
