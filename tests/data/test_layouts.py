from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import (
    ALL,
    BLANKLESS,
    ENTITIES,
    IDS,
    PLAIN,
    RELATIONS,
    TRIPLES,
    libkge,
    mapping,
    mkgformer,
    named,
    openke,
    tsv,
    wikidata5m,
    wikikg2,
    write,
)

from dhns_fast.data import KnowledgeGraph, load
from dhns_fast.errors import DataError, InputError

Layout = Callable[[Path], None]


def triples(kg: KnowledgeGraph, split: str) -> list[tuple[str, str, str]]:
    return [(kg.entity_names[h], kg.relation_names[r], kg.entity_names[t]) for h, r, t in getattr(kg, split).tolist()]


def truth(split: str, layout: Layout | None = None) -> list[tuple[str, str, str]]:
    entities, relations = PLAIN if layout in BLANKLESS else (ENTITIES, RELATIONS)
    return [(entities[h], relations[r], entities[t]) for h, r, t in TRIPLES[split]]


# Blocks of a few bytes, of a line and a half, and of more than the whole.
@pytest.mark.parametrize("block", [3, 17, 1 << 22])
@pytest.mark.parametrize("layout", ALL)
def test_every_layout_gives_the_same_graph(
    tmp_path: Path, layout: Layout, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhns_fast.data.readers.lines.BLOCK", block)
    layout(tmp_path)
    kg = load(tmp_path)
    for split in TRIPLES:
        assert triples(kg, split) == truth(split, layout)
        assert getattr(kg, split).dtype == torch.int64
    if layout in IDS:
        assert kg.entity_names == (PLAIN[0] if layout in BLANKLESS else ENTITIES)
        assert [getattr(kg, split).tolist() for split in TRIPLES] == [
            [list(x) for x in split] for split in TRIPLES.values()
        ]


def test_what_was_not_read_is_named(tmp_path: Path) -> None:
    tsv(tmp_path)
    for name in ("notes.csv", "vectors.PKL", "image.pickle", "x.h5.bak", "README.md", ".hidden", "type_constrain.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert load(tmp_path).notes == (
        "Beside the data, not read: notes.csv, x.h5.bak.",
        "Pickles are not opened: image.pickle, vectors.PKL; `dhns-fast convert --allow-pickle FILE` makes safetensors of one that you trust.",
    )
    mkgformer(tmp_path / "m")
    assert load(tmp_path / "m").notes == ("Beside the data, not read: entity2text.txt.",)


def test_headers_are_no_triples_and_words_of_a_graph_are_no_headers(tmp_path: Path) -> None:
    for lines, first, count in (
        ("head\trelation\ttail\na\tr\tb\n", ("a", "r", "b"), 1),
        ("Subject\tPredicate\tObject\n\na\tr\tb\n", ("a", "r", "b"), 1),
        ("head_id:token\trelation_id:token\ttail_id:token\na\tr\tb\n", ("a", "r", "b"), 1),
        ("h\tr\tt\na\tq\tb\n", ("a", "q", "b"), 1),
        # The relation, or an entity, occurs again.
        ("h\tr\tt\na\tr\tb\n", ("h", "r", "t"), 2),
        ("s\tp\to\no\tq\ts\n", ("s", "p", "o"), 2),
        ("h\tr\tt\n", ("h", "r", "t"), 1),
        ("head\tof\tstate\na\tr\tb\n", ("head", "of", "state"), 2),
    ):
        write(tmp_path / "train.tsv", lines)
        write(tmp_path / "valid.tsv", "\n")
        write(tmp_path / "test.tsv", "\n")
        kg = load(tmp_path)
        assert (triples(kg, "train")[0], len(kg.train)) == (first, count)
        assert any("is a header and no triple" in note for note in kg.notes) == (first[0] == "a")
    # A header of the test file alone, with words that train has not.
    write(tmp_path / "test.tsv", "source\tlabel\ttarget\nb\tr\ta\n")
    assert load(tmp_path).test.shape == (1, 3)
    write(tmp_path / "entities.dict", "0\thead\n1\tof\n2\tstate\n3\ta\n4\tb\n5\tsource\n6\ttarget\n")
    write(tmp_path / "relations.dict", "0\tof\n1\tr\n2\tlabel\n")
    assert len(load(tmp_path).test) == 2


@pytest.mark.parametrize(
    "name",
    ["kg.tsv", "triples.csv", "all.txt.gz", "DB15K_EntityTriples.txt", "wikidata5m_all_triplet.txt", "facts", "kg.nt"],
)
def test_a_graph_in_one_file_is_split_by_a_seed(tmp_path: Path, name: str) -> None:
    rows = [(f"e{i}", f"r{i % 3}", f"e{(i * 7 + 1) % 40}") for i in range(40)] * 2
    rows += [(f"e{i}", f"r{i % 2}", f"e{(i * 3 + 2) % 40}") for i in range(40)]
    blanks = "Entity" in name or ".nt" in name
    separator = "," if ".csv" in name else " " if blanks else "\t"
    end = " .\n" if blanks else "\n"
    write(tmp_path / name, "".join(separator.join(row) + end for row in rows))
    kg = load(tmp_path)
    assert kg.report.unseen_entity == {"valid": 0, "test": 0}
    assert len(kg.valid)
    assert len(kg.test)
    assert kg.notes[0].startswith("The triples came in one piece: ")
    assert sorted(set(triples(kg, "train") + triples(kg, "valid") + triples(kg, "test"))) == sorted(set(rows))
    for again in (load(tmp_path), load(tmp_path / name)):
        assert torch.equal(kg.test, again.test)
    assert not torch.equal(kg.test, load(tmp_path, seed=1).test)
    (tmp_path / "train-only").mkdir()
    (tmp_path / name).rename(tmp_path / "train-only" / f"train{''.join(Path(name).suffixes).replace('.nt', '')}")
    assert torch.equal(load(tmp_path / "train-only").test, kg.test)


def test_a_split_that_is_missing_is_empty_and_said(tmp_path: Path) -> None:
    tsv(tmp_path)
    (tmp_path / "valid.tsv").unlink()
    kg = load(tmp_path)
    assert len(kg.valid) == 0
    assert triples(kg, "test") == truth("test")
    assert kg.notes == ("valid: there is no such file, so it holds no triples.",)


@pytest.mark.parametrize("name", ["entity_ids.del", "relation_ids.del"])
def test_a_map_of_ids_that_is_missing_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    libkge(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing; it names the ids"):
        load(tmp_path)


def test_names_are_the_same_whatever_the_layout(tmp_path: Path) -> None:
    names = [" Paris", "Rome ", "a\x85b", "x\u2028y", "\u00a0z", '"q"', "#1"]
    write(tmp_path / "t" / "entities.tsv", mapping(names, "{id}\t{name}\n"))
    for split in TRIPLES:
        write(tmp_path / "t" / f"{split}.tsv", f"{names[0]}\tr\t{names[1]}\n")
    openke(tmp_path / "o")
    write(tmp_path / "o" / "entity2id.txt", f"{len(names)}\n" + mapping(names))
    libkge(tmp_path / "l")
    write(tmp_path / "l" / "entity_ids.del", mapping(names, "{id}\t{name}\n"))
    for folder in "tol":
        kg = load(tmp_path / folder)
        assert kg.entity_names == names
        assert "The names of 2 entities begin or end with a blank; they are kept as they are." in kg.notes


def _with(layout: Layout, name: str, content: str | bytes) -> Layout:
    def make(folder: Path) -> None:
        layout(folder)
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)

    return make


def test_names_that_ogb_lacks_are_said(tmp_path: Path) -> None:
    wikikg2(tmp_path)
    (tmp_path / "mapping" / "relidx2relid.csv.gz").unlink()
    assert (
        "mapping/relidx2relid.csv.gz: there is no such file, so each relation is called by its id."
        in load(tmp_path).notes
    )


def test_a_line_of_csv_is_shown_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "kg.csv").write_text("a;r;b\nb;c\n")
    with pytest.raises(
        DataError, match=r"kg\.csv:2: found 2 columns, 'b;c'; accepted: three names, `head;relation;tail`"
    ):
        load(tmp_path)


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("layout", "at", "message"),
    [
        (_with(tsv, "train.tsv.gz", b"no gzip"), "", "found train.tsv and train.tsv.gz; accepted: one of them"),
        (_with(tsv, "dev.tsv", named("valid")), "", "found dev.tsv and valid.tsv; accepted: one of them"),
        (_with(tsv, "train.tsv", named("train", " ") + "a\tb\tc\n"), "train.tsv:2", "found 5 columns"),
        (_with(tsv, "test.tsv", "Paris\tin\n"), "test.tsv:1", "found 2 columns, 'Paris\\tin'"),
        (_with(tsv, "test.tsv", "\u2003\tin\tRome\n"), "test.tsv:1", "found an empty name"),
        (
            _with(tsv, "test.tsv", "Paris\tin\tRome\n".encode("utf-16")),
            "test.tsv:1",
            "found the byte 0xff; accepted: text in UTF-8; this looks like UTF-16",
        ),
        (
            _with(tsv, "test.tsv", b"Paris\tin\tRome\n\n\xa0\n"),
            "test.tsv:3",
            "found the byte 0xa0; accepted: text in UTF-8",
        ),
        (
            _with(openke, "train2id.txt", b"2\n0 1 0\n1 2\x850\n"),
            "train2id.txt:3",
            "found the byte 0x85; accepted: text in UTF-8",
        ),
        (
            _with(openke, "train2id.txt", b"2\n0 1 0\n1\xa02 0\n"),
            "train2id.txt:3",
            "found the byte 0xa0; accepted: text in UTF-8",
        ),
        (
            _with(openke, "train2id.txt", f"1\n0 {HUGE} 0\n"),
            "train2id.txt:2",
            "found a number of 5000 digits as the tail; accepted: an integer of at most 18",
        ),
        (
            _with(openke, "train2id.txt", f"{HUGE}\n0 1 0\n"),
            "train2id.txt:1",
            "found a number of 5000 digits as the count",
        ),
        (
            _with(openke, "entity2id.txt", f"1\na {HUGE}\n"),
            "entity2id.txt:2",
            "found a number of 5000 digits as the id of entity",
        ),
        (
            _with(openke, "train2id.txt", "3\n0 0 1\n1 1 2\n2 0 3\n"),
            "train2id.txt:3",
            "relation 2 is out of range; accepted: 0 to 1; the order is head, tail, relation, and this file looks like head, relation, tail",
        ),
        (
            _with(libkge, "train.del", "0 5 0\n"),
            "train.del:1",
            "relation 5 is out of range; accepted: 0 to 1; the order is head relation tail",
        ),
        (
            _with(libkge, "test.del", "0 1\n"),
            "test.del:1",
            "found 2 columns, '0 1'; accepted: three ids, `head relation tail`",
        ),
        (_with(mkgformer, "relations.txt", "in\nin\n"), "relations.txt:2", "name 'in' is also on line 1"),
        (
            _with(mkgformer, "train.tsv", "Paris\tRome\tin\n"),
            "train.tsv:1",
            "relation 'Rome' is not in the id map; accepted: its 2 names; this looks like head, tail, relation",
        ),
        (
            _with(wikidata5m, "other_train.txt", named("train")),
            "",
            "found other_train.txt and wikidata5m_transductive_train.txt; accepted: one graph a folder",
        ),
    ],
)
@pytest.mark.parametrize("block", [64, 1 << 22])
def test_a_broken_form_is_one_error_with_its_line(
    tmp_path: Path, layout: Layout, at: str, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhns_fast.data.readers.lines.BLOCK", block)
    layout(tmp_path)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}{'/' if at else ''}{at}: {message}")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz", "train.txt"])
def test_a_file_without_ends_of_lines_is_not_read_to_its_end(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhns_fast.data.readers.lines.BLOCK", 64)
    monkeypatch.setattr("dhns_fast.data.readers.lines.LONGEST", 1000)
    write(tmp_path / name, named("train") + "x" * 990 + "\ty\tz\n" + "\0" * 100_000)
    with pytest.raises(
        DataError, match=r"train\.\w+(\.gz)?:\d+: found a line of more than 1000 bytes; accepted: triples"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", r"train\.tsv\.gz: cannot be read as \.gz: Not a gzipped file"),
        (None, r"train\.tsv\.gz: cannot be read as \.gz: "),
        (b"", r"train\.tsv\.gz: is empty \(0 bytes\)"),
    ],
)
def test_broken_gzip(tmp_path: Path, content: bytes | None, message: str) -> None:
    write(tmp_path / "train.tsv.gz", named("train") * 100)
    path = tmp_path / "train.tsv.gz"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_text_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dhns_fast.data.readers.lines.ROOM", 1 << 16)
    write(tmp_path / "train.tsv.gz", "a\tr\tb\n" * 100_000)
    with pytest.raises(DataError, match=r"train\.tsv\.gz: unpacks to more than 200 times its \d+ bytes"):
        load(tmp_path)


def test_quoted_csv_holds_separators_and_line_breaks(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", '"Washington, D.C.", in ,"the ""States"""\nParis,in,"Fr\nance"\n')
    kg = load(tmp_path)
    assert kg.entity_names == ["Washington, D.C.", 'the "States"', "Paris", "Fr\nance"]
    write(tmp_path / "train.csv", 'a,b,c\n"x,y\n' * 3)
    with pytest.raises(DataError, match=r"train\.csv:\d+: (cannot be read as \.csv|found \d columns)"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["\read,relation,tail\na,r,b,c\n", "a,r,b\rc,r,d\n", '"' + "x" * 200_000 + '",r,b\n'])
def test_what_the_csv_module_refuses_is_one_error(tmp_path: Path, text: str) -> None:
    write(tmp_path / "train.csv", text)
    with pytest.raises(DataError, match=r"train\.csv:\d: (found \d columns|cannot be read as \.csv)"):
        load(tmp_path)


def test_paths_that_nobody_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in ("x" * 5000, f"{tmp_path}/{'y' * 300}", "a\0b", "", loop, "\udcff"):
        with pytest.raises(InputError) as caught:
            load(path)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
    for path in (None, 3, b"x", ["x"]):
        with pytest.raises(InputError, match=r"^data: got .*; accepted: a path, or a name$"):
            load(path)  # type: ignore[arg-type]

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r": cannot be read: Permission denied$"):
        load(tmp_path)


@pytest.mark.parametrize("first", ['"Washington, D.C."; "in"; US', "Washington, D.C.;in;US"])
def test_the_separator_of_csv_is_the_one_that_makes_three_columns(tmp_path: Path, first: str) -> None:
    """Whatever a name of the first line holds."""
    write(tmp_path / "train.csv", f"{first}\nParis;in;France\n")
    kg = load(tmp_path)
    assert list(kg.entity_names) == ["Washington, D.C.", "US", "Paris", "France"]
    write(tmp_path / "train.csv", "Washington, D.C., USA;in;US\nParis;in;France\nNice;in;France\n")
    assert list(load(tmp_path).entity_names) == ["Washington, D.C., USA", "US", "Paris", "France", "Nice"]
    write(tmp_path / "train.csv", "a;b,in,c\nd,in,e\n")
    assert list(load(tmp_path).entity_names) == ["a;b", "c", "d", "e"]
