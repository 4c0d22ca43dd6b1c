"""Damaged runs: a checkpoint, a packed run, a cell of a grid or an option is what was written, or one DataError; and
what has a right checksum over wrong content is refused, or runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damaged, only_refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from fixtures.training import config

from dhns_fast import files
from dhns_fast.data import load, synthetic, write
from dhns_fast.errors import DataError, DhnsError
from dhns_fast.predict import read_entities, read_triples
from dhns_fast.train import Trainer, checkpoint, distributed, grid, load_run, tune
from dhns_fast.train import run as runs
from dhns_fast.train.assemble import Run
from dhns_fast.train.distributed import Processes
from dhns_fast.train.pack import pack

NASTY = st.sampled_from(
    [None, True, -1, 0, 3, 1.5, 1e300, 10**30, float("nan"), float("inf"), "", "text", "\x1b[2J", "x" * 300, [], [[]], {}, {"a": 1}]
)  # fmt: skip


@functools.cache
def trained(place: Path) -> Path:
    """A graph `g`, a run `r`, the run packed, the same weights as two processes would keep them in `d`, and a cell."""
    folder = place / "run"
    folder.mkdir()
    write(synthetic(12, 2, 60, {"text": 3}, seed=1, valid_fraction=0.1, test_fraction=0.1), folder / "g")
    options = config(data=str(folder / "g"), epochs=1, dim=4, batch_size=16, diffusion_steps=4, model="complex")
    for name in "rd":
        (folder / name).mkdir()
    runs.train(Trainer(options, load(folder / "g"), folder / "r"))
    pack(load_run(folder / "r"), folder / "packed")
    tensors, meta = checkpoint.load(folder / "r/last.safetensors", load(folder / "g").fingerprint())
    shutil.copy(folder / "r/config.yaml", folder / "d")
    for name in ("last", "best"):
        distributed.save(folder / "d", name, tensors if name == "last" else weights(tensors), meta, Processes())
    grid._train(options, folder / "cell.json")
    return folder


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name.startswith(("model.", "margins.", "generator."))}


@functools.cache
def trainer(place: Path, name: str = "r") -> Trainer:
    folder = trained(place) / name
    return Trainer(runs.TrainConfig.load(folder / "config.yaml"), load(trained(place) / "g"), folder)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@functools.cache
def whole(place: Path) -> dict[str, Tensor]:
    return weights(checkpoint.load(trained(place) / "r/last.safetensors", trainer(place)._graph)[0])


def restore(place: Path) -> dict[str, Tensor]:
    trainer(place).restore()
    return weights(trainer(place)._tensors())


def of_best(place: Path) -> dict[str, Tensor]:
    return load_run(trained(place) / "r").state()


def of_packed(place: Path) -> dict[str, Tensor]:
    return load_run(trained(place) / "packed").state()


CHECKPOINTS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "r/last.safetensors": restore, "r/best.safetensors": of_best, "packed": of_packed,
}  # fmt: skip


@st.composite
def flipped(draw: st.DrawFn, original: bytes) -> bytes:
    """One bit in the header or among the numbers, or anything else."""
    if draw(st.booleans()):
        return draw(damaged(original))
    data = bytearray(original)
    header = 8 + int.from_bytes(data[:8], "little")
    data[draw(st.integers(0, header - 1) | st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@pytest.mark.parametrize("name", CHECKPOINTS)
@given(data=st.data())
def test_damaged_checkpoints(place: Path, name: str, data: st.DataObject) -> None:
    path, expected = trained(place) / name, whole(place)
    original = path.read_bytes()
    path.write_bytes(data.draw(flipped(original), label="content"))
    try:
        found = only_refused(lambda: CHECKPOINTS[name](place), DataError)
        if found is not None:
            same(found, expected)
    finally:
        path.write_bytes(original)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """JSON with something in it gone, of another type, twice, or under another name."""
    value = here = copy.deepcopy(value)
    while True:
        if not isinstance(here, (dict, list)) or not here:
            return draw(NASTY)
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], (dict, list)) and here[key] and draw(st.integers(0, 3)):
            here = here[key]
            continue
        kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if kind == "replace":
            here[key] = draw(NASTY)
        elif kind == "remove":
            del here[key]
        elif isinstance(here, dict):
            here[draw(st.sampled_from(("new", "", f"{key}x")))] = here[key]
        else:
            here.append(here[key])
        return value


@st.composite
def other_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which one is gone, of another name, shape, dtype or content."""
    name = draw(st.sampled_from(sorted(tensors)))
    x, out = tensors[name], dict(tensors)
    kind = draw(st.sampled_from(("remove", "rename", "shape", "empty", "dtype", "value", "bytes")))
    if kind == "remove":
        del out[name]
    elif kind == "rename":
        out[draw(st.sampled_from((f"{name}x", name[1:], "optimizer.99.step", "", "features.\x1b")))] = out.pop(name)
    elif kind == "shape":
        out[name] = draw(st.sampled_from((x.flatten(), x[None], torch.cat([x.flatten(), x.flatten()]))))
    elif kind == "empty":
        out[name] = x.flatten()[:0]
    elif kind == "dtype":
        out[name] = x.to(draw(st.sampled_from((torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16))))
    elif x.numel():
        out[name] = y = x.clone()
        at = draw(st.integers(0, x.numel() - 1))
        if kind == "value":
            if y.is_floating_point():
                y.view(-1)[at] = draw(st.sampled_from((float("nan"), float("inf"), -1.0, 1e30, 0.0)))
            else:
                y.view(-1)[at] = draw(st.sampled_from((0, 1, 7, 127, *((-1, 2**40) if y.element_size() == 8 else ()))))
        else:
            raw = y.view(-1).view(torch.uint8)
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return out


@pytest.mark.parametrize("name", CHECKPOINTS)
@given(data=st.data())
def test_resealed_checkpoints(place: Path, name: str, data: st.DataObject) -> None:
    """Whoever computes the checksum anew may say anything; what is believed must work."""
    path = trained(place) / name
    original = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()[checkpoint.HEADER])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # the handle is no mapping
    if data.draw(st.booleans(), label="header"):
        meta = data.draw(changed(meta), label="meta")
    else:
        tensors = data.draw(other_tensors(tensors), label="tensors")
    try:
        try:
            checkpoint.save(path, tensors, meta)
        except UnicodeEncodeError:
            return
        if name == "r/last.safetensors":
            if only_refused(lambda: CHECKPOINTS[name](place), DataError) is not None:
                with_anything(trainer(place).step)
        else:
            run = only_refused(lambda: load_run(trained(place) / name.partition("/best")[0]), DataError)
            if run is not None:
                with_anything(run.evaluate)
    finally:
        path.write_bytes(original)


def with_anything(act: Callable[[], object]) -> None:
    """Numbers that may be anything end with a refusal of the package, if not well."""
    with contextlib.suppress(DhnsError):
        act()


@given(data=st.data())
def test_damaged_parts_of_several_processes(place: Path, data: st.DataObject) -> None:
    folder, expected = trained(place) / "d", whole(place)
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())), label="file")
    original = path.read_bytes()
    path.write_bytes(data.draw(damaged(original), label="content"))
    best = path.name == "best.json" or path.parent.name.startswith("best")

    def act() -> dict[str, Tensor]:
        if best or path.name == "config.yaml":
            return load_run(folder).state()
        trainer(place, "d").restore()
        return weights(trainer(place, "d")._tensors())

    try:
        found = only_refused(act)
        if found is not None and path.name != "config.yaml":
            same(found, expected)
    finally:
        path.write_bytes(original)


@given(data=st.data())
def test_damaged_options_of_a_run(place: Path, data: st.DataObject) -> None:
    """Other options may be right ones: then they run."""
    path = trained(place) / "r/config.yaml"
    original = path.read_bytes()
    path.write_bytes(data.draw(damaged(original), label="content"))
    try:
        run = only_refused(lambda: load_run(trained(place) / "r"))
        assert run is None or isinstance(run, Run)
    finally:
        path.write_bytes(original)


@given(data=st.data())
def test_damaged_metrics(place: Path, data: st.DataObject) -> None:
    path, run = trained(place) / "r/metrics.json", load_run(trained(place) / "r")
    original = path.read_bytes()
    path.write_bytes(data.draw(damaged(original), label="content"))
    try:
        if only_refused(lambda: pack(run, place / "again"), DataError) is not None:
            load_run(place / "again")
    finally:
        path.write_bytes(original)


@given(data=st.data())
def test_damaged_cells(place: Path, data: st.DataObject) -> None:
    path = trained(place) / "cell.json"
    options, original = trainer(place).config, path.read_bytes()
    expected = grid.kept(path, options)
    cell = json.loads(original)
    sealed = data.draw(st.booleans(), label="sealed")
    if sealed:
        del cell[files.CHECKSUM]
        cell = data.draw(changed(cell), label="cell")
        if isinstance(cell, dict):
            cell[files.CHECKSUM] = files.digest(cell)
        path.write_text(json.dumps(cell))
    else:
        path.write_bytes(data.draw(damaged(original), label="content"))
    try:
        found = only_refused(lambda: grid.kept(path, options), DataError)
        if found is not None and not sealed:
            assert found == expected
        if found is not None:
            row = grid.Row(options.data, options.model, options.method, {0: found, 1: found})
            grid.markdown([row])
            grid.write_table([row], place / "table.csv")
    finally:
        path.write_bytes(original)


QUERIES = b"e0\tr0\te1\ne2\tr1\te3\n#4\tr0\t#5\n"
SPACE = b"learning_rate: {low: 1e-4, high: 1e-2, log: true}\ndim: [8, 16]\nmodel: [complex, rotate]\n"


@given(data=st.data())
def test_damaged_lists_of_queries(place: Path, data: st.DataObject) -> None:
    kg, path = trainer(place).kg, place / "queries"
    path.write_bytes(data.draw(damaged(QUERIES), label="content"))
    found = only_refused(lambda: read_triples(path, kg), DataError)
    if found is not None:
        assert len(found[0]) == len(found[1])
        assert not len(found[1]) or (int(found[1].min()) >= 0 and int(found[1].max()) < kg.num_entities)
    only_refused(lambda: read_triples(path, kg, unknowns=1), DataError)
    ids = only_refused(lambda: read_entities(path, kg), DataError)
    assert ids is None or not len(ids) or int(ids.max()) < kg.num_entities


@given(data=st.data())
def test_damaged_spaces(place: Path, data: st.DataObject) -> None:
    path = place / "space.yaml"
    path.write_bytes(data.draw(damaged(SPACE), label="content"))
    only_refused(lambda: tune.read_space(path), DataError)
