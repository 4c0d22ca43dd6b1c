"""NaN, infinities, the largest and the smallest numbers: one answer on every backend, and it is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.ops import build
from dhns_fast.ops.backend import TRITON
from dhns_fast.ops.sampling import find_ranges
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import logsumexp_all, rank_all, score_all, topk_all

BACKENDS = ["eager", "cpu"] if build.why_not("cpu") is None else ["eager"]
VALUES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, 1e-40, -0.0]


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal, both NaN, or close."""
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= 1e-4 * want.abs() + 1e-6)
    assert same.all(), (got[~same][:3].tolist(), want[~same][:3].tolist())


def case(value: float, where: str, B: int, E: int, D: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(B + E + D)
    query, entity = torch.randn(B, D, generator=g), torch.randn(E, D, generator=g)
    if where in ("query", "both"):
        query[-1, 0] = value
    if where in ("entity", "both"):
        entity[-1, D - 1 if where == "entity" else 0] = value
    target = torch.randint(E, (B,), generator=g)
    target[0] = E - 1
    scale = torch.rand(B, D, generator=g) + 0.5 if where == "scale" else None
    if scale is not None:
        scale[0, 0] = value
    return query, entity, scale, target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_are_torchs(reduction: str, value: float, backend: str) -> None:
    for where in ("query", "entity", "both", "scale"):
        if where == "scale" and abs(value) == 3e38 and reduction == "dot":
            continue  # test_where_a_step_on_the_way_is_beyond_float32
        for shape in ((1, 1, 2), (1, 65, 4), (49, 130, 6)):
            query, entity, scale, target = case(value, where, *shape)
            want = reference.score_all(query, entity, reduction, scale)
            if value != 1e20 or reduction != "dot":  # products of 1e20 that cancel
                assert_same(score_all(query, entity, reduction, scale=scale, backend=backend), want)
                assert_same(logsumexp_all(query, entity, reduction, scale=scale, backend=backend), want.logsumexp(1))
            ranks = rank_all(query, entity, target, reduction, scale=scale, backend=backend)
            best, _ = topk_all(query, entity, 1, reduction, scale=scale, backend=backend)
            own = score_all(query, entity, reduction, scale=scale, backend=backend)
            at = own.gather(1, target[:, None])
            rival = torch.ones_like(own, dtype=torch.bool).scatter_(1, target[:, None], False)
            assert torch.equal(ranks.greater, (((own > at) | at.isnan()) & rival).sum(1))
            # Close: torch's root of float32 is not the nearest number everywhere.
            assert_same(best[:, 0], own.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1))


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs a compiler")
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_the_same_everywhere(reduction: str, value: float) -> None:
    for where in ("query", "entity", "both"):
        for shape in ((1, 65, 4), (5, 70, 34)):
            query, entity, _, _ = case(value, where, *shape)
            found = []
            for backend in BACKENDS:
                leaves = [x.clone().requires_grad_() for x in (query, entity)]
                scores = score_all(*leaves, reduction, backend=backend)
                found.append(torch.autograd.grad(scores.sum(), leaves))
            for got, want in zip(*found, strict=True):
                assert_same(got, want)


def test_a_nan_in_the_last_of_many_is_not_lost() -> None:
    entity = torch.zeros(65, 4)
    entity[64] = math.nan
    for backend in BACKENDS:
        assert logsumexp_all(torch.ones(1, 4), entity, backend=backend).isnan().all()
    entity[64] = math.inf
    for backend in BACKENDS:
        assert logsumexp_all(torch.ones(1, 4), entity, backend=backend).item() == math.inf


LIMITS = [*BACKENDS, *(["triton"] if TRITON.why_not(torch.device("cpu")) is None else [])]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", LIMITS)
@pytest.mark.parametrize("q", [2.0, 1e-3, 1e20, 1e-30])
def test_where_a_step_on_the_way_is_beyond_float32(backend: str, q: float) -> None:
    """docs/numerics.md: the scale of dot is part of the query, forward and backward; the other reductions have their
    squares.
    """
    entity = torch.tensor([[0.1, 1.0], [1e-8, 0.0], [2.0, -1.0], [0.0, 0.0]])
    query, scale = torch.tensor([[q, 0.5], [1.0, q]]), torch.tensor([[3e38, 1.0], [2.0, 1e-20]])
    absorbed = query * scale
    for function in (score_all, logsumexp_all):
        got = function(query, entity, "dot", scale=scale, backend=backend)
        assert_same(got, function(absorbed, entity, "dot", backend=backend))
    target = torch.tensor([2, 1])
    ranks = rank_all(query, entity, target, "dot", scale=scale, backend=backend)
    plain = rank_all(absorbed, entity, target, "dot", backend=backend)
    assert torch.equal(ranks.greater, plain.greater)
    assert torch.equal(ranks.equal, plain.equal)
    assert score_all(query.double(), entity.double(), "dot", scale=scale.double()).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", LIMITS)
@pytest.mark.parametrize("reduction", ["l2", "complex_l1", "l1"])
def test_distances_up_to_their_squares(backend: str, reduction: str) -> None:
    entity = torch.tensor([[1.0, 0.0], [1e18, 1e18], [1e19, -1e19], [3e37, 1e37]])
    found = score_all(torch.zeros(1, 2), entity, reduction, backend=backend)
    want = reference.score_all(torch.zeros(1, 2).double(), entity.double(), reduction)
    assert_same(found[:, :3], want[:, :3])
    squares = reduction == "l2" or (reduction == "complex_l1" and backend == "triton")
    assert_same(found[:, 3:], torch.full((1, 1), -math.inf) if squares else want[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_entities_have_equal_scores(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype != torch.float32:
        pytest.skip("the compiled operators read float32")
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        B, E, D = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 30), (2, 2500), (2, 70)))
        query, entity = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (B, E))
        twins = torch.randperm(E, generator=g)[: max(2, E // 3)]
        entity[twins] = entity[twins[0]].clone()
        scores = score_all(query, entity, backend=backend)
        assert (scores[:, twins] == scores[:, twins[:1]]).all()
        ranks = rank_all(query, entity, twins[:1].expand(B).contiguous(), backend=backend)
        assert (ranks.equal >= len(twins) - 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_that_end_beyond_the_largest_integer(backend: str) -> None:
    least, most = -(2**63), 2**63 - 1
    values, lows = torch.tensor([least, 0, most]), torch.tensor([most - 1, most, least, 0, 1])
    for width in (1, 5, most):
        start, number = find_ranges(values, lows, width, backend)
        for low, first, count in zip(lows.tolist(), start.tolist(), number.tolist(), strict=True):
            assert values[first : first + count].tolist() == [x for x in values.tolist() if low <= x < low + width]
