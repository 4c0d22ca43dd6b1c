"""Filtered evaluation against a brute-force ranking in float64, its metrics against their definitions, the baseline
against a loop.
"""

from __future__ import annotations

import math
import types
from collections import Counter
from typing import Any

import pytest
import torch
from fixtures.training import config, graph, triples
from torch import Tensor

from dhns_fast import models, ranking, scoring
from dhns_fast.data import KnowledgeGraph, synthetic
from dhns_fast.errors import InputError
from dhns_fast.models import MODELS
from dhns_fast.ranking import (
    METRICS,
    RULES,
    SIDES,
    RankingResult,
    RelationFrequency,
    SideRanks,
    evaluate,
    relation_categories,
)
from dhns_fast.reference.scoring import score_all
from dhns_fast.train import Trainer


def brute_force(model: Any, kg: KnowledgeGraph, rows: Tensor) -> dict[str, list[tuple[int, int, int]]]:
    """(greater, equal, candidates) of each triple and side: every entity scored in float64, the graph's triples looked
    up in a set.
    """
    known = {tuple(row) for split in (kg.train, kg.valid, kg.test) for row in split.tolist()}
    out: dict[str, list[tuple[int, int, int]]] = {"head": [], "tail": []}
    for side in out:
        for h, r, t in rows.tolist():
            kept, true = (h, t) if side == "tail" else (t, h)
            query, scale = model.query(torch.tensor([kept]), torch.tensor([r]), side)
            scores = score_all(query.double(), model.entities(side).double(), model.reduction, scale)[0].tolist()
            rivals = [
                e
                for e in range(kg.num_entities)
                if e != true and ((h, r, e) if side == "tail" else (e, r, t)) not in known
            ]
            greater, equal = (
                sum(scores[e] > scores[true] for e in rivals),
                sum(scores[e] == scores[true] for e in rivals),
            )
            out[side].append((greater, equal, len(rivals) + 1))
    return out


@pytest.mark.parametrize("options", [{"model": m} for m in MODELS] + [{"model": "transe", "norm": 2}], ids=str)
@pytest.mark.parametrize("split", ["test", "valid"])
def test_evaluate_is_the_brute_force_ranking(options: dict[str, Any], split: str) -> None:
    kg = graph()
    trainer = Trainer(config(method="uniform", **options), kg)
    for _ in range(5):
        trainer.step()
    model = trainer.model.double()
    rows = getattr(kg, split)
    found, expected = evaluate(model, kg, split, batch_size=7), brute_force(model, kg, rows)
    for side in ("head", "tail"):
        got: SideRanks = getattr(found, side)
        assert (
            list(zip(got.greater.tolist(), got.equal.tolist(), got.candidates.tolist(), strict=True)) == expected[side]
        )
    assert torch.equal(found.triples, rows)
    # In float32 the same, where no two scores are within rounding of each other: metrics may differ by a rank or two.
    single = evaluate(model.float(), kg, split)
    assert single["mr"] == pytest.approx(found["mr"], abs=0.2)


def test_metrics_are_their_definitions() -> None:
    ties = {"optimistic": 0.0, "realistic": 0.5, "pessimistic": 1.0}
    generator = torch.Generator().manual_seed(0)
    head, tail = (
        SideRanks(
            *(torch.randint(0, n, (13,), generator=generator) for n in (9, 4)),
            torch.randint(20, 40, (13,), generator=generator),
        )
        for _ in "ht"
    )
    result = RankingResult(
        torch.zeros(13, 3, dtype=torch.int64), head, tail, ["1-1"], torch.zeros(13, dtype=torch.bool), ["r"]
    )
    for side, parts in {"head": [head], "tail": [tail], "both": [head, tail]}.items():
        for rule, tie in ties.items():
            ranks = [1 + g + tie * e for p in parts for g, e in zip(p.greater.tolist(), p.equal.tolist(), strict=True)]
            chance = sum((c + 1) / 2 for p in parts for c in p.candidates.tolist()) / len(ranks)
            expected = {
                "inverse_harmonic_mean_rank": sum(1 / r for r in ranks) / len(ranks),
                "arithmetic_mean_rank": sum(ranks) / len(ranks),
                **{f"hits_at_{k}": sum(r <= k for r in ranks) / len(ranks) for k in (1, 3, 10)},
                "adjusted_arithmetic_mean_rank_index": 1 - (sum(ranks) / len(ranks) - 1) / (chance - 1),
            }
            assert list(expected) == list(METRICS)
            for metric, value in expected.items():
                assert result[f"{side}.{rule}.{metric}"] == pytest.approx(value, rel=1e-12), (side, rule, metric)
            assert result[f"{side}.{rule}.hits@5"] == sum(r <= 5 for r in ranks) / len(ranks)
    assert dict(result) == {f"{s}.{r}.{m}": result[f"{s}.{r}.{m}"] for s in SIDES for r in RULES for m in METRICS}
    assert len(result) == len(dict(result)) == 54
    assert result.openke() == {
        name: result[f"both.optimistic.{metric}"]
        for name, metric in (
            ("mrr", "mrr"),
            ("mr", "mr"),
            ("hits10", "hits@10"),
            ("hits3", "hits@3"),
            ("hits1", "hits@1"),
        )
    }
    assert "13 triples" in repr(result)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("mrr", "both.realistic.inverse_harmonic_mean_rank"),
        ("mean_reciprocal_rank", "both.realistic.inverse_harmonic_mean_rank"),
        ("tail.MR", "tail.realistic.arithmetic_mean_rank"),
        ("optimistic.mean_rank", "both.optimistic.arithmetic_mean_rank"),
        ("pessimistic.head.hits@3", "head.pessimistic.hits_at_3"),
        ("amri", "both.realistic.adjusted_arithmetic_mean_rank_index"),
        ("adjusted_mean_rank_index", "both.realistic.adjusted_arithmetic_mean_rank_index"),
        *((name, "both.realistic.hits_at_10") for name in ("hits@10", "hits_at_10", "hits10", "Hits@10", "hits_10")),
    ],
)
def test_synonyms(short: str, full: str) -> None:
    result = evaluate(RelationFrequency(graph()), graph())
    assert result[short] == result[full]
    assert short in result


@pytest.mark.parametrize("key", ["mrrr", "middle.mrr", "both.fair.mrr", "hits@0", "hits@", "", "both.realistic"])
def test_unknown_metrics(key: str) -> None:
    result = evaluate(RelationFrequency(graph()), graph())
    assert key not in result
    with pytest.raises(
        KeyError,
        match=r"unknown metric; known are inverse_harmonic|neither a side .both, head, tail. nor a rule for ties",
    ):
        result[key]


class Table:
    """A model whose scores are what it is told: one relation a query, entities in the order of a table."""

    reduction = "dot"

    def __init__(self, kg: KnowledgeGraph, scores: dict[str, Tensor]) -> None:
        self.kg, self.scores = kg, scores

    def query(self, entity: Tensor, relation: Tensor, side: str) -> tuple[Tensor, None]:
        return torch.nn.functional.one_hot(
            entity * self.kg.num_relations + relation, self.scores[side].shape[1]
        ).double(), None

    def entities(self, side: str) -> Tensor:
        return self.scores[side]


def test_adjusted_mean_rank_index_is_zero_for_chance_and_one_for_the_truth() -> None:
    kg = graph()
    pairs = kg.num_entities * kg.num_relations
    perfect = {side: torch.zeros(kg.num_entities, pairs, dtype=torch.float64) for side in ("head", "tail")}
    for h, r, t in kg.test.tolist():
        perfect["tail"][t, h * kg.num_relations + r] = perfect["head"][h, t * kg.num_relations + r] = 1
    best = evaluate(Table(kg, perfect), kg)
    for side in SIDES:
        for rule in RULES:
            assert best[f"{side}.{rule}.amri"] == best[f"{side}.{rule}.mrr"] == best[f"{side}.{rule}.hits@1"] == 1
    constant = evaluate(Table(kg, {side: torch.ones_like(x) for side, x in perfect.items()}), kg)
    assert constant["amri"] == pytest.approx(0, abs=1e-12)
    assert constant["optimistic.mrr"] == 1
    assert constant["pessimistic.hits@1"] == 0
    assert constant["mr"] == pytest.approx((constant["optimistic.mr"] + constant["pessimistic.mr"]) / 2)
    worst = evaluate(Table(kg, {side: -x for side, x in perfect.items()}), kg)
    assert worst["pessimistic.amri"] == pytest.approx(-1)
    # A NaN target is ranked last, under every rule.
    lost = evaluate(Table(kg, {side: torch.where(x > 0, torch.nan, x) for side, x in perfect.items()}), kg)
    assert all(lost[f"{rule}.amri"] == pytest.approx(-1) for rule in RULES)


def test_candidates_leave_known_answers_of_every_split_out() -> None:
    names = [str(i) for i in range(6)], ["r"]
    kg = KnowledgeGraph(
        "k", triples((0, 0, 1), (0, 0, 1), (0, 0, 2)), triples((0, 0, 3)), triples((0, 0, 4), (5, 0, 5)), *names
    )
    scores = torch.zeros(6, 6, dtype=torch.float64)
    result = evaluate(Table(kg, {"head": scores, "tail": scores}), kg)
    assert result.tail.candidates.tolist() == [3, 6]
    assert result.head.candidates.tolist() == [6, 6]
    # A triple from outside the graph is its own known answer, and nothing more.
    own = evaluate(Table(kg, {"head": scores, "tail": scores}), kg, triples=triples((0, 0, 5), (0, 0, 0)))
    assert own.tail.candidates.tolist() == [1, 1]
    assert own.tail.equal.tolist() == [0, 0]
    assert own["amri"] == pytest.approx(0)
    alone = own.select(torch.tensor([0]))
    assert alone["tail.amri"] == 1
    assert math.isnan(own.select(torch.tensor([False, False]))["mrr"])


def test_relation_categories_are_those_of_bordes() -> None:
    # Relation by relation: heads a tail and tails a head, around the threshold of 1.5, which counts as many.
    rows = [
        [(0, 1), (2, 3), (4, 5)],
        [(0, 1), (0, 2), (3, 4), (3, 5)],
        [(1, 0), (2, 0), (4, 3), (5, 3)],
        [(h, t) for h in range(3) for t in range(3, 6)],
        [(0, 1), (0, 2), (3, 4)],
        [(0, 1), (0, 2), (3, 4), (5, 1)],
        [(0, 1), (0, 2), (3, 4), (5, 5)],
        [(0, 1), (0, 1), (0, 1), (2, 3)],
        [],
    ]
    train = triples(*((h, r, t) for r, pairs in enumerate(rows) for h, t in pairs))
    kg = KnowledgeGraph(
        "k", train, triples(), triples((0, 0, 5), (0, 3, 1), (1, 3, 0)), [str(i) for i in range(7)], list("abcdefghi")
    )
    expected = ["1-1", "1-n", "n-1", "n-n", "1-n", "1-1", "1-1", "1-1", "1-1"]
    assert relation_categories(kg) == expected
    result = evaluate(RelationFrequency(kg), kg)
    assert {name: len(part.triples) for name, part in result.per_category().items()} == {"1-1": 1, "n-n": 2}
    assert {name: len(part.triples) for name, part in result.per_relation().items()} == {"a": 1, "d": 2}


def test_a_frame_has_every_side_and_rule() -> None:
    pytest.importorskip("pandas")
    kg = graph()
    result = evaluate(RelationFrequency(kg), kg)
    frame = result.to_frame()
    assert frame.shape == (9, len(ranking.METRICS))
    for (side, rule), row in frame.iterrows():
        assert row.to_dict() == {metric: result[f"{side}.{rule}.{metric}"] for metric in ranking.METRICS}


def test_parts_add_up() -> None:
    kg = graph()
    result = evaluate(Trainer(config(), kg).model, kg)
    for parts in (result.per_relation(), result.per_category()):
        assert sum(len(p.triples) for p in parts.values()) == len(kg.test)
        for metric in ("mrr", "tail.optimistic.hits@3", "head.pessimistic.mr"):
            assert sum(len(p.triples) * p[metric] for p in parts.values()) / len(kg.test) == pytest.approx(
                result[metric]
            )
    for name, part in result.per_relation().items():
        rows = kg.test[kg.test[:, 1] == kg.relation_names.index(name)]
        assert dict(part) == pytest.approx(dict(evaluate(Trainer(config(), kg).model, kg, triples=rows)))


def test_unseen_are_triples_with_an_entity_that_train_lacks() -> None:
    kg = graph()
    kg = graph(train=kg.train[(kg.train != int(kg.test[0, 2])).all(1)])
    seen = {e for h, _, t in kg.train.tolist() for e in (h, t)}
    result = evaluate(RelationFrequency(kg), kg)
    expected = [not {h, t} <= seen for h, _, t in kg.test.tolist()]
    assert result.unseen.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert result.select(result.unseen).unseen.all()


def test_relation_frequency_counts_answers() -> None:
    kg = graph()
    tails, heads = Counter((r, t) for _, r, t in kg.train.tolist()), Counter((r, h) for h, r, _ in kg.train.tolist())
    model = RelationFrequency(kg)
    for side, counts in (("tail", tails), ("head", heads)):
        query, scale = model.query(
            torch.zeros(kg.num_relations, dtype=torch.int64), torch.arange(kg.num_relations), side
        )
        assert scale is None
        scores = score_all(query, model.entities(side), model.reduction)
        assert scores.tolist() == [[counts[r, e] for e in range(kg.num_entities)] for r in range(kg.num_relations)]
    found = evaluate(model, kg)
    expected = brute_force(model, kg, kg.test)
    assert (
        list(zip(found.tail.greater.tolist(), found.tail.equal.tolist(), found.tail.candidates.tolist(), strict=True))
        == expected["tail"]
    )


def test_a_trained_model_beats_untrained_and_baseline() -> None:
    kg = graph()
    trainer = Trainer(
        config(model="complex", method="self-adversarial", dim=32, epochs=30, validate_every=10, num_negatives=16), kg
    )
    untrained = evaluate(trainer.model, kg)["mrr"]
    trainer.fit()
    trained, baseline = trainer.validate("test")["mrr"], evaluate(RelationFrequency(kg), kg)["mrr"]
    assert trained > 1.3 * max(untrained, baseline)


def test_rivals_may_be_of_the_right_type_or_known() -> None:
    """Against dense scores: raw ranks, ranks among a list, and ranks among what a side of the relation has."""
    kg = graph(features={}, present={})
    model = Trainer(config(method="uniform"), kg).model
    rows = kg.test[:9]
    some = torch.cat([torch.arange(0, 60, 3), rows[:, 0], rows[:, 2]])
    for options in (
        {"filtered": False},
        {"candidates": some},
        {"candidates": "types"},
        {"candidates": "types", "filtered": False},
    ):
        result = evaluate(model, kg, triples=rows, **options)  # type: ignore[arg-type]
        for side, column in (("head", 0), ("tail", 2)):
            ranks = getattr(result, side)
            for i, (h, r, t) in enumerate(rows.tolist()):
                scores = (
                    model.score_t(torch.tensor([[h, r]])) if side == "tail" else model.score_h(torch.tensor([[r, t]]))
                )[0]
                allowed = torch.ones(60, dtype=torch.bool)
                if "candidates" in options:
                    alike = torch.cat([kg.train, rows])
                    listed = some if options["candidates"] is some else alike[alike[:, 1] == r, column]
                    allowed = torch.zeros(60, dtype=torch.bool).index_fill(0, listed, True)
                if options.get("filtered", True):
                    known = torch.cat([kg.train, kg.valid, kg.test])
                    fixed = 2 - column
                    allowed[known[(known[:, fixed] == (h, r, t)[fixed]) & (known[:, 1] == r), column]] = False
                true = (h, r, t)[column]
                allowed[true] = False
                assert ranks.greater[i] == (scores[allowed] > scores[true]).sum()
                assert ranks.candidates[i] == allowed.sum() + 1


def test_progress_and_errors() -> None:
    kg = graph()
    done: list[int] = []
    evaluate(RelationFrequency(kg), kg, batch_size=20, on_batch=done.append)
    assert sum(done) == 64
    assert max(done) <= 20
    with pytest.raises(InputError, match="split: got 'dev'; accepted: train, valid, test"):
        evaluate(RelationFrequency(kg), kg, "dev")
    with pytest.raises(InputError, match=r"triples: got none \(split valid of synthetic\)"):
        evaluate(RelationFrequency(kg), graph(valid=triples()), "valid")
    with pytest.raises(InputError, match="triples"):
        evaluate(RelationFrequency(kg), kg, triples=triples((0, 0, 60)))
    other = synthetic(61, 4, 400)
    with pytest.raises(InputError, match="model: got one that scores 61 entities; accepted: one of 60"):
        evaluate(RelationFrequency(other), kg)


def sides_of(rows: list[tuple[int, int, int]]) -> SideRanks:
    return SideRanks(*torch.tensor(rows).T)


def result_of(head: SideRanks, tail: SideRanks) -> RankingResult:
    n = len(head.greater)
    return RankingResult(
        torch.zeros(n, 3, dtype=torch.int64), head, tail, ["1-1"], torch.zeros(n, dtype=torch.bool), ["r"]
    )


def test_ranks_among_a_sample_are_what_sampling_gives() -> None:
    """Each pair of counts against the multivariate hypergeometric distribution, by drawing entities one by one."""
    greater, equal, candidates, negatives, repeats = 5, 4, 21, 8, 4000
    many = sides_of([(greater, equal, candidates)] * repeats)
    sampled = result_of(many, many).sampled(negatives, seed=1)
    assert (sampled.head.candidates == negatives + 1).all()
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([2] * greater + [1] * equal + [0] * (candidates - 1 - greater - equal))
    drawn = kinds[torch.rand(repeats, len(kinds), generator=generator).argsort(1)[:, :negatives]]
    for ours, truth in ((sampled.head.greater, (drawn == 2).sum(1)), (sampled.tail.equal, (drawn == 1).sum(1))):
        got, want = (x.bincount(minlength=negatives + 1) / repeats for x in (ours, truth))
        assert (got - want).abs().max() < 0.03
    joint, want = (
        (x[0].double() * x[1]).mean()
        for x in ((sampled.head.greater, sampled.head.equal), ((drawn == 2).sum(1), (drawn == 1).sum(1)))
    )
    assert abs(joint - want) < 0.1


def test_a_sample_of_everything_is_exact_and_a_smaller_one_flatters() -> None:
    side = sides_of([(40, 3, 100), (0, 0, 1), (98, 0, 99), (7, 92, 100)])
    exact = result_of(side, side)
    for negatives in (99, 10_000):
        assert dict(exact.sampled(negatives)) == dict(exact)
    assert exact.sampled(10, seed=3)["mrr"] > exact["mrr"]
    assert dict(exact.sampled(10, seed=3)) == dict(exact.sampled(10, seed=3))
    with pytest.raises(InputError, match="negatives: got 0"):
        exact.sampled(0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fusion", [False, True])
def test_a_table_in_parts_and_a_filter_of_what_is_asked_change_nothing(
    model: str, fusion: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kg = graph()
    trainer = Trainer(config(model=model, method="uniform", fusion=fusion, learning_rate=0.1), kg)
    for _ in range(3):
        trainer.step()
    want = trainer.validate("test")
    monkeypatch.setattr(models, "PART_ROWS", 7)
    monkeypatch.setattr(models, "PART_BYTES", 0)
    monkeypatch.setattr(ranking, "SMALL_FILTER", 0)
    monkeypatch.setattr(ranking, "PIECE", 50)
    got = trainer.validate("test")
    parts = [table for _, table in trainer.model.entity_parts("tail")]
    copied = fusion or model in ("transe", "pairre", "cp")
    assert (len(parts), sum(map(len, parts))) == (9 if copied else 1, kg.num_entities)
    if not copied:
        assert parts[0].data_ptr() == trainer.model.entity.weight.data_ptr()
    for side in ("head", "tail"):
        for field in ("greater", "equal", "candidates"):
            assert torch.equal(getattr(getattr(got, side), field), getattr(getattr(want, side), field))
    assert got.categories == want.categories
    # One that has parts and does not say where it computes is ranked by its table.
    wrapped = types.SimpleNamespace(
        **{
            name: getattr(trainer.model, name)
            for name in ("query", "entities", "entity_parts", "reduction", "relation")
        }
    )
    again = evaluate(wrapped, kg)  # type: ignore[arg-type]
    assert dict(again) == dict(evaluate(trainer.model, kg))


@pytest.mark.parametrize("model", ["distmult", "rotate", "transe"])
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("backend", ["", "eager"])
def test_equal_queries_are_scored_once_with_the_same_ranks(
    model: str, filtered: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kg = synthetic(60, 3, 900, {}, seed=2, test_fraction=0.3)
    torch.manual_seed(0)
    made = MODELS[model](60, 3, 16)
    with torch.no_grad():
        made.entity.weight[10] = made.entity.weight[11]  # a tie
        if model == "distmult" and not filtered:
            made.entity.weight[int(kg.test[0, 2])] = torch.nan
    scored = []
    original = scoring.score.rank_groups

    def counted(query: Tensor, *args: Any) -> Tensor:
        scored.append(len(query))
        return original(query, *args)

    monkeypatch.setattr(scoring.score, "rank_groups", counted)
    options: dict[str, Any] = {"filtered": filtered, "backend": backend or None}
    grouped = evaluate(made, kg, **options)
    distinct = [len(kg.test[:, columns].unique(dim=0)) for columns in ([1, 2], [0, 1])]
    assert scored == distinct
    assert sum(distinct) < len(kg.test)
    # Batches end where queries do; a query with more triples than a batch holds is in several.
    small = evaluate(made, kg, batch_size=5, **options)
    some = evaluate(made, kg, candidates=torch.arange(60), **options)
    monkeypatch.setattr(ranking, "_groups", lambda triples, side, size: ranking._alone(triples, size))
    alone = evaluate(made, kg, **options)
    for result in (grouped, small, some):
        for side in ("head", "tail"):
            for name in ("greater", "equal", "candidates"):
                assert torch.equal(getattr(getattr(result, side), name), getattr(getattr(alone, side), name))


def test_batches_end_where_queries_do() -> None:
    triples = torch.tensor(
        [[0, 0, t] for t in range(3)] + [[1, 0, t] for t in range(3)] + [[2, 0, t] for t in range(9)]
    )
    shuffled = triples[torch.randperm(15, generator=torch.Generator().manual_seed(0))]
    found = list(ranking._groups(shuffled, "tail", 7))
    assert [goals.tolist() for _, goals in found] == [[0, 3, 6], [0, 7], [0, 2]]
    assert torch.equal(torch.cat([rows for rows, _ in found]).sort().values, torch.arange(15))
    for rows, goals in found:
        for first, end in zip(goals[:-1].tolist(), goals[1:].tolist(), strict=True):
            assert len(shuffled[rows[first:end], 0].unique()) == 1
    [(rows, goals)] = ranking._groups(triples[:0], "head", 7)
    assert (len(rows), goals.tolist()) == (0, [0])
