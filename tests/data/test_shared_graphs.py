"""The published graphs, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dhns_fast.data import load, write

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published graphs are not at hand")


@pytest.mark.parametrize(
    ("name", "sizes", "features"),
    [
        ("MKG-Y", (15_000, 28, 21_310, 2_665, 2_663), ["text_context", "text_name"]),
        ("MKG-W", (15_000, 169, 34_196, 4_276, 4_274), []),
        ("DB15K", (12_842, 279, 79_222, 9_904, 9_902), ["text_context", "text_name"]),
        ("WN18RR", (40_943, 11, 86_835, 3_034, 3_134), []),
    ],
)
def test_counts_are_those_of_the_headers(
    name: str, sizes: tuple[int, ...], features: list[str], tmp_path: Path
) -> None:
    kg = load(DATA / name)
    assert kg.name == name
    assert (kg.num_entities, kg.num_relations, len(kg.train), len(kg.valid), len(kg.test)) == sizes
    assert list(kg.features) == features
    assert all(x.shape == (kg.num_entities, 384) and kg.present[m].all() for m, x in kg.features.items())
    for split in ("train", "valid", "test"):
        head, tail, relation = map(int, (DATA / name / f"{split}2id.txt").read_text().rstrip().split("\n")[-1].split())
        assert getattr(kg, split)[-1].tolist() == [head, relation, tail]
    again = load(write(kg, tmp_path / name), features=[])
    assert all(torch.equal(getattr(kg, split), getattr(again, split)) for split in ("train", "valid", "test"))
    assert (kg.entity_names, kg.relation_names) == (again.entity_names, again.relation_names)


def test_the_validation_file_of_db15k_is_flagged() -> None:
    kg = load(DATA / "DB15K", features=[])
    report = kg.report
    assert (report.size["valid"], report.distinct["valid"]) == (9904, 7481)
    assert (report.valid_in_train, report.test_in_valid, report.test_in_train) == (6584, 824, 0)
    assert report.distinct["valid"] - report.valid_elsewhere == 73
    assert report.contaminated_validation
    assert report.lines()[-1].startswith(
        "valid is contaminated: only 73 of its 7481 distinct triples are in neither train nor test"
    )
    mended = kg.hold_out_validation(0.05, seed=0)
    assert len(mended.valid) == 3961
    assert not mended.report.contaminated_validation


@pytest.mark.parametrize(("name", "unseen"), [("MKG-Y", 388), ("MKG-W", 306), ("WN18RR", 210)])
def test_the_others_are_clean_but_for_unseen_entities(name: str, unseen: int) -> None:
    report = load(DATA / name, features=[]).report
    assert not report.contaminated_validation
    assert not any(report.duplicates.values())
    assert (report.valid_elsewhere, report.test_in_train) == (0, 0)
    assert report.unseen_entity["test"] == unseen
