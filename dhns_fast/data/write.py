"""Writing a graph as a folder of names, which `load` reads back exactly."""

from __future__ import annotations

from pathlib import Path

from dhns_fast import files
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.errors import InputError, Shown, is_text, shown

# What :func:`storable` names are.
STORABLE = "names that are not blank, without tabs, line breaks and a byte order mark (U+FEFF) in front"


def write(kg: KnowledgeGraph, folder: str | Path) -> Path:
    """Writes a graph as a TSV folder that `load` reads back exactly: splits, id maps, and a safetensors file a
    modality.

    All files take their names when the last of them is written, or none does: half of a graph would be another graph.
    Files of the folder that have other names stay.

    Raises:
        InputError: a name that the format cannot hold (blank, with a tab or line break, or not Unicode); a modality
            that is no file name; a folder that cannot be made.
    """
    folder = files.expanded("folder", folder)
    for what, names in (("entity_names", kg.entity_names), ("relation_names", kg.relation_names)):
        for i, name in enumerate(names):
            if not storable(name):
                raise InputError(what, Shown(f"{shown(name)} at {i}"), STORABLE)
    for modality in kg.features:
        if Path(modality).name != modality or modality.startswith(".") or "\0" in modality:
            raise InputError("features", modality, "modalities that are also file names")
    with files.together(folder):
        for what, names in (("entities", kg.entity_names), ("relations", kg.relation_names)):
            files.write_text(folder / f"{what}.tsv", "".join(f"{i}\t{name}\n" for i, name in enumerate(names)) or "\n")
        e, r = kg.entity_names, kg.relation_names
        for split, triples in kg.splits.items():
            rows = "".join(f"{e[h]}\t{r[p]}\t{e[t]}\n" for h, p, t in triples.tolist())
            files.write_text(folder / f"{split}.tsv", rows or "\n")
        for modality, matrix in kg.features.items():
            files.write_tensors(
                folder / f"{modality}.safetensors", {"features": matrix, "present": kg.present[modality]}
            )
    return folder


def storable(name: str) -> bool:
    """Whether a line of text can hold a name so that every reader finds it again."""
    return bool(name.strip()) and name[0] != "\ufeff" and {"\t", "\n", "\r"}.isdisjoint(name) and is_text(name)
