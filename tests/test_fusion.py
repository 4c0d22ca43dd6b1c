"""Fusion of modalities against the oracle: any number of them, entities that lack some, and what gradients reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures.cases import relative
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.fusion import Fusion
from dhns_fast.models import TransE
from dhns_fast.reference.loss import fuse

E, D = 9, 6
WIDTHS = {"image": 5, "text.en": 3, "geo 2": 1, "audio": 12}


def features(count: int) -> dict[str, Tensor]:
    return {name: torch.randn(E, width) for name, width in list(WIDTHS.items())[:count]}


def expected_joint(fusion: Fusion, structure: Tensor, given: dict[str, Tensor], present: Tensor) -> Tensor:
    views = [structure]
    for projection, x in zip(fusion.projections, given.values(), strict=True):
        views.append(x.double() @ projection.weight.T + projection.bias)
    assert fusion.attention is not None
    return fuse(torch.stack(views), fusion.attention, present)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_joint_embedding(count: int, lacking: bool) -> None:
    """Values and every gradient, for all entities and for some (with repetition), in any order of modalities and their
    names.
    """
    torch.manual_seed(count)
    given, structure = features(count), torch.randn(E, D, dtype=torch.float64, requires_grad=True)
    present = {name: torch.rand(E) < 0.5 for name in given} if lacking else {}
    fusion = Fusion(given, D, present=present).double()
    mask = torch.stack(
        [torch.ones(E, dtype=torch.bool), *(present.get(name, torch.ones(E, dtype=torch.bool)) for name in given)]
    )
    assert torch.equal(fusion.mask(), mask)
    assert fusion.names == ("structure", *given)
    joint, expected = fusion(structure), expected_joint(fusion, structure, given, mask)
    assert relative(joint, expected) < 1e-13
    ids = torch.tensor([4, 0, 4, 8])
    assert relative(fusion(structure[ids], ids), expected[ids]) < 1e-13
    weights = fusion.weights(fusion.modalities(structure), mask)
    assert torch.equal(weights > 0, mask)
    assert relative(weights.sum(0), torch.ones(E)) < 1e-14
    leaves = [structure, *(p for p in fusion.parameters() if p.requires_grad)]
    assert len(leaves) == 2 + 2 * count
    cotangent = torch.randn(E, D, dtype=torch.float64)
    for one, other in zip(
        *(torch.autograd.grad((x * cotangent).sum(), leaves) for x in (joint, expected)), strict=True
    ):
        assert relative(one, other) < 1e-12


def test_absent_rows_take_no_part() -> None:
    """Whatever stands there, NaN included: weight exactly 0, no NaN in values or gradients, gradient 0 into the row."""
    torch.manual_seed(0)
    given = features(2)
    present = torch.arange(E) % 3 != 1
    given["image"][~present] = float("nan")
    fusion = Fusion(given, D, present={"image": present}, train_features=True)
    structure = torch.randn(E, D, requires_grad=True)
    joint = fusion(structure)
    weights = fusion.weights(fusion.modalities(structure), fusion.mask())
    assert weights[1, ~present].eq(0).all()
    without = Fusion({"text.en": given["text.en"]}, D)
    without.load_state_dict(
        {
            "attention": fusion.attention,
            "features.0": fusion.features[1],
            **{f"projections.0.{k}": v for k, v in fusion.projections[1].state_dict().items()},
        }
    )
    assert relative(joint[~present], without(structure)[~present]) < 1e-6
    joint.square().sum().backward()
    assert fusion.features[0].grad is not None
    assert torch.equal(fusion.features[0].grad.ne(0).any(1), present)
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("train", [False, True])
def test_features_learn_on_request(train: bool) -> None:
    fusion = Fusion(features(2), D, train_features=train)
    fusion(torch.randn(E, D)).sum().backward()
    assert [x.grad is not None for x in fusion.features] == [train] * 2
    assert all(p.weight.grad.any() for p in fusion.projections)


def test_unattended_modalities_leave_the_score_to_the_structure() -> None:
    """The release's DistMult: modalities exist for the generator, scores see the structure."""
    fusion = Fusion(features(2), D, attend=False)
    assert "attention" not in fusion.state_dict()
    structure = torch.randn(E, D)
    assert fusion(structure) is structure
    weights = fusion.weights(fusion.modalities(structure), fusion.mask())
    assert weights.tolist() == [[1.0] * E, [0.0] * E, [0.0] * E]
    model = TransE(E, 2, D, fusion=fusion)
    assert model.table() is model.entity.weight
    modalities = model.modalities(torch.tensor([3, 3, 1]))
    assert modalities.shape == (3, 3, D)
    assert torch.equal(modalities[0], model.entity.weight[[3, 3, 1]])
    torch.testing.assert_close(modalities[1], fusion.projections[0](fusion.features[0][[3, 3, 1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_features_of_any_number_type(dtype: torch.dtype) -> None:
    matrix = torch.arange(E * 2).view(E, 2)
    fusion = Fusion({"image": matrix.to(dtype)}, D)
    assert fusion(torch.randn(E, D)).dtype == torch.float32
    assert torch.equal(fusion.features[0], matrix.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_features_are_not_copied_and_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    E, D = 23, 6
    features = {"text": torch.randn(E, 5).to(dtype), "image": torch.randn(E, 9)}
    present = {"text": torch.rand(E) > 0.3}
    features["text"][~present["text"]] = torch.nan
    structure = torch.randn(E, D, requires_grad=True)

    def joint(ids: Tensor | None) -> tuple[Fusion, list[Tensor]]:
        torch.manual_seed(0)
        fusion = Fusion(features, D, present)
        out = fusion(structure if ids is None else structure[ids], ids)
        return fusion, [
            out,
            *torch.autograd.grad(out.square().sum(), [structure, *(p for p in fusion.parameters() if p.requires_grad)]),
        ]

    for ids in (None, torch.tensor([0, 22, 3, 3, 7])):
        expected = joint(ids)[1]
        with monkeypatch.context() as patch:
            patch.setattr("dhns_fast.fusion.HELD", 4 * 5 * E - 1)
            patch.setattr("dhns_fast.fusion.PROJECTED_ROWS", 8)
            fusion, found = joint(ids)
        assert fusion._held[0].data_ptr() == features["text"].data_ptr()
        assert {name: x.shape for name, x in fusion.state_dict().items()}["features.0"] == (0, 5)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert not Fusion(features, D, train_features=True)._held


def test_the_callers_features_stay_as_they_are() -> None:
    matrix = torch.ones(E, 2)
    fusion = Fusion({"image": matrix}, D, train_features=True)
    fusion.features[0].data.zero_()
    assert matrix.eq(1).all()


def _fused(structure: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return Fusion({"a": torch.ones(E, 2)}, D)(structure, ids)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Fusion({}, D), "features: got {}; accepted: one modality or more; fusion=None for a model without any"),
    (lambda: Fusion({"structure": torch.ones(E, 2)}, D), "features: got one named 'structure'; accepted: other names"),
    (
        lambda: Fusion({"a": torch.ones(E, 2), "b": torch.ones(E + 1, 2)}, D),
        "got {'a': (9, 2), 'b': (10, 2)}; accepted: matrices with one row an entity",
    ),
    (lambda: Fusion({"a": torch.ones(E)}, D), "features: got {'a': (9,)}; accepted: matrices"),
    (
        lambda: Fusion({"a": torch.ones(E, 2)}, D, present={"b": torch.ones(E).bool()}),
        "present: got ['b']; accepted: modalities of features, ['a']",
    ),
    (
        lambda: Fusion({"a": torch.ones(E, 2)}, D, present={"a": torch.ones(4).bool()}),
        "present['a']: got torch.bool [4]; accepted: torch.bool [9]",
    ),
    (
        lambda: Fusion({"a": torch.ones(E, 2)}, D, present={"a": torch.ones(E)}),
        "present['a']: got torch.float32 [9]; accepted: torch.bool [9]",
    ),
    (lambda: _fused([[1.0] * D] * E), "structure: got list; accepted: a torch.Tensor"),
    (lambda: _fused(torch.ones(E, D + 1)), f"structure: got shape [{E}, {D + 1}]; accepted: [{E}, {D}]"),
    (lambda: _fused(torch.ones(E - 1, D)), f"structure: got shape [{E - 1}, {D}]; accepted: [{E}, {D}]"),
    (lambda: _fused(torch.ones(3, D), torch.arange(2)), f"structure: got shape [3, {D}]; accepted: [n = 2, {D}]"),
    (
        lambda: _fused(torch.ones(2, D), torch.ones(2)),
        "ids: got torch.float32 [2]; accepted: torch.int64 or torch.int32",
    ),
    (lambda: _fused(torch.ones(2, D), torch.tensor([1, E])), f"ids: got indices from 1 to {E}; accepted: 0 to {E - 1}"),
    (lambda: _fused(torch.ones(2, D), torch.tensor([-1, 1])), f"ids: got indices from -1 to 1; accepted: 0 to {E - 1}"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entities_equal_in_every_input_have_equal_joint_embeddings(dtype: torch.dtype) -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        entities, dim = int(torch.randint(5, 300, (1,))), int(torch.randint(2, 40, (1,))) * 4
        features = {"image": torch.randn(entities, int(torch.randint(1, 50, (1,)))), "text": torch.randn(entities, 7)}
        one, other = torch.randperm(entities)[:2]
        for matrix in features.values():
            matrix[one] = matrix[other]
        fusion = Fusion(features, dim).to(dtype)
        structure = torch.randn(entities, dim, dtype=dtype)
        structure[one] = structure[other]
        with torch.no_grad():
            joint = fusion(structure)
        assert torch.equal(joint[one], joint[other])
