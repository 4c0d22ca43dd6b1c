"""Ctrl-C, SIGTERM and SIGHUP: whoever can finish what is in flight is asked to; otherwise the command ends at once,
cleanly and only once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else (signal.SIGINT, signal.SIGTERM)
# Keys are pressed several times over: within these seconds it is the same wish. Afterwards it acts at once, and in the
# end without cleaning up.
SAME_WISH, CLEANING_UP = 2.0, 5.0


class Signals:
    """The handler of a command.

    Attributes:
        received: the first signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._ask: Callable[[], bool] | None = None
        self._raised = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in NUMBERS:
            before = signal.getsignal(number)
            if number not in (signal.SIGINT, signal.SIGTERM) and before == signal.SIG_IGN:
                # nohup
                continue
            with contextlib.suppress(ValueError):  # in a thread
                signal.signal(number, self)
                self._before[number] = before

    def restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def leave(self) -> None:
        """For the end of a process: Python's own handler would print a traceback."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN if self.received else signal.SIG_DFL)

    @property
    def code(self) -> int:
        """Exit code of a command that was interrupted."""
        return 128 + (self.received or signal.SIGINT)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._since < (CLEANING_UP if self._raised else SAME_WISH):
            return
        if self._raised:
            os._exit(self.code)
        first = not self.received
        self.received, self._since = self.received or number, now
        if first and self._ask is not None and self._ask():
            return
        self._raised = True
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def asking(self, ask: Callable[[], bool]) -> Iterator[None]:
        """Within it the first signal calls `ask`, which returns whether it is going to be heeded."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None


# Of the command that runs.
current = Signals()
