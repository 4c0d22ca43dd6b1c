from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.data import CSRFilter, synthetic
from dhns_fast.errors import InputError
from dhns_fast.fusion import Fusion
from dhns_fast.models import DistMult, RotatE, TransE
from dhns_fast.negatives import (
    GAN,
    Bernoulli,
    Constrained,
    Diffusion,
    Grounded,
    ModalitySwap,
    Nearest,
    NSCaching,
    Sampler,
    Uniform,
)
from dhns_fast.negatives.base import answers, candidate_scores
from dhns_fast.negatives.controls import gaussian, positive_only, shuffled
from dhns_fast.reference.scoring import score_all
from dhns_fast.sampler import DiffHEG

E, R, D = 60, 4, 8


@pytest.fixture(scope="module")
def graph() -> tuple[Tensor, CSRFilter]:
    kg = synthetic(E, R, 700, {}, seed=2)
    return kg.train, CSRFilter.from_triples(kg.train, E, R)


@pytest.fixture(scope="module")
def fused_model() -> TransE:
    torch.manual_seed(0)
    present = torch.rand(E) < 0.5
    present[:2] = torch.tensor([True, False])
    features = {"text": torch.randn(E, 5), "image": torch.randn(E, 3)}
    return TransE(E, R, D, fusion=Fusion(features, D, present={"image": present, "text": torch.arange(E) < E - 5}))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_over(row: Tensor, allowed: list[int]) -> None:
    """Draws are of `allowed` alone, and a chi-square test does not refuse equal probability (5 standard deviations)."""
    count = row.bincount(minlength=E)
    assert count.sum() == count[allowed].sum()
    share = len(row) / len(allowed)
    free = len(allowed) - 1
    assert ((count[allowed].double() - share) ** 2).sum() / share <= free + 5 * (2 * free) ** 0.5


def every_sampler(graph: tuple[Tensor, CSRFilter], model: TransE) -> list[Sampler]:
    known = graph[1]
    diffusion = DiffHEG(D, 10, D, 6.0, 2.0, condition="transe", behaviour="corrected", levels=[1, 5])
    return [
        Uniform(known, 3), Bernoulli(known, 3), Constrained(known, 3), NSCaching(known, model, 3, cache=5, fresh=4), Nearest(known, model, 3, 7),
        Nearest(known, model, 3, 7, to="query"), ModalitySwap(known, model, 3), GAN(known, 3, dim=D), Diffusion(known, model, diffusion),
        Grounded(known, model, diffusion, 2),
    ]  # fmt: skip


def test_every_sampler_keeps_the_protocol(graph: tuple[Tensor, CSRFilter], fused_model: TransE) -> None:
    train, known = graph
    h, r, t = train[:50].unbind(1)
    for sampler in every_sampler(graph, fused_model):
        if sampler.by_id:
            for side in ("tail", "head"):
                ids = sampler.sample(h, r, t, side, rng())
                assert ids.dtype == torch.int64
                assert ids.shape == (50, sampler.num_negatives)
                true = answers(known, h, r, t, side)
                pairs = {tuple(x) for x in torch.stack([true.rows(), true.ids], 1).tolist()}
                made = torch.stack([torch.arange(50).repeat_interleave(ids.shape[1]), ids.flatten()], 1).tolist()
                assert not pairs & {tuple(x) for x in made}
                if not isinstance(sampler, NSCaching):  # its draw moves the caches on
                    assert torch.equal(ids, sampler.sample(h, r, t, side, rng()))
            assert sampler.sample(h[:0], r[:0], t[:0], "tail", rng()).shape == (0, sampler.num_negatives)
            with pytest.raises(InputError, match=r"^side: got 'left'"):
                sampler.sample(h, r, t, "left")  # type: ignore[arg-type]
        else:
            with pytest.raises(InputError, match="generate alone"):
                sampler.sample(h, r, t)
        if sampler.by_embedding:
            for made_of in sampler.generate(h, r, t, rng()):
                assert made_of.shape == (
                    len(sampler.diffusion.levels) if isinstance(sampler, Diffusion) else 3,
                    3,
                    50,
                    D,
                )
                assert not made_of.requires_grad
        else:
            with pytest.raises(InputError, match="sample alone"):
                sampler.generate(h, r, t)
        assert not any(name.startswith("_held") for name in sampler.state_dict())


def test_every_sampler_names_what_does_not_fit(graph: tuple[Tensor, CSRFilter], fused_model: TransE) -> None:
    h, r, t = graph[0][:5].unbind(1)
    bad: dict[str, tuple[Any, str]] = {
        "h": (h + E, "indices from"),
        "r": (r + R, "indices from"),
        "t": (t - E, "indices from"),
        " h": (h.tolist(), "list"),
        " r": (r[:4], r"shape \[4\]"),
        " t": (t.int(), "torch.int32"),
    }
    for sampler in every_sampler(graph, fused_model):
        calls = [sampler.sample] * sampler.by_id + [sampler.generate] * sampler.by_embedding
        for call, (name, (value, found)) in itertools.product(calls, bad.items()):
            with pytest.raises(InputError, match=f"^{name.strip()}: got {found}"):
                call(**{"h": h, "r": r, "t": t, name.strip(): value})


@pytest.mark.parametrize("side", ["tail", "head"])
def test_constrained_draws_uniformly_from_the_pseudo_type(graph: tuple[Tensor, CSRFilter], side: str) -> None:
    # Relation 0 takes tails 10..29, relation 1 the tails 40..43, all of which (5, 1) knows; (9, 0) knows nothing.
    triples = (
        [[0, 0, t] for t in (10, 11, 15, 29)] + [[1, 0, t] for t in range(10, 30)] + [[5, 1, t] for t in range(40, 44)]
    )
    table = torch.tensor(triples) if side == "tail" else torch.tensor(triples).flip(1)
    sampler = Constrained(CSRFilter.from_triples(table, E, 2), 4000)
    assert sampler.members(1, side).tolist() == [40, 41, 42, 43]  # type: ignore[arg-type]
    batch = torch.tensor([[0, 0, 10], [9, 0, 0], [1, 0, 10], [5, 1, 40]])
    h, r, t = (batch if side == "tail" else batch.flip(1)).unbind(1)
    out = sampler.sample(h, r, t, side, rng())  # type: ignore[arg-type]
    uniform_over(out[0], [e for e in range(10, 30) if e not in (10, 11, 15, 29)])
    uniform_over(out[1], list(range(10, 30)))
    uniform_over(out[2], [e for e in range(E) if not 10 <= e < 30])
    uniform_over(out[3], [e for e in range(E) if not 40 <= e < 44])


def test_bernoulli_replaces_the_side_with_fewer_answers() -> None:
    triples = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 1, 0], [2, 1, 0]])
    r = torch.tensor([0, 1]).repeat_interleave(20_000)
    known = CSRFilter.from_triples(triples, 4, 2)
    assert Bernoulli(known, 1).sides(r, rng()).view(2, -1).double().mean(1).tolist() == pytest.approx(
        [3 / 4, 1 / 3], abs=0.02
    )
    assert Uniform(known, 1).sides(r, rng()).double().mean() == pytest.approx(0.5, abs=0.02)


def test_nscaching_follows_the_scores_and_draws_uniformly_from_its_cache(
    graph: tuple[Tensor, CSRFilter], fused_model: TransE
) -> None:
    train, known = graph
    h, r, t = train[:1].unbind(1)
    sampler = NSCaching(known, fused_model, 4000, cache=6, fresh=30)
    for seed in range(40):
        sampler.sample(h, r, t, "tail", rng(seed))
    keys, _ = known.tail.groups()
    group = torch.searchsorted(keys, h * R + r)
    cached = sampler.get_buffer("_tail")[group][0].long()
    uniform_over(
        sampler.sample(h, r, t, "tail", rng()).flatten(),
        sorted(set(cached.tolist())) if len(set(cached.tolist())) == 6 else [],
    )
    assert (sampler.get_buffer("_tail")[torch.arange(len(keys) + 1) != group] == -1).all()
    # One refresh: the share in which each candidate stays is that of drawing without replacement with probability ∝
    # exp(score).
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(3000, 1)
    small = NSCaching(
        CSRFilter.from_triples([[i, 0, 0] for i in range(3000)], 3000, 1), DistMult(3000, 1, 4), 1, cache=1, fresh=3
    )
    entities = torch.arange(3000)
    small.sample(entities, entities * 0, entities * 0, "tail", rng())
    small.update(torch.arange(4).repeat(3000, 1), scores)
    stayed = small.get_buffer("_tail")[:-1, 0].bincount(minlength=4) / 3000
    assert stayed.tolist() == pytest.approx(scores[0].softmax(0).tolist(), abs=0.04)
    # Rows of one query agree on what stays; a query that train lacks has no cache.
    pair = torch.tensor([0, 0])
    small.sample(pair, pair, pair, "tail", rng())
    with pytest.raises(InputError, match="at least 1 candidates"):
        small.update(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0))
    again = NSCaching(small.known, small.model, 1, cache=1, fresh=3)
    again.load_state_dict(small.state_dict())
    assert torch.equal(*(x.sample(pair, pair, pair, "tail", rng(3)) for x in (small, again)))


def test_nscaching_takes_ids_of_entities_alone(graph: tuple[Tensor, CSRFilter], fused_model: TransE) -> None:
    train, known = graph
    sampler = NSCaching(known, fused_model, 4, cache=3, fresh=3)
    sampler.sample(*train[:2].unbind(1))
    ids = torch.arange(8).view(2, 4)
    sampler._pending = "tail", torch.zeros(2, dtype=torch.int64), None
    with pytest.raises(InputError, match=r"^ids: got indices from 0 to "):
        sampler.update(ids + (ids == 7) * E, torch.zeros(2, 4))
    sampler._pending = "tail", torch.tensor([0, 1]), rng()
    sampler.update(ids, torch.tensor([torch.nan, 0.0, 0.0, 0.0]).expand(2, 4))
    assert not (sampler._tail[:2, :, None] == ids[:, None, :1]).any()  # type: ignore[index]
    # A score of −∞ is a score.
    sampler._pending = "tail", torch.tensor([0, 1]), rng()
    sampler.update(ids, torch.tensor([torch.nan, -torch.inf, -torch.inf, -torch.inf]).expand(2, 4))
    assert not (sampler._tail[:2, :, None] == ids[:, None, :1]).any()  # type: ignore[index]


def test_nscaching_refreshes_as_often_as_it_is_told(graph: tuple[Tensor, CSRFilter], fused_model: TransE) -> None:
    train, known = graph
    sampler = NSCaching(known, fused_model, 2, cache=4, fresh=4, lazy=2)
    seen = []
    for seed in range(7):
        sampler.sample(*train[:200].unbind(1), "head", rng(seed))
        seen.append(sampler.get_buffer("_head").clone())
    assert [bool((a != b).any()) for a, b in itertools.pairwise(seen)] == [False, False, True, False, False, True]


@pytest.mark.parametrize("to", ["answer", "query"])
@pytest.mark.parametrize("side", ["tail", "head"])
def test_nearest_draws_from_the_pool_of_the_best(
    graph: tuple[Tensor, CSRFilter], fused_model: TransE, to: str, side: str
) -> None:
    train, known = graph
    h, r, t = train[:3].unbind(1)
    out = Nearest(known, fused_model, 2000, pool=5, to=to).sample(h, r, t, side, rng())  # type: ignore[arg-type]
    table = fused_model.entities(side)
    if to == "answer":
        score = score_all(table[t if side == "tail" else h], table, "l2")
    else:
        score = score_all(fused_model.query(h if side == "tail" else t, r, side)[0], table, "l1")
    for row, values, (a, b, c) in zip(out, score, train[:3].tolist(), strict=True):
        true = known.tails(*torch.tensor([[a], [b]])) if side == "tail" else known.heads(*torch.tensor([[b], [c]]))
        values = values.detach().index_fill(0, true.ids, -torch.inf)
        uniform_over(row, values.topk(5).indices.sort().values.tolist())


def test_nearest_leaves_the_answer_of_a_triple_out_that_train_lacks(
    graph: tuple[Tensor, CSRFilter], fused_model: TransE
) -> None:
    train, known = graph
    taken = {tuple(x) for x in train.tolist()}
    new = next((0, 0, t) for t in range(E) if (0, 0, t) not in taken)
    h, r, t = torch.tensor([new]).unbind(1)
    assert new[2] not in Nearest(known, fused_model, 500, pool=3).sample(h, r, t, "tail", rng())


def test_modality_swap_exchanges_one_modality_for_that_of_another_owner(
    graph: tuple[Tensor, CSRFilter], fused_model: TransE
) -> None:
    known = graph[1]
    sampler = ModalitySwap(known, fused_model, 6000)
    mask = fused_model.fusion.mask()  # type: ignore[union-attr]
    both = int((mask[1] & mask[2]).nonzero()[0])
    none = int((~mask[1] & ~mask[2]).nonzero()[0])
    ids = torch.tensor([both, none])
    modality, donor = sampler.donors(ids, rng())
    assert (modality[0] == 1).double().mean() == pytest.approx(0.5, abs=0.04)
    for m in (1, 2):
        uniform_over(donor[0][modality[0] == m], [e for e in mask[m].nonzero().flatten().tolist() if e != both])
    assert (modality[1] == 0).all()
    uniform_over(donor[1], [e for e in range(E) if e != none])
    heads, _ = ModalitySwap(known, fused_model, 9).generate(ids, ids * 0, ids, rng())
    own = fused_model.modalities(ids)
    changed = (heads != own).any(-1)
    assert (changed.sum(1) == 1).all()
    assert not changed[:, 0, 0].any()
    plain = DistMult(E, R, D)
    heads, tails = ModalitySwap(known, plain, 4).generate(ids, ids * 0, ids, rng())
    assert all((x.unsqueeze(3) == plain.entity.weight).all(-1).any(-1).all() for x in (heads, tails))


def test_gan_draws_by_its_policy_and_learns_what_is_rewarded(graph: tuple[Tensor, CSRFilter]) -> None:
    train, known = graph
    torch.manual_seed(0)
    sampler = GAN(known, 4000, candidates=6, dim=D)
    torch.nn.init.normal_(sampler.policy.entity.weight)
    torch.nn.init.normal_(sampler.policy.relation.weight)
    h, r, t = train[:1].unbind(1)
    ids = sampler.sample(h, r, t, "tail", rng())
    candidates = sampler._candidates.corrupt(train[:1], "tail", rng())
    share = torch.zeros(E).index_add_(
        0, candidates[0], candidate_scores(sampler.policy, h, r, t, candidates, "tail")[0].softmax(0)
    )
    assert ids[0].bincount(minlength=E).div(4000).tolist() == pytest.approx(share.tolist(), abs=0.03)
    favourite = 7 if 7 not in known.tails(h, r).ids else 8
    learner = GAN(known, 8, candidates=20, dim=D, learning_rate=0.05)
    h, r, t = (x.expand(200) for x in (h, r, t))

    def rewarded(seed: int) -> float:
        drawn = learner.sample(h, r, t, "tail", rng(seed))
        learner.update(drawn, (drawn == favourite).float())
        return float((drawn == favourite).float().mean())

    first = rewarded(0)
    for seed in range(1, 40):
        last = rewarded(seed)
    assert last > 3 * first
    with pytest.raises(InputError, match="what the last `sample` gave"):
        learner.update(ids, ids.float())
    drawn = learner.sample(h, r, t, "tail", rng(99))
    with pytest.raises(InputError, match="as it gave them"):
        learner.update((drawn + 1) % E, drawn.float())
    before = learner.baseline.clone()
    with torch.no_grad():
        learner.update(drawn, torch.full(drawn.shape, torch.nan))
    assert all(x.isfinite().all() for x in learner.policy.parameters())
    assert learner.baseline.item() == pytest.approx(before.item())
    for reward in (3e38, 1.0):
        drawn = learner.sample(h, r, t, "tail", rng(100))
        learner.update(drawn, torch.full(drawn.shape, reward))
    assert all(x.isfinite().all() for x in learner.policy.parameters())


def test_grounded_ids_are_the_nearest_entities_that_are_no_answers(
    graph: tuple[Tensor, CSRFilter], fused_model: TransE
) -> None:
    train, known = graph
    h, r, t = train[:20].unbind(1)
    diffusion = DiffHEG(D, 10, D, 6.0, 2.0, condition="transe", behaviour="corrected", levels=[1, 5])
    sampler = Grounded(known, fused_model, diffusion, 2)
    for side, own in (("tail", t), ("head", h)):
        made = sampler.generate(h, r, t, rng(4))[side == "tail"]
        ids = sampler.sample(h, r, t, side, rng(4))
        fusion = fused_model.fusion
        assert fusion is not None
        for level in range(2):
            weights = fusion.weights(made[level], fusion.mask(own))
            query = fused_model.view((weights.unsqueeze(-1) * made[level]).sum(0), side)
            score = score_all(query, fused_model.entities(side), "l2")
            true = answers(known, h, r, t, side)
            score[true.rows(), true.ids] = -torch.inf
            assert torch.equal(ids[:, 2 * level : 2 * level + 2], score.topk(2).indices)


def test_controls() -> None:
    made = torch.randn(2, 3, 500, D) * torch.rand(500, 1)
    noise = gaussian(made, rng())
    assert torch.allclose(noise.norm(dim=-1), made.norm(dim=-1), atol=1e-5)
    assert abs(torch.cosine_similarity(noise, made, dim=-1).mean()) < 0.05
    other = shuffled(made, 2, rng())
    assert not (other == made).all(-1).any()
    assert torch.equal(other.sort(2).values, made.sort(2).values)
    assert torch.equal(shuffled(made[:, :, :1], 2), made[:, :, :1])
    score = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    loss = positive_only(score, torch.tensor([0.0, 0.5, 1.0]), 2.0)
    assert loss.item() == pytest.approx(2 * 0.75 * 0.5 * -score.detach().sigmoid().log().mean().item())
    loss.backward()
    assert (score.grad < 0).all()  # type: ignore[operator]


def test_candidate_scores_are_the_models(graph: tuple[Tensor, CSRFilter], monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = graph
    monkeypatch.setattr("dhns_fast.negatives.base.GATHERED", 100)
    for model in (DistMult(E, R, D), RotatE(E, R, D)):
        h, r, t = train[:7].unbind(1)
        for ids in (torch.randint(E, (7, 3), generator=rng()), torch.randint(E, (7, 20), generator=rng())):
            for side, column in (("tail", 2), ("head", 0)):
                made = train[:7].repeat_interleave(ids.shape[1], 0)
                made[:, column] = ids.flatten()
                expected = model.score_hrt(made).view_as(ids)
                assert torch.allclose(candidate_scores(model, h, r, t, ids, side), expected, atol=1e-5)
