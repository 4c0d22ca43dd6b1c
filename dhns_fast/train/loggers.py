"""Where the figures of epochs go while a run trains: a protocol of two methods, and the two loggers that most people
ask for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dhns_fast import checks, files
from dhns_fast.catalogue import LOGGERS
from dhns_fast.errors import InputError


class Logger(Protocol):
    """Takes the row of every epoch: `seconds`, `loss_...`, and `valid_...` where it ended with a validation."""

    def log(self, epoch: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class CSVLogger:
    """A CSV file that is whole after every epoch.

    Args:
        path: the file.
        history: rows of earlier epochs, of a run that is continued.
    """

    def __init__(self, path: Path, history: Sequence[Mapping[str, float]] = ()) -> None:
        self.path, self.rows = path, list(history)

    def log(self, epoch: int, row: Mapping[str, float]) -> None:
        self.rows.append(row)
        files.write_rows(self.path, self.rows)

    def close(self) -> None:
        pass


class TensorBoardLogger:
    """Scalars for TensorBoard (`tensorboard --logdir FOLDER`), whose package it needs.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, epoch: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "epoch":
                group, _, rest = name.partition("_")
                self.writer.add_scalar(f"{group}/{rest}" if rest else name, value, epoch)

    def close(self) -> None:
        self.writer.close()


def chosen(text: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        InputError: no such logger, or the package of one is missing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        checks.one_of("log", name, LOGGERS)
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        raise InputError("log", "tensorboard", "csv here; tensorboard needs its package: pip install 'dhns-fast[log]'")
    return names


def make(names: Sequence[str], folder: Path, history: Sequence[Mapping[str, float]] = ()) -> list[Logger]:
    """The loggers of these names, which write into a run's folder; `history`: rows of earlier epochs."""
    return [
        CSVLogger(folder / "history.csv", history) if name == "csv" else TensorBoardLogger(folder / "events")
        for name in names
    ]
