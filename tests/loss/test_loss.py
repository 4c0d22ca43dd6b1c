"""The losses against the release's golden values, against formulas written out by hand, and on input that must be
refused.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.loss import corruption_loss, hal_from_embeddings, hardness_adaptive_loss, self_adversarial_loss

GOLDEN = Path(__file__).resolve().parents[2] / "../shared/golden"
CASES = sorted(GOLDEN.glob("hal_*.npz"))
WEIGHT = [0.0, 0.5, 1.0, 1.0, 0.5]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.skipif(not CASES, reason="the golden cases of the release are not beside the checkout")
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: getattr(p, "stem", "none"))
def test_golden(path: Path, backend: str | None) -> None:
    case = np.load(path)
    get = lambda key: torch.from_numpy(np.array(case[key]))  # noqa: E731
    kind = path.stem.split("_")[1]
    fused = kind != "distmult"
    gamma = case["margin"].item() if fused else 0.0
    margin, weight, mu = get("w_margin").float() * gamma, get("w").float(), case["mu"].item()
    positive, negative = get("p_score").flatten(), get("hal_neg_score") - margin[:, None, None]
    assert (
        relative(hardness_adaptive_loss(positive, negative, margin, weight, mu, backend=backend), get("hal_loss"))
        < 2e-6
    )
    assert relative(self_adversarial_loss(positive, get("n_score"), backend=backend), get("kgc_loss")) < 2e-6

    state = {k[6:]: get(k).requires_grad_(case[k].ndim > 1) for k in case.files if k.startswith("state/")}
    h, t = get("batch_h")[: len(case["batch_t"])], get("batch_t")

    def real(ids: Tensor) -> Tensor:
        structure = state["ent_embeddings.weight"][ids]
        if not fused:
            return structure
        others = [
            state[f"{m}_embeddings.weight"][ids] @ state[f"{m}_proj.weight"].T + state[f"{m}_proj.bias"]
            for m in ("img", "text")
        ]
        return torch.stack([structure, *others])

    relation = state["rel_embeddings.weight"][get("batch_r")]
    if kind == "rotate":
        relation = relation * (math.pi / state["rel_embedding_range"].item())
    generated = [torch.stack([get(f"neg/{side}{m}") for m in ("", "v", "t")], 1) for side in "ht"]
    generated = [g.clone() for g in generated]
    for g in generated:
        g[0] = math.nan  # level 0 has weight 0: it must not be looked at
    attention = state["ent_attn.weight"].flatten() if fused else None
    loss = hal_from_embeddings(
        kind,
        real(h),
        relation,
        real(t),
        *generated,
        margin,
        weight,
        mu,
        gamma,
        attention,
        kind == "transe",
        backend=backend,
    )
    assert relative(loss.detach(), get("hal_loss")) < 2e-6
    loss.backward()
    checked = 0
    for key in case.files:
        parameter = state.get(key.removeprefix("hal_grad/"))
        if key.startswith("hal_grad/") and parameter is not None and parameter.requires_grad:
            assert parameter.grad is not None, key
            assert relative(parameter.grad, get(key)) < 1e-5, key
            checked += 1
    assert checked >= (7 if fused else 2)


def test_hardness_adaptive_loss_by_hand() -> None:
    positive, negative = [0.3, -1.2], [[[0.5, 2.0]], [[-0.7, 0.1]], [[9.0, 9.0]]]
    margin, weight = [0.1, 0.4, 0.0], [2.0, 1.0, 0.0]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    true = sum(softplus(-p) for p in positive) / 2
    want = (
        sum(
            w * 0.5 * (true + sum(softplus(m + n) for n in row[0]) / 2)
            for w, m, row in zip(weight, margin, negative, strict=True)
        )
        * 0.01
        / 2
    )
    got = hardness_adaptive_loss(
        torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64), margin, weight
    )
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_self_adversarial_loss_by_hand() -> None:
    positive, negative, a = [0.3, -1.2], [[0.5, 2.0, -1.0], [0.0, 0.1, 4.0]], 0.5
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    false = 0.0
    for row in negative:
        share = [math.exp(a * n) for n in row]
        false += sum(s / sum(share) * softplus(n) for s, n in zip(share, row, strict=True)) / 2
    want = 0.5 * (sum(softplus(-p) for p in positive) / 2 + false)
    got = self_adversarial_loss(
        torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64), a
    )
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("size", [1e4, 88.0, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_scores_do_not_overflow(size: float, sign: float) -> None:
    positive = torch.full((3,), -sign * size, requires_grad=True)
    negative = torch.full((5, 3, 3), sign * size, requires_grad=True)
    factor = sum(WEIGHT) * 0.01 / 4
    loss = hardness_adaptive_loss(positive, negative, [0.0] * 5, WEIGHT)
    assert loss.item() == pytest.approx(factor * max(sign * size, 0.0), rel=1e-5, abs=1e-30)
    other = self_adversarial_loss(positive, negative[1])
    assert other.item() == pytest.approx(max(sign * size, 0.0), rel=1e-5, abs=1e-30)
    for gradient in torch.autograd.grad(loss, (positive, negative)) + torch.autograd.grad(other, (positive, negative)):
        assert gradient.isfinite().all()


def test_values_that_are_not_finite_are_named() -> None:
    positive, negative = torch.zeros(4), torch.zeros(5, 3, 4)
    negative[0] = math.nan
    assert hardness_adaptive_loss(positive, negative, [0.0] * 5, WEIGHT).isfinite()
    negative[2, 1, 3] = math.inf
    with pytest.raises(
        InputError,
        match=r"negative\[2\]: got 1 values that are not finite, the first inf at \[1, 3\]; accepted: finite values",
    ):
        hardness_adaptive_loss(positive, negative, [0.0] * 5, WEIGHT)
    positive[1] = math.nan
    with pytest.raises(
        InputError, match=r"positive: got 1 values that are not finite, the first nan at \[1\]; accepted: finite values"
    ):
        self_adversarial_loss(positive, torch.zeros(4, 2))
    generated = torch.zeros(5, 2, 4, 6)
    generated[3, 1, 0, 2] = -math.inf
    x = torch.ones(4, 6)
    with pytest.raises(
        InputError, match=r"neg_tail\[3\]: got 1 values that are not finite, the first -inf at \[1, 0, 2\]"
    ):
        hal_from_embeddings("distmult", x, x, x, torch.ones(5, 2, 4, 6), generated, [0.0] * 5, WEIGHT)


def embeddings(B: int = 4, D: int = 6, M: int = 2, L: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "head": draw(M, B, D),
        "relation": draw(B, D),
        "tail": draw(M, B, D),
        "neg_head": draw(L, M, B, D),
        "neg_tail": draw(L, M, B, D),
    }


def test_absent_modality_is_as_if_it_were_not_there() -> None:
    x, attention = embeddings(M=3), torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    rest = {"margin": [0.1] * 5, "weight": WEIGHT, "attention": attention, "interaction": "distmult"}
    small = {k: v if k == "relation" else v[:2] if v.dim() == 3 else v[:, :2] for k, v in x.items()}
    want = hal_from_embeddings(**small, **rest)
    (want_gradient,) = torch.autograd.grad(want, attention)
    for name in ("head", "tail", "neg_head", "neg_tail"):
        x[name][..., 2, :, :] = math.nan
    head, present = x.pop("head").requires_grad_(), torch.tensor([True, True, False])[:, None].expand(3, 4)
    got = hal_from_embeddings(head=head, **x, **rest, present=(present, present))
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    gradient, head_gradient = torch.autograd.grad(got, (attention, head))
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-10, atol=1e-14)
    assert head_gradient[2].eq(0).all()


def test_nothing_flows_into_what_was_generated() -> None:
    x = embeddings()
    for v in x.values():
        v.requires_grad_()
    hal_from_embeddings(
        "rotate", x["head"][0], x["relation"][:, :3], x["tail"][0], x["neg_head"], x["neg_tail"], [0.1] * 5, WEIGHT
    ).backward()
    assert x["neg_head"].grad is None
    assert x["neg_tail"].grad is None
    assert x["head"].grad is not None


def test_arguments_of_several_types_meet_in_the_widest() -> None:
    wide = {**embeddings(), "attention": torch.ones(6, dtype=torch.float64)}
    narrow = {name: x.float() if name in ("head", "neg_tail", "attention") else x for name, x in wide.items()}
    rounded = {name: narrow[name].to(x.dtype) for name, x in wide.items()}
    options = {"margin": [0.0] * 5, "weight": [1.0] * 5}
    got, want = (hal_from_embeddings("distmult", **x, **options) for x in (narrow, rounded))  # type: ignore[arg-type]
    assert got.dtype == torch.float64
    assert torch.equal(got, want)
    positive, negative = wide["head"][0, :, 0], wide["neg_head"][:, :, :, 0]
    for other in (positive, positive.float()):
        value = hardness_adaptive_loss(other, negative, [0.0] * 5, [1.0] * 5)
        assert value.dtype == torch.float64
        torch.testing.assert_close(
            value, hardness_adaptive_loss(positive, negative, [0.0] * 5, [1.0] * 5), rtol=1e-6, atol=0
        )
    query, table = wide["head"][0], wide["tail"][0]
    ids = torch.zeros(len(query), dtype=torch.int64)
    corrupt = torch.ones(len(query), 2, dtype=torch.int64)
    got, want = (corruption_loss(q, table, ids, corrupt) for q in (query.float(), query.float().double()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("interaction", ["transe", "rotate"])
def test_distance_of_zero_has_a_gradient_of_zero(interaction: str) -> None:
    ones = torch.ones(2, 4, requires_grad=True)
    relation = torch.zeros(2, 2 if interaction == "rotate" else 4)
    generated = torch.ones(1, 1, 2, 4)
    for p in (1, 2) if interaction == "transe" else (1,):
        loss = hal_from_embeddings(interaction, ones, relation, ones, generated, generated, [0.0], [1.0], p=p)
        assert torch.autograd.grad(loss, ones)[0].eq(0).all()


REFUSED = [
    (
        {"interaction": "transh"},
        r"interaction: got 'transh'; accepted: transe, distmult, complex, rotate \(did you mean 'transe'\?\)",
    ),
    ({"head": torch.zeros(4, 6)}, r"head: got shape \[4, 6\]; accepted: \[M, B, D\]"),
    ({"attention": None}, r"head: got shape \[2, 4, 6\]; accepted: \[B, D\]"),
    ({"interaction": "rotate"}, r"relation: got shape \[4, 6\]; accepted: \[B = 4, 3\]"),
    ({"tail": torch.zeros(2, 4, 5)}, r"tail: got shape \[2, 4, 5\]; accepted: \[M = 2, B = 4, D = 6\]"),
    (
        {"neg_head": torch.zeros(5, 3, 4, 6)},
        r"neg_head: got shape \[5, 3, 4, 6\]; accepted: \[L, M = 2, B = 4, D = 6\]",
    ),
    (
        {"neg_tail": torch.zeros(4, 2, 4, 6)},
        r"neg_tail: got shape \[4, 2, 4, 6\]; accepted: \[L = 5, M = 2, B = 4, D = 6\]",
    ),
    (
        {"neg_tail": torch.zeros(5, 2, 4, 6, dtype=torch.int64)},
        r"neg_tail: got torch.int64 \[5, 2, 4, 6\]; accepted: floating-point dtypes",
    ),
    ({"margin": [0.1] * 4}, r"margin: got shape \[4\]; accepted: \[L = 5\]"),
    ({"weight": [0.0] * 5}, r"weight: got \[0.0, 0.0, 0.0, 0.0, 0.0\]; accepted: at least one level with a weight > 0"),
    ({"weight": [1.0, -1.0, 0.0, 0.0, 0.0]}, r"weight: got \[1.0, -1.0, 0.0, 0.0, 0.0\]; accepted: values >= 0"),
    (
        {"weight": torch.ones(5).requires_grad_()},
        "weight: got a tensor that requires a gradient; accepted: one that req",
    ),
    ({"attention": torch.zeros(5)}, r"attention: got shape \[5\]; accepted: \[D = 6\]"),
    (
        {"normalize": True},
        "normalize, p: got normalize=True, p=1 with 'complex'; accepted: False and 1; only 'transe' has them",
    ),
    ({"interaction": "transe", "p": 3}, "p: got 3; accepted: 1, 2"),
    (
        {"present": (torch.ones(2, 4), torch.ones(2, 4))},
        r"head_present: got torch.float32 \[2, 4\]; accepted: torch.bool",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "interaction": "complex",
        "attention": torch.zeros(6),
        "margin": [0.1] * 5,
        "weight": WEIGHT,
        **embeddings(),
        **change,
    }
    with pytest.raises(InputError, match=message):
        hal_from_embeddings(**arguments)  # type: ignore[arg-type]


def test_margins_of_a_list_have_their_gradients() -> None:
    positive, negative = torch.randn(3), torch.randn(2, 3, 3)
    margins = [torch.nn.Parameter(torch.tensor(x)) for x in (0.5, 2.0)]
    hardness_adaptive_loss(positive, negative, margins, [1.0, 0.5]).backward()
    together = torch.tensor([0.5, 2.0], requires_grad=True)
    hardness_adaptive_loss(positive, negative, together, [1.0, 0.5]).backward()
    with torch.no_grad():
        assert hardness_adaptive_loss(positive, negative, margins, torch.tensor([1.0, 0.5]).requires_grad_()) > 0
    assert torch.stack([x.grad for x in margins]).tolist() == together.grad.tolist()  # type: ignore[misc, union-attr]
    given = hardness_adaptive_loss(positive, negative, [0.5, 2.0], [1.0, 0.5])
    with torch.device("meta"):
        assert hardness_adaptive_loss(positive, negative, {0: 0.5, 6: 2.0}.values(), [1.0, 0.5]) == given  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "numbers",
    [
        {0.7: 1, 0.3: 2}, {0.7, 0.3}, b"ab", "ab", iter([0.7, 0.3]), None, [[0.7], [0.3]], 0.7, torch.ones(2, 1),
        torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.nested.nested_tensor([torch.ones(2)]),
    ],
)  # fmt: skip
def test_margins_and_weights_are_numbers_in_order(numbers: object) -> None:
    scores = torch.randn(3), torch.randn(2, 3, 3)
    with pytest.raises(InputError, match=r"^margin: got "):
        hardness_adaptive_loss(*scores, numbers, [1.0, 0.5])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^weight: got "):
        hardness_adaptive_loss(*scores, [1.0, 0.5], numbers)  # type: ignore[arg-type]


def test_refused_scores() -> None:
    with pytest.raises(InputError, match=r"negative: got shape \[5, 3, 4\]; accepted: \[L, K, B = 6\]"):
        hardness_adaptive_loss(torch.zeros(6), torch.zeros(5, 3, 4), [0.0] * 5, WEIGHT)
    with pytest.raises(InputError, match=r"negative: got shape \[6, 0\]; accepted: no empty dimension"):
        self_adversarial_loss(torch.zeros(6), torch.zeros(6, 0))
    with pytest.raises(InputError, match=r"positive: got torch.int64 \[6\]; accepted: floating-point dtypes"):
        self_adversarial_loss(torch.zeros(6, dtype=torch.int64), torch.zeros(6, 1))
