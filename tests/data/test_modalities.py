"""Feature files as they lie about: by name, pooled, linked, odd types, far too large, and beside what is none."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import ENTITIES, mapping, named, openke, rotate, splits, tsv, write
from safetensors.torch import save_file

from dhns_fast.data import load
from dhns_fast.errors import DataError, InputError

needs_h5py = pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="needs h5py")
E = len(ENTITIES)
F4 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
HOLLOW = b"\x93NUMPY\1\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (5, 1000000000), }".ljust(127) + b"\n"
ROWS = torch.arange(1.0, 1 + 3 * E).reshape(E, 3)
VECTORS = dict(zip(ENTITIES, ROWS, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rotate(tmp_path)
    return tmp_path


def endless(x: torch.Tensor, width: int) -> torch.Tensor:
    return x[:, :1].expand(E, width)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("m.npy", lambda path: np.save(path, ROWS.numpy().astype(">f4"))),
        ("m.npy", lambda path: np.save(path, ROWS.numpy().astype(">f8"))),
        ("m.npy", lambda path: np.save(path, ROWS.numpy().astype(np.longdouble))),
        ("m.npy", lambda path: np.save(path, ROWS.numpy().astype(">i2"))),
        ("m.npy", lambda path: np.save(path, ROWS.numpy().astype(np.uint64))),
        ("m.npy", lambda path: np.save(path, np.asfortranarray(ROWS.numpy()))),
        ("M.NPY", lambda path: np.save(path.open("wb"), ROWS.numpy())),
        ("m.npz", lambda path: np.savez_compressed(path, x=ROWS.numpy().astype(">f2"), present=np.ones(E, bool))),
        ("m.pth", lambda path: torch.save(ROWS.T.contiguous().T, path)),
        ("m.pth", lambda path: torch.save(ROWS, path, _use_new_zipfile_serialization=False)),
        ("m.pt", lambda path: torch.save(ROWS.to(torch.float8_e4m3fn), path)),
        ("m.pt", lambda path: torch.save(ROWS.numpy(), path)),
        ("m.pt", lambda path: torch.save(torch.nn.Parameter(ROWS), path)),
        ("m.pt", lambda path: torch.save({"features": ROWS, "epoch": 3, "note": "x"}, path)),
        ("m.safetensors", lambda path: save_file({"m": ROWS.double()}, path)),
        ("m_features.pth", lambda path: torch.save(ROWS, path)),
        # By name: rows in another order, more names than entities.
        ("m.npz", lambda path: np.savez(path, features=ROWS.flip(0).numpy(), names=np.array(ENTITIES[::-1]))),
        ("m.npz", lambda path: np.savez(path, features=ROWS.flip(0).numpy(), ids=np.arange(E)[::-1])),
        ("m.pt", lambda path: torch.save({"features": ROWS.flip(0), "names": ENTITIES[::-1]}, path)),
        ("m.npz", lambda path: np.savez(path, **{name: x.numpy() for name, x in reversed(VECTORS.items())})),
        ("m.pt", lambda path: torch.save({**dict(reversed(VECTORS.items())), "Mars": torch.ones(3)}, path)),
        ("m.pt", lambda path: torch.save({name: x.numpy() for name, x in VECTORS.items()}, path)),
        ("m.pt", lambda path: torch.save({i: ROWS[i] for i in range(E)}, path)),
        ("m.pt", lambda path: torch.save({f"<{name}>": x for name, x in VECTORS.items()}, path)),
        ("m.safetensors", lambda path: save_file({name: x.clone() for name, x in VECTORS.items()}, path)),
        (
            "m_features_ent.pt",
            lambda path: torch.save({n: torch.stack([x - 1, x + 1, 0 * x]) for n, x in VECTORS.items()}, path),
        ),
        # Several vectors an entity.
        ("m.pt", lambda path: torch.save(torch.stack([ROWS - 1, 0 * ROWS, ROWS + 1], 1), path)),
    ],
)
def test_rows_are_the_entities(folder: Path, name: str, save: Callable[[Path], object]) -> None:
    save(folder / name)
    kg = load(folder)
    assert list(kg.features) == [name.split(".")[0] if name == "M.NPY" else "m"]
    (matrix,), (present,) = kg.features.values(), kg.present.values()
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, ROWS)
    assert present.all()


def test_missing_names_are_masked_and_unknown_ones_reported(folder: Path) -> None:
    some = {name: VECTORS[name] for name in ("Nice", "Rome", "Oslo")}
    torch.save({**some, "Oslo": torch.zeros(3), "Atlantis": torch.ones(3), "Utopia": torch.ones(3)}, folder / "text.pt")
    np.savez(folder / "image.npz", features=ROWS[:2].numpy(), names=np.array(["Nice", "Eden"]))
    kg = load(folder)
    assert kg.present["text"].tolist() == [False, True, False, False, True]
    assert kg.present["image"].tolist() == [False] * 4 + [True]
    assert torch.equal(kg.features["text"][[1, 4]], torch.stack([some["Rome"], some["Nice"]]))
    assert torch.equal(kg.features["image"][4], ROWS[0])
    assert not kg.features["image"][:4].any()
    assert kg.notes == (
        "image.npz: 1 of 2 names are no entities of the graph ('Eden').",
        "image.npz: 4 of 5 entities are not in it and are masked out.",
        "text.pt: 2 of 5 names are no entities of the graph ('Atlantis', 'Utopia').",
        "text.pt: 3 of 5 entities are not in it and are masked out.",
    )


def test_tiny_numbers_are_present_and_underflow(folder: Path) -> None:
    np.save(folder / "m.npy", np.where(np.arange(E)[:, None] == 1, 1e-300, np.eye(E)) * (np.arange(E) != 3)[:, None])
    kg = load(folder)
    assert kg.present["m"].tolist() == [True, True, True, False, True]
    assert not kg.features["m"][1].any()


@pytest.mark.parametrize(
    ("save", "what"),
    [
        (
            lambda p: torch.save(torch.nn.Linear(4, 2).state_dict(), p),
            "found weight [2, 4] float32, bias [2] float32, none of them named",
        ),
        (
            lambda p: torch.save({"entity.weight": ROWS, "relation.weight": ROWS[:2]}, p),
            "found entity.weight [5, 3] float32, relation.weight",
        ),
        (
            lambda p: torch.save({"epoch": 3, "model": {"w": ROWS}}, p),
            "found epoch [] int, model [] dict, none of them named",
        ),
        (
            lambda p: torch.save(torch.nn.Linear(4, 2), p),
            "holds pickled objects (torch.nn.modules.linear.Linear), which are not read",
        ),
        (
            lambda p: torch.save({"in": torch.ones(3), "near to": torch.ones(3)}, p),
            "has vectors of relations, which are not used",
        ),
    ],
)
def test_a_foreign_file_is_named_and_stops_nobody(folder: Path, save: Callable[[Path], object], what: str) -> None:
    save(folder / "model.pt")
    kg = load(folder)
    assert kg.features == {}
    assert kg.notes[0].startswith(f"Not read: model.pt {what}")
    # Who asks for it by name is told.
    for features in ("model", {"any": folder / "model.pt"}):
        with pytest.raises(DataError, match=r"model\.pt: (found|holds|has)"):
            load(folder, features=features)


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("m.pt", lambda p: torch.save(ROWS.to_sparse(), p), "found [5, 3] float32 (sparse_coo); accepted"),
        ("m.pt", lambda p: torch.save(ROWS.to_sparse_csr(), p), "found [5, 3] float32 (sparse_csr); accepted"),
        ("m.pt", lambda p: torch.save(torch.quantize_per_tensor(ROWS, 1.0, 0, torch.qint8), p), ""),
        ("m.pt", lambda p: torch.save(torch.empty(E, 3, device="meta"), p), "found [5, 3] float32 (meta); accepted"),
        ("m.pt", lambda p: torch.save(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), p), ""),
        ("m.pt", lambda p: torch.save(ROWS.to(torch.complex64), p), "found [5, 3] complex64; accepted"),
        ("m.pt", lambda p: torch.save(torch.ones(E, 4, dtype=torch.uint8).view(F4), p), ""),
        (
            "m.safetensors",
            lambda p: save_file({"x": torch.ones(E, 4, dtype=torch.uint8).view(F4)}, p),
            "found x [5, 8] F4; accepted",
        ),
        ("m.npy", lambda p: np.save(p, np.zeros((E, 2), "M8[s]")), "found [5, 2] datetime64[s]; accepted"),
        ("m.npy", lambda p: np.save(p, np.zeros(E, [("a", "f4")])), "found [5] [('a', '<f4')]; accepted"),
        ("m.npy", lambda p: np.save(p, np.zeros((E, 0))), "found 0 columns; accepted: 1 to"),
        ("m.npy", lambda p: np.save(p, np.zeros((E, 2, 0))), "found 0 columns; accepted: 1 to"),
        (
            "m.npy",
            lambda p: np.save(p, np.full((E, 2), 1e30)),
            "found 1e+30 in row 0, column 0; accepted: finite numbers up to 1e+15",
        ),
        (
            "m.npy",
            lambda p: np.save(p, np.array([[np.nan]] * E)),
            "found nan in row 0, column 0; accepted: finite numbers up to 1e+15 (a row that the bool array `present`",
        ),
        ("m.npz", lambda p: np.savez(p, features=ROWS, names=np.array(["a"] * E)), "4 of 5 names are repeated"),
        ("m.npz", lambda p: np.savez(p, features=ROWS, names=np.array(["a", "b"])), "has 5 rows and 2 names"),
        (
            "m.npz",
            lambda p: np.savez(p, features=ROWS, names=np.array([f"x{i}" for i in range(E)])),
            "none of its 5 names is an entity of the graph, as 'x0'",
        ),
        (
            "m.pt",
            lambda p: torch.save({"Paris": torch.ones(2), "Rome": torch.ones(3)}, p),
            "found vectors of 2 and 3 numbers",
        ),
        ("m.pt", lambda p: torch.save({"Paris": torch.tensor([torch.inf])}, p), "found inf in row 0, column 0"),
        ("m.pt", lambda p: p.write_bytes(b"PK\3\4 nothing"), "cannot be read as .pt: "),
        ("m.pth", lambda p: p.write_bytes(b"hello"), "cannot be read as .pth: damaged, or another kind of file"),
        (
            "m.pt",
            lambda p: (torch.save({"Paris": torch.ones(4000)}, p), p.write_bytes(p.read_bytes()[:9000])),
            "cannot be read as .pt: ",
        ),
        pytest.param("m.h5", lambda p: p.write_bytes(b"\x89HDF\r\n"), "cannot be read as .h5: ", marks=needs_h5py),
        ("m.npz", lambda p: p.write_bytes(b"PK\5\6" + b"\0" * 18), "found nothing; accepted"),
        (
            "m.npy",
            lambda p: p.write_bytes(HOLLOW),
            "cannot be read as .npy: [5, 1000000000] float32 takes 20000000000 bytes, 0 follow the header",
        ),
    ],
)
def test_a_broken_file_is_one_short_error(
    folder: Path, name: str, save: Callable[[Path], object], message: str
) -> None:
    try:
        save(folder / name)
    except Exception:
        if message:
            raise
        pytest.skip("this torch cannot write it")
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / name}: {message}")
    assert len(str(caught.value)) < len(str(folder)) + 330
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of address space")
@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        (
            "m.pth",
            lambda p: torch.save(endless(ROWS, 300_000_000), p),
            r"found 300000000 columns|is \[5, 300000000\] float32, 6 GB in a file of \d+ bytes",
        ),
        (
            "m.pth",
            lambda p: torch.save(ROWS[:1, :1].expand(900_000_000, 3), p),
            r"is \[900000000, 3\] float32, 10\.8 GB in a file of",
        ),
        (
            "m.pth",
            lambda p: torch.save({"Paris": ROWS[0, :1].expand(2_000_000_000)}, p),
            r"`Paris` is \[2000000000\] float32, 8 GB in a file of",
        ),
        (
            "m.npz",
            lambda p: np.savez_compressed(p, features=np.broadcast_to(np.float32(0), (E, 1_000_000))),
            r"is \[5, 1000000\] float32, 0\.02 GB in a file of",
        ),
        (
            "m.npz",
            lambda p: np.savez_compressed(p, features=np.broadcast_to(np.float16(0), (5_000_000, 1))),
            r"is \[5000000, 1\] float16, 0\.02 GB in a file of",
        ),
    ],
)
def test_sizes_are_judged_before_numbers_are_read(
    folder: Path, name: str, save: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhns_fast.data.readers.arrays.ROOM", 1 << 24)
    save(folder / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_features_of_the_literature_lie_beside_the_folder(tmp_path: Path) -> None:
    own = tmp_path / "benchmarks" / "DB15K"
    own.mkdir(parents=True)
    openke(own)
    (tmp_path / "embeddings").mkdir()
    torch.save(ROWS, tmp_path / "embeddings" / "DB15K-visual.pth")
    torch.save(ROWS + 1, tmp_path / "embeddings" / "DB15K-textual.pth")
    torch.save(ROWS[:1], tmp_path / "embeddings" / "MKG-W-visual.pth")
    torch.save(ROWS + 2, own / "img_features.pth")
    write(own / "DB15K_NumericalTriples.txt", "Paris\tpopulation\t100\nRome\tpopulation\t300\nNice\theight\t7\n")
    kg = load(own)
    assert sorted(kg.features) == ["img", "numeric", "textual", "visual"]
    assert torch.equal(kg.features["visual"], ROWS)
    assert torch.equal(kg.features["textual"], ROWS + 1)
    assert kg.features["numeric"].tolist() == [[-1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert kg.present["numeric"].tolist() == [True, True, False, False, True]
    assert kg.notes == ()
    assert list(load(own, features=["visual", "numeric"]).features) == ["visual", "numeric"]


def test_numbers_of_uris_and_broken_ones(tmp_path: Path) -> None:
    names = [f"<http://x/{name}>" for name in "abc"]
    write(tmp_path / "kg.tsv", f"{names[0]}\tr\t{names[1]}\n{names[1]}\tr\t{names[2]}\n{names[0]}\tr\t{names[2]}\n" * 3)
    path = tmp_path / "FB_NumericalTriples.txt"
    write(
        path,
        '<http://x/a> <http://p> "1.5"^^<http://double> .\nhttp://x/b <http://p> "3" .\n<http://x/zz> <http://p> 1 .\n',
    )
    kg = load(tmp_path)
    assert kg.features["numeric"].tolist() == [[-1, 1], [1, 1], [0, 0]]
    assert "FB_NumericalTriples.txt: 1 of 3 lines are about no entity of the graph." in kg.notes
    for text, message in (
        ("a\tp\n", r":1: found 2 columns, 'a\\tp'; accepted: `entity<TAB>attribute<TAB>number`"),
        ("a\tp\tmany\n", r":1: found 'many' as the value; accepted: a finite number"),
        ("a\tp\t1\nb\tp\tinf\n", r":2: found 'inf' as the value"),
        ("zz\tp\t1\n", r": none of its 1 lines is about an entity of the graph"),
    ):
        write(path, text)
        with pytest.raises(DataError, match=message):
            load(tmp_path)


def test_h5_by_name_by_link_and_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    own = tmp_path / "MKG-W"
    own.mkdir()
    tsv(own)
    write(own / "entities.tsv", mapping(ENTITIES, "{id}\t{name}\n"))
    with h5py.File(tmp_path / "MKG_W_description_sentences.h5", "w") as file:
        for name, x in VECTORS.items():
            file[name] = np.stack([x.numpy() - 1, x.numpy() + 1])
    with h5py.File(own / "image.h5", "w") as file:
        for i, x in enumerate(ROWS[:4]):
            file[f"http://wiki/Q{i}"] = x.numpy().astype(">f8")
    write(own / "ent_links", "".join(f"{name}\thttp://wiki/Q{i}\n" for i, name in enumerate(ENTITIES)))
    kg = load(own)
    assert torch.equal(kg.features["description_sentences"], ROWS)
    assert not any("not read" in note for note in kg.notes), "the links were"
    assert torch.equal(kg.features["image"][:4], ROWS[:4])
    assert kg.present["image"].tolist() == [True] * 4 + [False]
    write(own / "ent_links", "Paris\thttp://wiki/Q0\nRome\n")
    with pytest.raises(DataError, match=r"ent_links:2: found 'Rome'; accepted: two names, separated by a tab or a"):
        load(own)
    monkeypatch.setitem(sys.modules, "h5py", None)
    kg = load(own, features=None)
    assert kg.features == {}
    assert any(
        "image.h5 is read by h5py, which is not installed; `pip install dhns-fast[h5]` brings it" in note
        for note in kg.notes
    )
    with pytest.raises(DataError, match=r"image\.h5: is read by h5py"):
        load(own, features=["image"])


def test_recbole(tmp_path: Path) -> None:
    users = [f"{u}\t{i}\t5.0\n" for u in range(20) for i in range(20) if (u * 7 + i * 3) % 4 == 0]
    write(tmp_path / "ml.inter", "user_id:token\titem_id:token\trating:float\n" + "".join(users))
    write(tmp_path / "ml.kg", "head_id:token\trelation_id:token\ttail_id:token\nm.1\tfilm.genre\tm.9\n")
    write(tmp_path / "ml.link", "item_id:token\tentity_id:token\n1\tm.1\n")
    kg = load(tmp_path)
    assert kg.relation_names == ["interaction", "film.genre"]
    assert {"user:0", "item:0", "m.1", "m.9"} <= set(kg.entity_names)
    assert "item:1" not in kg.entity_names
    assert (len(kg.valid), len(kg.test)) == (round(0.1 * len(users)), round(0.1 * len(users)))
    assert len(kg.train) + len(kg.valid) + len(kg.test) == len(users) + 1
    assert (kg.test[:, 1] == 0).all()
    assert not any(kg.report.unseen_entity.values())
    assert torch.equal(load(tmp_path).test, kg.test)
    assert kg.notes[0] == "ml.inter: columns left out: 'rating'."
    (tmp_path / "ml.link").unlink()
    assert "item:1" in load(tmp_path).entity_names
    for name, text, message in (
        ("ml.inter", "user_id:token\n1\n", r"ml\.inter:1: the header 'user_id:token' has no column item_id"),
        (
            "ml.inter",
            "user_id:token\titem_id:token\n1\n",
            r"ml\.inter:2: found 1 columns, '1'; accepted: 2 columns, as in the header",
        ),
        ("ml.inter", "\n", r"ml\.inter: found blank lines only; accepted: a header, then rows"),
        (
            "ml.kg",
            "head_id:token\trelation_id:token\ttail_id:token\na\tinteraction\tb\n",
            r"ml\.kg:2: found the relation 'interaction'",
        ),
        (
            "ml.link",
            "item_id:token\tentity_id:token\n1\ta\n1\tb\n",
            r"ml\.link:3: item '1' has two entities, 'a' and 'b'",
        ),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        write(tmp_path / name, text)
        with pytest.raises(DataError, match=message):
            load(tmp_path)
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_bytes(before)


def test_what_is_written_is_read_under_its_own_name(tmp_path: Path) -> None:
    splits(tmp_path / "img", ".tsv", named)
    for modality in ("img_features", "img-x", "Text.v2"):
        save_file({"features": ROWS}, tmp_path / "img" / f"{modality}.safetensors")
    assert sorted(load(tmp_path / "img").features) == ["Text.v2", "img-x", "img_features"]


def test_synthetic_by_name() -> None:
    kg = load("synthetic:entities=300,relations=4,triples=2000,seed=3")
    assert (kg.num_entities, kg.num_relations, len(kg.train) + len(kg.valid) + len(kg.test)) == (300, 4, 2000)
    assert list(kg.features) == ["text", "image"]
    assert list(load("synthetic:entities=300,relations=4,triples=2000,image=0,text=8", features=["text"]).features) == [
        "text"
    ]
    for name, message in (
        (
            "entities=3",
            r"^data: got 'synthetic:entities=3', which does not say relations; accepted: synthetic:entities=N",
        ),
        ("entities=3,relations=x,triples=1", r"^data: got 'relations=x' in 'synthetic:"),
        ("entities=3,relations=1,triples=1,colour=2", r"^data: got 'colour=2' in"),
        ("entities=3,entities=3,relations=1,triples=1", r"^data: got 'entities=3' in"),
        (f"entities={'9' * 5000},relations=1,triples=1", r"^data: got "),
        ("entities=0,relations=1,triples=1", r"^num_entities: got 0;"),
        ("entities=9,relations=1,triples=1,valid=nan", r"^valid_fraction: got nan; accepted: 0 to 1"),
        ("", r"^data: got "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(f"synthetic:{name}")
        assert len(str(caught.value)) < 400


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_a_modality_whose_file_name_is_no_text(folder: Path) -> None:
    (folder / os.fsdecode(b"m\xff.npy")).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"m\\udcff\.npy: its name is not text in UTF-8; accepted: a name of a modality"
    ):
        load(folder)
