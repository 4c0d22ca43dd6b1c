"""The embedded data set: what it promises of its size, its names, its split and its modalities; and the parts of its
build that need no package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from dhns_fast.data import atlas, load
from dhns_fast.errors import DataError, InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import build_atlas as build

FOLDER = Path(atlas.__file__).parent
SIZES = {"train": 12181, "valid": 1500, "test": 1499}
# Modality: columns, entities that have it.
MODALITIES = {"text": (128, 4271), "image": (64, 246), "geo": (33, 3604)}
SYMMETRIC = {"near", "neighbour_of"}


def rows(name: str) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in (FOLDER / f"{name}.tsv").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, ...]]]:
    return {name: rows(name) for name in SIZES}


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 3_000_000


def test_counts_and_names(splits):
    assert {name: len(triples) for name, triples in splits.items()} == SIZES
    for what, count in (("entities", 4271), ("relations", 17)):
        ids, names = zip(*rows(what), strict=True)
        assert list(ids) == [str(i) for i in range(count)]
        assert len(set(names)) == count
        assert all(name and name == name.strip() and "  " not in name for name in names)
    for name, triples in splits.items():
        assert all(len(triple) == 3 for triple in triples), name
        assert str(SIZES[name]) in atlas.__doc__
    assert {"Libreville", "Gabon", "London", "London (Canada)", "Singapore", "Singapore (city)"} <= {
        n for _, n in rows("entities")
    }


def test_split_rules(splits):
    everything = [triple for triples in splits.values() for triple in triples]
    assert len(set(everything)) == len(everything)
    used = {end for h, _, t in splits["train"] for end in (h, t)}
    assert used == {name for _, name in rows("entities")}
    assert {r for _, r, _ in splits["train"]} == {name for _, name in rows("relations")}
    assert all(h != t for h, _, t in everything)
    total = Counter(r for _, r, _ in everything)
    for name in ("valid", "test"):
        held = Counter(r for _, r, _ in splits[name])
        assert set(held) == set(total), f"{name} has triples of every relation"
        assert all(held[r] <= 0.1 * total[r] for r in total)
    partners = defaultdict(set)
    for h, _, t in splits["train"]:
        partners[h].add(t)
        partners[t].add(h)
    assert all(len(partners[end]) >= 2 for name in ("valid", "test") for h, _, t in splits[name] for end in (h, t))


def test_no_leakage(splits):
    """No two parts share a pair of entities, in either order and by whichever relation: inverse, symmetric and second
    relations included.
    """
    pairs = {name: {frozenset((h, t)) for h, _, t in triples} for name, triples in splits.items()}
    assert not pairs["train"] & pairs["valid"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["valid"] & pairs["test"]
    for triples in splits.values():
        known = set(triples)
        assert all((t, r, h) in known for h, r, t in triples if r in SYMMETRIC)
        assert not any((t, r, h) in known for h, r, t in triples if r not in SYMMETRIC)


def test_modalities():
    assert {file.stem for file in FOLDER.glob("*.safetensors")} == set(MODALITIES)
    names = [name for _, name in rows("entities")]
    countries = {t for name in SIZES for _, r, t in rows(name) if r == "located_in"}
    for modality, (columns, having) in MODALITIES.items():
        content = load_file(FOLDER / f"{modality}.safetensors")
        features, present = content["features"], content["present"]
        assert features.shape == (4271, columns)
        assert features.dtype == np.float16
        assert present.dtype == np.bool_
        assert present.sum() == having
        assert np.isfinite(features).all()
        assert not features[~present].any()
        assert len(np.unique(features[present], axis=0)) > 0.9 * having, "rows differ from one another"
        if modality == "image":
            assert {name for name, has in zip(names, present, strict=True) if has} <= countries
        if modality == "geo":
            p = features[present, :3].astype(np.float64)
            assert np.abs(np.linalg.norm(p, axis=1) - 1).max() < 2e-3
            for octave in range(5):
                waves = np.concatenate([f(2.0**octave * np.pi * p) for f in (np.sin, np.cos)], 1)
                assert np.abs(features[present, 3 + 6 * octave : 9 + 6 * octave] - waves).max() < 2e-3 * 2.0 ** (
                    octave + 1
                )


def test_geography_is_where_it_should_be():
    """Near cities are near, by the shipped coordinates: rows of features and of entities are in the same order."""
    point = dict(
        zip(
            (name for _, name in rows("entities")),
            load_file(FOLDER / "geo.safetensors")["features"][:, :3].astype(float),
            strict=True,
        )
    )
    km = [6371 * np.linalg.norm(point[h] - point[t]) for h, r, t in rows("train") if r == "near"]
    assert max(km) < 100 + 10  # float16 keeps an entity within 5 km
    latitude = np.degrees(np.arcsin(point["Libreville"][2]))
    longitude = np.degrees(np.arctan2(point["Libreville"][1], point["Libreville"][0]))
    assert (latitude, longitude) == pytest.approx((0.39, 9.45), abs=0.1)


def test_load(splits):
    graph = load("atlas")
    assert graph.entity_names == [name for _, name in rows("entities")]
    assert graph.relation_names == [name for _, name in rows("relations")]
    assert {name: len(getattr(graph, name)) for name in SIZES} == SIZES
    for name, triples in splits.items():
        h, r, t = getattr(graph, name)[-1].tolist()
        assert (graph.entity_names[h], graph.relation_names[r], graph.entity_names[t]) == triples[-1]
    assert not graph.report.lines()
    for modality, (columns, having) in MODALITIES.items():
        assert graph.features[modality].shape == (4271, columns)
        assert int(graph.present[modality].sum()) == having
        assert torch.isfinite(graph.features[modality]).all()


def test_build_names_missing_packages(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("babel", "PIL") else found("json"))
    with pytest.raises(InputError, match=r"not installed; accepted: pip install babel==2\.18\.0 pillow==13\.0\.0$"):
        build.import_packages()


def test_build_packages_are_those_of_the_extra():
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    line = next(line for line in pyproject.read_text(encoding="utf-8").splitlines() if line.startswith("atlas = ["))
    quoted = ", ".join(f'"{pin}"' for pin in build.PACKAGES.values())
    assert line == f"atlas = [{quoted}]"
    attribution = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for pin in [pin.replace("==", " ") for pin in build.PACKAGES.values() if not pin.startswith(("resvg", "pillow"))]:
        assert pin in attribution
    assert all(f"npm {name} {version}" in attribution for name, version in build.NPM_PACKAGES.items())


def test_build_names_missing_sources(tmp_path):
    with pytest.raises(
        DataError,
        match=r"flag-icons.package\.json: not found; --sources is the node_modules folder that `npm install flag-icons@",
    ):
        build.read_sources(tmp_path, {})


def test_build_split_keeps_pairs_together():
    triples = [(f"c{i}", r, f"c{(i * k) % 97}") for i in range(1, 97) for k, r in ((5, "a"), (7, "b"), (11, "c"))]
    triples += [(t, "back", h) for h, _, t in triples]
    parts = build.split(triples)
    assert sorted(triple for listed in parts.values() for triple in listed) == sorted(triples)
    pairs = [{frozenset((h, t)) for h, _, t in listed} for listed in parts.values()]
    assert not pairs[0] & pairs[1]
    assert not pairs[0] & pairs[2]
    assert not pairs[1] & pairs[2]
    assert min(len(parts["valid"]), len(parts["test"])) > 0.05 * len(triples)
    assert build.split(triples) == parts


def test_build_geometry():
    assert build.iso_6709("+4230+00131") == pytest.approx(build.unit_vector(42.5, 1 + 31 / 60))
    assert build.iso_6709("-690022+0393524") == pytest.approx(
        build.unit_vector(-69 - 22 / 3600, 39 + 35 / 60 + 24 / 3600)
    )
    with pytest.raises(InputError, match=r"zone\.tab: got 'north'"):
        build.iso_6709("north")
    assert build.mean_direction([]) is None
    assert build.mean_direction([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]) == pytest.approx((0.5**0.5, 0.5**0.5, 0.0))


@pytest.mark.parametrize(
    ("count", "text"),
    [(468, "468"), (77_265, "77 thousand"), (2_348_000, "2.3 million"), (131_000_000, "130 million")],
)
def test_build_rounds(count, text):
    assert build.rounded(count) == text


def test_build_flag_statistics():
    """Horizontal and vertical stripes fill the orientations of their edges, and a red picture one colour."""
    stripes = np.zeros((48, 64, 3))
    stripes[16:32] = 1
    _, _, edges = build.flag_statistics(stripes)
    horizontal = edges.reshape(4, 8)
    assert horizontal.argmax(1).tolist() == [4] * 4
    assert np.count_nonzero(horizontal) == 4
    _, _, edges = build.flag_statistics(
        np.ascontiguousarray(np.broadcast_to((np.arange(64) // 16 % 2)[None, :, None], (48, 64, 3)), dtype=float)
    )
    assert edges.reshape(4, 8).argmax(1).tolist() == [0] * 4
    thumbnail, histogram, edges = build.flag_statistics(np.broadcast_to(np.array([1.0, 0.0, 0.0]), (48, 64, 3)).copy())
    assert thumbnail.reshape(9, 12, 3)[4, 5].tolist() == [1, 0, 0]
    assert histogram[48] == 1
    assert not edges.any()


def test_principal_components_are_those_of_the_covariance():
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.array([5, 4, 3, 2, 1, 0.5])
    scores = build.principal_components(x, 3)
    largest = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1][:3]
    assert scores.var(0) / scores.var(0).sum() == pytest.approx(largest / largest.sum())
    assert scores.std() == pytest.approx(1)
    assert build.principal_components(x.copy(), 3) == pytest.approx(scores)


def test_differences_are_found(tmp_path):
    features = np.ones((2, 3), np.float16)
    contents = {
        "train.tsv": b"a\tr\tb\n",
        "text.safetensors": save({"features": features, "present": np.ones(2, bool)}),
        "geo.safetensors": save({"features": features, "present": np.ones(2, bool)}),
        "image.safetensors": save({"features": features, "present": np.ones(2, bool)}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert build.differences(contents, tmp_path) == []
    (tmp_path / "train.tsv").write_bytes(b"a\tr\tc\n")
    (tmp_path / "text.safetensors").write_bytes(
        save({"features": features * np.float16(1.25), "present": np.ones(2, bool)})
    )
    (tmp_path / "geo.safetensors").write_bytes(save({"features": features, "present": np.zeros(2, bool)}))
    (tmp_path / "image.safetensors").unlink()
    assert build.differences(contents, tmp_path) == [
        "train.tsv: differs",
        "text.safetensors: differs by 0.25, more than 0.05",
        "geo.safetensors: another shape or mask",
        f"image.safetensors: not in {tmp_path}",
    ]
