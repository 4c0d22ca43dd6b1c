"""Names of entities and relations that are no list: numbered ones, and text mapped into memory."""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from dhns_fast.errors import DataError


class Names(Sequence[str]):
    """Distinct names by id, made when they are asked for: 86 million strings would take 6 GB."""

    @abstractmethod
    def _name(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._name(place)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, name: object) -> bool:
        try:
            self.index(name)
        except ValueError:
            return False
        return True


class NumberedNames(Names):
    """`prefix` + id, for graphs that are made and not read."""

    def __init__(self, prefix: str, count: int) -> None:
        self.prefix, self.size = prefix, count

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"NumberedNames({self.prefix!r}, {self.size})"

    def _name(self, index: int) -> str:
        return f"{self.prefix}{index}"

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        digits = value[len(self.prefix) :] if isinstance(value, str) and value.startswith(self.prefix) else ""
        stop = self.size if stop is None else stop
        if not (
            digits.isascii()
            and digits.isdigit()
            and len(digits) < 20
            and str(int(digits)) == digits
            and start <= int(digits) < stop
        ):
            raise ValueError(f"{value!r} is not in the list")
        return int(digits)


class MappedNames(Names):
    """Names of a text file in UTF-8, one a line, mapped into memory; the file and the begins of its lines (int64 [n +
    1]) are written by `dhns_fast.data.convert`, which checks that names are distinct and not empty.
    """

    def __init__(self, path: Path, begins: np.ndarray) -> None:
        self.path, self.begins = path, begins
        with path.open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not len(begins) or begins[0] != 0 or begins[-1] != len(self._text):
            raise DataError(
                path,
                f"has {len(self._text)} bytes, its index says {begins[-1] if len(begins) else 0}; convert the graph again",
            )

    def __len__(self) -> int:
        return len(self.begins) - 1

    def _name(self, index: int) -> str:
        return self._lines(index, index + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 65536):
            last = min(first + 65536, len(self))
            yield from self._lines(first, last)

    def _lines(self, first: int, last: int) -> list[str]:
        try:
            found = self._text[self.begins[first] : self.begins[last]].decode().split("\n")
        except UnicodeDecodeError:
            found = []
        if len(found) != last - first + 1 or found[-1]:
            raise DataError(self.path, "is damaged: its lines are not those of its index; convert the graph again")
        return found[:-1]

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        wanted = value.encode("utf-8", "replace") + b"\n" if isinstance(value, str) and "\n" not in value else b""
        place = -1
        while wanted and (place := self._text.find(wanted, place + 1)) >= 0:
            found = int(np.searchsorted(self.begins, place))
            if (
                found < len(self)
                and self.begins[found] == place
                and start <= found < (len(self) if stop is None else stop)
            ):
                return found
        raise ValueError(f"{value!r} is not in the list")

    def __getstate__(self) -> tuple[Path, np.ndarray]:
        return self.path, self.begins

    def __setstate__(self, state: tuple[Path, np.ndarray]) -> None:
        self.__init__(*state)  # type: ignore[misc]
