"""Options: the YAML round trip, and every way in which one is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from dhns_fast.catalogue import CONDITIONED, LOSSES, MARGIN_SCHEDULES, METHODS, MODELS, PRECISIONS
from dhns_fast.errors import DataError, InputError
from dhns_fast.train import TrainConfig

FILLED = {
    "data": "some folder/Äpfel",
    "features": ["image", "text"],
    "model": "transe",
    "dim": 6,
    "margin": 12,
    "epsilon": 1.5,
    "norm": 2,
    "fusion": False,
    "reciprocal": True,
    "train_features": True,
    "method": "near-misses",
    "loss": "one-vs-all",
    "behaviour": "release",
    "epochs": 7,
    "batch_size": 9,
    "order": "shuffled",
    "num_negatives": 3,
    "shared_negatives": 5,
    "corruption": "bernoulli",
    "filtered": False,
    "temperature": 1.0,
    "optimiser": "adam",
    "table_dtype": "float32",
    "table_device": "device",
    "learning_rate": 1e-05,
    "generator_learning_rate": 0.3,
    "generator_steps": 2,
    "diffusion_steps": 4,
    "decay_after": 0.5,
    "plateau_factor": 0.9,
    "plateau_patience": 1,
    "plateau_threshold": 0.01,
    "schedule": "cosine",
    "sampling_steps": 9,
    "control": "shuffled",
    "hard_negatives": 3,
    "pool": 7,
    "levels": [0, 3],
    "level_weights": [1.0, 0],
    "level_margins": [-0.5, 2.0],
    "margin_schedule": "signal",
    "mu": 0.0,
    "n3": 0.0,
    "dropout": 0.3,
    "relation_dropout": 0.2,
    "l2": 0.25,
    "weighted_penalty": True,
    "seed": 2**40,
    "validate_every": 2,
    "patience": 0,
    "validation_from_train": 0.25,
    "checkpoint_every": 2.5,
    "precision": "bf16",
    "backend": "eager",
    "device": "cuda:1",
    "cuda_graph": True,
}


@pytest.mark.parametrize("options", [{}, FILLED], ids=["defaults", "everything"])
def test_yaml_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    config = TrainConfig(**options)
    path = tmp_path / "config.yaml"
    config.save(path)
    assert TrainConfig.load(path) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.to_dict()
    assert all(config.to_dict()[name] == value for name, value in options.items())
    # Every field is written, in the order of the documentation: a run folder says everything that decided it.
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(TrainConfig)]


def test_the_round_trip_covers_every_option() -> None:
    defaults = TrainConfig().to_dict()
    assert FILLED.keys() == defaults.keys()
    assert [name for name in FILLED if FILLED[name] == defaults[name]] == ["table_dtype", "table_device"]


def test_changes_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dim: 6\nepochs: 0\n")
    assert TrainConfig.load(path, epochs=3) == TrainConfig(dim=6, epochs=3)
    path.write_text("learning_rate: 1e-3\nmu: 2E-2\nn3: -.5\ndata: 1e3x\n")
    assert TrainConfig.load(path, n3=0.0) == TrainConfig(learning_rate=0.001, mu=0.02, n3=0.0, data="1e3x")
    with pytest.raises(InputError, match=r"^seed: got -1; accepted: 0 or more$"):
        TrainConfig.load(path, n3=0.0, seed=-1)


def test_defaults_that_depend_on_others() -> None:
    assert TrainConfig(diffusion_steps=50).level_list == [0, 5, 6, 12, 25]
    assert TrainConfig(diffusion_steps=1).level_list == [0] * 5
    assert TrainConfig(levels=[0, 1, 2, 3, 4]).level_list == [0, 1, 2, 3, 4]
    fused = {
        (m, b): TrainConfig(model=m, behaviour=b).fused for m in ("transe", "complex") for b in ("corrected", "release")
    }  # type: ignore[arg-type]
    assert [key for key, value in fused.items() if not value] == [("complex", "release")]
    assert TrainConfig(model="complex", behaviour="release", fusion=True).fused
    assert not TrainConfig(model="transe", fusion=False).fused


UNCONDITIONED = ", ".join(name for name, x in METHODS.items() if not x.conditioned)
ONE_VS_ALL = ", ".join(name for name, x in METHODS.items() if name == "uniform" or x.beside)
LEVELS = "one or more integers from 0 to 49, diffusion_steps - 1, or shares between 0 and 1"

TOGETHER = "levels, level_weights and level_margins go together"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dim": 3}, "dim: got 3; accepted: 4 or more"),
    ({"dim": 7}, "dim: got 7; accepted: multiples of 2 for model complex and method dhns"),
    (
        {"dim": 7, "method": "uniform", "model": "rotate"},
        "dim: got 7; accepted: multiples of 2 for model rotate and method uniform",
    ),
    (
        {"dim": 6, "method": "uniform", "model": "quate"},
        "dim: got 6; accepted: multiples of 4 for model quate and method uniform",
    ),
    *(
        (
            {"model": model},
            f"method: got 'dhns'; accepted: {UNCONDITIONED} for model {model}; dhns for {', '.join(CONDITIONED)}",
        )
        for model in MODELS
        if model not in CONDITIONED
    ),
    ({"dim": "eight"}, "dim: got 'eight'; accepted: integers"),
    ({"dim": 8.0}, "dim: got 8.0; accepted: integers"),
    ({"epochs": 0}, "epochs: got 0; accepted: 1 or more"),
    ({"epochs": True}, "epochs: got True; accepted: integers"),
    ({"batch_size": 0}, "batch_size: got 0; accepted: 1 or more"),
    ({"num_negatives": 0}, "num_negatives: got 0; accepted: 1 or more"),
    ({"generator_steps": 0}, "generator_steps: got 0; accepted: 1 or more"),
    ({"diffusion_steps": 0}, "diffusion_steps: got 0; accepted: 1 or more"),
    ({"validate_every": 0}, "validate_every: got 0; accepted: 1 or more"),
    ({"patience": -1}, "patience: got -1; accepted: 0 or more"),
    ({"mu": -0.1}, "mu: got -0.1; accepted: 0 or more"),
    ({"temperature": -1.0}, "temperature: got -1.0; accepted: 0 or more"),
    ({"temperature": float("inf")}, "temperature: got inf; accepted: finite numbers"),
    ({"seed": -1}, "seed: got -1; accepted: 0 or more"),
    *(
        ({name: 1 << 63}, f"{name}: got 9223372036854775808; accepted: 9223372036854775807 or less")
        for name in ("seed", "batch_size", "epochs", "pool")
    ),
    ({"dim": 4_000_000}, "dim: got 4000000; accepted: 1048576 or less"),
    ({"diffusion_steps": 10**9}, "diffusion_steps: got 1000000000; accepted: 100000 or less"),
    ({"margin": 1e300}, "margin: got 1e+300; accepted: 1000000000000000.0 or less"),
    ({"epsilon": -1e39}, "epsilon: got -1e+39; accepted: 1000000000000000.0 or less"),
    ({"learning_rate": 0.0}, "learning_rate: got 0.0; accepted: numbers above 0"),
    ({"generator_learning_rate": -1.0}, "generator_learning_rate: got -1.0; accepted: numbers above 0"),
    ({"learning_rate": float("nan")}, "learning_rate: got nan; accepted: finite numbers"),
    ({"margin": float("nan")}, "margin: got nan; accepted: finite numbers or null"),
    ({"margin": "six"}, "margin: got 'six'; accepted: finite numbers or null"),
    ({"n3": -1.0}, "n3: got -1.0; accepted: 0 or more"),
    ({"model": "conve"}, f"model: got 'conve'; accepted: {', '.join(MODELS)}"),
    ({"method": "dhms"}, f"method: got 'dhms'; accepted: {', '.join(METHODS)} (did you mean 'dhns'?)"),
    (
        {"loss": "one-vs-all", "method": "self-adversarial"},
        f"method: got 'self-adversarial'; accepted: {ONE_VS_ALL} for loss one-vs-all, which has no corruptions to weigh",
    ),
    ({"loss": "hinge"}, f"loss: got 'hinge'; accepted: {', '.join(LOSSES)}"),
    ({"norm": 3}, "norm: got 3; accepted: 1, 2"),
    ({"norm": True}, "norm: got True; accepted: 1, 2"),
    ({"fusion": "yes"}, "fusion: got 'yes'; accepted: true or false or null"),
    ({"precision": "fp8"}, f"precision: got 'fp8'; accepted: {', '.join(PRECISIONS)} or null"),
    ({"features": 3}, "features: got 3; accepted: text or lists of text"),
    ({"validation_from_train": 1.0}, "validation_from_train: got 1.0; accepted: shares from 0 to below 1"),
    ({"validation_from_train": -0.1}, "validation_from_train: got -0.1; accepted: shares from 0 to below 1"),
    ({"levels": 3}, "levels: got 3; accepted: lists of finite numbers or null"),
    ({"levels": [0, 1.5, 2, 3, 4]}, f"levels: got [0, 1.5, 2, 3, 4]; accepted: {LEVELS}"),
    (
        {"levels": [0, 1]},
        "level_weights: got [0.0, 0.5, 1.0, 1.0, 0.5]; accepted: one value for each of the 2 levels [0, 1]: "
        + TOGETHER,
    ),
    (
        {"levels": [], "level_weights": [], "level_margins": []},
        f"levels: got []; accepted: {LEVELS}",
    ),
    ({"levels": [0, 1, 2, 3, 50]}, f"levels: got [0, 1, 2, 3, 50]; accepted: {LEVELS}"),
    ({"levels": [-1, 1, 2, 3, 4]}, f"levels: got [-1, 1, 2, 3, 4]; accepted: {LEVELS}"),
    (
        {"level_margins": [1.0]},
        "level_margins: got [1.0]; accepted: one value for each of the 5 levels [0, 5, 6, 12, 25]: " + TOGETHER,
    ),
    ({"margin_schedule": "cosine"}, f"margin_schedule: got 'cosine'; accepted: {', '.join(MARGIN_SCHEDULES)}"),
    (
        {"margin_schedule": "learned", "model": "distmult"},
        "margin_schedule: got 'learned'; accepted: table; distmult has no margins",
    ),
    (
        {"margin_schedule": "learned", "model": "rotate", "level_margins": [0.0, 0.1, 0.2, 0.0, 0.3]},
        "level_margins: got [0.0, 0.1, 0.2, 0.0, 0.3]; accepted: numbers above 0 where level_weights are, for margins to be learned",
    ),
    (
        {"level_weights": [0.0] * 5},
        "level_weights: got [0.0, 0.0, 0.0, 0.0, 0.0]; accepted: numbers of at least 0 that are not all 0",
    ),
    (
        {"level_weights": [1.0, -1.0, 1.0, 1.0, 1.0]},
        "level_weights: got [1.0, -1.0, 1.0, 1.0, 1.0]; accepted: numbers of at least 0 that are not all 0",
    ),
    (
        {"level_weights": [float("inf")] * 5},
        "level_weights: got [inf, inf, inf, inf, inf]; accepted: lists of finite numbers",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as python:
        TrainConfig(**options)
    assert str(python.value) == message
    path = tmp_path / "c.yaml"
    path.write_text("# options\n" + yaml.safe_dump({"data": "atlas"} | options, sort_keys=False))
    with pytest.raises(DataError) as file:
        TrainConfig.load(path)
    # The line of the option that the message names, or none where the file leaves that one at its default.
    name = python.value.argument
    lines = [i for i, line in enumerate(path.read_text().split("\n"), 1) if line.startswith(f"{name}:")]
    assert str(file.value) == f"{path}{f':{lines[0]}' if lines else ''}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dim: 8\nepohcs: 3\n", ":2: option: got 'epohcs'; accepted: data, features, model, dim, "),
        (b"dim: 8\n3: 4\n", ":2: option: got 3; accepted: data, "),
        (b"- dim\n", ":1: expected a mapping of options, found list"),
        (b"", ":1: expected a mapping of options, found NoneType"),
        (b"dim\n", ":1: expected a mapping of options, found str"),
        (b"dim: 8\nlevels: [1, 2\nseed: 3\n", ":3: not valid YAML (expected ',' or ']', but got ':')"),
        (b"dim: 8\n\tseed: 3\n", ":2: not valid YAML (found character '\\t' that cannot start any token)"),
        (
            b"dim: 8\nseed: !!python/object:os.system 3\n",
            ":2: not valid YAML (could not determine a constructor for the tag",
        ),
        (b"a\xff: 3\n", ": not text in UTF-8"),
    ],
)
def test_files_that_hold_no_options(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        TrainConfig.load(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_paths_that_are_no_text() -> None:
    with pytest.raises(InputError, match=r"^data: got 'g\\udcff'; accepted: text in UTF-8"):
        TrainConfig(data="g\udcff")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.yaml: cannot be read \(No such file or directory\)"):
        TrainConfig.load(tmp_path / "c.yaml")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        TrainConfig.load(tmp_path)
