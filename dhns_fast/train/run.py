"""A training run on disk: one folder with its configuration, checkpoints, metrics and plots."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dhns_fast
from dhns_fast import files
from dhns_fast.data import KnowledgeGraph
from dhns_fast.data.load import located
from dhns_fast.errors import DataError, InputError, Shown
from dhns_fast.ops.ambient import plain
from dhns_fast.ops.build import ISA
from dhns_fast.ranking import RankingResult, RelationFrequency, evaluate
from dhns_fast.train import checkpoint, distributed
from dhns_fast.train.assemble import Run, build, prepare_graph, refuse_other_width, refuses_the_machine
from dhns_fast.train.card import card
from dhns_fast.train.config import DENSE_ENTITIES, TrainConfig
from dhns_fast.train.distributed import Processes
from dhns_fast.train.pack import load_packed
from dhns_fast.train.trainer import Epoch, Progress, Trainer

# Counts of the relation-frequency baseline are a dense [E, R] table a side; above this it would not be a cheap baseline
# any more.
BASELINE_CELLS = 1 << 27


@dataclasses.dataclass
class Report:
    """What a finished run has to say.

    Attributes:
        results: evaluation on test by row name: the trained model, the same model untrained, and the relation-frequency
            baseline.
        progress: best validation, history, and seconds of training without the evaluations that follow it.
    """

    results: dict[str, RankingResult]
    progress: Progress


def new_folder(output: str | None, config: TrainConfig, anew: bool = False) -> Path:
    """The folder of a new run: `output`, or the first free name under runs/. Who holds it
    (:func:`dhns_fast.files.owned`) asks :func:`refuse_used` once more.

    Args:
        anew: take a folder that holds a run without a checkpoint, left by processes that died before their first.

    Raises:
        InputError: `output` exists and is not empty, or cannot be made.
    """
    if output is not None:
        folder = files.expanded("output", output)
        if not anew:
            refuse_used(folder)
        files.make_folder(folder)
        return folder
    name = f"{Path(config.data).name}-{config.model}-{config.method}-seed{config.seed}"
    files.make_folder(Path("runs"))
    return next(path for i in range(1, 1_000_000) if _made(path := Path("runs", name + ("" if i == 1 else f"-{i}"))))


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(
            "folder", Shown(f"{str(folder)!r}, which cannot be created ({error.strerror})"), "a folder that can be"
        ) from None
    return True


def refuse_used(folder: Path) -> None:
    """InputError where the folder of a new run holds something already."""
    if folder.exists() and (not folder.is_dir() or any(path.name != files.LOCK for path in folder.iterdir())):
        holds_run = (folder / "config.yaml").exists()
        kind = "which holds a run" if holds_run else "which is not empty" if folder.is_dir() else "a file"
        hint = f"; --resume {folder} continues the run" * holds_run
        raise InputError("output", Shown(f"{str(folder)!r}, {kind}"), f"a new folder{hint}")


@plain()
def load_run(
    path: str | Path, data: str | None = None, device: str = "auto", processes: Processes | None = None
) -> Run:
    """A run's model with the weights of its best validation, its generator and its graph; no optimisers.

    Args:
        path: the run's folder, or a file that `dhns-fast pack` made of it, which has the graph inside.
        data: where the graph is now, when it has moved since; it must be the same graph.
        device: where to put the model; the run may have been trained elsewhere.
        processes: those that load it together, each its part of the entity table; None: this one alone. Their number is
            no matter of how many have trained.

    Raises:
        DataError: the folder is no run, is unfinished, or its graph has changed.
        InputError: there is no such device here.
    """
    folder = files.expanded("path", path)
    if folder.is_file():
        if data is not None:
            raise InputError("data", data, f"nothing: {folder} is a packed run, which has its graph inside")
        return load_packed(folder, device)
    config = TrainConfig.load(config_path(folder), **({} if data is None else {"data": data})).read_on(device)
    if data is None and Path(config.data).is_absolute() and not Path(config.data).exists():
        found = Shown(f"{config.data!r}, where training found it and where nothing is now")
        raise InputError("data", found, "--data PATH (data= in Python), where the graph is now")
    kg, _ = prepare_graph(config)
    if not distributed.exists(folder, "best"):
        path = folder / "best.safetensors"
        refuse_other_width(path, config, kg, checkpoint.shapes(path))
    try:
        run = build(config, kg, processes, training=False)
    except InputError as error:
        if refuses_the_machine(error):
            raise
        # Options that each may have, and that no model has together.
        raise DataError(config_path(folder), str(error)) from None
    meta = run.load_weights(folder, "best")
    best = checkpoint.best(folder, meta)
    run.folder, run.best_epoch, run.best_mrr = folder, best.best_epoch, best.best_mrr
    return run


def config_path(folder: Path) -> Path:
    path = folder / "config.yaml"
    if not folder.exists():
        raise DataError(folder, "does not exist; accepted: the folder of a run, or a file that `dhns-fast pack` made")
    if not path.is_file():
        raise DataError(folder, "not a run folder (it holds no config.yaml)")
    return path


def train(
    trainer: Trainer,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Report:
    """Train, evaluate on test beside the baselines, and write metrics into the trainer's folder.

    Raises:
        InputError: another process writes to the folder.
    """
    folder = trainer.folder
    if folder is None or not trainer.processes.first:
        return _train(trainer, on_step, on_epoch)
    with files.owned(folder):
        # A run may be read from elsewhere: where the data is does not depend on where training began.
        dataclasses.replace(trainer.config, data=located(trainer.config.data)).save(
            folder / "config.yaml", resolved(trainer)
        )
        if trainer.processes.group is None and not (folder / "last.safetensors").exists():
            # Killed before the first checkpoint, a run is continued like any other.
            trainer.save()
        report = _train(trainer, on_step, on_epoch)
        files.write_rows(folder / "history.csv", report.progress.history)
        files.write_rows(folder / "metrics.csv", [{"model": name, **result} for name, result in report.results.items()])
        said = summary(trainer, report)
        files.write_json(folder / "metrics.json", said)
        files.write_text(folder / "MODEL_CARD.md", card(trainer.config, trainer.kg, said, report.results))
    return report


def _train(
    trainer: Trainer, on_step: Callable[[Progress], None] | None, on_epoch: Callable[[Epoch], None] | None
) -> Report:
    progress = trainer.fit(on_step, on_epoch)
    results = {}
    if len(trainer.kg.test):
        results["trained"] = trainer.validate("test")
        if trainer.processes.count == 1:
            results |= baselines(trainer.config, trainer.kg)
    return Report(results, progress)


def resolved(trainer: Trainer) -> dict[str, object]:
    """What the options that were left to the program came to mean."""
    config, model = trainer.config, trainer.model
    return {
        "margin": model.margin,
        "fusion": model.fusion is not None and model.fusion.attend,
        "train_features": model.fusion is not None and any(x.requires_grad for x in model.fusion.features),
        "levels": config.level_list,
        "n3": config.n3_weight,
        "device": trainer.device,
        "cuda_graph": trainer.cuda_graph,
    }


def baselines(config: TrainConfig, kg: KnowledgeGraph) -> dict[str, RankingResult]:
    """What a model has to beat: itself untrained, and entities ranked by how often they answer the relation in
    train.
    """
    out = {}
    if kg.num_entities <= DENSE_ENTITIES:
        # Beyond, a second table beside the first is what memory was not planned for.
        out["untrained"] = build(config, kg, training=False).evaluate()
    if kg.num_entities * kg.num_relations <= BASELINE_CELLS:
        out["relation frequency"] = evaluate(RelationFrequency(kg), kg)
    return out


def summary(trainer: Trainer, report: Report) -> dict[str, Any]:
    """Everything of a run that fits in JSON: metrics on test, validation, baselines, versions."""
    kg, progress = trainer.kg, report.progress
    out: dict[str, Any] = {
        "graph": {
            "name": kg.name,
            "entities": kg.num_entities,
            "relations": kg.num_relations,
            "report": kg.report.lines(),
        },
        "best_epoch": progress.best_epoch,
        "best_valid_mrr": progress.best_mrr if progress.best_mrr >= 0 else None,
        "epochs": progress.epoch,
        "ended": "all epochs"
        if progress.epoch >= trainer.config.epochs
        else f"{progress.stale} validations without a better one",
        "training_seconds": round(progress.seconds, 3),
        "versions": versions(),
        "device": str(trainer.device),
        # What decides bits beside seed and versions (docs/determinism.md).
        "threads": torch.get_num_threads(),
        "instructions": os.environ.get(ISA) or torch.backends.cpu.get_cpu_capability(),
    }
    if trainer.generator is not None:
        # Factors of γ, of the levels that count in their order.
        out["margins"] = trainer.margins().tolist()
    for name, result in report.results.items():
        out[name] = {"test": dict(result), "openke": result.openke()}
    if "trained" in report.results:
        result = report.results["trained"]
        out["trained"]["by_category"] = {name: dict(part) for name, part in result.per_category().items()}
        out["trained"]["by_relation"] = {
            name: {"triples": len(p.triples), "mrr": p["mrr"]} for name, p in result.per_relation().items()
        }
        if result.unseen.any():
            unseen, seen = result.select(result.unseen), result.select(~result.unseen)
            out["trained"]["entities_unseen_in_train"] = {"triples": len(unseen.triples), "mrr": unseen["mrr"]}
            out["trained"]["entities_seen_in_train"] = {"triples": len(seen.triples), "mrr": seen["mrr"]}
    return out


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {"dhns_fast": dhns_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
