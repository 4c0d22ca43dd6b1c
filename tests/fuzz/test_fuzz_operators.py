"""Operators on drawn shapes from 0 up, dtypes, strides and special values: what float64 says, forward and backward, or
one InputError.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzzing import CASES, only_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dhns_fast import loss, scoring
from dhns_fast.catalogue import CONDITIONED, REDUCTIONS
from dhns_fast.data import Ragged
from dhns_fast.errors import InputError
from dhns_fast.ops import build
from dhns_fast.ops.backend import TRITON
from dhns_fast.reference import loss as reference_loss
from dhns_fast.reference import scoring as reference

BACKENDS = ["eager", "cpu", "auto"] if build.why_not("cpu") is None else ["eager", "auto"]
SPECIAL = [None, None, None, math.nan, math.inf, -math.inf, 1e20, -1e-40, -0.0, 0.0]
sizes = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 47, 49, 64, 65, 130]))
few = st.integers(0, 5)
layouts = st.sampled_from(["rows", "columns", "every other", "offset", "expanded"])
options: dict[str, Any] = {
    "seed": st.integers(0, 2**31), "reduction": st.sampled_from(REDUCTIONS), "backend": st.sampled_from(BACKENDS),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]), "layout": layouts,
    "special": st.sampled_from(SPECIAL), "scaled": st.booleans(),
}  # fmt: skip


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, strided otherwise."""
    if layout == "columns" and x.ndim > 1:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "every other":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape)
    if layout == "expanded" and x.ndim > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


class Draw:
    """Tensors of one example."""

    def __init__(self, seed: int, dtype: torch.dtype, layout: str, special: float | None) -> None:
        self.generator, self.dtype, self.layout, self.special = (
            torch.Generator().manual_seed(seed),
            dtype,
            layout,
            special,
        )

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        if self.special is not None and x.numel() and torch.rand((), generator=self.generator) < 0.5:
            x.view(-1)[int(torch.randint(x.numel(), (), generator=self.generator))] = self.special
        return laid_out(x, self.layout)

    def ids(self, high: int, *shape: int) -> Tensor:
        return laid_out(torch.randint(max(high, 1), shape, generator=self.generator), self.layout)


def assert_same(got: Tensor, want: Tensor, tolerance: float, scale: float) -> None:
    got, want = got.double(), want.double()
    # Beyond float32 the truth is an infinity there.
    limit = torch.finfo(torch.float32).max
    want = torch.where(want.abs() > limit, want.sign() * math.inf, want)
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= tolerance * (want.abs() + scale))
    assert same.all(), (got[~same][:3].tolist(), want[~same][:3].tolist())


def precision(dtype: torch.dtype) -> float:
    return 1e-11 if dtype == torch.float64 else 3e-5


def norm(*tensors: Tensor | None) -> float:
    """What rounding errors are measured by: the largest term of a sum."""
    found = [x.double().abs().nan_to_num(0, 0, 0).max().item() for x in tensors if x is not None and x.numel()]
    return max([1.0, *found]) ** 2 * 10


@given(B=sizes, E=sizes, D=sizes, **options)
def test_scores(
    B: int, E: int, D: int, seed: int, reduction: str, backend: str, dtype: Any, layout: str, special: Any, scaled: bool
) -> None:
    draw = Draw(seed, dtype, layout, special)
    query, entity, scale = draw(B, D), draw(E, D), draw(B, D).abs() + 0.5 if scaled else None
    arguments: dict[str, Any] = {"reduction": reduction, "scale": scale, "backend": backend}
    if backend == "cpu" and dtype != torch.float32:
        return
    fits = D > 0 and E > 0 and not (reduction == "complex_l1" and D % 2)
    scores = only_refused(lambda: scoring.score_all(query, entity, **arguments))
    assert (scores is not None) == fits
    if scores is None:
        return
    wide = [None if x is None else x.double() for x in (query, entity, scale)]
    if any(x is not None and x.abs().nan_to_num(0, 0, 0).max() > 1e15 for x in wide if x is None or x.numel()):
        return  # sums that cancel to nothing are compared with torch in tests/ops/test_special_values.py
    want = reference.score_all(wide[0], wide[1], reduction, wide[2])  # type: ignore[arg-type]
    tolerance, size = precision(dtype), norm(query, entity, scale)
    assert_same(scores, want, tolerance, size)
    if want.numel():
        assert_same(scoring.logsumexp_all(query, entity, **arguments), want.logsumexp(1), tolerance, size)
    target = draw.ids(E, B)
    ranks = scoring.rank_all(query, entity, target, **arguments)
    own = scores.gather(1, target[:, None])
    rival = torch.ones_like(scores, dtype=torch.bool).scatter_(1, target[:, None], False)
    if reduction != "l2":  # whose roots may make a tie of two squares
        assert torch.equal(ranks.greater, (((scores > own) | own.isnan()) & rival).sum(1))
        assert torch.equal(ranks.equal, ((scores == own) & rival).sum(1))
    k = min(E, 3)
    best, ids = scoring.topk_all(query, entity, k, **arguments)
    found = scores.masked_fill(scores.isnan(), -math.inf).sort(dim=1, descending=True, stable=True)
    assert_same(best, found.values[:, :k], 1e-6, 0)
    if reduction != "l2":
        assert torch.equal(ids, found.indices[:, :k].masked_fill(found.values[:, :k] == -math.inf, -1))
    learned = [x.detach().clone().requires_grad_() for x in (query, entity)]
    weight = torch.randn(B, generator=draw.generator)
    if B and special is None:
        value = (scoring.logsumexp_all(*learned, reduction, scale=scale, backend=backend) * weight).sum()
        truth = [x.detach().double().requires_grad_() for x in learned]
        expected = (reference.score_all(*truth, reduction, wide[2]).logsumexp(1) * weight.double()).sum()
        for got, right in zip(torch.autograd.grad(value, learned), torch.autograd.grad(expected, truth), strict=True):
            assert_same(got, right, 1e-9 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 2e-3, 1)


in_triton = pytest.mark.skipif(
    TRITON.why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None, reason="needs Triton"
)
# Launches are slow in its interpreter.
some = settings(max_examples=max(6, CASES // 8))
kinds = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
interpreted = options | {
    "backend": st.just("triton"),
    "dtype": kinds,
    "special": st.sampled_from([None, math.nan, -0.0, -1e-40]),
}


@in_triton
@some
@given(B=few, E=sizes, D=few, **interpreted)
def test_scores_in_triton(**drawn: Any) -> None:
    test_scores.hypothesis.inner_test(**drawn)  # type: ignore[attr-defined]


@in_triton
@some
@given(B=few, E=few, D=few, N=few, shared=st.booleans(), **interpreted)
def test_corruption_loss_in_triton(**drawn: Any) -> None:
    if drawn["scaled"] and not drawn["shared"]:
        return  # it takes none
    test_corruption_loss.hypothesis.inner_test(**drawn)  # type: ignore[attr-defined]


@given(B=few, E=few, D=few, N=few, shared=st.booleans(), **options)
def test_corruption_loss(
    B: int,
    E: int,
    D: int,
    N: int,
    shared: bool,
    seed: int,
    reduction: str,
    backend: str,
    dtype: Any,
    layout: str,
    special: Any,
    scaled: bool,
) -> None:
    draw = Draw(seed, dtype, layout, special)
    query, table, scale = draw(B, D), draw(E, D), draw(B, D).abs() + 0.5 if scaled else None
    answer, corrupt = draw.ids(E, B), draw.ids(E, N) if shared else draw.ids(E, B, N)
    if backend == "cpu" and ((scaled and not shared) or (shared and dtype == torch.float64)):
        return
    learned = [x.detach().clone().requires_grad_() for x in (query, table)]
    value = only_refused(
        lambda: loss.corruption_loss(*learned, answer, corrupt, reduction, 1.0, 0.5, scale=scale, backend=backend)
    )
    fits = min(B, E, D, N) > 0 and not (reduction == "complex_l1" and D % 2)
    assert fits or value is None
    if not fits:
        return
    truth = [x.detach().double().requires_grad_() for x in learned]
    ids = corrupt.expand(B, N) if shared else corrupt
    expected = reference_loss.corruption_loss(
        *truth, answer, ids, reduction, 1.0, 0.5, None if scale is None else scale.double()
    )
    beyond = special == 1e20 and dtype != torch.float64 and (reduction != "l1" and (reduction != "dot" or scaled))
    if value is None and beyond:
        return  # a square, or the scaled query, is beyond float32: the loss may be refused (docs/numerics.md)
    finite = bool(expected.isfinite()) and expected.abs() < 1e15
    assert (value is not None) == finite or not finite
    if value is None or special is not None:
        return
    assert_same(value, expected, precision(dtype), norm(query, table, scale))
    for got, right in zip(torch.autograd.grad(value, learned), torch.autograd.grad(expected, truth), strict=True):
        assert_same(got, right, 1e-9 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-3, 1)


@given(
    B=few, D=few, L=few, M=st.integers(0, 3), interaction=st.sampled_from(CONDITIONED), p=st.sampled_from([1, 2]), fused=st.booleans(),
    normalize=st.booleans(), seed=st.integers(0, 2**31), backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), layout=layouts, special=st.sampled_from(SPECIAL),
)  # fmt: skip
def test_hardness_adaptive_loss(
    B: int, D: int, L: int, M: int, interaction: str, p: int, fused: bool, normalize: bool, seed: int, backend: str, dtype: Any, layout: str,
    special: Any,
) -> None:  # fmt: skip
    draw = Draw(seed, dtype, layout, special)
    lead = (M,) if fused else ()
    learned = {
        "head": draw(*lead, B, D), "relation": draw(B, D // 2 if interaction == "rotate" else D), "tail": draw(*lead, B, D),
        **({"attention": draw(D)} if fused else {}),
    }  # fmt: skip
    learned = {name: x.detach().clone().requires_grad_() for name, x in learned.items()}
    given_ = {"neg_head": draw(L, M, B, D), "neg_tail": draw(L, M, B, D)}
    margin, weight = torch.rand(L, generator=draw.generator), torch.rand(L, generator=draw.generator)
    weight = torch.where(weight < 0.3, 0.0, weight) if L > 1 and (weight >= 0.3).any() else weight
    further: dict[str, Any] = {"gamma": 2.0, "normalize": normalize, "p": p}
    arguments = {**learned, **given_, "margin": margin, "weight": weight, **further}
    value = only_refused(lambda: loss.hal_from_embeddings(interaction, **arguments, backend=backend))  # type: ignore[arg-type]
    fits = min(B, D, L, M) > 0 and not (interaction in ("complex", "rotate") and D % 2)
    fits = fits and (interaction == "transe" or (p == 1 and not normalize))
    assert fits or value is None
    if not fits:
        return
    truth = {name: x.detach().double().requires_grad_() for name, x in learned.items()}
    wide = {name: x.double() for name, x in given_.items()}
    expected = reference_loss.hal_from_embeddings(
        interaction,
        **truth,
        **wide,
        margin=margin.double(),
        weight=weight.double(),
        **further,  # type: ignore[arg-type]
    )
    if special is None:
        assert value is not None
        assert_same(value, expected, precision(dtype) * 10, 1)
        names = list(learned)
        got = torch.autograd.grad(value, [learned[n] for n in names])
        right = torch.autograd.grad(expected, [truth[n] for n in names])
        for name, a, b in zip(names, got, right, strict=True):
            assert_same(a, b, 1e-9 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 2e-3, 1), name
    elif value is not None and expected.isfinite() and expected < 1e15:
        assert_same(value, expected, 1e-3, 1)


@given(
    B=few, N=few, L=few, K=few, seed=st.integers(0, 2**31), backend=st.sampled_from(BACKENDS), layout=layouts, special=st.sampled_from(SPECIAL),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), temperature=st.sampled_from([0.0, 0.5, 3.0]),
)  # fmt: skip
def test_losses_of_scores(
    B: int, N: int, L: int, K: int, seed: int, backend: str, layout: str, special: Any, dtype: Any, temperature: float
) -> None:
    draw = Draw(seed, dtype, layout, special)
    positive, negative, levels = draw(B), draw(B, N), draw(L, K, B)
    margin, weight = torch.rand(L, generator=draw.generator), torch.rand(L, generator=draw.generator) + 0.1
    cases = (
        (min(B, N), (positive, negative), lambda p, n, **o: loss.self_adversarial_loss(p, n, temperature, **o),
         lambda p, n: reference_loss.self_adversarial_loss(p, n, temperature)),
        (min(B, L, K), (positive, levels), lambda p, n, **o: loss.hardness_adaptive_loss(p, n, margin, weight, 0.7, **o),
         lambda p, n: reference_loss.hardness_adaptive_loss(p, n, margin.double(), weight.double(), 0.7)),
    )  # fmt: skip
    for least, tensors, run, oracle in cases:
        learned = [x.detach().clone().requires_grad_() for x in tensors]
        value = only_refused(lambda run=run, learned=learned: run(*learned, backend=backend))  # type: ignore[misc]
        assert least > 0 or value is None
        if not least:
            continue
        truth = [x.detach().double().requires_grad_() for x in learned]
        expected = oracle(*truth)
        assert (value is not None) == bool(expected.isfinite())
        if value is None:
            continue
        assert_same(value, expected, precision(dtype), 1)
        for got, right in zip(torch.autograd.grad(value, learned), torch.autograd.grad(expected, truth), strict=True):
            assert_same(got, right, 1e-9 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-3, 1e-2)


@given(
    B=few, E=st.integers(1, 9), seed=st.integers(0, 2**31), backend=st.sampled_from(BACKENDS), spoil=st.integers(0, 4)
)
def test_known_answers(B: int, E: int, seed: int, backend: str, spoil: int) -> None:
    """Offsets and ids that are none, and the ranks of those that are."""
    g = torch.Generator().manual_seed(seed)
    query, entity, target = (
        torch.randn(B, 4, generator=g),
        torch.randn(E, 4, generator=g),
        torch.randint(E, (B,), generator=g),
    )
    rows = [(torch.rand(E, generator=g) < 0.4).nonzero().flatten() for _ in range(B)]
    offsets = torch.tensor([0, *(len(x) for x in rows)]).cumsum(0)
    ids = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
    if spoil == 1 and len(ids):
        ids = ids.flip(0)
    elif spoil == 2:
        offsets = offsets + torch.randint(-1, 2, offsets.shape, generator=g)
    elif spoil == 3 and len(ids):
        ids = ids + int(torch.randint(-E, E + 1, (), generator=g))
    known = Ragged(offsets, ids)
    for act in (
        lambda: scoring.rank_all(query, entity, target, known=known, backend=backend),
        lambda: scoring.topk_all(query, entity, 1, known=known, backend=backend),
    ):
        only_refused(act, InputError)
    if spoil == 0:
        ranks = scoring.rank_all(query, entity, target, known=known, backend=backend)
        greater, equal = reference.rank_all(query, entity, target, known=known)
        assert torch.equal(ranks.greater, greater)
        assert torch.equal(ranks.equal, equal)
