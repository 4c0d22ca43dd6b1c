"""How time and memory of training grow with the number of entities: `bench/scale.py` at some sizes, each in a process
of its own, and the chart of docs/scale.md.

    python bench/growth.py --entities 1e4,1e5,1e6 --optimisers rowwise-adagrad,lazy-adam,adam

Times are processor time: on a busy machine the wall's say how busy it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dhns_fast import plots

ROOT = Path(__file__).resolve().parents[1]
TRIPLES, STEPS = 5, 30  # triples an entity; steps, whose median counts


def measured(entities: float, optimiser: str) -> dict[str, Any]:
    """What `bench/scale.py` reports."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [sys.executable, ROOT / "bench" / "scale.py", "--entities", f"{entities:g}", "--triples", f"{TRIPLES * entities:g}",
                   "--optimiser", optimiser, "--steps", f"{STEPS}", "--batch-size", "1024", "--evaluate", "0", "--output", output]  # fmt: skip
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(output.read_text())
    return report


def draw(axes: Any, found: dict[str, dict[float, dict[str, Any]]]) -> None:
    time, memory = axes
    for optimiser, reports in found.items():
        sizes = list(reports)
        time.plot(
            sizes, [r["training"]["median_cpu_us_a_triple"] for r in reports.values()], marker="o", label=optimiser
        )
        (line,) = memory.plot(
            sizes, [r["training"]["resident_mb"] for r in reports.values()], marker="o", label=f"{optimiser}, resident"
        )
        memory.plot(
            sizes,
            [r["planned_mb"]["total"] for r in reports.values()],
            linestyle=":",
            color=line.get_color(),
            label=f"{optimiser}, planned",
        )
    time.set(xlabel="entities", ylabel="µs a triple (processor)", xscale="log", yscale="log", title="Time of training")
    memory.set(xlabel="entities", ylabel="MB", xscale="log", yscale="log", title="Memory of training")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entities", default="1e4,1e5,1e6")
    parser.add_argument("--optimisers", default="rowwise-adagrad,lazy-adam,adam")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "img" / "scale-growth-cpu.png")
    options = parser.parse_args()
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for optimiser in options.optimisers.split(","):
        for entities in map(float, options.entities.split(",")):
            report = found.setdefault(optimiser, {})[entities] = measured(entities, optimiser)
            print(
                f"{optimiser} {entities:g}: {report['training']['median_cpu_us_a_triple']} us a triple, resident "
                f"{report['training']['resident_mb']} MB, at most {report['training']['peak_mb']}, planned "
                f"{report['planned_mb']}",
                flush=True,
            )
    plots.save(options.image, lambda axes: draw(axes, found), 2)


if __name__ == "__main__":
    main()
