"""Options: the YAML round trip, and every way in which one is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from dhns_fast.errors import DataError, InputError
from dhns_fast.models import MODELS
from dhns_fast.train import TrainConfig, config

FILLED = {
    "data": "some folder/Äpfel",
    "features": ["image", "text"],
    "model": "transe",
    "dim": 6,
    "margin": 12,
    "epsilon": 1.5,
    "norm": 2,
    "fusion": False,
    "train_features": True,
    "method": "dhns",
    "loss": "one-vs-all",
    "behaviour": "release",
    "epochs": 7,
    "batch_size": 9,
    "num_negatives": 3,
    "shared_negatives": 5,
    "corruption": "bernoulli",
    "filtered": False,
    "temperature": 1.0,
    "learning_rate": 1e-05,
    "generator_learning_rate": 0.3,
    "generator_steps": 2,
    "diffusion_steps": 4,
    "levels": [0, 3],
    "level_weights": [1.0, 0],
    "level_margins": [-0.5, 2.0],
    "margin_schedule": "signal",
    "mu": 0.0,
    "n3": 0.0,
    "seed": 2**40,
    "validate_every": 2,
    "patience": 0,
    "validation_from_train": 0.25,
    "precision": "bf16",
    "backend": "eager",
    "device": "cuda:1",
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
    assert [name for name in FILLED if FILLED[name] == defaults[name] and name != "method"] == []


def test_changes_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dim: 6\nepochs: 0\n")
    assert TrainConfig.load(path, epochs=3) == TrainConfig(dim=6, epochs=3)
    path.write_text("learning_rate: 1e-3\nmu: 2E-2\nn3: -.5\ndata: 1e3x\n")
    assert TrainConfig.load(path, n3=0.0) == TrainConfig(learning_rate=0.001, mu=0.02, n3=0.0, data="1e3x")
    with pytest.raises(InputError, match=r"^seed must be at least 0, got -1$"):
        TrainConfig.load(path, n3=0.0, seed=-1)


def test_what_options_assume_of_the_models_holds() -> None:
    """Options are checked without importing torch, so they hold facts of the models a second time."""
    assert set(get_args(get_type_hints(TrainConfig)["model"])) == set(MODELS)
    assert {name: model.parts for name, model in MODELS.items() if model.parts > 1} == config.PARTS
    assert {name for name, model in MODELS.items() if model.distance} == set(config.DISTANCES)
    assert {name for name, model in MODELS.items() if model.condition} == set(config.CONDITIONED)


def test_defaults_that_depend_on_others() -> None:
    assert TrainConfig(diffusion_steps=50).level_list == [0, 5, 6, 12, 25]
    assert TrainConfig(diffusion_steps=1).level_list == [0] * 5
    assert TrainConfig(levels=[0, 1, 2, 3, 4]).level_list == [0, 1, 2, 3, 4]
    fused = {(m, b): TrainConfig(model=m, behaviour=b).fused for m in ("transe", "complex") for b in ("corrected", "release")}  # type: ignore[arg-type]
    assert [key for key, value in fused.items() if not value] == [("complex", "release")]
    assert TrainConfig(model="complex", behaviour="release", fusion=True).fused
    assert not TrainConfig(model="transe", fusion=False).fused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dim": 3}, "dim must be at least 4, got 3"),
    ({"dim": 7}, "dim must be a multiple of 2 for model complex and method dhns, got 7"),
    ({"dim": 7, "method": "uniform", "model": "rotate"}, "dim must be a multiple of 2 for model rotate and method uniform, got 7"),
    ({"dim": 6, "method": "uniform", "model": "quate"}, "dim must be a multiple of 4 for model quate and method uniform, got 6"),
    *(
        (
            {"model": model},
            f"method must be uniform or self-adversarial for model {model}: the generator of dhns has conditions for "
            "transe, distmult, complex, rotate alone",
        )
        for model in ("simple", "quate", "rescal", "cp", "pairre")
    ),
    ({"dim": "eight"}, "dim must be an integer, got 'eight'"),
    ({"dim": 8.0}, "dim must be an integer, got 8.0"),
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"epochs": True}, "epochs must be an integer, got True"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
    ({"generator_steps": 0}, "generator_steps must be at least 1, got 0"),
    ({"diffusion_steps": 0}, "diffusion_steps must be at least 1, got 0"),
    ({"validate_every": 0}, "validate_every must be at least 1, got 0"),
    ({"patience": -1}, "patience must be at least 0, got -1"),
    ({"mu": -0.1}, "mu must be at least 0, got -0.1"),
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"temperature": float("inf")}, "temperature must be a finite number, got inf"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ({"generator_learning_rate": -1.0}, "generator_learning_rate must be positive, got -1.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
    ({"margin": float("nan")}, "margin must be a finite number or null, got nan"),
    ({"margin": "six"}, "margin must be a finite number or null, got 'six'"),
    ({"n3": -1.0}, "n3 must be at least 0, got -1.0"),
    ({"model": "conve"}, "model must be one of transe, distmult, complex, rotate, simple, quate, rescal, cp, pairre, got 'conve'"),
    ({"method": "dhms"}, "method must be one of uniform, self-adversarial, dhns, got 'dhms'"),
    (
        {"loss": "one-vs-all", "method": "self-adversarial"},
        "method must be uniform or dhns for loss one-vs-all, which has no corruptions to weigh, got self-adversarial",
    ),
    ({"loss": "hinge"}, "loss must be one of corruption, one-vs-all, got 'hinge'"),
    ({"norm": 3}, "norm must be one of 1, 2, got 3"),
    ({"norm": True}, "norm must be one of 1, 2, got True"),
    ({"fusion": "yes"}, "fusion must be true or false or null, got 'yes'"),
    ({"precision": "fp8"}, "precision must be one of ieee, tf32, bf16 or null, got 'fp8'"),
    ({"features": 3}, "features must be text or a list (each text), got 3"),
    ({"validation_from_train": 1.0}, "validation_from_train must be at least 0 and below 1, got 1.0"),
    ({"validation_from_train": -0.1}, "validation_from_train must be at least 0 and below 1, got -0.1"),
    ({"levels": 3}, "levels must be a list (each an integer) or null, got 3"),
    ({"levels": [0, 1.5]}, "levels must be a list (each an integer) or null, got [0, 1.5]"),
    ({"levels": [0, 1]}, "level_weights must have one value for each of the 2 levels [0, 1], got [0.0, 0.5, 1.0, 1.0, 0.5]"),
    (
        {"levels": [], "level_weights": [], "level_margins": []},
        "levels must be one or more integers in 0..49 (diffusion_steps - 1), got []",
    ),
    ({"levels": [0, 1, 2, 3, 50]}, "levels must be one or more integers in 0..49 (diffusion_steps - 1), got [0, 1, 2, 3, 50]"),
    ({"levels": [-1, 1, 2, 3, 4]}, "levels must be one or more integers in 0..49 (diffusion_steps - 1), got [-1, 1, 2, 3, 4]"),
    ({"level_margins": [1.0]}, "level_margins must have one value for each of the 5 levels [0, 5, 6, 12, 25], got [1.0]"),
    ({"margin_schedule": "cosine"}, "margin_schedule must be one of table, linear, signal, learned, got 'cosine'"),
    ({"margin_schedule": "learned", "model": "distmult"}, "margin_schedule learned is for distance models: distmult has no margins"),
    (
        {"margin_schedule": "learned", "model": "rotate", "level_margins": [0.0, 0.1, 0.2, 0.0, 0.3]},
        "level_margins must be positive where level_weights are, for margins to be learned, got [0.0, 0.1, 0.2, 0.0, 0.3]",
    ),
    ({"level_weights": [0.0] * 5}, "level_weights must be at least 0 and not all 0, got [0.0, 0.0, 0.0, 0.0, 0.0]"),
    ({"level_weights": [1.0, -1.0, 1.0, 1.0, 1.0]}, "level_weights must be at least 0 and not all 0, got [1.0, -1.0, 1.0, 1.0, 1.0]"),
    ({"level_weights": [float("inf")] * 5}, "level_weights must be a list (each a finite number), got [inf, inf, inf, inf, inf]"),
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
    name = message.partition(" ")[0]
    lines = [i for i, line in enumerate(path.read_text().split("\n"), 1) if line.startswith(f"{name}:")]
    assert str(file.value) == f"{path}{f':{lines[0]}' if lines else ''}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dim: 8\nepohcs: 3\n", ":2: unknown option 'epohcs'; accepted are data, features, model, dim, "),
        (b"dim: 8\n3: 4\n", ":2: unknown option 3; accepted are "),
        (b"- dim\n", ":1: expected a mapping of options, found list"),
        (b"", ":1: expected a mapping of options, found NoneType"),
        (b"dim\n", ":1: expected a mapping of options, found str"),
        (b"dim: 8\nlevels: [1, 2\nseed: 3\n", ":3: not valid YAML (expected ',' or ']', but got ':')"),
        (b"dim: 8\n\tseed: 3\n", ":2: not valid YAML (found character '\\t' that cannot start any token)"),
        (b"dim: 8\nseed: !!python/object:os.system 3\n", ":2: not valid YAML (could not determine a constructor for the tag"),
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


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.yaml: cannot be read \(No such file or directory\)"):
        TrainConfig.load(tmp_path / "c.yaml")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        TrainConfig.load(tmp_path)
