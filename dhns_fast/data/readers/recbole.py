"""RecBole's atomic files: interactions `.inter`, a knowledge graph `.kg`, and the items' entities `.link`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.readers.lines import blocks, decoded, numbered, shown
from dhns_fast.data.readers.named import Ids
from dhns_fast.data.splits import hold_out
from dhns_fast.errors import DataError

LOOKS_FOR = "NAME.inter, with NAME.kg and NAME.link or without (RecBole)"
INTERACTION = "interaction"
# What RecBole's default split holds out, each of valid and test.
SHARE = 0.1


def holds(folder: Folder) -> bool:
    return any(name.endswith(".inter") for name in folder.files)


def read(folder: Folder, seed: int = 0) -> Content:
    """Users, items and the entities of the knowledge graph as entities; `interaction` (user, item) beside the relations
    of `.kg`.

    A user is called `user:ID`, an item `item:ID`, or by its entity where `.link` has one. 10 % of the interactions go
    to valid and 10 % to test, chosen by the seed among those without which their user and item still have one; the
    knowledge graph is in train. Other columns, as ratings and times, are left out.
    """
    found = [name for name in folder.files if name.endswith(".inter")]
    if len(found) > 1:
        raise DataError(folder.path, f"found {' and '.join(found)}; accepted: one of them")
    stem = found[0].removesuffix(".inter")
    notes: list[str] = []
    entities, relations = Ids(), Ids()
    link: dict[str, str] = {}
    if f"{stem}.link" in folder:
        path = folder.take(f"{stem}.link")
        for line, (item, entity) in _columns(path, ("item_id", "entity_id"), notes):
            if link.setdefault(item, entity) != entity:
                raise DataError(
                    path,
                    f"item {shown(item)} has two entities, {shown(link[item])} and {shown(entity)}; accepted: one",
                    line,
                )
    rows = []
    for _, (user, item) in _columns(folder.take(found[0]), ("user_id", "item_id"), notes):
        rows.append((entities[f"user:{user}"], relations[INTERACTION], entities[link.get(item, f"item:{item}")]))
    interactions = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    facts = []
    if f"{stem}.kg" in folder:
        path = folder.take(f"{stem}.kg")
        for line, (head, relation, tail) in _columns(path, ("head_id", "relation_id", "tail_id"), notes):
            if relation == INTERACTION:
                raise DataError(
                    path, f"found the relation {relation!r}; accepted: any other, as interactions are called so", line
                )
            facts.append((entities[head], relations[relation], entities[tail]))
    generator = torch.Generator().manual_seed(seed)
    count = round(SHARE * len(interactions))
    train, test = hold_out(interactions, count, len(entities), len(relations), generator)
    train, valid = hold_out(train, count, len(entities), len(relations), generator)
    notes.append(
        f"{len(valid)} and {len(test)} of {len(interactions)} interactions are held out as valid and test (seed {seed})."
    )
    train = torch.cat([train, torch.tensor(facts, dtype=torch.int64).reshape(-1, 3)])
    return Content({"train": train, "valid": valid, "test": test}, list(entities), list(relations), notes)


def _columns(path: Path, wanted: tuple[str, ...], notes: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, cells of the wanted columns) below the header `name:type<TAB>...`."""
    places: list[int] | None = None
    width = 0
    for first, data in blocks(path):
        for line, row in numbered(first, decoded(path, first, data)):
            cells = [cell.strip(" ") for cell in row.split("\t")]
            if places is None:
                names = [cell.split(":")[0] for cell in cells]
                if missing := [name for name in wanted if name not in names]:
                    accepted = "<TAB>".join(f"{name}:token" for name in wanted)
                    raise DataError(
                        path, f"the header {shown(row)} has no column {missing[0]}; accepted: `{accepted}`", line
                    )
                places, width = [names.index(name) for name in wanted], len(cells)
                if left := [name for name in names if name not in wanted]:
                    notes.append(f"{path.name}: columns left out: {', '.join(map(shown, left))}.")
                continue
            if len(cells) != width or not all(cells[i] for i in places):
                found = f"{len(cells)} columns" if len(cells) != width else "an empty name"
                raise DataError(path, f"found {found}, {shown(row)}; accepted: {width} columns, as in the header", line)
            yield line, [cells[i] for i in places]
    if places is None:
        raise DataError(path, "found blank lines only; accepted: a header, then rows")
