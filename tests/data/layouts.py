"""The same small graph in every layout that is read: five entities, two relations, and what a reader has to find in
it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

ENTITIES = ["Paris", "Rome", "New York", "Oslo", "Nice"]
RELATIONS = ["in", "near to"]
TRIPLES = {
    "train": [(0, 0, 1), (1, 1, 2), (2, 0, 3), (3, 1, 4)],
    "valid": [(4, 0, 0)],
    "test": [(2, 1, 0), (0, 1, 3)],
}
# Layouts that cannot have names with blanks in them.
PLAIN = [name.replace(" ", "_") for name in ENTITIES], [name.replace(" ", "_") for name in RELATIONS]


def named(
    split: str, separator: str = "\t", end: str = "\n", names: tuple[list[str], list[str]] = (ENTITIES, RELATIONS)
) -> str:
    """The lines of a split as names."""
    return "".join(separator.join((names[0][h], names[1][r], names[0][t])) + end for h, r, t in TRIPLES[split])


def numbered(split: str, order: tuple[int, int, int], separator: str = " ") -> str:
    """The lines of a split as ids, columns in an order."""
    return "".join(separator.join(str(triple[i]) for i in order) + "\n" for triple in TRIPLES[split])


def mapping(names: Iterable[str], row: str = "{name}\t{id}\n") -> str:
    return "".join(row.format(name=name, id=i) for i, name in enumerate(names))


def splits(
    folder: Path, suffix: str, lines: Callable[[str], str], names: Iterable[str] = ("train", "valid", "test")
) -> None:
    for split, file in zip(TRIPLES, names, strict=True):
        write(folder / f"{file}{suffix}", lines(split))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def openke(folder: Path, packed: str = "") -> None:
    for split in TRIPLES:
        write(folder / f"{split}2id.txt{packed}", f"{len(TRIPLES[split])}\n" + numbered(split, (0, 2, 1)))
    for what, names in (("entity", ENTITIES), ("relation", RELATIONS)):
        write(folder / f"{what}2id.txt{packed}", f"{len(names)}\n" + mapping(names))


def tsv(folder: Path) -> None:
    splits(folder, ".tsv", named)


def _maps(folder: Path, entities: str, relations: str, row: str) -> None:
    write(folder / entities, mapping(ENTITIES, row))
    write(folder / relations, mapping(RELATIONS, row))


def rotate(folder: Path) -> None:
    splits(folder, ".txt", named)
    _maps(folder, "entities.dict", "relations.dict", "{id}\t{name}\n")


def mkgformer(folder: Path) -> None:
    splits(folder, ".tsv", named, ("train", "dev", "test"))
    _maps(folder, "entities.txt", "relations.txt", "{name}\n")
    write(folder / "entity2text.txt", "Paris\ta city\n")


def momok(folder: Path) -> None:
    splits(folder, ".txt", lambda split: named(split, " ", names=PLAIN), ("train", "val", "test"))
    write(folder / "entity2id.txt", mapping(PLAIN[0], "{name} {id}\n"))
    write(folder / "relation2id.txt", mapping(PLAIN[1], "{name} {id}\n"))


def otkge(folder: Path) -> None:
    splits(folder, "", named)


def packed(folder: Path) -> None:
    splits(folder, ".tsv.gz", named)


def crlf(folder: Path) -> None:
    splits(folder, ".txt", lambda split: named(split, end="\r\n"))


def csv(folder: Path) -> None:
    splits(folder, ".csv", lambda split: "head,relation,tail\n" + named(split, ","))


def quoted(folder: Path) -> None:
    splits(
        folder,
        ".csv.gz",
        lambda split: "".join(f'"{line}"\n'.replace("\t", '","') for line in named(split).splitlines()),
    )


def semicolons(folder: Path) -> None:
    splits(folder, ".csv", lambda split: named(split, ";"))


def header(folder: Path) -> None:
    """Columns in another order, and one that says nothing about the graph."""
    turned = {split: [line.split("\t") for line in named(split).splitlines()] for split in TRIPLES}
    splits(
        folder,
        ".tsv",
        lambda split: (
            "Object\tweight\tSubject\tPredicate\n" + "".join(f"{t}\t1\t{h}\t{r}\n" for h, r, t in turned[split])
        ),
    )


def wikidata5m(folder: Path) -> None:
    splits(folder / "", ".txt", named, [f"wikidata5m_transductive_{split}" for split in TRIPLES])


def libkge(folder: Path) -> None:
    splits(folder, ".del", lambda split: numbered(split, (0, 1, 2), "\t"))
    _maps(folder, "entity_ids.del", "relation_ids.del", "{id}\t{name}\n")


def freebase(folder: Path) -> None:
    splits(folder, ".txt", lambda split: numbered(split, (0, 2, 1), "\t"))
    for what, names in (("entity", ENTITIES), ("relation", RELATIONS)):
        write(folder / f"{what}2id.txt", f"{len(names)}\n" + mapping(names))


def wikikg2(folder: Path) -> None:
    (folder / "split" / "time").mkdir(parents=True)
    for split, triples in TRIPLES.items():
        columns = dict(zip(("head", "relation", "tail"), np.array(triples).T, strict=True))
        corrupted = {} if split == "train" else {"head_neg": np.zeros((len(triples), 5), np.int64)}
        torch.save({**columns, **corrupted}, folder / "split" / "time" / f"{split}.pt")
    write(folder / "mapping" / "nodeidx2entityid.csv.gz", "node idx,entity id\n" + mapping(ENTITIES, "{id},{name}\n"))
    write(folder / "mapping" / "relidx2relid.csv.gz", "rel idx,rel id\n" + mapping(RELATIONS, "{id},{name}\n"))


# Layouts whose ids are those of ENTITIES, and those whose names come without blanks.
IDS = (openke, rotate, mkgformer, momok, libkge, freebase, wikikg2)
BLANKLESS = (momok,)
ALL = (
    openke, tsv, rotate, mkgformer, momok, otkge, packed, crlf, csv, quoted, semicolons, header, wikidata5m, libkge, freebase, wikikg2,
)  # fmt: skip
