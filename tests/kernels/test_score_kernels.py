"""The Triton kernels of scores against all entities, through the interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from fixtures.distances import near_tables

from dhns_fast.data.filter import Ragged
from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import score
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import logsumexp_all, one_vs_all_loss, rank_all, score_all, topk_all

if importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton and the installed package", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU each variant of a kernel is seconds of compilation: there a scale is tried with one consumer of each
# reduction, and what becomes of a tile with one distance and with products.
ON_GPU = DEVICE.type == "cuda"
# More than a tile and less than two both ways, a ragged and odd number of (complex) dimensions.
B, E, D = 34, 70, 10


def tables(scaled: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Integers, so that scores are exact and ties frequent; every third entity is a duplicate of its neighbour."""
    generator = torch.Generator().manual_seed(0)
    query, entity = (torch.randint(-2, 3, (n, D), generator=generator).float().to(DEVICE) for n in (B, E))
    entity[2::3] = entity[1::3][: len(entity[2::3])]
    return query, entity, torch.randint(1, 3, (B, D), generator=generator).float().to(DEVICE) if scaled else None


def double(*parts: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if part is None else part.double().cpu() for part in parts]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_consumers_agree_with_the_reference(reduction: str, scaled: bool) -> None:
    query, entity, scale = tables(scaled)
    if reduction == "complex_l1":
        # Approximate roots of integers may tie or not: ties come from the duplicates alone.
        query, entity = query + 0.1 * torch.sin(torch.arange(B * D).float().to(DEVICE)).view(B, D), entity * 0.7
    q, e, s = double(query, entity, scale)
    options = {"scale": scale, "backend": "triton"}
    expected = reference.score_all(q, e, reduction, s)
    torch.testing.assert_close(
        score_all(query, entity, reduction, **options).double().cpu(), expected, rtol=2e-6, atol=1e-6
    )
    if ON_GPU and scaled:
        return
    every = not ON_GPU or reduction in ("dot", "l2")
    if every:
        found = logsumexp_all(query, entity, reduction, **options).double().cpu()
        torch.testing.assert_close(found, expected.logsumexp(1), rtol=2e-6, atol=1e-6)

    target = torch.arange(B) * 2
    target[1] = E - 1
    rows = [sorted({7 * i % E for i in range(row)} | ({int(target[row])} if row % 2 else set())) for row in range(B)]
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    known = Ragged(offsets, torch.tensor([i for row in rows for i in row])).to(DEVICE)
    greater, equal = reference.rank_all(q, e, target, reduction, known.to("cpu"), s)
    ranks = rank_all(query, entity, target.to(DEVICE), reduction, known, **options)
    assert torch.equal(ranks.greater.cpu(), greater)
    assert torch.equal(ranks.equal.cpu(), equal)
    assert equal.any()

    if every:
        best, ids = topk_all(query, entity, 66, reduction, known, **options)
        want, want_ids = reference.topk_all(q, e, 66, reduction, known.to("cpu"), s)
        torch.testing.assert_close(best.double().cpu(), want, rtol=2e-6, atol=1e-6)
        assert torch.equal(ids.cpu(), want_ids)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_gradients_agree_with_the_reference(reduction: str, scaled: bool) -> None:
    if ON_GPU and scaled != (reduction in ("complex_l1", "dot")):
        pytest.skip("a kernel less to compile; the interpreter runs it")
    parts = tables(scaled)
    mine = [None if part is None else part.clone().requires_grad_() for part in parts]
    truth = [None if part is None else part.requires_grad_() for part in double(*parts)]
    logsumexp_all(*mine[:2], reduction, scale=mine[2], backend="triton").square().sum().backward()
    reference.logsumexp_all(*truth[:2], reduction, truth[2]).square().sum().backward()
    if reduction == "l2":  # of the launches, which are slow in the interpreter, it has all
        target = torch.arange(B) % 3
        one_vs_all_loss(*mine[:2], target.to(DEVICE), reduction, scale=mine[2], backend="triton").mul(1000).backward()
        reference.one_vs_all_loss(*truth[:2], target, reduction, truth[2]).mul(1000).backward()
    for got, want in zip(mine, truth, strict=True):
        if want is not None:
            torch.testing.assert_close(
                got.grad.double().cpu(), want.grad, rtol=1e-4, atol=3e-6 * want.grad.abs().max().item()
            )


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("kind", ["usual", "far", "special"])
def test_ranks_by_products_are_those_of_direct_sums(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """l2 through the product, and direct sums where that cannot tell: at distances far below the norms too, and with
    numbers that have no square in float32.
    """
    from dhns_fast.kernels import score as kernels

    query, entity = near_tables(kind, B, E, D)
    query, entity, target, known = query.to(DEVICE), entity.to(DEVICE), torch.arange(B).to(DEVICE) * 2, filtered(B, E)
    at_target = score.target_scores(query, entity, target, None, "l2", "triton")
    arguments = query, entity, target, at_target, known.offsets, known.ids, None, "l2", "triton"
    direct = score.rank_counts(*arguments)
    monkeypatch.setattr(kernels, "PRODUCT_FROM", 1)
    taken, original = [], kernels.near_ranks
    monkeypatch.setattr(kernels, "near_ranks", lambda *given: (taken.append(given), original(*given))[1])
    assert torch.equal(score.rank_counts(*arguments), direct)
    monkeypatch.setattr(kernels, "DOUBT_BYTES", 1)  # a tile of entities at a time
    assert torch.equal(score.rank_counts(*arguments), direct)
    none = torch.zeros_like(known.offsets), known.ids[:0]
    unfiltered = score.rank_counts(query, entity, target, at_target, *none, None, "l2", "triton")
    assert (unfiltered >= direct).all()
    assert len(taken) == 3


def test_a_part_of_the_table_ignores_what_it_does_not_hold() -> None:
    """Targets and known answers below 0 and beyond the part: counts over the parts add up to those over the whole."""
    query, entity, _ = tables(False)
    target = torch.arange(B, device=DEVICE) * 2
    offsets = torch.arange(B + 1, device=DEVICE) * 5
    ids = (torch.arange(5 * B, device=DEVICE).view(B, 5) * 7 % E).sort(1).values.flatten()
    at_target = score.target_scores(query, entity, target, None, "l2", "triton")
    counts = [
        score.rank_counts(query, entity[i:j], target - i, at_target, offsets, ids - i, None, "l2", "triton")
        for i, j in ((0, 20), (20, 65), (65, E), (0, E))
    ]
    assert torch.equal(counts[0] + counts[1] + counts[2], counts[3])
    best = [
        score.topk_all(query, entity[i:j], 5, offsets, ids - i, None, "l2", "triton")[0]
        for i, j in ((0, 20), (20, E), (0, E))
    ]
    assert torch.equal(torch.cat(best[:2], 1).sort(1, descending=True).values[:, :5], best[2])


def test_nan_ranks_last_and_is_never_among_the_best() -> None:
    query, entity, _ = tables(False)
    entity[[5, 66]] = torch.nan
    target = torch.arange(B, device=DEVICE)
    ranks = rank_all(query, entity, target, "l2", backend="triton")
    greater, equal = reference.rank_all(query.cpu(), entity.cpu(), target.cpu(), "l2")
    assert torch.equal(ranks.greater.cpu(), greater)
    assert torch.equal(ranks.equal.cpu(), equal)
    assert ranks.greater[5] == E - 1
    _, ids = topk_all(query, entity, E, "l2", backend="triton")
    assert not ((ids == 5) | (ids == 66)).any()
    assert (ids[:, -2:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_narrow_tables_are_widened(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    query, entity, _ = (None if part is None else part.to(dtype) for part in tables(False))
    found = score_all(query, entity, "l1", backend="triton")
    assert found.dtype == torch.float32
    assert torch.equal(found.double().cpu(), reference.score_all(*double(query, entity), "l1"))


def test_precision_is_checked() -> None:
    query, entity, _ = tables(False)
    with pytest.raises(InputError, match="precision: got 'fp8'; accepted: ieee, tf32, bf16"):
        score_all(query, entity, precision="fp8")
    with pytest.raises(BackendUnavailableError, match="backend 'eager': its precision is 'ieee', not 'tf32'"):
        score_all(query, entity, precision="tf32", backend="eager")


def filtered(queries: int, entities: int) -> Ragged:
    rows = [sorted({(7 * i + row) % entities for i in range(row % 9)}) for row in range(queries)]
    return Ragged(
        torch.tensor([0] + [len(row) for row in rows]).cumsum(0), torch.tensor([i for row in rows for i in row])
    ).to(DEVICE)


def compare_dot(query: torch.Tensor, entity: torch.Tensor, **options: object) -> None:
    """Every consumer of dot products against the reference; ranks and the best exactly."""
    q, e = double(query, entity)
    target, known = torch.arange(len(query)) * 2 % len(entity), filtered(len(query), len(entity))
    options = {"backend": "triton", **options}
    greater, equal = reference.rank_all(q, e, target, "dot", known.to("cpu"))
    ranks = rank_all(query, entity, target.to(DEVICE), "dot", known, **options)
    assert torch.equal(ranks.greater.cpu(), greater)
    assert torch.equal(ranks.equal.cpu(), equal)
    for k in (7, len(entity)):
        best, ids = topk_all(query, entity, k, "dot", known, **options)
        want, want_ids = reference.topk_all(q, e, k, "dot", known.to("cpu"))
        assert torch.equal(best.double().cpu(), want)
        assert torch.equal(ids.cpu(), want_ids)
    expected = reference.score_all(q, e, "dot")
    torch.testing.assert_close(
        score_all(query, entity, **options).double().cpu(), expected, rtol=1e-6, atol=0, equal_nan=True
    )


def test_products_by_bulk_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from dhns_fast.kernels import score as kernels

    monkeypatch.setattr(kernels, "dot_config", lambda kind, D, arch: kernels.Config(32, 32, 16, 4, 2, True))
    query, entity, _ = tables(False)
    compare_dot(torch.nn.functional.pad(query, (0, 2)), torch.nn.functional.pad(entity, (0, 2)))


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")
def test_products_that_are_no_numbers_or_large() -> None:
    query, entity, _ = tables(False)
    query, entity = query[:12], entity[:40]
    query[0], query[1, 0], query[2] = torch.nan, torch.inf, 0.0
    query[3], entity[10], entity[11] = 1.0, 3e37, -3e37
    entity[3, 2], entity[5], entity[7, 1] = torch.nan, -torch.inf, 1e-40
    target, known = torch.tensor([1, 2, 5, 6, 3, 10, 11, 5, 7, 0, 0, 0]), filtered(12, 40)
    scores = (query @ entity.T).double().cpu()
    rivals = torch.ones_like(scores, dtype=torch.bool)
    for row in range(12):
        rivals[row, known.ids[known.offsets[row] : known.offsets[row + 1]].cpu()] = False
        rivals[row, target[row]] = False
    goal = scores.gather(1, target[:, None])
    ranks = rank_all(query, entity, target.to(DEVICE), "dot", known, backend="triton")
    assert torch.equal(ranks.greater.cpu(), (rivals & ((scores > goal) | goal.isnan())).sum(1))
    assert torch.equal(ranks.equal.cpu(), (rivals & (scores == goal)).sum(1))
    _, ids = topk_all(query, entity, 40, "dot", known, backend="triton")
    for row in range(12):
        allowed = scores[row] > -torch.inf
        allowed[known.ids[known.offsets[row] : known.offsets[row + 1]].cpu()] = False
        assert set(ids[row].tolist()) - {-1} == set(allowed.nonzero().flatten().tolist())


@pytest.mark.parametrize("keeps", [True, False])
def test_tables_are_rounded_a_share_at_a_time(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dhns_fast.kernels import score as kernels

    query, entity, _ = tables(False)
    monkeypatch.setattr(kernels, "ROUNDED_BYTES", 2 * D * 40)  # 70 entities: 40 and 30
    if not keeps:
        monkeypatch.setattr(kernels, "KEPT_BYTES", 1 << 20)
    compare_dot(query, entity, precision="bf16")


@pytest.mark.gpu
def test_three_products_are_float32_and_keep_what_is_no_number() -> None:
    """What ieee is on a GPU: three tf32 products. Infinities are the large part's alone; up to 3.39e38 the split is
    exact.
    """
    g = torch.Generator("cuda").manual_seed(0)
    query, entity = (
        torch.randn(300, 256, generator=g, device="cuda"),
        torch.randn(5000, 256, generator=g, device="cuda"),
    )
    exact = query.double() @ entity.double().T
    found = score_all(query, entity, backend="triton")
    assert ((found.double() - exact).norm() / exact.norm()).item() < 3e-7
    query[0], query[1, 3], query[2] = 0.0, torch.nan, 0.0
    query[0, 0], query[2, 5] = 1.0, 1e-34
    entity[7, 0], entity[8, 0], entity[9, 0], entity[10, 0] = torch.inf, -torch.inf, 3e38, -3e38
    entity[11, 5] = 1e30
    found, want = score_all(query, entity, backend="triton"), query @ entity.T
    assert torch.equal(found[0, 7:11], torch.tensor([torch.inf, -torch.inf, 3e38, -3e38], device="cuda"))
    assert found[1].isnan().all()
    torch.testing.assert_close(found[2, 11], want[2, 11], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.xfail(reason="asked for and missed: the small part of a denormal is too small for a tf32", strict=True)
def test_three_products_keep_denormals() -> None:
    query, entity = torch.zeros(300, 256, device="cuda"), torch.ones(5000, 256, device="cuda")
    query[2, 5], entity[11, 5] = 1e-38, 1e30
    found, want = score_all(query, entity, backend="triton"), query @ entity.T
    torch.testing.assert_close(found[2, 11], want[2, 11], rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_a_rank_is_the_same_among_queries_of_any_number() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    entity = torch.randn(3000, 256, generator=g, device="cuda")
    query, target = entity[:700] + 0.5, torch.arange(700, device="cuda")
    whole = score_all(query, entity, backend="triton")
    for first, last in ((0, 1), (1, 130), (130, 700)):
        assert torch.equal(score_all(query[first:last], entity, backend="triton"), whole[first:last])
    parts = torch.cat([score_all(query, entity[i : i + 1000], backend="triton") for i in range(0, 3000, 1000)], 1)
    assert torch.equal(parts, whole)
    ranks = rank_all(query, entity, target, backend="triton")
    assert torch.equal(ranks.greater, (whole > whole.gather(1, target[:, None])).sum(1))
