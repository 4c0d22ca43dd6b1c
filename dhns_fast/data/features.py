"""Feature files: one matrix a modality, one row an entity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dhns_fast.errors import DataError

SUFFIXES = (".npy", ".npz", ".pth", ".pt", ".safetensors")


def find_features(folder: Path) -> dict[str, Path]:
    """Modality name to feature file of a folder, by name; DataError where two files have one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
            if path.stem in found:
                raise DataError(path, f"{found[path.stem].name} holds the modality {path.stem!r} too; accepted: one file a modality")
            found[path.stem] = path
    return found


def read_features(path: Path, num_entities: int) -> tuple[Tensor, Tensor]:
    """(features float32 [E, D_m], present bool [E]) of one modality. Without `present`, a row of zeros means that it is lacking.

    Raises:
        DataError: unreadable, no or several matrices, not numbers, wrong number of rows, NaN or infinity (first such row).
    """
    if path.suffix not in SUFFIXES:
        raise DataError(path, f"found the extension {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    try:
        content = _read(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # each library has its own zoo of exceptions for broken files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(path, f"cannot be read as {path.suffix}: {reason}") from error
    if not isinstance(content, dict):
        content = {"features": content}
    tensors = {key: torch.as_tensor(value) for key, value in content.items() if isinstance(value, (Tensor, np.ndarray)) and _numeric(value)}
    matrices = [key for key, value in tensors.items() if value.ndim == 2]
    key = next((key for key in ("features", "weight") if key in matrices), matrices[0] if len(matrices) == 1 else None)
    if key is None:
        shapes = ", ".join(
            f"{key} {tuple(getattr(value, 'shape', ()))} {getattr(value, 'dtype', type(value).__name__)}" for key, value in content.items()
        )
        raise DataError(
            path,
            f"found {shapes or 'nothing'}; accepted: one matrix of numbers [{num_entities}, D], named `features` where there are others",
        )
    matrix = tensors[key].detach().to(torch.float32)
    if len(matrix) != num_entities:
        raise DataError(path, f"found {len(matrix)} rows; accepted: {num_entities}, one an entity")
    bad = ~matrix.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        column = int((~matrix[row].isfinite()).int().argmax())
        raise DataError(path, f"row {row}, column {column} is {float(matrix[row, column])}; accepted: finite numbers of float32")
    present = tensors.get("present")
    if present is None:
        return matrix, (matrix != 0).any(1)
    if present.dtype != torch.bool or present.shape != (num_entities,):
        raise DataError(path, f"`present` is {present.dtype} of shape {tuple(present.shape)}; accepted: bool of shape ({num_entities},)")
    return matrix, present


def _numeric(value: Tensor | np.ndarray) -> bool:
    return not value.is_complex() if isinstance(value, Tensor) else value.dtype.kind in "fiub"


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pth", ".pt"):
        return torch.load(path, map_location="cpu", weights_only=True)
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        return dict(content)
