"""What commands print: notes and tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dhns_fast.ranking import RankingResult

COLUMNS = {"MRR": "mrr", "Hits@1": "hits@1", "Hits@3": "hits@3", "Hits@10": "hits@10", "MR": "mr", "AMRI": "amri"}
# Of tables that do not go to a terminal: names should not be broken in a file or a pipe.
WIDTH = 160


def stdout() -> Console:
    """Where tables go. Names of entities, files and modalities are printed as they are: "[...]" and ":...:" in them are no markup."""
    terminal = sys.stdout.isatty()
    return Console(markup=False, emoji=False, highlight=False, width=None if terminal else WIDTH, soft_wrap=not terminal)


def table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """An empty table whose first `left` columns are text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right")
    return made


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
        console.print(Text.assemble(("note", "yellow"), f" {line}"))
