"""Runs of configs/ beside the figures that others published with those settings.

python bench/published.py RUN [RUN ...] --commit HASH [--cpu-seconds S ...]
    evaluates the best weights of run folders on test, also of runs that were stopped, and writes
    bench/results/published.json, where rows of other configurations and seeds stay; prints the table of
    docs/does-it-help.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dhns_fast
from dhns_fast import files
from dhns_fast.train import TrainConfig, checkpoint
from dhns_fast.train.run import versions

CONFIGS = Path(__file__).parents[1] / "configs"
OUTPUT = Path(__file__).parent / "results" / "published.json"
METRICS = ("mrr", "hits@1", "hits@3", "hits@10")
# What runs of one configuration may differ in and still be runs of it.
FREE = ("data", "seed", "epochs", "validate_every", "patience", "checkpoint_every", "backend", "device")
KBC = "README of github.com/facebookresearch/kbc"
KGEMB = "README of github.com/HazyResearch/KGEmb"


class Published(NamedTuple):
    """A figure, and who says so; metrics that they do not give are None."""

    source: str
    values: tuple[float | None, ...]


# By the configurations that reproduce them.
PUBLISHED = {
    "wn18rr-kbc-rank16": (Published(KBC, (0.42, 0.39, 0.42, 0.46)), Published(KGEMB, (0.407, None, None, 0.449))),
    "wn18rr-kbc": (Published(KBC, (0.49, 0.44, 0.50, 0.58)),),
    "fb15k-237-kbc": (Published(KBC, (0.36, 0.27, 0.40, 0.56)),),
    "codex-s-libkge-complex": (Published("README of github.com/tsafavi/codex", (0.465, 0.372, 0.504, 0.646)),),
    "wn18rr-libkge-complex": (Published("README of LibKGE", (0.475, 0.438, 0.490, 0.547)),),
}


def configuration_of(config: TrainConfig) -> str:
    """Name of the file in configs/ whose settings these are."""
    wanted = {name: value for name, value in config.to_dict().items() if name not in FREE}
    for name in PUBLISHED:
        given = TrainConfig.load(CONFIGS / f"{name}.yaml").to_dict()
        if {key: value for key, value in given.items() if key not in FREE} == wanted:
            return name
    raise SystemExit(f"settings of none of {', '.join(PUBLISHED)}: {wanted}")


def row(folder: Path, commit: str, cpu_seconds: float | None) -> dict[str, Any]:
    """What there is to say of one run."""
    run = dhns_fast.load_run(folder)
    name = configuration_of(run.config)
    result = run.evaluate("test")
    # That of the last weights, also where the run was stopped.
    epochs = checkpoint.load(folder / "last.safetensors", run.graph.fingerprint())[1]["progress"]["epoch"]
    return {
        "configuration": name,
        "command": f"dhns-fast train --config configs/{name}.yaml --seed {run.config.seed}",
        "commit": commit,
        "provenance": versions(),
        "seed": run.config.seed,
        "epochs": epochs,
        "best_epoch": run.best_epoch,
        "best_valid_mrr": run.best_mrr,
        "cpu_seconds": cpu_seconds,
        "test": {metric: result[metric] for metric in METRICS},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: a line for each published figure of a configuration that was run."""
    lines = [
        "| configuration, seed | epochs (best) | MRR, Hits@1, Hits@10 | published | difference of MRR | source |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        ours = [one["test"][metric] for metric in METRICS]
        for source, values in PUBLISHED[one["configuration"]]:
            theirs = ", ".join("–" if x is None else f"{x:g}" for x in (values[0], values[1], values[3]))
            assert values[0] is not None
            lines.append(
                f"| `{one['configuration']}`, {one['seed']} | {one['epochs']} ({one['best_epoch']}) | {ours[0]:.4f}, {ours[1]:.4f}, {ours[3]:.4f} "
                f"| {theirs} | {ours[0] - values[0]:+.4f} | {source} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--commit", required=True, help="of the code that trained")
    parser.add_argument("--cpu-seconds", nargs="*", type=float, default=[], help="that each run took, in their order")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    seconds = [*options.cpu_seconds, *[None] * len(options.runs)]
    rows = [row(folder, options.commit, taken) for folder, taken in zip(options.runs, seconds, strict=False)]
    kept = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    again = {(one["configuration"], one["seed"]) for one in rows}
    rows += [one for one in kept if (one["configuration"], one["seed"]) not in again]
    files.write_json(options.output, {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
