"""Every place that an entry of the catalogue needs: a test fails for each that is forgotten."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import dhns_fast
from dhns_fast import catalogue
from dhns_fast.catalogue import CONDITIONED, MODELS
from dhns_fast.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_catalogue_is_free_of_torch() -> None:
    code = (
        "import sys, dhns_fast.catalogue; print([name for name in ('torch', 'numpy', 'yaml') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_everything_that_it_needs(name: str) -> None:
    import test_models

    from dhns_fast import models

    known = MODELS[name]
    cls = models.MODELS[name]
    assert cls is getattr(dhns_fast, known.title), "exported by the package"
    assert (cls.reduction, cls.parts, cls.condition) == (known.reduction, known.parts, name if known.dhns else "")
    assert known.reduction in catalogue.REDUCTIONS
    assert inspect.getdoc(cls), "a docstring with formula and source"
    assert cls in {variant[0] for variant in test_models.VARIANTS}, (
        "a formula in tests/test_models.py or an oracle in reference/models.py"
    )


@pytest.mark.parametrize("name", CONDITIONED)
def test_a_model_for_dhns_has_a_condition_and_an_interaction(name: str) -> None:
    from dhns_fast.diffusion.conditions import CONDITIONS
    from dhns_fast.ops import hal
    from dhns_fast.reference import loss as oracle

    assert tuple(sorted(CONDITIONS)) == tuple(sorted(CONDITIONED))
    assert {interaction for interaction, _ in hal.CODES} == set(CONDITIONED)
    side = torch.ones(2, 3, 4)
    relation = torch.ones(2, 3, 2 if MODELS[name].phases else 4)
    for module in (hal.hal_eager, oracle):
        assert module.triple_score(name, side, relation, side).isfinite().all()
    assert CONDITIONS[name].has_relation_range == MODELS[name].phases


def test_options_are_those_of_the_catalogue() -> None:
    lists = {
        "model": tuple(MODELS),
        "method": tuple(catalogue.METHODS),
        "control": catalogue.CONTROLS,
        "loss": catalogue.LOSSES,
        "behaviour": catalogue.BEHAVIOURS,
        "corruption": catalogue.SIDES_ASKED,
        "order": catalogue.ORDERS,
        "margin_schedule": catalogue.MARGIN_SCHEDULES,
    }
    hints = get_type_hints(TrainConfig)
    assert {name: get_args(hints[name]) for name in lists} == lists


def test_margin_schedules_are_those_of_the_catalogue() -> None:
    from dhns_fast.margins import MARGIN_SCHEDULES

    assert tuple(MARGIN_SCHEDULES) == catalogue.MARGIN_SCHEDULES


def test_backends_are_those_of_the_catalogue() -> None:
    from dhns_fast.ops import backend

    assert set(backend.NAMES) == set(catalogue.BACKENDS)


def test_a_reduction_has_every_place_that_no_other_test_looks_at() -> None:
    from dhns_fast import scoring
    from dhns_fast.reference import scoring as oracle

    assert set(oracle.REDUCTIONS) == set(catalogue.REDUCTIONS)
    assert [name for name in catalogue.REDUCTIONS if f" {name} " not in str(scoring.__doc__)] == []
    source = (ROOT / "bench" / "harness.py").read_text(encoding="utf-8")
    flops = next(
        ast.literal_eval(line.partition("= ")[2]) for line in source.splitlines() if line.startswith("FLOPS = ")
    )
    assert flops.keys() == set(catalogue.REDUCTIONS)


def test_documents_name_every_model() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [model.title for model in MODELS.values() if model.title not in text] == []


def test_the_page_on_extending_shows_the_code_as_it_is() -> None:
    from dhns_fast.models import HolE

    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert inspect.getsource(HolE).partition("\n")[2] in page
