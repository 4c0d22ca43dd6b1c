"""A run as one portable file: weights, options, the graph with names and features, and metrics, in safetensors. No
pickle, no folder, no data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhns_fast import files
from dhns_fast.data import KnowledgeGraph
from dhns_fast.errors import DataError, InputError, Shown
from dhns_fast.train import checkpoint
from dhns_fast.train.assemble import Run, build, refuse_other_width, refuses_the_machine
from dhns_fast.train.config import TrainConfig

# In the place of a graph's digest, which tells checkpoints of a folder that their graph has changed: here it is inside.
PACKED = {"packed": "with the run"}


def pack(run: Run, path: str | Path) -> Path:
    """Write a run, as :func:`dhns_fast.load_run` gives it, into a file that :func:`dhns_fast.load_run` reads.

    Raises:
        InputError: the path is a folder, or its folder cannot be made.
        WriteError: it cannot be written.
    """
    path, kg = files.expanded("output", path), run.graph
    if path.is_dir():
        raise InputError("output", Shown(f"{str(path)!r}, a folder"), "the name of a file")
    files.make_folder(path.parent)
    tensors = run.state() | {f"graph.{split}": triples for split, triples in kg.splits.items()}
    tensors |= {"graph.entity_names": _bytes(kg.entity_names), "graph.relation_names": _bytes(kg.relation_names)}
    for name, matrix in kg.features.items():
        tensors |= {f"features.{name}": matrix, f"present.{name}": kg.present[name]}
    meta = {
        "graph": PACKED,
        "name": kg.name,
        "features": list(kg.features),
        "config": run.config.to_dict(),
        "best_epoch": run.best_epoch,
        "best_mrr": run.best_mrr,
        "metrics": None if run.folder is None else _metrics(run.folder / "metrics.json"),
    }
    checkpoint.save(path, tensors, meta)
    return path


def load_packed(path: Path, device: str) -> Run:
    """The run in a file that :func:`pack` wrote.

    Raises:
        DataError: it is no such file, or damaged.
    """
    tensors, meta = checkpoint.load(path, None)
    if meta.get("graph") != PACKED:
        raise DataError(
            path, "a checkpoint without its graph; accepted: the run's folder, or a file of `dhns-fast pack`"
        )
    try:
        config = TrainConfig(**meta["config"]).read_on(device)
        features = {name: tensors[f"features.{name}"] for name in meta["features"]}
        kg = KnowledgeGraph(
            name=str(meta["name"]),
            train=tensors["graph.train"],
            valid=tensors["graph.valid"],
            test=tensors["graph.test"],
            entity_names=_texts(tensors["graph.entity_names"]),
            relation_names=_texts(tensors["graph.relation_names"]),
            features=features,
            present={name: tensors[f"present.{name}"] for name in features},
        )
        refuse_other_width(path, config, kg, {name: tuple(x.shape) for name, x in tensors.items()})
        run = build(config, kg, training=False)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError) and refuses_the_machine(error):
            raise
        raise DataError(path, f"not a packed run ({str(error)[:300]})") from None
    run.load_state(tensors, path)
    best = checkpoint.best(path, meta)
    run.best_epoch, run.best_mrr = best.best_epoch, best.best_mrr
    return run


def _metrics(path: Path) -> Any:
    """What a run folder's metrics.json holds, None where there is none yet.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"not the metrics of a run ({' '.join(str(error).split())[:200]})") from None


def _bytes(names: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(names), ensure_ascii=False).encode()), dtype=torch.uint8)


def _texts(data: Tensor) -> list[str]:
    return json.loads(data.numpy().tobytes())
