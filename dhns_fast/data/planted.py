"""Synthetic multimodal graphs of any size with a structure that a model can learn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from math import ceil, tau
from typing import Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.data.filter import INT64_END, pack
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.names import NumberedNames
from dhns_fast.data.splits import hold_out
from dhns_fast.errors import InputError, Shown, shown
from dhns_fast.ops.ambient import plain

PREFIX = "synthetic:"
SIZES = {"entities": int, "relations": int, "triples": int}
OPTIONS = {
    "seed": int,
    "text": int,
    "image": int,
    "valid": float,
    "test": float,
    "coverage": float,
    "noise": float,
    "axes": int,
}
# Triples drawn at once: bounds the memory of a draw to some 100 MB whatever the size of the graph.
CHUNK = 1_000_000
# A graph may hold this part of the triples that its structure allows; fuller, drawing without repetition takes ever
# longer.
FILL = 0.5
# Draws before giving up: a graph of a handful of entities can have less room than its structure promises.
ROUNDS = 200


@plain()
def synthetic(
    num_entities: int,
    num_relations: int,
    num_triples: int,
    modalities: Mapping[str, int] | None = None,
    seed: int = 0,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.05,
    coverage: float = 0.8,
    noise: float = 0.3,
    axes: int = 4,
) -> KnowledgeGraph:
    """A graph whose entities are the points of a torus and whose relations move along it.

    An entity has one coordinate on each of `axes` circles. On every axis a relation shifts the head's coordinate by an
    amount of its own, or shifts it and then allows a range of values (several tails a head), or ignores the head and
    has one value (several heads a tail): so relations of every category occur. Rotations of the complex plane represent
    this exactly (ComplEx, RotatE), TransE and DistMult in part. Features are random linear views of the entity's
    cosines and sines, with noise; absent rows are zero. No triple occurs twice, no head is its own tail, and what valid
    and test mention occurs in train. Memory and time are linear in the sizes; one seed gives one graph.

    Args:
        num_entities, num_relations, num_triples: E, R, and the number of triples over all splits.
        modalities: name → D_m; None for {"text": 32, "image": 32}.
        seed: decides everything.
        valid_fraction, test_fraction: shares of the triples; fewer are held out where train could not spare them.
        coverage: share of the entities that have a modality.
        noise: standard deviation of the feature noise; the view itself has about 0.7.
        axes: circles; the more there are, the finer an entity's neighbourhood has to be learnt.

    Raises:
        InputError: an argument is out of range, or there is no room for so many triples.
    """
    modalities = {"text": 32, "image": 32} if modalities is None else modalities
    checks.instance(Mapping, "a dict of widths by modality name, or None", modalities=modalities)
    checks.finite(noise=noise)
    seed = checks.count("seed", seed, 0, checks.SEEDS)
    num_entities, num_relations = (
        checks.count("num_entities", num_entities),
        checks.count("num_relations", num_relations),
    )
    num_triples, axes = checks.count("num_triples", num_triples), checks.count("axes", axes)
    for name, width in modalities.items():
        checks.count(f"modalities[{name!r}]", width)
    for name, share in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction), ("coverage", coverage)):
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise InputError(name, share, "0 to 1")
    if valid_fraction + test_fraction >= 1:
        raise InputError("valid_fraction + test_fraction", valid_fraction + test_fraction, "less than 1")
    if num_entities**2 * num_relations >= INT64_END:
        raise InputError("num_entities", num_entities, f"E · E · R below 2^63, with R = {num_relations}")
    generator = torch.Generator().manual_seed(seed)
    base = max(1, int(num_entities ** (1 / axes)))
    circle = torch.tensor([base] * (axes - 1) + [ceil(num_entities / base ** (axes - 1))])
    triples = _triples(num_entities, num_relations, num_triples, circle, generator)
    train, test = hold_out(triples, round(test_fraction * num_triples), num_entities, num_relations, generator)
    train, valid = hold_out(train, round(valid_fraction * num_triples), num_entities, num_relations, generator)

    angle = _coordinates(torch.arange(num_entities), circle) * (tau / circle)
    latent = torch.cat([angle.cos(), angle.sin()], 1)
    features = {}
    for name, width in modalities.items():
        view = latent @ torch.randn(2 * axes, width, generator=generator).div_(axes**0.5)
        view.add_(torch.randn(view.shape, generator=generator), alpha=noise)
        features[name] = view.masked_fill_(torch.rand(num_entities, 1, generator=generator) >= coverage, 0)
    names = NumberedNames("e", num_entities), NumberedNames("r", num_relations)
    return KnowledgeGraph("synthetic", train, valid, test, *names, features=features)


def named(name: str, features: Collection[str] | None = None) -> KnowledgeGraph:
    """The graph that a name describes, "synthetic:entities=1000000,relations=100,triples=5000000,seed=0".

    Args:
        name: the prefix and `key=value` pairs: entities, relations, triples; seed (0), text and image (their columns,
            32 each; 0 for none), valid and test (shares, 0.05), coverage, noise, axes, as of :func:`synthetic`.
        features: the modalities to keep; None for all.

    Raises:
        InputError: an unknown key, no number, or what :func:`synthetic` refuses.
    """
    accepted = f"{PREFIX}entities=N,relations=N,triples=N, and {', '.join(OPTIONS)}"
    values: dict[str, Any] = {}
    for part in name.removeprefix(PREFIX).split(","):
        key, _, text = (x.strip() for x in part.partition("="))
        kind = OPTIONS.get(key, SIZES.get(key))
        try:
            if kind is None or key in values or len(text) > 30:
                raise ValueError
            values[key] = kind(text)
        except ValueError:
            raise InputError("data", Shown(f"{shown(part.strip())} in {shown(name)}"), accepted) from None
    if missing := [key for key in SIZES if key not in values]:
        raise InputError("data", Shown(f"{shown(name)}, which does not say {missing[0]}"), accepted)
    widths = {m: int(values.pop(m, 32)) for m in ("text", "image")}
    if features is not None and (unknown := [m for m in features if m not in widths]):
        raise InputError("features", unknown[0], ", ".join(widths))
    modalities = {m: width for m, width in widths.items() if width and (features is None or m in features)}
    entities, relations, triples = (int(values.pop(key)) for key in SIZES)
    shares = {f"{split}_fraction": values.pop(split, 0.05) for split in ("valid", "test")}
    return synthetic(entities, relations, triples, modalities, **values, **shares)


def _coordinates(entity: Tensor, circle: Tensor) -> Tensor:
    """Place of each entity [n] on each circle: its digits, first axis first, int64 [n, axes]."""
    return entity.unsqueeze(1) // _places(circle) % circle


def _places(circle: Tensor) -> Tensor:
    """What one step on each circle adds to an entity's id, int64 [axes]."""
    return torch.cat([circle.new_ones(1), circle[:-1].cumprod(0)])


def _triples(
    num_entities: int, num_relations: int, num_triples: int, circle: Tensor, generator: torch.Generator
) -> Tensor:
    """int64 [n, 3], distinct, in random order."""
    axes = len(circle)
    kind = torch.rand(num_relations, axes, generator=generator)
    shift = (torch.rand(num_relations, axes, generator=generator) * circle).long()
    follows = kind < 0.75
    # The fewest axes with a range, and the narrowest ranges, that leave room for the triples asked for.
    for share, width in product((0.25, 0.5, 0.75, 1.0), range(1, int(circle.max()) + 1)):
        widths = torch.where(kind < share, circle.clamp(max=width), 1)
        tails = widths.prod(1)
        capacity = int(tails.sum()) * num_entities
        if capacity * FILL >= num_triples:
            break
    else:
        limit = f"at most {int(capacity * FILL)} with {num_entities} entities and {num_relations} relations"
        raise InputError("num_triples", num_triples, limit)
    frequency = tails.double().sqrt().cumsum(0)

    def draw(count: int) -> Tensor:
        relation = torch.searchsorted(
            frequency, torch.rand(count, generator=generator, dtype=torch.float64) * frequency[-1], right=True
        )
        head = torch.randint(num_entities, (count,), generator=generator)
        step = (torch.rand(count, axes, generator=generator) * widths[relation]).long()
        places = (_coordinates(head, circle) * follows[relation] + shift[relation] + step) % circle
        tail = (places * _places(circle)).sum(1)
        return pack(head, relation, tail, num_entities, num_relations)[0][(tail < num_entities) & (tail != head)]

    keys = torch.empty(0, dtype=torch.int64)
    for _ in range(ROUNDS):
        missing = num_triples - len(keys)
        if missing <= 0:
            break
        parts = [
            draw(min(CHUNK, missing + missing // 4 + 100 - done))
            for done in range(0, missing + missing // 4 + 100, CHUNK)
        ]
        keys = torch.unique(torch.cat([keys, *parts]))
    else:
        raise InputError("num_triples", num_triples, f"some {len(keys)}, for which there is room, or more entities")
    keys = keys[torch.randperm(len(keys), generator=generator)[:num_triples]]
    pair, tail = keys // num_entities, keys % num_entities
    return torch.stack([pair // num_relations, pair % num_relations, tail], 1)
