"""Damaged files: a reader gives what the file says, or one DataError; it never hangs, never runs anything, never
invents.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import layouts
from fuzzing import damaged, only_refused

from dhns_fast.data import KnowledgeGraph, convert, load
from dhns_fast.train.config import TrainConfig

E = len(layouts.ENTITIES)


def sound(kg: KnowledgeGraph | None) -> None:
    """What every graph must be that a reader lets through."""
    if kg is None:
        return
    for names in (kg.entity_names, kg.relation_names):
        listed = list(names)
        assert len(set(listed)) == len(listed) > 0
        assert all(isinstance(name, str) and name.strip() for name in listed)
    for split in ("train", "valid", "test"):
        triples = getattr(kg, split)
        assert triples.shape == (len(triples), 3)
        if len(triples):
            assert triples.min() >= 0
            assert triples[:, [0, 2]].max() < kg.num_entities
            assert triples[:, 1].max() < kg.num_relations
    for modality, matrix in kg.features.items():
        assert matrix.shape[0] == kg.num_entities
        assert matrix.shape[1] > 0
        assert matrix[kg.present[modality]].isfinite().all()
    kg.report.lines()


def _made(place: Path, layout: Callable[[Path], None]) -> Path:
    folder = place / layout.__name__
    if not folder.exists():
        folder.mkdir()
        layout(folder)
    return folder


@pytest.mark.parametrize("layout", layouts.ALL)
@given(data=st.data())
def test_damaged_text(place: Path, layout: Callable[[Path], None], data: st.DataObject) -> None:
    folder = _made(place, layout)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    original = path.read_bytes()
    path.write_bytes(data.draw(damaged(original), label="content"))
    try:
        sound(only_refused(lambda: load(folder)))
    finally:
        path.write_bytes(original)


def _bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


ROWS = torch.arange(1.0, 1 + 3 * E).reshape(E, 3)
VECTORS = {name: ROWS[i].clone() for i, name in enumerate(layouts.ENTITIES)}
FEATURES = {
    "float.npy": _bytes(lambda f: np.save(f, ROWS.numpy())),
    "big.npy": _bytes(lambda f: np.save(f, ROWS.numpy().astype(">f8"))),
    "plain.npz": _bytes(lambda f: np.savez(f, features=ROWS.numpy(), present=np.ones(E, bool))),
    "packed.npz": _bytes(lambda f: np.savez_compressed(f, features=ROWS.numpy(), names=np.array(layouts.ENTITIES))),
    "zip.pth": _bytes(lambda f: torch.save(ROWS, f)),
    "old.pth": _bytes(lambda f: torch.save(ROWS, f, _use_new_zipfile_serialization=False)),
    "dict.pt": _bytes(lambda f: torch.save(VECTORS, f)),
    "numpy.pt": _bytes(lambda f: torch.save({"features": ROWS.numpy()}, f)),
    "one.safetensors": save({"features": ROWS, "present": torch.ones(E, dtype=torch.bool)}),
    "names.safetensors": save(VECTORS),
}


@pytest.mark.parametrize("name", FEATURES)
@given(data=st.data())
def test_damaged_features(place: Path, name: str, data: st.DataObject) -> None:
    folder = place / f"features-{name}"
    if not folder.exists():
        folder.mkdir()
        layouts.rotate(folder)
    (folder / name).write_bytes(data.draw(damaged(FEATURES[name]), label="content"))
    sound(only_refused(lambda: load(folder)))


@given(data=st.data())
def test_damaged_conversion(place: Path, data: st.DataObject) -> None:
    source, folder = _made(place, layouts.openke), place / "converted"
    if not folder.exists():
        np.save(source / "m.npy", ROWS.numpy())
        convert(source, folder)
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())), label="file")
    original = path.read_bytes()
    content = data.draw(damaged(original), label="content")
    # Another file takes the name: what is mapped must not change under a reader.
    path.unlink()
    path.write_bytes(content)
    try:
        kg = only_refused(lambda: load(folder))
        if kg is not None:
            for names in (kg.entity_names, kg.relation_names):
                listed = only_refused(lambda names=names: list(names))  # type: ignore[misc]
                assert listed is None or len(listed) == len(names)
            for x in (kg.train, kg.valid, kg.test):
                assert not len(x) or (int(x.min()) >= 0 and int(x[:, [0, 2]].max()) < kg.num_entities)
    finally:
        path.unlink()
        path.write_bytes(original)


TABLES = {
    "kg_NumericalTriples.txt": 'Paris\tpopulation\t1.5\nRome\theight\t"3"\nOslo\tpopulation\t2e3\n',
    "ml.inter": "user_id:token\titem_id:token\trating:float\n" + "".join(f"{u}\t{u % 3}\t1\n" for u in range(12)),
    "ml.kg": "head_id:token\trelation_id:token\ttail_id:token\n1\tis\tx\n",
    "ml.link": "item_id:token\tentity_id:token\n1\tx\n2\ty\n",
}


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_damaged_tables(place: Path, name: str, data: st.DataObject) -> None:
    folder = place / f"table-{name}"
    if not folder.exists():
        folder.mkdir()
        if name.startswith("kg"):
            layouts.rotate(folder)
        else:
            for other, text in TABLES.items():
                if other.startswith("ml"):
                    layouts.write(folder / other, text)
    (folder / name).write_bytes(data.draw(damaged(TABLES[name].encode()), label="content"))
    sound(only_refused(lambda: load(folder)))


OPTIONS = b"""data: atlas
model: rotate
dim: 32
learning_rate: 1e-3
levels: [0, 5, 6]
level_weights: [1.0, 0.5, 0.25]
margin: null
filtered: true
"""


@given(data=st.data())
def test_damaged_options(place: Path, data: st.DataObject) -> None:
    path = place / "options.yaml"
    path.write_bytes(data.draw(damaged(OPTIONS), label="content"))
    only_refused(lambda: TrainConfig.load(path))


@given(
    name=st.text(max_size=40)
    | st.from_regex(r"\A(entities|relations|triples|seed|text)=[0-9]{1,3}(,[a-z]+=[0-9.e+-]{1,4}){0,4}\Z")
)
def test_names_of_synthetic_graphs(name: str) -> None:
    only_refused(lambda: load(f"synthetic:{name}"))
