"""Training: configuration, trainer, checkpoints, run folders, comparisons."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhns_fast.train.assemble import Run, build, prepare_graph
    from dhns_fast.train.config import TrainConfig
    from dhns_fast.train.run import load_run
    from dhns_fast.train.trainer import Diverged, Interrupted, Trainer

__all__ = ["Diverged", "Interrupted", "Run", "TrainConfig", "Trainer", "build", "load_run", "prepare_graph"]
_HOME = {
    "TrainConfig": "config",
    "Run": "assemble",
    "build": "assemble",
    "prepare_graph": "assemble",
    "load_run": "run",
}


def __getattr__(name: str) -> Any:
    # The trainer imports torch; the command line reads options, and refuses bad ones, without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'trainer')}"), name)
