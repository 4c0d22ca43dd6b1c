"""Does it help? The same model trained with different negatives over several seeds; results are kept run by run, so a comparison can be continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from dhns_fast.data.tsv import make_folder
from dhns_fast.errors import DataError, InputError
from dhns_fast.models import MODELS
from dhns_fast.train.config import METHODS, TrainConfig
from dhns_fast.train.run import write_json, write_rows
from dhns_fast.train.trainer import Trainer, prepare_graph

METRICS = ("mrr", "hits@1", "hits@10")
RELEASE = "dhns-release"


@dataclasses.dataclass(frozen=True)
class Row:
    """Test metrics of one model and method, one value a seed, and mean seconds of an epoch."""

    model: str
    method: str
    values: dict[str, list[float]]
    seconds: float

    def text(self, metric: str) -> str:
        """`mean ± std`, the sample standard deviation over seeds (none for a single seed)."""
        values = self.values[metric]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"


def compare(
    base: TrainConfig,
    models: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    folder: Path,
    on_run: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train every model with every method and seed 0..seeds − 1, choose on validation, evaluate on test.

    Args:
        base: all other options. A margin given here holds for every model; None gives each its default.
        methods: of "uniform", "self-adversarial", "dhns", and "dhns-release" for behaviour release.
        folder: one JSON file a run, named by a digest of its options; those present are not trained again. `compare.csv` holds the table.
        on_run: called with a line after each run.

    Raises:
        InputError: an unknown model or method, no seed, or an option that does not go with one of them.
    """
    for what, given, accepted in (("models", models, tuple(MODELS)), ("methods", methods, (*METHODS, RELEASE))):
        if bad := [x for x in given if x not in accepted] or ([] if given else ["none"]):
            raise InputError(f"{what}: got {', '.join(bad)}; accepted are {', '.join(accepted)}")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    # Everything is checked before the first run, which may take hours.
    runs = {(m, how): [_variant(base, m, how, seed) for seed in range(seeds)] for m in models for how in methods}
    kg, _ = prepare_graph(base)
    if not len(kg.test):
        raise InputError(f"data: {kg.name} has no test triples to compare on")
    Trainer(runs[models[0], methods[0]][0], kg)
    make_folder(folder)
    rows = []
    for (model, method), variants in runs.items():
        results = [_one(config, folder, on_run) for config in variants]
        values = {metric: [result[metric] for result in results] for metric in METRICS}
        rows.append(Row(model, method, values, statistics.mean(result["epoch_seconds"] for result in results)))
    flat = [
        {"model": r.model, "method": r.method, "seed": s, "epoch_seconds": r.seconds, **{m: r.values[m][s] for m in METRICS}}
        for r in rows
        for s in range(seeds)
    ]
    write_rows(folder / "compare.csv", flat)
    return rows


def _variant(base: TrainConfig, model: str, method: str, seed: int) -> TrainConfig:
    options: dict[str, object] = {"model": model, "method": method, "seed": seed}
    if method == RELEASE:
        options |= {"method": "dhns", "behaviour": "release"}
    return dataclasses.replace(base, **options)  # type: ignore[arg-type]


def _one(config: TrainConfig, folder: Path, on_run: Callable[[str], None]) -> dict[str, float]:
    options = config.to_dict()
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{config.model}-{config.method}-{config.behaviour}-seed{config.seed}"
    path = folder / f"{name}-{digest}.json"
    if path.exists():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))["result"]
        except (ValueError, KeyError):
            raise DataError(path, "not a result of compare; remove it to train this run again") from None
        note = "kept"
    else:
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
        }
        write_json(path, {"result": result, "config": options})
        note = f"best epoch {result['best_epoch']} of {result['epochs']}"
    on_run(f"{name}: MRR {result['mrr']:.4f}, Hits@10 {result['hits@10']:.4f} ({note})")
    return result
