"""Checkpoints without pickle: every tensor of a run in one safetensors file, everything else as JSON in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dhns_fast.errors import DataError


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able `meta`; the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    owned = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    try:
        save_file(owned, temporary, metadata={"dhns_fast": json.dumps(meta)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, graph: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of a checkpoint whose meta names `graph`.

    Raises:
        DataError: the file is missing, damaged, no checkpoint of this package, or of another graph.
    """
    if not path.is_file():
        raise DataError(path, "no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("dhns_fast")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the handle is no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(path, f"not a readable checkpoint ({error})") from None
    if header is None:
        raise DataError(path, "not a checkpoint of dhns_fast (its header says nothing of one)")
    meta = json.loads(header)
    if meta["graph"] != graph:
        raise DataError(path, "was trained on another graph than the data is now (triples, names or feature widths differ)")
    return tensors, meta


def flatten_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as tensors named prefix.<parameter index>.<state>."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": torch.as_tensor(value) for i, values in state.items() for name, value in values.items()}


def restore_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`flatten_optimizer` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": x for name, x in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: x for name, x in tensors.items() if name.startswith(prefix + ".")}
