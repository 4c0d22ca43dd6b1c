"""Embeddings in the files of other programs, read back by these."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.training import config, graph
from safetensors.numpy import load_file

from dhns_fast import predict
from dhns_fast.catalogue import EXPORTS
from dhns_fast.data import KnowledgeGraph
from dhns_fast.errors import InputError
from dhns_fast.export import export
from dhns_fast.models import KGEModel
from dhns_fast.train import build


def model(name: str, kg: KnowledgeGraph, **options: object) -> KGEModel:
    return build(config(model=name, method="uniform", **options), kg).model


@pytest.mark.parametrize("to", ["npy", "parquet", "safetensors"])
def test_tables_have_names_row_for_row(tmp_path: Path, to: str) -> None:
    kg = graph(entity_names=[f"é {i}" for i in range(60)])
    fused = model("distmult", kg)
    if to == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    made = export(fused, kg, to, tmp_path / "out")
    assert sorted(path.name for path in made) == sorted(path.name for path in (tmp_path / "out").iterdir())
    with (tmp_path / "out" / "entities.tsv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == [[str(i), name] for i, name in enumerate(kg.entity_names)]
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (about["model"], about["reduction"], about["shapes"]["entities"]) == ("DistMult", "dot", [60, 8])
    for name, expected in (
        ("entities", fused.table()),
        ("structure", fused.entity.weight),
        ("relations", fused.relation.weight),
    ):
        if to == "npy":
            found = np.load(tmp_path / "out" / f"{name}.npy")
        elif to == "safetensors":
            found = load_file(tmp_path / "out" / "embeddings.safetensors")[name]
        else:
            table = parquet.read_table(tmp_path / "out" / f"{name}.parquet").to_pydict()
            assert list(table["name"]) == (kg.relation_names if name == "relations" else kg.entity_names)
            found = np.array(table["embedding"], np.float32)
        assert np.array_equal(found, expected.detach().numpy())


def from_files(about: dict[str, object], e: np.ndarray, r: np.ndarray, triples: np.ndarray) -> np.ndarray:
    """Scores by the formulas of models that bring something to a norm, or read phases."""
    h, p, t = e[triples[:, 0]], r[triples[:, 1]], e[triples[:, 2]]
    if about["model"] == "RotatE":
        h, t = (x[:, : x.shape[1] // 2] + 1j * x[:, x.shape[1] // 2 :] for x in (h, t))
        return about["offset"] - np.abs(h * np.exp(1j * p) - t).sum(1)
    if about["model"].endswith("CP"):
        width = e.shape[1] // 2
        return (h[:, :width] * p * t[:, width:]).sum(1)
    if about["model"] == "PairRE":
        return about["offset"] - np.abs(h * p[:, : p.shape[1] // 2] - t * p[:, p.shape[1] // 2 :]).sum(1)
    return about["offset"] - np.linalg.norm(h + p - t, about["p"], axis=1)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "transe"},
        {"name": "transe", "norm": 2},
        {"name": "rotate"},
        {"name": "pairre"},
        {"name": "cp"},
        {"name": "cp", "reciprocal": True},
    ],
)
def test_scores_come_out_of_the_files(tmp_path: Path, options: dict[str, object]) -> None:
    kg = graph()
    scored = model(str(options["name"]), kg, **{k: v for k, v in options.items() if k != "name"})
    export(scored, kg, "npy", tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    tables = (np.load(tmp_path / f"{name}.npy").astype(np.float64) for name in ("entities", "relations"))
    found = from_files(about, *tables, kg.test.numpy())
    np.testing.assert_allclose(found, scored.score_hrt(kg.test).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_inverse_relations_have_names(tmp_path: Path, to: str) -> None:
    if to == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    kg = graph()
    export(model("complex", kg, reciprocal=True), kg, to, tmp_path)
    names = [line.split("\t")[1] for line in (tmp_path / "relations.tsv").read_text().splitlines()]
    assert names == [*kg.relation_names, *(f"{name}_inverse" for name in kg.relation_names)]
    if to == "parquet":
        assert parquet.read_table(tmp_path / "relations.parquet").to_pydict()["name"] == names
    else:
        assert len(np.load(tmp_path / "relations.npy")) == len(names)


def test_inverse_relations_have_names_of_their_own(tmp_path: Path) -> None:
    kg = graph(relation_names=["r", "r_inverse", *(f"s{i}" for i in range(graph().num_relations - 2))])
    export(model("complex", kg, reciprocal=True), kg, "npy", tmp_path)
    names = [line.split("\t")[1] for line in (tmp_path / "relations.tsv").read_text().splitlines()]
    R = kg.num_relations
    assert names[R : R + 2] == [f"r_inverse#{R}", "r_inverse_inverse"]
    assert len(set(names)) == 2 * R


@pytest.mark.parametrize(("name", "norm"), [("complex", 1), ("cp", 1), ("transe", 1), ("transe", 2)])
def test_faiss_finds_what_predict_finds(tmp_path: Path, name: str, norm: int) -> None:
    faiss = pytest.importorskip("faiss")
    kg = graph()
    scored = model(name, kg, norm=norm)
    export(scored, kg, "faiss", tmp_path)
    queries = [line.split("\t") for line in (tmp_path / "queries.tsv").read_text().splitlines()]
    vectors = np.load(tmp_path / "queries.npy")
    assert len(queries) == len(vectors) == 2 * len(kg.test)
    assert (tmp_path / "heads.faiss").exists() == (name == "cp")
    tails = faiss.read_index(str(tmp_path / "tails.faiss"))
    for row in (0, 1, len(kg.test) - 1):
        best = [answer.id for answer in predict.predict(scored, kg, *queries[row], k=5)]
        assert tails.search(vectors[row : row + 1], 5)[1][0].tolist() == best


def test_queries_that_ask_for_no_entity_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    kg = graph()
    model = build(config(model="distmult"), kg).model
    for query in ([1, -1, 2], [1, 0, 2], [-1, 0, -1]):
        with pytest.raises(InputError, match=r"queries: got .* accepted: triples that ask for a head or a tail"):
            export(model, kg, "faiss", tmp_path / "out", torch.tensor([[0, 1, -1], query]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "how"), [("rotate", "'complex_l1'"), ("pairre", "'l1' with a scale of each query")])
def test_what_faiss_cannot_search_is_refused(tmp_path: Path, name: str, how: str) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(InputError, match=f"to: got 'faiss'; accepted: formats other .*: FAISS cannot search by {how}"):
        export(model(name, graph()), graph(), "faiss", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_word2vec_and_projector_are_text(tmp_path: Path) -> None:
    kg = graph(entity_names=["a b", "a_b", *(f"e{i}" for i in range(58))])
    scored = model("complex", kg)
    export(scored, kg, "word2vec", tmp_path)
    head, *lines = (tmp_path / "entities.vec").read_text().splitlines()
    assert head == "60 8"
    assert [line.split(" ")[0] for line in lines[:3]] == ["a_b#0", "a_b", "e0"]
    found = np.array([line.split(" ")[1:] for line in lines], np.float32)
    assert np.array_equal(found, scored.table().detach().numpy())
    export(scored, kg, "projector", tmp_path)
    tensors = np.loadtxt(tmp_path / "tensors.tsv", dtype=np.float32)
    assert np.array_equal(tensors, found)
    assert (tmp_path / "metadata.tsv").read_text().splitlines() == list(kg.entity_names)
    assert 'metadata_path: "metadata.tsv"' in (tmp_path / "projector_config.pbtxt").read_text()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dhns_fast import export as module

    monkeypatch.setitem(module.NEEDS, "faiss", "no_such_package")
    with pytest.raises(
        InputError, match=r"to: got 'faiss'; accepted: npy, .*; faiss needs the package no_such_package: pip install"
    ):
        export(model("distmult", graph()), graph(), "faiss", tmp_path)
    assert set(module._WRITERS) == set(EXPORTS)


def test_joint_embeddings_score_as_the_model_does(tmp_path: Path) -> None:
    kg = graph()
    scored = model("distmult", kg)
    export(scored, kg, "npy", tmp_path)
    e, r = (np.load(tmp_path / f"{name}.npy") for name in ("entities", "relations"))
    h, p, t = kg.test.T.numpy()
    assert (e[h] * r[p] * e[t]).sum(1) == pytest.approx(scored.score_hrt(kg.test).detach().numpy(), rel=1e-4, abs=1e-6)
    assert torch.equal(predict.score(scored, kg.test), scored.score_hrt(kg.test).detach())
