"""Does it help? Models × data sets × methods × seeds, trained alike; results are kept cell by cell, so that a grid can be continued.

`dhns-fast compare` is the grid of one data set, `dhns-fast grid` of several, within a budget of time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dhns_fast import checks, files
from dhns_fast.catalogue import METHODS, MODELS
from dhns_fast.errors import DataError, InputError
from dhns_fast.train.assemble import build, prepare_graph
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.trainer import Diverged, Trainer

METRICS = ("mrr", "hits@1", "hits@10")
RELEASE = "dhns-release"
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclasses.dataclass
class Row:
    """Test metrics of one model and method on one data set, by seed.

    Attributes:
        results: seed → metrics and `epoch_seconds`; seeds that found no time, or diverged, are missing.
    """

    data: str
    model: str
    method: str
    results: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def text(self, metric: str) -> str:
        """`mean ± std`, the sample standard deviation over seeds (none for a single seed); a dash where there is no result."""
        values = [result[metric] for result in self.results.values()]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}" if values else "–"

    @property
    def seconds(self) -> float | None:
        """Mean over seeds of the median seconds of an epoch."""
        return statistics.mean(result["epoch_seconds"] for result in self.results.values()) if self.results else None


def run_grid(
    base: TrainConfig,
    data: Sequence[str],
    models: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    folder: Path,
    budget: float | None = None,
    on_run: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train every model with every method on every data set and seeds 0..seeds − 1, choose on validation, evaluate on test.

    All cells of a seed come before those of the next, so that a budget leaves fewer seeds and not fewer rows. A cell is not begun when it would
    not end in time, going by what the row's other seeds took, or else by the longest cell so far.

    Args:
        base: all other options. A margin given here holds for every model; None gives each its default.
        data: embedded data sets or folders.
        methods: of "uniform", "self-adversarial", "dhns", and "dhns-release" for behaviour release.
        folder: one JSON file a cell, named by a digest of its options; those present are not trained again.
        budget: seconds for new cells; None for as long as it takes.
        on_run: called with a line after each cell, and for those left out.

    Raises:
        InputError: an unknown model or method, no seed, or an option that does not go with one of them.
    """
    for what, given, accepted in (("models", models, tuple(MODELS)), ("methods", methods, (*METHODS, RELEASE))):
        for name in given or [""]:
            checks.one_of(what, name, accepted)
    checks.whole("seeds", seeds, 1)
    # Everything is checked before the first run, which may take hours.
    rows = [Row(d, model, method) for d in data for model in models for method in methods]
    for row in rows:
        _variant(base, row, 0)
    for first in rows[:: len(models) * len(methods)]:
        config = _variant(base, first, 0)
        kg, _ = prepare_graph(config)
        if not len(kg.test):
            raise InputError("data", kg.name, "a graph with test triples to compare on")
        build(config, kg)
    files.make_folder(folder)
    begin, longest = time.monotonic(), 0.0
    for seed in range(seeds):
        for row in rows:
            config = _variant(base, row, seed)
            name, path = _cell(config, folder)
            result, note = _kept(path), "kept"
            if result is None:
                spent = max((r.get("seconds", 0.0) for r in row.results.values()), default=longest)
                if budget is not None and time.monotonic() - begin + spent > budget:
                    on_run(f"{name}: left out, no time")
                    continue
                try:
                    result = _train(config, path)
                except Diverged as error:
                    on_run(f"{name}: {error}")
                    continue
                longest = max(longest, result["seconds"])
                note = f"best epoch {result['best_epoch']} of {result['epochs']}"
            row.results[seed] = result
            on_run(f"{name}: MRR {result['mrr']:.4f}, Hits@10 {result['hits@10']:.4f} ({note})")
    return rows


def write_table(rows: Sequence[Row], path: Path) -> None:
    """CSV, a line a seed."""
    flat = [
        {"data": r.data, "model": r.model, "method": r.method, "seed": seed, **{key: result[key] for key in ("epoch_seconds", *METRICS)}}
        for r in rows
        for seed, result in r.results.items()
    ]
    files.write_rows(path, flat)


def seconds_of(text: str) -> float:
    """90, 90s, 30m or 2h in seconds.

    Raises:
        InputError: the text is nothing of that.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise InputError("budget", text, "a time such as 90s, 30m or 2h")
    return float(match[1]) * UNITS[match[2] or "s"]


def _variant(base: TrainConfig, row: Row, seed: int) -> TrainConfig:
    options: dict[str, object] = {"data": row.data, "model": row.model, "method": row.method, "seed": seed}
    if row.method == RELEASE:
        options |= {"method": "dhns", "behaviour": "release"}
    return dataclasses.replace(base, **options)  # type: ignore[arg-type]


def _cell(config: TrainConfig, folder: Path) -> tuple[str, Path]:
    """Name of a cell and where its result is kept."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    name = f"{config.model}-{config.method}-{config.behaviour}-seed{config.seed}"
    return name, folder / f"{name}-{digest}.json"


def _kept(path: Path) -> dict[str, float] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    except (ValueError, KeyError):
        raise DataError(path, "not a result of compare; remove it to train this run again") from None


def _train(config: TrainConfig, path: Path) -> dict[str, float]:
    begin = time.monotonic()
    kg, _ = prepare_graph(config)
    trainer = Trainer(config, kg)
    progress = trainer.fit()
    ranks = trainer.validate("test")
    result = {metric: ranks[metric] for metric in METRICS}
    result |= {
        "valid_mrr": progress.best_mrr,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "epoch_seconds": statistics.median(row["seconds"] for row in progress.history),
        "seconds": time.monotonic() - begin,
    }
    files.write_json(path, {"result": result, "config": config.to_dict()})
    return result
