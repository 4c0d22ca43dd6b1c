"""Items for users: every metric against a transcription that sorts, its properties, and what RecBole computes where it
is installed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dhns_fast import items as module
from dhns_fast.data import KnowledgeGraph, Ragged
from dhns_fast.errors import InputError
from dhns_fast.items import evaluate_items, evaluate_relation
from dhns_fast.models import DistMult, PairRE
from dhns_fast.ranking import evaluate_items as re_exported
from dhns_fast.scoring import score_all

U, I, D = 23, 57, 6
NAMES = [f"{kind}@{k}" for kind in module.WITH_K for k in (1, 5, 20, 60, 2000)] + list(module.WITHOUT_K)


def ragged(rows: list[list[int]]) -> Ragged:
    ids = [i for row in rows for i in row]
    return Ragged(torch.tensor([0, *[len(row) for row in rows]]).cumsum(0), torch.tensor(ids, dtype=torch.int64))


def case(seed: int = 0) -> tuple[Tensor, Tensor, list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    users, items = torch.randn(U, D, generator=generator), torch.randn(I, D, generator=generator)
    rows = [torch.randperm(I, generator=generator).tolist() for _ in range(U)]
    counts = torch.randint(0, 9, (U, 2), generator=generator).tolist()
    counts[3][0] = 0  # a user without relevant items
    return (
        users,
        items,
        [row[:a] for row, (a, _) in zip(rows, counts, strict=True)],
        [row[a : a + b] for row, (a, b) in zip(rows, counts, strict=True)],
    )


def oracle(name: str, scores: Tensor, relevant: list[int], exclude: list[int], depth: int = 0) -> float:
    """By sorting everything, with loops."""
    left = [i for i in range(I) if i not in exclude or i in relevant]
    ranked = sorted(left, key=lambda i: (-scores[i].item(), i))
    hits = [i in relevant for i in ranked]
    n = len(relevant)
    kind, _, k = name.partition("@")
    k, _, variant = k.partition(":")
    cut = int(k) if k else len(ranked)
    positions = [p for p, hit in enumerate(hits, 1) if hit and p <= cut]
    if kind == "hit":
        return float(bool(positions))
    if kind == "recall":
        return len(positions) / (min(n, cut) if variant else n)
    if kind == "precision":
        return len(positions) / cut
    if kind == "mrr":
        return 1 / positions[0] if positions else 0.0
    if kind == "map":
        return sum(j / p for j, p in enumerate(positions, 1)) / min(n, cut)
    if kind == "auc":
        right = sum(not other for p, hit in enumerate(hits) if hit for other in hits[p:])
        return right / (n * (len(ranked) - n))
    ideal = sum(hits[:depth]) if variant else n
    best = sum(1 / math.log2(1 + i) for i in range(1, min(ideal, cut) + 1))
    return sum(1 / math.log2(1 + p) for p in positions) / best if best else 0.0


@pytest.mark.parametrize("reduction", ["dot", "l2"])
def test_every_metric_of_every_user(reduction: str) -> None:
    users, items, relevant, exclude = case()
    scores = score_all(users, items, reduction)
    found = evaluate_items(users, items, ragged(relevant), ragged(exclude), NAMES, reduction, per_user=True)
    assert list(found) == NAMES
    for name in NAMES:
        for u in range(U):
            value = found[name][u].item()
            if relevant[u]:
                assert value == pytest.approx(oracle(name, scores[u], relevant[u], exclude[u]), abs=1e-12), (name, u)
            else:
                assert math.isnan(value)
    means = evaluate_items(users, items, ragged(relevant), ragged(exclude), NAMES, reduction)
    assert means == pytest.approx({name: value.nanmean().item() for name, value in found.items()})
    # Asked one at a time, in float64, and where batches are of few users: the same.
    for name in ("ndcg@5", "map", "auc"):
        again = evaluate_items(users.double(), items.double(), ragged(relevant), ragged(exclude), [name], reduction)
        assert again[name] == pytest.approx(means[name], abs=1e-9)


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    users, items, relevant, exclude = case()
    whole = evaluate_items(users, items, ragged(relevant), ragged(exclude), NAMES)
    monkeypatch.setattr(module, "BATCH", 5)
    assert evaluate_items(users, items, ragged(relevant), ragged(exclude), NAMES) == pytest.approx(whole, abs=1e-12)


def test_variants_by_name() -> None:
    users, items, relevant, exclude = case()
    scores = users @ items.T
    names = ["ndcg@3:kgat", "ndcg@20:kgat", "recall@3:gde", "recall@20"]
    found = evaluate_items(users, items, ragged(relevant), ragged(exclude), names, per_user=True)
    for name in names:
        expected = [oracle(name, scores[u], relevant[u], exclude[u], 20) for u in range(U) if relevant[u]]
        assert found[name][~found[name].isnan()].tolist() == pytest.approx(expected)
    plain = evaluate_items(users, items, ragged(relevant), ragged(exclude), ["ndcg@3", "recall@3"])
    mean = {name: value.nanmean().item() for name, value in found.items()}
    assert mean["ndcg@3:kgat"] > plain["ndcg@3"]
    assert mean["recall@3:gde"] > plain["recall@3"]


def test_ties_unsorted_rows_and_repeated_exclusions() -> None:
    # Three items alike: in a list by their ids, counted half over all positions.
    users, items = torch.ones(1, 2), torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    result = evaluate_items(users, items, ragged([[1]]), None, ["hit@1", "hit@2", "mrr", "auc"])
    assert result == {"hit@1": 0.0, "hit@2": 1.0, "mrr": 0.5, "auc": pytest.approx(1 - 1 / 3)}
    # A relevant item is not left out though it is excluded too; order and repetition do not matter.
    messy = evaluate_items(users, items, ragged([[1, 1]]), ragged([[2, 0, 1, 0]]), ["hit@1", "recall@1", "auc"])
    assert messy == {"hit@1": 1.0, "recall@1": 1.0, "auc": 1.0}
    # Nothing else is left: places without an item are no hits.
    assert evaluate_items(users, items, ragged([[3]]), ragged([[0, 1, 2]]), ["precision@4"])["precision@4"] == 0.25


def test_refusals() -> None:
    users, items, relevant, exclude = case()
    some, rest = ragged(relevant), ragged(exclude)
    assert re_exported is evaluate_items
    for name in ("recall", "auc@5", "recall@0", "map@x", "recall@20:kgat", "ndcg:kgat", "f1@20", 20):
        with pytest.raises(
            InputError, match=r"metrics: got .*; accepted: hit@k, recall@k, .*, ndcg@k:kgat, recall@k:gde"
        ):
            evaluate_items(users, items, some, rest, [name])  # type: ignore[list-item]
    with pytest.raises(InputError, match="Ragged"):
        evaluate_items(users[1:], items, some)
    with pytest.raises(InputError, match=r"Ragged.ids"):
        evaluate_items(users, items[:9], some)
    for name in ("users", "items", "relevant", "exclude"):
        arguments = {"users": users, "items": items, "relevant": some, "exclude": rest, name: [[1]]}
        with pytest.raises(InputError, match=f"^{name}: got "):
            evaluate_items(**arguments)
    assert evaluate_items(users, items, some, rest, "mrr@3").keys() == {"mrr@3"}
    for name, value in (("relevant", None), ("metrics", None), ("metrics", [f"recall@{10**20}"]), ("scale", 2.0), ("scale", [[1.0]]),
                        ("users", users.to("meta")), ("users", users.double())):  # fmt: skip
        arguments = {"users": users, "items": items, "relevant": some, "exclude": rest, name: value}
        with pytest.raises(InputError, match=f"^{name}: got "):
            evaluate_items(**arguments)
    with pytest.raises(InputError, match="items: got shape"):
        evaluate_items(users, items[:, 1:], some)
    with pytest.raises(InputError, match="relevant: got no relevant item of any user; accepted: one or more"):
        evaluate_items(users, items, ragged([[]] * U))


@pytest.mark.parametrize("kind", [DistMult, PairRE])
def test_a_relation_is_an_interaction(kind: Any) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    # Entities 0..9 are users, 10..29 items; relation 1 is another.
    pairs = torch.unique(
        torch.stack(
            [torch.randint(10, (120,), generator=generator), torch.randint(10, 30, (120,), generator=generator)], 1
        ),
        dim=0,
    )
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    triples = torch.stack([pairs[:, 0], torch.zeros(len(pairs), dtype=torch.int64), pairs[:, 1]], 1)
    facts = torch.tensor([[10, 1, 11], [12, 1, 3]])
    train, valid, test = torch.cat([triples[20:], facts]), triples[:5], triples[5:20]
    kg = KnowledgeGraph("shop", train, valid, test, [f"e{i}" for i in range(30)], ["likes", "other"])
    model = kind(30, 2, 8)
    found = evaluate_relation(model, kg, "likes", metrics=("recall@3", "mrr"), per_user=True)
    by_id = evaluate_relation(model, kg, 0, metrics=("recall@3", "mrr"), per_user=True)
    torch.testing.assert_close(found, by_id, rtol=0, atol=0, equal_nan=True)
    scores = model.score_t(torch.tensor([[u, 0] for u in range(10)])).detach()
    users = test[:, 0].unique().tolist()
    tails = set(triples[:, 2].tolist())
    for row, u in enumerate(users):
        wanted = test[test[:, 0] == u, 2].tolist()
        seen = set(torch.cat([train, valid])[torch.cat([train, valid])[:, 0] == u][:, 2].tolist())
        ranked = sorted(tails - seen, key=lambda i: -scores[u, i].item())
        assert found["recall@3"][row].item() == pytest.approx(len(set(ranked[:3]) & set(wanted)) / len(wanted))
        assert found["mrr"][row].item() == pytest.approx(1 / (1 + min(ranked.index(i) for i in wanted)))
    every = evaluate_relation(model, kg, 0, metrics=("recall@3",), items=torch.arange(29, -1, -1))
    assert 0 <= every["recall@3"] <= 1
    twice = evaluate_relation(model, kg, 0, metrics=("recall@3",), items=[*range(29, -1, -1), *range(30)])  # type: ignore[arg-type]
    assert twice == every
    for items in (
        torch.tensor([-1]),
        torch.tensor([30]),
        torch.tensor([0.5]),
        torch.tensor([[1]]),
        "e1",
        torch.empty(2, device="meta"),
    ):
        with pytest.raises(InputError, match=r"^items: got .*; accepted: (integers of shape|ids from 0 to 29)"):
            evaluate_relation(model, kg, 0, items=items)  # type: ignore[arg-type]
    for relation in ("hates", 2, -1, None):
        with pytest.raises(InputError, match="relation: got"):
            evaluate_relation(model, kg, relation)
    with pytest.raises(InputError, match="split: got test, without a triple of relation other"):
        evaluate_relation(model, kg, "other")


def test_recbole_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("recbole", reason="needs RecBole")
    monkeypatch.setattr(np, "float", float, raising=False)  # what its release still names
    from recbole.evaluator import Collector, Evaluator

    users, items, relevant, exclude = case()
    kept = [u for u in range(U) if relevant[u]]
    metrics = ["Recall", "NDCG", "Hit", "MAP", "MRR", "Precision"]
    config = {
        "metrics": metrics,
        "topk": [3, 10],
        "device": "cpu",
        "eval_args": {"mode": "full"},
        "metric_decimal_place": 12,
    }
    collector = Collector(config)
    scores = (users @ items.T)[kept]
    rows = [u for u, k in enumerate(kept) for _ in exclude[k]]
    scores[rows, [i for k in kept for i in exclude[k]]] = -torch.inf
    positive = torch.tensor([(u, i) for u, k in enumerate(kept) for i in relevant[k]])
    collector.eval_batch_collect(scores, None, positive[:, 0], positive[:, 1])
    expected = Evaluator(config).evaluate(collector.get_data_struct())
    names = [f"{m.lower()}@{k}" for m in metrics for k in (3, 10)]
    assert evaluate_items(users, items, ragged(relevant), ragged(exclude), names) == pytest.approx(
        {n: expected[n] for n in names}, abs=1e-9
    )
