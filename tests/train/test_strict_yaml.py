from __future__ import annotations

import time
from pathlib import Path

import pytest

from dhns_fast.errors import DataError
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.strict_yaml import read


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("dim: 8\nlearning_rate: 1e-3\n", {"dim": 8, "learning_rate": 1e-3}),
        ("\ufeffmodel: rotate\r\nlevels: [0, 5]\r\n", {"model": "rotate", "levels": [0, 5]}),
        ("data: 2026-99-99\nfeatures: 1:30\n", {"data": "2026-99-99", "features": "1:30"}),
        (
            "a: [null, ~, true, off, 1.5, .inf, -3, +4, 1_0, '1e3']",
            {"a": [None, None, True, False, 1.5, float("inf"), -3, 4, "1_0", "1e3"]},
        ),
        ("<<: x\n", {"<<": "x"}),
        ("seed: 010\ndim: 09\n", {"seed": 10, "dim": 9}),
        ("seed: !!int |\n  010\n", {"seed": 10}),
    ],
)
def test_plain_values(tmp_path: Path, text: str, options: dict[str, object]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    assert read(path)[0] == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, r":1: found lists in lists, more than 20 deep"),
        ("a: " + "{b: " * 3000, r":1: found lists in lists, more than 20 deep"),
        ("- " * 3000 + "1", r":1: found lists in lists, more than 20 deep"),
        ("dim: !!int abc\n", r"not valid YAML \(invalid literal for int"),
        ("dim: !!int\n", r"not valid YAML \(a tag of another type than its value"),
        ("!!int ", r"not valid YAML \(a tag of another type than its value"),
        ("margin: !!float ''\n", r"not valid YAML \(a tag of another type than its value"),
        ("fusion: !!bool abc\n", r"not valid YAML \(a tag of another type than its value, 'abc'\)"),
        (
            "dim: !!timestamp x\n",
            r":1: not valid YAML \(could not determine a constructor for the tag 'tag:yaml\.org,2002:timestamp'\)",
        ),
        (
            "dim: !!python/object/apply:os.system [ls]\n",
            r":1: not valid YAML \(could not determine a constructor for the tag 'tag:yaml\.org,2002:python/object/apply:os\.system'",
        ),
        ("dim: !x 1\n", r":1: not valid YAML \(could not determine a constructor for the tag '!x'"),
        ("data: !!binary aGk=\n", r":1: not valid YAML \(could not"),
        ("dim: 1" + "0" * 310 + "\n", r":1: found a number of 311 characters; accepted: at most 300"),
        ("dim: 1" + "0" * 5000 + "\n", r":1: found a number of 5001 characters"),
        ("margin: 1" + "0" * 310 + ".0\n", r":1: found a number of 313 characters"),
        ("dim: 8\nmodel: rotate\ndim: 9\n", r":3: 'dim' is also on line 1; accepted: each option once"),
        ("a: &x [1]\nb: *x\n", r":1: found an anchor or an alias"),
        (
            "a: &a [1,1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)),
            r":1: found an anchor",
        ),
        ("a: {b: 1, b: 2}\n", r":1: 'b' is also on line 1"),
        ("? [a]\n: b\n", r":1: found .* as a name"),
        ("a\x00b: 1\n", r"not valid YAML \("),
        ("\x1b[2J: 1\n", r"not valid YAML \("),
        ("a: b\n---\nc: d\n", r"not valid YAML \("),
        ("- 1\n", r":1: expected a mapping of options, found list"),
        ("", r":1: expected a mapping of options, found NoneType"),
        ("#" * (1 << 20) + "\n", r"has 1048577 bytes; accepted: at most 1048576"),
        (b"a: \xff\n", r"not text in UTF-8"),
    ],
)
def test_everything_else_is_one_error_at_once(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begin = time.process_time()
    with pytest.raises(DataError, match=message) as caught:
        TrainConfig.load(path)
    assert time.process_time() - begin < 3
    assert len(str(caught.value)) < len(str(path)) + 250
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_numbers_that_no_option_has_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ("margin: 1e999\n", "margin: .nan\n", "data: 5\n"):
        path.write_text("model: rotate\n" + text)
        with pytest.raises(DataError, match=r"c\.yaml:2: \w+: got ") as caught:
            TrainConfig.load(path)
        assert len(str(caught.value)) < len(str(path)) + 250
