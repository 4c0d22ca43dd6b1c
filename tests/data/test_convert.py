from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import ALL, ENTITIES, freebase, libkge, mapping, rotate, write

from dhns_fast.data import CSRFilter, KnowledgeGraph, convert, load, synthetic
from dhns_fast.data.names import MappedNames
from dhns_fast.data.readers.mapped import FILE
from dhns_fast.errors import DataError, InputError


def same(a: KnowledgeGraph, b: KnowledgeGraph) -> None:
    assert a.fingerprint() == b.fingerprint()
    assert a.report == b.report
    assert list(a.entity_names) == list(b.entity_names)
    assert list(a.relation_names) == list(b.relation_names)


@pytest.mark.parametrize("layout", ALL)
def test_a_converted_graph_is_the_graph(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    layout(source)
    np.save(source / "text.npy", np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    kg, back = load(source), load(convert(source, tmp_path / "out"))
    same(kg, back)
    assert back.notes == kg.notes
    assert isinstance(back.entity_names, MappedNames)
    assert [back.entity_names.index(name) for name in kg.entity_names] == list(range(5))
    for name in ("", "Par", "Paris\n", "aris", "Paris\nRome"):
        assert name not in back.entity_names
    assert pickle.loads(pickle.dumps(back.entity_names)) == kg.entity_names


def test_what_is_mapped_takes_part_in_everything(tmp_path: Path) -> None:
    kg = synthetic(200, 4, 1500, {"text": 6, "image": 3}, seed=1)
    convert("synthetic:entities=200,relations=4,triples=1500,seed=1,text=6,image=3", tmp_path / "a")
    back = load(tmp_path / "a")
    same(kg, back)
    assert torch.equal(back.hold_out_validation(0.1, 0).valid, kg.hold_out_validation(0.1, 0).valid)
    for side in ("tail", "head"):
        packed = back.known().side(side).packed  # type: ignore[arg-type]
        assert torch.equal(packed, kg.known().side(side).packed)  # type: ignore[arg-type]
        assert packed.untyped_storage().nbytes() == 8 * len(packed)
    held_out = back.hold_out_validation(0.1, 0)
    assert len(held_out.known().tail.packed) == len(held_out.train)
    np.save(tmp_path / "a" / "filter" / "tail.npy", np.arange(4))
    with pytest.raises(
        DataError, match=r"filter: holds 4 tails and \d+ heads of \d+ triples; convert the graph again$"
    ):
        back.known()
    (tmp_path / "a" / "filter" / "tail.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"tail\.npy: cannot be read"):
        back.known()
    (tmp_path / "a" / "filter" / "tail.npy").unlink()
    with pytest.raises(DataError, match=r"tail\.npy: cannot be read"):
        back.known()
    known = CSRFilter.from_triples([back.train, back.valid], 200, 4)
    assert len(known.tail.ids) == len(kg.train) + len(kg.valid)
    assert load(tmp_path / "a", features=["image"]).features.keys() == {"image"}
    assert load(tmp_path / "a", features=[]).features == {}
    half = load(convert(tmp_path / "a", tmp_path / "half", half=True))
    assert half.features["text"].dtype == torch.float16
    assert torch.equal(half.features["text"], kg.features["text"].half())
    assert (tmp_path / "half" / "features" / "text.npy").stat().st_size == 128 + 200 * 6 * 2
    with pytest.raises(InputError, match=r"^target: got .*, which is not empty; accepted: a new folder$"):
        convert(tmp_path / "a", tmp_path / "half")


def test_triples_in_one_piece_are_split_as_they_are_when_read(tmp_path: Path) -> None:
    write(tmp_path / "kg.tsv", "".join(f"e{i % 9}\tr\te{(i * 5 + 1) % 9}\n" for i in range(60)))
    same(load(tmp_path / "kg.tsv"), load(convert(tmp_path / "kg.tsv", tmp_path / "out")))
    same(load(tmp_path / "kg.tsv", seed=3), load(convert(tmp_path / "kg.tsv", tmp_path / "other", seed=3)))


@pytest.mark.parametrize("layout", [freebase, libkge])
def test_names_out_of_order_and_repeated(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    file, row = ("entity2id.txt", "{name}\t{id}\n") if layout is freebase else ("entity_ids.del", "{id}\t{name}\n")
    lines = mapping(ENTITIES, row).splitlines(keepends=True)
    write(tmp_path / file, ("5\n" if layout is freebase else "") + "".join(lines[::-1]))
    same(load(tmp_path), load(convert(tmp_path, tmp_path / "out")))
    write(tmp_path / file, ("5\n" if layout is freebase else "") + mapping([*ENTITIES[:4], "Paris"], row))
    with pytest.raises(DataError, match=rf"{file}: found 'Paris' at 0 and again at 4; accepted: distinct names$"):
        convert(tmp_path, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train.npy").unlink(), r"train\.npy: cannot be read: No such file or directory"),
        (
            lambda f: np.save(f / "train.npy", np.zeros((4, 3), np.int32)),
            r"train\.npy: is \[4, 3\] int32; accepted: \[4, 3\] int64",
        ),
        (
            lambda f: np.save(f / "train.npy", np.full((4, 3), 9)),
            r"^train: got row 0 \(head, relation, tail\) = \(9, 9, 9\)",
        ),
        (lambda f: (f / "entities.names").write_bytes(b"Paris\n"), r"entities\.names: has 6 bytes, its index says"),
        (lambda f: (f / "entities.names").write_bytes(b""), r"entities\.names: "),
        (
            lambda f: np.save(f / "relations.begins.npy", np.array([0])),
            r"relations\.begins\.npy: is \[1\] int64; accepted: \[3\] int64",
        ),
        (lambda f: (f / FILE).write_text("{"), r"graph\.json: is no JSON"),
        (lambda f: (f / FILE).write_text("[" * 100_000), r"graph\.json: is no JSON"),
        (lambda f: (f / FILE).write_text("{}"), r"graph\.json: is not of the format"),
        (lambda f: _edit(f, version=2), r"graph\.json: has version 2; accepted: 1; convert the graph again"),
        (lambda f: _edit(f, entities="5"), r"graph\.json: lacks sizes"),
        (lambda f: _edit(f, splits=[]), r"graph\.json: lacks sizes"),
        (lambda f: _edit(f, features={"../x": [2, "float32"]}), r"graph\.json: lacks sizes"),
        (lambda f: _edit(f, report={}), r"graph\.json: lacks the report"),
        (lambda f: _edit(f, features={"text": [2, "float32"]}), r"features/text\.npy: cannot be read: No such file"),
    ],
)
def test_a_damaged_conversion_is_one_error(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    (tmp_path / "s").mkdir()
    rotate(tmp_path / "s")
    folder = convert(tmp_path / "s", tmp_path / "c")
    damage(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("content", [b"Par\xffs\n", b"Pa\nis\n", b"Parisx"])
def test_damaged_names_are_an_error_where_they_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").mkdir()
    rotate(tmp_path / "s")
    folder = convert(tmp_path / "s", tmp_path / "c")
    path = folder / "entities.names"
    path.write_bytes(content + path.read_bytes()[6:])
    names = load(folder).entity_names
    for act in (lambda: names[0], lambda: list(names)):
        with pytest.raises(DataError, match=r"entities\.names: is damaged: its lines are not those of its index"):
            act()


def _edit(folder: Path, **changed: object) -> None:
    (folder / FILE).write_text(json.dumps({**json.loads((folder / FILE).read_text()), **changed}))


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return open, ("trap", "w")


@pytest.mark.parametrize("name", ["m.pkl", "m.pickle", "m.pt", "m.npy", "m.npz"])
def test_pickles_are_opened_where_it_is_asked_for(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = {name: np.full(3, i + 1.0) for i, name in enumerate(ENTITIES)}

    def save(content: object) -> None:
        if name == "m.pt":
            torch.save(content, name)
        elif name in ("m.npy", "m.npz"):
            np.save(name, content, allow_pickle=True) if name == "m.npy" else np.savez(name, **content)  # type: ignore[call-overload]
        else:
            Path(name).write_bytes(pickle.dumps(content))

    save({**vectors, "trap": Trap()})
    rotate(tmp_path)
    kg = load(tmp_path)
    assert not (tmp_path / "trap").exists()
    assert (kg.features == {}) or name == "m.npz"
    with pytest.raises(
        InputError,
        match=r"^source: got 'm\.\w+', which may hold a pickle; accepted: --allow-pickle, for a file from someone",
    ):
        convert(name, "m.safetensors")
    save(vectors)
    with pytest.warns(UserWarning, match="is unpickled: whatever program its author put into it runs now"):
        convert(name, "text.safetensors", allow_pickle=True)
    Path(name).unlink()
    kg = load(tmp_path)
    assert kg.features["text"][:, 0].tolist() == [1, 2, 3, 4, 5]
    assert kg.notes == ()


@pytest.mark.filterwarnings("ignore:.*is unpickled")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", r"m\.pkl: cannot be unpickled: "),
        (pickle.dumps(["a"]), r"m\.pkl: found a list; accepted: a matrix of numbers, or a dict"),
    ],
)
def test_pickles_without_features(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "m.pkl", tmp_path / "m.safetensors", allow_pickle=True)
    with pytest.raises(InputError, match=r"^target: got .*; accepted: a file name that ends in \.safetensors$"):
        convert(tmp_path / "m.pkl", tmp_path / "m.npy", allow_pickle=True)
    assert not (tmp_path / "m.safetensors").exists()
