"""Folders of tab-separated names: three columns head, relation, tail in train, valid and test, id maps beside them or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhns_fast import files
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.text import names_by_id, numbered, read_text, shown
from dhns_fast.errors import DataError, InputError
from dhns_fast.files import make_folder as make_folder

SPLITS = ("train", "valid", "test")
TAB, NEWLINE = 9, 10


class _Ids(dict[str, int]):
    """Names to ids, given in the order in which names are asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)
        return number


def find(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file `stem` + one of the suffixes, None where there is none, DataError where there are several."""
    found = [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(folder, f"found {' and '.join(path.name for path in found)}; accepted: one of them")
    return found[0] if found else None


def read_tsv(folder: Path) -> dict[str, Tensor | list[str]]:
    """The splits and the names of a TSV folder, as arguments of KnowledgeGraph.

    Without an id map, ids follow the order of first appearance over train, valid and test (in a line, the head before the tail).
    """
    ids: dict[str, dict[str, int]] = {}
    for what in ("entities", "relations"):
        path = find(folder, what, (".tsv", ".dict"))
        ids[what] = _Ids() if path is None else {name: i for i, name in enumerate(_read_names(path, what))}
    splits = {}
    for name in SPLITS:
        path = find(folder, name, (".tsv", ".txt"))
        if path is None:
            raise DataError(folder / f"{name}.tsv", f"is missing (and so is {name}.txt); a TSV folder has train, valid and test")
        splits[name] = _read_triples(path, ids["entities"], ids["relations"])
    return {**splits, "entity_names": list(ids["entities"]), "relation_names": list(ids["relations"])}


def _read_names(path: Path, what: str) -> list[str]:
    rows = []
    for line, text in numbered(read_text(path)):
        number, tab, name = text.partition("\t")
        if not tab or "\t" in name:
            raise DataError(path, f"found {shown(text)}; accepted: two columns, `id<TAB>name`", line)
        rows.append((line, number, name))
    return names_by_id(path, rows, what)


def _read_triples(path: Path, entities: dict[str, int], relations: dict[str, int]) -> Tensor:
    text = read_text(path)
    separators = np.frombuffer(text.encode(), np.uint8)
    separators = np.append(separators[(separators == TAB) | (separators == NEWLINE)], NEWLINE)
    if len(separators) % 3 or (separators.reshape(-1, 3) != (TAB, TAB, NEWLINE)).any():
        text = _regular(path, text, entities, relations)
    cells = text.replace("\n", "\t").split("\t") if text else []
    count = len(cells) // 3
    out = np.empty((count, 3), np.int64)
    try:
        out[:, 1] = np.fromiter(map(relations.__getitem__, cells[1::3]), np.int64, count)
        del cells[1::3]
        out[:, ::2] = np.fromiter(map(entities.__getitem__, cells), np.int64, 2 * count).reshape(count, 2)
    except KeyError:
        _regular(path, text, entities, relations)
        raise
    if "" in entities or "" in relations:
        _regular(path, text, entities, relations)
    return torch.from_numpy(out)


def _regular(path: Path, text: str, entities: dict[str, int], relations: dict[str, int]) -> str:
    """The text without its blank lines, or a DataError for the first line that is not three names that have ids."""
    rows = numbered(text)
    for line, row in rows:
        cells = row.split("\t")
        if len(cells) != 3 or not all(cells):
            found = f"{len(cells)} columns" if len(cells) != 3 else "an empty name"
            raise DataError(path, f"found {found}, {shown(row)}; accepted: three names, `head<TAB>relation<TAB>tail`", line)
        for cell, known, what in zip(cells, (entities, relations, entities), ("entity", "relation", "entity"), strict=True):
            if cell not in known and not isinstance(known, _Ids):
                raise DataError(path, f"{what} {shown(cell)} is not in the id map; accepted: its {len(known)} names", line)
    return "\n".join(row for _, row in rows)


def write(kg: KnowledgeGraph, folder: str | Path) -> Path:
    """Writes a graph as a TSV folder that `load` reads back exactly: splits, id maps, and a safetensors file a modality.

    Each file is written under a temporary name and then renamed. Files of the folder that have other names stay.

    Raises:
        InputError: a name that the format cannot hold (blank, repeated, or with a tab or line break); a modality that is no file name;
            a folder that cannot be made.
    """
    folder = Path(folder)
    for what, names in (("entity_names", kg.entity_names), ("relation_names", kg.relation_names)):
        for i, name in enumerate(names):
            if not name.strip() or "\t" in name or "\n" in name or "\r" in name:
                raise InputError(f"{what}[{i}]: found {name!r}; accepted: a name that is not blank, without tabs and line breaks")
        if len(set(names)) != len(names):
            raise InputError(f"{what}: {len(names) - len(set(names))} of {len(names)} names are repeated; accepted: each once")
    for modality in kg.features:
        if not modality or Path(modality).name != modality:
            raise InputError(f"features: found the modality {modality!r}; accepted: a name that is also a file name")
    make_folder(folder)
    for what, names in (("entities", kg.entity_names), ("relations", kg.relation_names)):
        files.write_text(folder / f"{what}.tsv", "".join(f"{i}\t{name}\n" for i, name in enumerate(names)) or "\n")
    e, r = kg.entity_names, kg.relation_names
    for split in SPLITS:
        rows = "".join(f"{e[h]}\t{r[p]}\t{e[t]}\n" for h, p, t in getattr(kg, split).tolist())
        files.write_text(folder / f"{split}.tsv", rows or "\n")
    for modality, matrix in kg.features.items():
        files.write_tensors(folder / f"{modality}.safetensors", {"features": matrix, "present": kg.present[modality]})
    return folder
