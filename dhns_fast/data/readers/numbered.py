"""Folders of triples of ids without count lines: DGL-KE's Freebase (86 million entities), and LibKGE's `.del` files
(dist-kge, GraSH).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.readers import maps
from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.readers.lines import blocks, decoded, ids, integer, numbered, shown
from dhns_fast.errors import DataError

LOOKS_FOR = "entity2id.txt with a count line and train.txt with lines `head tail relation` of ids (DGL-KE's Freebase); train.del (LibKGE)"
# Columns of head, relation, tail.
DGLKE, LIBKGE = (0, 2, 1), (0, 1, 2)


def holds(folder: Folder) -> bool:
    return "train.del" in folder or _is_dglke(folder)


def _is_dglke(folder: Folder) -> bool:
    """Whether train.txt holds ids alone, and entity2id.txt begins with a count."""
    if "train.txt" not in folder or "entity2id.txt" not in folder:
        return False
    start = next(blocks(folder.files["entity2id.txt"], 256))[1].split(b"\n")[0].strip()
    # One block of lines is looked at, not the file: a name may be a number, a thousand of them are ids.
    _, data = next(blocks(folder.files["train.txt"], 1 << 16))
    return start.isdigit() and ids(data) is not None


def read(folder: Folder) -> Content:
    """`train`, `valid`, `test` as .txt beside `entity2id.txt`, `relation2id.txt` (a count line, `name<TAB>id`), lines
    `head tail relation`; or `.del` beside `entity_ids.del`, `relation_ids.del` (`id<TAB>name`), lines `head relation
    tail`.
    """
    dglke = "train.del" not in folder
    suffix, columns = (".txt", DGLKE) if dglke else (".del", LIBKGE)
    names: list[Any] = []
    for what, one in (("entities", "entity"), ("relations", "relation")):
        path = maps.find(folder, what)
        if path is None:
            missing = f"{one}2id.txt" if dglke else f"{one}_ids.del"
            raise DataError(folder.path / missing, "is missing; it names the ids")
        names.append((folder.names or maps.read)(path, what))
    sizes = tuple(map(len, names))
    splits = {}
    for split in SPLITS:
        path = folder.find((split,), (suffix,)) or folder.take(split + suffix)
        splits[split] = folder.gather(split, triples(path, columns, *sizes))
    return Content(splits, names[0], names[1])


def triples(path: Path, columns: tuple[int, int, int], num_entities: int, num_relations: int) -> Iterator[np.ndarray]:
    """Blocks int64 [n, 3] (head, relation, tail) of lines of three ids, which stand in the given columns."""
    for first, data in blocks(path):
        table = ids(data)
        if table is not None:
            table = table[:, columns]
        if table is None or (table >= [num_entities, num_relations, num_entities]).any():
            lines = numbered(first, decoded(path, first, data))
            table = np.array(
                [_row(path, line, row, columns, num_entities, num_relations) for line, row in lines], np.int64
            ).reshape(-1, 3)
        yield table


def _row(
    path: Path, line: int, row: str, columns: tuple[int, int, int], num_entities: int, num_relations: int
) -> list[int]:
    cells = [cell for cell in row.replace("\t", " ").split(" ") if cell]
    order = "head tail relation" if columns == DGLKE else "head relation tail"
    if len(cells) != 3:
        raise DataError(path, f"found {len(cells)} columns, {shown(row)}; accepted: three ids, `{order}`", line)
    out = []
    limits = (num_entities, num_relations, num_entities)
    for what, column, limit in zip(("head", "relation", "tail"), columns, limits, strict=True):
        value = integer(path, line, cells[column], f"the {what}")
        if not 0 <= value < limit:
            raise DataError(
                path, f"{what} {value} is out of range; accepted: 0 to {limit - 1}; the order is {order}", line
            )
        out.append(value)
    return out
