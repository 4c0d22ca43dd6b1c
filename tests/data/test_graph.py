from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dhns_fast.data import KnowledgeGraph
from dhns_fast.data.names import NumberedNames
from dhns_fast.errors import InputError

TRIPLES = torch.tensor([[0, 0, 1], [1, 1, 2]])


def graph(**changed: object) -> KnowledgeGraph:
    fields = {
        "name": "g",
        "train": TRIPLES,
        "valid": TRIPLES[:0],
        "test": TRIPLES[1:],
        "entity_names": ["a", "b", "c"],
        "relation_names": ["r", "s"],
        "features": {"text": torch.eye(3)},
    }
    return KnowledgeGraph(**{**fields, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "names", "got"),
    [
        ("entity_names", ["a", "b", "a"], "'a' at 0 and again at 2"),
        ("relation_names", ["r", "r"], "'r' at 0 and again at 1"),
        ("entity_names", [0, 1, 2], "0 (int) at 0"),
        ("entity_names", ["a", b"b", "c"], "b'b' (bytes) at 1"),
        ("relation_names", ["r", None], "None (NoneType) at 1"),
        ("entity_names", np.arange(3.0).tolist(), "0.0 (float) at 0"),
        ("entity_names", "abc", "'abc'"),
        ("entity_names", 3, "3"),
        ("entity_names", [], "none"),
        ("relation_names", [["r"], "s"], "['r'] (list) at 0"),
        ("entity_names", ["\x1b[2J", "b", "\x1b[2J"], r"'\x1b[2J' at 0 and again at 2"),
    ],
)
def test_names_are_distinct_strings(field: str, names: object, got: str) -> None:
    with pytest.raises(InputError) as caught:
        graph(**{field: names})
    assert str(caught.value) == f"{field}: got {got}; accepted: distinct strings of Unicode text, one for each id"


@pytest.mark.parametrize(
    ("features", "present", "message"),
    [
        (torch.ones(3, 0), None, r"^features\['m'\]: got torch\.float32 \[3, 0\]; accepted: .* D at least 1$"),
        (torch.ones(3), None, r"^features\['m'\]: got torch\.float32 \[3\]"),
        (torch.ones(4, 2), None, r"^features\['m'\]: got torch\.float32 \[4, 2\]; accepted: .*\[3, D\]"),
        (torch.eye(3).to_sparse(), None, r"^features\['m'\]: got a tensor of layout torch\.sparse_coo on cpu"),
        (torch.empty(3, 2, device="meta"), None, r"^features\['m'\]: got a tensor of layout torch\.strided on meta"),
        ([[1.0]], None, r"^features\['m'\]: got list"),
        (
            torch.tensor([[1.0], [torch.nan], [0]]),
            None,
            r"^features\['m'\]: got nan in row 1, column 0; accepted: .*`present`",
        ),
        (torch.tensor([[1.0], [2], [-torch.inf]]), None, r"got -inf in row 2, column 0"),
        (torch.eye(3) * 1e30, None, r"got 1e\+30 in row 0, column 0; accepted: finite numbers up to 1e\+15"),
        (torch.eye(3), torch.ones(3), r"^present\['m'\]: got torch\.float32 \[3\]; accepted: bool \[3\]$"),
    ],
)
def test_features_that_nobody_can_train_on(features: object, present: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        graph(features={"m": features}, present={} if present is None else {"m": present})


def test_what_is_taken_beside_tensors() -> None:
    kg = graph(train=TRIPLES.numpy().astype(">i4"), valid=[], test=TRIPLES.tolist(), entity_names=("a", "b", "c"))
    assert kg.train.dtype == torch.int64
    assert torch.equal(kg.train, TRIPLES)
    assert kg.valid.shape == (0, 3)
    assert kg.entity_names == ["a", "b", "c"]
    for matrix in (np.eye(3, dtype=">f4"), np.eye(3, dtype=np.float16)[::-1], torch.eye(3).bfloat16().T):
        assert torch.equal(graph(features={"m": matrix}).features["m"].sum(1).float(), torch.ones(3))
    # A row that is not present may hold anything.
    absent = graph(
        features={"m": torch.tensor([[torch.nan], [1.0], [1e30]])}, present={"m": torch.tensor([False, True, False])}
    )
    assert absent.present["m"].tolist() == [False, True, False]
    with pytest.raises(InputError, match=r"^present: got 'sound'; accepted: the modalities of features: text$"):
        graph(present={"sound": torch.ones(3, dtype=torch.bool)})


def test_fingerprint_says_what_differs() -> None:
    kg = graph()
    first = kg.fingerprint()
    assert list(first) == ["triples", "names", "features of text", "present of text"]
    assert first == graph(name="other", notes=("n",)).fingerprint()

    def differing(**changed: object) -> list[str]:
        other = graph(**changed).fingerprint()
        return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))

    assert differing(train=TRIPLES.flip(0)) == ["triples"]
    assert differing(valid=TRIPLES[1:], test=TRIPLES[:0]) == ["triples"]
    assert differing(entity_names=["a", "c", "b"]) == ["names"]
    assert differing(relation_names=["r", "t"]) == ["names"]
    # The same characters, cut elsewhere.
    assert differing(entity_names=["ab", "c", ""]) == ["names"]
    assert differing(features={"text": torch.eye(3).flip(0)}) == ["features of text"]
    # Half precision holds the same numbers, or others.
    assert (
        differing(features={"text": torch.eye(3).half()}) == differing(features={"text": torch.eye(3).bfloat16()}) == []
    )
    third = graph(features={"text": torch.eye(3) / 3}).fingerprint()
    assert third != graph(features={"text": torch.eye(3).half() / 3}).fingerprint()
    assert third["triples"] == first["triples"]
    hidden = {"text": torch.tensor([True, True, False])}
    assert differing(present=hidden) == ["features of text", "present of text"]
    # What stands in the rows of the absent is part of no graph.
    blank = torch.eye(3)
    blank[2] = 0
    other = graph(features={"text": blank}, present=hidden).fingerprint()
    assert graph(present=hidden).fingerprint() == other
    assert (
        graph(features={"text": torch.eye(3) + torch.tensor([0, 0, 9.0])[:, None]}, present=hidden).fingerprint()
        == other
    )
    assert differing(features={}) == ["features of text", "present of text"]
    assert differing(features={"text": torch.eye(3), "image": torch.eye(3)}) == [
        "features of image",
        "present of image",
    ]


def test_fingerprint_of_large_arrays_sees_every_byte_and_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    PIECE = 1 << 16
    monkeypatch.setattr("dhns_fast.data.graph.PIECE", PIECE)
    matrix = torch.zeros(PIECE // 4 // 3 + 5, 3)
    matrix[-1, -1] = 1
    kg = KnowledgeGraph("g", TRIPLES, TRIPLES, TRIPLES, NumberedNames("e", len(matrix)), ["r", "s"], {"m": matrix})
    turned = kg.fingerprint()
    assert (
        turned
        == replace(
            kg, features={"m": matrix.T.contiguous().T}, entity_names=[f"e{i}" for i in range(len(matrix))]
        ).fingerprint()
    )
    every = torch.ones(len(matrix), dtype=torch.bool)
    whole = replace(kg, present={"m": every}).fingerprint()
    for row in (0, PIECE // 12, len(matrix) // 2, len(matrix) - 1):
        changed = matrix.clone()
        changed[row] = 0
        present = every.clone()
        present[row] = False
        absent = replace(kg, features={"m": changed}, present={"m": present}).fingerprint()
        changed[row] = 5
        given = changed.clone()
        assert replace(kg, features={"m": given}, present={"m": present}).fingerprint() == absent
        assert torch.equal(given, changed)
        given[row] = -0.0
        assert replace(kg, features={"m": given}, present={"m": present}).fingerprint() == absent
        changed[row] = matrix[row] + 2 * torch.eye(3)[1]
        seen = replace(kg, features={"m": changed}, present={"m": every}).fingerprint()
        assert seen["features of m"] != whole["features of m"]
    # Half precision in pieces: the float32 numbers that it holds.
    half = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(0)).half()
    assert replace(kg, features={"m": half}).fingerprint() == replace(kg, features={"m": half.float()}).fingerprint()


def test_numbered_names_are_a_list() -> None:
    names = NumberedNames("e", 12)
    assert (len(names), names[-1], names[3:6], list(names)[:2]) == (12, "e11", ["e3", "e4", "e5"], ["e0", "e1"])
    assert names == [f"e{i}" for i in range(12)]
    assert [names.index(f"e{i}") for i in (0, 7, 11)] == [0, 7, 11]
    for name in ("e12", "e01", "e", "x3", "e-1", 3, "e٣"):
        assert name not in names
    with pytest.raises(IndexError):
        names[12]
