"""Answers by name: completions of a triple with one unknown, and the real entities nearest to what the diffusion generates."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import Side
from dhns_fast.data import CSRFilter, KnowledgeGraph
from dhns_fast.errors import InputError, Shown
from dhns_fast.models import KGEModel
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import topk_all

UNKNOWN = "?"
# Names that an error message lists: the relations of most graphs.
FEW = 30


@dataclass(frozen=True)
class Answer:
    """One completion. `known` is the split that holds the completed triple ("train", "valid", "test"), or None for a new one."""

    name: str
    score: float
    known: str | None


def lookup(name: str, names: Sequence[str], what: str) -> int:
    """Id of a name, or of a number written as `#12`.

    Raises:
        InputError: there is no such name; the message suggests similar ones, or lists all where they are few.
    """
    try:
        return names.index(name)
    except ValueError:
        if name.startswith("#") and name[1:].isdecimal():
            if int(name[1:]) < len(names):
                return int(name[1:])
            raise InputError(what, Shown(name), f"ids from #0 to #{len(names) - 1}") from None
        lower = {n.lower(): i for i, n in reversed(list(enumerate(names)))}
        if name.lower() in lower:
            return lower[name.lower()]
        close = [names[lower[n]] for n in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.6)]
        hint = f"; similar: {', '.join(close)}" if close else f": {', '.join(names)}" if len(names) <= FEW else ""
        raise InputError(what, name, f"names of the graph{hint}") from None


def _split_of(kg: KnowledgeGraph, h: int, r: int, t: int) -> str | None:
    wanted = torch.tensor([h, r, t])
    return next((split for split in ("train", "valid", "test") if bool((getattr(kg, split) == wanted).all(1).any())), None)


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
    given = {"head": head, "relation": relation, "tail": tail}
    unknown = [name for name, value in given.items() if value == UNKNOWN]
    if len(unknown) != 1:
        raise InputError("triple", Shown(f"({head}, {relation}, {tail})"), f"exactly one {UNKNOWN!r} in it")
    checks.whole("k", k, 1)
    asked = unknown[0]
    names = kg.relation_names if asked == "relation" else kg.entity_names
    ids = {
        name: lookup(value, kg.relation_names if name == "relation" else kg.entity_names, name)
        for name, value in given.items()
        if name != asked
    }
    device = model.entity.weight.device
    if asked == "relation":
        triples = torch.tensor([[ids["head"], r, ids["tail"]] for r in range(kg.num_relations)], device=device)
        scores, best = model.score_hrt(triples).sort(descending=True, stable=True)
    else:
        side: Side = "tail" if asked == "tail" else "head"
        known = CSRFilter.from_triples([kg.train, kg.valid, kg.test], kg.num_entities, kg.num_relations)
        e, r = torch.tensor([ids["head" if side == "tail" else "tail"]]), torch.tensor([ids["relation"]])
        answers = (known.tails(e, r) if side == "tail" else known.heads(r, e)).to(device) if exclude_known else None
        query, scale = model.query(e.to(device), r.to(device), side)
        scores, best = topk_all(query, model.entities(side), min(k, kg.num_entities), model.reduction, answers, scale=scale)
        scores, best = scores[0] + model.offset, best[0]
    out = []
    for score, index in zip(scores.tolist(), best.tolist(), strict=True):
        if index < 0:
            break
        h, r_, t = (index if name == asked else ids[name] for name in ("head", "relation", "tail"))
        split = _split_of(kg, h, r_, t)
        if not (exclude_known and split):
            out.append(Answer(names[index], score, split))
    return out[:k]


@dataclass(frozen=True)
class Imagined:
    """What one level of the diffusion generated in place of one side, and its nearest real entities with their distances."""

    level: int
    side: str
    nearest: list[tuple[str, float]]


@torch.no_grad()
def imagine(
    model: KGEModel, generator: DiffHEG, kg: KnowledgeGraph, triple: tuple[str, str, str], k: int = 3, seed: int = 0
) -> list[Imagined]:
    """Generate the head and the tail of a triple at every level and name the real entities nearest to the structural embedding, by L2 distance.

    Raises:
        InputError: an unknown name.
    """
    h = lookup(triple[0], kg.entity_names, "head")
    r = lookup(triple[1], kg.relation_names, "relation")
    t = lookup(triple[2], kg.entity_names, "tail")
    device = model.entity.weight.device
    hs, rs, ts = (torch.tensor([x], device=device) for x in (h, r, t))
    rng = torch.Generator(device).manual_seed(seed)
    heads, tails = generator.sample(model.modalities(hs), model.relation(rs), model.modalities(ts), generator=rng)

    def nearest(x: Tensor) -> list[tuple[str, float]]:
        scores, best = generator.nearest(x[0, 0], model.entity.weight, min(k, kg.num_entities))
        return [(kg.entity_names[i], -s) for s, i in zip(scores.tolist(), best.tolist(), strict=True)]

    return [
        Imagined(level, side, nearest(made[i]))
        for i, level in enumerate(generator.levels)
        for side, made in (("head", heads), ("tail", tails))
    ]
