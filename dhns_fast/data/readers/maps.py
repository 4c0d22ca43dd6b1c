"""Files that give names their ids: `id<TAB>name`, `name<TAB>id` with a count line or without, or a name a line."""

from __future__ import annotations

from pathlib import Path

from dhns_fast.data.readers.folder import Folder
from dhns_fast.data.readers.lines import by_id, integer, plain_suffix, rows, shown
from dhns_fast.errors import DataError

# Stems, the ones that say more first: where a folder has entity2id.txt and entities.txt, the former decides.
STEMS = {
    "entities": (("entity2id", "ent2id", "entities2id"), ("entity_ids",), ("entities", "entity")),
    "relations": (("relation2id", "rel2id", "relations2id"), ("relation_ids",), ("relations", "relation")),
}
SUFFIXES = (".tsv", ".dict", ".txt", ".del")


def find(folder: Folder, what: str) -> Path | None:
    """The map of "entities" or "relations", or None. Maps beside it that say the same in another way count as read."""
    found = [path for stems in STEMS[what] if (path := folder.find(stems, SUFFIXES)) is not None]
    return found[0] if found else None


def read(path: Path, what: str) -> list[str]:
    """Names by id.

    Where one of two columns holds integers alone, it is the id; where both do, `entity2id` has the name first, and all
    others the id.
    """
    table = list(rows(path))
    named_first = "2id" in path.name.lower()
    if table and table[0][1].strip(" \t").isdecimal() and len(table) > 1 and named_first:
        count = integer(path, table[0][0], table[0][1].strip(" \t"), "the count")
        if count != len(table) - 1:
            raise DataError(
                path,
                f"the count is {count}, but {len(table) - 1} lines follow; accepted: their number, or no count",
                table[0][0],
            )
        table = table[1:]
    if plain_suffix(path) == ".txt" and not any("\t" in row for _, row in table):
        return _bare(path, table, what, named_first)
    cells = []
    for line, row in table:
        first, tab, second = row.partition("\t")
        if not tab or "\t" in second:
            raise DataError(path, f"found {shown(row)}; accepted: two columns, `id<TAB>name`", line)
        cells.append((line, first, second))
    return by_id(path, _oriented(cells, named_first), what)


def _oriented(cells: list[tuple[int, str, str]], named_first: bool) -> list[tuple[int, str, str]]:
    """(line, id, name) of rows of two columns."""
    if not cells:
        return cells
    first, second = (
        all(text.isascii() and text.strip(" ").isdigit() for text in column)
        for column in zip(*(row[1:] for row in cells), strict=True)
    )
    named_first = (named_first and (second or not first)) or (second and not first)
    return [(line, b.strip(" "), a) if named_first else (line, a.strip(" "), b) for line, a, b in cells]


def _bare(path: Path, table: list[tuple[int, str]], what: str, named_first: bool) -> list[str]:
    """Names of a file without tabs: a name and an id between blanks, or a name a line whose place is its id."""
    split = [(line, *row.strip(" ").rpartition(" ")[::2]) for line, row in table]
    if named_first or (
        split and {b for _, _, b in split} == set(map(str, range(len(split)))) and all(a for _, a, _ in split)
    ):
        for line, name, _ in split:
            if not name:
                raise DataError(
                    path, "found one column; accepted: a name and its id, separated by a blank or a tab", line
                )
        return by_id(path, [(line, number, name.strip(" ")) for line, name, number in split], what)
    return by_id(path, [(line, str(i), row.strip(" ")) for i, (line, row) in enumerate(table)], what)
