from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dhns_fast.data import KnowledgeGraph, load, synthetic, write
from dhns_fast.data.load import LAYOUTS
from dhns_fast.errors import DataError, InputError

TRAIN = "Rome\tcapital of\tItaly\nOslo\tcapital of\tNorway\nItaly\tnear\tFrance\n"


def folder(tmp_path: Path, suffix: str = ".tsv", **files: str | bytes | None) -> Path:
    splits = {"train": TRAIN, "valid": "Oslo\tnear\tRome\n", "test": "Nice\tnear\tItaly\n"}
    for stem, text in {**splits, **files}.items():
        if text is not None:
            (tmp_path / (stem if "." in stem else stem + suffix)).write_bytes(
                text if isinstance(text, bytes) else text.encode()
            )
    return tmp_path


@pytest.mark.parametrize("suffix", [".tsv", ".txt"])
def test_without_maps_ids_follow_first_appearance(tmp_path: Path, suffix: str) -> None:
    kg = load(folder(tmp_path, suffix))
    assert kg.entity_names == ["Rome", "Italy", "Oslo", "Norway", "France", "Nice"]
    assert kg.relation_names == ["capital of", "near"]
    assert kg.train.tolist() == [[0, 0, 1], [2, 0, 3], [1, 1, 4]]
    assert kg.valid.tolist() == [[2, 1, 0]]
    assert kg.test.tolist() == [[5, 1, 1]]


def test_maps_decide_the_ids_and_may_name_more(tmp_path: Path) -> None:
    maps = {
        "entities.dict": "1\tRome\n0\tItaly\n3\tOslo\n2\tNorway\n4\tFrance\n6\tNice\n5\tMars\n",
        "relations.tsv": "1\tcapital of\n0\tnear\n",
    }
    kg = load(folder(tmp_path, **maps))
    assert kg.entity_names == ["Italy", "Rome", "Norway", "Oslo", "France", "Mars", "Nice"]
    assert kg.train.tolist() == [[1, 1, 0], [3, 1, 2], [0, 0, 4]]
    assert kg.test.tolist() == [[6, 0, 0]]


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    broken_up = b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n\r\n").encode() + b"\n\n"
    kg = load(folder(tmp_path, train=broken_up, valid="\n"))
    assert kg.train.tolist() == [[0, 0, 1], [2, 0, 3], [1, 1, 4]]
    assert len(kg.valid) == 0
    assert "\x85" not in "".join(kg.entity_names)


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    kg = load(folder(tmp_path, train="a\x85b\tr\u2028\tc \n"))
    assert kg.entity_names[:2] == ["a\x85b", "c "]
    assert kg.relation_names[0] == "r\u2028"


MAP = {"entities.tsv": "0\tRome\n1\tItaly\n2\tOslo\n3\tNorway\n4\tFrance\n"}


@pytest.mark.parametrize(
    ("files", "at", "message"),
    [
        (
            {"train": TRAIN + "Rome\tItaly\n"},
            "train.tsv:4",
            r"found 2 columns, 'Rome\tItaly'; accepted: three names, `head<TAB>relation<TAB>tail`",
        ),
        (
            {"train": "a\tb\n\tc\td\te\n"},
            "train.tsv:1",
            r"found 2 columns, 'a\tb'; accepted: three names, `head<TAB>relation<TAB>tail`",
        ),
        (
            {"valid": "Rome\t\tItaly\n"},
            "valid.tsv:1",
            r"found an empty name, 'Rome\t\tItaly'; accepted: three names, `head<TAB>relation<TAB>tail`",
        ),
        (
            {"valid": ""},
            "valid.tsv",
            "is empty (0 bytes); an empty list is written as a line without content, or as the count 0",
        ),
        ({"test": b"Rome\tnear\tItaly\n\x00\xc3\x28\n"}, "test.tsv:2", "found the byte 0xc3; accepted: text in UTF-8"),
        (MAP, "test.tsv:1", "entity 'Nice' is not in the id map; accepted: its 5 names"),
        (
            {"relations.dict": "0\tnear\n"},
            "train.tsv:1",
            "relation 'capital of' is not in the id map; accepted: its 1 names",
        ),
        ({"entities.tsv": "0\tRome\n0\tItaly\n"}, "entities.tsv:2", "id 0 is also on line 1; accepted: each once"),
        (
            {"entities.tsv": "0\tRome\n1\tRome\n"},
            "entities.tsv:2",
            "name 'Rome' is also on line 1; accepted: each once",
        ),
        (
            {"entities.tsv": "0\tRome\n2\tItaly\n"},
            "entities.tsv:2",
            "found id 2; accepted: 0 to 1, one for each of the 2 lines",
        ),
        (
            {"entities.tsv": "0\tRome\n1\t\n"},
            "entities.tsv:2",
            "found an empty name for id 1; accepted: a name of at least one character",
        ),
        ({"entities.tsv": "Rome\tx\n"}, "entities.tsv:1", "found 'Rome' as the id of entities; accepted: an integer"),
        (
            {"train": TRAIN + " \t \t \n"},
            "train.tsv:4",
            "found an empty name, ' \\t \\t '; accepted: three names, `head<TAB>relation<TAB>tail`",
        ),
        (
            {"train": TRAIN + "\t\t\n"},
            "train.tsv:4",
            "found an empty name, '\\t\\t'; accepted: three names, `head<TAB>relation<TAB>tail`",
        ),
        ({"entities.tsv": "0 Rome\n"}, "entities.tsv:1", "found '0 Rome'; accepted: two columns, `id<TAB>name`"),
        ({"entities.tsv": "\n"}, "entities.tsv", "holds no entities; accepted: at least one"),
        ({"train.txt": TRAIN}, "", "found train.tsv and train.txt; accepted: one of them"),
    ],
)
def test_a_broken_file_is_one_error_with_its_line(
    tmp_path: Path, files: dict[str, str | bytes | None], at: str, message: str
) -> None:
    folder(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path}{'/' if at else ''}{at}: {message}"


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    looked_for = "; ".join(layout.LOOKS_FOR for layout in LAYOUTS)
    assert str(caught.value) == f"{tmp_path}: holds no data set; found no files; looked for {looked_for}"
    assert all(word in looked_for for word in ("train2id.txt", ".tsv", ".csv", ".gz", ".inter", "train.del"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file:1: found 1 columns, 'x'; accepted: three names"):
        load(tmp_path / "file")


def test_an_unknown_name_lists_the_embedded_ones() -> None:
    message = r"^data: got 'nowhere', which does not exist; accepted: a folder, a file of triples, synthetic:…, or one of atlas$"
    with pytest.raises(InputError, match=message):
        load("nowhere")


def same(a: KnowledgeGraph, b: KnowledgeGraph) -> None:
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(a, split), getattr(b, split))
    assert (a.entity_names, a.relation_names, a.report) == (b.entity_names, b.relation_names, b.report)
    for field in ("features", "present"):
        left, right = getattr(a, field), getattr(b, field)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_write_and_load_give_the_same_graph(tmp_path: Path) -> None:
    kg = synthetic(200, 5, 900, {"text": 7, "image": 3}, seed=3)
    names = ["ünïcode \x85 name ", *kg.entity_names[1:]]
    kg = KnowledgeGraph(
        "graph", kg.train, kg.valid[:0], kg.test, names, kg.relation_names, kg.features, {"text": ~kg.present["text"]}
    )
    assert write(kg, tmp_path / "deep" / "graph") == tmp_path / "deep" / "graph"
    same(load(tmp_path / "deep" / "graph"), kg)
    assert load(tmp_path / "deep" / "graph").name == "graph"
    write(kg, tmp_path / "deep" / "graph")
    found = sorted(path.name for path in (tmp_path / "deep" / "graph").iterdir())
    assert found == [
        "entities.tsv",
        "image.safetensors",
        "relations.tsv",
        "test.tsv",
        "text.safetensors",
        "train.tsv",
        "valid.tsv",
    ]


@pytest.mark.parametrize(
    ("entities", "relations", "features", "message"),
    [
        (
            ["a", "b\tc"],
            ["r"],
            {},
            r"^entity_names: got 'b\\tc' at 1; accepted: names that are not blank, without tabs, line breaks and a byte "
            r"order mark \(U\+FEFF\) in front$",
        ),
        (["a", "b"], [" "], {}, r"^relation_names: got ' ' at 0; accepted: names"),
        (
            ["a", "b"],
            ["r"],
            {"x/y": torch.ones(2, 1)},
            r"^features: got 'x/y'; accepted: modalities that are also file names$",
        ),
    ],
)
def test_write_refuses_what_it_could_not_read_back(
    tmp_path: Path, entities: list[str], relations: list[str], features: dict[str, torch.Tensor], message: str
) -> None:
    triples = torch.tensor([[0, 0, 1]])
    with pytest.raises(InputError, match=message):
        write(KnowledgeGraph("g", triples, triples, triples, entities, relations, features), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kg = synthetic(50, 2, 100, {"text": 2})
    write(kg, tmp_path)
    before = (tmp_path / "text.safetensors").read_bytes()

    def broken(descriptor: int) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write(synthetic(50, 2, 100, {"text": 3}), tmp_path)
    assert (tmp_path / "text.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
