"""ogbl-wikikg2 as OGB unpacks it: `split/time/{train,valid,test}.pt`, dicts of head, relation and tail, and
`mapping/*.csv.gz`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.names import NumberedNames
from dhns_fast.data.readers.arrays import load_torch
from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.readers.lines import GZ, rows, shown
from dhns_fast.errors import DataError

LOOKS_FOR = "split/time/train.pt (ogbl-wikikg2)"
COLUMNS = ("head", "relation", "tail")
MAPS = {"entity": "nodeidx2entityid.csv", "relation": "relidx2relid.csv"}


def holds(folder: Folder) -> bool:
    return (folder.path / "split" / "time" / "train.pt").is_file()


def read(folder: Folder) -> Content:
    """Splits and names; the sampled corruptions `head_neg`, `tail_neg` of valid and test are left out, as ranks here
    are over all entities.
    """
    splits = {name: _split(folder.path / "split" / "time" / f"{name}.pt") for name in SPLITS}
    whole = torch.cat(list(splits.values()))
    names: list[Any] = []
    notes = ["The sampled corruptions of valid and test were left out: ranks are over all entities."]
    for (what, file), columns in zip(MAPS.items(), ([0, 2], [1]), strict=True):
        least = int(whole[:, columns].max()) + 1 if len(whole) else 0
        path = next(
            (p for p in (folder.path / "mapping" / (file + GZ), folder.path / "mapping" / file) if p.is_file()), None
        )
        found = NumberedNames(what[0], least) if path is None else _names(path)
        if path is not None and len(found) < least:
            raise DataError(
                path, f"names {len(found)} ids, but the triples have id {least - 1}; accepted: a line for each id"
            )
        if path is None:
            notes.append(f"mapping/{file}{GZ}: there is no such file, so each {what} is called by its id.")
        names.append(found)
    return Content(splits, names[0], names[1], notes)


def _split(path: Path) -> Tensor:
    content: Any = load_torch(path)
    columns: list[Tensor] = []
    for key in COLUMNS:
        column = content.get(key) if isinstance(content, dict) else None
        column = torch.from_numpy(column) if isinstance(column, np.ndarray) and column.dtype.kind == "i" else column
        if (
            not isinstance(column, Tensor)
            or column.ndim != 1
            or column.is_floating_point()
            or column.dtype == torch.bool
        ):
            keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
            raise DataError(
                path, f"found {shown(keys)}; accepted: a dict whose `head`, `relation` and `tail` are integers [n]"
            )
        if columns and len(column) != len(columns[0]):
            raise DataError(path, f"`{key}` has {len(column)} numbers, `head` {len(columns[0])}; accepted: one length")
        if len(column) and int(column.min()) < 0:
            raise DataError(path, f"`{key}` holds {int(column.min())}; accepted: ids from 0 on")
        columns.append(column.long())
    return torch.stack(columns, 1)


def _names(path: Path) -> list[str]:
    """Names from lines `id,name` below a header, ids in order."""
    names: list[str] = []
    for line, row in list(rows(path))[1:]:
        number, comma, name = row.partition(",")
        if not comma or number.strip(" ") != str(len(names)) or not name.strip(" "):
            raise DataError(path, f"found {shown(row)}; accepted: `{len(names)},name`", line)
        names.append(name.strip(" "))
    if len(set(names)) != len(names):
        raise DataError(path, f"{len(names) - len(set(names))} names are repeated; accepted: each once")
    return names
