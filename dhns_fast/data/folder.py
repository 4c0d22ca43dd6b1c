"""load: a folder, or the name of an embedded data set, to a KnowledgeGraph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dhns_fast.data.features import find_features, read_features
from dhns_fast.data.graph import KnowledgeGraph
from dhns_fast.data.openke import FILES, read_openke
from dhns_fast.data.tsv import SPLITS, find, read_tsv
from dhns_fast.errors import DataError, InputError

EMBEDDED = ("atlas",)


def load(path_or_name: str | Path, features: Iterable[str] | Mapping[str, str | Path] | None = None) -> KnowledgeGraph:
    """Reads a knowledge graph from an OpenKE folder, a TSV folder, or the package.

    - OpenKE: `train2id.txt`, `valid2id.txt`, `test2id.txt` (a count line, then `head tail relation`), `entity2id.txt` and
      `relation2id.txt` (a count line, then `name id`).
    - TSV: `train`, `valid` and `test`, each `.tsv` or `.txt`, with three tab-separated names `head relation tail` a line; id maps
      `entities.tsv` or `.dict` and `relations.tsv` or `.dict` with lines `id<TAB>name` are optional.
    - Features: `<modality>.npy`, `.npz`, `.pth`, `.pt` or `.safetensors`, one row an entity; `.npz` and `.safetensors` may hold
      a bool array `present` [E] beside the matrix.

    Args:
        path_or_name: the folder, or the name of an embedded data set ("atlas"; a folder of that name is "./atlas").
        features: the modalities to read: one name or several of those in the folder, or name → file; [] for none. None: all in the folder.

    Raises:
        InputError: no such folder or embedded data set, or no such modality.
        DataError: a file is missing or not acceptable; it names path and line, what was found and what is accepted.
    """
    name = str(path_or_name)
    folder = Path(__file__).parent / name if name in EMBEDDED else _expanded(path_or_name)
    if not folder.exists():
        raise InputError(
            f"data: the path {name!r} does not exist and is no embedded data set; accepted: a folder, or one of {', '.join(EMBEDDED)}"
        )
    if not folder.is_dir():
        raise DataError(folder, "is a file; accepted: a folder with the files of a data set")
    if any((folder / file).exists() for file in FILES[:3]):
        content: dict[str, Any] = dict(read_openke(folder))
    elif any(find(folder, split, (".tsv", ".txt")) for split in SPLITS):
        content = dict(read_tsv(folder))
    else:
        raise DataError(
            folder, f"holds no data set; looked for {', '.join(FILES)} (OpenKE), and for train, valid, test as .tsv or .txt (TSV)"
        )
    if not len(content["train"]):
        raise DataError(folder, "train holds no triples; accepted: at least one")
    if isinstance(features, Mapping):
        files = {modality: _expanded(path) for modality, path in features.items()}
    else:
        files = find_features(folder)
        if features is not None:
            wanted = [features] if isinstance(features, str) else list(features)
            for modality in wanted:
                if modality not in files:
                    raise InputError(
                        f"features: {modality!r} is not in {folder}; accepted: {', '.join(files) or 'none, the folder has no feature file'}"
                    )
            files = {modality: files[modality] for modality in wanted}
    matrices = {modality: read_features(path, len(content["entity_names"])) for modality, path in files.items()}
    return KnowledgeGraph(
        name=folder.resolve().name,
        features={modality: matrix for modality, (matrix, _) in matrices.items()},
        present={modality: present for modality, (_, present) in matrices.items()},
        **content,
    )


def _expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced, as a shell would have done; InputError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError("data", str(path), "a path whose `~` names the home of a user of this machine") from None
