"""The exceptions that mean "bad input": the command line turns them into one line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Characters of a message.
LONGEST = 1600


class DhnsError(Exception):
    """Base of the errors that dhns_fast raises on purpose."""


class InputError(DhnsError, ValueError):
    """An argument or an option is not acceptable. `str()` is `argument: got GOT; accepted: ACCEPTED`, the one form of
    every refusal.

    Args:
        argument: its name, as the caller wrote it.
        got: what was given, as a short text; a value is shown by `repr`, cut where it is long, a tensor by its dtype
            and shape.
        accepted: what would have been acceptable.
    """

    def __init__(self, argument: str, got: object, accepted: str) -> None:
        self.argument, self.got, self.accepted = argument, shown(got), accepted
        super().__init__(_cut(f"{argument}: got {self.got}; accepted: {accepted}"))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, Shown(self.got), self.accepted)


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
        self.path, self.message, self.line = Path(path), message, line
        self.argument, self.got, self.accepted = str(path), Shown(message), ""
        ValueError.__init__(self, _cut(printable(f"{path}{'' if line is None else f':{line}'}: {message}")))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.message, self.line)


class BackendUnavailableError(DhnsError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def _cut(message: str) -> str:
    """A message that fits on a screen: a line of a file may have any length, and what is wrong stands before and after
    it.
    """
    if len(message) <= LONGEST:
        return message
    return f"{message[: LONGEST // 2]} … ({len(message)} characters) … {message[-LONGEST // 4 :]}"


class Shown(str):
    """A text that `shown` leaves as it is: words about a value in place of the value."""


def shown(value: object) -> Shown:
    """A value on one line of a message: at most 100 characters, control characters escaped, a tensor as its dtype and
    shape.
    """
    if isinstance(value, Shown):
        return Shown(printable(value))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return Shown(f"{value.dtype} {list(value.shape)}")
    text = printable(repr(value))
    return Shown(text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: bytes of a path that are none are halves of surrogate pairs in Python."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey: control and formatting characters (bidirectional ones too)
    become escapes.
    """
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    )
