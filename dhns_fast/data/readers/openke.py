"""OpenKE folders: count lines, numeric triples in the order head, tail, relation, names with ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.readers.lines import blocks, by_id, decoded, ids, integer, numbered, rows, shown
from dhns_fast.errors import DataError

FILES = tuple(f"{stem}2id.txt" for stem in (*SPLITS, "entity", "relation"))
LOOKS_FOR = f"{', '.join(FILES)} (OpenKE)"


def holds(folder: Folder) -> bool:
    return any(file in folder or f"{file}.gz" in folder for file in FILES[:3])


def read(folder: Folder) -> Content:
    """`train2id.txt`, `valid2id.txt`, `test2id.txt`, `entity2id.txt`, `relation2id.txt`, each plain or `.gz`; other
    text files are left.
    """

    def path(name: str) -> Path:
        return folder.find((name[:-4],), (".txt",)) or folder.take(name)

    entities, relations = (names(path(f"{what}2id.txt"), what) for what in ("entity", "relation"))
    splits = {
        name: folder.gather(name, triples(path(f"{name}2id.txt"), len(entities), len(relations))) for name in SPLITS
    }
    return Content(splits, entities, relations)


def names(path: Path, what: str) -> list[str]:
    """Names by id from a count line and lines `name id`."""
    table = []
    for line, text in counted(path, f"names of an {what}" if what == "entity" else f"names of a {what}", "name id"):
        name, tab, number = text.rstrip(" \t").rpartition("\t")
        if not tab or not number.strip(" ").isdigit():
            # A name may hold blanks, so the id is what follows the last of them.
            name, tab, number = text.strip(" \t").rpartition(" ")
            name = name.rstrip(" \t")
        if not tab:
            raise DataError(
                path, f"found {shown(text)}; accepted: a name and its id, separated by spaces or a tab", line
            )
        table.append((line, number.strip(" "), name))
    return by_id(path, table, what)


def triples(path: Path, num_entities: int, num_relations: int) -> Iterator[np.ndarray]:
    """Blocks int64 [n, 3] in the order head, relation, tail, from a count line and lines `head tail relation`."""
    end = np.array([num_entities, num_entities, num_relations])
    count, found = -1, 0
    for first, data in blocks(path):
        begin = 0
        if count < 0:
            for line, text in numbered(first, decoded(path, first, data)):
                count, counts_at = _count(path, line, text, "triples", "head tail relation"), line
                begin = _end_of_line(data, line - first)
                break
            else:
                continue
            first += data.count(b"\n", 0, begin)
        table = ids(data[begin:])
        if table is None or (table >= end).any():
            turned = table is not None and not (table[:, [0, 2, 1]] >= end).any()
            lines = numbered(first, decoded(path, first, data[begin:]))
            table = np.array([_row(path, line, text, end, turned) for line, text in lines], np.int64).reshape(-1, 3)
        found += len(table)
        yield table[:, [0, 2, 1]]
    if count < 0:
        raise DataError(path, f"found blank lines only; {_accepted('triples', 'head tail relation')}", 1)
    if found != count:
        raise _miscounted(path, counts_at, count, found, "triples", "head tail relation")


def counted(path: Path, what: str, row: str) -> list[tuple[int, str]]:
    """The lines below a count line, checked against the count."""
    table = list(rows(path))
    if not table:
        raise DataError(path, f"found blank lines only; {_accepted(what, row)}", 1)
    count = _count(path, *table[0], what, row)
    if count != len(table) - 1:
        raise _miscounted(path, table[0][0], count, len(table) - 1, what, row)
    return table[1:]


def _count(path: Path, line: int, text: str, what: str, row: str) -> int:
    if len(text.split()) != 1:
        raise DataError(path, f"the count is missing: found {shown(text)}; {_accepted(what, row)}", line)
    return integer(path, line, text.strip(" \t"), "the count")


def _accepted(what: str, row: str) -> str:
    return f"accepted: the number of {what} alone on the first line, then lines `{row}`"


def _miscounted(path: Path, line: int, count: int, found: int, what: str, row: str) -> DataError:
    return DataError(path, f"the count is {count}, but {found} lines follow; {_accepted(what, row)}", line)


def _end_of_line(data: bytes, number: int) -> int:
    """Where line `number` (from 0) of some lines ends."""
    place = 0
    for _ in range(number + 1):
        place = data.index(b"\n", place) + 1
    return place


def _row(path: Path, line: int, text: str, end: np.ndarray, turned: bool) -> tuple[int, int, int]:
    """The ids of a line, or what is wrong with it; `turned` tells that all lines would be right in the order head,
    relation, tail.
    """
    cells = [cell for cell in text.replace("\t", " ").split(" ") if cell]
    if len(cells) != 3:
        raise DataError(
            path, f"found {len(cells)} columns, {shown(text)}; accepted: three ids, `head tail relation`", line
        )
    head, tail, relation = (
        integer(path, line, cell, what)
        for cell, what in zip(cells, ("the head", "the tail", "the relation"), strict=True)
    )
    for what, value, limit in zip(("head", "tail", "relation"), (head, tail, relation), end, strict=True):
        if not 0 <= value < limit:
            hint = (
                "; the order is head, tail, relation, and this file looks like head, relation, tail" if turned else ""
            )
            raise DataError(path, f"{what} {value} is out of range; accepted: 0 to {limit - 1}{hint}", line)
    return head, tail, relation
