"""The exceptions that mean "bad input": the command line turns them into one line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path


class DhnsError(Exception):
    """Base of the errors that dhns_fast raises on purpose."""


class InputError(DhnsError, ValueError):
    """An argument or an option is not acceptable; the message names it, what was given and what is accepted."""


class NotFiniteError(InputError):
    """NaN or infinity where a finite number is needed; the message names the argument and the position."""


class DataError(InputError):
    """A file is not acceptable. `str()` is `path: message`, or `path:line: message` where a line is at fault.

    Args:
        path: the file as the user named it.
        message: what was found and what is accepted.
        line: 1-based line number, or None when the file as a whole is at fault.
    """

    def __init__(self, path: str | Path, message: str, line: int | None = None) -> None:
        self.path, self.line = Path(path), line
        super().__init__(f"{path}{'' if line is None else f':{line}'}: {message}")


class BackendUnavailableError(DhnsError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
