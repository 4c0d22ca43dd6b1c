from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dhns_fast.data import KnowledgeGraph, SplitReport, synthetic
from dhns_fast.data.splits import Leak
from dhns_fast.errors import InputError


def graph(
    train: list[list[int]], valid: list[list[int]], test: list[list[int]], entities: int = 6, relations: int = 3
) -> KnowledgeGraph:
    splits = (torch.tensor(x, dtype=torch.int64).reshape(-1, 3) for x in (train, valid, test))
    return KnowledgeGraph("g", *splits, [f"e{i}" for i in range(entities)], [f"r{i}" for i in range(relations)])


def test_report_counts_duplicates_overlap_and_the_unseen() -> None:
    kg = graph(
        train=[[0, 0, 1], [0, 0, 1], [1, 1, 2], [2, 0, 3]],
        valid=[[1, 1, 2], [1, 1, 2], [2, 0, 3], [0, 1, 2], [4, 0, 1], [0, 2, 1]],
        test=[[0, 1, 2], [2, 0, 3], [5, 2, 4], [5, 0, 1]],
    )
    report = kg.report
    assert report == SplitReport(
        size={"train": 4, "valid": 6, "test": 4},
        distinct={"train": 3, "valid": 5, "test": 4},
        valid_in_train=2,
        test_in_train=1,
        test_in_valid=2,
        valid_elsewhere=3,
        unseen_entity={"valid": 1, "test": 2},
        unseen_relation={"valid": 1, "test": 1},
    )
    assert report.duplicates == {"train": 1, "valid": 1, "test": 0}
    assert report.contaminated_validation
    assert report.lines() == [
        "train: 1 of 4 triples repeat an earlier one (3 are distinct).",
        "valid: 1 of 6 triples repeat an earlier one (5 are distinct).",
        "valid: 2 of 5 distinct triples are also in train.",
        "test: 1 of 4 distinct triples are also in train.",
        "test: 2 of 4 distinct triples are also in valid.",
        "valid: 1 of 6 triples mention an entity that train does not.",
        "test: 2 of 4 triples mention an entity that train does not.",
        "valid: 1 of 6 triples mention a relation that train does not.",
        "test: 1 of 4 triples mention a relation that train does not.",
        "valid is contaminated: only 2 of its 5 distinct triples are in neither train nor test, "
        "and choosing a model on it rewards memorising; hold out a part of train instead.",
    ]


def family(share: float, entities: int = 400) -> dict[str, list[list[int]]]:
    """Parents (relation 0) of train, and of a share of them the child (relation 1) in test; friends (2) that tell of
    nothing.
    """
    parents = [[i, 0, (7 * i + 3) % entities] for i in range(entities // 2)]
    friends = [[i, 2, (5 * i + 1) % entities] for i in range(entities)]
    children = [[t, 1, h] for h, _, t in parents[: round(share * 40)]]
    others = [[(11 * i + 2) % entities, 1, i] for i in range(40 - len(children))]
    return {"train": parents + friends[40:], "valid": friends[:20], "test": friends[20:40] + children + others}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_what_an_inverse_relation_gives_away_is_counted(share: float) -> None:
    report = graph(**family(share), entities=400).report
    count = round(40 * share)
    assert report.inverse == {"valid": 0, "test": count}
    assert report.duplicate == {"valid": 0, "test": 0}
    assert report.leaks == (Leak("r1", "r0", True, {"valid": 0, "test": count}),)
    assert (
        f"test: {count} of 60 distinct triples are in train the other way round, under an inverse relation ('r1' by 'r0'): "
        "a model can copy them."
    ) in report.lines()


def test_symmetric_and_duplicate_relations_are_seen_and_chance_is_not() -> None:
    married = [[i, 0, i + 1] for i in range(0, 100, 2)]
    kg = graph(married, [], [[t, 0, h] for h, _, t in married[:5]], entities=100)
    assert kg.report.inverse["test"] == 5
    assert "('r0' is its own inverse)" in kg.report.lines()[0]
    kg = graph(married, [[h, 1, t] for h, _, t in married[:7]], [[h, 2, t] for h, _, t in married[:3]], entities=100)
    assert kg.report.duplicate == {"valid": 7, "test": 3}
    assert kg.report.inverse == {"valid": 0, "test": 0}
    assert (
        "valid: 7 of 7 distinct triples are in train under another relation with the same entities ('r1' by 'r0')"
        in kg.report.lines()[0]
    )
    # One relation between any two of ten entities: half of the reverses are there by chance, and none tells more than
    # the others.
    generator = torch.Generator().manual_seed(0)
    dense = torch.unique(torch.randint(60, (4000, 3), generator=generator) % torch.tensor([60, 3, 60]), dim=0)
    dense = dense[torch.randperm(len(dense), generator=generator)].tolist()
    assert graph(dense[200:], dense[:100], dense[100:200], entities=60).report.leaks == ()
    # A triple that train holds as it is, and a loop, are no leak of this kind.
    assert graph([[0, 0, 1], [2, 1, 2]], [[0, 0, 1]], [[2, 1, 2]]).report.leaks == ()
    # Any number of relations between two entities.
    many = [[0, r, 1] for r in range(3000)]
    assert graph(many, [], [[1, 0, 0]], entities=2, relations=3000).report.inverse["test"] == 1


def test_contamination_begins_above_five_percent_and_with_nothing() -> None:
    train = [[0, 0, t] for t in range(1, 6)]
    twenty = [[h, 1, t] for h in range(5) for t in range(4)]
    assert not graph(train, [*twenty[:19], train[0]], []).report.contaminated_validation
    assert graph(train, [*twenty[:18], train[0]], []).report.contaminated_validation
    empty = graph(train, [], []).report
    assert empty.contaminated_validation
    assert empty.lines() == [
        "test: no triples.",
        "valid: no triples, so no model can be chosen on it; hold out a part of train instead.",
    ]
    assert graph(train, [[5, 0, 1]], [[4, 0, 1]]).report.lines() == []


def test_hold_out_keeps_every_mention_in_train_and_moves_copies_together() -> None:
    base = synthetic(80, 6, 400, {}, seed=1)
    kg = replace(base, train=torch.cat([base.train, base.train[:50], base.train[:20]]), valid=base.train[:7])
    out = kg.hold_out_validation(0.2, seed=5)
    assert len(out.valid) == round(0.2 * len(base.train)) == out.report.distinct["valid"]
    assert out.report.valid_in_train == 0
    assert not out.report.contaminated_validation
    assert sorted(torch.unique(torch.cat([out.train, out.valid]), dim=0).tolist()) == sorted(base.train.tolist())
    for column in (0, 1, 2):
        assert torch.isin(out.valid[:, column], out.train[:, [0, 2] if column != 1 else 1]).all()
    # What stays keeps its order, with its duplicates.
    left = {tuple(x) for x in out.train.tolist()}
    assert out.train.tolist() == [x for x in kg.train.tolist() if tuple(x) in left]
    assert torch.equal(out.test, kg.test)
    again, other = kg.hold_out_validation(0.2, seed=5), kg.hold_out_validation(0.2, seed=6)
    assert torch.equal(again.valid, out.valid)
    assert torch.equal(again.train, out.train)
    assert not torch.equal(other.valid, out.valid)


def test_hold_out_moves_all_that_train_can_spare_and_says_when_nothing() -> None:
    # A star of leaves, of which a copy of the hub's neighbours can go, but no leaf.
    kg = graph([[0, 0, 1], [0, 0, 2], [1, 0, 2]], [], [])
    out = kg.hold_out_validation(0.9, seed=0)
    assert (len(out.train), len(out.valid)) == (2, 1)
    # Every entity has triples to spare; the only one of relation 1 stays all the same.
    once = graph([[h, 0, t] for h in range(4) for t in range(4)] + [[0, 1, 1]], [], [])
    assert all((once.hold_out_validation(0.9, seed=seed).train[:, 1] == 1).sum() == 1 for seed in range(10))
    with pytest.raises(InputError, match=r"^train: got g, of whose 2 triples each is the only one"):
        graph([[0, 0, 1], [2, 1, 3]], [], []).hold_out_validation(0.5, seed=0)
    for fraction in (0, 1, -0.1, 5):
        with pytest.raises(InputError, match=rf"^fraction: got {fraction}; accepted: more than 0 and less than 1$"):
            kg.hold_out_validation(fraction, seed=0)


def test_construction_checks_ids_and_shapes() -> None:
    with pytest.raises(
        InputError, match=r"^valid: got row 1 .* = \(0, 3, 1\); accepted: entities 0 to 5, relations 0 to 2$"
    ):
        graph([[0, 0, 1]], [[0, 0, 1], [0, 3, 1]], [])
    kg = graph([[0, 0, 1]], [], [])
    with pytest.raises(
        InputError,
        match=r"^features\['x'\]: got torch\.float64 \[6, 2\]; accepted: float32, float16 or bfloat16 \[6, D\]",
    ):
        replace(kg, features={"x": torch.ones(6, 2).double()})
    with pytest.raises(InputError, match=r"^present\['x'\]: got torch\.int64 \[6\]; accepted: bool \[6\]$"):
        replace(kg, features={"x": torch.ones(6, 2)}, present={"x": torch.ones(6).long()})
    assert replace(kg, features={"x": torch.eye(6)[:, 1:]}).present["x"].tolist() == [False] + [True] * 5
