"""Row-wise optimisers, written for reading, in float64: the oracle of the operator `row_update`.

Sources: Kingma & Ba, ICLR 2015 (Adam); Duchi et al., JMLR 2011 (Adagrad); Naumov et al., arXiv 1906.00091 (row-wise
Adagrad).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dhns_fast.reference.noise import MASK, philox


def row_update(
    table: Tensor,
    first: Tensor,
    second: Tensor | None,
    rows: Tensor,
    gradient: Tensor,
    method: str,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    correction: float = 1.0,
    epsilon: float = 1e-8,
    n3: float = 0.0,
) -> None:
    """Updates table `[E, D]` and its states in place, row by row; rows `[n]` may repeat, gradient `[n, D]`."""
    for row in rows.unique().tolist():
        x = table[row]
        g = gradient[rows == row].sum(0) + 3 * n3 * x * x.abs()
        if method == "lazy-adam":
            assert second is not None
            m, v = first[row], second[row]
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g**2)
            x -= rate * m / (v.sqrt() * correction + epsilon)
        else:
            s = first[row]
            s += g**2 if method == "adagrad" else (g**2).mean()
            x -= rate * g / (s.sqrt() + epsilon)


def round_stochastically(x: Tensor, rows: Tensor, seed: int, number: int) -> Tensor:
    """float32 `[n, D]`, the rows of a table that `rows` names, to bfloat16: up with the probability of what is cut
    off.
    """
    n, D = x.shape
    column = torch.arange(D)
    counter = torch.broadcast_tensors(
        column[None] // 8, rows[:, None] & MASK, rows[:, None] >> 32, torch.tensor(number)
    )
    words = torch.stack(philox((counter[0], counter[1], counter[2], counter[3]), (seed & MASK, seed >> 32 & MASK)))
    word = words.gather(0, (column % 8 // 2).expand(1, n, D))[0]
    noise = word >> 16 * (column % 2) & 0xFFFF
    bits = x.view(torch.int32).to(torch.int64) & MASK
    carried = torch.where(x.isnan(), bits | 0x400000, bits + noise) >> 16
    return torch.where(carried >= 1 << 15, carried - (1 << 16), carried).to(torch.int16).view(torch.bfloat16)
