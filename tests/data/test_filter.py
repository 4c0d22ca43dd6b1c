from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dhns_fast.data import CSRFilter, Ragged
from dhns_fast.data.filter import pack
from dhns_fast.errors import DataError, InputError


def answers(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in ragged.ids.split(ragged.counts().tolist())]


@pytest.mark.parametrize(("entities", "relations"), [(37, 5), (1, 1), (2**31 + 11, 3), (2**33, 7)])
def test_answers_are_those_of_a_dictionary(entities: int, relations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # A few ids at both ends of the range, so that groups are large and, with many entities, keys outgrow int64
    # products.
    pool = torch.unique(torch.cat([torch.arange(min(12, entities)), entities - 1 - torch.arange(min(12, entities))]))
    h, t = pool[torch.randint(len(pool), (2, 700), generator=generator)]
    triples = torch.stack([h, torch.randint(relations, (700,), generator=generator), t], 1)
    triples = torch.cat([triples, triples[:100]])
    tails, heads = defaultdict(set), defaultdict(set)
    for head, relation, tail in triples.tolist():
        tails[head, relation].add(tail)
        heads[tail, relation].add(head)
    known = CSRFilter.from_triples(triples, entities, relations)
    assert (known.tail.codes is None) == (entities < 2**31)
    for side, truth in (("tail", tails), ("head", heads)):
        keys, counts = known.side(side).groups()  # type: ignore[arg-type]
        assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == {
            entity * relations + relation: len(ids) for (entity, relation), ids in truth.items()
        }
    entity, relation = (x.flatten() for x in torch.meshgrid(pool, torch.arange(relations), indexing="ij"))
    for got, truth in ((known.tails(entity, relation), tails), (known.heads(relation, entity), heads)):
        got.check(len(entity), entities)
        assert answers(got) == [
            sorted(truth.get(query, ())) for query in zip(entity.tolist(), relation.tolist(), strict=True)
        ]


@pytest.mark.parametrize(("entities", "relations"), [(9, 4), (2**40, 2**22)])
def test_packed_keys_order_triples_and_give_the_pair_back(entities: int, relations: int) -> None:
    h, r, t = torch.randint(4, (3, 200), generator=torch.Generator().manual_seed(0))
    h, t = entities - 1 - h, entities - 1 - t
    key, pairs = pack(h, r, t, entities, relations)
    assert (pairs is None) == (entities == 9)
    triples = list(zip(h.tolist(), r.tolist(), t.tolist(), strict=True))
    assert [triples[i] for i in key.argsort()] == sorted(triples)
    assert len(key.unique()) == len(set(triples))
    pair = key // entities
    assert torch.equal(pair if pairs is None else pairs[pair], h * relations + r)


@pytest.mark.parametrize(("head", "relation"), [(9, 0), (3, 0), (-1, 0), (0, 2), (0, -1), (2**62, 1), (2, 2**40)])
def test_a_query_out_of_range_is_one_sentence(head: int, relation: int) -> None:
    known = CSRFilter.from_triples([[0, 0, 1], [2, 1, 2]], 3, 2)
    for ask in (lambda e, r: known.tails(e, r), lambda e, r: known.heads(r, e)):
        with pytest.raises(InputError, match=r"^query: got row 1 .*; accepted: entities 0 to 2, relations 0 to 1$"):
            ask(torch.tensor([0, head]), torch.tensor([0, relation]))


def test_queries_and_triples_of_every_kind_of_integers() -> None:
    triples = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 1]])
    truth = answers(CSRFilter.from_triples(triples, 3, 2).tails(torch.arange(3), torch.tensor([1, 0, 1])))
    for made in (
        triples.astype(">i8"),
        triples.astype(">u2"),
        triples.astype(np.uint64),
        triples[::-1],
        np.asfortranarray(triples),
        np.repeat(triples, 2, axis=1)[:, ::2],
        torch.from_numpy(triples).int(),
        torch.from_numpy(triples).repeat(1, 2)[:, :3],
        torch.from_numpy(triples).T.contiguous().T,
        triples.tolist(),
        tuple(map(tuple, triples.tolist())),
    ):
        known = CSRFilter.from_triples(made, np.int64(3), torch.tensor(2))
        for query in (
            ([0, 1, 2], [1, 0, 1]),
            (np.arange(3), np.array([1, 0, 1], ">i4")),
            (torch.arange(3).int(), torch.tensor([1, 0, 1])),
        ):
            assert answers(known.tails(*query)) == truth


@pytest.mark.parametrize(
    "triples",
    [
        [[0, 0, 1], [0, 1]],
        [["a", "r", "b"]],
        [[0, 0, 2**70]],
        np.array([[0, 0, 2**63 + 5]], np.uint64),
        np.array([[0, 0, None]]),
        np.ones((1, 3), bool),
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor([[0, 0, 1]]).to_sparse(),
        torch.empty(1, 3, dtype=torch.int64, device="meta"),
        torch.ones(3, dtype=torch.int64),
        "triples",
        7,
        {0: 1},
        iter([(0, 0, 1)]),
    ],
)
def test_what_is_no_table_of_triples_is_one_sentence(triples: object) -> None:
    with pytest.raises(
        InputError,
        match=r"^triples: got [^\n]{1,160}; accepted: (integers of shape \[n, 3\]|entities 0 to 2, relations 0 to 1)$",
    ):
        CSRFilter.from_triples(triples, 3, 2)


@pytest.mark.parametrize(
    "sizes", [(0, 2), (3, 0), (torch.ones(500, dtype=torch.int64), 2), (3, "two"), (3.0, 2), (True, 2)]
)
def test_sizes_that_are_none_are_one_short_sentence(sizes: tuple[object, object]) -> None:
    with pytest.raises(InputError, match=r"^num_(entities|relations): got .{1,60}; accepted: integers of at least 1$"):
        CSRFilter.from_triples([[0, 0, 0]], *sizes)


@pytest.mark.parametrize(("entities", "relations", "count"), [(300, 5, 4000), (1, 1, 3), (7, 2, 0), (2**33, 7, 500)])
def test_built_in_a_folder_it_is_the_same(
    tmp_path: Path, entities: int, relations: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhns_fast.data.filter.BLOCK", 700)
    monkeypatch.setattr("dhns_fast.data.filter.PART", 900)
    monkeypatch.setattr("dhns_fast.data.filter.RANGES", 64)
    generator = torch.Generator().manual_seed(1)
    triples = torch.randint(2**40, (count, 3), generator=generator) % torch.tensor([entities, relations, entities])
    triples[: count // 3, 0] = 0  # a hub
    known, truth = (
        CSRFilter.from_triples(triples, entities, relations, tmp_path / "f"),
        CSRFilter.from_triples(triples, entities, relations),
    )
    again = CSRFilter.mapped(tmp_path / "f", entities, relations)
    for side in ("tail", "head"):
        for name in ("packed", "codes"):
            found, mapped, expected = (getattr(x.side(side), name) for x in (known, again, truth))  # type: ignore[arg-type]
            assert (found is None) == (mapped is None) == (expected is None)
            if expected is not None:
                assert found.dtype == mapped.dtype == torch.int64
                assert torch.equal(found, expected)
                assert torch.equal(mapped, expected)
    wide = entities == 2**33
    names = {f"{side}{name}.npy" for side in ("tail", "head") for name in (("", ".codes") if wide else ("",))}
    assert {path.name for path in (tmp_path / "f").iterdir()} == names
    (tmp_path / "f" / "head.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"head\.npy: cannot be read"):
        CSRFilter.mapped(tmp_path / "f", entities, relations)
    np.save(tmp_path / "f" / "head.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"head\.npy: is \[3\] torch\.int32; accepted: one column of int64"):
        CSRFilter.mapped(tmp_path / "f", entities, relations)


def test_it_takes_16_bytes_a_triple() -> None:
    triples = torch.randint(500, (3000, 3), generator=torch.Generator().manual_seed(2)).unique(dim=0)
    known = CSRFilter.from_triples(triples, 500, 500)
    assert known.tail.packed.nbytes + known.head.packed.nbytes == 16 * len(triples)
    assert known.tail.codes is None


def test_unknown_queries_no_queries_and_no_triples_give_empty_rows() -> None:
    known = CSRFilter.from_triples([[4, 1, 0], [4, 1, 3]], 5, 2)
    assert answers(known.tails(torch.tensor([0, 4, 4]), torch.tensor([1, 0, 1]))) == [[], [], [0, 3]]
    none = torch.empty(0, dtype=torch.int64)
    assert len(known.heads(none, none).check(0, 5)) == 0
    empty = CSRFilter.from_triples(torch.empty(0, 3, dtype=torch.int64), 5, 2)
    assert answers(empty.heads(torch.tensor([0, 1]), torch.tensor([4, 4]))) == [[], []]


def test_tensors_arrays_lists_and_several_of_them() -> None:
    a, b = [[0, 1, 2], [2, 0, 1]], [[0, 1, 1]]
    for triples in (
        a + b,
        torch.tensor(a + b),
        np.array(a + b),
        [torch.tensor(a), torch.tensor(b)],
        (np.array(a, dtype=np.int32), torch.tensor(b)),
    ):
        known = CSRFilter.from_triples(triples, 3, 2).to("cpu")
        assert answers(known.tails(torch.tensor([0]), torch.tensor([1]))) == [[1, 2]]


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (
            [[0, 0, 1], [0, 2, 1]],
            r"^triples: got row 1 \(head, relation, tail\) = \(0, 2, 1\); accepted: entities 0 to 2, relations 0 to 1$",
        ),
        ([[0, 0, 1], [0, 1, -1], [9, 9, 9]], r"^triples: got row 1 \(head, relation, tail\) = \(0, 1, -1\); accepted"),
        (
            [torch.tensor([[0, 0, 1]]), torch.tensor([[3, 0, 1]])],
            r"^triples\[1\]: got row 0 \(head, relation, tail\) = \(3, 0, 1\); accepted",
        ),
        ([[0, 1]], r"^triples: got torch\.int64 \[1, 2\]; accepted: integers of shape \[n, 3\]$"),
        ([[0.0, 1.0, 2.0]], r"^triples: got torch\.float64 \[1, 3\]; accepted: integers of shape \[n, 3\]$"),
    ],
)
def test_bad_triples(triples: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CSRFilter.from_triples(triples, 3, 2)


def test_bad_queries() -> None:
    known = CSRFilter.from_triples([[0, 0, 1]], 3, 2)
    # (0, 2) has the key of (1, 0): it must not be answered as such.
    with pytest.raises(
        InputError,
        match=r"^query: got row 1 \(head, relation\) = \(0, 2\); accepted: entities 0 to 2, relations 0 to 1$",
    ):
        known.tails(torch.tensor([0, 0]), torch.tensor([0, 2]))
    with pytest.raises(InputError, match=r"^query: got row 0 \(tail, relation\) = \(3, 0\)"):
        known.heads(torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(InputError, match=r"^relation: got shape \[1\]; accepted: \[B = 2\]$"):
        known.tails(torch.tensor([0, 0]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("offsets", "ids", "message"),
    [
        ([0, 2], [1], r"offsets that start at 0, never fall and end at the number of ids, 1$"),
        ([1, 1], [1], r"start at 0"),
        ([0, 2, 1], [1], r"never fall"),
        ([0, 1], [3], r"^Ragged\.ids: got id 3 at position 0; accepted: 0 to 2$"),
        ([0, 0, 1], [2], r"^Ragged: got 2 rows; accepted: 1, one per query$"),
        ([0.0, 1.0], [2], r"^Ragged\.offsets: got torch\.float32 \[2\]; accepted: int64 of one dimension$"),
    ],
)
def test_ragged_check(offsets: list[int], ids: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ragged(torch.tensor(offsets), torch.tensor(ids)).check(1, 3)


def test_ragged_rows() -> None:
    ragged = Ragged(torch.tensor([0, 2, 2, 3]), torch.tensor([5, 6, 7])).check(3, 8).to("cpu")
    assert len(ragged) == 3
    assert ragged.counts().tolist() == [2, 0, 1]
    assert ragged.rows().tolist() == [0, 0, 2]
