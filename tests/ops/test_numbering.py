"""Numbers that Python and C++ share: read from csrc/reductions.h, and from the operators' own lists."""

from __future__ import annotations

import re
from pathlib import Path

from dhns_fast.catalogue import BACKENDS, CONDITIONED, REDUCTIONS
from dhns_fast.ops import backend as backends
from dhns_fast.ops import hal
from dhns_fast.reference import scoring as reference

HEADER = (Path(__file__).resolve().parents[2] / "csrc" / "reductions.h").read_text(encoding="utf-8")


def enumerators(name: str) -> list[str]:
    """`kDot, kL2` as ["dot", "l2"]."""
    (names,) = re.findall(rf"enum {name} : int64_t {{ (.*?) }}", HEADER)
    return [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", x.strip().removeprefix("k")).lower() for x in names.split(",")]


def test_reductions_are_numbered_alike() -> None:
    assert enumerators("Reduction") == list(REDUCTIONS)


def test_interactions_are_numbered_alike() -> None:
    # TransE has one for each norm; spelling apart, a name is the model's.
    spelt = [f"{name}{p}" if name == "transe" else name for name, p in sorted(hal.CODES, key=hal.CODES.__getitem__)]
    assert [x.replace("_", "") for x in enumerators("Interaction")] == spelt
    assert {name for name, _ in hal.CODES} == set(CONDITIONED)
    assert sorted(hal.CODES.values()) == list(range(len(hal.CODES)))


def test_csrc_names_them_nowhere_else() -> None:
    folder = Path(__file__).resolve().parents[2] / "csrc"
    again = re.compile(r"enum (Reduction|Interaction)\b")
    assert [p.name for p in folder.iterdir() if again.search(p.read_text(encoding="utf-8"))] == ["reductions.h"]


def test_every_reduction_has_its_lines_in_csrc() -> None:
    names = re.findall(r"enum Reduction : int64_t { (.*?) }", HEADER)[0].split(", ")
    folder = Path(__file__).resolve().parents[2] / "csrc"
    dispatch, scores = ((folder / name).read_text(encoding="utf-8") for name in ("interactions.h", "score_cpu.cpp"))
    for name in names:
        assert f"case {name}: return f(Type<" in dispatch, name
        assert f"{{score_panels<{name}, false>" in scores, name


def test_the_oracle_and_the_backends_have_the_catalogues_names() -> None:
    assert set(reference.REDUCTIONS) == set(REDUCTIONS)
    assert {name for name in backends.NAMES if name != "auto"} == {name for name in BACKENDS if name != "auto"}
