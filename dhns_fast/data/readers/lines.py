"""Text files, read in blocks of whole lines: what the readers of every layout share.

A name is what stands between two tabs, blanks included, in every layout. Lines end in "\\n" or "\\r\\n".
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dhns_fast.errors import DataError, printable

# Bytes of text looked at together: what reading takes beside its result.
BLOCK = 1 << 22
# Bytes that a line may take: what has no ends of lines is no text, however large.
LONGEST = 1 << 24
# A compressed text may grow by this factor once it is longer than ROOM; text of triples grows by 3 to 20.
GROWTH, ROOM = 200, 1 << 26
# Digits of an integer that is looked at; Python itself refuses beyond 4300.
DIGITS = 18
GZ = ".gz"
_LONG = re.compile(rb"\d{%d}" % (DIGITS + 1))


def plain_suffix(path: Path) -> str:
    """The last suffix in lower case, without `.gz`: `.tsv` of `train.TSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return (
        next((suffix for suffix in reversed(suffixes) if suffix != GZ), "")
        if suffixes and suffixes[-1] == GZ
        else path.suffix.lower()
    )


def blocks(path: Path, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, some whole lines, each ended by "\\n") until the end of a file; `.gz` is unpacked on
    the way.

    Raises:
        DataError: missing, unreadable, empty, or damaged.
    """
    try:
        stored = path.stat().st_size
        with path.open("rb") as raw:
            file: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == GZ else raw
            line, total, rest = 1, 0, b""
            while data := file.read(size or BLOCK):
                if not total and data.startswith(b"\xef\xbb\xbf"):
                    data = data[3:]
                total += len(data)
                if file is not raw and total > ROOM and total > GROWTH * stored:
                    raise DataError(
                        path,
                        f"unpacks to more than {GROWTH} times its {stored} bytes; accepted: text that was compressed as it is",
                    )
                data = rest + data
                end = data.rfind(b"\n") + 1
                rest = data[end:]
                if len(rest) > LONGEST:
                    at = line + data.count(b"\n")
                    raise DataError(path, f"found a line of more than {LONGEST} bytes; accepted: triples or names", at)
                if end:
                    lines = data[:end].replace(b"\r\n", b"\n")
                    yield line, lines
                    line += lines.count(b"\n")
            if not total:
                raise DataError(
                    path, "is empty (0 bytes); an empty list is written as a line without content, or as the count 0"
                )
            if rest:
                yield line, rest.removesuffix(b"\r") + b"\n"
    except DataError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, f"cannot be read as {GZ}: {printable(str(error))}") from None
    except (OSError, ValueError) as error:  # ValueError: a path that holds a zero byte
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    """What to say of a file or folder that the system does not let us read."""
    return DataError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")


def decoded(path: Path, line: int, data: bytes) -> str:
    """Text of some lines, the first of which is `line`; DataError where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        hint = "; this looks like UTF-16" if line == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(path, f"found the byte 0x{data[error.start]:02x}; accepted: text in UTF-8{hint}", at) from None


def rows(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that hold more than blanks."""
    for first, data in blocks(path):
        yield from numbered(first, decoded(path, first, data))


def numbered(first: int, text: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of the lines of a text that hold more than blanks; tabs count as content."""
    for line, row in enumerate(text.split("\n"), first):
        if row.strip(" "):
            yield line, row


class Table:
    """The lines of a file as `csv.reader` takes them, decoded; `line` is the number of the last one."""

    def __init__(self, path: Path) -> None:
        self.line = 0
        self._rows = (
            (line, row)
            for first, data in blocks(path)
            for line, row in enumerate(decoded(path, first, data).removesuffix("\n").split("\n"), first)
        )

    def __iter__(self) -> Iterator[str]:
        for line, row in self._rows:
            self.line = line
            yield row + "\n"


def integer(path: Path, line: int, text: str, what: str) -> int:
    """The integer that `text` spells in ASCII digits, or DataError."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()):
        raise DataError(path, f"found {shown(text)} as {what}; accepted: an integer", line)
    if len(digits.lstrip("0")) > DIGITS + 2:
        raise DataError(
            path, f"found a number of {len(digits)} digits as {what}; accepted: an integer of at most {DIGITS}", line
        )
    return int(text)


def shown(text: str) -> str:
    """`text` quoted, shortened where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def ids(data: bytes) -> np.ndarray | None:
    """int64 [n, 3] of lines of three ASCII integers between blanks and tabs, blank lines left out; None where anything
    else is found.

    Looks at the bytes as a whole: some 20 million numbers a second.
    """
    if data.translate(None, b"0123456789 \t\n") or _LONG.search(data):
        return None
    text = np.frombuffer(data, np.uint8)
    blank = text <= 32
    begins = ~blank
    begins[1:] &= blank[:-1]
    line_of = np.cumsum(text == 10, dtype=np.int32)[begins]
    if not np.isin(np.bincount(line_of), (0, 3)).all():
        return None
    numbers = np.fromstring(data, np.int64, sep=" ") if len(line_of) else np.empty(0, np.int64)
    return numbers.reshape(-1, 3) if len(numbers) == len(line_of) else None


def by_id(path: Path, table: Iterable[tuple[int, str, str]], what: str) -> list[str]:
    """Names in the order of their ids, from (line, id, name): ids 0 to n - 1 once each, names not empty and
    distinct.
    """
    table = list(table)
    names = [name for _, _, name in table]
    text = "".join(digits for _, digits, _ in table)
    if text.isascii() and text.isdigit() and all(map(str.strip, names)) and len(set(names)) == len(names):
        found = {int(digits[:20] or -1): name for _, digits, name in table}
        if all(map(found.__contains__, range(len(names)))):
            return [found[i] for i in range(len(names))]
    # Something is wrong: row by row, for the line at fault.
    seen: dict[int | str, int] = {}
    for line, digits, name in table:
        number = integer(path, line, digits, f"the id of {what}")
        if not 0 <= number < len(table):
            raise DataError(
                path,
                f"found id {number}; accepted: 0 to {len(table) - 1}, one for each of the {len(table)} lines",
                line,
            )
        if not name.strip():
            raise DataError(
                path, f"found an empty name for id {number}; accepted: a name of at least one character", line
            )
        for kind, value in (("id", number), ("name", name)):
            if value in seen:
                shape = shown(name) if kind == "name" else number
                raise DataError(path, f"{kind} {shape} is also on line {seen[value]}; accepted: each once", line)
            seen[value] = line
        names[number] = name
    if not names:
        raise DataError(path, f"holds no {what}; accepted: at least one")
    return names
