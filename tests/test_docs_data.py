"""The code blocks of docs/data.md run, one after the other, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dhns_fast.data.readers.arrays import SUFFIXES

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def test_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/data.md", "exec"), names)
    out = capsys.readouterr().out
    assert "is a header and no triple; columns left out: source" in out
    assert "('child' by 'parent')" in out
    assert "185 of 200 entities are not in it and are masked out." in out


def test_every_suffix_is_on_the_page() -> None:
    assert all(f"`{suffix}`" in PAGE for suffix in SUFFIXES if suffix != ".hdf5")
