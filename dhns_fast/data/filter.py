"""Known answers of queries, as compressed rows: what evaluation filters out and what corruption must avoid."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dhns_fast import checks, files
from dhns_fast.catalogue import SIDES, Side
from dhns_fast.data.rows import mapped, write_rows
from dhns_fast.errors import DataError, InputError, Shown
from dhns_fast.ops.sampling import find_ranges

# The columns of triples.
PARTS = ("head", "relation", "tail")
INT64_END = 2**63
# Triples looked at together where all of a large table are: 24 MB.
BLOCK = 1 << 20
# Triples sorted together, and ranges of entities told apart, where a filter is built in a folder.
PART, RANGES = 1 << 21, 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """B rows of ids of different lengths: row b is `ids[offsets[b]:offsets[b + 1]]`.

    Attributes:
        offsets: int64 [B + 1], from 0 to n, never falling.
        ids: int64 [n].
    """

    offsets: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def counts(self) -> Tensor:
        """Ids in each row, int64 [B]."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """The row that each id belongs to, int64 [n]."""
        index = torch.arange(len(self), device=self.offsets.device)
        return index.repeat_interleave(self.counts(), output_size=self.ids.numel())

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.offsets.to(device), self.ids.to(device))

    def keys(self, num_ids: int) -> Tensor:
        """`row · num_ids + id` of each id below `num_ids`, int64 [n]; rising where the ids of every row do."""
        return self.rows() * num_ids + self.ids

    @classmethod
    def of_keys(cls, keys: Tensor, num_rows: int, num_ids: int) -> Ragged:
        """The rows whose :meth:`keys` are given, int64 [n], rising."""
        edges = torch.arange(num_rows + 1, device=keys.device) * num_ids
        return cls(torch.searchsorted(keys, edges), keys % num_ids)

    def check(self, num_rows: int | None = None, num_ids: int | None = None) -> Ragged:
        """Returns itself, or raises InputError: dtypes, offsets, the number of rows, or an id outside 0 to `num_ids` -
        1.
        """
        for field, tensor in (("Ragged.offsets", self.offsets), ("Ragged.ids", self.ids)):
            checks.tensor(**{field: tensor})
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise InputError(field, tensor, "int64 of one dimension")
        checks.on_device("Ragged.offsets", self.offsets, **{"Ragged.ids": self.ids})
        if (
            not len(self.offsets)
            or self.offsets[0] != 0
            or self.offsets[-1] != len(self.ids)
            or bool((self.counts() < 0).any())
        ):
            ends = f"from {int(self.offsets[0])} to {int(self.offsets[-1])}" if len(self.offsets) else "none"
            accepted = f"offsets that start at 0, never fall and end at the number of ids, {len(self.ids)}"
            raise InputError("Ragged.offsets", Shown(ends), accepted)
        if num_rows is not None and len(self) != num_rows:
            raise InputError("Ragged", Shown(f"{len(self)} rows"), f"{num_rows}, one per query")
        if num_ids is not None:
            bad = (self.ids < 0) | (self.ids >= num_ids)
            if bool(bad.any()):
                at = int(bad.int().argmax())
                raise InputError("Ragged.ids", Shown(f"id {int(self.ids[at])} at position {at}"), f"0 to {num_ids - 1}")
        return self


def as_integers(what: str, value: Any, accepted: str) -> Tensor:
    """`value` (a tensor, an array of any byte order and strides, a list, a data frame) as an int64 tensor, or
    InputError.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(what, Shown("a masked array, whose mask nothing here reads"), accepted)
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
            if array.dtype.kind in "iu" or not array.size:
                array = array.astype(np.int64, order="C", casting="unsafe" if not array.size else "same_kind")
            table = torch.from_numpy(array)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # ragged, strings, objects, unsigned beyond int64
            got = Shown(f"{value.dtype} {list(value.shape)}") if isinstance(value, np.ndarray) else value
            raise InputError(what, got, accepted) from None
    else:
        table = value
    if table.layout != torch.strided or table.is_meta or table.is_quantized:
        raise InputError(what, Shown(f"a tensor of layout {table.layout} on {table.device}"), accepted)
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise InputError(what, table, accepted)
    return table.to(torch.int64)


def as_ids(what: str, value: Any, accepted: str, end: int) -> Tensor:
    """Distinct ids from 0 to `end` - 1, rising, int64 [n] on the CPU, or InputError."""
    ids = as_integers(what, value, accepted).cpu()
    if ids.ndim != 1:
        raise InputError(what, ids, accepted)
    ids = ids.unique()
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < end:
        raise InputError(what, Shown(f"ids from {ids[0]} to {ids[-1]}"), f"ids from 0 to {end - 1}")
    return ids


def as_triples(triples: Any, num_entities: int, num_relations: int, what: str = "triples") -> Tensor:
    """Triples as one int64 [n, 3] tensor with every id in range.

    Args:
        triples: an [n, 3] tensor, array or list of (head, relation, tail), or a list or tuple of such tensors or
            arrays, to be joined.
        what: the argument's name, for the message of the InputError.
    """
    if isinstance(triples, Sequence) and len(triples) and getattr(triples[0], "ndim", 0) == 2:
        return torch.cat(
            [as_triples(part, num_entities, num_relations, f"{what}[{i}]") for i, part in enumerate(triples)]
        )
    accepted = "integers of shape [n, 3]"
    table = as_integers(what, triples, accepted)
    if table.numel() == 0:
        return table.new_zeros((0, 3))
    if table.ndim != 2 or table.shape[1] != 3:
        raise InputError(what, table, accepted)
    # Block by block: a memory-mapped table of billions of ids is never in memory as a whole.
    end = torch.tensor([num_entities, num_relations, num_entities], device=table.device)
    for first, block in zip(range(0, len(table), BLOCK), table.split(BLOCK), strict=True):
        bad = ((block < 0) | (block >= end)).any(1)
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise InputError(
                what,
                Shown(f"row {first + row} (head, relation, tail) = {tuple(block[row].tolist())}"),
                f"entities 0 to {num_entities - 1}, relations 0 to {num_relations - 1}",
            )
    return table


def as_queries(queries: Any, num_entities: int, num_relations: int, parts: Sequence[str] = PARTS) -> Tensor:
    """Triples int64 [n, 3] on the CPU, each with one -1, for the one of `parts` that it asks for; or InputError."""
    accepted = "integers of shape [n, 3], -1 for what is asked for"
    table = as_integers("queries", queries, accepted).cpu()
    if table.ndim != 2 or table.shape[1] != 3:
        raise InputError("queries", table, accepted)
    unknown = table == -1
    asked = unknown & torch.tensor([part in parts for part in PARTS], device="cpu")
    if bool((bad := (unknown.sum(1) != 1) | (asked.sum(1) != 1)).any()):
        found = Shown(f"{table[bad][0].tolist()} (-1: unknown)")
        raise InputError("queries", found, f"triples that ask for a {' or a '.join(parts)}, one of them each")
    as_triples(table.masked_fill(unknown, 0), num_entities, num_relations, "queries")
    return table


def pack(
    known: Tensor, relation: Tensor, answer: Tensor, num_entities: int, num_relations: int
) -> tuple[Tensor, Tensor | None]:
    """One int64 key a triple, ordered by (known, relation, answer), and the pairs that `key // num_entities` counts
    through.

    The pairs are `known · R + relation` themselves (None), or the sorted distinct ones where E·R·E does not fit in
    int64.
    """
    # In one tensor: at millions of triples each further one would be seen in what the process takes.
    key, pairs = torch.mul(known, num_relations).add_(relation), None
    if num_entities * num_relations * num_entities >= INT64_END:
        pairs, key = torch.unique(key, return_inverse=True)
    return key.mul_(num_entities).add_(answer), pairs


def _rising(keys: Tensor) -> Tensor:
    """Distinct keys, rising; those given are overwritten on a CPU."""
    if keys.device.type != "cpu":
        return torch.unique(keys)
    # In place: torch's own sorts into a second tensor, with a third of places.
    keys.numpy().sort()
    repeated = keys[1:] == keys[:-1]
    if not bool(repeated.any()):
        return keys
    return keys[torch.cat([repeated.new_zeros(1), repeated]).logical_not_()]


class Answers(NamedTuple):
    """Where the answers of queries stand in :class:`Direction`'s `packed`: number[b] of them from start[b] on, base[b]
    more than the entities; the number is 0 for a query without answers. int64 [B] each.
    """

    start: Tensor
    number: Tensor
    base: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The answers of one side, grouped by query.

    Attributes:
        packed: int64 [n], rising: `code · E + answer`, where `code` is the query's key, `known entity · R + relation`,
            or its place in `codes`.
        codes: None; where E·R·E does not fit in int64, the keys that have answers, int64 [G], rising.
        num_entities: E.
    """

    packed: Tensor
    codes: Tensor | None
    num_entities: int

    @classmethod
    def build(cls, known: Tensor, relation: Tensor, answer: Tensor, num_entities: int, num_relations: int) -> Direction:
        packed, codes = pack(known, relation, answer, num_entities, num_relations)
        return cls(_rising(packed), codes, num_entities)

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        side: str,
        triples: Tensor,
        columns: tuple[int, int, int],
        num_entities: int,
        num_relations: int,
    ) -> Direction:
        """The same out of core: triples are sorted into files by ranges of the known entity, then each range by
        itself.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Ranges of equal numbers of triples, up to a hub that has more of its own.
        width = max(1, -(-num_entities // RANGES))
        step = min(BLOCK // 4, max(1 << 14, len(triples) // 64))
        counts = torch.zeros(-(-num_entities // width), dtype=torch.int64)
        for block in triples.split(step):
            counts += (block[:, columns[0]] // width).bincount(minlength=len(counts))
        size = min(PART, max(1, len(triples) // 32))
        part = (counts.cumsum(0) - counts) // size
        with tempfile.TemporaryDirectory(dir=folder) as spilt:
            paths = [Path(spilt) / str(i) for i in range(int(part[-1]) + 1)]
            for block in triples.split(step):
                of = part[block[:, columns[0]] // width]
                rows, ends = block[of.argsort(stable=True)].numpy(), of.bincount(minlength=len(paths)).cumsum(0)
                for path, first, end in zip(paths, [0, *ends.tolist()], ends.tolist(), strict=False):
                    if end > first:
                        with path.open("ab") as file:
                            rows[first:end].tofile(file)
            codes = Path(spilt) / "codes"

            def packed() -> Iterator[np.ndarray]:
                before = 0
                with codes.open("wb") as codes_file:
                    for path in filter(Path.exists, paths):
                        rows = torch.from_numpy(np.fromfile(path, np.int64).reshape(-1, 3))
                        path.unlink()
                        known, relation, answer = (rows[:, i] for i in columns)
                        made = cls.build(known, relation, answer, num_entities, num_relations)
                        if made.codes is not None:
                            # Places among the codes of all parts.
                            made.packed.add_(before * num_entities)
                            before += len(made.codes)
                            made.codes.numpy().tofile(codes_file)
                        yield made.packed.numpy()

            found = write_rows(folder / f"{side}.npy", packed(), width=None)
            if num_entities * num_relations * num_entities < INT64_END:
                return cls(found, None, num_entities)
            return cls(found, write_rows(folder / f"{side}.codes.npy", _read_back(codes), width=None), num_entities)

    @classmethod
    def mapped(cls, folder: Path, side: str, num_entities: int, num_relations: int) -> Direction:
        """What `in_folder` has left.

        Raises:
            DataError: a file is missing or not of this form.
        """
        paths = [folder / f"{side}.npy"]
        if num_entities * num_relations * num_entities >= INT64_END:
            paths.append(folder / f"{side}.codes.npy")
        found = []
        for path in paths:
            try:
                x = mapped(path)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(path, f"cannot be read: {str(error).splitlines()[0]}") from None
            if x.dtype != torch.int64 or x.ndim != 1:
                raise DataError(path, f"is {list(x.shape)} {x.dtype}; accepted: one column of int64")
            found.append(x)
        return cls(found[0], found[1] if len(found) > 1 else None, num_entities)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def ids(self) -> Tensor:
        """The answers of all queries, one behind the other, rising within each: int64 [n], made when asked for."""
        return self.packed % self.num_entities

    def groups(self) -> tuple[Tensor, Tensor]:
        """The keys of the queries that have answers, rising, and how many each has: int64 [G] twice, made when asked
        for.
        """
        codes, counts = torch.unique_consecutive(self.packed // self.num_entities, return_counts=True)
        return codes if self.codes is None else self.codes, counts

    def find(self, key: Tensor) -> Answers:
        """The answers of queries by their keys, int64 [B], `known entity · R + relation`. No host sync."""
        code, there = key, None
        if self.codes is not None:
            code = torch.searchsorted(self.codes, key)
            there = code < len(self.codes)
            if len(self.codes):
                there &= self.codes[code.clamp(max=len(self.codes) - 1)] == key
        base = code * self.num_entities
        start, count = find_ranges(self.packed, base, self.num_entities)
        return Answers(start, count if there is None else torch.where(there, count, 0), base)

    def to(self, device: torch.device | str) -> Direction:
        return Direction(
            self.packed.to(device), None if self.codes is None else self.codes.to(device), self.num_entities
        )


def _read_back(path: Path) -> Iterator[np.ndarray]:
    """The int64 of a file, block by block."""
    for first in range(0, path.stat().st_size // 8, BLOCK):
        yield np.fromfile(path, np.int64, BLOCK, offset=first * 8)


@dataclass(frozen=True, slots=True, eq=False)
class CSRFilter:
    """The known answers (h, r) → tails and (r, t) → heads of a set of triples, duplicates removed.

    Memory: 16 bytes a distinct triple, 8 for each side (and 8 a distinct (h, r) and (r, t) pair where E·R·E is beyond
    int64); built in a folder, what is looked at of the files.
    """

    num_entities: int
    num_relations: int
    tail: Direction
    head: Direction

    @classmethod
    def from_triples(
        cls, triples: Any, num_entities: int, num_relations: int, folder: str | Path | None = None
    ) -> CSRFilter:
        """Builds the filter by sorting, on the device of the triples.

        Args:
            triples: int [n, 3] (head, relation, tail), a tensor, array or list; or a list of such tensors or arrays,
                joined.
            folder: build it part by part in files of this folder (24 bytes a triple for a while) and map them: with
                triples that are mapped too, memory stays below 300 MB whatever their number. None: in memory.

        Raises:
            InputError: not of shape [n, 3], not integers, or an id out of range (the first such row is named).
        """
        num_entities, num_relations = (
            checks.count("num_entities", num_entities),
            checks.count("num_relations", num_relations),
        )
        table = as_triples(triples, num_entities, num_relations)
        sizes = num_entities, num_relations
        checks.instance((str, Path), "a path, or None", folder=folder)
        if folder is not None:
            files.make_folder(Path(folder))
            tail = Direction.in_folder(Path(folder), "tail", table, (0, 1, 2), *sizes)
            return cls(*sizes, tail, Direction.in_folder(Path(folder), "head", table, (2, 1, 0), *sizes))
        h, r, t = table.unbind(1)
        return cls(*sizes, Direction.build(h, r, t, *sizes), Direction.build(t, r, h, *sizes))

    @classmethod
    def mapped(cls, folder: str | Path, num_entities: int, num_relations: int) -> CSRFilter:
        """A filter that was built in a folder, mapped.

        Raises:
            DataError: its files are missing or damaged.
        """
        sizes = num_entities, num_relations
        tail, head = (Direction.mapped(Path(folder), side, *sizes) for side in SIDES)
        return cls(*sizes, tail, head)

    @property
    def device(self) -> torch.device:
        return self.tail.device

    def tails(self, head: Tensor, relation: Tensor) -> Ragged:
        """Known tails of each (head [B], relation [B]), rising and unique; an unknown query has an empty row."""
        return self.answers("tail", head, relation)

    def heads(self, relation: Tensor, tail: Tensor) -> Ragged:
        """Known heads of each (relation [B], tail [B]), rising and unique; an unknown query has an empty row."""
        return self.answers("head", tail, relation)

    def side(self, side: Side) -> Direction:
        """The grouped answers when `side` is asked for."""
        checks.one_of("side", side, SIDES)
        return self.tail if side == "tail" else self.head

    def to(self, device: torch.device | str) -> CSRFilter:
        return CSRFilter(self.num_entities, self.num_relations, self.tail.to(device), self.head.to(device))

    def answers(self, side: Side, entity: Tensor, relation: Tensor) -> Ragged:
        """:meth:`tails` or :meth:`heads`, by the side that is asked for, of (known entity [B], relation [B])."""
        rows = self.side(side)
        accepted = f"integers of shape [B] on {rows.device}"
        known = "head" if side == "tail" else "tail"
        names = {known: as_integers(known, entity, accepted), "relation": as_integers("relation", relation, accepted)}
        checks.shapes(**{name: (ids, "B") for name, ids in names.items()})
        for name, ids in names.items():
            if ids.device != rows.device:
                raise InputError(name, Shown(f"a tensor on {ids.device}"), accepted)
        entity, relation = names.values()
        bad = (entity < 0) | (entity >= self.num_entities) | (relation < 0) | (relation >= self.num_relations)
        start, count, base = rows.find(torch.where(bad, 0, entity * self.num_relations + relation))
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        # The one host sync of a query: the size of the answer, and whether the ids were in range.
        total, wrong = torch.stack([offsets[-1], bad.any()]).tolist()
        if wrong:
            row = int(bad.int().argmax())
            raise InputError(
                "query",
                Shown(f"row {row} ({known}, relation) = ({int(entity[row])}, {int(relation[row])})"),
                f"entities 0 to {self.num_entities - 1}, relations 0 to {self.num_relations - 1}",
            )
        shift, base = (x.repeat_interleave(count, output_size=total) for x in (start - offsets[:-1], base))
        return Ragged(offsets, rows.packed[shift.add_(torch.arange(total, device=shift.device))] - base)
