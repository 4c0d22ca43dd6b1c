"""Checkpoints without pickle: every tensor of a run in one safetensors file, everything else as JSON in its header, a
checksum over both.
"""

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
UNFIT = "its weights do not fit the model that the configuration describes"
# What the library raises where a file is damaged.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError)
Record = TypeVar("Record")


@dataclasses.dataclass
class Best:
    """Which epoch `best.safetensors` holds, and its realistic MRR on validation (−1 without one)."""

    best_epoch: int
    best_mrr: float


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able `meta`; the file appears whole or not at all.

    Raises:
        WriteError: it cannot be written; an earlier file of this name is unchanged.
    """
    files.write_tensors(path, tensors, {HEADER: json.dumps(meta)})


def load(path: Path, graph: Mapping[str, str] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of a checkpoint.

    Args:
        path: the file.
        graph: fingerprint of the graph that it must have been trained on,
            :meth:`dhns_fast.data.KnowledgeGraph.fingerprint`; None: any.

    Raises:
        DataError: the file is missing, damaged, no checkpoint of this package, or of another graph; the message says
            what differs.
    """
    if not path.is_file():
        raise DataError(path, "no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the handle is no mapping
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    if HEADER not in header or files.CHECKSUM not in header:
        raise DataError(path, "not a checkpoint of dhns_fast (its header says nothing of one, or has no checksum)")
    if files.checksum(tensors, header) != header[files.CHECKSUM]:
        raise DataError(path, "damaged: its content does not have the checksum that its header names")
    meta = _mapping(path, header[HEADER])
    if graph is not None:
        refuse_other_graph(path, meta.get("graph"), graph)
    return tensors, meta


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors, from its header alone.

    Raises:
        DataError: the file is missing or no such file.
    """
    if not path.is_file():
        raise DataError(path, "no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: BaseException) -> DataError:
    """What to say of a checkpoint of which its library makes nothing."""
    return DataError(path, f"not a readable checkpoint ({' '.join(str(error).split())[:200]})")


def refuse_other_graph(path: Path, trained_on: Any, graph: Mapping[str, str]) -> None:
    """DataError where a checkpoint is of another graph; the message says what differs."""
    if not isinstance(trained_on, dict):
        raise DataError(path, "its header does not say which graph it was trained on")
    differing = [part for part in {**trained_on, **graph} if trained_on.get(part) != graph.get(part)]
    if not differing and list(trained_on) != list(graph):
        # Weights of modalities are numbered in their order.
        differing = ["the order of modalities"]
    if differing:
        raise DataError(
            path, f"was trained on another graph than the data is now; what differs: {', '.join(differing)}"
        )


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise DataError(path, "not a checkpoint of dhns_fast (its header holds no JSON object)")
    return meta


def record(path: Path, kind: type[Record], values: Any) -> Record:
    """A dataclass of numbers and of rows of numbers, as a header tells it. Integers are at least 0, other numbers
    finite.

    Raises:
        DataError: a value is missing, unknown, of another type, or out of range.
    """
    if not isinstance(values, dict):
        raise DataError(path, f"its {kind.__name__.lower()} is {type(values).__name__}; accepted: an object")
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if wrong := sorted(fields.keys() ^ values.keys()):
        raise DataError(
            path,
            f"its {kind.__name__.lower()} has not the fields {', '.join(fields)}, but differs in {', '.join(wrong)}",
        )
    for name, hint in fields.items():
        if not _fits(hint, values[name]):
            raise DataError(
                path, f"its {kind.__name__.lower()} has {name} {values[name]!r:.100}; accepted: {_ACCEPTED[hint]}"
            )
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
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(_fits("float", x) for x in row.values()) for row in value
    )


def best(path: Path, meta: Mapping[str, Any]) -> Best:
    """What a checkpoint of the best weights says of them; DataError where it says something else."""
    return record(path, Best, {name: meta.get(name) for name in ("best_epoch", "best_mrr")})


def flatten_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as tensors named prefix.<parameter index>.<state>."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{i}.{name}": torch.as_tensor(value) for i, values in state.items() for name, value in values.items()
    }


def optimizer_state(
    prefix: str,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    path: Path,
    parameters: object,
    parts: bool = False,
) -> dict[str, Any]:
    """What :func:`flatten_optimizer` took, for `load_state_dict`; the optimiser is left as it is.

    Args:
        prefix: of the optimiser's tensors.
        optimizer: of the same parameters.
        tensors: of a checkpoint.
        path: the checkpoint, for messages.
        parameters: the numbers of the parameters that had state when it was written (:func:`with_state`).
        parts: of several processes, which made state for all parameters to read it into.

    Raises:
        DataError: state is missing, superfluous, or of another shape or dtype than its parameter needs.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in of_prefix(prefix, tensors).items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or str(int(index)) != index or int(index) >= len(own):
            raise DataError(
                path, f"{prefix}.{key} belongs to no parameter of the model that the configuration describes"
            )
        state.setdefault(int(index), {})[name] = value
    if parameters != sorted(state) and not parts:
        raise DataError(
            path, f"{prefix} has the state of parameters {sorted(state)}; its header names {parameters!r:.100}"
        )
    for i, values in state.items():
        expected = _layout(optimizer, own[i])
        found = {name: (tuple(x.shape), x.dtype) for name, x in values.items()}
        if found != expected:
            shown = [f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in sorted(expected.items())]
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise DataError(
                path, f"{prefix}.{i} does not fit its parameter in {', '.join(wrong)}; accepted: {', '.join(shown)}"
            )
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def with_state(optimizer: torch.optim.Optimizer) -> list[int]:
    """Numbers of the parameters that an optimiser has state of: those that have had a gradient."""
    return sorted(optimizer.state_dict()["state"])


def _layout(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the state of a parameter: those it has already, or Adam's, which begins with its first
    gradient.
    """
    for part in getattr(optimizer, "optimizers", [optimizer]):
        if part.state.get(parameter):
            return {name: (tuple(x.shape), x.dtype) for name, x in part.state[parameter].items()}
    like = (tuple(parameter.shape), parameter.dtype)
    return {"step": ((), torch.float32), "exp_avg": like, "exp_avg_sq": like}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": x for name, x in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: x for name, x in tensors.items() if name.startswith(prefix + ".")}
