"""A folder as the readers see it: what it holds, and what of it has been read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhns_fast.data.readers.lines import GZ, unreadable
from dhns_fast.data.splits import SplitReport
from dhns_fast.errors import DataError, printable

# Files that belong to a layout or to a repository and hold nothing that a graph here has.
COMPANIONS = (
    "type_constrain.txt", "1-1.txt", "1-n.txt", "n-1.txt", "n-n.txt", "test2id_all.txt", "n-n.py", "__init__.py", "graph.json",
    "attribution.md", "license", "license.txt", "readme", "readme.md", "readme.txt", "requirements.txt",
)  # fmt: skip
# Files that a note names, before it says how many more there are.
FEW = 6
PICKLES = (".pkl", ".pickle")
Gather = Callable[[str, Iterable[Any]], Tensor]
ReadNames = Callable[[Path, str], Any]


@dataclass
class Content:
    """What a reader found: arguments of KnowledgeGraph.

    Attributes:
        splits: int64 [n, 3] by name.
        entity_names, relation_names: by id.
        notes: sentences for the user.
        features, present: modalities that the layout itself holds, checked when it was written.
        report: what was found in the splits, where the layout keeps it.
        unsplit: whether the data has no splits, and train holds all of it.
        filter_folder: where the layout has the known answers of train.
    """

    splits: dict[str, Tensor]
    entity_names: Any
    relation_names: Any
    notes: list[str] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    report: SplitReport | None = None
    unsplit: bool = False
    filter_folder: Path | None = None

    @classmethod
    def whole(cls, triples: Tensor, entity_names: Any, relation_names: Any, notes: list[str]) -> Content:
        """Triples that nobody has split yet: all in train, to be split by `load`."""
        return cls(
            {"train": triples, "valid": triples[:0], "test": triples[:0]},
            entity_names,
            relation_names,
            notes,
            unsplit=True,
        )


class Folder:
    """The files of a folder by name.

    Args:
        path: the folder, or a file: then the folder holds this file alone.
        gather: makes the triples of a split, int64 [n, 3], of its name and blocks of them.
        names: reads the names of a map in which ids only rise, (path, "entities" or "relations"); None for the maps'
            own reader.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, gather: Gather | None = None, names: ReadNames | None = None) -> None:
        self.gather, self.names = gather or concatenated, names
        self.alone = path.is_file()
        self.path = path.parent if self.alone else path
        self.name = (path.name.split(".")[0] if self.alone else path.resolve().name) or "graph"
        self.taken: set[str] = set()
        try:
            paths = [path] if self.alone else sorted(path.iterdir())
            self.files = {file.name: file for file in paths if not file.name.startswith(".") and file.is_file()}
        except OSError as error:
            raise unreadable(path, error) from None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def take(self, name: str) -> Path:
        """The path of a file, which counts as read from now on, whether it is there or not."""
        self.taken.add(name)
        return self.files.get(name, self.path / name)

    def find(self, stems: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
        """The file named by one of the stems and one of the suffixes, in any case, packed by gzip or not; None where
        there is none.

        Raises:
            DataError: there are several.
        """
        wanted = {stem + suffix + packed for stem in stems for suffix in suffixes for packed in ("", GZ)}
        found = [name for name in self.files if name.lower() in wanted]
        if len(found) > 1:
            raise DataError(self.path, f"found {' and '.join(map(printable, found))}; accepted: one of them")
        return self.take(found[0]) if found else None

    def unread(self) -> list[str]:
        """Names of the files that nobody has taken, without those that say nothing about the graph."""
        return [name for name in self.files if name not in self.taken and name.lower() not in COMPANIONS]


def concatenated(split: str, blocks: Iterable[Any]) -> Tensor:
    """Blocks of triples as one int64 [n, 3]."""
    parts = list(blocks)
    return torch.cat([torch.from_numpy(part) for part in parts]) if parts else torch.zeros(0, 3, dtype=torch.int64)
