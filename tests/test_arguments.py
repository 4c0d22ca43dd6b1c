"""Arguments of the Python interface that are of another kind than asked for: one InputError that names the argument.
Torch's own messages name positions of schemas that nobody has seen, and what Python takes for true, or takes in an
order of its own, would be a wrong number without a word.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.training import graph

import dhns_fast as d
from dhns_fast import loss
from dhns_fast.data import Ragged, load
from dhns_fast.errors import InputError
from dhns_fast.models import ComplEx, RotatE, TransE
from dhns_fast.negatives import GAN, Nearest, NSCaching, Uniform
from dhns_fast.optim import LazyAdam, RowAdagrad, RowEmbedding

G = torch.Generator().manual_seed(0)
Q, E, Y = torch.randn(3, 8, generator=G), torch.randn(7, 8, generator=G), torch.tensor([0, 1, 2])
IDS, SHARED = torch.ones(3, 4, dtype=torch.int64), torch.tensor([1, 2])
POSITIVE, LEVELS = torch.randn(4, generator=G), torch.randn(2, 3, 4, generator=G)
ROWS, MADE = torch.randn(4, 8, generator=G), torch.randn(2, 1, 4, 8, generator=G)
ONES = [1.0, 1.0]
KG = graph()
NAMES = [f"e{i}" for i in range(5)]


def hal(interaction: Any = "transe", margin: Any = ONES, weight: Any = ONES, **options: Any) -> Any:
    return d.hal_from_embeddings(interaction, ROWS, ROWS, ROWS, MADE, MADE, margin, weight, **options)


def generator(**options: Any) -> d.DiffHEG:
    given = {"embedding_dim": 8, "T": 6, "dim_r": 8, "margin": 6.0, "eps": 2.0, **options}
    return d.DiffHEG(**given)


def small(**fields: Any) -> d.KnowledgeGraph:
    given = {"name": "x", "train": [[0, 0, 1]], "valid": [], "test": [], "entity_names": NAMES, "relation_names": ["r"]}
    return d.KnowledgeGraph(**{**given, **fields})


def sampler(**options: Any) -> d.NegativeSampler:
    return d.NegativeSampler(KG.known(), KG.num_entities, 4, **options)


MODEL = ComplEx(KG.num_entities, KG.num_relations, 8)
REFUSED: dict[str, Callable[[], object]] = {
    # operators and losses: layouts
    "query: got a tensor of layout sparse_coo; accepted: a dense one": lambda: d.score_all(Q.to_sparse(), E),
    "entity: got a tensor of layout sparse_csr": lambda: d.logsumexp_all(Q, E.to_sparse_csr()),
    "query: got a tensor of layout nested": lambda: d.score_all(torch.nested.nested_tensor([Q[0], Q[1]]), E),
    "negative: got a tensor of layout sparse_coo": lambda: d.self_adversarial_loss(Q[:, 0], Q.to_sparse()),
    "target: got a tensor of layout sparse_coo": lambda: d.one_vs_all_loss(Q, E, Y.to_sparse()),
    "scale: got a tensor of layout sparse_coo": lambda: torch.ops.dhns_fast.score_all(Q, E, Q.to_sparse(), "dot"),
    # operators and losses: types
    "reduction: got None (NoneType); accepted: text": lambda: d.score_all(Q, E, None),
    "reduction: got 3 (int); accepted: text": lambda: d.topk_all(Q, E, 2, 3),
    "backend: got 3 (int); accepted: text": lambda: d.score_all(Q, E, backend=3),
    "precision: got 16 (int); accepted: text": lambda: d.score_all(Q, E, precision=16),
    "scale: got 2.0 (float); accepted: a torch.Tensor, or None": lambda: d.score_all(Q, E, scale=2.0),
    "scale: got float32 [3, 8] (ndarray)": lambda: d.rank_all(Q, E, Y, scale=Q.numpy()),
    "known: got list; accepted: a Ragged": lambda: d.rank_all(Q, E, Y, known=[[1], [2], [3]]),
    "known: got Tensor; accepted: a Ragged": lambda: d.topk_all(Q, E, 2, known=Y),
    "num_negatives: got '3'; accepted: integers": lambda: d.hard_negatives(Q, E, "3", 2),
    "num_negatives: got 1.5; accepted: integers": lambda: d.hard_negatives(Q, E, 1.5, 2),
    "generator: got 'x' (str); accepted: a torch.Generator": lambda: d.hard_negatives(Q, E, 3, 2, generator="x"),
    "query: got ndarray; accepted: a torch.Tensor": lambda: d.hard_negatives(Q.numpy(), E, 3, 2),
    "temperature: got '1' (str); accepted: numbers": lambda: d.self_adversarial_loss(Q[:, 0], Q, "1"),
    "temperature: got nan; accepted: finite numbers": lambda: d.self_adversarial_loss(Q[:, 0], Q, math.nan),
    "temperature: got inf; accepted: finite numbers": lambda: loss.corruption_loss(Q, E, Y, IDS, "l1", 1.0, math.inf),
    "temperature: got None (NoneType); accepted: numbers": lambda: loss.corruption_loss(Q, E, Y, IDS, "l1", 1.0, None),
    "offset: got '3'; accepted: numbers": lambda: loss.corruption_loss(Q, E, Y, SHARED, "l1", "3"),
    "offset: got torch.float32 [2]; accepted: numbers": lambda: loss.corruption_loss(
        Q, E, Y, SHARED, "l1", torch.ones(2)
    ),
    "offset: got nan; accepted: finite numbers": lambda: loss.corruption_loss(Q, E, Y, SHARED, "l1", math.nan),
    "exclude: got [[0, 0], [0, 0], [0, 0]] (list)": lambda: loss.corruption_loss(Q, E, Y, SHARED, exclude=[[0, 0]] * 3),
    "scale: got 2.0 (float)": lambda: loss.corruption_loss(Q, E, Y, IDS, scale=2.0),
    "margin: got ['a']; accepted: a number for each": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, ["a"], [1.0]),
    "margin: got None; accepted: a number for each": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, None, ONES),
    "margin: got torch.complex64 [2]": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, torch.ones(2) + 0j, ONES),
    "weight: got [[1.0], 2.0]": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, ONES, [[1.0], 2.0]),
    "weight: got [1.0, inf]": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, ONES, [1.0, math.inf]),
    "mu: got 'x' (str); accepted: numbers": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, ONES, ONES, "x"),
    "mu: got nan; accepted: finite numbers": lambda: d.hardness_adaptive_loss(POSITIVE, LEVELS, ONES, ONES, math.nan),
    "interaction: got None (NoneType); accepted: text": lambda: hal(None),
    "gamma: got 'a' (str); accepted: numbers": lambda: hal(gamma="a"),
    "p: got 1.5 (float); accepted: integers": lambda: hal(p=1.5),
    "normalize: got None; accepted: True or False": lambda: hal(normalize=None),
    "attention: got list; accepted: a torch.Tensor": lambda: hal(attention=[1.0]),
    "present: got 3 (int); accepted: two bool masks": lambda: hal(present=3),
    # models
    "margin: got 'x'; accepted: finite numbers": lambda: TransE(6, 2, 8, margin="x"),
    "margin: got nan; accepted: finite numbers": lambda: RotatE(6, 2, 8, margin=math.nan),
    "margin: got inf; accepted: finite numbers": lambda: ComplEx(6, 2, 8, margin=math.inf),
    "epsilon: got None; accepted: finite numbers": lambda: ComplEx(6, 2, 8, epsilon=None),
    "fusion: got 3 (int); accepted: a Fusion": lambda: TransE(6, 2, 8, fusion=3),
    "entity: got torch.float32 [6, 8] (Tensor)": lambda: ComplEx(6, 2, 8, entity=torch.ones(6, 8)),
    "normalize: got 'no'; accepted: True or False": lambda: TransE(6, 2, 8, normalize="no"),
    "p: got 1.5; accepted: 1, 2": lambda: TransE(6, 2, 8, p=1.5),
    "entity: got list; accepted: a torch.Tensor": lambda: MODEL.query([1], Y[:1], "tail"),
    "entity: got indices from 99 to 99": lambda: MODEL.query(torch.tensor([99]), Y[:1], "tail"),
    "relation: got indices from -1 to -1": lambda: MODEL.query(Y[:1], torch.tensor([-1]), "head"),
    "entity: got torch.float32 [1]; accepted: torch.int64": lambda: MODEL.embed(torch.ones(1)),
    # fusion
    "features: got [tensor": lambda: d.Fusion([E], 8),
    "features['t']: got ndarray; accepted: a torch.Tensor": lambda: d.Fusion({"t": E.numpy()}, 8),
    "features['t']: got torch.complex64": lambda: d.Fusion({"t": E + 0j}, 8),
    "features['t']: got torch.float32, of layout torch.sparse_coo": lambda: d.Fusion({"t": E.to_sparse()}, 8),
    "features: got {'t': (7, 0)}; accepted: matrices with at least": lambda: d.Fusion({"t": E[:, :0]}, 8),
    "dim: got '8'; accepted: integers": lambda: d.Fusion({"t": E}, "8"),
    "dim: got 0; accepted: integers": lambda: d.Fusion({"t": E}, 0),
    "present['t']: got list; accepted: a torch.Tensor": lambda: d.Fusion({"t": E}, 8, present={"t": [True] * 7}),
    "attend: got 'no'; accepted: True or False": lambda: d.Fusion({"t": E}, 8, attend="no"),
    # generator
    "embedding_dim: got 8.0; accepted: an even integer": lambda: generator(embedding_dim=8.0),
    "levels: got '01'; accepted: one or more integers": lambda: generator(levels="01"),
    "levels: got 3; accepted: one or more integers": lambda: generator(levels=3),
    "clip: got 'x'; accepted: None or a number": lambda: generator(clip="x"),
    "margin + eps: got '6' + 2.0": lambda: generator(margin="6", condition="rotate"),
    "generator: got 3 (int); accepted: a torch.Generator": lambda: generator().sample(ROWS, ROWS, ROWS, generator=3),
    "noise: got 3 (int); accepted: a SampleNoise": lambda: generator().sample(ROWS, ROWS, ROWS, noise=3),
    "row_offset: got 'a' (str); accepted: integers": lambda: generator().sample(ROWS, ROWS, ROWS, row_offset="a"),
    "timesteps: got [1, 2, 3, 4] (list)": lambda: generator()(ROWS, ROWS, ROWS, timesteps=[1, 2, 3, 4]),
    "present: got [True] (list)": lambda: generator()(ROWS, ROWS, ROWS, present=[True]),
    "present: got torch.float32 [4]; accepted: torch.bool": lambda: generator()(ROWS, ROWS, ROWS, present=POSITIVE),
    "x_h: got torch.float32 [0, 8]; accepted: at least one row": lambda: generator()(ROWS[:0], ROWS[:0], ROWS[:0]),
    # graphs
    "entity_names: got a set; accepted: a list of names": lambda: small(entity_names=set(NAMES)),
    "entity_names: got a dict; accepted: a list of names": lambda: small(entity_names={"b": 1, "a": 0}),
    "features: got None; accepted: a dict": lambda: small(features=None),
    "features: got [tensor([[": lambda: small(features=[torch.ones(5, 2)]),
    "present: got None; accepted: a dict": lambda: small(present=None),
    "notes: got 'abc'; accepted: sentences": lambda: small(notes="abc"),
    "features['t']: got a masked array": lambda: small(features={"t": np.ma.masked_array(np.ones((5, 1), np.float32))}),
    "train: got a masked array": lambda: small(train=np.ma.masked_array([[0, 0, 1]], [[False, False, True]])),
    "split: got 'foo'; accepted: train, valid, test": lambda: KG.with_splits(foo=[[0, 0, 1]]),
    "fraction: got 'x'; accepted: finite numbers": lambda: KG.hold_out_validation("x", 0),
    "seed: got 1180591620717411303424": lambda: KG.hold_out_validation(0.1, 2**70),
    "seed: got -1; accepted: integers from 0": lambda: d.synthetic(9, 2, 20, seed=-1),
    "noise: got 'x'; accepted: finite numbers": lambda: d.synthetic(9, 2, 20, noise="x"),
    "modalities: got ['t'] (list); accepted: a dict": lambda: d.synthetic(9, 2, 20, modalities=["t"]),
    "features: got 3; accepted: names of modalities": lambda: load("atlas", features=3),
    "path: got None; accepted: a path": lambda: d.load_run(None),
    "side: got 'x'; accepted: tail, head": lambda: KG.known().side("x"),
    "folder: got 3 (int); accepted: a path": lambda: d.CSRFilter.from_triples([[0, 0, 0]], 5, 2, folder=3),
    "folder: got '/dev/null'": lambda: d.CSRFilter.from_triples([[0, 0, 0]], 5, 2, folder="/dev/null"),
    # negatives
    "filtered: got 'no'; accepted: True or False": lambda: sampler(filtered="no"),
    "generator: got 3 (int)": lambda: sampler().corrupt(KG.train[:2], "tail", generator=3),
    "known: got 3 (int); accepted: a CSRFilter": lambda: Uniform(3, 4),
    "pool: got 2.5; accepted: integers": lambda: Nearest(KG.known(), MODEL, 4, pool=2.5),
    "cache: got '5'; accepted: integers": lambda: NSCaching(KG.known(), MODEL, 4, cache="5"),
    "candidates: got 0; accepted: integers": lambda: GAN(KG.known(), 4, candidates=0),
    # evaluation
    "kg: got 3 (int); accepted: a KnowledgeGraph": lambda: d.evaluate(MODEL, 3),
    "model: got int; accepted: something with query": lambda: d.evaluate(3, KG),
    "model: got one of 9 relations": lambda: d.evaluate(ComplEx(KG.num_entities, 9, 8), KG),
    "batch_size: got 0; accepted: integers": lambda: d.evaluate(MODEL, KG, batch_size=0),
    "batch_size: got 'a'; accepted: integers": lambda: d.evaluate(MODEL, KG, batch_size="a"),
    "candidates: got torch.float64 [1]; accepted": lambda: d.evaluate(MODEL, KG, candidates=[1.5]),
    "candidates: got torch.bool [60]": lambda: d.evaluate(MODEL, KG, candidates=torch.ones(60, dtype=torch.bool)),
    "candidates: got torch.int64 [1, 1]": lambda: d.evaluate(MODEL, KG, candidates=[[1]]),
    "filtered: got 'raw'; accepted: True or False": lambda: d.evaluate(MODEL, KG, filtered="raw"),
    # optimisers
    "lr: got 'x'; accepted: finite numbers": lambda: LazyAdam([RowEmbedding(3, 2)], lr="x"),
    "eps: got nan; accepted: finite numbers": lambda: RowAdagrad([RowEmbedding(3, 2)], eps=math.nan),
    "betas: got 0.9; accepted: two numbers": lambda: LazyAdam([RowEmbedding(3, 2)], betas=0.9),
    "ids: got list; accepted: a torch.Tensor": lambda: RowEmbedding(3, 2)([1, 2]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", REFUSED)
def test_what_is_of_another_kind_is_named(message: str) -> None:
    with pytest.raises(InputError) as caught:
        REFUSED[message]()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_integers_and_ids_of_every_library_are_taken() -> None:
    five = np.int64(5)
    for one, other in ((d.topk_all(Q, E, five), d.topk_all(Q, E, 5)), (d.topk_all(Q, E, torch.tensor(5)),) * 2):
        assert all(map(torch.equal, one, other))
    assert d.hard_negatives(Q, E, five, np.uint8(3)).shape == (3, 5)
    model = ComplEx(np.int64(6), np.int32(2), np.uint8(8))
    assert (model.num_entities, type(model.num_entities), type(model.dim)) == (6, int, int)
    made = generator(embedding_dim=np.int64(8), T=np.int32(6), levels=np.array([0, 2]), sampling_steps=five)
    assert (made.levels, made.embedding_dim, type(made.T)) == ((0, 2), 8, int)
    assert RowEmbedding(np.int64(3), np.int64(2)).shape == (3, 2)
    assert d.synthetic(np.int64(9), 2, 20, seed=np.int64(3)).num_entities == 9
    some = torch.cat([KG.test[:, 0], KG.test[:, 2]]).unique()
    expected = dict(d.evaluate(MODEL, KG, candidates=some))
    for form in (some.tolist(), some.numpy(), some.numpy()[::-1], some.int(), some.repeat(2)):
        assert dict(d.evaluate(MODEL, KG, candidates=form)) == expected
    assert dict(d.evaluate(MODEL, KG, filtered=np.bool_(True), batch_size=five)) == dict(d.evaluate(MODEL, KG))
    # Nothing to corrupt is nothing, however it is written.
    assert sampler().corrupt([], "tail").shape == (0, 4)
    assert sampler().sides([]).shape == (0,)
    assert sampler().shared([], "head")[1].shape == (0, 4)


def test_meta_tensors_go_through() -> None:
    """What plans memory or shapes asks by them; the device may be the default one."""
    q, e, y, positive, levels, rows = (x.to("meta") for x in (Q, E, Y, POSITIVE, LEVELS, ROWS))
    assert d.rank_all(q, e, y).realistic.shape == (3,)
    assert d.hard_negatives(q, e, 5, 2).shape == (3, 5)
    assert loss.corruption_loss(q, e, y, IDS.to("meta"), "l2").shape == ()
    assert d.hardness_adaptive_loss(positive, levels, ONES, ONES).is_meta
    assert MODEL.relation.weight.device.type == "cpu"
    moved = copy.deepcopy(MODEL).to("meta")
    assert moved.score_t([[0, 0]]).shape == (1, KG.num_entities)
    assert moved.score_hrt(KG.test).is_meta
    made = generator().to("meta")
    assert made.sample(rows, rows, rows)[0][0].is_meta
    assert made(rows, rows, rows).shape == ()


def test_public_objects_are_copied_and_pickled() -> None:
    """Loaders with workers, and notebooks, do both."""
    result = d.evaluate(MODEL, KG)
    for twin in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert twin(KG).fingerprint() == KG.fingerprint()
        assert torch.equal(twin(KG.known()).tail.packed, KG.known().tail.packed)
        assert dict(twin(result)) == dict(result)
        assert torch.equal(twin(MODEL).score_hrt(KG.test), MODEL.score_hrt(KG.test))
        assert twin(generator()).levels == generator().levels
        assert twin(sampler()).corrupt(KG.train[:2], "tail").shape == (2, 4)
        assert torch.equal(twin(Ragged(Y, Y[:2])).offsets, Y)
        assert twin(d.Fusion({"t": E}, 8)).names == ("structure", "t")
        assert twin(d.TrainConfig(dim=16)) == d.TrainConfig(dim=16)
