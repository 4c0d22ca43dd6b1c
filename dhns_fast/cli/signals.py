"""Ctrl-C, SIGTERM and SIGHUP: whoever can finish what is in flight is asked to; otherwise the command ends at once,
cleanly and only once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else (signal.SIGINT, signal.SIGTERM)
# Keys are pressed several times over: within these seconds it is the same wish. Afterwards it acts at once, and in the
# end without cleaning up.
SAME_WISH, CLEANING_UP = 2.0, 5.0
# Seconds after which a signal that came at a bad moment is looked at again.
AGAIN = 0.02


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
        # What was put off, and what waits to look again.
        self._due = False
        self._timer: threading.Timer | None = None
        self._hook = sys.unraisablehook

    def install(self) -> None:
        for number in NUMBERS:
            before = signal.getsignal(number)
            if number not in (signal.SIGINT, signal.SIGTERM) and before == signal.SIG_IGN:
                # nohup
                continue
            with contextlib.suppress(ValueError):  # in a thread
                signal.signal(number, self)
                self._before[number] = before
        if self._before:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped

    def restore(self) -> None:
        self._forget()
        for number, before in self._before.items():
            signal.signal(number, before)

    def leave(self) -> None:
        """For the end of a process: Python's own handler would print a traceback."""
        self._forget()
        for number in self._before:
            signal.signal(number, signal.SIG_IGN if self.received else signal.SIG_DFL)

    @property
    def code(self) -> int:
        """Exit code of a command that was interrupted."""
        return 128 + (self.received or signal.SIGINT)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._due:
            self._due = False
            self._interrupt(frame)
            return
        now = time.monotonic()
        if self.received and now - self._since < (CLEANING_UP if self._raised else SAME_WISH):
            return
        if self._raised or self._timer is not None:
            os._exit(self.code)
        first = not self.received
        self.received, self._since = self.received or number, now
        if first and self._ask is not None and self._ask():
            return
        self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, but not within an import: libraries that call Python while they initialise end the
        process there.
        """
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                self._later()
                return
            frame = frame.f_back
        self._raised = True
        raise KeyboardInterrupt

    def _later(self) -> None:
        def look_again() -> None:
            self._due, self._timer = True, None
            if hasattr(signal, "pthread_kill"):
                # To the main thread, which may sleep.
                signal.pthread_kill(threading.main_thread().ident or 0, self.received)
            else:
                signal.raise_signal(self.received)

        self._timer = threading.Timer(AGAIN, look_again)
        self._timer.daemon = True
        self._timer.start()

    def _dropped(self, unraisable: Any) -> None:
        """Python drops what is raised in a destructor or a callback of the garbage collector."""
        if self._raised and isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._raised = False
            self._later()
        else:
            self._hook(unraisable)

    def _forget(self) -> None:
        if self._before:
            sys.unraisablehook = self._hook
        if self._timer is not None:
            self._timer.cancel()

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
