"""The results file of a grid: which cells are a row, and what makes cells comparable."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dhns_fast.errors import DataError
from dhns_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield importlib.import_module("does_it_help")
    sys.modules.pop("does_it_help", None)


def cell(mrr: float, valid: float, **options: Any) -> dict[str, Any]:
    result = {"mrr": mrr, "hits@1": mrr / 2, "hits@10": mrr, "valid_mrr": valid, "step_cpu_ms": 3.0}
    return {"result": result, "config": TrainConfig(model="rotate", **options).to_dict(), "provenance": {}}


def test_other_seeds_have_what_the_lowest_chose_on_validation(script: Any) -> None:
    own: dict[str, Any] = {"method": "dhns", "behaviour": "normalised"}
    cells = [
        *(cell(0.5 + seed / 100, 0.4, method="self-adversarial", seed=seed) for seed in range(3)),
        cell(0.9, 0.3, mu=1.0, **own),  # best on test and not on validation
        cell(0.6, 0.4, mu=3.0, **own),
        cell(0.9, 0.9, mu=1.0, seed=1, **own),
        *(cell(0.6 + seed / 100, 0.2, mu=3.0, seed=seed, **own) for seed in (1, 2)),
        cell(0.5, 0.4, mu=3.0, control="gaussian", **own),
    ]
    baseline, row, control = script.rows_of(cells)
    assert (row.method, control.method) == ("dhns-normalised", "dhns-normalised+gaussian")
    assert row.chosen == {"learning_rate": 0.002, "mu": 3.0}
    assert baseline.chosen == {"learning_rate": 0.002}
    assert {seed: result["mrr"] for seed, result in row.results.items()} == {0: 0.6, 1: 0.61, 2: 0.62}
    difference = row.minus(baseline)
    assert difference is not None
    assert difference.better
    assert difference.mean == pytest.approx(0.1)


def test_cells_that_were_not_trained_alike_are_refused(script: Any, tmp_path: Path) -> None:
    cells = [cell(0.5, 0.4, method="self-adversarial"), cell(0.5, 0.4, method="uniform", epochs=99)]
    with pytest.raises(DataError, match="differ in epochs"):
        script.rows_of(cells)
    with pytest.raises(DataError, match="no cells"):
        script.cells_of(tmp_path)


@pytest.mark.parametrize(
    "results", sorted((ROOT / "bench" / "results").glob("does-it-help*.json")), ids=lambda p: p.stem
)
def test_a_results_file_gives_its_rows_again(script: Any, results: Path) -> None:
    rows = script.rows_of(script.cells_of(results))
    assert script.grid.markdown(rows, script.BASELINE) == json.loads(results.read_text())["table"]
