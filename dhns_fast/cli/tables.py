"""What commands print: notes, a bar of progress, and tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dhns_fast.ranking import RankingResult
    from dhns_fast.train.trainer import Epoch, Progress, Trainer

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


def notes(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text.assemble(("note", "yellow"), f" {line}"))


@contextlib.contextmanager
def progress(trainer: Trainer, console: Console) -> Iterator[tuple[Callable[[Progress], None], Callable[[Epoch], None]]]:
    total = trainer.config.epochs * trainer.steps_per_epoch
    columns = ("{task.description}", rich_progress.BarColumn(), "{task.completed}/{task.total} steps", rich_progress.TimeRemainingColumn())
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=trainer.progress.step)

        def on_epoch(epoch: Epoch) -> None:
            bar.update(task, description=f"epoch {epoch.epoch} loss {epoch.losses['kgc']:.4f}")
            if epoch.valid:
                losses = "  ".join(f"{name} {value:.4f}" for name, value in epoch.losses.items() if value)
                console.print(
                    f"epoch {epoch.epoch:4d}  {epoch.seconds:6.2f} s  {losses}  "
                    f"valid MRR {epoch.valid['valid_mrr']:.4f}  Hits@10 {epoch.valid['valid_hits@10']:.4f}",
                )

        yield lambda state: bar.update(task, completed=state.step), on_epoch
