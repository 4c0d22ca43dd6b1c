"""Text files of ids and names: what the readers of every format share."""

from __future__ import annotations

from pathlib import Path

from dhns_fast.errors import DataError


def read_text(path: Path) -> str:
    """The file's text, lines ended by "\\n", without blank lines at the end. DataError: missing, empty, or not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(path, "is empty (0 bytes); an empty list is written as a line without content, or as the count 0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(path, f"found the byte 0x{data[error.start]:02x}; accepted: text in UTF-8", line) from None
    return text.replace("\r\n", "\n").rstrip("\n")


def numbered(text: str) -> list[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank."""
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def integer(path: Path, line: int, text: str, what: str) -> int:
    """The integer that `text` spells in ASCII digits, or DataError."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()):
        raise DataError(path, f"found {shown(text)} as {what}; accepted: an integer", line)
    return int(text)


def shown(text: str) -> str:
    """`text` quoted, shortened where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def counted(path: Path, what: str, row: str) -> list[tuple[int, str]]:
    """The rows below a count line, checked against the count."""
    rows = numbered(read_text(path))
    accepted = f"accepted: the number of {what} alone on the first line, then lines `{row}`"
    if not rows:
        raise DataError(path, f"found blank lines only; {accepted}", 1)
    line, first = rows[0]
    if len(first.split()) != 1:
        raise DataError(path, f"the count is missing: found {shown(first)}; {accepted}", line)
    count = integer(path, line, first.strip(), "the count")
    if count != len(rows) - 1:
        raise DataError(path, f"the count is {count}, but {len(rows) - 1} lines follow; {accepted}", line)
    return rows[1:]


def names_by_id(path: Path, rows: list[tuple[int, str, str]], what: str) -> list[str]:
    """Names in the order of their ids, from rows (line, id, name): ids 0 to n - 1 once each, names not empty and distinct."""
    names = [name for _, _, name in rows]
    text = "".join(digits for _, digits, _ in rows)
    if text.isascii() and text.isdigit() and "" not in names and len(set(names)) == len(names):
        by_id = {int(digits or -1): name for _, digits, name in rows}
        if all(map(by_id.__contains__, range(len(names)))):
            return [by_id[i] for i in range(len(names))]
    # Something is wrong: row by row, for the line at fault.
    seen: dict[int | str, int] = {}
    for line, digits, name in rows:
        number = integer(path, line, digits, f"the id of {what}")
        if not 0 <= number < len(rows):
            raise DataError(path, f"found id {number}; accepted: 0 to {len(rows) - 1}, one for each of the {len(rows)} lines", line)
        if not name:
            raise DataError(path, f"found an empty name for id {number}; accepted: a name of at least one character", line)
        for kind, value in (("id", number), ("name", name)):
            if value in seen:
                raise DataError(
                    path, f"{kind} {shown(name) if kind == 'name' else number} is also on line {seen[value]}; accepted: each once", line
                )
            seen[value] = line
        names[number] = name
    if not names:
        raise DataError(path, f"holds no {what}; accepted: at least one")
    return names
