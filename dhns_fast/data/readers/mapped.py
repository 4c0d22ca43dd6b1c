"""The layout that `dhns_fast.data.convert` writes: arrays that are mapped into memory, not read.

graph.json                              sizes, the report of the splits, notes
train.npy, valid.npy, test.npy          int64 [n, 3] (head, relation, tail)
entities.names, relations.names         a name a line, UTF-8; .begins.npy beside each, where they begin
features/M.npy, features/M.present.npy  float16 or float32 [E, D], bool [E]
filter/tail.npy, filter/head.npy        the known answers of train (dhns_fast.data.filter); made anew in memory without
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.names import MappedNames
from dhns_fast.data.readers.arrays import guarded, open_arrays
from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.splits import SplitReport
from dhns_fast.errors import DataError

FILE, FORMAT, VERSION = "graph.json", "dhns_fast graph", 1
FILTER = "filter"
LOOKS_FOR = f"{FILE} (converted)"


def holds(folder: Folder) -> bool:
    return FILE in folder


def read(folder: Folder) -> Content:
    """Maps everything; sizes are checked, features were when they were written."""
    path = folder.take(FILE)
    meta = _meta(path)
    for name in list(folder.files):
        if name.split(".")[0] in (*SPLITS, "entities", "relations"):
            folder.taken.add(name)
    splits = {name: array(folder.path / f"{name}.npy", "int64", (meta["splits"][name], 3)) for name in SPLITS}
    names = []
    for what in ("entities", "relations"):
        begins = array(folder.path / f"{what}.begins.npy", "int64", (meta[what] + 1,)).numpy()
        text = folder.path / f"{what}.names"
        names.append(guarded(text, partial(MappedNames, text, begins)))
    features, present = {}, {}
    for modality, (width, dtype) in meta["features"].items():
        features[modality] = array(folder.path / "features" / f"{modality}.npy", dtype, (meta["entities"], width))
        present[modality] = array(folder.path / "features" / f"{modality}.present.npy", "bool", (meta["entities"],))
    try:
        report = SplitReport.from_dict(meta["report"])
    except (KeyError, TypeError):
        raise DataError(path, "lacks the report of the splits; convert the graph again") from None
    known = folder.path / FILTER
    content = Content(splits, names[0], names[1], list(meta["notes"]), features, present, report)
    content.filter_folder = known if known.is_dir() else None
    return content


def _meta(path: Path) -> dict[str, Any]:
    """What graph.json says, its form checked."""
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(path, f"is no JSON: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(path, f"is not of the format {FORMAT!r}; accepted: what `dhns-fast data --convert` writes")
    if meta.get("version") != VERSION:
        raise DataError(path, f"has version {meta.get('version')}; accepted: {VERSION}; convert the graph again")
    splits, features = meta.get("splits"), meta.get("features")
    sizes = [
        meta.get("entities"),
        meta.get("relations"),
        *(splits.get(name) if isinstance(splits, dict) else None for name in SPLITS),
    ]
    well = (
        all(isinstance(n, int) and n >= 0 for n in sizes)
        and isinstance(features, dict)
        and isinstance(meta.get("notes"), list)
    )
    if not well or not all(
        Path(name).name == name
        and isinstance(x, list)
        and len(x) == 2
        and isinstance(x[0], int)
        and x[1] in ("float16", "float32")
        for name, x in features.items()  # type: ignore[union-attr]
    ):
        raise DataError(path, "lacks sizes, features or notes; convert the graph again")
    return meta


def array(path: Path, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """An array mapped from a file, its type and shape checked."""
    found = open_arrays(path)[""]
    if found.dtype != dtype or found.shape != shape:
        raise DataError(path, f"is {found}; accepted: {list(shape)} {dtype}, as {FILE} says; convert the graph again")
    read: Tensor = guarded(path, found.read)
    return read
