"""The plan of the house: CONTRIBUTING's diagram of floors is what the imports are, and nothing but tests and benchmarks
leans on the oracle.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dhns_fast"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES |= {f"kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a module but what is for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imports(name: str) -> set[str]:
    """The modules of the package that one imports, at its head or inside its functions; the package itself is ""."""
    found = set()
    for node in nodes(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    inside = {x.removeprefix("dhns_fast").removeprefix(".") for x in found if x.split(".")[0] == "dhns_fast"}
    # `from package import name` is the module where there is one of that name, and else the package.
    return {x for x in inside if x in MODULES and not any(y.startswith(f"{x}.") for y in inside & MODULES.keys())} - {
        name
    }


IMPORTS = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    return name.partition(".")[0]


def floors() -> list[list[str]]:
    """The diagram of CONTRIBUTING.md, top floor first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```floors\n(.*?)```", text, re.DOTALL)
    assert block, "CONTRIBUTING.md has no block of floors"
    return [line.split() for line in block[1].splitlines()]


def test_imports_go_down_the_floors() -> None:
    level = {name: i for i, names in enumerate(floors()) for name in names}
    rooms = {room(name) for name in MODULES} - {"", "reference"}
    assert rooms == level.keys()
    up = [
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(name) not in ("", "reference") and room(other) not in ("", "reference", room(name))
        if level[room(other)] <= level[room(name)]
    ]
    assert up == []


def test_only_tests_and_benchmarks_import_the_oracle() -> None:
    leaning = {
        name
        for name, others in IMPORTS.items()
        if room(name) != "reference" and any(room(x) == "reference" for x in others)
    }
    assert leaning == set()
    above = {
        x for name, others in IMPORTS.items() if room(name) == "reference" for x in others if room(x) != "reference"
    }
    assert above == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    circles = []
    for start in MODULES:
        seen, waiting = set(), list(IMPORTS[start])
        while waiting:
            name = waiting.pop()
            if name not in seen and name:
                seen.add(name)
                waiting += IMPORTS[name]
        if start in seen:
            circles.append(start)
    assert circles == []
