"""load: a folder, a file, or the name of an embedded or synthetic data set, to a KnowledgeGraph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch

from dhns_fast import checks
from dhns_fast.data import planted
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.readers import features as modalities
from dhns_fast.data.readers import mapped, named, numbered, ogb, openke, recbole
from dhns_fast.data.readers.arrays import Foreign
from dhns_fast.data.readers.folder import Content, Folder, Gather, ReadNames
from dhns_fast.data.splits import hold_out
from dhns_fast.errors import DataError, InputError, Shown, printable
from dhns_fast.files import closed, expanded
from dhns_fast.ops.ambient import plain

EMBEDDED = ("atlas",)
# One module a layout: the first that `holds` a folder reads it.
LAYOUTS: tuple[ModuleType, ...] = (mapped, openke, numbered, ogb, recbole, named)
# Held out of a graph that comes in one piece, each of valid and test.
SHARE = 0.05


def load(
    path_or_name: str | Path, features: Iterable[str] | Mapping[str, str | Path] | None = None, seed: int = 0
) -> KnowledgeGraph:
    """Reads a knowledge graph: a folder in one of the layouts of docs/data.md, one file of triples, an embedded data
    set, or a synthetic one.

    - OpenKE (`train2id.txt`, …), names (`train.tsv`, …), LibKGE (`train.del`), DGL-KE's Freebase, ogbl-wikikg2, RecBole
      (`.inter`, `.kg`), and what `dhns_fast.data.convert` writes, which is mapped into memory.
    - One file of triples, or a folder with no more than train: 5 % of the triples each become valid and test.
    - "synthetic:entities=1000,relations=10,triples=5000,seed=0": :func:`dhns_fast.data.synthetic`.
    - Features: `.npy`, `.npz`, `.pth`, `.pt`, `.safetensors`, `.h5`: a row an entity, or a vector a name.

    What was left out, made up, or found beside the data is in `notes` of the graph.

    Args:
        path_or_name: the folder or file, `~` allowed, or a name ("atlas"; a folder of that name is "./atlas").
        features: the modalities to read: one name or several of those in the folder, or name → file; [] for none. None:
            all in the folder that are features; other files are named in a note.
        seed: of the split, where the data has none.

    Raises:
        InputError: no such folder or embedded data set, or no such modality.
        DataError: a file is missing or not acceptable; it names path and line, what was found and what is accepted.
    """
    if not isinstance(path_or_name, (str, Path)):
        raise InputError("data", path_or_name, "a path, or a name")
    name = str(path_or_name)
    if name.startswith(planted.PREFIX):
        chosen = (
            None
            if features is None or isinstance(features, Mapping)
            else [features]
            if isinstance(features, str)
            else list(features)
        )
        return planted.named(name, chosen)
    return read(
        Path(__file__).parent / name if name in EMBEDDED else expanded("data", path_or_name), name, features, seed
    )


@plain()
def read(
    path: Path,
    name: str,
    features: Iterable[str] | Mapping[str, str | Path] | None = None,
    seed: int = 0,
    gather: Gather | None = None,
    names: ReadNames | None = None,
) -> KnowledgeGraph:
    """The graph in a folder or file, `name` for the messages; `gather` and `names` as of
    :class:`~dhns_fast.data.readers.folder.Folder`.
    """
    seed = checks.count("seed", seed, 0, checks.SEEDS)
    try:
        if not path.exists():
            got = Shown(f"{name!r}, which does not exist")
            raise InputError(
                "data", got, f"a folder, a file of triples, {planted.PREFIX}…, or one of {', '.join(EMBEDDED)}"
            )
        folder = Folder(path, gather, names)
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a zero byte
        raise (error if isinstance(error, InputError) else closed("data", name, error)) from None
    content = named.read(folder) if folder.alone else _content(folder, seed)
    if not len(content.splits["train"]):
        raise DataError(path, "train holds no triples; accepted: at least one")
    if content.unsplit:
        _split(content, seed)
    found = _features(folder, content, features)
    notes = [*content.notes, *(note for modality in found.values() for note in modality.notes)]
    folder.taken |= {link.name for modality in found.values() for link in modality.links}
    notes += [] if folder.alone else modalities.describe_unread(folder)
    for what, given in (("entities", content.entity_names), ("relations", content.relation_names)):
        blanks = sum(name[0] == " " or name[-1] == " " for name in given) if isinstance(given, list) else 0
        if blanks:
            notes.append(f"The names of {blanks} {what} begin or end with a blank; they are kept as they are.")
    fields = {
        "name": folder.name,
        **content.splits,
        "entity_names": content.entity_names,
        "relation_names": content.relation_names,
        "notes": tuple(notes),
    }
    return KnowledgeGraph.checked(
        report=content.report,
        filter_folder=content.filter_folder,
        features={**content.features, **{name: x.features for name, x in found.items()}},
        present={**content.present, **{name: x.present for name, x in found.items()}},
        **fields,
    )


def located(path_or_name: str) -> str:
    """What :func:`load` takes, so that it means the same in every working directory: a path becomes absolute, other
    names stay.
    """
    if path_or_name in EMBEDDED or path_or_name.startswith(planted.PREFIX):
        return path_or_name
    return str(expanded("data", path_or_name).resolve())


def _content(folder: Folder, seed: int) -> Content:
    for layout in LAYOUTS:
        if layout.holds(folder):
            content: Content = layout.read(folder, seed) if layout is recbole else layout.read(folder)
            return content
    there = ", ".join(map(printable, list(folder.files)[:8])) or "no files"
    more = f" and {len(folder.files) - 8} more" if len(folder.files) > 8 else ""
    looked = "; ".join(layout.LOOKS_FOR for layout in LAYOUTS)
    raise DataError(folder.path, f"holds no data set; found {there}{more}; looked for {looked}")


def _split(content: Content, seed: int) -> None:
    """Hold out valid and test of a graph that comes in one piece."""
    sizes = len(content.entity_names), len(content.relation_names)
    generator = torch.Generator().manual_seed(seed)
    whole = content.splits["train"]
    count = max(1, round(SHARE * len(whole)))
    rest, test = hold_out(whole, count, *sizes, generator)
    train, valid = hold_out(rest, count, *sizes, generator)
    content.splits.update(train=train, valid=valid, test=test)
    content.notes.append(
        f"The triples came in one piece: {len(valid)} and {len(test)} of {len(whole)} are held out (seed {seed})."
    )


def _features(
    folder: Folder, content: Content, wanted: Iterable[str] | Mapping[str, str | Path] | None
) -> dict[str, modalities.Modality]:
    names = content.entity_names, content.relation_names
    if isinstance(wanted, Mapping):
        files = {modality: expanded(f"features[{modality!r}]", path) for modality, path in wanted.items()}
        return {modality: modalities.read(path, *names) for modality, path in files.items()}
    if wanted is not None and not isinstance(wanted, Iterable):
        raise InputError("features", wanted, "names of modalities, or a dict of paths by name")
    files = {} if folder.alone else modalities.find(folder)
    if wanted is not None:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        for modality in chosen:
            if modality not in files and modality not in content.features:
                there = ", ".join([*map(printable, files), *content.features])
                accepted = there or "none, the folder has no feature file"
                raise InputError("features", Shown(f"{modality!r}, which is not in {folder.path}"), accepted)
        folder.taken |= {path.name for path in files.values() if path.name in folder.files}
        content.features = {name: x for name, x in content.features.items() if name in chosen}
        content.present = {name: x for name, x in content.present.items() if name in chosen}
        return {modality: modalities.read(files[modality], *names) for modality in chosen if modality in files}
    found = {}
    for modality, path in files.items():
        try:
            found[modality] = modalities.read(path, *names)
        except Foreign as error:
            content.notes.append(f"Not read: {printable(path.name)} {error.message}.")
        folder.taken.add(path.name)
    return found
