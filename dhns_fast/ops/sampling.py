"""`torch.ops.dhns_fast.corrupt`: entities drawn from those that are no known answer of a query; `find_ranges`: where
these answers stand.

With the K answers k_0 < k_1 < ... of a query and u = ⌊draw · (E − K)⌋, the u-th entity that is none of them is
`u + #{i : k_i − i <= u}`. The answers of all queries stand one behind the other in one rising tensor, as
`answer + base` of their query (:class:`dhns_fast.data.filter.Direction`): those of query b from start[b] on, number[b]
of them. A query that knows every entity gets ⌊draw · E⌋, as nothing else is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops.backend import Implementation, Unfit
from dhns_fast.ops.operator import Operator


class RangesInputs(NamedTuple):
    values: Tensor  # int64 [n], rising
    lows: Tensor  # int64 [B]
    width: int
    backend: str = ""


class CorruptInputs(NamedTuple):
    draw: Tensor  # float64 [B, N], from 0 to below 1
    answers: Tensor  # int64 [n]
    start: Tensor  # int64 [B], as are number and base
    number: Tensor
    base: Tensor
    num_entities: int
    backend: str = ""


def _check_ranges(a: RangesInputs) -> None:
    checks.shapes(values=(a.values, "n"), lows=(a.lows, "B"))
    checks.whole("width", a.width, 1)
    checks.dtype(torch.int64, values=a.values, lows=a.lows)
    checks.on_device("values", a.values, lows=a.lows)


def _fake_ranges(a: RangesInputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.lows), torch.empty_like(a.lows)


def _native_ranges(a: RangesInputs) -> tuple[Tensor, Tensor]:
    out = _fake_ranges(a)
    torch.ops.dhns_fast_native.find_ranges(a.values, a.lows, a.width, *out)
    return out


def _eager_ranges(a: RangesInputs) -> tuple[Tensor, Tensor]:
    start, ends = torch.searchsorted(a.values, a.lows), a.lows + a.width
    # An end beyond the largest int64 comes out below its low: every value from there on is within.
    stop = torch.searchsorted(a.values, ends).masked_fill_(ends < a.lows, len(a.values))
    return start, stop - start


# Of each low, where the values from it to below low + width stand, and how many they are: int64 [B] both. No host sync.
# In C++ many searches go side by side: torch's take one after the other, which waits for memory at each step.
find_ranges = Operator(
    "find_ranges", RangesInputs, tuple[Tensor, Tensor], check=_check_ranges, fake=_fake_ranges,
    implementations=(Implementation(backends.CPU, _native_ranges), Implementation(backends.EAGER, _eager_ranges)),
)  # fmt: skip


def _check(a: CorruptInputs) -> None:
    checks.shapes(
        draw=(a.draw, "B N"), answers=(a.answers, "n"), start=(a.start, "B"), number=(a.number, "B"), base=(a.base, "B")
    )
    checks.whole("num_entities", a.num_entities, 1)
    checks.dtype(torch.float64, draw=a.draw)
    integers = {"answers": a.answers, "start": a.start, "number": a.number, "base": a.base}
    checks.dtype(torch.int64, **integers)
    checks.on_device("draw", a.draw, **integers)


def _look(a: CorruptInputs) -> None:
    bad = (a.start < 0) | (a.number < 0) | (a.number > a.num_entities) | (a.start > len(a.answers) - a.number)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        got = Shown(f"{int(a.number[row])} answers from {int(a.start[row])} on in row {row}")
        accepted = f"up to {a.num_entities}, within the {len(a.answers)} there are"
        raise InputError("start, number", got, accepted)
    if not bool(((a.draw >= 0) & (a.draw < 1)).all()):
        raise InputError("draw", Shown("a number outside of 0 to 1"), "at least 0 and below 1")


def free(draw: Tensor, count: Tensor, num_entities: int) -> tuple[Tensor, Tensor]:
    """⌊draw · (E − K)⌋ [B, N], and K [B], 0 of a query that knows everything."""
    count = torch.where(count == num_entities, 0, count)
    # float64: 53 random bits, and the product stays below E − K after rounding.
    return (draw * (num_entities - count).unsqueeze(1)).long(), count


def _eager(a: CorruptInputs) -> Tensor:
    u, count = free(a.draw, a.number, a.num_entities)
    low, high = torch.zeros_like(u), count.unsqueeze(1).expand_as(u)
    if not len(a.answers):
        return u
    for _ in range(len(a.answers).bit_length()):
        middle = (low + high) // 2
        place = (a.start.unsqueeze(1) + middle).clamp_(max=len(a.answers) - 1)
        below = (a.answers[place] - a.base.unsqueeze(1) - middle <= u) & (low < high)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return u + low


def _native(a: CorruptInputs) -> Tensor:
    out = torch.empty(a.draw.shape, dtype=torch.int64)
    if not torch.ops.dhns_fast_native.corrupt(a.draw, a.answers, a.start, a.number, a.base, a.num_entities, out):
        raise Unfit
    return out


corrupt = Operator(
    "corrupt",
    CorruptInputs,
    Tensor,
    check=_check,
    fake=lambda a: a.start.new_empty(a.draw.shape),
    look=_look,
    implementations=(Implementation(backends.CPU, _native, looks=True), Implementation(backends.EAGER, _eager)),
)
