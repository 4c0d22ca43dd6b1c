"""The compiled losses against the oracle in float64: value and every gradient, on ragged shapes, through poisoned
memory.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast import loss
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.reference import loss as reference

REASON = backends.CPU.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")

WEIGHT, MARGIN = [0.0, 0.5, 1.0, 0.25], [9.0, 0.3, 0.5, -0.7]
MODELS = [
    ("transe", 1, False),
    ("transe", 1, True),
    ("transe", 2, False),
    ("distmult", 1, False),
    ("complex", 1, False),
    ("rotate", 1, False),
]
# Sizes: one of everything; ragged against vectors of 4, 8 and 16 and blocks of 16 rows; several blocks.
SHAPES = [(1, 2, 1), (5, 6, 2), (17, 38, 3), (50, 130, 2)]


def case(
    interaction: str, B: int, D: int, M: int, fused: bool, dtype: torch.dtype, masked: bool = False
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(B + D + M)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).mul(0.5).to(dtype)  # noqa: E731
    lead = (M,) if fused else ()
    arguments: dict[str, Any] = {
        "interaction": interaction,
        "head": draw(*lead, B, D),
        "relation": draw(B, D // 2 if interaction == "rotate" else D).mul(3),
        "tail": draw(*lead, B, D),
        "neg_head": draw(4, M, B, D),
        "neg_tail": draw(4, M, B, D),
        "margin": torch.tensor(MARGIN, dtype=dtype),
        "weight": torch.tensor(WEIGHT, dtype=dtype),
        "gamma": 1.5,
        "mu": 0.7,
    }
    arguments["neg_head"][0] = arguments["neg_tail"][0] = math.nan  # weight 0: nobody may look
    if fused:
        arguments["attention"] = draw(D).mul(4)
    if masked:
        present = torch.rand(2, M, B, generator=g) < 0.6
        present[:, 0, 1:] = True  # entity 0 may have no modality at all
        arguments["present"] = (present[0], present[1])
        for name, mask in zip(("head", "tail"), present, strict=True):
            arguments[name] = torch.where(mask[..., None], arguments[name], math.nan)
    return arguments


def run(function: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradients, gradients of absent modalities included."""
    leaves = {
        k: arguments[k].detach().clone().requires_grad_()
        for k in ("head", "relation", "tail", "attention", "margin")
        if k in arguments
    }
    value = function(**{**arguments, **leaves})
    return {
        "loss": value.detach(),
        **dict(zip(leaves, torch.autograd.grad(3 * value, list(leaves.values())), strict=True)),
    }


def assert_agrees(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, reference_value in want.items():
        scale = reference_value.abs().max().item()
        error = (got[name].double() - reference_value.double()).abs().max().item()
        assert error <= tolerance * max(scale, 1e-3), f"{name}: off by {error:.2e} of {scale:.2e}"


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an operator allocates holds NaN: what it does not write is seen."""
    for name in ("empty_like", "empty"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: original(*a, **k).fill_(math.nan))
    pooled = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *a: pooled(*a).fill_(math.nan))
    original_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: original_new(self, *a, **k).fill_(math.nan))


@pytest.mark.parametrize("fused", [False, True], ids=["mean", "fused"])
@pytest.mark.parametrize(("interaction", "p", "normalize"), MODELS, ids=[f"{i}{p}{'n' * n}" for i, p, n in MODELS])
def test_from_embeddings(interaction: str, p: int, normalize: bool, fused: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for B, D, M in SHAPES:
            arguments = {**case(interaction, B, D, M, fused, dtype), "p": p, "normalize": normalize}
            wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
            assert_agrees(
                run(loss.hal_from_embeddings, {**arguments, "backend": "cpu"}),
                run(reference.hal_from_embeddings, wide),
                tolerance,
            )


@pytest.mark.parametrize("fused", [False, True], ids=["mean", "fused"])
def test_gradients_that_go_past_the_caches(fused: bool) -> None:
    # 4 MB of gradients; rows of 1001 begin at every alignment, those of 1008 at one only.
    for D in (1001, 1008):
        arguments = case("distmult", 1060, D, 2, fused, torch.float32)
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert_agrees(
            run(loss.hal_from_embeddings, {**arguments, "backend": "cpu"}),
            run(reference.hal_from_embeddings, wide),
            2e-5,
        )


@pytest.mark.parametrize("fused", [False, True], ids=["mean", "fused"])
def test_triples_beyond_doubt_give_no_denormal_gradients(fused: bool) -> None:
    # Scores of about -90: sigmoids of 1e-39, at which some processors are slow.
    arguments = {**case("rotate", 40, 230, 2, fused, torch.float32), "gamma": 200.0}
    for name, gradient in run(loss.hal_from_embeddings, {**arguments, "backend": "cpu"}).items():
        least = gradient.abs()[gradient != 0]
        assert (least >= torch.finfo(torch.float32).tiny).all(), name


def test_backward_may_be_repeated() -> None:
    arguments = case("distmult", 5, 6, 2, True, torch.float64)
    head = arguments["head"].requires_grad_()
    value = loss.hal_from_embeddings(**arguments, backend="cpu")
    (want,) = torch.autograd.grad(value, head, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    for factor in (1, 2, 3):
        value.backward(retain_graph=True)
        torch.testing.assert_close(head.grad, want * factor / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("interaction", ["transe", "complex", "rotate"])
def test_absent_modalities(interaction: str) -> None:
    for B, D, M in SHAPES:
        arguments = case(interaction, B, D, M, True, torch.float64, masked=True)
        assert_agrees(
            run(loss.hal_from_embeddings, {**arguments, "backend": "cpu"}),
            run(reference.hal_from_embeddings, arguments),
            1e-12,
        )


def test_a_gradient_changed_by_its_receiver_is_no_silent_error() -> None:
    """A factor of 1 hands the saved gradients out as they are; leaves get their own, and who changes one in place is
    told when it matters.
    """
    arguments = case("distmult", 5, 6, 2, True, torch.float64)
    head = arguments["head"].requires_grad_()
    value = loss.hal_from_embeddings(**arguments, backend="cpu")
    (first,) = torch.autograd.grad(value, head, retain_graph=True)
    want = first.clone()
    value.backward(retain_graph=True)
    assert head.grad is not None
    head.grad.zero_()
    (again,) = torch.autograd.grad(value, head, retain_graph=True)
    assert torch.equal(again, want)
    again.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_threads_do_not_change_the_result() -> None:
    arguments = {**case("rotate", 100, 64, 3, True, torch.float32), "backend": "cpu"}
    scores = torch.randn(20_000), torch.randn(4, 3, 20_000), torch.randn(4), torch.tensor(WEIGHT), 0.01
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(loss.hal_from_embeddings, arguments))
            results[-1] |= dict(enumerate(torch.ops.dhns_fast.hal_scores(*scores)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def test_strided_and_bfloat16_inputs() -> None:
    arguments = case("distmult", 5, 6, 2, True, torch.float32)
    want = run(loss.hal_from_embeddings, {**arguments, "backend": "eager"})
    strided = {
        **arguments,
        "head": arguments["head"].mT.contiguous().mT,
        "neg_tail": arguments["neg_tail"].mT.contiguous().mT,
    }
    assert_agrees(run(loss.hal_from_embeddings, {**strided, "backend": "cpu"}), want, 1e-5)
    names = ("head", "tail", "relation", "neg_head", "neg_tail", "attention")
    narrow = {k: v.bfloat16() if k in names else v for k, v in arguments.items()}
    widened = {k: v.float() if k in names else v for k, v in narrow.items()}
    got = run(loss.hal_from_embeddings, {**narrow, "backend": "cpu"})
    assert got["loss"].dtype == torch.float32
    assert got["head"].dtype == torch.bfloat16
    assert_agrees(got, run(loss.hal_from_embeddings, {**widened, "backend": "eager"}), 2.0**-8)


@pytest.mark.parametrize(("interaction", "fused"), [("distmult", False), ("transe", True), ("rotate", True)])
def test_gradcheck(interaction: str, fused: bool) -> None:
    arguments = case(interaction, 3, 4, 2, fused, torch.float64)
    names = [k for k in ("head", "relation", "tail", "attention", "margin") if k in arguments]
    leaves = [arguments[k].clone().requires_grad_() for k in names]

    def f(*values: Tensor) -> Tensor:
        return loss.hal_from_embeddings(
            **{**arguments, **dict(zip(names, values, strict=True))}, normalize=interaction == "transe", backend="cpu"
        )

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_scores(dtype: torch.dtype, size: float) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for B, K, N in ((1, 1, 1), (5, 3, 7), (37, 2, 64), (2500, 2, 3)):
        g = torch.Generator().manual_seed(B)
        leaves = [
            (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(dtype)
            for shape in ((B,), (4, K, B), (4,), (B, N))
        ]
        leaves[1][0] = math.nan
        for name, pick in (("hardness_adaptive_loss", [0, 1, 2]), ("self_adversarial_loss", [0, 3])):
            extra = (WEIGHT, 0.7) if name[0] == "h" else (0.8,)
            got, want = [], []
            for out, function, wide in (
                (got, getattr(loss, name), dtype),
                (want, getattr(reference, name), torch.float64),
            ):
                inputs = [leaves[i].detach().to(wide).requires_grad_() for i in pick]
                value = function(*inputs, *extra, **({"backend": "cpu"} if out is got else {}))
                out += [value.detach(), *torch.autograd.grad(value, inputs)]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(
                    a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item() + 1e-30
                )


def test_scores_gradcheck() -> None:
    positive, negative, margin = (
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3,), (4, 2, 3), (4,))
    )
    assert torch.autograd.gradcheck(
        lambda *x: loss.hardness_adaptive_loss(*x, WEIGHT, backend="cpu"), (positive, negative, margin)
    )


def test_operator_contract() -> None:
    a = case("rotate", 5, 6, 2, True, torch.float32)
    a["neg_head"][0] = a["neg_tail"][0] = 0
    for name in ("head", "relation", "tail", "attention", "margin"):
        a[name].requires_grad_()
    inputs = [
        a[k]
        for k in ("head", "relation", "tail", "neg_head", "neg_tail", "margin", "weight", "mu", "gamma", "attention")
    ]
    torch.library.opcheck(torch.ops.dhns_fast.hal_embeddings.default, ("rotate", *inputs, False, 1, None, None, True))
    constant = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    torch.library.opcheck(
        torch.ops.dhns_fast.hal_embeddings.default, ("rotate", *constant, False, 1, None, None, False)
    )
    scores = torch.randn(5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.dhns_fast.hal_scores.default, (*scores, a["margin"], a["weight"], 0.01))
    torch.library.opcheck(
        torch.ops.dhns_fast.self_adversarial.default, (scores[0], torch.randn(5, 3, requires_grad=True), 0.5)
    )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_scores_do_not_overflow(sign: float, fused: bool, backend: str) -> None:
    """Every score ±1e4: the negatives' loss is 1e4 of each that is wrong, and no gradient overflows."""
    B, D, M = 3, 4, 2
    lead = (M,) if fused else ()
    head, tail = (torch.full((*lead, B, D), 50.0, requires_grad=True) for _ in range(2))
    relation = torch.full((B, D), sign, requires_grad=True)
    made = torch.full((2, 4, M, B, D), 50.0)
    attention = torch.ones(D) if fused else None
    weight = [0.0, 1.0, 2.0, 1.0]
    value = loss.hal_from_embeddings(
        "distmult", head, relation, tail, *made, [0.0] * 4, weight, 1.0, attention=attention, backend=backend
    )
    # 50·50·4 = 1e4: wrong are the negatives when the sign is +, the positives when it is −.
    assert value.item() == pytest.approx(0.5 * sum(weight) / 3 * 1e4, rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (head, relation, tail)))


def test_scores_compile_in_one_graph() -> None:
    positive, negative, single = (torch.randn(*s).requires_grad_() for s in ((5,), (4, 3, 5), (5, 7)))
    for function, arguments in (
        (loss.hardness_adaptive_loss, (positive, negative, MARGIN, WEIGHT)),
        (loss.self_adversarial_loss, (positive, single)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        (got,), (want,) = (torch.autograd.grad(f(*arguments), arguments[1]) for f in (compiled, function))
        assert torch.equal(got, want)


def test_compiles_in_one_graph() -> None:
    arguments = case("complex", 5, 6, 2, True, torch.float32)

    head = arguments["head"].requires_grad_()
    compiled = torch.compile(loss.hal_from_embeddings, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(**arguments), head)
    (want,) = torch.autograd.grad(loss.hal_from_embeddings(**arguments), head)
    assert torch.equal(got, want)
