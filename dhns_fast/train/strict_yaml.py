"""YAML of options, read strictly: every key once, no aliases, no types but those of options, and bounded work for any
file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dhns_fast.errors import DataError, printable

# A file of options is a page or two, a list in a list at the deepest.
BYTES, DEPTH, DIGITS = 1 << 20, 20, 300
# Tags that YAML's own rules give to plain text, and that options have; dates and sexagesimal numbers are text here.
KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Safe, and 1e-3 and 010 are numbers as they look: YAML 1.1 wants 1.0e-3 for the one and takes the other for 8."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag in KINDS and not tag.endswith((":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("+-0123456789"))
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), list("+-.0123456789"))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).strip()
    return int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The options of a file, and the line of each.

    Raises:
        DataError: unreadable, not UTF-8, no YAML, no mapping of names, a name given twice, an alias, a tag, or too
            large or deep.
    """
    try:
        size = path.stat().st_size
        if size > BYTES:
            raise DataError(path, f"has {size} bytes; accepted: at most {BYTES} of options")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise DataError(path, "not text in UTF-8") from None
        raise DataError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        _shallow(path, text)
        node = yaml.compose(text, _Loader)
        if node is not None:
            _plain(path, node)
        loader = _Loader("")
        try:
            options = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DataError(
            path, f"not valid YAML ({printable(problem)})", None if mark is None else mark.line + 1
        ) from None
    except DataError:
        raise
    except (ValueError, RecursionError, OverflowError, LookupError) as error:
        # The library looks up what a tag such as !!bool or !!int announces, and does not find it.
        reason = f"a tag of another type than its value, {error}" if isinstance(error, LookupError) else str(error)
        raise DataError(path, f"not valid YAML ({printable(reason)[:300]})") from None
    if not isinstance(options, dict) or not isinstance(node, yaml.MappingNode):
        raise DataError(path, f"expected a mapping of options, found {type(options).__name__}", 1)
    return options, {key.value: key.start_mark.line + 1 for key, _ in node.value}


def _shallow(path: Path, text: str) -> None:
    """Refuse aliases and depth event by event, before anything is built of them."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        line = 1 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise DataError(path, "found an anchor or an alias; accepted: options written out", line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH:
                raise DataError(path, f"found lists in lists, more than {DEPTH} deep; accepted: options", line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(path: Path, node: yaml.Node) -> None:
    """Refuse tags, names that occur twice, and numbers that nobody means."""
    line = node.start_mark.line + 1
    if node.tag not in KINDS:
        raise DataError(
            path, f"not valid YAML (could not determine a constructor for the tag {printable(repr(node.tag))})", line
        )
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise DataError(
                    path, f"found {printable(str(key.value))[:60]!r} as a name; accepted: names of options", at
                )
            if key.value in seen:
                raise DataError(
                    path, f"{printable(key.value)!r} is also on line {seen[key.value]}; accepted: each option once", at
                )
            seen[key.value] = at
            _plain(path, key)
            _plain(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _plain(path, value)
    elif node.tag != "tag:yaml.org,2002:str" and len(node.value) > DIGITS:
        raise DataError(path, f"found a number of {len(node.value)} characters; accepted: at most {DIGITS}", line)
