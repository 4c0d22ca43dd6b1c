"""The adapter against PyKEEN's own evaluator, scores and losses. Needs the extra `rivals`."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dhns_fast.errors import InputError
from dhns_fast.integrations import foreign
from dhns_fast.integrations import pykeen as adapter

pykeen_models = pytest.importorskip("pykeen.models", reason="needs PyKEEN (extra rivals)")

from pykeen.evaluation import RankBasedEvaluator  # noqa: E402
from pykeen.losses import NSSALoss  # noqa: E402
from pykeen.nn import modules  # noqa: E402
from pykeen.triples import CoreTriplesFactory  # noqa: E402

E, R = 40, 4
RNG = torch.Generator().manual_seed(0)
TRIPLES = torch.unique(torch.stack([torch.randint(n, (300,), generator=RNG) for n in (E, R, E)], 1), dim=0)
ORDER = torch.randperm(len(TRIPLES), generator=RNG)
TRAIN, VALID, TEST = (TRIPLES[part] for part in ORDER.split([len(TRIPLES) - 80, 40, 40]))
# Name in pykeen.models, options.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "TransE-l1": ("TransE", {"scoring_fct_norm": 1}),
    "TransE-l2": ("TransE", {"scoring_fct_norm": 2}),
    "UM": ("UM", {}),
    "RotatE": ("RotatE", {}),
    "PairRE": ("PairRE", {}),
    "DistMult": ("DistMult", {}),
    "ComplEx": ("ComplEx", {}),
    "CP": ("CP", {"rank": 3}),
    "HolE": ("HolE", {}),
    "SimplE": ("SimplE", {}),
    "AutoSF": ("AutoSF", {"embedding_dim": 8}),
    "QuatE": ("QuatE", {}),
    "RESCAL": ("RESCAL", {}),
    "TuckER": ("TuckER", {}),
    "DistMA": ("DistMA", {}),
}


def factory(triples: torch.Tensor = TRAIN, inverse: bool = False) -> CoreTriplesFactory:
    return CoreTriplesFactory(triples, num_entities=E, num_relations=R, create_inverse_triples=inverse)


def build(name: str, inverse: bool = False, **more: Any) -> Any:
    if name in ("TransF", "TripleRE", "LineaRE"):
        options = {"p": 2} if name == "LineaRE" else {}
        parts = {"embedding_dim": 9} if name == "TransF" else [{"shape": 9}] * 3
        return pykeen_models.ERModel(
            triples_factory=factory(inverse=inverse), interaction=getattr(modules, f"{name}Interaction"), interaction_kwargs=options,
            entity_representations_kwargs={"shape": 9}, relation_representations_kwargs=parts if name != "TransF" else {"shape": 9},
            random_seed=0, **more,
        )  # fmt: skip
    kind, options = MODELS[name]
    options = {"embedding_dim": 9, "triples_factory": factory(inverse=inverse), "random_seed": 0} | options | more
    model = getattr(pykeen_models, kind)(**options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # as after training, so that it is no identity
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return model


def theirs(model: Any, triples: torch.Tensor = TEST, **options: Any) -> Any:
    return RankBasedEvaluator().evaluate(
        model=model,
        mapped_triples=triples,
        additional_filter_triples=[TRAIN, VALID],
        batch_size=16,
        use_tqdm=False,
        **options,
    )


def assert_same(found: Any, wanted: Any) -> None:
    wanted = wanted.to_flat_dict()
    assert len(wanted) > 100
    found = found.to_flat_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-5, rel=1e-5, nan_ok=True), key


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "TransF", "TripleRE", "LineaRE"])
def test_every_key_of_pykeen_and_its_scores(name: str, inverse: bool) -> None:
    model = build(name, inverse)
    model.train()
    result = adapter.evaluate(model, TEST, known=(factory(), VALID))
    assert model.training
    expected = theirs(model)
    assert_same(result, expected)
    assert dict(result) == pytest.approx(dict(result.to_flat_dict()), abs=1e-5, rel=1e-5, nan_ok=True)
    for key in result._parse("mrr")[2], "hits@3", "amri", "head.pessimistic.mean_rank":
        assert result[key] == pytest.approx(
            expected.get_metric(key.replace("amri", "adjusted_mean_rank_index")), abs=1e-5
        )
    assert_same(adapter.DhnsFastEvaluator().evaluate(model, TEST, additional_filter_triples=[TRAIN, VALID]), expected)
    model.eval()
    for side, columns in (("tail", [0, 1]), ("head", [1, 2])):
        scores, ids = adapter.predict(model, TEST[:, columns[0] if side == "tail" else 2], TEST[:, 1], side, k=E)
        rivals = (model.predict_t if side == "tail" else model.predict_h)(TEST[:, columns])
        torch.testing.assert_close(scores, rivals.gather(1, ids), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(scores, rivals.sort(descending=True).values, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["TransE-l1", "DistMult", "ComplEx", "RotatE"])
def test_without_rounding_every_key_is_the_same_number(name: str) -> None:
    # In float64 no two scores are close enough for another order of sums to tell; statistics are of PyKEEN's dtypes.
    model = build(name).double()
    found, wanted = adapter.evaluate(model, TEST, known=(TRAIN, VALID)).to_flat_dict(), theirs(model).to_flat_dict()
    assert {key: x for key, x in found.items() if x == x} == {key: x for key, x in wanted.items() if x == x}
    assert found.keys() == wanted.keys()


def test_every_form_is_tested_and_exists() -> None:
    built = {
        type(adapter.PyKEENModel(build(name)).interaction).__name__
        for name in [*MODELS, "TransF", "TripleRE", "LineaRE"]
    }
    assert built == set(adapter.FORMS)


def test_ties_are_ties() -> None:
    model = build("DistMult")
    with torch.no_grad():
        table = model.entity_representations[0]._embeddings.weight
        table.copy_(table[torch.arange(E) % 7])
    assert_same(adapter.evaluate(model, TEST, known=(TRAIN, VALID)), theirs(model))
    assert adapter.evaluate(model, TEST)["optimistic.mrr"] > adapter.evaluate(model, TEST)["pessimistic.mrr"]


def test_among_some_entities_and_on_one_side() -> None:
    model = build("TransE-l1")
    some = sorted({*TEST[:10, 0].tolist(), *TEST[:10, 2].tolist()})
    options = {"restrict_entities_to": some, "pre_filtered_triples": False, "targets": ("tail",)}
    found = adapter.DhnsFastEvaluator().evaluate(model, TEST, additional_filter_triples=[TRAIN, VALID], **options)
    kept = TEST[torch.isin(TEST[:, 0], torch.tensor(some)) & torch.isin(TEST[:, 2], torch.tensor(some))]
    scores = model.predict_t(kept[:, :2])
    ranks = []
    for row, (h, r, t) in enumerate(kept.tolist()):
        known = {int(x[2]) for x in torch.cat([TRAIN, VALID, kept]).tolist() if x[0] == h and x[1] == r} - {t}
        rivals = [e for e in some if e not in known]
        ranks.append(1 + int((scores[row, rivals] > scores[row, t]).sum()))
    assert found.get_metric("tail.optimistic.arithmetic_mean_rank") == pytest.approx(sum(ranks) / len(ranks))
    with pytest.raises(
        InputError,
        match=r"mapped_triples: got \d+ triples with an entity outside restrict_entities_to; accepted: none such",
    ):
        adapter.DhnsFastEvaluator().evaluate(model, TEST, restrict_entities_to=some)


def test_raw_ranks_and_predictions_without_known_answers() -> None:
    model = build("DistMult")
    raw = adapter.evaluate(model, TEST, known=None)
    scores = model.predict_t(TEST[:, :2])
    expected = 1 + (scores > scores.gather(1, TEST[:, 2:])).sum(1)
    assert raw.tail.rank("optimistic").tolist() == expected.tolist()
    assert raw["head.mr"] >= adapter.evaluate(model, TEST, known=TRAIN)["head.mr"]
    _, ids = adapter.predict(model, 0, 1, known=factory(), k=E)
    known = TRAIN[(TRAIN[:, 0] == 0) & (TRAIN[:, 1] == 1), 2].tolist()
    assert not set(known) & set(ids[0].tolist())
    assert (ids[0] < 0).sum() == len(known)


def test_the_reduction_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    foreign._said.clear()
    with caplog.at_level(logging.INFO, logger="dhns_fast"):
        adapter.evaluate(build("RotatE"), TEST)
        adapter.evaluate(build("RotatE"), TEST)
    assert [r.getMessage() for r in caplog.records if "reduction" in r.getMessage()] == [
        "PyKEEN's RotatE: scores are the reduction 'l2' of its query and its entities"
    ]


def test_refusals() -> None:
    with pytest.raises(
        InputError, match="model: got TransHInteraction; accepted: PyKEEN models whose interaction is one of TransE, "
    ):
        adapter.evaluate(pykeen_models.TransH(triples_factory=factory(), embedding_dim=4), TEST)
    with pytest.raises(InputError, match="model: got Linear; accepted"):
        adapter.evaluate(torch.nn.Linear(1, 1), TEST)
    with pytest.raises(InputError, match="TransEInteraction with p = 3; accepted: p = 1 or 2"):
        adapter.evaluate(pykeen_models.TransE(triples_factory=factory(), scoring_fct_norm=3), TEST)
    with pytest.raises(InputError, match="triples"):
        adapter.evaluate(build("DistMult"), TEST + E)
    with pytest.raises(InputError, match="triples: got none"):
        adapter.evaluate(build("DistMult"), TEST[:0])

    class Own(modules.DistMultInteraction):
        """A score of its own."""

    model = pykeen_models.ERModel(
        triples_factory=factory(),
        interaction=Own,
        entity_representations_kwargs={"shape": 4},
        relation_representations_kwargs={"shape": 4},
    )
    with pytest.raises(InputError, match="model: got Own"):
        adapter.evaluate(model, TEST)


@pytest.mark.parametrize("name", ["TransE-l1", "DistMult", "ComplEx", "RotatE", "PairRE", "SimplE"])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_training_loss_and_its_gradient_are_pykeens(name: str, inverse: bool) -> None:
    loss = NSSALoss(margin=3.0, adversarial_temperature=0.7)
    model = build(name, inverse, loss=loss)
    for representation in (*model.entity_representations, *model.relation_representations):
        representation.regularizer = None
    batch = TRAIN[:17]
    loop = adapter.CorruptionLossTrainingLoop(
        model=model, triples_factory=factory(inverse=inverse), num_negatives=5, optimizer="sgd"
    )
    loop._create_training_data_loader(factory(), batch_size=17, drop_last=False)
    drawn = {}
    corrupt = loop._sampler.corrupt
    loop._sampler.corrupt = lambda part, side: drawn.setdefault(side, corrupt(part, side))
    model.train()
    found = loop._process_batch(batch, 0, len(batch))
    found.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = torch.zeros(())
    for side, part in (("head", batch[:9]), ("tail", batch[9:])):
        negative = part[:, None].repeat(1, 5, 1)
        negative[..., 0 if side == "head" else 2] = drawn[side]

        def score(triples: torch.Tensor, side: str = side) -> torch.Tensor:
            shape, triples = triples.shape[:-1], triples.reshape(-1, 3)
            if inverse:
                triples = model.relation_inverter.map(triples, invert=side == "head")
                triples = triples.flip(1) if side == "head" else triples
            return model.score_hrt(triples).view(*shape, -1).squeeze(-1)

        expected = expected + loss.process_slcwa_scores(score(part)[:, None], score(negative)) * len(part) / 17
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        theirs = parameter.grad
        if name == "RotatE" and len(parameter) != E:
            # Rotations are kept at modulus 1: what a gradient says along the circle counts, and moving t back or h on
            # differs across it.
            ours, theirs = (
                torch.view_as_complex(g.view(len(g), -1, 2)) * complex_rotations(model).conj() for g in (ours, theirs)
            )
            ours, theirs = ours.imag, theirs.imag
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def complex_rotations(model: Any) -> torch.Tensor:
    return model.relation_representations[0](indices=None).detach()


def test_regularisers_see_the_positives() -> None:
    model = build("DistMult", loss=NSSALoss())
    loop = adapter.CorruptionLossTrainingLoop(model=model, triples_factory=factory(), optimizer="sgd")
    loop._create_training_data_loader(factory(), batch_size=17, drop_last=False)
    model.train()
    batch = TRAIN[:7]
    torch.manual_seed(0)
    with_term = loop._process_batch(batch, 0, 7)
    expected = sum(
        part.regularizer.weight * part.regularizer.forward(part(indices=None)[batch[:, column]])
        for part, columns in ((model.entity_representations[0], (0, 2)), (model.relation_representations[0], (1,)))
        if part.regularizer is not None
        for column in columns
    )
    for part in (model.entity_representations[0], model.relation_representations[0]):
        part.regularizer = None
    torch.manual_seed(0)
    assert (with_term - loop._process_batch(batch, 0, 7)).item() == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 0


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """PyKEEN's loop collects garbage in every epoch, which takes most of a second where a whole test session is
    alive.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
def test_in_the_pipeline() -> None:
    from pykeen.pipeline import pipeline

    result = pipeline(
        training=factory(), testing=factory(TEST), validation=factory(VALID), model="complex", model_kwargs={"embedding_dim": 8},
        loss="nssa", optimizer_kwargs={"lr": 0.05}, training_loop=adapter.CorruptionLossTrainingLoop, training_loop_kwargs={"num_negatives": 8},
        training_kwargs={"num_epochs": 30, "batch_size": 64, "use_tqdm": False}, evaluator=adapter.DhnsFastEvaluator,
        stopper="early", stopper_kwargs={"frequency": 10, "patience": 3}, random_seed=0, device="cpu", evaluation_fallback=False,
    )  # fmt: skip
    assert result.losses[-1] < 0.8 * result.losses[0]
    trained = adapter.evaluate(result.model, TRAIN)["mrr"]
    assert trained > adapter.evaluate(build("ComplEx"), TRAIN)["mrr"] + 0.1
    assert_same(result.metric_results, theirs(result.model))


@pytest.mark.parametrize("name", ["TransE-l1", "DistMult", "ComplEx", "RotatE"])
def test_dhns_as_a_negative_sampler(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, embedding_dim=8)
    sampler = adapter.DHNSNegativeSampler(
        mapped_triples=TRAIN, num_entities=E, num_relations=R, num_negs_per_pos=11, model=model
    )
    generator = sampler.__dict__["_parts"][1]
    before = [p.detach().clone() for p in generator.parameters()]
    parameters = [p.detach().clone() for p in model.parameters()]
    negatives, mask = sampler.sample(TRAIN[:6])
    assert mask is None
    assert negatives.shape == (6, 11, 3)
    known = {tuple(x) for x in TRAIN.tolist()}
    assert not known & {tuple(x) for x in negatives.view(-1, 3).tolist()}
    changed = negatives != TRAIN[:6, None]
    assert changed.sum(-1).eq(1).all()
    assert changed[:, :5, 0].all()
    assert changed[:, 5:, 2].all()
    assert any((p != q).any() for p, q in zip(before, generator.parameters(), strict=True)), "the generator learns"
    assert all(torch.equal(p, q) for p, q in zip(parameters, model.parameters(), strict=True)), (
        "the model does not, here"
    )
    assert not list(sampler.parameters())


@pytest.mark.usefixtures("quick_collection")
def test_dhns_trains_in_pykeens_loop() -> None:
    from pykeen.training import SLCWATrainingLoop

    model = build("DistMult", loss=NSSALoss(), embedding_dim=8)
    loop = SLCWATrainingLoop(
        model=model, triples_factory=factory(), optimizer="adam", negative_sampler=adapter.DHNSNegativeSampler,
        negative_sampler_kwargs={"model": model, "num_negs_per_pos": 4},
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    losses = loop.train(factory(), num_epochs=2, batch_size=100, use_tqdm=False)
    assert torch.tensor(losses).isfinite().all()
    assert all((p != q).any() for p, q in zip(before, model.parameters(), strict=True))
    with pytest.raises(
        InputError, match="model: got PyKEEN's QuatE; accepted: PyKEEN's TransE, DistMult, ComplEx and RotatE"
    ):
        adapter.DHNSNegativeSampler(mapped_triples=TRAIN, model=build("QuatE"))


def test_without_pykeen_it_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pykeen.evaluation", None)
    spec = importlib.util.spec_from_file_location("without_pykeen", adapter.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_pykeen", module)
    spec.loader.exec_module(module)
    for name in ("DhnsFastEvaluator", "CorruptionLossTrainingLoop"):
        with pytest.raises(ImportError, match=rf"{name} needs PyKEEN \(pip install 'dhns-fast\[rivals\]'\)"):
            getattr(module, name)()
