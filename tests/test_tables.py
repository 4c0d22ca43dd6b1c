"""Tables and messages: nothing of a name reaches the terminal as a command, and no width cuts a figure or a name."""

from __future__ import annotations

import io
import pickle
import re

import numpy as np
import pytest
import torch
from fixtures.training import config, graph
from rich.console import Console

from dhns_fast.cli import main, tables
from dhns_fast.errors import DataError, InputError
from dhns_fast.ranking import evaluate
from dhns_fast.train import build

EVIL = "\x1b[2Jwiped\x9b31m \u202eback\x07"
NAMES = [
    "the first of two long names that differ late, number 1",
    "the first of two long names that differ late, number 2",
]


def printed(width: int, *rows: tuple[str, ...]) -> str:
    made = tables.table("title", ("name", "triples", "MRR", "Hits@1", "Hits@3", "Hits@10", "MR", "AMRI"))
    for row in rows:
        made.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(made)
    return out.getvalue()


@pytest.mark.parametrize("width", [200, 100, 80, 60, 50, 30, 12])
def test_every_figure_and_every_name_is_whole(width: int) -> None:
    figures = ("12345", "0.1234", "0.2345", "0.3456", "0.4567", "12345.6", "0.5678")
    out = printed(width, *((name, *figures) for name in NAMES))
    assert "…" not in out
    lines = [re.sub(r"[│┃]", " ", line) for line in out.splitlines()]
    assert all(len(line) <= width for line in lines)
    if width >= 30:
        for figure in figures:
            assert sum(figure in line.split() for line in lines) == 2
    # A name that is folded is there in pieces.
    text = "".join(re.sub(r"[^a-z0-9]", "", line) for line in lines)
    assert text.count("1") >= 1
    assert {"1", "2"} <= set(text)


def test_escape_sequences_are_shown() -> None:
    out = printed(100, (EVIL, *["0"] * 7))
    for bad in ("\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert bad not in out
    assert r"\x1b[2Jwiped\x9b31m \u202eback\x07" in out.replace("\n", "")


def test_messages_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--run", f"no{EVIL}"]) == 2
    assert main([f"tr{EVIL}"]) == 2
    err = capsys.readouterr().err
    assert r"\x1b[2J" in err
    assert not set(err) & {"\x1b", "\x9b", "\u202e", "\x07"}


def test_messages_fit_on_a_screen() -> None:
    """Whatever the length of the line of a file that they quote."""
    for error in (DataError("file", "found " + "9" * 9999 + "; accepted: a name", 7), InputError("x", 3, "y" * 9999)):
        assert len(str(error)) < 1700
        assert "characters) …" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error).startswith("x: got 3; accepted: yyy")


def test_triples_are_taken_in_every_sensible_form() -> None:
    kg = graph()
    model = build(config(method="uniform"), kg).model
    expected = evaluate(model, kg, triples=kg.test)
    forms = (
        kg.test.tolist(),
        kg.test.numpy(),
        kg.test.numpy().astype(np.int32),
        kg.test.int(),
        kg.test.numpy().astype(">i8"),
    )
    for form in forms:
        assert dict(evaluate(model, kg, triples=form)) == dict(expected)
        assert torch.equal(model.score_hrt(form), model.score_hrt(kg.test))
    assert torch.equal(model.score_t([[1, 0]]), model.score_t(torch.tensor([[1, 0]])))
    assert torch.equal(model.score_h(np.array([[0, 1]])), model.score_h(torch.tensor([[0, 1]])))
    assert model.score_hrt([]).shape == (0,)
    for bad in ([[0, 0]], [[0, 0, 99]], [[0, -1, 0]], [[0.5, 0, 0]], "abc", kg.test.float(), None):
        with pytest.raises(InputError, match=r"triples"):
            model.score_hrt(bad)
        if bad is not None:
            with pytest.raises(InputError, match=r"triples"):
                evaluate(model, kg, triples=bad)
