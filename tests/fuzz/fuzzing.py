"""The frame of the fuzzing tests: how many cases, and what may come of damaged input.

`DHNS_FAST_FUZZ=N` asks for N cases a test; by default there are as many as take a few seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dhns_fast.errors import InputError

T = TypeVar("T")
CASES = int(os.environ.get("DHNS_FAST_FUZZ", "0"))

_common = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "print_blob": True,
}
# The short run is the same every time; the long one is not.
settings.register_profile(
    "short", max_examples=40, derandomize=True, phases=(Phase.explicit, Phase.generate), **_common
)  # type: ignore[arg-type]
settings.register_profile("long", max_examples=max(1, CASES), **_common)  # type: ignore[arg-type]
settings.load_profile("long" if CASES else "short")


def only_refused(act: Callable[[], T], error: type[InputError] = InputError) -> T | None:
    """What `act` returns, or None where it refuses in one sentence; any other exception, or a text that a terminal
    would obey, fails.
    """
    try:
        return act()
    except error as refusal:
        text = str(refusal)
        assert "\n" not in text, text
        assert text.isprintable(), ascii(text)
        assert len(text) < 2000, len(text)
        return None


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with a few bytes changed, cut out, repeated, swapped, or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + draw(st.sampled_from((1, 4, 40, 4000))))))
        kind = draw(st.sampled_from(("change", "cut", "repeat", "insert", "truncate", "line")))
        if kind == "change" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:end]
        elif kind == "repeat":
            data[at:at] = data[at:end] * draw(st.integers(1, 3))
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(TOKENS) | st.binary(max_size=6))
        elif kind == "truncate":
            del data[at:]
        elif kind == "line":
            lines = bytes(data).split(b"\n")
            i, j = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
            lines[i], lines[j] = lines[j], lines[i]
            data = bytearray(b"\n".join(lines))
    return bytes(data)


# What breaks parsers.
TOKENS = (
    b"\t", b" ", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\x85", b"\xa0", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1b[2J", b'"', b",", b";",
    b"-1", b"1e309", b"nan", b"9" * 25, b"9" * 5000, b"0x1", b"<", b">", b"[" * 50, b"{", b": ", b"&a ", b"*a", b"!!int ", b"- ", b"#",
    b"\xf0\x9f\x98\x80",
)  # fmt: skip
