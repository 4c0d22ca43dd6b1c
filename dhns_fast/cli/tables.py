"""What commands print: notes and tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from dhns_fast.errors import printable

if TYPE_CHECKING:
    from dhns_fast.ranking import RankingResult

COLUMNS = {"MRR": "mrr", "Hits@1": "hits@1", "Hits@3": "hits@3", "Hits@10": "hits@10", "MR": "mr", "AMRI": "amri"}
# Of tables that do not go to a terminal: nothing is broken or cut in a file or a pipe.
WIDTH = 1 << 16
# Characters to which a column of text may shrink before a table changes its form.
LEAST = 8


def exact(value: Any) -> Any:
    """A value for a program: as it is, but on a terminal, where texts are shown escaped."""
    return printable(value) if isinstance(value, str) and sys.stdout.isatty() else value


class _Console(Console):
    """Prints texts as they are: "[...]" and ":...:" in names are no markup, and what a terminal would obey is shown
    escaped.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(x) if isinstance(x, str) else x for x in objects), **options)


def stdout() -> Console:
    """Where tables go."""
    terminal = sys.stdout.isatty()
    return _Console(
        markup=False, emoji=False, highlight=False, width=None if terminal else WIDTH, soft_wrap=not terminal
    )


class table:
    """A table that is never cut: in a narrow terminal texts are folded, then frames go, then every cell has a line of
    its own.

    Args:
        title: above it.
        columns: their names.
        left: how many columns from the left are text; the others are numbers, on the right of their columns.
        text: names of further columns of text.
    """

    def __init__(self, title: str, columns: Sequence[str], left: int = 1, text: Collection[str] = ()) -> None:
        self.title, self.columns = printable(title), list(columns)
        self.is_text = [i < left or name in text for i, name in enumerate(columns)]
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        self.rows.append([printable(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        full = [max(map(cell_len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        least = [min(width, LEAST) if is_text else width for width, is_text in zip(full, self.is_text, strict=True)]
        framed = sum(least) + 3 * len(least) + 1 <= options.max_width
        if not framed and sum(least) + len(least) > options.max_width:
            yield Text(self.title, "italic")
            for row in self.rows:
                yield ""
                yield from (
                    Text(f"{name or '#'}: {cell}", overflow="fold")
                    for name, cell in zip(self.columns, row, strict=True)
                )
            return
        frame: dict[str, Any] = {} if framed else {"box": None, "padding": (0, 1, 0, 0)}
        made = Table(title=self.title, title_justify="left", **frame)
        for name, is_text, width in zip(self.columns, self.is_text, least, strict=True):
            made.add_column(
                name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold", min_width=width
            )
        for row in self.rows:
            made.add_row(*row)
        yield made


def metrics(console: Console, title: str, results: Mapping[str, RankingResult], first: str = "model") -> None:
    """A line a result, realistic ranks of both sides."""
    made = table(title, (first, "triples", *COLUMNS))
    for name, result in results.items():
        shown = (f"{result[metric]:{'.1f' if metric == 'mr' else '.4f'}}" for metric in COLUMNS.values())
        made.add_row(name, str(len(result.triples)), *shown)
    console.print(made)


def inflation(exact: RankingResult, sampled: RankingResult) -> dict[str, float | None]:
    """By what factor the metrics that grow with quality are larger among a sample; None where the exact one is 0."""
    names = ("MRR", "Hits@1", "Hits@3", "Hits@10")
    return {name: sampled[COLUMNS[name]] / exact[COLUMNS[name]] if exact[COLUMNS[name]] else None for name in names}


def notes(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text.assemble(("note", "yellow"), f" {printable(line)}"))
