from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dhns_fast.data import CSRFilter, KnowledgeGraph, synthetic
from dhns_fast.errors import InputError


@pytest.mark.parametrize("sizes", [(500, 7, 4000), (12, 2, 30), (40, 1, 90), (5000, 60, 3000)])
def test_sizes_splits_and_distinctness(sizes: tuple[int, int, int]) -> None:
    kg = synthetic(*sizes, {"text": 5, "geo": 2}, seed=9)
    assert (kg.num_entities, kg.num_relations) == sizes[:2]
    triples = torch.cat([kg.train, kg.valid, kg.test])
    assert len(triples) == sizes[2] == len(torch.unique(triples, dim=0))
    assert (triples[:, 0] != triples[:, 2]).all()
    assert not any(kg.report.unseen_entity.values())
    assert not any(kg.report.unseen_relation.values())
    assert {name: x.shape for name, x in kg.features.items()} == {"text": (sizes[0], 5), "geo": (sizes[0], 2)}


def test_shares_of_splits_and_coverage() -> None:
    kg = synthetic(1000, 5, 9000, {"text": 4}, valid_fraction=0.1, test_fraction=0.2, coverage=0.6)
    assert (len(kg.valid), len(kg.test)) == (900, 1800)
    assert kg.report.lines() == []
    assert float(kg.present["text"].float().mean()) == pytest.approx(0.6, abs=0.06)
    assert torch.equal(kg.present["text"], (kg.features["text"] != 0).any(1))


def test_one_seed_one_graph() -> None:
    first, again, other = (synthetic(300, 5, 2000, seed=seed) for seed in (1, 1, 2))
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(first, split), getattr(again, split))
    assert all(torch.equal(first.features[m], again.features[m]) for m in ("text", "image"))
    assert not torch.equal(first.train, other.train)


def mean_reciprocal_rank(kg: KnowledgeGraph, scores: Tensor) -> float:
    """Filtered, realistic, tail side of test; scores [n, E]."""
    h, r, t = kg.test.unbind(1)
    known = CSRFilter.from_triples([kg.train, kg.valid, kg.test], kg.num_entities, kg.num_relations).tails(h, r)
    target = scores.gather(1, t[:, None])
    scores[known.rows(), known.ids] = -torch.inf
    rank = 1 + (scores > target).sum(1) + 0.5 * (scores == target).sum(1)
    return float((1 / rank).mean())


def test_a_model_learns_the_structure() -> None:
    kg = synthetic(200, 6, 2500, {"text": 32}, seed=0, test_fraction=0.1)
    h, r, t = kg.train.unbind(1)
    frequency = torch.zeros(6, 200).index_put_((r, t), torch.ones(len(t)), accumulate=True)
    baseline = mean_reciprocal_rank(kg, frequency[kg.test[:, 1]])

    generator = torch.Generator().manual_seed(0)
    entity = (0.3 * torch.randn(200, 32, 2, generator=generator)).requires_grad_()
    relation = (0.3 * torch.randn(6, 32, 2, generator=generator)).requires_grad_()

    def score(h: Tensor, r: Tensor) -> Tensor:
        e = torch.view_as_complex(entity)
        return ((e[h] * torch.view_as_complex(relation)[r]) @ e.conj().T).real

    optimiser = torch.optim.Adam([entity, relation], lr=0.03)
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(score(h, r), t) + 0.02 * (entity.abs() ** 3).sum(2).mean()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        learnt = mean_reciprocal_rank(kg, score(kg.test[:, 0], kg.test[:, 1]))
    assert learnt > 3 * baseline, (learnt, baseline)


def test_features_show_where_an_entity_is() -> None:
    # Heads of one relation that share a tail lie close together, so their features resemble one another more than those
    # of a random pair.
    kg = synthetic(400, 6, 5000, {"text": 64}, coverage=1.0, seed=3)
    x = torch.nn.functional.normalize(kg.features["text"] - kg.features["text"].mean(0))
    tails = CSRFilter.from_triples(kg.train, 400, 6).tail
    ids, (keys, counts) = tails.ids, tails.groups()
    group = torch.arange(len(keys)).repeat_interleave(counts)
    neighbour = group[1:] == group[:-1]
    alike = (x[ids[1:]] * x[ids[:-1]]).sum(1)[neighbour].mean()
    assert alike > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_entities": 0}, r"^num_entities: got 0; accepted: integers of at least 1$"),
        ({"num_triples": 10**6}, r"^num_triples: got 1000000; accepted: at most \d+ with 50 entities and 2 relations$"),
        ({"modalities": {"text": 0}}, r"^modalities\['text'\]: got 0; accepted: integers of at least 1$"),
        ({"coverage": 1.5}, r"^coverage: got 1\.5; accepted: 0 to 1$"),
        (
            {"valid_fraction": 0.5, "test_fraction": 0.5},
            r"^valid_fraction \+ test_fraction: got 1\.0; accepted: less than 1$",
        ),
        ({"num_entities": 2**32}, r"^num_entities: got 4294967296; accepted: E · E · R below 2\^63, with R = 2$"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthetic(**{"num_entities": 50, "num_relations": 2, "num_triples": 60, **arguments})
