"""Scores against all entities: every consumer against the float64 oracle, exactness of ranks, gradients, errors."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import dhns_fast.scoring
from dhns_fast.data.filter import Ragged
from dhns_fast.errors import InputError
from dhns_fast.ops import build
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import Ranks, hard_negatives, logsumexp_all, one_vs_all_loss, rank_all, score_all, topk_all

REDUCTIONS = reference.REDUCTIONS
# (B, E, D): single ones, ragged, larger than a tile or a sweep in either direction.
SHAPES = [(1, 1, 2), (3, 5, 6), (7, 70, 10), (70, 131, 34), (260, 300, 8), (2, 4500, 256)]


@pytest.fixture(params=["eager", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with every backend; a backend that does not have a dtype leaves it to the automatic choice."""
    if request.param == "cpu" and (reason := build.why_not("cpu")):
        pytest.skip(reason)
    monkeypatch.setenv("DHNS_FAST_BACKEND", request.param)
    return request.param


def tables(
    shape: tuple[int, int, int], scaled: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    queries, entities, dim = shape
    query = torch.randn(queries, dim, generator=generator, dtype=torch.float64)
    entity = torch.randn(entities, dim, generator=generator, dtype=torch.float64)
    scale = torch.rand(queries, dim, generator=generator, dtype=torch.float64) + 0.5 if scaled else None
    return query.to(dtype), entity.to(dtype), None if scale is None else scale.to(dtype)


def ragged(rows: list[list[int]]) -> Ragged:
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    return Ragged(offsets, torch.tensor([i for row in rows for i in row], dtype=torch.int64))


def random_known(queries: int, entities: int, target: Tensor, seed: int = 0) -> Ragged:
    """Up to a third of the entities, the target among them in every other row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(queries):
        ids = set(torch.randperm(entities, generator=generator)[: row % (entities // 3 + 1)].tolist())
        ids.discard(int(target[row]))
        if row % 2:
            ids.add(int(target[row]))
        rows.append(sorted(ids))
    return ragged(rows)


def double(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.double()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_and_logsumexp_agree_with_the_reference(
    reduction: str, shape: tuple[int, int, int], scaled: bool
) -> None:
    query, entity, scale = tables(shape, scaled)
    want = reference.score_all(query.double(), entity.double(), reduction, double(scale))
    got = score_all(query, entity, reduction, scale=scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6 * shape[2] ** 0.5)
    torch.testing.assert_close(
        logsumexp_all(query, entity, reduction, scale=scale).double(), want.logsumexp(1), rtol=2e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_dtypes_accumulate_in_float32_or_better(reduction: str, dtype: torch.dtype) -> None:
    query, entity, scale = tables((5, 40, 12), True, dtype)
    want = reference.score_all(query.double(), entity.double(), reduction, double(scale))
    got = score_all(query, entity, reduction, scale=scale)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ranks_are_exact_with_planted_ties(reduction: str, shape: tuple[int, int, int], scaled: bool) -> None:
    """Small integers make scores exact in float32, moduli aside, and ties frequent; every third entity is a
    duplicate.
    """
    queries, entities, dim = shape
    generator = torch.Generator().manual_seed(1)
    draw = (
        tables(shape, False)[:2]
        if reduction == "complex_l1"
        else (torch.randint(-2, 3, (n, dim), generator=generator) for n in shape[:2])
    )
    query, entity = (table.float() for table in draw)
    entity[2::3] = entity[1::3][: len(entity[2::3])]
    scale = torch.randint(1, 3, (queries, dim), generator=generator).float() if scaled else None
    target = torch.randint(0, entities, (queries,), generator=generator)
    known = random_known(queries, entities, target)
    for filtered in (None, known):
        greater, equal = reference.rank_all(query.double(), entity.double(), target, reduction, filtered, double(scale))
        ranks = rank_all(query, entity, target, reduction, filtered, scale=scale)
        assert torch.equal(ranks.greater, greater)
        assert torch.equal(ranks.equal, equal)
    assert entities < 70 or equal.any()
    best, ids = topk_all(query, entity, min(entities, 20), reduction, known, scale=scale)
    want, want_ids = reference.topk_all(
        query.double(), entity.double(), min(entities, 20), reduction, known, double(scale)
    )
    torch.testing.assert_close(best.double(), want, rtol=1e-6, atol=1e-15)
    assert torch.equal(ids, want_ids)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_duplicates_of_the_target_tie_with_it_wherever_they_stand(reduction: str) -> None:
    query, entity, _ = tables((33, 517, 50), False)
    target = torch.arange(33) * 7 % 517
    twins = torch.tensor([0, 63, 64, 255, 300, 511, 512, 516])
    for row in range(33):
        table = entity.clone()
        table[twins] = entity[target[row]]
        ranks = rank_all(query[row : row + 1], table, target[row : row + 1], reduction)
        assert ranks.equal.item() == len(twins) - int(target[row] in twins)


@pytest.mark.parametrize("stray", [1e20, -1e38, torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ties_stay_ties_whatever_lies_beside_them(reduction: str, stray: float) -> None:
    """Squares of a stray row leave float32; its neighbours are computed as they are without it."""
    g = torch.Generator().manual_seed(4)
    for dim in (8, 64, 70):
        entity = torch.randn(20, dim, generator=g).repeat_interleave(40, 0)
        query, target = torch.randn(20, dim, generator=g), torch.arange(20) * 40
        scores = score_all(query, entity, reduction)
        entity[torch.arange(20) * 40 + 20] = stray
        kept = entity[:, 0] != stray if stray == stray else entity[:, 0].isfinite()
        assert torch.equal(score_all(query, entity, reduction)[:, kept], scores[:, kept])
        ranks = rank_all(query, entity, target, reduction)
        assert (ranks.equal == 38).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_near_ties_stay_within_the_rounding_bound(reduction: str) -> None:
    """A float32 rank lies between the float64 ranks at the true score ± 2δ, δ = (D + 8)·u·Σ|terms|, u = 2⁻²⁴."""
    query, entity, _ = tables((40, 600, 64), False)
    entity = entity[:1] + 1e-6 * entity
    target = torch.arange(40)
    ranks = rank_all(query, entity, target, reduction)
    scores = reference.score_all(query.double(), entity.double(), reduction)
    terms = query.double().abs() @ entity.double().abs().T if reduction == "dot" else scores.abs()
    delta = (64 + 8) * 2**-24 * terms.max(1, keepdim=True).values
    at_target = scores.gather(1, target[:, None])
    assert (ranks.optimistic >= 1 + (scores > at_target + 2 * delta).sum(1)).all()
    assert (ranks.pessimistic <= (scores >= at_target - 2 * delta).sum(1)).all()


def test_tie_rules() -> None:
    ranks = Ranks(torch.tensor([0, 3]), torch.tensor([1, 0]))
    assert ranks.optimistic.tolist() == [1, 4]
    assert ranks.realistic.tolist() == [1.5, 4.0]
    assert ranks.pessimistic.tolist() == [2, 4]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_ranks_last_and_is_reported(reduction: str, caplog: pytest.LogCaptureFixture) -> None:
    query, entity, _ = tables((4, 90, 6), False)
    entity[[5, 80]] = torch.nan
    query[3] = torch.nan
    target = torch.tensor([0, 5, 80, 7])
    known = ragged([[1, 5], [1, 2, 5], [], [3, 7]])
    with caplog.at_level(logging.WARNING):
        ranks = rank_all(query, entity, target, reduction, known)
    greater, equal = reference.rank_all(query.double(), entity.double(), target, reduction, known)
    assert torch.equal(ranks.greater, greater)
    assert torch.equal(ranks.equal, equal)
    assert ranks.greater[1:].tolist() == [87, 89, 88]
    assert "3 targets of 4" in caplog.text
    assert len(caplog.records) == 1
    best, ids = topk_all(query, entity, 90, reduction)
    assert not ((ids == 5) | (ids == 80)).any()
    assert (ids[0, :88] >= 0).all()
    assert ids[0, 88:].tolist() == [-1, -1]
    assert (ids[3] == -1).all()
    assert (best[3] == -torch.inf).all()


@pytest.mark.parametrize("consumer", ["score_all", "logsumexp_all"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_agree_with_the_reference(
    reduction: str, shape: tuple[int, int, int], scaled: bool, consumer: str
) -> None:
    parts = tables(shape, scaled)
    got = [part if part is None else part.clone().requires_grad_() for part in parts]
    want = [part if part is None else part.double().requires_grad_() for part in parts]
    out = getattr(dhns_fast.scoring, consumer)(*got[:2], reduction, scale=got[2])
    truth = getattr(reference, consumer)(*want[:2], reduction, want[2])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (truth * weight).sum().backward()
    # A softmax inherits the absolute error of its scores as a relative one.
    spread = (
        reference.score_all(*parts[:2], reduction, parts[2]).abs().max().item() if consumer == "logsumexp_all" else 0.0
    )
    for mine, theirs in zip(got, want, strict=True):
        if theirs is not None:
            atol = (3e-6 + 2**-24 * spread) * theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    parts = [part.requires_grad_() for part in tables((3, 5, 4), True, torch.float64) if part is not None]
    assert torch.autograd.gradcheck(lambda q, e, s: score_all(q, e, reduction, scale=s), parts)
    assert torch.autograd.gradcheck(lambda q, e, s: logsumexp_all(q, e, reduction, scale=s), parts)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_at_distance_zero_is_zero(reduction: str) -> None:
    query = torch.randn(2, 6).requires_grad_()
    entity = query.detach().clone().requires_grad_()
    score_all(query, entity, reduction).diagonal().sum().backward()
    assert query.grad is not None
    if reduction == "dot":
        assert torch.equal(query.grad, entity)
    else:
        assert torch.equal(query.grad, torch.zeros(2, 6))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(9, 77, 8), (300, 4100, 8)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_vs_all_loss(
    reduction: str, shape: tuple[int, int, int], scaled: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores kept for the backward pass and made again; the target in any tile, and the same one for several
    queries.
    """
    monkeypatch.setattr(dhns_fast.scoring, "KEPT_BYTES", 32 << 20 if kept else 0)
    parts = tables(shape, scaled)
    target = torch.arange(shape[0]) * 13 % shape[1]
    target[-2:] = shape[1] - 1
    got = [part if part is None else part.clone().requires_grad_() for part in parts]
    want = [part if part is None else part.double().requires_grad_() for part in parts]
    loss = one_vs_all_loss(*got[:2], target, reduction, scale=got[2])
    truth = reference.one_vs_all_loss(*want[:2], target, reduction, want[2])
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * truth).backward()
    for mine, theirs in zip(got, want, strict=True):
        if theirs is not None:
            torch.testing.assert_close(
                mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * theirs.grad.abs().max().item()
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hard_negatives_come_from_the_best(reduction: str) -> None:
    query, entity, scale = tables((40, 90, 6), True)
    known = random_known(40, 90, torch.arange(40))
    drawn = hard_negatives(
        query, entity, 300, 7, reduction, known, scale=scale, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.shape == (40, 300)
    best = topk_all(query, entity, 7, reduction, known, scale=scale)[1]
    # All of the seven best, none else, and each about as often: 300/7 ± 5σ.
    counts = (drawn[..., None] == best[:, None]).sum(1)
    assert (counts.sum(1) == 300).all()
    assert (counts - 300 / 7).abs().max() < 5 * (300 * 6 / 49) ** 0.5
    again = hard_negatives(
        query, entity, 300, 7, reduction, known, scale=scale, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(drawn, again)


def test_probabilities_beyond_float32_leave_nothing_to_multiply(backend: str) -> None:
    # Scores 90 and 200 below the first: probabilities of 1e-39, which is denormal, and 0.
    query, entity = (
        torch.ones(1, 2, requires_grad=True),
        torch.tensor([[50.0, 50.0], [5.0, 5.0], [-50.0, -50.0]], requires_grad=True),
    )
    loss = one_vs_all_loss(query, entity, torch.tensor([2]))
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], torch.tensor([[100.0, 100.0]]))
    (gradient,) = torch.autograd.grad(logsumexp_all(query, entity).sum(), entity)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), rtol=1e-6, atol=1e-30)
    assert backend == "eager" or not gradient[1:].any()


def test_hard_negatives_where_few_or_none_are_left() -> None:
    query, entity, _ = tables((2, 5, 4), False)
    known = ragged([[0, 1, 3], [0, 1, 2, 3, 4]])
    drawn = hard_negatives(query, entity, 200, 5, known=known)
    assert set(drawn[0].tolist()) == {2, 4}
    assert set(drawn[1].tolist()) == {0, 1, 2, 3, 4}


def test_autocast_narrows_nothing() -> None:
    query, entity, _ = tables((4, 64, 16), False)
    plain = score_all(query, entity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_all(query, entity), plain)


query, entity = torch.zeros(2, 5), torch.zeros(4, 5)
target = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_all(query, entity, "cosine"), "reduction: got 'cosine'; accepted: dot, l2, l1, complex_l1"),
        (lambda: score_all(query[0], entity), r"query: got shape \[5\]; accepted: \[B, D\]"),
        (lambda: score_all(query, entity[:0]), r"entity: got an empty table \[0, 5\]; accepted: at least one entity"),
        (lambda: score_all(query[:, :3], entity), r"entity: got shape \[4, 5\]; accepted: \[E, D = 3\]"),
        (
            lambda: score_all(query, entity, "complex_l1"),
            "query: got dimension D of 5; accepted: an even one for complex_l1",
        ),
        (
            lambda: score_all(query.long(), entity),
            r"query: got torch.int64 \[2, 5\]; accepted: torch.float32, torch.float64",
        ),
        (
            lambda: score_all(query, entity.double()),
            "entity: got torch.float64 on cpu; accepted: torch.float32 on cpu, as query",
        ),
        (lambda: score_all(query, entity, scale=entity), r"scale: got shape \[4, 5\]; accepted: \[B = 2, D = 5\]"),
        (lambda: rank_all(query, entity, torch.tensor([0, 4])), "target: got indices from 0 to 4; accepted: 0 to 3"),
        (lambda: rank_all(query, entity, torch.tensor([-1, 0])), "target: got indices from -1 to 0; accepted: 0 to 3"),
        (
            lambda: rank_all(query, entity, target[:1]),
            r"target: got torch.int64 \[1\] on cpu; accepted: torch.int64 \[2\] on cpu",
        ),
        (lambda: rank_all(query, entity, target.int()), r"target: got torch.int32 \[2\] on cpu; accepted: torch.int64"),
        (
            lambda: rank_all(query, entity, target, known=ragged([[0], [9]])),
            "known.ids: got indices from 0 to 9; accepted: 0 to 3",
        ),
        (
            lambda: rank_all(query, entity, target, known=ragged([[0]])),
            r"offsets: got torch.int64 \[2\] on cpu; accepted: torch.int64 \[3\] on cpu",
        ),
        (
            lambda: rank_all(query, entity, target, known=ragged([[1, 0], []])),
            "ids: got known answers out of order; accepted: sorted and without duplicates",
        ),
        (lambda: topk_all(query, entity, 5), "k: got 5; accepted: integers from 1 to 4"),
        (lambda: topk_all(query, entity, 0), "k: got 0; accepted: integers from 1 to 4"),
        (
            lambda: topk_all(query, entity, 3, known=ragged([[0], [9]])),
            "known.ids: got indices from 0 to 9; accepted: 0 to 3",
        ),
        (
            lambda: one_vs_all_loss(query, entity, torch.tensor([0, 4])),
            "target: got indices from 0 to 4; accepted: 0 to 3",
        ),
        (
            lambda: one_vs_all_loss(query, entity[:0], target),
            r"entity: got an empty table \[0, 5\]; accepted: at least one entity",
        ),
        (lambda: hard_negatives(query, entity, 0, 2), "num_negatives: got 0; accepted: integers of at least 1"),
        (lambda: hard_negatives(query, entity, 3, 5), "pool: got 5; accepted: integers from 1 to 4"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
