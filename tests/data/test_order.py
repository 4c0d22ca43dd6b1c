from __future__ import annotations

import pytest
import torch

from dhns_fast.data.order import EpochOrder
from dhns_fast.errors import InputError


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 1000, 4096, 70_001])
def test_every_number_once_and_any_part_at_once(n: int) -> None:
    order = EpochOrder(n, seed=3)
    whole = order.take(0, n)
    assert torch.equal(whole.sort().values, torch.arange(n))
    assert torch.equal(torch.cat([*order.batches(97), whole[:0]]), whole)
    assert torch.equal(order.take(n // 3, 5), whole[n // 3 : n // 3 + 5])
    assert len(order) == n


def test_orders_differ_by_seed_and_epoch_and_look_random() -> None:
    n = 20_000
    orders = [EpochOrder(n, seed, epoch).take(0, n) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for x in orders:
        # Of a random order: fixed points are Poisson of mean 1, ascents half, places uncorrelated with numbers.
        assert int((x == torch.arange(n)).sum()) < 8
        assert abs(int((x.diff() > 0).sum()) - n / 2) < 5 * (n / 12) ** 0.5
        assert abs(float(torch.corrcoef(torch.stack([x.double(), torch.arange(n).double()]))[0, 1])) < 5 / n**0.5
        buckets = (x.view(100, -1) // 200).flatten() + 100 * torch.arange(100).repeat_interleave(200)
        chi = (buckets.bincount(minlength=10_000) - 2).square().sum() / 2
        assert abs(float(chi) - 99 * 99) < 5 * (2 * 99 * 99) ** 0.5
    assert all(int((orders[i] == orders[j]).sum()) < 8 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(orders[0], EpochOrder(n, 0, 0).take(0, n))


def test_huge_numbers_take_no_memory() -> None:
    order = EpochOrder(2**61 + 5, seed=1)
    out = order.take(2**60, 1000)
    assert len(out.unique()) == 1000
    assert int(out.min()) >= 0
    assert int(out.max()) > 2**59
    for n in (-1, 2**62, 1.5, True):
        with pytest.raises(InputError, match=r"^n: got "):
            EpochOrder(n)  # type: ignore[arg-type]
