"""Philox-4x32-10 and Box–Muller, written for reading: the oracle of the noise operator.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32: four int64 tensors that hold 32-bit counters, and two 32-bit key words, to four 32-bit
    words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product has 64 bits: as a signed number it may wrap, its bits are right all the same.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32 & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of 32-bit words to two of normals: u₁ in (0, 1] and u₂ in [0, 1) are the words' upper 24 bits."""
    u1, u2 = ((first >> 8) + 1).to(dtype) * 2.0**-24, (second >> 8).to(dtype) * 2.0**-24
    radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
    return radius * angle.cos(), radius * angle.sin()


def philox_normal(
    seed: int,
    stream: int,
    modality: int,
    row_offset: int,
    step: int,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Normals [rows, columns]; each depends on the seed and its own address alone, see `dhns_fast.ops.noise`."""
    row = (row_offset + torch.arange(rows))[:, None]
    quad = torch.arange(-(-columns // 4))[None, :]
    last = torch.tensor(modality << 18 | step << 2 | stream)
    counter = torch.broadcast_tensors(quad, row & MASK, row >> 32, last)
    w0, w1, w2, w3 = philox((counter[0], counter[1], counter[2], counter[3]), (seed & MASK, seed >> 32 & MASK))
    normals = torch.stack((*box_muller(w0, w1, dtype), *box_muller(w2, w3, dtype)), -1)
    return normals.flatten(1)[:, :columns]
