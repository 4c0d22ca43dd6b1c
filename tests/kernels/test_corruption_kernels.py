"""The Triton kernels of the fused corruption loss, through the interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.loss import REDUCTIONS, corruption_loss
from dhns_fast.reference import loss as reference

if importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton and the installed package", allow_module_level=True)

from dhns_fast.kernels import corruption as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS: dict[str, Any] = {"offset": 2.5, "temperature": 0.8}


def case(B: int, N: int, E: int, D: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(B + N + D)
    query, table = (torch.randn(n, D, generator=g, dtype=torch.float64).mul(0.5).to(DEVICE, dtype) for n in (B, E))
    ids = torch.randint(E, (B, 1 + N), generator=g).to(DEVICE)
    return {
        "query": query.requires_grad_(),
        "table": table.requires_grad_(),
        "answer": ids[:, 0],
        "corrupt": ids[:, 1:],
    }


def run(function: Any, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    value = function(**arguments, **OPTIONS, **options)
    return [value.detach(), *torch.autograd.grad(3 * value, (arguments["query"], arguments["table"]))]


def poisoned(x: Tensor) -> Tensor:
    return x.fill_(math.nan) if x.is_floating_point() else x


# One of everything; ragged in all sizes; more candidates, dimensions and pairs of a row than a block has; rows that are
# read twice.
SHAPES = ((1, 1, 1, 2, True), (5, 3, 7, 6, True), (3, 19, 2, 518, True), (2, 5, 2, 138, False))
TOLERANCES = ((torch.float64, 1e-12), (torch.float32, 2e-5))


def types_of(reduction: str, shape: int) -> list[tuple[torch.dtype, float]]:
    """All; on a GPU, where each is three or four kernels to compile, each shape has a reduction in each type."""
    if DEVICE.type == "cpu":
        return [*TOLERANCES]
    at = REDUCTIONS.index(reduction) + shape
    return [entry for i, entry in enumerate(TOLERANCES) if (at + i) % len(REDUCTIONS) == 0]


def test_types_and_shapes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", torch.device("cuda"))
    taken = [(r, shape, dtype) for r in REDUCTIONS for shape in range(len(SHAPES)) for dtype, _ in types_of(r, shape)]
    assert len(taken) == len(TOLERANCES) * len(SHAPES)
    for dtype, _ in TOLERANCES:
        assert {r for r, _, of in taken if of == dtype} == set(REDUCTIONS)
        assert {shape for _, shape, of in taken if of == dtype} == set(range(len(SHAPES)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_agrees_with_the_gathered_form(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, (B, N, E, D, whole) in enumerate(SHAPES):
        if not whole:
            monkeypatch.setattr(kernels, "whole", lambda *_: None)
            monkeypatch.setattr(kernels, "gradient_tile", lambda *_: {"BN": 2, "BK": 32, "num_warps": 1})
        want = run(reference.corruption_loss, case(B, N, E, D), reduction=reduction)
        with monkeypatch.context() as patch:
            empty_like, new_empty = torch.empty_like, Tensor.new_empty
            patch.setattr(torch, "empty_like", lambda *a, f=empty_like, **k: poisoned(f(*a, **k)))
            patch.setattr(Tensor, "new_empty", lambda self, *a, f=new_empty, **k: poisoned(f(self, *a, **k)))
            for dtype, tolerance in types_of(reduction, shape):
                got = run(corruption_loss, case(B, N, E, D, dtype), reduction=reduction, backend="triton")
                for a, b in zip(got, want, strict=True):
                    assert a.dtype == dtype
                    assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


@pytest.mark.parametrize("reduction", ["l1", "l2", "complex_l1"])
def test_distance_of_zero_has_a_gradient_of_zero(reduction: str) -> None:
    query, table = (torch.ones(n, 4, device=DEVICE, requires_grad=True) for n in (2, 3))
    ids = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    value = corruption_loss(query, table, ids[:, 0], ids, reduction, backend="triton")
    assert all(g.eq(0).all() for g in torch.autograd.grad(value, (query, table)))


@pytest.mark.parametrize("rising", [True, False])
def test_greatest_score_first_or_last(rising: bool) -> None:
    """The sums of a row are relative to the greatest score so far, of which many greater ones may come."""
    table = torch.linspace(-3, 3, 33, dtype=torch.float64, device=DEVICE)[:, None] * torch.ones(
        4, dtype=torch.float64, device=DEVICE
    )
    table = (table if rising else table.flip(0)).contiguous().requires_grad_()
    query = torch.full((1, 4), 4.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ids = torch.arange(33, device=DEVICE)[None]
    a = {"query": query, "table": table, "answer": torch.tensor([7], device=DEVICE), "corrupt": ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "whole", lambda *_: {"BN": 4, "BK": 4, "num_warps": 1})
        got, want = (
            run(corruption_loss, a, reduction="dot", backend="triton"),
            run(reference.corruption_loss, a, reduction="dot"),
        )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_ids_outside_of_the_table_score_as_zeros_and_have_no_gradient() -> None:
    query, table = torch.randn(2, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    ids = torch.tensor([[0, 1, -1], [2, 3, 1 << 40]], device=DEVICE)
    with_zeros = torch.cat((table, torch.zeros(1, 8, device=DEVICE)))
    loss, by_query, slope = kernels.corruption_loss(query, table, ids, "dot", 0.0, 1.0)
    inside = torch.tensor([[0, 1, 3], [2, 3, 3]], device=DEVICE)
    want = kernels.corruption_loss(query, with_zeros, inside, "dot", 0.0, 1.0)
    for a, b in zip((loss, by_query, slope), want, strict=True):
        torch.testing.assert_close(a, b)
    by_table = kernels.table_gradient(torch.ones((), device=DEVICE), query, table, ids, slope, "dot")
    other = kernels.table_gradient(torch.ones((), device=DEVICE), query, with_zeros, inside, want[2], "dot")
    torch.testing.assert_close(by_table, other[:3])


def test_extreme_scores() -> None:
    query, table = torch.ones(2, 1, device=DEVICE), torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE)
    answer, corrupt = torch.tensor([0, 1], device=DEVICE), torch.tensor([[1, 2], [0, 2]], device=DEVICE)
    # 0.25·(softplus(−1e4) + 0.5·softplus(−1e4) + 0.5·ln 2), and with the roles changed 0.25·(1e4 + 0.5·1e4 + 0.5·ln 2).
    value = corruption_loss(query, table, answer, corrupt, temperature=0.0, backend="triton")
    assert value.item() == pytest.approx(0.25 * (1e4 + 0.5e4 + math.log(2)), rel=1e-6)


def test_operator_contract() -> None:
    a = case(3, 2, 4, 6, torch.float32)
    ids = torch.cat((a["answer"][:, None], a["corrupt"]), 1)
    torch.library.opcheck(
        torch.ops.dhns_fast.corruption_loss.default, (a["query"], a["table"], ids, "l2", 0.0, 0.5, "triton")
    )


def test_numbers_reach_float64_kernels_as_float64() -> None:
    """Launched without an annotation, a Python float arrives as float32: the interpreter does not show it."""
    compiled = {case.name: case.types for case in kernels.compile_cases() if "fp64" in case.name}
    for name, types in compiled.items():
        for argument, kind in types.items():
            assert not kind.startswith("fp") or kind == "fp64", (name, argument)
    numbers = {name for name, kind in next(iter(compiled.values())).items() if kind == "fp64"}
    for kernel in (kernels._weigh, kernels._whole_rows):
        source = inspect.signature(getattr(kernel, "fn", kernel))
        assert {
            name for name, parameter in source.parameters.items() if parameter.annotation == "tl.float64"
        } == numbers
