"""Rows of a table: sums into them, and which of them ids name."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index[k]] += rows[k], in one order on every device: CUDA's index_add_ adds as its threads come, and so does
    the CPU's index_put_.
    """
    if table.device.type == "cpu":
        table.index_add_(0, index, rows)
    else:
        table.index_put_((index,), rows, accumulate=True)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct ones of int64 `[n]`, rising; the place of each id among them).

    Elsewhere than on a CPU their number would have to be waited for: there are n, the last of them again and again.
    """
    return ids.unique(return_inverse=True) if ids.device.type == "cpu" else distinct_of_fixed_shape(ids)


def distinct_of_fixed_shape(ids: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`distinct` without a shape that depends on values."""
    ordered, order = ids.sort()
    place = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0)
    # Equal ids write the same to the same place.
    found = ordered[-1:].repeat(len(ids)).scatter_(0, place, ordered)
    return found, torch.empty_like(ids).scatter_(0, order, place)
