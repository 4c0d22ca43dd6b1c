"""Training: configuration, trainer, checkpoints, run folders, comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhns_fast.train.config import TrainConfig
    from dhns_fast.train.trainer import Diverged, Interrupted, Trainer, prepare_graph

__all__ = ["Diverged", "Interrupted", "TrainConfig", "Trainer", "prepare_graph"]


def __getattr__(name: str) -> Any:
    # The trainer imports torch; the command line reads options, and refuses bad ones, without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{'config' if name == 'TrainConfig' else 'trainer'}"), name)
