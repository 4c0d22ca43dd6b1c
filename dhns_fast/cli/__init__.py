"""The command line `dhns-fast`: its options (parser), what they do (commands), what is printed (tables), and Ctrl-C
(signals).

Exit codes: 0; 2 for bad input, with one line on stderr; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, with
what was saved; 1 for anything else. DHNS_FAST_DEBUG=1 adds a traceback to the latter.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from dhns_fast.cli import signals
from dhns_fast.errors import DhnsError, InputError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. With arguments given, signals are handled afterwards as they were before."""
    _open_streams()
    handler = signals.current = signals.Signals()
    command = ""
    try:
        # Before what takes time to import.
        handler.install()
        from dhns_fast.cli.parser import build_parser, typed

        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal's encoding lacks is shown with ?, and is no reason to fail.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        parser = build_parser()
        words = typed(parser, sys.argv[1:] if argv is None else argv)
        options = parser.parse_args(words)
        command = f" {options.command}"
        given = parser.parse_args(words, defaults=False)[options.command]
        from dhns_fast.cli import commands

        return commands.run(options.command, options[options.command], given.as_dict())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except InputError as error:
        _say(f"dhns-fast{command}: error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        _say(f"dhns-fast{command}: {str(stop) or 'interrupted'}")
        return handler.code
    except BrokenPipeError:
        # Whoever read stdout is gone; what is still in its buffer must not raise again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DhnsError as error:
        _say(f"dhns-fast{command}: {error}")
        return 1
    except Exception as error:
        if handler.received:
            # Libraries turn Ctrl-C during their import into errors of their own.
            _say(f"dhns-fast{command}: interrupted")
            return handler.code
        # No traceback by default: it buries the message.
        debug = bool(os.environ.get("DHNS_FAST_DEBUG"))
        hint = "" if debug else " (DHNS_FAST_DEBUG=1 shows where)"
        _say(f"dhns-fast{command}: {type(error).__name__}: {' '.join(str(error).split())}{hint}")
        if debug:
            traceback.print_exc()
        return 1
    finally:
        handler.leave() if argv is None else handler.restore()


def _open_streams() -> None:
    """Whoever started the program may have closed its streams (`>&-`, some schedulers): Python has None in their place
    then, and the next file to be opened their number, into which a library would print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open as long as the program runs: Python warns at its end of files that close themselves.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _say(message: str) -> None:
    """On stderr, with nothing in it that a terminal would obey."""
    print("\n".join(map(printable, message.split("\n"))), file=sys.stderr)
