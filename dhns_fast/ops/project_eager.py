"""Linear views of rows of a feature matrix in plain torch: any device, any floating dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dhns_fast.ops.rows import add_rows
from dhns_fast.ops.score_eager import COLUMNS

if TYPE_CHECKING:
    from dhns_fast.ops.project import GradientInputs, ProjectInputs

# Rows of features that are projected at once.
PROJECTED_ROWS = 10 * COLUMNS


def views(a: ProjectInputs) -> Tensor:
    """Rows are the columns of products of one shape, as `dhns_fast.ops.score_eager` has them."""
    rows = a.features if a.ids is None else a.features[a.ids]
    if not len(rows):
        return rows.new_empty(0, len(a.weight))
    size = min(PROJECTED_ROWS, -(-len(rows) // COLUMNS) * COLUMNS)
    parts = list(rows.split(size))
    if kept := len(rows) % size:
        parts[-1] = F.pad(parts[-1], (0, 0, 0, size - kept))
    out = [torch.addmm(a.bias[:, None], a.weight, part.T).T for part in parts]
    return torch.cat(out)[: len(rows)]


def gradients(a: GradientInputs) -> tuple[Tensor, Tensor, Tensor]:
    rows = a.features if a.ids is None else a.features[a.ids]
    by_features = of_features(a, a.grad @ a.weight) if a.with_features else rows.new_empty(0)
    return a.grad.T @ rows, a.grad.sum(0), by_features


def of_features(a: GradientInputs, by_rows: Tensor) -> Tensor:
    """The gradient of the matrix [E, K] from that of its looked-up rows [n, K]."""
    if a.ids is None:
        return by_rows
    by_features = torch.zeros_like(a.features)
    add_rows(by_features, a.ids, by_rows)
    return by_features
