"""Training: configuration, trainer, checkpoints, run folders."""

from dhns_fast.train.config import TrainConfig
from dhns_fast.train.trainer import Diverged, Interrupted, Trainer, prepare_graph

__all__ = ["Diverged", "Interrupted", "TrainConfig", "Trainer", "prepare_graph"]
