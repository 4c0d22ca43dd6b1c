"""Answers by name: completions of a triple with one unknown, and the real entities nearest to what the diffusion
generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import Side
from dhns_fast.data import CSRFilter, KnowledgeGraph, Ragged
from dhns_fast.data.filter import PARTS, as_integers, as_queries
from dhns_fast.data.lookup import lookup
from dhns_fast.data.readers import lines
from dhns_fast.data.types import TYPE_CONSTRAIN, TypeConstraints
from dhns_fast.errors import DataError, InputError, Shown, shown
from dhns_fast.files import expanded
from dhns_fast.models import KGEModel
from dhns_fast.ops.ambient import plain
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import topk_all

UNKNOWN = "?"
Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Answer:
    """One completion. `known` is the split that holds the completed triple ("train", "valid", "test"), or None for a
    new one.
    """

    name: str
    score: float
    known: str | None
    id: int


class Names:
    """Ids of many names of a graph."""

    def __init__(self, kg: KnowledgeGraph) -> None:
        self.entities, self.relations = kg.entity_names, kg.relation_names
        self.entity_places, self.relation_places = (
            {n: i for i, n in enumerate(names)} for names in (self.entities, self.relations)
        )

    def ids(self, triple: Triple) -> list[int]:
        """Ids of head, relation and tail; -1 for "?".

        Raises:
            InputError: there is no such name.
        """
        return [
            -1
            if name == UNKNOWN
            else lookup(name, self.relations, what, self.relation_places)
            if what == "relation"
            else lookup(name, self.entities, what, self.entity_places)
            for what, name in zip(PARTS, triple, strict=True)
        ]


def read_triples(path: Path, kg: KnowledgeGraph, unknowns: int = 0) -> tuple[list[Triple], Tensor]:
    """A file with a triple of names a line, tabs between them; "?" stands for an unknown.

    Args:
        unknowns: how many of the three must be "?".

    Returns:
        names, and ids int64 `[n, 3]` with -1 for "?".

    Raises:
        DataError: a line is no such triple; the message names it.
    """
    names, triples, ids = Names(kg), [], []
    for number, line in lines.rows(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 3 or cells.count(UNKNOWN) != unknowns:
            asked = f" of which {unknowns} is {UNKNOWN!r}" if unknowns else f", none of them {UNKNOWN!r} (an unknown)"
            raise DataError(
                path, f"found {shown(line)}; accepted: head, relation and tail{asked}, tabs between them", number
            )
        triple = (cells[0], cells[1], cells[2])
        try:
            ids.append(names.ids(triple))
        except InputError as error:
            raise DataError(path, str(error), number) from None
        triples.append(triple)
    return triples, torch.tensor(ids, dtype=torch.int64).view(-1, 3)


def read_entities(path: Path, kg: KnowledgeGraph) -> Tensor:
    """Ids of a file with the name of an entity a line.

    Raises:
        DataError: a line is no such name; the message names it.
    """
    names, ids = Names(kg), []
    for number, line in lines.rows(path):
        if line.strip():
            try:
                ids.append(lookup(line, names.entities, "entity", names.entity_places))
            except InputError as error:
                raise DataError(path, str(error), number) from None
    return torch.tensor(ids, dtype=torch.int64)


def read_candidates(asked: str, kg: KnowledgeGraph, data: str) -> Tensor | TypeConstraints:
    """The entities to rank among that somebody asks for in a word or by a file.

    Args:
        asked: "types", what train has on a side of a relation; "type_constrain", what the file of that name beside the
            data lists; the path of such a file; or the path of a file with the name of an entity a line.
        data: where the graph is.

    Raises:
        InputError: there is no such file beside the data.
        DataError: a line of the file is not acceptable; the message names it.
    """
    sizes = kg.num_entities, kg.num_relations
    if asked == "types":
        return TypeConstraints.of(kg.train, *sizes)
    names = (TYPE_CONSTRAIN, TYPE_CONSTRAIN + lines.GZ)
    if asked == "type_constrain":
        there = [path for name in names if (path := expanded("data", data) / name).is_file()]
        if not there:
            accepted = f"types, the path of a {TYPE_CONSTRAIN}, or a file of entities"
            raise InputError("candidates", Shown(f"{asked}, but {data} holds no {TYPE_CONSTRAIN}"), accepted)
        return TypeConstraints.read(there[0], *sizes)
    path = expanded("candidates", asked)
    if not path.exists():
        accepted = f"types, type_constrain, the path of a {TYPE_CONSTRAIN}, or a file of entities"
        raise InputError("candidates", Shown(f"{asked!r}, which does not exist"), accepted)
    return TypeConstraints.read(path, *sizes) if path.name in names else read_entities(path, kg)


@plain()
@torch.no_grad()
def predict(
    model: KGEModel, kg: KnowledgeGraph, head: str, relation: str, tail: str, k: int = 10, exclude_known: bool = False
) -> list[Answer]:
    """The k best completions of a triple in which exactly one of head, relation and tail is "?".

    Args:
        exclude_known: leave out answers that the graph already holds; otherwise they are marked.

    Raises:
        InputError: none or several unknowns, an unknown name, k out of range.
    """
    triple = (head, relation, tail)
    if triple.count(UNKNOWN) != 1:
        raise InputError("triple", Shown(f"({', '.join(triple)})"), f"exactly one {UNKNOWN!r} in it")
    return complete(model, kg, torch.tensor([Names(kg).ids(triple)]), k, exclude_known)[0]


@plain()
@torch.no_grad()
def complete(
    model: KGEModel,
    kg: KnowledgeGraph,
    queries: Tensor,
    k: int = 10,
    exclude_known: bool = False,
    batch_size: int = 1024,
) -> list[list[Answer]]:
    """The k best completions of many triples.

    Args:
        queries: int64 `[n, 3]`, -1 for the one of head, relation and tail that is asked for.
        k, exclude_known: as in :func:`predict`.

    Raises:
        InputError: k or an id is out of range, or a triple does not ask for one of its three.
    """
    k, queries = checks.count("k", k), as_queries(queries, kg.num_entities, kg.num_relations)
    found: dict[int, list[Answer]] = {}
    filters = {
        split: CSRFilter.from_triples(triples, kg.num_entities, kg.num_relations)
        for split, triples in kg.splits.items()
    }
    for column, part in enumerate(PARTS):
        rows = (queries[:, column] == -1).nonzero()[:, 0]
        for chunk in rows.split(batch_size) if len(rows) else ():
            answers = _best(model, kg, queries[chunk], part, k, exclude_known, filters)
            found |= dict(zip(chunk.tolist(), answers, strict=True))
    return [found[i] for i in range(len(queries))]


def _best(
    model: KGEModel,
    kg: KnowledgeGraph,
    queries: Tensor,
    asked: str,
    k: int,
    exclude: bool,
    filters: Mapping[str, CSRFilter],
) -> list[list[Answer]]:
    """Completions of queries that ask for the same part."""
    h, r, t = queries.unbind(1)
    device, n, E = model.compute_device, len(queries), kg.num_entities
    if asked == "relation":
        every = torch.arange(kg.num_relations).repeat(n)
        h, t = h.repeat_interleave(kg.num_relations), t.repeat_interleave(kg.num_relations)
        scores, best = (
            model.score_hrt(torch.stack([h, every, t], 1).to(device)).view(n, -1).sort(descending=True, stable=True)
        )
        held = {split: _among(t[:, None], f.tails(h, every), E) for split, f in filters.items()}
        marks = {split: x.view(n, -1).gather(1, best.cpu()) for split, x in held.items()}
    else:
        side: Side = "tail" if asked == "tail" else "head"
        e = h if side == "tail" else t
        rows = {split: f.answers(side, e, r) for split, f in filters.items()}
        taken = None
        if exclude:
            taken = Ragged.of_keys(torch.cat([x.keys(E) for x in rows.values()]).unique(), n, E).to(device)
        query, scale = model.query(e.to(device), r.to(device), side)
        scores, best = topk_all(query, model.entities(side), min(k, E), model.reduction, taken, scale=scale)
        scores = scores + model.offset
        marks = {split: _among(best.cpu(), x, E) for split, x in rows.items()}
    names = kg.relation_names if asked == "relation" else kg.entity_names
    out = []
    for i, (values, ids) in enumerate(zip(scores.tolist(), best.tolist(), strict=True)):
        splits = [next((split for split, x in marks.items() if x[i, j]), None) for j in range(len(ids))]
        row = [
            Answer(names[e], x, split, e)
            for x, e, split in zip(values, ids, splits, strict=True)
            if e >= 0 and not (exclude and split)
        ]
        out.append(row[:k])
    return out


def _among(ids: Tensor, rows: Ragged, num_entities: int) -> Tensor:
    """bool `[n, k]`: which of the entities `[n, k]`, or -1 for none, are in the row of their own."""
    keys = torch.arange(len(ids)).unsqueeze(1) * num_entities + ids
    return torch.isin(keys, rows.keys(num_entities)) & (ids >= 0)


@torch.no_grad()
def score(model: KGEModel, triples: Tensor, batch_size: int = 65536) -> Tensor:
    """Scores `[n]` of triples int64 `[n, 3]`, higher is better, on the CPU."""
    triples = as_integers("triples", triples, "integers of shape [n, 3]")
    device = model.compute_device
    return torch.cat([model.score_hrt(part.to(device)).float().cpu() for part in triples.split(batch_size)])


@dataclass(frozen=True)
class Imagined:
    """What one level of the diffusion generated in place of one side, and its nearest real entities with their
    distances.
    """

    level: int
    side: str
    nearest: list[tuple[str, float]]


@torch.no_grad()
def imagine(
    model: KGEModel, generator: DiffHEG, kg: KnowledgeGraph, triple: Triple, k: int = 3, seed: int = 0
) -> list[Imagined]:
    """Generate the head and the tail of a triple at every level and name the real entities nearest to the structural
    embedding, by L2 distance.

    Raises:
        InputError: an unknown name.
    """
    h = lookup(triple[0], kg.entity_names, "head")
    r = lookup(triple[1], kg.relation_names, "relation")
    t = lookup(triple[2], kg.entity_names, "tail")
    device = model.compute_device
    hs, rs, ts = (torch.tensor([x], device=device) for x in (h, r, t))
    rng = torch.Generator(device).manual_seed(seed)
    heads, tails = generator.sample(model.modalities(hs), model.relation(rs), model.modalities(ts), generator=rng)

    structure = model.structure_table()

    def nearest(x: Tensor) -> list[tuple[str, float]]:
        scores, best = generator.nearest(x[0, 0], structure, min(k, kg.num_entities))
        return [(kg.entity_names[i], -s) for s, i in zip(scores.tolist(), best.tolist(), strict=True)]

    return [
        Imagined(level, side, nearest(made[i]))
        for i, level in enumerate(generator.levels)
        for side, made in (("head", heads), ("tail", tails))
    ]
