"""A knowledge graph in memory, or mapped into it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import SPLITS
from dhns_fast.data.filter import CSRFilter, as_triples
from dhns_fast.data.names import Names
from dhns_fast.data.splits import SplitReport, hold_out
from dhns_fast.errors import DataError, InputError, Shown, shown

# Beyond this, products of two features times a thousand columns are no longer finite in float32.
LARGEST = 1e15
USABLE = f"finite numbers up to {LARGEST:.0e} (a row that the bool array `present` rules out may hold anything)"
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes hashed, and rows looked at, together.
PIECE = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class KnowledgeGraph:
    """Triples in three splits, names, and features by modality. Construction checks every shape, id, name and number
    (InputError).

    Attributes:
        name: what to call it.
        train, valid, test: int64 [n, 3], in the order head, relation, tail, on the CPU; possibly mapped from a file.
            Arrays and lists are taken too; tensors are not copied, and must stay as they are.
        entity_names, relation_names: distinct strings by id: a list, or a :class:`dhns_fast.data.names.Names`.
        features: float32, float16 or bfloat16 [E, D_m] by modality name; possibly mapped from a file.
        present: bool [E] by modality name, whether the entity has the modality. Left out: rows that are not entirely
            zero. What stands in the other rows does not matter.
        notes: sentences of the reader: what it left out, made up or found beside the data.
        report: what was found in the splits, made when it is first asked for.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    entity_names: Sequence[str]
    relation_names: Sequence[str]
    features: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _report: list[SplitReport] = field(init=False, repr=False)
    # Where the known answers of train lie in files, or None.
    _filter: Path | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, kind, accepted in (
            ("features", Mapping, "a dict of matrices by modality name"),
            ("present", Mapping, "a dict of bool arrays by modality name"),
            ("notes", (tuple, list), "sentences in a tuple or a list"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise InputError(name, getattr(self, name), accepted)
        self._set(_report=[], _filter=None, entity_names=_names("entity_names", self.entity_names))
        self._set(relation_names=_names("relation_names", self.relation_names))
        E, R = self.num_entities, self.num_relations
        self._set(**{name: as_triples(getattr(self, name), E, R, name) for name in SPLITS})
        features, present = {}, {}
        for name, matrix in self.features.items():
            what = f"features[{name!r}]"
            if not isinstance(name, str) or not name or _not_unicode([name]) is not None:
                raise InputError("features", name, "modality names that are Unicode text and not empty")
            features[name] = x = _matrix(what, matrix, E)
            present[name] = has = (
                _present(f"present[{name!r}]", self.present[name], E) if name in self.present else rows_present(x)
            )
            at = first_unusable(x, has)
            if at is not None:
                raise InputError(what, Shown(unusable(x, at)), USABLE)
        for name in self.present:
            if name not in features:
                raise InputError("present", name, f"the modalities of features: {', '.join(features) or 'none'}")
        self._set(features=features, present=present, notes=tuple(self.notes))

    def _set(self, **values: Any) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def num_entities(self) -> int:
        return len(self.entity_names)

    @property
    def num_relations(self) -> int:
        return len(self.relation_names)

    @property
    def splits(self) -> dict[str, Tensor]:
        """The triples of "train", "valid" and "test", int64 [n, 3] each."""
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def report(self) -> SplitReport:
        if not self._report:
            self._report.append(SplitReport.of(self.splits, self.num_entities, self.relation_names))
        return self._report[0]

    def known(self) -> CSRFilter:
        """The known answers of train: mapped where a conversion has left them, else built in memory.

        Raises:
            DataError: the files of a conversion are missing or damaged.
        """
        sizes = self.num_entities, self.num_relations
        if self._filter is None:
            return CSRFilter.from_triples(self.train, *sizes)
        found = CSRFilter.mapped(self._filter, *sizes)
        counts = len(found.tail.packed), len(found.head.packed)
        if counts[0] != counts[1] or counts[0] > len(self.train) or (len(self.train) and not counts[0]):
            got = f"holds {counts[0]} tails and {counts[1]} heads of {len(self.train)} triples"
            raise DataError(self._filter, f"{got}; convert the graph again")
        return found

    def fingerprint(self) -> dict[str, str]:
        """Digests of what the graph holds: `triples`, `names`, and `features of M` and `present of M` for each modality
        M.

        Two graphs whose digests are equal are equal, up to `name`, `notes` and what stands in the rows of absent
        modalities; where they differ, the keys say in what. Everything is hashed in pieces on all threads (SHA-256,
        some GB/s); only pieces with such rows are copied. Nothing is kept: ask once.
        """
        names = (
            piece
            for names in (self.entity_names, self.relation_names)
            for piece in (b"%d\0" % len(names), *_encoded(names))
        )
        out = {"triples": _digest(self.train, self.valid, self.test), "names": _hash(names)}
        for name, matrix in self.features.items():
            # What stands in the rows of the absent is part of no graph.
            hidden = (_rows_with_bits(matrix) & ~self.present[name]).nonzero()[:, 0]
            out[f"features of {name}"] = _digest(matrix, without=hidden)
            out[f"present of {name}"] = _digest(self.present[name])
        return out

    def hold_out_validation(self, fraction: float, seed: int) -> KnowledgeGraph:
        """The same graph with validation taken from train, the old validation dropped.

        Whatever copies of a chosen triple train has leave it together, and every entity and relation of train stays in
        it.

        Args:
            fraction: share of the distinct triples of train, between 0 and 1; fewer are moved where train could not
                spare them.
            seed: decides which.

        Raises:
            InputError: `fraction` is out of range, or train cannot spare a single triple.
        """
        checks.finite(fraction=fraction)
        seed = checks.count("seed", seed, 0, checks.SEEDS)
        if not 0 < fraction < 1:
            raise InputError("fraction", fraction, "more than 0 and less than 1")
        count = max(1, round(fraction * self.report.distinct["train"]))
        train, valid = hold_out(
            self.train, count, self.num_entities, self.num_relations, torch.Generator().manual_seed(seed)
        )
        if not len(valid):
            got = f"{self.name}, of whose {len(train)} triples each is the only one to mention something"
            raise InputError("train", Shown(got), "a graph that can spare a triple for validation")
        return self.with_splits(train=train, valid=valid)

    def with_splits(self, **splits: Tensor) -> KnowledgeGraph:
        """The same graph with other triples in the splits named; names and features, checked already, are not looked at
        again.
        """
        for name in splits:
            checks.one_of("split", name, SPLITS)
        out = object.__new__(KnowledgeGraph)
        out._set(**{key: getattr(self, key) for key in self.__slots__ if key != "_report"}, _report=[])
        out._set(**{name: as_triples(x, self.num_entities, self.num_relations, name) for name, x in splits.items()})
        if "train" in splits:
            out._set(_filter=None)
        return out

    @classmethod
    def checked(
        cls,
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        report: SplitReport | None = None,
        filter_folder: Path | None = None,
        **fields: Any,
    ) -> KnowledgeGraph:
        """A graph whose features a reader has checked, or whoever wrote what it maps: they are not looked at."""
        out = cls(**fields)
        out._set(features=features, present=present, _report=[report] if report is not None else [])
        out._set(_filter=filter_folder)
        return out


def _names(what: str, names: Any) -> Sequence[str]:
    if isinstance(names, Names):
        return names
    accepted = "distinct strings of Unicode text, one for each id"
    if isinstance(names, (Mapping, Set)):
        # Ids are places: a set has none, and those of a dict need not be its values.
        raise InputError(what, Shown(f"a {type(names).__name__}"), "a list of names in the order of their ids")
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise InputError(what, names, accepted)
    names = list(names)
    if not names:
        raise InputError(what, Shown("none"), accepted)
    if not all(isinstance(name, str) for name in names):
        i = next(i for i, name in enumerate(names) if not isinstance(name, str))
        raise InputError(what, Shown(f"{shown(names[i])} ({type(names[i]).__name__}) at {i}"), accepted)
    if (at := _not_unicode(names)) is not None:
        raise InputError(what, Shown(f"{shown(names[at])} at {at}"), accepted)
    if len(set(names)) != len(names):
        first: dict[str, int] = {}
        for i, name in enumerate(names):
            if first.setdefault(name, i) != i:
                raise InputError(what, Shown(f"{shown(name)} at {first[name]} and again at {i}"), accepted)
    return names


def _not_unicode(names: Sequence[str]) -> int | None:
    """The first name that no file in UTF-8 can hold (half of a surrogate pair), or None."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        place = error.start
        for i, name in enumerate(names):
            if place < len(name):
                return i
            place -= len(name)
    return None


def _matrix(what: str, matrix: Any, num_entities: int) -> Tensor:
    accepted = f"float32, float16 or bfloat16 [{num_entities}, D], one row an entity, D at least 1"
    if isinstance(matrix, np.ma.MaskedArray):
        raise InputError(what, Shown("a masked array, whose mask nothing here reads"), accepted)
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind == "f" and matrix.dtype.itemsize in (2, 4):
        matrix = torch.from_numpy(np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("=")))
    if not isinstance(matrix, Tensor):
        raise InputError(what, Shown(type(matrix).__name__), accepted)
    if matrix.layout != torch.strided or matrix.is_meta or matrix.is_quantized:
        raise InputError(what, Shown(f"a tensor of layout {matrix.layout} on {matrix.device}"), accepted)
    if matrix.dtype not in FEATURE_DTYPES or matrix.ndim != 2 or len(matrix) != num_entities or not matrix.shape[1]:
        raise InputError(what, matrix, accepted)
    return matrix.detach()


def _present(what: str, present: Any, num_entities: int) -> Tensor:
    has = torch.as_tensor(present) if isinstance(present, (np.ndarray, list)) else present
    if not isinstance(has, Tensor) or has.dtype != torch.bool or has.shape != (num_entities,):
        raise InputError(what, has, f"bool [{num_entities}]")
    return has


def _pieces(x: Tensor) -> Iterator[Tensor]:
    return iter(x.split(max(1, PIECE // max(1, x[:1].numel()))))


def rows_present(matrix: Tensor) -> Tensor:
    """bool [E]: rows with anything but zeros (NaN counts)."""
    return (
        torch.cat([(piece != 0).any(1) for piece in _pieces(matrix)])
        if len(matrix)
        else torch.zeros(0, dtype=torch.bool)
    )


def _rows_with_bits(matrix: Tensor) -> Tensor:
    """bool [E]: rows that are not +0 throughout."""
    pieces = [piece.contiguous().view(torch.uint8).any(1) for piece in _pieces(matrix)]
    return torch.cat(pieces) if len(matrix) else torch.zeros(0, dtype=torch.bool)


def first_unusable(matrix: Tensor, present: Tensor) -> tuple[int, int] | None:
    """(row, column) of the first number in a row that is present which is not finite or above LARGEST; None where there
    is none.
    """
    begin = 0
    for piece in _pieces(matrix):
        fine = piece.abs() <= LARGEST  # False for NaN
        if not bool(fine.all()):
            fine |= ~present[begin : begin + len(piece), None].to(fine.device)
            bad = (~fine).nonzero()
            if len(bad):
                return begin + int(bad[0, 0]), int(bad[0, 1])
        begin += len(piece)
    return None


def unusable(matrix: Tensor, at: tuple[int, int]) -> str:
    """What stands at the place that `first_unusable` found."""
    return f"{float(matrix[at]):.6g} in row {at[0]}, column {at[1]}"


def _encoded(names: Sequence[str]) -> Iterator[bytes]:
    """Names in pieces of bytes, each name behind its length, so that no two lists of names have the same bytes."""
    iterator = iter(names)
    while block := list(islice(iterator, 1 << 16)):
        yield b"".join(
            b"%d:%s" % (len(name), name) for name in (name.encode("utf-8", "surrogatepass") for name in block)
        )


def _hash(pieces: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:32]


def _digest(*tensors: Tensor, without: Tensor | None = None) -> str:
    """Hash of dtypes, shapes and bytes: each PIECE bytes are hashed on a thread of their own, then their digests. Half
    precision counts as the float32 numbers that it holds.

    Args:
        without: ids of rows, rising, that count as zeros.
    """
    rows = np.empty(0, np.int64) if without is None else without.cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def hashed(x: Tensor, dtype: torch.dtype, width: int, begin: int) -> bytes:
            piece = x[begin : begin + PIECE // dtype.itemsize].to(dtype)
            first, end = (np.searchsorted(rows, i // width) for i in (begin, begin + len(piece) + width - 1))
            if end > first:
                piece = piece.clone()
            for row in rows[first:end].tolist():
                piece[max(0, row * width - begin) : max(0, (row + 1) * width - begin)] = 0
            return hashlib.sha256(piece.view(torch.uint8).numpy().data).digest()

        def parts() -> Iterator[bytes]:
            for x in tensors:
                dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
                yield repr((str(dtype), tuple(x.shape))).encode()
                data = x.detach().cpu().contiguous().reshape(-1)
                width = max(1, len(data) // max(1, len(x)))
                begins = range(0, max(1, len(data)), PIECE // dtype.itemsize)
                yield from pool.map(functools.partial(hashed, data, dtype, width), begins)

        return _hash(parts())
