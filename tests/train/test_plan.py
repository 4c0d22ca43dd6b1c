"""What a run takes in memory: against what is allocated, what fits, what is advised, and the refusal before anything
is.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fixtures.training import config, graph

from dhns_fast.cli import main
from dhns_fast.errors import InputError
from dhns_fast.optim import RowEmbedding
from dhns_fast.train import Trainer, build, plan
from dhns_fast.train.plan import Sizes, count

LARGE = Sizes(5_000_000, 800, 20_000_000)


def parts(options: dict[str, Any], sizes: Sizes = LARGE, **more: Any) -> dict[str, int]:
    return {part.name: part.bytes for part in plan.plan(config(**options), sizes, **more).parts}


@pytest.mark.parametrize("optimiser", ["adam", "lazy-adam", "adagrad", "rowwise-adagrad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_and_states_take_what_is_planned(optimiser: str, dtype: str) -> None:
    if optimiser == "adam" and dtype == "bfloat16":
        pytest.skip("dense Adam has float32 tables")
    kg = graph()
    trainer = Trainer(config(optimiser=optimiser, table_dtype=dtype), kg)
    trainer.step()
    sizes = Sizes(kg.num_entities, kg.num_relations, len(kg.train), tuple(x.shape[1] for x in kg.features.values()))
    planned = parts({"optimiser": optimiser, "table_dtype": dtype}, sizes)
    entity = trainer.model.entity.weight
    assert planned["entity table"] == entity.nbytes
    rowwise = isinstance(trainer.model.entity, RowEmbedding)
    state = (trainer.optimizer.optimizers[0] if rowwise else trainer.optimizer).state[entity]  # type: ignore[attr-defined]
    held = sum(x.nbytes for name, x in state.items() if torch.is_tensor(x) and x.numel() > 1)
    assert planned["optimiser state"] == held
    whole = [
        p for p in (*trainer.model.parameters(), *trainer.generator.parameters()) if p is not entity and p.requires_grad
    ]  # type: ignore[union-attr]
    assert planned["other weights"] == pytest.approx(16 * sum(p.numel() for p in whole), rel=0.05)
    assert planned["features"] == sum(x.nbytes for x in kg.features.values())
    assert planned["triples"] == kg.train.nbytes


def test_row_wise_states_are_small_and_processes_share() -> None:
    options: dict[str, Any] = {"dim": 512, "method": "self-adversarial", "model": "complex", "batch_size": 1024}
    dense, rowwise = (parts(options | {"optimiser": name}) for name in ("adam", "rowwise-adagrad"))
    assert dense["optimiser state"] == 1024 * rowwise["optimiser state"]
    assert "dense gradient" in dense
    assert "dense gradient" not in rowwise
    assert parts(options, processes=4)["entity table"] == rowwise["entity table"] // 4
    assert parts(options | {"table_dtype": "bfloat16"})["entity table"] == rowwise["entity table"] // 2
    hosted = plan.plan(config(**options, table_device="host"), LARGE, device="cuda")
    assert hosted.total("host") > hosted.total("device")
    assert plan.plan(config(**options), LARGE, device="cpu").total("device") == 0


def test_rows_that_are_scored_where_they_lie_are_not_planned_as_looked_up() -> None:
    options: dict[str, Any] = {
        "model": "distmult", "method": "self-adversarial", "optimiser": "lazy-adam", "dim": 128, "batch_size": 1024,
        "num_negatives": 64,
    }  # fmt: skip
    in_place = parts(options, device="cpu")["a step"]
    rows = 1024 * 66 * 128 * 4
    # Factors and indices: a fifth of the rows themselves. Elsewhere rows and their gradients are in memory.
    assert in_place < rows / 3
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"device": "cuda"}), ({"table_dtype": "bfloat16"}, {"device": "cpu"}), ({"model": "transe"}, {"device": "cpu"}),
        ({"optimiser": "adam"}, {"device": "cpu"}),
    ]  # fmt: skip
    for changed, where in others:
        assert parts(options | changed, **where)["a step"] > 2 * rows


def test_advice_ends_with_something_that_fits() -> None:
    options: dict[str, Any] = {"dim": 512, "method": "self-adversarial", "optimiser": "adam"}
    for memory, last in (
        (14e9, "--optimiser rowwise-adagrad"),
        (9e9, "and --table-dtype bfloat16"),
        (5e9, "and --dim "),
    ):
        made = plan.plan(config(**options), LARGE, device="cpu", host=int(memory))
        assert not made.fits
        assert made.advice[-1].startswith(last)
        assert made.advice[-1].endswith("which fits")
    on_device = plan.plan(config(**options), LARGE, device="cuda", host=10**12, accelerator=3 * 10**9)
    assert "--table-device host" in on_device.advice[2]
    assert plan.plan(config(**options), LARGE, device="cpu", host=10**6).advice[-1].startswith("no --dim makes it fit")
    assert plan.plan(config(**options), LARGE, device="cpu", host=10**12).fits


def test_a_run_that_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda device: (10**8, None))
    monkeypatch.setattr(plan, "resident", lambda: 0)
    with pytest.raises(InputError, match=r"memory: got a run that takes .* of host memory a process .*accepted: "):
        build(config(), graph())
    assert build(config(), graph(), training=False)


@pytest.mark.parametrize("method", ["near-misses", "kbgan", "modality-swap"])
def test_hard_negatives_take_memory(method: str) -> None:
    with pytest.raises(InputError, match=r"^memory: got a run that takes .* \(a step "):
        Trainer(config(method=method, hard_negatives=10**12), graph())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5000000", 5_000_000),
        ("5e6", 5_000_000),
        ("1.5M", 1_500_000),
        ("16GB", 16 * 10**9),
        ("2 TB", 2 * 10**12),
        ("16GiB", 16 << 30),
        ("1.001k", 1001),
        ("4.999M", 4_999_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_numbers_as_people_write_them(text: str, number: int) -> None:
    assert count("x", text) == number


def test_memory_is_rounded_down() -> None:
    for text, number in (("7.7GiB", 8267812044), ("1.0005k", 1000), ("1.5", 1), ("16GB", 16 * 10**9)):
        assert count("--memory", text, exact=False) == number
    assert main(["plan", "--entities", "1000", "--relations", "10", "--device", "cpu", "--memory", "7.7Gi"]) == 0


@pytest.mark.parametrize(
    "text", ["", "many", "-3", "5X", "1e", "NaN", "1.5", "1e400k", "1.0005k", "5i", "1e18", "9" * 5000]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--entities"):
        count("--entities", text)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --entities 5e6 --relations 800 --dim 512 --method self-adversarial --device cpu"
    assert main([*words.split(), "--memory", "64GB"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"entity table +\S+ +host +\S+ +10.2 GB", out)
    assert "This fits." in out
    assert main([*words.split(), "--memory", "12GB"]) == 0
    assert "This does not fit" in capsys.readouterr().out
    assert main(["plan", "--entities", "five", "--relations", "1"]) == 2
    assert "--entities: got 'five'" in capsys.readouterr().err
