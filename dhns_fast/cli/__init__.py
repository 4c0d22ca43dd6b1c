"""The command line `dhns-fast`: its options (parser), what they do (commands) and what is printed (tables).

Exit codes: 0; 2 for bad input, with one line on stderr; 130 after Ctrl-C, with what was saved; 1 for anything else.
DHNS_FAST_DEBUG=1 adds a traceback to the latter.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from dhns_fast.cli.parser import build_parser, typed
from dhns_fast.errors import DhnsError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = typed(sys.argv[1:] if argv is None else argv)
    command = ""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown with ?, and is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        parser = build_parser()
        options = parser.parse_args(words)
        command = f" {options.command}"
        given = parser.parse_args(words, defaults=False)[options.command]
        from dhns_fast.cli import commands

        return commands.run(options.command, options[options.command], given.as_dict())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except InputError as error:
        print(f"dhns-fast{command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dhns-fast{command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read stdout is gone; what is still in its buffer must not raise again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DhnsError as error:
        print(f"dhns-fast{command}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # No traceback by default: it buries the message.
        debug = bool(os.environ.get("DHNS_FAST_DEBUG"))
        hint = "" if debug else " (DHNS_FAST_DEBUG=1 shows where)"
        print(f"dhns-fast{command}: {type(error).__name__}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        if debug:
            traceback.print_exc()
        return 1
