"""The order of an epoch without a permutation in memory: a keyed bijection of the row numbers, computed where it is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dhns_fast import checks

ROUNDS = 8
MASK32 = 0xFFFFFFFF
# Places computed together: a pass over a batch of 100 costs as much as one over thousands, 7 to 20 ms.
BLOCK = 1 << 14


class EpochOrder:
    """A pseudo-random order of 0 to n - 1 in which every number occurs once.

    A Feistel network of 8 rounds over the smallest even number of bits that hold n - 1 (at least 8), keyed by seed and
    epoch; what falls on n or above is sent through again until it does not (less than 4 times on average). Memory is
    that of the numbers asked for and 128 KB; the order depends on nothing else, so that any part of it is found at
    once, by any process. Source: Black & Rogaway, CT-RSA 2002, §3 and §4.

    Args:
        n: how many, below 2⁶².
        seed, epoch: name the order.
    """

    def __init__(self, n: int, seed: int = 0, epoch: int = 0) -> None:
        self.n, seed, epoch = checks.count("n", n, 0), checks.count("seed", seed, 0), checks.count("epoch", epoch, 0)
        checks.whole("n", self.n, most=2**62 - 1)
        self.half = max(4, -(-max(self.n - 1, 1).bit_length() // 2))
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        self.keys = torch.randint(1 << 32, (ROUNDS,), generator=generator).tolist()
        self._block: tuple[int, Tensor] | None = None  # the first place of the last block, and its numbers

    def __len__(self) -> int:
        return self.n

    def take(self, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Numbers at the places `first` to `first + count - 1`, as far as there are so many: int64."""
        end = min(first + count, self.n)
        if end - first >= BLOCK:
            return self._at(first, end, device)
        parts = [torch.empty(0, dtype=torch.int64, device=device)]
        for start in range(first // BLOCK * BLOCK, end, BLOCK):
            block = self._block  # read once: another thread may put in its own
            if block is None or block[0] != start or block[1].device != parts[0].device:
                block = self._block = start, self._at(start, min(start + BLOCK, self.n), device)
            parts.append(block[1][max(first - start, 0) : end - start])
        return torch.cat(parts)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The whole order in parts of `size`, the last one shorter."""
        return (self.take(first, size, device) for first in range(0, self.n, checks.count("size", size)))

    def _at(self, first: int, end: int, device: torch.device | str) -> Tensor:
        out = self._through(torch.arange(first, end, device=device))
        while bool((beyond := out >= self.n).any()):
            out[beyond] = self._through(out[beyond])
        return out

    def _through(self, x: Tensor) -> Tensor:
        mask = (1 << self.half) - 1
        left, right = x >> self.half, x & mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self.half | right


def _mixed(x: Tensor) -> Tensor:
    """32 bits of which each depends on all 32 of x: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK32
    return x ^ (x >> 16)
