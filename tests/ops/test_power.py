"""Sums of powers against plain torch in float64: value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.power import power_sum

REASON = backends.CPU.why_not(torch.device("cpu"))
BACKENDS = ["eager", *([] if REASON else ["cpu"])]


def reference(x: Tensor, exponent: int) -> Tensor:
    return (x.abs() ** exponent).sum()


def run(function: Any, x: Tensor, exponent: int, *more: Any) -> list[Tensor]:
    x = x.detach().requires_grad_()
    value = function(x, exponent, *more)
    return [value.detach(), *torch.autograd.grad(0.7 * value, x)]


@pytest.mark.parametrize("exponent", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (7, 5), (3, 4097), (600, 33)])
def test_agrees_with_torch(
    shape: tuple[int, ...], backend: str, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = run(reference, x.double(), exponent)
    empty, new_empty = memory.empty, Tensor.new_empty
    monkeypatch.setattr(memory, "empty", lambda *a: empty(*a).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(math.nan))
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for a, b in zip(run(power_sum, x.to(dtype), exponent, backend), want, strict=True):
            torch.testing.assert_close(a, b.to(dtype), rtol=tolerance, atol=0)


@pytest.mark.parametrize("exponent", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf, -math.inf, 3e38])
def test_special_values_are_torchs(value: float, backend: str, exponent: int) -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    x[17] = value
    for a, b in zip(run(power_sum, x, exponent, backend), run(reference, x, exponent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: power_sum(x, 3, backend), (x,))


def test_operator_contract() -> None:
    x = torch.randn(30, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.dhns_fast.power_sum.default, (x, 3))
    compiled = torch.compile(lambda x, p: power_sum(x, p), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, 3), run(power_sum, x, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
def test_threads_do_not_change_the_result() -> None:
    threads, x, results = torch.get_num_threads(), torch.randn(900, 300), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(power_sum, x, 3, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refused() -> None:
    with pytest.raises(InputError, match="exponent: got 4; accepted: 2, 3"):
        power_sum(torch.ones(2), 4)
    with pytest.raises(InputError, match=r"x: got torch\.int64"):
        power_sum(torch.ones(2).long(), 2)
