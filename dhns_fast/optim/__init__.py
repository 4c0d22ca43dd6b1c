"""Row-wise optimisers and the tables that they train: what a step does not touch costs nothing."""

from __future__ import annotations

from dhns_fast.optim.dense import LightAdagrad, LightAdam
from dhns_fast.optim.host import HostEmbedding
from dhns_fast.optim.rows import (
    ROW_OPTIMIZERS,
    LazyAdam,
    RowAdagrad,
    RowEmbedding,
    RowOptimizer,
    RowwiseAdagrad,
    Together,
    optimizer_for,
    row_optimizer,
)
from dhns_fast.optim.sharded import ShardedEmbedding

__all__ = [
    "ROW_OPTIMIZERS",
    "HostEmbedding",
    "LazyAdam",
    "LightAdagrad",
    "LightAdam",
    "RowAdagrad",
    "RowEmbedding",
    "RowOptimizer",
    "RowwiseAdagrad",
    "ShardedEmbedding",
    "Together",
    "optimizer_for",
    "row_optimizer",
]
