"""A bar of steps, and a line an epoch that ended with a validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from dhns_fast.train.trainer import Epoch, Progress, Trainer


@contextlib.contextmanager
def shown(
    trainer: Trainer, console: Console | None = None
) -> Iterator[tuple[Callable[[Progress], None], Callable[[Epoch], None]]]:
    """Callbacks for :meth:`Trainer.fit`, within which progress is shown; the bar only on a terminal.

    Args:
        console: where; None: stderr.
    """
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False) if console is None else console
    total = trainer.config.epochs * trainer.steps_per_epoch
    columns = (
        "{task.description}",
        rich_progress.BarColumn(),
        "{task.completed}/{task.total} steps",
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=trainer.progress.step)

        def on_epoch(epoch: Epoch) -> None:
            bar.update(task, description=f"epoch {epoch.epoch} loss {_number(epoch.losses['kgc'])}")
            if epoch.valid:
                losses = "  ".join(f"{name} {_number(value)}" for name, value in epoch.losses.items() if value)
                console.print(
                    f"epoch {epoch.epoch:4d}  {epoch.seconds:6.2f} s  {losses}  "
                    f"valid MRR {epoch.valid['valid_mrr']:.4f}  Hits@10 {epoch.valid['valid_hits@10']:.4f}",
                )

        yield lambda state: bar.update(task, completed=state.step), on_epoch


def _number(value: float) -> str:
    """A loss as people read it; one that runs away has no hundred digits."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
