from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dhns_fast.data import load
from dhns_fast.errors import DataError

GOOD = {
    "entity2id.txt": "3\nParis\t0\nNew York City 2\nRome 1\n\n\n",
    "relation2id.txt": "2\r\nlocated in\t0\r\nnear\t1\r\n",
    "train2id.txt": "3\n0 1 0\n1 2 1\n2\t0   1\n\n",
    "valid2id.txt": "1\n0 2 1\n",
    "test2id.txt": "0\n",
    "type_constrain.txt": "not read\n",
}


def folder(tmp_path: Path, **changed: str | bytes | None) -> Path:
    for name, text in {**GOOD, **{f"{stem}2id.txt": text for stem, text in changed.items()}}.items():
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def test_reads_names_with_spaces_and_turns_columns(tmp_path: Path) -> None:
    kg = load(folder(tmp_path))
    assert kg.name == tmp_path.name
    assert kg.entity_names == ["Paris", "Rome", "New York City"]
    assert kg.relation_names == ["located in", "near"]
    assert kg.train.dtype == torch.int64
    assert kg.train.tolist() == [[0, 0, 1], [1, 1, 2], [2, 1, 0]]
    assert kg.valid.tolist() == [[0, 1, 2]]
    assert kg.test.shape == (0, 3)


def test_blank_lines_between_triples_are_skipped(tmp_path: Path) -> None:
    assert load(folder(tmp_path, train="2\n\n0 1 0\n  \n1 2 1\n")).train.tolist() == [[0, 0, 1], [1, 1, 2]]


TRIPLES = "accepted: the number of triples alone on the first line, then lines `head tail relation`"


@pytest.mark.parametrize(
    ("stem", "text", "line", "message"),
    [
        ("train", "0 1 0\n1 2 1\n", 1, f"the count is missing: found '0 1 0'; {TRIPLES}"),
        ("train", "4\n0 1 0\n1 2 1\n", 1, f"the count is 4, but 2 lines follow; {TRIPLES}"),
        ("train", "1\n0 1 0\n1 2 1\n", 1, f"the count is 1, but 2 lines follow; {TRIPLES}"),
        ("train", "two\n0 1 0\n1 2 1\n", 1, "found 'two' as the count; accepted: an integer"),
        ("train", "2\n0 1 0\n1 3 1\n", 3, "tail 3 is out of range; accepted: 0 to 2"),
        ("train", "2\n0 1 0\n-1 2 1\n", 3, "head -1 is out of range; accepted: 0 to 2"),
        ("train", "2\n\n0 1 2\n1 2 1\n", 3, "relation 2 is out of range; accepted: 0 to 1"),
        ("train", "1\n99999999999999999999 1 0\n", 2, "head 99999999999999999999 is out of range; accepted: 0 to 2"),
        ("valid", "2\n0 1 0\n1 2\n", 3, "found 2 columns, '1 2'; accepted: three ids, `head tail relation`"),
        ("valid", "2\n0 1 0 0\n1 2\n", 2, "found 4 columns, '0 1 0 0'; accepted: three ids, `head tail relation`"),
        ("valid", "2\n0 1 0\n1 2 1.0\n", 3, "found '1.0' as the relation; accepted: an integer"),
        ("valid", "1\n0 1_0 0\n", 2, "found '1_0' as the tail; accepted: an integer"),
        ("test", "", None, "is empty (0 bytes); an empty list is written as a line without content, or as the count 0"),
        ("test", "\n\n", 1, f"found blank lines only; {TRIPLES}"),
        ("test", b"1\n0 1 \xff\n", 2, "found the byte 0xff; accepted: text in UTF-8"),
        ("test", None, None, "cannot be read: No such file or directory"),
        ("entity", None, None, "cannot be read: No such file or directory"),
        ("entity", "3\nParis 0\nRome 1\nNice 1\n", 4, "id 1 is also on line 3; accepted: each once"),
        ("entity", "3\nParis 0\nRome 1\nParis 2\n", 4, "name 'Paris' is also on line 2; accepted: each once"),
        ("entity", "3\nParis 0\nRome 3\nNice 1\n", 3, "found id 3; accepted: 0 to 2, one for each of the 3 lines"),
        (
            "entity",
            "3\nParis 0\nRome\nNice 1\n",
            3,
            "found 'Rome'; accepted: a name and its id, separated by spaces or a tab",
        ),
        ("entity", "3\nParis 0\nRome x\nNice 1\n", 3, "found 'x' as the id of entity; accepted: an integer"),
        (
            "relation",
            "3\nnear 0\nin 1\n",
            1,
            "the count is 3, but 2 lines follow; accepted: the number of names of a relation alone on the first line, then lines `name id`",
        ),
        ("relation", "0\n", None, "holds no relation; accepted: at least one"),
    ],
)
def test_a_broken_file_is_one_error_with_its_line(
    tmp_path: Path, stem: str, text: str | bytes | None, line: int | None, message: str
) -> None:
    path = folder(tmp_path, **{stem: text}) / f"{stem}2id.txt"
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{path}{'' if line is None else f':{line}'}: {message}"
    assert caught.value.line == line


def test_train_must_hold_a_triple(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r": train holds no triples; accepted: at least one$"):
        load(folder(tmp_path, train="0\n"))
