"""Entities by type: of train, and of OpenKE's type_constrain.txt."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from dhns_fast import evaluate
from dhns_fast.data import KnowledgeGraph, TypeConstraints
from dhns_fast.errors import DataError, InputError

GOOD = "2\n1 2 0 3\n1\t3\t4 1 0 \n0 0\n0 1 2\n"


def test_sides_and_relations_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "type_constrain.txt").write_text(GOOD)
    (tmp_path / "type_constrain.txt.gz").write_bytes(gzip.compress(GOOD.replace("\n", "\r\n").encode()))
    for name in ("type_constrain.txt", "type_constrain.txt.gz"):
        # Relation 2 is not in the file.
        types = TypeConstraints.read(tmp_path / name, 5, 3)
        found = {(r, side): types.members(r, side).tolist() for r in range(3) for side in ("head", "tail")}
        assert found == {
            (0, "head"): [], (0, "tail"): [2], (1, "head"): [0, 3], (1, "tail"): [0, 1, 4], (2, "head"): [], (2, "tail"): [],
        }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty (0 bytes)"),
        ("\n \n", 1, "found blank lines only; accepted: the number of relations alone on the first line"),
        ("0 2 1 2\n0 1 1\n", 1, "found '0 2 1 2'; accepted: the number of relations alone on the first line"),
        ("two\n0 1 1\n0 1 1\n", 1, "found 'two' as the number of relations; accepted: an integer"),
        ("2\n0 1 1\n0 1 1\n", 1, "the count is 2, but 2 lines follow"),
        ("1\n0 1 1\n0 1 1\n0 1 1\n", 1, "the count is 1, but 3 lines follow"),
        ("1\n0 1 1\n0 2 1\n", 3, "found the count 2 and 1 entities of relation 0"),
        ("1\n\n0\n0 1 1\n", 3, "found no count of relation 0"),
        ("1\n0 1 1\n0 1 5\n", 3, "entity 5 is out of range; accepted: 0 to 4"),
        ("1\n0 1 -1\n0 1 1\n", 2, "entity -1 is out of range; accepted: 0 to 4"),
        ("1\n3 1 1\n3 1 1\n", 2, "relation 3 is out of range; accepted: 0 to 2"),
        ("1\n0 1 Paris\n0 1 1\n", 2, "found 'Paris' as a number; accepted: an integer"),
        ("2\n0 1 1\n1 1 1\n0 1 1\n1 1 1\n", 3, "found relation 1; accepted: its two lines, heads and tails, together"),
        ("2\n0 1 1\n0 1 1\n0 1 1\n0 1 1\n", 4, "found relation 0; accepted: its two lines, heads and tails, together"),
    ],
)
def test_a_broken_form_is_one_error_with_its_line(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    path = tmp_path / "type_constrain.txt"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        TypeConstraints.read(path, 5, 3)
    assert str(caught.value).startswith(f"{path}{'' if line is None else f':{line}'}: {message}")


class Numbers:
    """Every entity scores its own id, whatever is asked."""

    reduction = "dot"

    def query(self, entity: torch.Tensor, relation: torch.Tensor, side: str) -> tuple[torch.Tensor, None]:
        return torch.ones(len(entity), 1), None

    def entities(self, side: str) -> torch.Tensor:
        return torch.arange(10.0).unsqueeze(1)


def test_ranks_are_among_the_type_and_the_true_ones() -> None:
    train = [[0, 0, 5], [1, 0, 7], [2, 0, 9], [3, 1, 4]]
    kg = KnowledgeGraph(
        "g", train, [], [[1, 0, 5], [0, 0, 6], [0, 2, 1]], [f"e{i}" for i in range(10)], ["a", "b", "c"]
    )
    types = TypeConstraints.of(kg.train, 10, 3)
    assert types.members(0, "tail").tolist() == [5, 7, 9]
    found = evaluate(Numbers(), kg, candidates=types)
    assert dict(found) == dict(evaluate(Numbers(), kg, candidates="types"))
    # Tails of the first: 5 among 5, 6, 9 (7 is known); of the second 6 among 6, 7, 9; of relation c, which train lacks,
    # 1 among all ten.
    assert (1 + found.tail.greater).tolist() == [3, 3, 9]
    assert found.tail.candidates.tolist() == [3, 3, 10]
    # Heads of the first: 1 among 1 and 2; the second's 0 among 0, 1, 2.
    assert (1 + found.head.greater).tolist() == [2, 3, 10]
    with pytest.raises(InputError, match="candidates: got 'type'; accepted: types"):
        evaluate(Numbers(), kg, candidates="type")  # type: ignore[arg-type]
