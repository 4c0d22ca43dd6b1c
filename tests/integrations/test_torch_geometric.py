"""The adapter against PyG's own scores and `test`. Needs the extra `rivals`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dhns_fast.errors import InputError
from dhns_fast.integrations import torch_geometric as adapter

kge = pytest.importorskip("torch_geometric.nn.kge", reason="needs PyTorch Geometric (extra rivals)")

E, R = 40, 4
RNG = torch.Generator().manual_seed(0)
TRIPLES = torch.unique(torch.stack([torch.randint(n, (200,), generator=RNG) for n in (E, R, E)], 1), dim=0)
TEST = TRIPLES[::5]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "TransE-l1": ("TransE", {}),
    "TransE-l2": ("TransE", {"p_norm": 2.0}),
    "DistMult": ("DistMult", {}),
    "ComplEx": ("ComplEx", {}),
    "RotatE": ("RotatE", {"margin": 3.0}),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind, options = MODELS[name]
    return getattr(kge, kind)(E, R, 7, **options)


def dense(model: Any, entity: torch.Tensor, relation: torch.Tensor, side: str) -> torch.Tensor:
    """PyG's scores of every entity, `[B, E]`."""
    every = torch.arange(E)
    with torch.no_grad():
        rows = zip(entity, relation, strict=True)
        pairs = [(every, e) if side == "head" else (e, every) for e, _ in rows]
        return torch.stack(
            [model(h.expand(E), r.expand(E), t.expand(E)) for (h, t), r in zip(pairs, relation, strict=True)]
        )


@pytest.mark.parametrize("name", MODELS)
def test_filtered_ranks_of_both_sides_and_scores(name: str) -> None:
    model = build(name)
    result = adapter.evaluate(model, TEST, known=TRIPLES)
    known = {tuple(x) for x in TRIPLES.tolist()}
    for side, column, other in (("tail", 2, 0), ("head", 0, 2)):
        scores = dense(model, TEST[:, other], TEST[:, 1], side)
        found, ids = adapter.predict(model, TEST[:, other], TEST[:, 1], side, k=E)
        torch.testing.assert_close(found, scores.gather(1, ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, scores.sort(descending=True).values, atol=1e-5, rtol=1e-5)
        at_target = scores.gather(1, TEST[:, column : column + 1])
        for row, triple in enumerate(TEST.tolist()):
            for e in range(E):
                rival = [*triple]
                rival[column] = e
                if tuple(rival) in known:
                    scores[row, e] = -torch.inf
        expected = 1 + (scores > at_target).sum(1)
        assert getattr(result, side).rank("optimistic").tolist() == expected.tolist()
    assert 0 < result["mrr"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_its_own_test(name: str) -> None:
    model = build(name)
    expected = model.test(*TEST.unbind(1), batch_size=16, log=False, k=5)
    assert adapter.raw_test(model, *TEST.unbind(1), batch_size=16, k=5) == pytest.approx(expected, rel=1e-6)


def test_forgotten_training_triples_are_missed(caplog: pytest.LogCaptureFixture) -> None:
    for known, missed in (((), True), (TRIPLES, False), (None, False)):
        caplog.clear()
        adapter.evaluate(build("DistMult"), TEST, known=known)
        assert ("no known triples are given" in caplog.text) == missed


def test_refusals() -> None:
    class Own(kge.DistMult):
        """A score of its own."""

    for model, got in (
        (Own(E, R, 4), "Own"),
        (torch.nn.Linear(1, 1), "Linear"),
        (kge.TransE(E, R, 4, p_norm=3.0), "TransE with p_norm = 3.0"),
    ):
        with pytest.raises(InputError, match=f"model: got {got}; accepted: "):
            adapter.evaluate(model, TEST)
    with pytest.raises(InputError, match="side: got 'relation'; accepted: tail, head"):
        adapter.predict(build("DistMult"), 0, 0, side="relation")
    for entity, relation, message in (
        (1.9, 0, "entity: got "),
        ([0, 1], torch.tensor([0.0, 1.7]), "relation: got torch.float32"),
        ([0, 1, 2], [0, 1], "relation: got 2 ids; accepted: one, or one for each of 3 entities"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            adapter.predict(build("DistMult"), entity, relation)
