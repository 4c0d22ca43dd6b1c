"""The pages of docs/ and README: their Python runs, their links lead somewhere.

The blocks of a page run in order in one namespace, in an empty folder. A block inside an HTML comment runs too: it is
what a reader has already and the page need not show. A block that imports an optional package which is not installed is
left out; a fence ```py holds lines of our own files, which is nothing to run.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {"pykeen", "torch_geometric", "recbole", "faiss", "pandas", "optuna", "tensorboard", "h5py", "matplotlib"}
# So that the test is quick: what is written in a page -> what runs.
SHORTER = {"dim=64, epochs=20": 'dim=8, epochs=1, num_negatives=2, method="uniform"', "1024": "64"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the first statement, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


def missing(code: str) -> set[str]:
    """Optional packages that a block, or an adapter it imports, needs and that are not installed."""
    wanted = set()
    for node in ast.walk(ast.parse(code)):
        modules = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        wanted |= {part for module in modules for part in module.split(".")} & OPTIONAL
    return {package for package in wanted if importlib.util.find_spec(package) is None}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__page__"}
    left_out = []
    for line, code in blocks(page):
        if absent := missing(code):
            left_out.append(f"line {line}: {', '.join(sorted(absent))}")
            continue
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    if left_out:
        pytest.skip(f"ran but for what needs packages that are not installed: {'; '.join(left_out)}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()]
    assert not dead


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name(page) for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []
