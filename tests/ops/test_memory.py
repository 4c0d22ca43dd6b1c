"""Memory is used again when the last tensor that sees it has gone, and not before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from dhns_fast import loss
from dhns_fast.ops import memory

CPU, SHAPE = torch.device("cpu"), (600, 512)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_used_again(dtype: torch.dtype) -> None:
    first = memory.empty(SHAPE, dtype, CPU)
    assert (first.shape, first.dtype, first.device, first.is_contiguous()) == (SHAPE, dtype, CPU, True)
    where = first.data_ptr()
    assert where % 64 == 0
    del first
    assert memory.empty(SHAPE, dtype, CPU).data_ptr() == where


@pytest.mark.parametrize(
    "hold", [lambda x: x[3:5].T, lambda x: x.detach(), lambda x: x.numpy(), lambda x: x.untyped_storage()]
)
def test_is_not_while_something_sees_it(hold: object) -> None:
    first = memory.empty(SHAPE, torch.float32, CPU)
    where, held = first.data_ptr(), hold(first)  # type: ignore[operator]
    del first
    gc.collect()
    assert memory.empty(SHAPE, torch.float32, CPU).data_ptr() != where
    del held
    assert where in {memory.empty(SHAPE, torch.float32, CPU).data_ptr() for _ in range(2)}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_BYTES", 3 << 20)
    results = [memory.empty((rows, 512), torch.float32, CPU) for rows in (600, 700, 800)]
    del results
    assert sum(block.nbytes for block in memory._kept.values()) <= 3 << 20
    assert memory.empty((4 << 20,), torch.float32, CPU).shape == (4 << 20,)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5), torch.float32), (SHAPE, torch.bfloat16), ((0, 7), torch.float32)]
)
def test_other_results_are_plain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = memory.empty(shape, dtype, CPU)
    assert (x.shape, x.dtype) == (shape, dtype)
    del x
    assert not memory._kept


def test_gradients_outlive_the_next_call() -> None:
    embeddings = [torch.randn(600, 512).requires_grad_() for _ in range(3)]
    generated = torch.randn(2, 2, 1, 600, 512)

    def gradients() -> tuple[torch.Tensor, ...]:
        value = loss.hal_from_embeddings("distmult", *embeddings, *generated, [0.1, 0.2], [1.0, 0.5], backend="cpu")
        return torch.autograd.grad(value, embeddings)

    first = gradients()
    copies = [x.clone() for x in first]
    generated.mul_(-2)
    second = gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
