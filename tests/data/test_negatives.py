from __future__ import annotations

import pytest
import torch

from dhns_fast.data import CSRFilter, NegativeSampler, synthetic
from dhns_fast.errors import InputError
from dhns_fast.ops.sampling import find_ranges


@pytest.mark.parametrize("side", ["tail", "head"])
def test_every_unknown_entity_is_equally_likely_and_no_known_one_occurs(side: str) -> None:
    entities, draws = 23, 4000
    # Tails known to (0, 0): a run at the start, one alone, a run at the end; to (1, 0): one; to (0, 1): all but the
    # last; (2, 1): none.
    tails = {(0, 0): [0, 1, 2, 9, 21, 22], (1, 0): [5], (0, 1): list(range(22)), (2, 1): []}
    triples = torch.tensor([[h, r, t] for (h, r), ts in tails.items() for t in ts])
    batch = torch.tensor([[h, r, 7] for h, r in tails])
    if side == "head":
        triples, batch = triples.flip(1), batch.flip(1)
    sampler = NegativeSampler(CSRFilter.from_triples(triples, entities, 2), entities, num_negatives=draws)
    out = sampler.corrupt(batch, side, torch.Generator().manual_seed(0))
    assert out.dtype == torch.int64
    assert out.shape == (4, draws)
    for row, known in zip(out, tails.values(), strict=True):
        count = row.bincount(minlength=entities)
        assert len(count) == entities
        assert count[known].sum() == 0
        free = entities - len(known)
        allowed = count[[e for e in range(entities) if e not in known]].double()
        # Chi-square with free - 1 degrees of freedom: mean k, variance 2k; 5 standard deviations above are not seen by
        # chance.
        chi = ((allowed - draws / free) ** 2).sum() / (draws / free)
        assert chi <= (free - 1) + 5 * (2 * (free - 1)) ** 0.5


def test_no_known_answer_on_a_large_graph() -> None:
    kg = synthetic(300, 4, 6000, {}, seed=2)
    known = CSRFilter.from_triples(kg.train, 300, 4)
    sampler = NegativeSampler(known, 300, num_negatives=12)
    train = {tuple(x) for x in kg.train.tolist()}
    for side, column in (("tail", 2), ("head", 0)):
        out = sampler.corrupt(kg.train, side, torch.Generator().manual_seed(1))
        made = kg.train.repeat_interleave(12, 0)
        made[:, column] = out.flatten()
        assert out.min() == 0
        assert out.max() == 299
        assert not train & {tuple(x) for x in made.tolist()}


@pytest.mark.parametrize(("entities", "answers"), [(60, 60), (2**40, 60), (300, 200)])
def test_every_way_to_leave_answers_out_is_the_same(entities: int, answers: int) -> None:
    # 2**40: keys of pairs are looked up by their places. Entity 0 knows all there are, or many; 7 and 8 know nothing.
    # 200: more than are gone through.
    many = torch.tensor([[0, 1, t] for t in range(answers)] + [[5, 0, 3], [5, 0, 4], [5, 0, 59]])
    known = CSRFilter.from_triples(many, entities, 2**20)
    sampler = NegativeSampler(known, entities, 150)
    queries = torch.tensor([[0, 1, 2], [5, 0, 3], [7, 0, 1], [8, 1, 1], [5, 1, 0]])
    found = sampler._find(queries, "tail")
    draw = torch.rand(5, 150, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    draw[:, :2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    expected = sampler._through_gaps(draw, "tail", found)
    for backend in ("eager", ""):
        got = torch.ops.dhns_fast.corrupt(draw, known.tail.packed, *found, entities, backend)
        assert torch.equal(got, expected), backend
    assert not set(expected[1].tolist()) & {3, 4, 59}
    assert expected.max() < entities
    ragged = draw[:, 3:70].clone()
    assert torch.equal(torch.ops.dhns_fast.corrupt(ragged, known.tail.packed, *found, entities), expected[:, 3:70])
    with pytest.raises(InputError, match=r"^start, number: got \d+ answers from 4 on in row 0; accepted"):
        torch.ops.dhns_fast.corrupt(draw, known.tail.packed, found.start + 4, *found[1:], entities)
    with pytest.raises(InputError, match=r"^draw: got a number outside of 0 to 1; accepted: at least 0 and below 1$"):
        torch.ops.dhns_fast.corrupt(draw + 1, known.tail.packed, *found, entities)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 1000, 4097])
def test_ranges_are_those_of_two_searches(n: int, backend: str) -> None:
    g = torch.Generator().manual_seed(n)
    # With repeated values, runs longer and shorter than a step of the search, and gaps.
    values = torch.cat([torch.randint(0, 40 * n + 1, (n - n // 3,), generator=g), torch.full((n // 3,), 7 * n)]).sort()[
        0
    ]
    # More keys than are searched for side by side, in and out of order; below, above, and upon the first and last.
    ends = values[[0, -1]] if n else values
    lows = torch.cat([torch.randint(-50, 40 * n + 50, (103,), generator=g), values[: n // 2], ends, ends + 1, ends - 9])
    for width in (1, 9, 40 * n + 200):
        start, number = find_ranges(values, lows, width, backend)
        assert torch.equal(start, torch.searchsorted(values, lows))
        assert torch.equal(start + number, torch.searchsorted(values, lows + width))
    assert [x.shape for x in find_ranges(values, lows[:0], 3, backend)] == [(0,), (0,)]
    apart = torch.stack([lows, -lows], 1)[:, 0]
    assert torch.equal(find_ranges(values, apart, 9, backend)[1], find_ranges(values, lows, 9, backend)[1])


def test_with_more_entities_than_int32_holds() -> None:
    entities = 2**33
    triples = torch.tensor([[0, 0, t] for t in (0, 1, entities - 1)] + [[entities - 1, 6, 5]])
    sampler = NegativeSampler(CSRFilter.from_triples(triples, entities, 7), entities, 1000)
    out = sampler.corrupt(triples, "tail", torch.Generator().manual_seed(0))
    assert out.min() >= 2
    assert out.max() < entities - 1
    assert abs(out.double().mean() / entities - 0.5) < 0.03


def test_a_query_that_knows_everything_is_corrupted_unfiltered() -> None:
    triples = torch.tensor([[0, 0, t] for t in range(4)] + [[1, 0, 2]])
    sampler = NegativeSampler(CSRFilter.from_triples(triples, 4, 1), 4, 400)
    out = sampler.corrupt(triples[-2:], "tail", torch.Generator().manual_seed(0))
    assert out[0].unique().tolist() == [0, 1, 2, 3]
    assert out[1].unique().tolist() == [0, 1, 3]


def test_unfiltered_draws_known_answers_too() -> None:
    known = CSRFilter.from_triples([[0, 0, 1]], 3, 1)
    out = NegativeSampler(known, 3, 200, filtered=False).corrupt(
        torch.tensor([[0, 0, 1]]), "head", torch.Generator().manual_seed(0)
    )
    assert out.unique().tolist() == [0, 1, 2]


def test_one_seed_one_result() -> None:
    kg = synthetic(100, 3, 500, {})
    sampler = NegativeSampler(CSRFilter.from_triples(kg.train, 100, 3), 100, 8)
    first, again, other = (
        sampler.to("cpu").corrupt(kg.train, "tail", torch.Generator().manual_seed(s)) for s in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sides_by_tails_per_head_and_heads_per_tail() -> None:
    # Relation 0: one head, three tails: tph 3, hpt 1. Relation 1: tph 1, hpt 2. Relation 2: unseen.
    triples = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 1, 0], [2, 1, 0]])
    known = CSRFilter.from_triples(triples, 4, 3)
    batch = torch.tensor([[0, r, 1] for r in range(3)]).repeat_interleave(20_000, 0)
    for strategy, expected in (("bernoulli", [3 / 4, 1 / 3, 1 / 2]), ("uniform", [1 / 2] * 3)):
        heads = NegativeSampler(known, 4, strategy=strategy).to("cpu").sides(batch, torch.Generator().manual_seed(0))
        assert heads.dtype == torch.bool
        assert heads.view(3, -1).double().mean(1).tolist() == pytest.approx(expected, abs=0.02)


def test_bad_arguments() -> None:
    known = CSRFilter.from_triples([[0, 0, 1]], 3, 1)
    for arguments, message in (
        ({"num_entities": 4}, r"^num_entities: got 4; accepted: 3, as in the filter `known`$"),
        ({"num_entities": 3, "num_negatives": 0}, r"^num_negatives: got 0; accepted: integers of at least 1$"),
        ({"num_entities": 3, "strategy": "gaussian"}, r"^strategy: got 'gaussian'; accepted: uniform, bernoulli$"),
    ):
        with pytest.raises(InputError, match=message):
            NegativeSampler(known, **arguments)
    with pytest.raises(InputError, match=r"^side: got 'left'; accepted: tail, head$"):
        NegativeSampler(known, 3).corrupt(torch.tensor([[0, 0, 1]]), "left")
    with pytest.raises(InputError, match=r"^triples: got torch\.int64 \[3\]; accepted: integers of shape \[B, 3\]$"):
        NegativeSampler(known, 3).corrupt(torch.tensor([0, 0, 1]), "tail")


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("row", [[-1, 0, 1], [3, 0, 1], [0, 1, 1], [0, -1, 1], [0, 0, -1], [0, 0, 3], [2**62, 0, 0]])
def test_ids_out_of_range_are_one_sentence(row: list[int], filtered: bool) -> None:
    sampler = NegativeSampler(CSRFilter.from_triples([[0, 0, 1]], 3, 1), 3, 4, filtered=filtered)
    batch = torch.tensor([[0, 0, 1], row])
    for draw in (
        lambda: sampler.corrupt(batch, "tail"),
        lambda: sampler.shared(batch, "head"),
        lambda: sampler.sides(batch),
    ):
        with pytest.raises(InputError, match=r"^triples: got row 1 .*; accepted: entities 0 to 2, relations 0 to 0$"):
            draw()


def test_messages_do_not_print_tensors() -> None:
    known, many = CSRFilter.from_triples([[0, 0, 1]], 3, 1), torch.arange(5000)
    for call in (
        lambda: NegativeSampler(known, many),  # type: ignore[arg-type]
        lambda: NegativeSampler(known, 3, many),  # type: ignore[arg-type]
        lambda: NegativeSampler(known, 3, strategy=many),  # type: ignore[arg-type]
        lambda: NegativeSampler(many, 3),  # type: ignore[arg-type]
        lambda: NegativeSampler(known, 3).corrupt(torch.tensor([[0, 0, 1]]), many),  # type: ignore[arg-type]
        lambda: NegativeSampler(known, 3).corrupt(many, "tail"),
        lambda: synthetic(many, 2, 10),  # type: ignore[arg-type]
        lambda: synthetic(10, 2, 10, coverage=many),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["tail", "head"])
def test_a_shared_set_says_which_pairs_are_known(side: str) -> None:
    kg = synthetic(60, 4, 900, {}, seed=2)
    known = CSRFilter.from_triples(kg.train, 60, 4)
    train = {tuple(x) for x in kg.train.tolist()}
    # The last query has no answers at all.
    batch = torch.cat([kg.train[:50], torch.tensor([[59, 3, 59]])])
    column = 2 if side == "tail" else 0
    entities, mask = NegativeSampler(known, 60, 30).shared(batch, side, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert entities.shape == (30,)
    assert mask is not None
    for row, marked in zip(batch.tolist(), mask.tolist(), strict=True):
        made = [(*row[:column], e, *row[column + 1 :]) for e in entities.tolist()]
        assert marked == [triple in train for triple in made]
    plain, nothing = NegativeSampler(known, 60, 30, filtered=False).shared(
        batch, side, torch.Generator().manual_seed(0)
    )  # type: ignore[arg-type]
    assert torch.equal(plain, entities)
    assert nothing is None
    nobody = CSRFilter.from_triples(torch.empty(0, 3, dtype=torch.int64), 60, 4)
    _, mask = NegativeSampler(nobody, 60, 30).shared(batch, side)  # type: ignore[arg-type]
    assert mask is not None
    assert not mask.any()
