"""Features: one matrix a modality, one row an entity, from files of many layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dhns_fast.data.graph import LARGEST, USABLE, first_unusable, rows_present, unusable
from dhns_fast.data.readers import numerical
from dhns_fast.data.readers.arrays import SUFFIXES, Array, Foreign, guarded, open_arrays
from dhns_fast.data.readers.folder import PICKLES, Folder
from dhns_fast.data.readers.lines import rows
from dhns_fast.errors import DataError, is_text, printable, shown

# Matrices larger than this as float32 stay in their file and keep its dtype, where they stand in it as they are.
MAPPED = 1 << 30
COLUMNS = 1 << 20
# Dtypes that every operation of torch takes.
COMMON = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
# Names under which a file says whose rows a matrix has.
NAMES = ("names", "entities", "entity_names", "ids", "keys")
MATRIX = ("features", "embeddings", "x")
# Files that may as well hold the weights of a model.
WEIGHTS = (".pt", ".pth", ".safetensors")
# What stems of feature files end with beside the modality: img_features.pth, visual_features_ent.pt.
ENDS = re.compile(r"(?i)[_-](features?|feats?)([_-]ent(ity|ities)?)?$")
LINKS = re.compile(r"(?i)(ent_links|.*[_-](sameaslink|imageindex))(\.txt|\.tsv)?")
# Names that a note gives as examples.
FEW = 3


@dataclass
class Modality:
    """features [E, D] (float32, or what the file has where it stays there), present bool [E], sentences for the user,
    and the link files that connected its names.
    """

    features: Tensor
    present: Tensor
    notes: list[str]
    links: Sequence[Path] = ()


def find(folder: Folder) -> dict[str, Path]:
    """Modality to feature file: those of the folder, and `embeddings/<folder>-<modality>` beside it or beside its
    parent.

    Raises:
        DataError: two files of the folder have one modality.
    """
    found: dict[str, Path] = {}
    for name, path in folder.files.items():
        if name in folder.taken:
            continue
        if numerical.FILE.fullmatch(name):
            modality = numerical.MODALITY
        elif path.suffix.lower() in SUFFIXES:
            # What `write` has written is called as it is.
            modality = path.stem if path.suffix == ".safetensors" else _modality(path.stem, folder.name)
        else:
            continue
        if not is_text(modality):
            raise DataError(path, "its name is not text in UTF-8; accepted: a name of a modality that is")
        if modality in found:
            raise DataError(
                path, f"{found[modality].name} holds the modality {modality!r} too; accepted: one file a modality"
            )
        found[modality] = path
    for place in (
        folder.path / "embeddings",
        folder.path.resolve().parent / "embeddings",
        folder.path.resolve().parent.parent / "embeddings",
    ):
        beside = re.compile(re.escape(folder.name) + r"[-_](.+)", re.IGNORECASE)
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            match = beside.fullmatch(path.stem)
            if match and path.suffix.lower() in SUFFIXES and path.is_file():
                found.setdefault(_modality(match[1], folder.name), path)
    for path in sorted(folder.path.resolve().parent.glob("*.h5")):
        stem, own = path.stem.replace("-", "_").lower(), folder.name.replace("-", "_").lower()
        if stem.startswith(own + "_") and path.is_file():
            found.setdefault(path.stem[len(own) + 1 :], path)
    return found


def _modality(stem: str, folder: str) -> str:
    own = stem[len(folder) + 1 :] if stem.lower().startswith((f"{folder}-".lower(), f"{folder}_".lower())) else stem
    return ENDS.sub("", own) or stem


def describe_unread(folder: Folder) -> list[str]:
    """A note that names what lies beside the data and was not read; none where there is nothing."""
    names = folder.unread()
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    others = [name for name in names if name not in pickles]
    notes = []
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        notes.append(f"Beside the data, not read: {', '.join(map(printable, others[:8]))}{more}.")
    if pickles:
        more = f" and {len(pickles) - 8} more" if len(pickles) > 8 else ""
        listed = ", ".join(map(printable, pickles[:8])) + more
        notes.append(
            f"Pickles are not opened: {listed}; `dhns-fast convert --allow-pickle FILE` makes safetensors of one that you trust."
        )
    return notes


def read(path: Path, entity_names: Sequence[str], relation_names: Sequence[str] = ()) -> Modality:
    """One modality.

    - one matrix [E, D], in the graph's order; [E, n, D] is averaged over the n that are not zero. Beside others it is
      named `features` (or `embeddings`, `x`, `weight`); `present` bool [E] may say who has it.
    - a matrix with `names` (strings, or ids) beside it: its rows are put in the graph's order.
    - a dict, or an `.h5`, of name → [D] or [n, D], averaged. Names are the graph's, or a link file in the folder
      connects them.

    Entities that are not there are masked out; names that are no entities are reported.

    Raises:
        Foreign: the file is whole, but holds something else.
        DataError: unreadable, damaged, of a wrong size, or with numbers that nobody can train on.
    """
    if numerical.FILE.fullmatch(path.name):
        return Modality(*numerical.read(path, entity_names))
    found = open_arrays(path)
    E, notes, links = len(entity_names), [], []  # type: tuple[int, list[str], list[Path]]
    numbers = {key: array for key, array in found.items() if array.kind == "number"}
    key = _matrix_key(path, numbers, E)
    names = next((found[name] for name in NAMES if name in found and len(found[name].shape) == 1), None)
    if key is None:
        keyed = _keyed(path, numbers, entity_names, notes, links)
        if keyed is None:
            raise _nothing(path, found, E, relation_names)
        matrix, present = keyed
        _check(path, matrix, present)
        return Modality(matrix, present, notes, links)
    array = numbers[key]
    _size(path, array, None if names is not None else E)
    if names is not None:
        matrix, present = _named(path, array, guarded(path, names.read), entity_names, notes, links)
    else:
        matrix, given = _pooled(_read(path, array)), found.get("present")
        present = rows_present(matrix) if given is None else _present(path, given, E)
        if not present.any():
            notes.append(f"{path.name}: no entity has it, as all its rows are zeros or masked.")
    converted = matrix if _stays(array, matrix) else matrix.to(torch.float32)
    _check(path, matrix if matrix.dtype == torch.float64 else converted, present)
    return Modality(converted, present, notes, links)


def _stays(array: Array, matrix: Tensor) -> bool:
    return array.view and matrix.numel() * 4 > MAPPED and matrix.dtype in (torch.float16, torch.bfloat16, torch.float32)


def _matrix_key(path: Path, numbers: Mapping[str | int, Array], num_entities: int) -> str | int | None:
    """Which of the arrays is the matrix: one that is called so, the only one, or the only matrix where it has a row an
    entity.
    """
    matrices = {key: array for key, array in numbers.items() if len(array.shape) in (2, 3)}
    fitting = [key for key, array in matrices.items() if array.shape[0] == num_entities]
    named = next((key for key in MATRIX if key in matrices), "weight" if "weight" in fitting else None)
    if named is not None or len(matrices) != 1:
        return named
    only = next(iter(matrices))
    # A file of weights may have one matrix, too; one of features has a row an entity.
    return only if fitting or (len(numbers) == 1 and path.suffix.lower() not in WEIGHTS) or only == "" else None


def _nothing(path: Path, found: Mapping[str | int, Array], E: int, relation_names: Sequence[str]) -> DataError:
    listed = [f"{printable(str(key))} {array}".strip() for key, array in list(found.items())[:FEW]]
    shapes = ", ".join(listed) + (f" and {len(found) - FEW} more" if len(found) > FEW else "")
    if len(found) > 1:
        shapes += ", none of them named after an entity"
    accepted = (
        f"accepted: one matrix of numbers [{E}, D], named `features` where there are others, or a vector for each name"
    )
    if relation_names and set(map(str, found)) & set(relation_names):
        return Foreign(path, f"has vectors of relations, which are not used; {accepted}")
    alone = len(found) == 1 and (next(iter(found)) == "" or next(iter(found.values())).shape[:1] == (E,))
    kind = Foreign if path.suffix.lower() in WEIGHTS and not alone else DataError
    return kind(path, f"found {shapes or 'nothing'}; {accepted}")


def _size(path: Path, array: Array, num_entities: int | None) -> None:
    """Refuse by shape, before numbers are read."""
    if num_entities is not None and array.shape[0] != num_entities:
        raise DataError(path, f"found {array.shape[0]} rows; accepted: {num_entities}, one an entity")
    if not all(array.shape[1:]) or array.shape[-1] > COLUMNS:
        raise DataError(
            path, f"found {array.shape[-1] if all(array.shape[1:-1]) else 0} columns; accepted: 1 to {COLUMNS}"
        )


def _read(path: Path, array: Array) -> Tensor:
    x: Tensor = guarded(path, array.read).detach()
    return x if x.dtype in COMMON else x.float()


def _present(path: Path, array: Array, num_entities: int) -> Tensor:
    if array.kind != "bool" or array.shape != (num_entities,):
        raise DataError(path, f"`present` is {array}; accepted: bool of shape [{num_entities}]")
    return _read(path, array)


def _pooled(x: Tensor) -> Tensor:
    """[E, D] of [E, D] or of [E, n, D]: the mean of what is not entirely zero."""
    if x.ndim == 2:
        return x
    x = x.to(torch.float32)
    return x.sum(1) / (x != 0).any(2).sum(1, keepdim=True).clamp(min=1)


def _check(path: Path, matrix: Tensor, present: Tensor) -> None:
    at = first_unusable(matrix, present)
    if at is not None:
        what = unusable(matrix, at)
        hint = "" if abs(float(matrix[at])) > LARGEST else "; a row of zeros says that the entity lacks the modality"
        raise DataError(path, f"found {what}; accepted: {USABLE}{hint}")


def _named(
    path: Path,
    array: Array,
    names: Sequence[object],
    entity_names: Sequence[str],
    notes: list[str],
    links: list[Path],
) -> tuple[Tensor, Tensor]:
    """The rows of a matrix that has names beside it, in the graph's order."""
    if isinstance(names, Tensor):
        names = names.tolist()
    if len(names) != array.shape[0]:
        raise DataError(path, f"has {array.shape[0]} rows and {len(names)} names; accepted: a name for each row")
    if len(set(names)) != len(names):
        raise DataError(path, f"{len(names) - len(set(names))} of {len(names)} names are repeated; accepted: each once")
    place = _places(path, names, entity_names, notes, links)
    known = [(row, entity) for row, entity in enumerate(place) if entity is not None]
    if not known:
        raise DataError(
            path,
            f"none of its {len(names)} names is an entity of the graph, as {shown(names[0])}; accepted: their names",
        )
    rows, entities = (torch.tensor(x) for x in zip(*known, strict=True))
    matrix = _pooled(_read(path, array)[rows])
    out = torch.zeros(len(entity_names), matrix.shape[1])
    out[entities] = matrix.to(torch.float32)
    present = torch.zeros(len(entity_names), dtype=torch.bool)
    present[entities] = rows_present(matrix)
    _missing(path, present, notes)
    return out, present


def _keyed(
    path: Path, numbers: Mapping[str | int, Array], entity_names: Sequence[str], notes: list[str], links: list[Path]
) -> tuple[Tensor, Tensor] | None:
    """The matrix of a file with an array for each name; None where no name is an entity's."""
    arrays = {key: array for key, array in numbers.items() if len(array.shape) in (1, 2)}
    if not arrays or (
        not all(isinstance(key, int) for key in arrays) and not all(isinstance(key, str) for key in arrays)
    ):
        return None
    keys = list(arrays)
    own: list[str] = []
    place = _places(path, keys, entity_names, own, links)
    known = [(key, entity) for key, entity in zip(keys, place, strict=True) if entity is not None]
    if not known:
        return None
    notes += own
    widths = {arrays[key].shape[-1] for key, _ in known}
    if len(widths) != 1 or not widths <= set(range(1, COLUMNS + 1)):
        raise DataError(
            path,
            f"found vectors of {' and '.join(map(str, sorted(widths)[:FEW]))} numbers; accepted: one width, 1 to {COLUMNS}",
        )
    width = widths.pop()
    total = torch.zeros(len(entity_names), width)
    count = torch.zeros(len(entity_names))
    present = torch.zeros(len(entity_names), dtype=torch.bool)
    for key, entity in known:
        x = _read(path, arrays[key]).reshape(-1, width)
        x = x[(x != 0).any(1)]
        present[entity] |= bool(len(x))
        total[entity] += x.to(torch.float32).sum(0)
        count[entity] += len(x)
    _missing(path, present, notes)
    return total / count.clamp(min=1).unsqueeze(1), present


def _missing(path: Path, present: Tensor, notes: list[str]) -> None:
    if missing := int((~present).sum()):
        notes.append(f"{path.name}: {missing} of {len(present)} entities are not in it and are masked out.")


def _places(
    path: Path, keys: Sequence[object], entity_names: Sequence[str], notes: list[str], links: list[Path]
) -> list[int | None]:
    """The entity of each key: its name, its id where keys are integers, or what a link file says; None for no entity.
    Reported in a note.
    """
    if all(isinstance(key, int) for key in keys):
        place = [key if isinstance(key, int) and 0 <= key < len(entity_names) else None for key in keys]
    else:
        ids = {name: i for i, name in enumerate(entity_names)}
        place = [ids.get(str(key)) for key in keys]
    if not any(found is not None for found in place):
        # Names of URIs with and without brackets, and the paths of an .h5, which begin without a slash and have no two
        # in a row.
        bare = {_bare(name): i for i, name in enumerate(entity_names)}
        link = _links(path.parent, bare, links)
        place = [bare.get(_bare(str(key)), link.get(_bare(str(key)))) for key in keys]
    unknown = [key for key, found in zip(keys, place, strict=True) if found is None]
    if unknown and len(unknown) < len(keys):
        examples = ", ".join(shown(key) for key in unknown[:FEW])
        notes.append(f"{path.name}: {len(unknown)} of {len(keys)} names are no entities of the graph ({examples}).")
    return place


def _bare(name: str) -> str:
    name = re.sub("/+", "/", name.removeprefix("<").removesuffix(">")).lstrip("/")
    return "m/" + name[2:] if name.startswith("m.") else name


def _links(folder: Path, entities: Mapping[str, int], read: list[Path]) -> dict[str, int]:
    """What link files of a folder say: another name → entity. Their lines hold two names (and a word between them),
    separated by tabs or blanks; one of the two is an entity's. `read` receives the files.

    Raises:
        DataError: a line holds one name; the message names it.
    """
    out: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if not LINKS.fullmatch(path.name) or not path.is_file():
            continue
        read.append(path)
        for line, row in rows(path):
            cells = [cell.strip(" ") for cell in row.split("\t")] if "\t" in row else row.split(" ")
            cells = [_bare(cell) for cell in cells if cell and cell not in (".", "<SameAs>", "SameAs")]
            if len(cells) < 2:
                raise DataError(path, f"found {shown(row)}; accepted: two names, separated by a tab or a blank", line)
            if len(cells) == 2:
                for a, b in (cells, cells[::-1]):
                    if b in entities:
                        out[a] = entities[b]
    return out
