"""Checkpoints without pickle: every tensor of a run in one safetensors file, everything else as JSON in its header, a checksum over both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dhns_fast import files
from dhns_fast.errors import DataError

HEADER = "dhns_fast"
Record = TypeVar("Record")


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able `meta`; the file appears whole or not at all.

    Raises:
        WriteError: it cannot be written; an earlier file of this name is unchanged.
    """
    files.write_tensors(path, tensors, {HEADER: json.dumps(meta)})


def load(path: Path, graph: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of a checkpoint whose meta names `graph`.

    Raises:
        DataError: the file is missing, damaged, no checkpoint of this package, or of another graph.
    """
    if not path.is_file():
        raise DataError(path, "no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the handle is no mapping
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(path, f"not a readable checkpoint ({reason})") from None
    if HEADER not in header or files.CHECKSUM not in header:
        raise DataError(path, "not a checkpoint of dhns_fast (its header says nothing of one, or has no checksum)")
    if files.checksum(tensors, header) != header[files.CHECKSUM]:
        raise DataError(path, "damaged: its content does not have the checksum that its header names")
    meta = _mapping(path, header[HEADER])
    if meta.get("graph") != graph:
        raise DataError(path, "was trained on another graph than the data is now (triples, names or feature widths differ)")
    return tensors, meta


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise DataError(path, "not a checkpoint of dhns_fast (its header holds no JSON object)")
    return meta


def record(path: Path, kind: type[Record], values: Any) -> Record:
    """A dataclass of whole and real numbers and of rows of such, of what a header says.

    Whole numbers are at least 0, real ones finite; what the dataclass does not know, or lacks a default for, is refused.

    Raises:
        DataError: a value is missing, unknown, of another type, or out of range.
    """
    if not isinstance(values, dict):
        raise DataError(path, f"its {kind.__name__.lower()} is {type(values).__name__}; accepted: an object")
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if wrong := sorted(fields.keys() ^ values.keys()):
        raise DataError(path, f"its {kind.__name__.lower()} has not the fields {', '.join(fields)}, but differs in {', '.join(wrong)}")
    for name, hint in fields.items():
        if not _fits(hint, values[name]):
            raise DataError(path, f"its {kind.__name__.lower()} has {name} {values[name]!r:.100}; accepted: {_ACCEPTED[hint]}")
    return kind(**values)


_ACCEPTED = {
    "int": "integers of at least 0",
    "float": "finite numbers",
    "list[dict[str, float]]": "a list of objects whose values are numbers",
}


def _fits(hint: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint == "int":
        return number and isinstance(value, int) and value >= 0
    if hint == "float":
        return number and math.isfinite(value)
    # Losses of an epoch are finite, or training would have ended.
    return isinstance(value, list) and all(isinstance(row, dict) and all(_fits("float", x) for x in row.values()) for row in value)


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
