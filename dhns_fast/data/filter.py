"""Known answers of queries, as compressed rows: what evaluation filters out and what corruption must avoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dhns_fast.errors import InputError

INT64_END = 2**63


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
        """Returns itself, or raises InputError: dtypes, offsets, the number of rows, or an id outside 0 to `num_ids` - 1."""
        for field, tensor in (("offsets", self.offsets), ("ids", self.ids)):
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise InputError(f"Ragged.{field}: found {tensor.dtype} of shape {tuple(tensor.shape)}; accepted: int64 of one dimension")
        if self.offsets.device != self.ids.device:
            raise InputError(f"Ragged: offsets are on {self.offsets.device}, ids on {self.ids.device}; accepted: one device")
        if not len(self.offsets) or self.offsets[0] != 0 or self.offsets[-1] != len(self.ids) or bool((self.counts() < 0).any()):
            raise InputError(
                f"Ragged.offsets: accepted are offsets that start at 0, never fall and end at the number of ids, {len(self.ids)}"
            )
        if num_rows is not None and len(self) != num_rows:
            raise InputError(f"Ragged: found {len(self)} rows; accepted: {num_rows}, one per query")
        if num_ids is not None:
            bad = (self.ids < 0) | (self.ids >= num_ids)
            if bool(bad.any()):
                at = int(bad.int().argmax())
                raise InputError(f"Ragged.ids: id {int(self.ids[at])} at position {at}; accepted: 0 to {num_ids - 1}")
        return self


def as_triples(triples: Any, num_entities: int, num_relations: int, what: str = "triples") -> Tensor:
    """Triples as one int64 [n, 3] tensor with every id in range.

    Args:
        triples: an [n, 3] tensor, array or list of (head, relation, tail), or a list or tuple of such tensors or arrays, to be joined.
        what: the argument's name, for the message of the InputError.
    """
    if isinstance(triples, Sequence) and len(triples) and getattr(triples[0], "ndim", 0) == 2:
        return torch.cat([as_triples(part, num_entities, num_relations, f"{what}[{i}]") for i, part in enumerate(triples)])
    table = torch.as_tensor(triples)
    if table.numel() == 0:
        return table.new_zeros((0, 3), dtype=torch.int64)
    if table.ndim != 2 or table.shape[1] != 3 or table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise InputError(f"{what}: found {table.dtype} of shape {tuple(table.shape)}; accepted: integers of shape (n, 3)")
    table = table.to(torch.int64)
    end = torch.tensor([num_entities, num_relations, num_entities], device=table.device)
    bad = ((table < 0) | (table >= end)).any(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise InputError(
            f"{what}: row {row} is (head, relation, tail) = {tuple(table[row].tolist())}; "
            f"accepted: entities 0 to {num_entities - 1}, relations 0 to {num_relations - 1}"
        )
    return table


def pack(known: Tensor, relation: Tensor, answer: Tensor, num_entities: int, num_relations: int) -> tuple[Tensor, Tensor | None]:
    """One int64 key a triple, ordered by (known, relation, answer), and the pairs that `key // num_entities` counts through.

    The pairs are `known · R + relation` themselves (None), or the sorted distinct ones where E·R·E does not fit in int64.
    """
    pair, pairs = known * num_relations + relation, None
    if num_entities * num_relations * num_entities >= INT64_END:
        pairs, pair = torch.unique(pair, return_inverse=True)
    return pair * num_entities + answer, pairs


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The answers of one side, grouped by query.

    Attributes:
        keys: int64 [G + 1], `known entity · R + relation` of the G queries that have answers, rising, then a key beyond every
            query: a search lands on a row at any rate, and that last row is empty.
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

    def find(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(group, first position, number) of the answers of queries; the number is 0 for a query without answers. No host sync."""
        group = torch.searchsorted(self.keys, key)
        start, end = self.offsets[group], self.offsets[group + 1]
        return group, start, torch.where(self.keys[group] == key, end - start, 0)

    def to(self, device: torch.device | str) -> Direction:
        return Direction(self.keys.to(device), self.offsets.to(device), self.ids.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class CSRFilter:
    """The known answers (h, r) → tails and (r, t) → heads of a set of triples, duplicates removed.

    Memory: 8 bytes a distinct triple, and 16 bytes a distinct (h, r) and (r, t) pair.
    """

    num_entities: int
    num_relations: int
    tail: Direction
    head: Direction

    @classmethod
    def from_triples(cls, triples: Any, num_entities: int, num_relations: int) -> CSRFilter:
        """Builds the filter by sorting, on the device of the triples.

        Args:
            triples: int [n, 3] (head, relation, tail), a tensor, array or list; or a list of such tensors or arrays, joined.

        Raises:
            InputError: not of shape [n, 3], not integers, or an id out of range (the first such row is named).
        """
        h, r, t = as_triples(triples, num_entities, num_relations).unbind(1)
        build = Direction.build
        return cls(num_entities, num_relations, build(h, r, t, num_entities, num_relations), build(t, r, h, num_entities, num_relations))

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
        if entity.shape != relation.shape or entity.ndim != 1:
            raise InputError(f"query: entities of shape {tuple(entity.shape)}, relations {tuple(relation.shape)}; accepted: both [B]")
        bad = (entity < 0) | (entity >= self.num_entities) | (relation < 0) | (relation >= self.num_relations)
        rows = self.side(side)
        _, start, count = rows.find(entity.long() * self.num_relations + relation)
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        # The one host sync of a query: the size of the answer, and whether the ids were in range.
        total, wrong = torch.stack([offsets[-1], bad.any()]).tolist()
        if wrong:
            row = int(bad.int().argmax())
            raise InputError(
                f"query: row {row} is (entity, relation) = ({int(entity[row])}, {int(relation[row])}); "
                f"accepted: entities 0 to {self.num_entities - 1}, relations 0 to {self.num_relations - 1}"
            )
        shift = (start - offsets[:-1]).repeat_interleave(count, output_size=total)
        return Ragged(offsets, rows.ids[shift + torch.arange(total, device=shift.device)].long())
