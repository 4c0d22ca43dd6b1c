"""Linear views of features against the oracle in float64: value, gradients, equal rows, and what must be refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.project import project, project_gradient
from dhns_fast.reference.models import project as reference

REASON = backends.CPU.why_not(torch.device("cpu"))
BACKENDS = ["eager", *([] if REASON else ["cpu"])]
# E, K, D, and how many rows are taken: none, some, and with a table that is larger than what is projected at once.
SHAPES = [(1, 1, 1, None), (7, 5, 3, 4), (9, 33, 32, 0), (300, 130, 17, 500), (2100, 40, 64, None), (50, 32, 1, 70)]


def case(E: int, K: int, D: int, n: int | None, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(E + K + D)
    shapes = (E, K), (D, K), (D,)
    # In float64 the numbers that float32 has, rounded.
    x, w, b = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in shapes)
    return x, None if n is None else torch.randint(E, (n,), generator=g), w, b


def run(function: Any, x: Tensor, ids: Tensor | None, w: Tensor, b: Tensor, *more: Any) -> list[Tensor]:
    views = function(x, ids, w, b, *more)
    cotangent = torch.randn(views.shape, generator=torch.Generator().manual_seed(1))
    return [views.detach(), *torch.autograd.grad(views, (x, w, b), cotangent.to(views.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("E", "K", "D", "n"), SHAPES)
def test_agrees_with_the_oracle(
    E: int, K: int, D: int, n: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(reference, *case(E, K, D, n))
    empty, new_empty = memory.empty, Tensor.new_empty
    monkeypatch.setattr(memory, "empty", lambda *a: empty(*a).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(math.nan))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = run(project, *case(E, K, D, n, dtype), backend)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            assert a.dtype == dtype
            assert not a.numel() or (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_gradcheck(backend: str, with_ids: bool) -> None:
    x, ids, w, b = case(4, 3, 5, 6 if with_ids else None)
    assert torch.autograd.gradcheck(lambda x, w, b: project(x, ids, w, b, backend), (x, w, b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_come_out_equal(dtype: torch.dtype, backend: str) -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        E, K, D = (int(torch.randint(1, high, (1,), generator=g)) for high in (900, 60, 90))
        x, _, w, b = (y.detach() if isinstance(y, Tensor) else y for y in case(1, K, D, None, dtype))
        views = project(x.expand(E, K).contiguous(), None, w, b, backend)
        assert torch.equal(views, views[:1].expand(E, D))


@pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
def test_a_row_is_the_same_wherever_it_stands_on_cpu() -> None:
    x, ids, w, b = case(300, 140, 50, 77, torch.float32)
    assert torch.equal(project(x, ids, w, b, "cpu"), project(x, None, w, b, "cpu")[ids])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_stay_in_their_row(value: float, backend: str) -> None:
    x, _, w, b = case(20, 9, 5, None, torch.float32)
    expected = project(x, None, w, b, backend).detach()
    with torch.no_grad():
        x[7, 3] = value
    found = project(x, None, w, b, backend).detach()
    torch.testing.assert_close(found[7], reference(x[7:8], None, w, b)[0].detach(), equal_nan=True)
    others = torch.arange(20) != 7
    assert torch.equal(found[others], expected[others])


@pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
def test_threads_do_not_change_the_result() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(project, *case(700, 140, 70, 1111, torch.float32), "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_eager(dtype: torch.dtype) -> None:
    x, ids, w, b = case(20, 9, 5, 30, dtype)
    want = reference(*(y.double() if y.is_floating_point() else y for y in (x, ids, w, b)))
    assert (project(x, ids, w, b).double() - want).abs().max() < 0.2


def test_operator_contract() -> None:
    x, ids, w, b = case(7, 5, 3, 4, torch.float32)
    torch.library.opcheck(torch.ops.dhns_fast.project.default, (x, ids, w, b))
    compiled = torch.compile(lambda *given: project(*given), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, x, ids, w, b), run(project, x, ids, w, b), strict=True):
        assert torch.equal(one, other)


GIVEN: dict[str, Any] = {"features": torch.zeros(5, 3), "ids": torch.tensor([4, 0]), "weight": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(5)}, r"features: got shape \[5\]; accepted: \[E, K\]"),
        ({"features": torch.zeros(5, 3).long()}, "features: got torch.int64"),
        ({"weight": torch.zeros(2, 4)}, r"weight: got shape \[2, 4\]; accepted: \[D, K = 3\]"),
        ({"weight": torch.zeros(2, 3).double()}, "weight: got torch.float64 on cpu; accepted: torch.float32 on cpu"),
        ({"ids": torch.zeros(2)}, r"ids: got torch.float32 \[2\]; accepted: torch.int64"),
        ({"ids": torch.tensor([1, 5])}, "ids: got indices from 1 to 5; accepted: 0 to 4"),
        ({"ids": torch.tensor([-1, 1])}, "ids: got indices from -1 to 1; accepted: 0 to 4"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    for backend in BACKENDS:
        with pytest.raises(InputError, match=message):
            project(**GIVEN | change, bias=torch.zeros(2), backend=backend)
        with pytest.raises(InputError, match=message):
            project_gradient(torch.zeros(2, 2), **GIVEN | change, with_features=True, backend=backend)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"bias: got shape \[3\]; accepted: \[D = 2\]"):
        project(**GIVEN, bias=torch.zeros(3))
    with pytest.raises(InputError, match=r"grad: got shape \[5, 2\]; accepted: \[n = 2, D = 2\]"):
        project_gradient(torch.zeros(5, 2), **GIVEN, with_features=False)
