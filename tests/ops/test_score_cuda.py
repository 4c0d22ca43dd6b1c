"""The CUDA kernels of distances to all entities where there is no GPU: on ordinary threads they give the reference's
ranks, ids and scores.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.distances import near_tables
from torch import Tensor

from dhns_fast.data.filter import Ragged
from dhns_fast.ops import build
from dhns_fast.reference import scoring as reference

if importlib.util.find_spec("dhns_fast.kernels") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton and the installed package", allow_module_level=True)

from dhns_fast.ops import score_cuda
from dhns_fast.scoring import score_all

REDUCTIONS = ("l1", "l2", "complex_l1")
# A block of four threads has tiles of 16 × 16: two of queries, three of entities. A ragged number of dimensions, and
# two stages of whole ones.
B, E = 21, 40


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> score_cuda.Scores:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{build.source_folder()}"]
    subprocess.run([compiler, *flags, str(Path(__file__).with_name("emulated_sweep.cpp")), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))

    def addresses(*tensors: Tensor | None) -> Any:
        return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])

    def sweep(reduction: int, consumer: int, query: Tensor, scale: Tensor | None, entity: Tensor, *rest: Any) -> None:
        *tensors, base, shares, slots = rest
        sizes = (ctypes.c_long * 6)(*query.shape[:1], *entity.shape, base, shares, slots)
        library.distance_sweep(
            ctypes.c_long(reduction), ctypes.c_long(consumer), sizes, addresses(query, scale, entity, *tensors)
        )

    def targets(
        reduction: int, query: Tensor, scale: Tensor | None, entity: Tensor, target: Tensor, out: Tensor
    ) -> None:
        sizes = (ctypes.c_long * 2)(*query.shape)
        library.distance_targets(ctypes.c_long(reduction), sizes, addresses(query, scale, entity, target, out))

    native = SimpleNamespace(distance_sweep=sweep, distance_targets=targets)
    made = score_cuda.Scores()
    small = replace(score_cuda.TILE, BM=16, BN=16)
    of = score_cuda.Distances.of
    object.__setattr__(made, "distances", lambda *a: replace(of(*a), native=native, config=small))
    return made


def tables(D: int, reduction: str, scaled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, so that sums are exact and ties frequent; roots of integers tie or not: there ties come from the
    duplicates alone.
    """
    g = torch.Generator().manual_seed(D)
    query, entity = (torch.randint(-2, 3, (n, D), generator=g).float() for n in (B, E))
    entity[2::3] = entity[1::3][: len(entity[2::3])]
    if reduction == "complex_l1":
        query, entity = query + 0.1 * torch.sin(torch.arange(B * D).float()).view(B, D), entity * 0.7
    return query, entity, torch.randint(1, 3, (B, D), generator=g).float() if scaled else None


def known() -> Ragged:
    rows = [sorted({(7 * i + row) % E for i in range(row % 9)}) for row in range(B)]
    return Ragged(
        torch.tensor([0] + [len(row) for row in rows]).cumsum(0), torch.tensor([i for row in rows for i in row])
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_consumers_agree_with_the_reference(scores: score_cuda.Scores, reduction: str, scaled: bool) -> None:
    query, entity, scale = tables(72 if scaled else 10, reduction, scaled)
    q, e, s = query.double(), entity.double(), None if scale is None else scale.double()
    expected = reference.score_all(q, e, reduction, s)
    torch.testing.assert_close(
        scores.score_all(query, entity, scale, reduction).double(), expected, rtol=2e-6, atol=1e-6
    )
    found = scores.logsumexp_all(query, entity, scale, reduction).double()
    torch.testing.assert_close(found, expected.logsumexp(1), rtol=2e-6, atol=1e-6)
    filtered, target = known(), torch.arange(B) * 2 % E
    at_target = scores.target_scores(query, entity, target, scale, reduction)
    counts = scores.rank_counts(query, entity, target, at_target, filtered.offsets, filtered.ids, scale, reduction)
    greater, equal = reference.rank_all(q, e, target, reduction, filtered, s)
    assert torch.equal(counts, torch.stack([greater, equal, torch.zeros_like(greater)]))
    assert equal.any()
    want, want_ids = reference.topk_all(q, e, 9, reduction, filtered, s)
    for bytes_kept in (score_cuda.kernels.KEPT_BYTES, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score_cuda.kernels, "KEPT_BYTES", bytes_kept)
            best, ids = scores.topk_all(query, entity, 9, filtered.offsets, filtered.ids, scale, reduction)
        assert torch.equal(ids, want_ids)
        best = -(-best).sqrt() if reduction == "l2" else best
        torch.testing.assert_close(best.double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("D", [10, 72])
@pytest.mark.parametrize("kind", ["usual", "far", "special"])
def test_ranks_by_products_are_those_of_direct_sums(
    scores: score_cuda.Scores, monkeypatch: pytest.MonkeyPatch, kind: str, D: int
) -> None:
    """l2 through the product: near ties are told by direct sums, one after the other or a tile at a time."""
    query, entity = near_tables(kind, B, E, D)
    filtered, target = known(), torch.arange(B) * 2 % E
    at_target = scores.target_scores(query, entity, target, None, "l2")
    arguments = query, entity, target, at_target, filtered.offsets, filtered.ids, None, "l2"
    monkeypatch.setattr(score_cuda.kernels, "PRODUCT_FROM", 1 << 30)
    direct = scores.rank_counts(*arguments)
    monkeypatch.setattr(score_cuda.kernels, "PRODUCT_FROM", 1)
    in_doubt = []
    original = score_cuda.Distances.sweep

    def sweep(self: Any, consumer: str, *rest: Any) -> None:
        assert consumer == "doubt"
        bits = rest[-1][:, :, None] >> torch.arange(32) & 1
        in_doubt.append(bits.sum().item())
        original(self, consumer, *rest)

    monkeypatch.setattr(score_cuda.Distances, "sweep", sweep)
    for bytes_of_bits in (1 << 25, 1):  # all entities at once, or a tile of them
        monkeypatch.setattr(score_cuda.kernels, "DOUBT_BYTES", bytes_of_bits)
        in_doubt.clear()
        assert torch.equal(scores.rank_counts(*arguments), direct)
        assert len(in_doubt) == (1 if bytes_of_bits > 1 else 2)
        most = {"usual": 0.02, "far": 1, "special": 0.6}[kind] * B * E
        assert (kind != "usual") * 0.2 * B * E < sum(in_doubt) < most
    exact = -(query.double()[:, None] - entity.double()[None]).square().sum(-1)
    rival = torch.ones(B, E, dtype=torch.bool).scatter_(1, target[:, None], False)
    for row in range(B):
        rival[row, filtered.ids[filtered.offsets[row] : filtered.offsets[row + 1]]] = False
    if kind == "usual":
        assert torch.equal(direct[0], (rival & (exact > exact.gather(1, target[:, None]))).sum(1))


def test_parts_of_a_table_add_up_and_nan_is_last(scores: score_cuda.Scores) -> None:
    query, entity, _ = tables(10, "l1", False)
    entity[[5, 33]], query[3] = torch.nan, torch.nan
    filtered, target = known(), torch.arange(B)
    at_target = scores.target_scores(query, entity, target, None, "l1")
    counts = []
    for i, j in ((0, 20), (20, 37), (37, E), (0, E)):
        counts.append(
            scores.rank_counts(
                query, entity[i:j], target - i, at_target, filtered.offsets, filtered.ids - i, None, "l1"
            )
        )
    assert torch.equal(counts[0] + counts[1] + counts[2], counts[3])
    all_scores = reference.score_all(query.double(), entity.double(), "l1")
    for row in range(B):
        rival = torch.ones(E, dtype=torch.bool)
        rival[torch.cat([target[row : row + 1], filtered.ids[filtered.offsets[row] : filtered.offsets[row + 1]]])] = (
            False
        )
        own, others = all_scores[row, target[row]], all_scores[row][rival]
        want = [(others > own).sum() if own == own else rival.sum(), (others == own).sum(), others.isnan().sum()]
        assert counts[3][:, row].tolist() == [int(x) for x in want]
    _, ids = scores.topk_all(query, entity, E, filtered.offsets, filtered.ids, None, "l1")
    assert not ((ids == 5) | (ids == 33)).any()
    assert (ids[3] == -1).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_moduli_beyond_the_square_of_a_float(scores: score_cuda.Scores, scaled: bool) -> None:
    """Squares above 3e38 overflow where their root does not: as on the CPU, such pairs are summed again."""
    query, entity, scale = tables(16, "complex_l1", scaled)
    entity[[3, 17, 39], [2, 9, 15]] = torch.tensor([3e19, -2e30, 1e25])
    query[[1, 20], [0, 11]] = torch.tensor([-3e38, 1.9e19])
    entity[5, 4], entity[6, 12], query[2, 3] = torch.inf, torch.nan, 3e38
    entity[7, 3] = -3e38  # a difference that no float has
    found = scores.score_all(query, entity, scale, "complex_l1")
    want = score_all(query, entity, "complex_l1", scale=scale, backend="cpu")
    torch.testing.assert_close(found, want, rtol=2e-6, atol=1e-6, equal_nan=True)
    usual = found[found.isfinite()]
    assert usual.min() < -1e38
    assert (usual < -1e19).sum() > 3 * B
    target = torch.arange(B) % 8
    at_target = scores.target_scores(query, entity, target, scale, "complex_l1")
    torch.testing.assert_close(at_target, found.gather(1, target[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)


def test_half_precision_is_widened_a_share_at_a_time(
    scores: score_cuda.Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_cuda.kernels, "ROUNDED_BYTES", 4 * 10 * 16)
    query, entity, _ = tables(10, "l1", False)
    found = scores.score_all(query.half(), entity.half(), None, "l1")
    assert torch.equal(found.double(), reference.score_all(query.double(), entity.double(), "l1"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distances_on_a_gpu(reduction: str, dtype: torch.dtype) -> None:
    from dhns_fast.scoring import logsumexp_all, rank_all, score_all, topk_all

    g = torch.Generator("cuda").manual_seed(0)
    for queries, entities, D in ((3, 5, 10), (300, 1500, 80), (130, 40_000, 256)):
        query, entity = (torch.randn(n, D, generator=g, device="cuda").to(dtype) for n in (queries, entities))
        entity[1::2] = entity[::2][: len(entity[1::2])]  # duplicates: what stands elsewhere in a tile has the same bits
        target = torch.randint(entities, (queries,), generator=g, device="cuda")
        q, e = query.double(), entity.double()
        exact = torch.cat([reference.score_all(q[i : i + 16], e, reduction) for i in range(0, min(queries, 64), 16)])
        scores = score_all(query, entity, reduction, backend="cuda")
        torch.testing.assert_close(scores[:64].double(), exact, rtol=1e-5, atol=1e-5)
        own = scores.gather(1, target[:, None])
        ranks = rank_all(query, entity, target, reduction, backend="cuda")
        if reduction != "l2":  # whose root may join what the sums tell apart
            assert torch.equal(ranks.greater, (scores > own).sum(1))
            assert torch.equal(ranks.equal, (scores == own).sum(1) - 1)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(score_cuda.kernels, "PRODUCT_FROM", 1 << 30)
                direct = rank_all(query, entity, target, reduction, backend="cuda")
            assert torch.equal(ranks.greater, direct.greater)
            assert torch.equal(ranks.equal, direct.equal)
        twin = torch.where(target % 2 == 1, target - 1, (target + 1).clamp(max=entities - 1))
        assert (ranks.equal[(twin != target)] >= 1).all()
        best, ids = topk_all(query, entity, 3, reduction, backend="cuda")
        assert torch.equal(best, scores.gather(1, ids))
        torch.testing.assert_close(best, scores.topk(3).values)
        torch.testing.assert_close(
            logsumexp_all(query, entity, reduction, backend="cuda"), scores.logsumexp(1), rtol=1e-4, atol=1e-4
        )
