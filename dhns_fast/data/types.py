"""Entities that may stand on each side of a relation: as train has them, or as OpenKE's `type_constrain.txt` lists
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dhns_fast.catalogue import Side
from dhns_fast.data.filter import Ragged, as_triples
from dhns_fast.data.readers.lines import integer, rows, shown
from dhns_fast.errors import DataError

TYPE_CONSTRAIN = "type_constrain.txt"
_LINES = "the number of relations alone on the first line, then two lines a relation, heads and tails: `relation count entity ...`"


@dataclass(frozen=True)
class TypeConstraints:
    """Entities that may stand on each side of each relation.

    Attributes:
        head, tail: a row of entity ids for each relation.
    """

    head: Ragged
    tail: Ragged

    def members(self, relation: int, side: Side) -> Tensor:
        """Ids int64 [n] of the entities on a side of a relation."""
        found = self.head if side == "head" else self.tail
        first, end = found.offsets[relation : relation + 2].tolist()
        return found.ids[first:end]

    @classmethod
    def of(cls, triples: Tensor, num_entities: int, num_relations: int) -> TypeConstraints:
        """The pseudo-types of triples int64 [n, 3]: the heads and the tails that each relation has in them."""
        h, r, t = as_triples(triples, num_entities, num_relations).unbind(1)
        keys = ((r * num_entities + entity).unique() for entity in (h, t))
        return cls(*(Ragged.of_keys(key, num_relations, num_entities) for key in keys))

    @classmethod
    def read(cls, path: str | Path, num_entities: int, num_relations: int) -> TypeConstraints:
        """OpenKE's `type_constrain.txt`, plain or `.gz`; its ids are those of the graph.

        A count line, then two lines for each relation, in any order of relations: its id, how many entities may be its
        head, their ids; and the same of its tail. A relation that the file leaves out has none.

        Raises:
            DataError: the file is no such list; the message names the line.
        """
        path = Path(path)
        lines = list(rows(path))
        if not lines or len(lines[0][1].split()) != 1:
            found = shown(lines[0][1]) if lines else "blank lines only"
            raise DataError(path, f"found {found}; accepted: {_LINES}", lines[0][0] if lines else 1)
        count = integer(path, lines[0][0], lines[0][1].strip(" \t"), "the number of relations")
        if len(lines) - 1 != 2 * count:
            raise DataError(
                path, f"the count is {count}, but {len(lines) - 1} lines follow; accepted: {_LINES}", lines[0][0]
            )
        listed: dict[int, list[list[int]]] = {}
        for number, (line, text) in enumerate(lines[1:]):
            numbers = [integer(path, line, cell, "a number") for cell in text.split()]
            relation, size, entities = numbers[0], numbers[1] if len(numbers) > 1 else -1, numbers[2:]
            if not 0 <= relation < num_relations:
                raise DataError(path, f"relation {relation} is out of range; accepted: 0 to {num_relations - 1}", line)
            if size != len(entities):
                said = "no count" if size < 0 else f"the count {size} and {len(entities)} entities"
                raise DataError(path, f"found {said} of relation {relation}; accepted: {_LINES}", line)
            if wrong := [e for e in entities if not 0 <= e < num_entities]:
                raise DataError(path, f"entity {wrong[0]} is out of range; accepted: 0 to {num_entities - 1}", line)
            sides = listed.setdefault(relation, [])
            if len(sides) != number % 2:
                raise DataError(
                    path,
                    f"found relation {relation}; accepted: its two lines, heads and tails, together and once",
                    line,
                )
            sides.append(sorted(set(entities)))
        return cls(*(_ragged([listed.get(r, [[], []])[i] for r in range(num_relations)]) for i in range(2)))


def _ragged(table: list[list[int]]) -> Ragged:
    offsets = torch.tensor([0, *(len(row) for row in table)]).cumsum(0)
    return Ragged(offsets, torch.tensor([e for row in table for e in row], dtype=torch.int64))
