"""Triples of names: three columns in train, valid and test, or in one file, with id maps beside them or not."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dhns_fast.catalogue import SPLITS
from dhns_fast.data.readers import maps
from dhns_fast.data.readers.folder import Content, Folder
from dhns_fast.data.readers.lines import Table, blocks, decoded, numbered, plain_suffix, shown
from dhns_fast.errors import DataError, printable

STEMS = {"train": ("train",), "valid": ("valid", "dev", "val", "validation"), "test": ("test",)}
SUFFIXES = (".tsv", ".txt", ".csv", "")
# Stems of a graph in one file.
WHOLE = ("triples", "kg", "graph", "all", "edges", "facts")
WHOLE_END = re.compile(r"(?i)(_EntityTriples|[_-](all[_-])?(triples|triplets|triplet))$")
LOOKS_FOR = (
    "train, valid (dev, val), test as .tsv, .txt, .csv or without a suffix, also with .gz, also as NAME_train (names); "
    f"one file {', '.join(WHOLE)} or NAME_EntityTriples (names, split here)"
)
HEADER = (
    {"head", "h", "subject", "subj", "s", "source", "src", "head_id", "head_entity", "headid", "from", "entity1"},
    {
        "relation",
        "r",
        "predicate",
        "pred",
        "p",
        "property",
        "rel",
        "relation_id",
        "relationid",
        "edge",
        "edge_type",
        "label",
    },
    {"tail", "t", "object", "obj", "o", "target", "dst", "tail_id", "tail_entity", "tailid", "to", "entity2"},
)
TAB, NEWLINE = 9, 10
ROW = "three names, `head<TAB>relation<TAB>tail`"


class Ids(dict[str, int]):
    """Names to ids, given in the order in which names are asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)
        return number


def holds(folder: Folder) -> bool:
    return bool(_splits(folder, take=False)) or whole_file(folder) is not None


def _splits(folder: Folder, take: bool = True) -> dict[str, Path]:
    """Split to file: those called after it, else those whose name ends so."""
    taken = set(folder.taken)
    found = {name: path for name, stems in STEMS.items() if (path := folder.find(stems, SUFFIXES)) is not None}
    if "train" not in found:
        ends = {name: {} for name in SPLITS}  # type: dict[str, dict[str, str]]
        for file in folder.files:
            match = re.fullmatch(r"(?i)(.+[_-])(train|valid|dev|val|test)(\.(tsv|txt|csv))?(\.gz)?", file)
            if match:
                split = next(name for name, stems in STEMS.items() if match[2].lower() in stems)
                ends[split][match[1]] = file
        if len(ends["train"]) > 1:
            raise DataError(
                folder.path,
                f"found {' and '.join(map(printable, ends['train'].values()))}; accepted: one graph a folder",
            )
        found = found or {}
        for prefix in ends["train"]:
            found = {name: folder.take(files[prefix]) for name, files in ends.items() if prefix in files}
    if not take:
        folder.taken = taken
    return found


def whole_file(folder: Folder) -> str | None:
    """Name of the file that is the whole graph; None where there is none or more than one could be."""
    tables = [name for name, path in folder.files.items() if plain_suffix(path) in (*SUFFIXES, ".nt")]
    named = [name for name in tables if _stem(name).lower() in WHOLE or WHOLE_END.search(_stem(name))]
    return named[0] if len(named) == 1 else None


def _stem(name: str) -> str:
    return name.split(".")[0]


def read(folder: Folder) -> Content:
    """Splits by name; without an id map, ids follow the order of first appearance over train, valid and test (in a
    line, the head before the tail). Columns are separated by tabs, in .csv by commas, and in files without a tab by
    blanks.
    """
    files = {"train": next(iter(folder.files.values()))} if folder.alone else _splits(folder)
    notes: list[str] = []
    if not files or "train" not in files:
        name = whole_file(folder)
        if name is None:
            raise DataError(
                folder.path / "train.tsv",
                f"is missing (and so is train.txt); found {', '.join(p.name for p in files.values())}",
            )
        files = {"train": folder.take(name)}
    known: list[dict[str, int]] = []
    for what in ("entities", "relations"):
        path = maps.find(folder, what)
        known.append(Ids() if path is None else {name: i for i, name in enumerate(maps.read(path, what))})
    entities, relations = known
    splits = {name: folder.gather(name, triples(path, entities, relations, notes)) for name, path in files.items()}
    if len(splits) == 1:
        return Content.whole(splits["train"], list(entities), list(relations), notes)
    for split in SPLITS:
        if split not in splits:
            notes.append(f"{split}: there is no such file, so it holds no triples.")
            splits[split] = torch.zeros(0, 3, dtype=torch.int64)
    return Content(splits, list(entities), list(relations), notes)


def triples(path: Path, entities: dict[str, int], relations: dict[str, int], notes: list[str]) -> Iterator[np.ndarray]:
    """Blocks int64 [n, 3] of a file's triples; ids of new names are given where `entities` or `relations` is an
    `Ids`.
    """
    layout = _Layout.of(path, relations, notes)
    if layout.quoted:
        yield from _quoted(path, layout, entities, relations)
        return
    for first, data in blocks(path):
        if first <= layout.header:
            data = data.split(b"\n", layout.header - first + 1)[-1]
            first = layout.header + 1
        yield _mapped(path, first, data, layout, entities, relations)


class _Layout:
    """How a file is written: separator, the line that is a header (0: none), and which columns are head, relation and
    tail.
    """

    def __init__(self, separator: str, header: int, columns: tuple[int, int, int], width: int, quoted: bool) -> None:
        self.separator, self.header, self.columns, self.width, self.quoted = separator, header, columns, width, quoted

    @classmethod
    def of(cls, path: Path, relations: dict[str, int], notes: list[str]) -> _Layout:
        first, data = next(blocks(path))
        text = decoded(path, first, data)
        lines = list(numbered(first, text))
        if not lines:
            return cls("\t", 0, (0, 1, 2), 3, False)
        line, row = lines[0]
        separator = "\t" if "\t" in row else " "
        quoted = False
        if plain_suffix(path) == ".csv" and ("," in row or ";" in row or separator == " "):
            # The one that makes three columns of most lines, whatever names hold.
            separator = max(
                ",;", key=lambda x: (sum(len(_cells(other, x)) > 2 for _, other in lines[:100]), row.count(x))
            )
            # Separators become tabs unless quotes or tabs say that this is not the same.
            quoted = '"' in text or "\t" in text or len(text) > 1 << 21
        cells = _cells(row, separator)
        lower = [cell.strip(" ").lower().split(":")[0] for cell in cells]
        columns = tuple(next((i for i, cell in enumerate(lower) if cell in words), -1) for words in HEADER)
        if -1 in columns or len(set(columns)) != 3 or not _is_header(columns, cells, lines, separator, relations):
            return cls(separator, 0, (0, 1, 2), 3, quoted)
        left_out = [printable(cell) for i, cell in enumerate(cells) if i not in columns]
        also = f"; columns left out: {', '.join(left_out)}" if left_out else ""
        notes.append(f"{path.name}: line {line}, {shown(row)}, is a header and no triple{also}.")
        return cls(separator, line, columns, len(cells), quoted)  # type: ignore[arg-type]


def _is_header(
    columns: tuple[int, ...], cells: list[str], lines: list[tuple[int, str]], separator: str, relations: dict[str, int]
) -> bool:
    """Whether a first line of such words is a header: no line below has one of them as a name. Words of one letter,
    which toy graphs use as names, need such lines.
    """
    words = {cells[i] for i in columns}
    if not isinstance(relations, Ids):
        return cells[columns[1]] not in relations
    if cells[columns[1]] in relations or (len(cells[columns[1]]) == 1 and len(lines) < 2):
        return False
    return not any(words & set(_cells(row, separator)) for _, row in lines[1:10_000])


def _cells(row: str, separator: str) -> list[str]:
    if separator in ",;":
        try:
            return [cell.strip(" ") for cell in next(csv.reader([row], delimiter=separator, skipinitialspace=True), [])]
        except csv.Error:  # a line break of old Macs, a field without end: no three columns
            return [row]
    cells = row.split("\t") if separator == "\t" else [cell for cell in row.split(" ") if cell]
    return cells[:-1] if len(cells) == 4 and cells[-1].strip(" ") == "." else cells  # the end of a line of N-Triples


def _mapped(
    path: Path, first: int, data: bytes, layout: _Layout, entities: dict[str, int], relations: dict[str, int]
) -> np.ndarray:
    if layout.separator in ",;":
        data = data.replace(layout.separator.encode(), b"\t")
    text = decoded(path, first, data)
    separators = np.frombuffer(data, np.uint8)
    separators = separators[(separators == TAB) | (separators == NEWLINE)]
    regular = layout.columns == (0, 1, 2) and layout.width == 3 and layout.separator != " "
    if not regular or len(separators) % 3 or (separators.reshape(-1, 3) != (TAB, TAB, NEWLINE)).any():
        text = _regular(path, first, text, layout, entities, relations)
    cells = text[:-1].replace("\n", "\t").split("\t") if text else []
    if layout.separator in ",;":
        cells = [cell.strip(" ") for cell in cells]
    count = len(cells) // 3
    out = np.empty((count, 3), np.int64)
    try:
        if "" in cells or _BLANK.search(text):
            raise KeyError
        out[:, 1] = np.fromiter(map(relations.__getitem__, cells[1::3]), np.int64, count)
        del cells[1::3]
        out[:, ::2] = np.fromiter(map(entities.__getitem__, cells), np.int64, 2 * count).reshape(count, 2)
    except KeyError:
        _regular(path, first, decoded(path, first, data), layout, entities, relations)
        raise
    return out


# A cell without anything but blanks.
_BLANK = re.compile(r"(?:^|[\t\n])[^\S\t\n]*[\t\n]")


def _regular(
    path: Path, first: int, text: str, layout: _Layout, entities: dict[str, int], relations: dict[str, int]
) -> str:
    """The text as lines of three columns, or a DataError for the first line that is not three names that have ids."""
    separator = " " if layout.separator == " " else "\t"
    return "".join(
        "\t".join(_triple(path, line, row, _cells(row, separator), layout, entities, relations)) + "\n"
        for line, row in numbered(first, text)
    )


def _triple(
    path: Path,
    line: int,
    row: str,
    cells: list[str],
    layout: _Layout,
    entities: dict[str, int],
    relations: dict[str, int],
) -> list[str]:
    if len(cells) != layout.width or not all(cells[i].strip() for i in layout.columns):
        found = f"{len(cells)} columns" if len(cells) != layout.width else "an empty name"
        comma = layout.separator in ",;"
        # Commas have become tabs by now.
        row = row.replace("\t", layout.separator) if comma else row
        accepted = ROW.replace("<TAB>", layout.separator) if comma else ROW
        accepted = accepted if layout.width == 3 else f"{layout.width} columns, as in the header"
        raise DataError(path, f"found {found}, {shown(row)}; accepted: {accepted}", line)
    cells = [cells[i] for i in layout.columns]
    for place, (cell, known) in enumerate(zip(cells, (entities, relations, entities), strict=True)):
        if cell not in known and not isinstance(known, Ids):
            what = "relation" if place == 1 else "entity"
            swapped = place == 1 and not isinstance(entities, Ids) and cell in entities and cells[2] in relations
            hint = "; this looks like head, tail, relation" if swapped else ""
            raise DataError(
                path, f"{what} {shown(cell)} is not in the id map; accepted: its {len(known)} names{hint}", line
            )
    return cells


def _quoted(path: Path, layout: _Layout, entities: dict[str, int], relations: dict[str, int]) -> Iterator[np.ndarray]:
    table = Table(path)
    reader = csv.reader(table, delimiter=layout.separator, strict=True, skipinitialspace=True)
    block: list[tuple[int, int, int]] = []
    while True:
        line = table.line + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(path, f"cannot be read as .csv: {error}", line) from None
        if row is None:
            break
        if table.line <= layout.header or not any(cell.strip(" ") for cell in row):
            continue
        cells = [cell.strip(" ") for cell in row]
        h, r, t = _triple(path, line, layout.separator.join(row), cells, layout, entities, relations)
        block.append((entities[h], relations[r], entities[t]))
        if len(block) == 1 << 16:
            yield np.array(block, np.int64)
            block = []
    yield np.array(block, np.int64).reshape(-1, 3)
