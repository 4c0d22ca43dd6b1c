"""`corruption_loss` and the gradient of its table in plain torch: rows gathered for a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dhns_fast.ops import hal_eager
from dhns_fast.ops.rows import add_rows

if TYPE_CHECKING:
    from dhns_fast.ops.corruption import LossInputs, TableInputs

# Elements of a block's gathered rows: 16 MB of float32, a few times over.
BLOCK_ELEMENTS = 1 << 22


def _blocks(a: LossInputs | TableInputs) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(a.ids.shape[1] * a.query.shape[1], 1))
    for first in range(0, len(a.query), rows):
        yield slice(first, first + rows)


def _pairs(a: LossInputs | TableInputs, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block: the gathered rows, the rows scaled, and for distances the differences q − s∘e, all [b, C, D]."""
    rows = a.table[a.ids[part]]
    scaled = rows if a.scale is None else rows * a.scale[part, None]
    return rows, scaled, a.query[part, None] - scaled


def _direction(reduction: str, difference: Tensor) -> Tensor:
    """∂(sum of terms)/∂q of a distance (for l2 of half the sum); 0 where the difference is 0."""
    if reduction == "l1":
        return difference.sign()
    if reduction == "l2":
        return difference
    length = hal_eager.moduli(difference)
    length = torch.where(length > 0, length, 1.0)
    return difference / torch.cat([length, length], -1)


def loss(a: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, inner = (a.query.new_empty(a.ids.shape) for _ in range(2))
    for part in _blocks(a):
        _, scaled, difference = _pairs(a, part)
        if a.reduction == "dot":
            scores[part], inner[part] = (a.query[part, None] * scaled).sum(-1), 1.0
        elif a.reduction == "l2":
            distance = torch.linalg.vector_norm(difference, dim=-1)
            scores[part], inner[part] = -distance, torch.where(distance == 0, 0.0, -1 / distance)
        else:
            terms = difference.abs() if a.reduction == "l1" else hal_eager.moduli(difference)
            scores[part], inner[part] = -terms.sum(-1), -1.0
    scores += a.offset
    value, by_positive, by_negative = hal_eager.self_adversarial(scores[:, 0], scores[:, 1:], a.temperature)
    slope = torch.cat((by_positive[:, None], by_negative), 1) * inner
    by_query = a.query.new_empty(a.query.shape)
    by_scale = a.query.new_empty(0) if a.scale is None else a.query.new_empty(a.query.shape)
    for part in _blocks(a):
        rows, scaled, difference = _pairs(a, part)
        towards = scaled if a.reduction == "dot" else _direction(a.reduction, difference)
        by_query[part] = (slope[part, :, None] * towards).sum(1)
        if a.scale is not None:
            other = a.query[part, None] if a.reduction == "dot" else -towards
            by_scale[part] = (slope[part, :, None] * other * rows).sum(1)
    return value, by_query, slope, by_scale


def table_gradient(a: TableInputs) -> Tensor:
    out = a.table.new_zeros(a.table.shape)
    for part in _blocks(a):
        _, _, difference = _pairs(a, part)
        other = a.query[part, None] if a.reduction == "dot" else -_direction(a.reduction, difference)
        if a.scale is not None:
            other = other * a.scale[part, None]
        by_row = (a.grad * a.slope[part])[..., None] * other
        add_rows(out, a.ids[part].flatten(), by_row.flatten(0, 1))
    return out
