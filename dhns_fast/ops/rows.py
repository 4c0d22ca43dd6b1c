"""Sums into rows of a table."""

from __future__ import annotations

from torch import Tensor


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index[k]] += rows[k], in one order on every device: CUDA's index_add_ adds as its threads come, and so does
    the CPU's index_put_.
    """
    if table.device.type == "cpu":
        table.index_add_(0, index, rows)
    else:
        table.index_put_((index,), rows, accumulate=True)
