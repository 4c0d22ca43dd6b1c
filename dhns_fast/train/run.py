"""A training run on disk: one folder with its configuration, checkpoints, metrics and plots."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dhns_fast
from dhns_fast.data import KnowledgeGraph
from dhns_fast.data.tsv import make_folder
from dhns_fast.errors import DataError, InputError
from dhns_fast.ranking import RankingResult, RelationFrequency, evaluate
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.trainer import Epoch, Progress, Trainer, prepare_graph

# Counts of the relation-frequency baseline are a dense [E, R] table a side; above this it would not be a cheap baseline any more.
BASELINE_CELLS = 1 << 27


@dataclasses.dataclass
class Report:
    """What a finished run has to say.

    Attributes:
        results: evaluation on test by row name: the trained model, the same model untrained, and the relation-frequency baseline.
        progress: best validation and history.
        seconds: of training, without the evaluations that follow it.
    """

    results: dict[str, RankingResult]
    progress: Progress
    seconds: float


def new_folder(output: str | None, config: TrainConfig) -> Path:
    """The folder of a new run: `output`, or the first free name under runs/.

    Raises:
        InputError: `output` exists and is not empty, or cannot be made.
    """
    if output is not None:
        folder = Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            holds_run = (folder / "config.yaml").exists()
            kind = "holds a run" if holds_run else "is not empty" if folder.is_dir() else "is a file"
            raise InputError(f"output {output!r} {kind}; give a new folder{f', or --resume {output} to continue the run' * holds_run}")
    else:
        name = f"{Path(config.data).name}-{config.model}-{config.method}-seed{config.seed}"
        candidates = (Path("runs", name + ("" if i == 1 else f"-{i}")) for i in range(1, 1_000_000))
        folder = next(c for c in candidates if not c.exists())
    make_folder(folder)
    return folder


def open_run(folder: Path) -> Trainer:
    """The trainer of a run folder with the weights of its best validation, for evaluation and prediction.

    Raises:
        DataError: the folder is no run, is unfinished, or its graph has changed.
    """
    config = TrainConfig.load(config_path(folder))
    trainer = Trainer(config, prepare_graph(config)[0], folder)
    trainer.load_best()
    return trainer


def config_path(folder: Path) -> Path:
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(folder, "not a run folder (it holds no config.yaml)")
    return path


def train(
    trainer: Trainer,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Report:
    """Train, evaluate on test beside the baselines, and write metrics into the trainer's folder."""
    folder, kg, config = trainer.folder, trainer.kg, trainer.config
    if folder is not None:
        config.save(folder / "config.yaml")
    begin = time.perf_counter()
    progress = trainer.fit(on_step, on_epoch)
    seconds = time.perf_counter() - begin
    results = {}
    if len(kg.test):
        results["trained"] = trainer.validate("test")
        results |= baselines(config, kg)
    report = Report(results, progress, seconds)
    if folder is not None:
        write_rows(folder / "history.csv", progress.history)
        write_rows(folder / "metrics.csv", [{"model": name, **result} for name, result in results.items()])
        write_json(folder / "metrics.json", summary(trainer, report))
    return report


def baselines(config: TrainConfig, kg: KnowledgeGraph) -> dict[str, RankingResult]:
    """What a model has to beat: itself untrained, and entities ranked by how often they answer the relation in train."""
    out = {"untrained": evaluate(Trainer(dataclasses.replace(config, method="uniform"), kg).model, kg)}
    if kg.num_entities * kg.num_relations <= BASELINE_CELLS:
        out["relation frequency"] = evaluate(RelationFrequency(kg), kg)
    return out


def summary(trainer: Trainer, report: Report) -> dict[str, Any]:
    """Everything of a run that fits in JSON: metrics on test, validation, baselines, versions."""
    kg, progress = trainer.kg, report.progress
    out: dict[str, Any] = {
        "graph": {"name": kg.name, "entities": kg.num_entities, "relations": kg.num_relations, "report": kg.report.lines()},
        "best_epoch": progress.best_epoch,
        "best_valid_mrr": progress.best_mrr if progress.best_mrr >= 0 else None,
        "epochs": progress.epoch,
        "training_seconds": round(report.seconds, 3),
        "versions": {"dhns_fast": dhns_fast.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(trainer.device),
    }
    if trainer.generator is not None:
        # Factors of γ, of the levels that count in their order.
        out["margins"] = trainer.margins().tolist()
    for name, result in report.results.items():
        out[name] = {"test": dict(result), "openke": result.openke()}
    if "trained" in report.results:
        result = report.results["trained"]
        out["trained"]["by_category"] = {name: dict(part) for name, part in result.per_category().items()}
        out["trained"]["by_relation"] = {name: {"triples": len(p.triples), "mrr": p["mrr"]} for name, p in result.per_relation().items()}
        if result.unseen.any():
            unseen, seen = result.select(result.unseen), result.select(~result.unseen)
            out["trained"]["entities_unseen_in_train"] = {"triples": len(unseen.triples), "mrr": unseen["mrr"]}
            out["trained"]["entities_seen_in_train"] = {"triples": len(seen.triples), "mrr": seen["mrr"]}
    return out


def write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file with a column for every key that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
