"""The ready configurations load, name options alone, and say where their settings come from and what stands in for
their data.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dhns_fast.data import planted
from dhns_fast.train import TrainConfig

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
GRAPHS = ("db15k", "mkg-w", "mkg-y", "wn18rr", "fb15k-237", "ogbl-wikikg2", "wikidata5m", "freebase86m")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_names_its_source(path: Path) -> None:
    config = TrainConfig.load(path)
    assert "# Source: " in path.read_text(encoding="utf-8")
    assert config.data == f"data/{Path(config.data).name}"


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_has_a_stand_in(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config, text = TrainConfig.load(path), path.read_text(encoding="utf-8")
    found = re.search(r"# Stand-in: --data (\S+)", text)
    assert found is not None
    assert found[1].startswith(planted.PREFIX)
    sizes = dict(part.split("=") for part in found[1].removeprefix(planted.PREFIX).split(","))
    entities = int(sizes["entities"])
    assert set(sizes) == {"entities", "relations", "triples"}
    # What a step of dense Adam would move is no configuration for millions.
    assert (config.optimiser_for(entities) == "adam") == (entities <= 100_000)
