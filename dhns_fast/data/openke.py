"""OpenKE folders: count lines, numeric triples in the order head, tail, relation, names with ids."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhns_fast.data.text import counted, integer, names_by_id, shown
from dhns_fast.errors import DataError

FILES = tuple(f"{stem}2id.txt" for stem in ("train", "valid", "test", "entity", "relation"))


def read_openke(folder: Path) -> dict[str, Tensor | list[str]]:
    """The splits and the names of an OpenKE folder, as arguments of KnowledgeGraph. Other files (`type_constrain.txt`) are not read."""
    entities, relations = (_read_names(folder / f"{what}2id.txt", what) for what in ("entity", "relation"))
    splits = {name: _read_triples(folder / f"{name}2id.txt", len(entities), len(relations)) for name in ("train", "valid", "test")}
    return {**splits, "entity_names": entities, "relation_names": relations}


def _read_names(path: Path, what: str) -> list[str]:
    rows = []
    for line, text in counted(path, f"names of an {what}" if what == "entity" else f"names of a {what}", "name id"):
        cells = text.rsplit(None, 1)  # a name may hold spaces, so the id is what follows the last one
        if len(cells) != 2:
            raise DataError(path, f"found {shown(text)}; accepted: a name and its id, separated by spaces or a tab", line)
        rows.append((line, cells[1], cells[0]))
    return names_by_id(path, rows, what)


def _read_triples(path: Path, num_entities: int, num_relations: int) -> Tensor:
    """int64 [n, 3] in the order head, relation, tail."""
    end = np.array([num_entities, num_entities, num_relations])
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("error")
            count = int(file.readline())
            table = np.loadtxt(file, dtype=np.int64, comments=None, ndmin=2)
        if table.shape == (count, 3) and ((table >= 0) & (table < end)).all():
            return torch.from_numpy(table[:, [0, 2, 1]])
    except (ValueError, OSError, Warning):
        pass  # the line at fault is found below
    rows = [_row(path, line, text, end) for line, text in counted(path, "triples", "head tail relation")]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _row(path: Path, line: int, text: str, end: np.ndarray) -> tuple[int, int, int]:
    cells = text.split()
    if len(cells) != 3:
        raise DataError(path, f"found {len(cells)} columns, {shown(text)}; accepted: three ids, `head tail relation`", line)
    head, tail, relation = (
        integer(path, line, cell, what) for cell, what in zip(cells, ("the head", "the tail", "the relation"), strict=True)
    )
    for what, value, limit in zip(("head", "tail", "relation"), (head, tail, relation), end, strict=True):
        if not 0 <= value < limit:
            raise DataError(path, f"{what} {value} is out of range; accepted: 0 to {limit - 1}", line)
    return head, relation, tail
