"""Does it help? The cells of one grid or several as one results file, a table and a chart.

    dhns-fast grid ... --output runs/grid
    python bench/does_it_help.py runs/grid

writes bench/results/does-it-help.json (every cell, with the options that differ from the defaults, and versions), the
table of docs/does-it-help.md that asks for it, and docs/img/does-it-help.png: paired differences to self-adversarial
corruptions over seeds, with their 95 % intervals. A results file may stand among the folders: its cells are kept.

Cells that differ in nothing but method, seed, learning rate, μ and N3 make one comparison. Of the cells of a method's
lowest seed the best on validation says which of the last three its other seeds must have. `--name` writes a comparison
apart from the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dhns_fast import files, plots
from dhns_fast.catalogue import BEHAVIOURS
from dhns_fast.errors import DataError, DhnsError
from dhns_fast.train import grid
from dhns_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
BASELINE = "self-adversarial"
# What distinguishes the cells of one comparison; data are compared by their name, which is all that a results file has.
FREE = ("data", "method", "behaviour", "control", "seed", *grid.TUNED)

# A difference beyond this is written at the chart's edge, or the others would be a line of points.
FAR = -0.05

Cell = dict[str, Any]


def cells_of(folder: Path) -> list[Cell]:
    """Results and options of a grid's folder, or of a results file of this script.

    Raises:
        DataError: it holds none, or one that is damaged.
    """
    if folder.is_file():
        defaults = TrainConfig().to_dict()
        return [
            {**cell, "config": defaults | {"data": cell["data"]} | cell["options"]}
            for cell in json.loads(folder.read_text(encoding="utf-8"))["cells"]
        ]
    found = []
    for path in sorted(folder.glob("*-seed*.json")):
        result = grid.kept(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        found.append({"result": result, "config": content["config"], "provenance": content["provenance"]})
    if not found:
        raise DataError(folder, "no cells of dhns-fast grid")
    return found


def method_of(config: Mapping[str, Any]) -> str:
    """The variant that :func:`dhns_fast.train.grid.variant` reads."""
    made = TrainConfig(**config)
    name = config["method"]
    if made.recipe.generator and config["behaviour"] in BEHAVIOURS:
        name += f"-{config['behaviour']}"
    return name if config["control"] == "none" else f"{name}+{config['control']}"


def rows_of(cells: Iterable[Cell]) -> list[grid.Row]:
    """One row for each data set, model and method, in the order of the first two and of the methods' means.

    Raises:
        DataError: cells of one comparison differ in more than a comparison may.
    """
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        config = cell["config"]
        key = Path(config["data"]).name, config["model"]
        groups.setdefault(key, {}).setdefault(method_of(config), []).append(cell)
    rows = []
    for (data, model), methods in groups.items():
        shared = [{k: v for k, v in c["config"].items() if k not in FREE} for each in methods.values() for c in each]
        if differing := sorted(k for k in shared[0] if any(other[k] != shared[0][k] for other in shared)):
            raise DataError(data, f"cells of {model} differ in {', '.join(differing)}; compare what is trained alike")
        for method, own in methods.items():
            rows.append(_row(data, model, method, own))
    return rows


def _row(data: str, model: str, method: str, cells: Sequence[Cell]) -> grid.Row:
    def tuning(cell: Cell) -> tuple[float, ...]:
        return tuple(cell["config"][name] for name in grid.TUNED)

    lowest = min(cell["config"]["seed"] for cell in cells)
    first = [cell for cell in cells if cell["config"]["seed"] == lowest]
    best = max(first, key=lambda cell: cell["result"]["valid_mrr"])
    row = grid.Row(data, model, method)
    row.results = {cell["config"]["seed"]: cell["result"] for cell in cells if tuning(cell) == tuning(best)}
    row.chosen = grid.chosen(TrainConfig(**best["config"]), grid.TUNED)
    return row


def chart(rows: Sequence[grid.Row], path: Path) -> None:
    """Differences to the baseline, a panel for each data set and model."""
    compared = [
        (row, difference)
        for row, rivals in grid.differences(rows, BASELINE)
        if (difference := rivals.get(BASELINE)) is not None
    ]
    panels: dict[str, list[tuple[grid.Row, grid.Difference]]] = {}
    for row, difference in compared:
        panels.setdefault(f"{row.model}, {row.data}", []).append((row, difference))
    if not panels:
        return

    def draw(axes: Any) -> None:
        for axis, (title, found) in zip(axes if len(panels) > 1 else [axes], panels.items(), strict=True):
            places = range(len(found))
            for place, (_, difference) in zip(places, found, strict=True):
                low, high = difference.interval
                if difference.mean < FAR:
                    at = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": "small", "color": "gray"}
                    axis.text(0.01, place, f"← {difference.mean:+.3f}", **at)
                    continue
                axis.plot([low, high], [place, place], color="C0" if difference.better else "gray")
                axis.plot([difference.mean], [place], "o", color="C0" if difference.better else "gray")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(title=title, xlabel=f"test MRR − that of {BASELINE}", yticks=list(places))
            axis.set_yticklabels([row.method for row, _ in found], fontsize="small")
            axis.set_ylim(len(found) - 0.5, -0.5)

    plots.save(path, draw, len(panels))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="output of dhns-fast grid, or a results file"
    )
    parser.add_argument("--name", default="does-it-help", help="of results, table and chart")
    options = parser.parse_args()
    try:
        cells = [cell for folder in options.folders for cell in cells_of(folder)]
        rows = rows_of(cells)
    except DhnsError as error:
        print(f"does_it_help: {error}", file=sys.stderr)
        return 2
    defaults = TrainConfig().to_dict()
    stored = [
        {
            "data": Path(cell["config"]["data"]).name,
            "options": {k: v for k, v in cell["config"].items() if k != "data" and v != defaults[k]},
            "result": cell["result"],
            "provenance": cell["provenance"],
        }
        for cell in cells
    ]
    files.write_json(
        ROOT / "bench" / "results" / f"{options.name}.json", {"table": grid.markdown(rows, BASELINE), "cells": stored}
    )
    chart(rows, ROOT / "docs" / "img" / f"{options.name}.png")
    print("\n".join(grid.markdown(rows, BASELINE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
