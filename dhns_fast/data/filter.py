"""Known answers of queries, as compressed rows: what evaluation filters out and what corruption must avoid."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.data.rows import write_rows
from dhns_fast.errors import InputError, Shown

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


def pack(
    known: Tensor, relation: Tensor, answer: Tensor, num_entities: int, num_relations: int
) -> tuple[Tensor, Tensor | None]:
    """One int64 key a triple, ordered by (known, relation, answer), and the pairs that `key // num_entities` counts
    through.

    The pairs are `known · R + relation` themselves (None), or the sorted distinct ones where E·R·E does not fit in
    int64.
    """
    pair, pairs = known * num_relations + relation, None
    if num_entities * num_relations * num_entities >= INT64_END:
        pairs, pair = torch.unique(pair, return_inverse=True)
    return pair * num_entities + answer, pairs


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The answers of one side, grouped by query.

    Attributes:
        keys: int64 [G + 1], `known entity · R + relation` of the G queries that have answers, rising, then a key beyond
            every query: a search lands on a row at any rate, and that last row is empty.
        offsets: int64 [G + 2].
        ids: int32 [n] (int64 from 2³¹ entities on), the answers, rising within a group.
    """

    keys: Tensor
    offsets: Tensor
    ids: Tensor

    @classmethod
    def build(cls, known: Tensor, relation: Tensor, answer: Tensor, num_entities: int, num_relations: int) -> Direction:
        packed, pairs = pack(known, relation, answer, num_entities, num_relations)
        key = torch.unique(packed)
        group = key // num_entities if pairs is None else pairs[key // num_entities]
        ids = key % num_entities
        keys, counts = torch.unique_consecutive(group, return_counts=True)
        zero = counts.new_zeros(1)
        return cls(
            torch.cat([keys, keys.new_full((1,), num_entities * num_relations)]),
            torch.cat([zero, counts, zero]).cumsum(0),
            ids.to(torch.int32) if num_entities < 2**31 else ids,
        )

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
            kind = np.dtype(np.int32 if num_entities < 2**31 else np.int64)
            ids, counted = Path(spilt) / "ids", Path(spilt) / "counts"

            def keys() -> Iterator[np.ndarray]:
                with ids.open("wb") as ids_file, counted.open("wb") as counts_file:
                    for path in filter(Path.exists, paths):
                        rows = torch.from_numpy(np.fromfile(path, np.int64).reshape(-1, 3))
                        path.unlink()
                        known, relation, answer = (rows[:, i] for i in columns)
                        direction = cls.build(known, relation, answer, num_entities, num_relations)
                        direction.ids.numpy().tofile(ids_file)
                        direction.offsets.diff()[:-1].numpy().tofile(counts_file)
                        yield direction.keys[:-1].numpy()
                yield np.array([num_entities * num_relations])

            def offsets() -> Iterator[np.ndarray]:
                total = 0
                yield np.zeros(1, np.int64)
                for counts in _read_back(counted, np.dtype(np.int64)):
                    ends = counts.cumsum() + total
                    total = int(ends[-1])
                    yield ends
                yield np.array([total])

            files = [folder / f"{side}.{name}.npy" for name in ("keys", "offsets", "ids")]
            made = write_rows(files[0], keys(), width=None), write_rows(files[1], offsets(), width=None)
            return cls(*made, write_rows(files[2], _read_back(ids, kind), kind, None))

    def find(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(group, first position, number) of the answers of queries; the number is 0 for a query without answers. No
        host sync.
        """
        group = torch.searchsorted(self.keys, key)
        start, end = self.offsets[group], self.offsets[group + 1]
        return group, start, torch.where(self.keys[group] == key, end - start, 0)

    def to(self, device: torch.device | str) -> Direction:
        return Direction(self.keys.to(device), self.offsets.to(device), self.ids.to(device))


def _read_back(path: Path, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The numbers of a file, block by block."""
    for first in range(0, path.stat().st_size // dtype.itemsize, BLOCK):
        yield np.fromfile(path, dtype, BLOCK, offset=first * dtype.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class CSRFilter:
    """The known answers (h, r) → tails and (r, t) → heads of a set of triples, duplicates removed.

    Memory: 8 bytes a distinct triple, and 16 bytes a distinct (h, r) and (r, t) pair; built in a folder, what is looked
    at of the files.
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
                triples that are mapped too, memory stays below 16 bytes a triple, and below 300 MB, whatever their
                number. None: in memory.

        Raises:
            InputError: not of shape [n, 3], not integers, or an id out of range (the first such row is named).
        """
        num_entities, num_relations = (
            checks.count("num_entities", num_entities),
            checks.count("num_relations", num_relations),
        )
        table = as_triples(triples, num_entities, num_relations)
        sizes = num_entities, num_relations
        if folder is not None:
            tail = Direction.in_folder(Path(folder), "tail", table, (0, 1, 2), *sizes)
            return cls(*sizes, tail, Direction.in_folder(Path(folder), "head", table, (2, 1, 0), *sizes))
        h, r, t = table.unbind(1)
        return cls(*sizes, Direction.build(h, r, t, *sizes), Direction.build(t, r, h, *sizes))

    def tails(self, head: Tensor, relation: Tensor) -> Ragged:
        """Known tails of each (head [B], relation [B]), rising and unique; an unknown query has an empty row."""
        return self._answers("tail", head, relation)

    def heads(self, relation: Tensor, tail: Tensor) -> Ragged:
        """Known heads of each (relation [B], tail [B]), rising and unique; an unknown query has an empty row."""
        return self._answers("head", tail, relation)

    def side(self, side: Literal["tail", "head"]) -> Direction:
        """The grouped answers when `side` is asked for."""
        return self.tail if side == "tail" else self.head

    def to(self, device: torch.device | str) -> CSRFilter:
        return CSRFilter(self.num_entities, self.num_relations, self.tail.to(device), self.head.to(device))

    def _answers(self, side: Literal["tail", "head"], entity: Tensor, relation: Tensor) -> Ragged:
        rows = self.side(side)
        accepted = f"integers of shape [B] on {rows.keys.device}"
        known = "head" if side == "tail" else "tail"
        names = {known: as_integers(known, entity, accepted), "relation": as_integers("relation", relation, accepted)}
        checks.shapes(**{name: (ids, "B") for name, ids in names.items()})
        for name, ids in names.items():
            if ids.device != rows.keys.device:
                raise InputError(name, Shown(f"a tensor on {ids.device}"), accepted)
        entity, relation = names.values()
        bad = (entity < 0) | (entity >= self.num_entities) | (relation < 0) | (relation >= self.num_relations)
        _, start, count = rows.find(torch.where(bad, 0, entity * self.num_relations + relation))
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
        shift = (start - offsets[:-1]).repeat_interleave(count, output_size=total)
        return Ragged(offsets, rows.ids[shift + torch.arange(total, device=shift.device)].long())
