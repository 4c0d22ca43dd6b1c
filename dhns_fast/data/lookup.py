"""Ids of what somebody names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from dhns_fast.errors import InputError, Shown

# Names that an error message lists: the relations of most graphs.
FEW = 30


def lookup(name: str, names: Sequence[str], what: str, places: Mapping[str, int] | None = None) -> int:
    """Id of a name, or of a number written as `#12`.

    Args:
        places: ids by name, for whoever asks often: a list of names is searched from its beginning.

    Raises:
        InputError: there is no such name; the message suggests similar ones, or lists all where they are few.
    """
    try:
        return names.index(name) if places is None else places[name]
    except (ValueError, KeyError):
        if name.startswith("#") and name[1:].isdecimal():
            if int(name[1:]) < len(names):
                return int(name[1:])
            raise InputError(what, Shown(name), f"ids from #0 to #{len(names) - 1}") from None
        lower = {n.lower(): i for i, n in reversed(list(enumerate(names)))}
        if name.lower() in lower:
            return lower[name.lower()]
        close = [names[lower[n]] for n in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.6)]
        hint = f"; similar: {', '.join(close)}" if close else f": {', '.join(names)}" if len(names) <= FEW else ""
        raise InputError(what, name, f"names of the graph{hint}") from None
