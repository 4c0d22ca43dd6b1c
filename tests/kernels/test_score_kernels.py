"""The Triton kernels of scores against all entities, through the interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dhns_fast.data.filter import Ragged
from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import score
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import logsumexp_all, one_vs_all_loss, rank_all, score_all, topk_all

if importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton and the installed package", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    torch.testing.assert_close(score_all(query, entity, reduction, **options).double().cpu(), expected, rtol=2e-6, atol=1e-6)
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

    best, ids = topk_all(query, entity, 66, reduction, known, **options)
    want, want_ids = reference.topk_all(q, e, 66, reduction, known.to("cpu"), s)
    torch.testing.assert_close(best.double().cpu(), want, rtol=2e-6, atol=1e-6)
    assert torch.equal(ids.cpu(), want_ids)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_gradients_agree_with_the_reference(reduction: str, scaled: bool) -> None:
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
            torch.testing.assert_close(got.grad.double().cpu(), want.grad, rtol=1e-4, atol=3e-6 * want.grad.abs().max().item())


def test_a_part_of_the_table_ignores_what_it_does_not_hold() -> None:
    """Targets and known answers below 0 and beyond the part: counts over the parts add up to those over the whole."""
    query, entity, _ = tables(False)
    target = torch.arange(B, device=DEVICE) * 2
    offsets = torch.arange(B + 1, device=DEVICE) * 5
    ids = (torch.arange(5 * B, device=DEVICE).view(B, 5) * 7 % E).sort(1).values.flatten()
    at_target = score.target_scores(query, entity, target, None, "l1", "triton")
    counts = [
        score.rank_counts(query, entity[i:j], target - i, at_target, offsets, ids - i, None, "l1", "triton")
        for i, j in ((0, 20), (20, 65), (65, E), (0, E))
    ]
    assert torch.equal(counts[0] + counts[1] + counts[2], counts[3])
    best = [score.topk_all(query, entity[i:j], 5, offsets, ids - i, None, "l1", "triton")[0] for i, j in ((0, 20), (20, E), (0, E))]
    assert torch.equal(torch.cat(best[:2], 1).sort(1, descending=True).values[:, :5], best[2])


def test_nan_ranks_last_and_is_never_among_the_best() -> None:
    query, entity, _ = tables(False)
    entity[[5, 66]] = torch.nan
    target = torch.arange(B, device=DEVICE)
    ranks = rank_all(query, entity, target, "l1", backend="triton")
    greater, equal = reference.rank_all(query.cpu(), entity.cpu(), target.cpu(), "l1")
    assert torch.equal(ranks.greater.cpu(), greater)
    assert torch.equal(ranks.equal.cpu(), equal)
    assert ranks.greater[5] == E - 1
    _, ids = topk_all(query, entity, E, "l1", backend="triton")
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
