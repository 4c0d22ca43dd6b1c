"""Answers by name, and what the generator imagines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures.training import config, graph

from dhns_fast.data.lookup import lookup
from dhns_fast.errors import InputError
from dhns_fast.predict import complete, imagine, predict, score
from dhns_fast.train import Trainer


def trained(**options: Any) -> Trainer:
    trainer = Trainer(config(epochs=1, **options), graph())
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return trained(model="rotate")


@pytest.fixture(scope="module", params=["rotate", "pairre", "cp"])
def any_trainer(request: pytest.FixtureRequest) -> Trainer:
    """Of models whose query has a scale of its own, or whose view is narrower than its embeddings, too."""
    return trained(model=request.param, method="dhns" if request.param == "rotate" else "uniform")


@pytest.mark.parametrize("unknown", ["head", "relation", "tail"])
@pytest.mark.parametrize("exclude_known", [False, True])
def test_every_answer_with_its_score_and_split(any_trainer: Trainer, unknown: str, exclude_known: bool) -> None:
    trainer, kg = any_trainer, any_trainer.kg
    h, r, t = kg.test[0].tolist()
    given = {"head": f"e{h}", "relation": f"r{r}", "tail": f"e{t}"} | {unknown: "?"}
    column = ("head", "relation", "tail").index(unknown)
    answers = predict(trainer.model, kg, **given, k=1000, exclude_known=exclude_known)

    split_of = {tuple(row): split for split in ("test", "valid", "train") for row in getattr(kg, split).tolist()}
    names = kg.relation_names if unknown == "relation" else kg.entity_names
    rows = kg.test[:1].repeat(len(names), 1)
    rows[:, column] = torch.arange(len(names))
    expected = {
        name: (score, split_of.get(tuple(row)))
        for name, score, row in zip(names, trainer.model.score_hrt(rows).tolist(), rows.tolist(), strict=True)
    }
    if exclude_known:
        expected = {name: found for name, found in expected.items() if found[1] is None}
    else:
        assert any(a.known == "test" for a in answers)
        assert len(answers) == len(names)
    assert {a.name: a.known for a in answers} == {name: known for name, (_, known) in expected.items()}
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    for a in answers:
        assert a.score == pytest.approx(expected[a.name][0], abs=1e-4)
    # Fewer are the first of all.
    assert predict(trainer.model, kg, **given, k=2, exclude_known=exclude_known) == answers[:2]


def test_entities_by_number(trainer: Trainer) -> None:
    assert predict(trainer.model, trainer.kg, "#7", "#1", "?") == predict(trainer.model, trainer.kg, "e7", "r1", "?")


@pytest.mark.parametrize(
    ("name", "found"),
    [("Bern", 0), ("bern", 1), ("BERN", 0), ("#1", 3), ("#2", 2), ("zürich", 2), ("ZÜRICH", 2)],
)
def test_lookup(name: str, found: int) -> None:
    assert lookup(name, ["Bern", "bern", "Zürich", "#1"], "head") == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Libervile", r"head: got 'Libervile'; accepted: names of the graph; similar: Libreville, libre$"),
        ("LIBREVILE", r"head: got 'LIBREVILE'; accepted: names of the graph; similar: Libreville, libre$"),
        ("xyzzy", r"head: got 'xyzzy'; accepted: names of the graph: Libreville, libre, Gabon, Oslo$"),
        ("", r"head: got ''; accepted: names of the graph: "),
        ("#4", r"head: got #4; accepted: ids from #0 to #3$"),
        ("#-1", r"head: got '#-1'; accepted: names of the graph: "),
        ("#²", r"head: got '#²'; accepted: names of the graph: "),
    ],
)
def test_lookup_suggests(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lookup(name, ["Libreville", "libre", "Gabon", "Oslo"], "head")


@pytest.mark.parametrize(
    ("question", "k", "message"),
    [
        (("e1", "r1", "e2"), 3, r"triple: got \(e1, r1, e2\); accepted: exactly one '\?' in it"),
        (("?", "r1", "?"), 3, r"triple: got \(\?, r1, \?\); accepted: exactly one '\?' in it"),
        (("e1", "r1", "?"), 0, "k: got 0; accepted: integers of at least 1"),
        (("e99", "r1", "?"), 3, "head: got 'e99'; accepted: names of the graph; similar: "),
        (("e1", "r9", "?"), 3, "relation: got 'r9'; accepted: names of the graph: r0, r1, r2, r3"),
        (("?", "r1", "r1"), 3, "tail: got 'r1'; accepted: names of the graph$"),
    ],
)
def test_questions_that_have_no_answer(trainer: Trainer, question: tuple[str, str, str], k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(trainer.model, trainer.kg, *question, k=k)


@pytest.mark.parametrize(
    "queries",
    [
        None, [[0, 0]], [0, 0, -1], [[0, 0, 0]], [[0, -1, -1]], [[0, 0, -2]], [[99, 0, -1]], [[0.0, 0, -1]], "e1",
        torch.full((1, 3), -1, device="meta"),
    ],
)  # fmt: skip
def test_queries_by_id_that_ask_for_nothing(trainer: Trainer, queries: Any) -> None:
    with pytest.raises(InputError, match=r"^queries: got "):
        complete(trainer.model, trainer.kg, queries)
    triples = torch.zeros(1, 3, device="meta") if isinstance(queries, torch.Tensor) else queries
    with pytest.raises(InputError, match=r"^triples: got "):
        score(trainer.model, [[0, 0, 99]] if triples == [[0, 0, 0]] else triples)
    assert complete(trainer.model, trainer.kg, [[0, 0, -1]], 2) == complete(
        trainer.model, trainer.kg, torch.tensor([[0, 0, -1]]), 2
    )  # type: ignore[arg-type]


def test_imagine_names_the_nearest_of_every_level(trainer: Trainer) -> None:
    model, generator, kg = trainer.model, trainer.generator, trainer.kg
    assert generator is not None
    made = imagine(model, generator, kg, ("e1", "r1", "e2"), k=4, seed=5)
    assert [(item.level, item.side) for item in made] == [
        (level, side) for level in generator.levels for side in ("head", "tail")
    ]
    ids = torch.tensor([1]), torch.tensor([1]), torch.tensor([2])
    with torch.no_grad():
        inputs = model.modalities(ids[0]), model.relation(ids[1]), model.modalities(ids[2])
        heads, tails = generator.sample(*inputs, generator=torch.Generator().manual_seed(5))
    for item, x in zip(made, [x for pair in zip(heads, tails, strict=True) for x in pair], strict=True):
        distance = torch.linalg.vector_norm(model.entity.weight.double() - x[0].double(), dim=1)
        best = distance.sort()
        assert [name for name, _ in item.nearest] == [f"e{i}" for i in best.indices[:4].tolist()]
        assert [d for _, d in item.nearest] == pytest.approx(best.values[:4].tolist(), rel=1e-4)
    assert imagine(model, generator, kg, ("e1", "r1", "e2"), k=4, seed=5) == made
    assert imagine(model, generator, kg, ("e1", "r1", "e2"), k=4, seed=6) != made
    assert len(imagine(model, generator, kg, ("e1", "r1", "e2"), k=1000)[0].nearest) == kg.num_entities


@pytest.mark.parametrize(
    ("triple", "message"),
    [
        (("?", "r1", "e2"), r"head: got '\?'; "),
        (("e1", "r8", "e2"), "relation: got 'r8'; "),
        (("e1", "r1", "zz"), "tail: got 'zz'; "),
    ],
)
def test_imagine_needs_names_of_the_graph(trainer: Trainer, triple: tuple[str, str, str], message: str) -> None:
    assert trainer.generator is not None
    with pytest.raises(InputError, match=message):
        imagine(trainer.model, trainer.generator, trainer.kg, triple)
