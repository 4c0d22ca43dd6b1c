"""The models: their three scores against each other and against the formulas written with complex numbers, in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures.cases import relative
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.fusion import Fusion
from dhns_fast.models import CP, MODELS, RESCAL, ComplEx, DistMult, KGEModel, PairRE, QuatE, RotatE, SimplE, TransE
from dhns_fast.reference import models as reference

E, R, D = 11, 3, 12
as_complex = lambda x: torch.complex(*x.chunk(2, -1))  # noqa: E731


def transe(model: KGEModel, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    assert isinstance(model, TransE)
    if model.normalize:
        h, r, t = (x / (x * x).sum(-1, keepdim=True).sqrt() for x in (h, r, t))
    d = (h + r - t).abs()
    return model.margin - (d.sum(-1) if model.p == 1 else (d * d).sum(-1).sqrt())


def distmult(model: KGEModel, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("...d,...d,...d->...", h, r, t)


def complex_(model: KGEModel, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return (as_complex(h) * as_complex(r) * as_complex(t).conj()).sum(-1).real


def rotate(model: KGEModel, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    turn = torch.exp(1j * math.pi * r * model.relation_dim / (model.margin + model.epsilon))
    return model.margin - (as_complex(h) * turn - as_complex(t)).abs().sum(-1)


def by_reference(name: str) -> Callable[..., Tensor]:
    return lambda model, *triple: model.offset + getattr(reference, name)(*triple)


VARIANTS: list[tuple[type[KGEModel], dict[str, Any], Callable[..., Tensor]]] = [
    *((TransE, {"p": p, "normalize": normalize}, transe) for p in (1, 2) for normalize in (True, False)),
    (DistMult, {}, distmult),
    (ComplEx, {}, complex_),
    (RotatE, {}, rotate),
    *((cls, {}, by_reference(name)) for name, cls in MODELS.items() if hasattr(reference, name)),
]
each_model = pytest.mark.parametrize(
    ("cls", "options", "formula"), VARIANTS, ids=["-".join([c.__name__, *map(str, o.values())]) for c, o, _ in VARIANTS]
)


def fusion() -> Fusion:
    """Two modalities, one of which every other entity lacks."""
    present = torch.arange(E) % 2 == 0
    return Fusion({"image": torch.randn(E, 5), "text": torch.randn(E, 3)}, D, present={"image": present})


@pytest.mark.parametrize("fused", [False, True])
@each_model
def test_scores(cls: type[KGEModel], options: dict[str, Any], formula: Callable[..., Tensor], fused: bool) -> None:
    torch.manual_seed(0)
    model = cls(E, R, D, fusion=fusion() if fused else None, **options).double()
    h, r, t = (torch.randint(0, n, (7,)) for n in (E, R, E))
    table, relation = model.table(), model.relation(r)
    assert (fused and not torch.equal(table, model.entity.weight)) or table is model.entity.weight
    everyone = torch.arange(E)
    expected = (
        formula(model, table[h][:, None], relation[:, None], table[None]),
        formula(model, table[None], relation[:, None], table[t][:, None]),
    )
    found = model.score_t(torch.stack([h, r], 1)), model.score_h(torch.stack([r, t], 1))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12
    rows = torch.arange(7)
    score = model.score_hrt(torch.stack([h, r, t], 1))
    for matrix, answer in zip(expected, (t, h), strict=True):
        assert relative(score, matrix[rows, answer]) < 1e-12
    # The parts themselves: a query meets the viewed candidates of either side, [B, D] or [B, N, D].
    for side, known, answer, matrix in (("tail", h, t, expected[0]), ("head", t, h, expected[1])):
        query = model.query(known, r, side)
        assert relative(model.match(query, model.entities(side)[answer]), matrix[rows, answer]) < 1e-12
        assert relative(model.match(query, model.view(model.embed(everyone.expand(7, E)), side)), matrix) < 1e-12
    weights = torch.randn(7, dtype=torch.float64)
    leaves = [p for p in model.parameters() if p.requires_grad]
    direct = torch.autograd.grad((score * weights).sum(), leaves)
    by_formula = torch.autograd.grad(
        (formula(model, model.table()[h], model.relation(r), model.table()[t]) * weights).sum(), leaves
    )
    for one, other in zip(direct, by_formula, strict=True):
        assert relative(one, other) < 1e-10


@each_model
def test_gradient_where_a_distance_is_zero(
    cls: type[KGEModel], options: dict[str, Any], formula: Callable[..., Tensor]
) -> None:
    """h∘e^{iθ} = t (or h + r = t) exactly: the modulus and the norm have gradient 0 there, and none is NaN."""
    model = cls(E, R, D, **options)
    model.relation.weight.data.zero_()
    model.entity.weight.data[1] = model.entity.weight.data[0]
    scores = [
        model.score_hrt(torch.tensor([[0, 0, 1]])),
        model.score_t(torch.tensor([[0, 0]]))[:, :2],
        model.score_h(torch.tensor([[0, 1]]))[:, :2],
    ]
    if model.distance:
        assert all(x.eq(model.margin).all() for x in scores)
    for score in scores:
        model.zero_grad()
        score.sum().backward()
        for p in model.parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all()
            assert not (model.distance and p.grad.any())


@each_model
def test_initial_ranges_and_sizes(cls: type[KGEModel], options: dict[str, Any], formula: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    dim_r = {RotatE: 32, CP: 32, RESCAL: 64**2, PairRE: 128}.get(cls, 64)
    model = cls(300, 100, 64, margin=4.0, epsilon=1.0, **options)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "entity.weight": (300, 64),
        "relation.weight": (100, dim_r),
    }
    assert model.relation_dim == dim_r
    assert model.relation_range == pytest.approx(5 / (64**1.5 if cls is RESCAL else dim_r))
    for table, bound in ((model.entity.weight, 5 / 64), (model.relation.weight, model.relation_range)):
        assert 0.99 * bound < table.max() <= bound
        assert -bound <= table.min() < -0.99 * bound
        assert table.mean().abs() < 0.05 * bound
    assert model.offset == (4.0 if model.distance else 0.0)


def test_default_margins() -> None:
    """Distances: 6. Products: the initial range of the release at D 1024 and γ 200, whatever D is."""
    assert [MODELS[name](E, R, 16).margin for name in ("transe", "rotate")] == [6.0, 6.0]
    for name in ("distmult", "complex"):
        assert MODELS[name](E, R, 1024).margin == pytest.approx(200)
        assert MODELS[name](E, R, 16).relation_range == pytest.approx(202 / 1024)


@each_model
def test_state_dict_carries_a_model(
    cls: type[KGEModel], options: dict[str, Any], formula: Callable[..., Tensor]
) -> None:
    first, second = (cls(E, R, D, fusion=fusion(), **options) for _ in range(2))
    triples = torch.tensor([[0, 1, 2], [3, 2, 1]])
    assert not torch.equal(first.score_hrt(triples), second.score_hrt(triples))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.score_hrt(triples), second.score_hrt(triples))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistMult(0, R, D), "num_entities: got 0; accepted: integers of at least 1"),
        (lambda: DistMult(E, 0, D), "num_relations: got 0; accepted: integers of at least 1"),
        (lambda: DistMult(E, R, 0), "dim: got 0; accepted: integers of at least 1"),
        *(
            (lambda cls=cls: cls(E, R, 9), f"dim: got 9; accepted: multiples of 2, for {cls.__name__}")
            for cls in (ComplEx, RotatE, SimplE, CP)
        ),
        (lambda: QuatE(E, R, 6), "dim: got 6; accepted: multiples of 4, for QuatE"),
        (lambda: TransE(E, R, D, margin=-2.0), "margin: got -2.0; accepted: numbers above -epsilon, -2.0"),
        (lambda: TransE(E, R, D, p=3), "p: got 3; accepted: 1, 2"),
        (
            lambda: DistMult(E + 1, R, D, fusion=fusion()),
            "fusion: got one for 11 entities and dim 12; accepted: 12 entities and dim 12, ",
        ),
        (
            lambda: DistMult(E, R, D + 2, fusion=fusion()),
            "fusion: got one for 11 entities and dim 12; accepted: 11 entities and dim 14, ",
        ),
        (
            lambda: DistMult(E, R, D).query(torch.zeros(1).long(), torch.zeros(1).long(), "left"),
            "side: got 'left'; accepted: tail, head",
        ),
        (lambda: DistMult(E, R, D).entities("left"), "side: got 'left'; accepted: tail, head"),
        *(
            (
                lambda cls=cls, ids=ids: cls(E, R, 12).query(*ids, "tail"),
                f"{name}: got a tensor on meta; accepted: cpu, as the table",
            )
            for cls in MODELS.values()
            for name, ids in (
                ("entity", (torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1).long())),
                ("relation", (torch.zeros(1).long(), torch.zeros(1, dtype=torch.int64, device="meta"))),
            )
        ),
        (
            lambda: DistMult(E, R, D).query(torch.zeros(2).long(), torch.zeros(1).long(), "tail"),
            "relation: got torch.int64 [1]; accepted: a relation for each entity, [2]",
        ),
    ],
)
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["rescal", "distmult", "transe"])
def test_autocast_changes_no_score(name: str) -> None:
    fusion = Fusion({"text": torch.randn(9, 5)}, 8)
    model = MODELS[name](9, 3, 8, fusion=fusion)
    pairs = torch.tensor([[0, 1], [8, 2]])
    with torch.no_grad():
        expected = (
            model.score_t(pairs),
            model.score_h(pairs.flip(1) % 3),
            model.score_hrt(torch.tensor([[0, 1, 2], [3, 2, 8]])),
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = (
                model.score_t(pairs),
                model.score_h(pairs.flip(1) % 3),
                model.score_hrt(torch.tensor([[0, 1, 2], [3, 2, 8]])),
            )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
