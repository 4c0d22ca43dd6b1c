"""Which tiles kernels are launched with: the tuned table's where there is one, and the same sums in every batch."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dhns_fast.kernels as kernels
import pytest
from dhns_fast.kernels import denoise, score

ARCH = 90


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of the chip is read from; empty at first."""
    monkeypatch.setattr(kernels, "TUNED", tmp_path)
    kernels._table.cache_clear()
    yield tmp_path / f"sm_{ARCH}.json"
    kernels._table.cache_clear()


def write(path: Path, *entries: tuple[str, str, int, Any]) -> None:
    names = "kernel", "precision", "width"
    choices = [
        {**dict(zip(names, key, strict=True)), "configuration": dataclasses.asdict(chosen), "us": 1.0}
        for *key, chosen in entries
    ]
    path.write_text(json.dumps({"chip": f"sm_{ARCH}", "choices": choices}), encoding="utf-8")


def test_without_a_table_the_first_candidate_is_taken(table: Path) -> None:
    for (kernel, precision), candidates in denoise.CANDIDATES.items():
        assert denoise.tile(kernel, precision, 1024, 6000, ARCH) == candidates[0]
    for (kernel, precision), candidates in denoise.FEW_CANDIDATES.items():
        assert denoise.tile(kernel, precision, 1024, 256, ARCH) == candidates[0]
        assert candidates[0].divided == (kernel == "update")
    for kind, configs in score.CANDIDATES.items():
        assert score.dot_config(kind, 256, ARCH) == configs[0]


def test_launchers_read_the_table_by_kernel_precision_and_bucket_of_widths(table: Path) -> None:
    tile, config = denoise.CANDIDATES["update", "bf16"][4], score.CANDIDATES["tf32"][2]
    write(table, ("denoise.update", "bf16", 1024, tile), ("score.dot", "tf32", 256, config))
    for width in (520, 1000, 1024):
        assert denoise.tile("update", "bf16", width, 6000, ARCH).stages == tile.stages
        assert denoise.tile("update", "bf16", width, 6000, ARCH).splits == tile.splits
    assert denoise.tile("update", "bf16", 1024, 6000, ARCH) == tile
    for kernel, precision, width in (("hidden", "bf16", 1024), ("update", "tf32", 1024), ("update", "bf16", 1040)):
        assert denoise.tile(kernel, precision, width, 6000, ARCH) == denoise.CANDIDATES[kernel, precision][0]
    # What few rows are launched with is a choice of its own.
    assert denoise.tile("update", "bf16", 1024, 256, ARCH) == denoise.FEW_CANDIDATES["update", "bf16"][0]
    assert score.dot_config("tf32", 200, ARCH) == config
    assert score.dot_config("tf32", 264, ARCH) == score.CANDIDATES["tf32"][0]
    # Of another chip it says nothing.
    assert denoise.tile("update", "bf16", 1024, 6000, 100) == denoise.CANDIDATES["update", "bf16"][0]


def test_what_is_no_candidate_any_more_is_passed_over(table: Path) -> None:
    rule = denoise.CANDIDATES["update", "bf16"][0]
    write(table, ("denoise.update", "bf16", 1024, dataclasses.replace(rule, rows=512)))
    assert denoise.tile("update", "bf16", 1024, 6000, ARCH) == rule
    entries = json.loads(table.read_text())
    del entries["choices"][0]["configuration"]["rows"]
    table.write_text(json.dumps(entries))
    kernels._table.cache_clear()
    assert denoise.tile("update", "bf16", 1024, 6000, ARCH) == rule


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"choices": 3}', '{"choices": [{"kernel": "score.dot"}]}', '{"choices": [', "\x00", "[" * 9999,
     '{"choices": [{"kernel": "score.dot", "precision": "tf32", "width": "wide", "configuration": {}}]}',
     '{"choices": [{"kernel": "score.dot", "precision": "tf32", "width": 256, "configuration": 3}]}'],
)  # fmt: skip
def test_a_damaged_table_is_one_line_in_the_log(table: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table.write_text(text)
    with caplog.at_level(logging.WARNING, "dhns_fast"):
        for _ in range(2):
            assert score.dot_config("tf32", 256, ARCH) == score.CANDIDATES["tf32"][0]
    (record,) = caplog.records
    assert str(table) in record.getMessage()
    assert "python bench/tune.py writes a new one" in record.getMessage()


def test_a_choice_changes_no_order_of_sums(table: Path) -> None:
    """Where bits must not depend on the batch, neither tables nor small batches change how many dimensions a sum takes
    at a time, nor the parts that moments are made of.
    """
    for (kernel, precision), candidates in denoise.CANDIDATES.items():
        few = denoise.FEW_CANDIDATES[kernel, precision]
        assert len({tile.depth for tile in candidates + few}) == 1
        named = [("denoise", x) for x in candidates] + [("denoise_few", x) for x in few]
        for place, (name, chosen) in enumerate(named):
            write(table, (f"{name}.{kernel}", precision, 1024, chosen))
            kernels._table.cache_clear()
            of_rows = {rows: denoise.tile(kernel, precision, 1024, rows, ARCH) for rows in (1, 64, 256, 257, 6000)}
            assert of_rows[64 if name == "denoise_few" else 6000] == chosen
            depths = {(tile.depth, denoise.group_depth(1024, tile)) for tile in of_rows.values()}
            assert depths == {(candidates[0].depth, 1024)}, (kernel, precision, place)
            part = denoise.part("h" if kernel == "hidden" else "x", 1024)
            assert all(tile.columns // tile.splits % part == 0 for tile in of_rows.values()), (kernel, precision, place)
    for kind, configs in score.CANDIDATES.items():
        assert len({config.BK for config in configs}) == 1, kind
        assert all(config.BM == config.BN for config in configs), kind


def test_a_dry_run_writes_nothing_and_fails_where_a_rule_does(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    tune = importlib.import_module("tune")
    fine = tune.aot.Report("k", ARCH, 100, 0, 0, (), "")
    spills = dataclasses.replace(fine, spills=8)
    # Of each subject the rule and one more candidate, one of which spills and one of which does not compile.
    reports: dict[Any, Any] = {(subject, place): fine for subject in tune.subjects() for place in (0, 1)}
    first, second, *_ = tune.subjects()
    reports |= {(first, 1): spills, (second, 1): "RuntimeError: no"}
    monkeypatch.setattr(tune, "compile_all", lambda *_: reports)
    assert tune.main(["--dry"]) == 0
    assert f"{len(reports)} candidates for sm_90" in capsys.readouterr().out
    kept = tune.fit(reports)
    assert len(kept) == len(reports) - 2
    assert not {(first, 1), (second, 1)} & set(kept)
    reports[first, 0] = spills
    assert tune.main(["--dry"]) == 1
    assert f"the rule for {first} does not compile without spills" in capsys.readouterr().out
    assert list(table.parent.iterdir()) == []
