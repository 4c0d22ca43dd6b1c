"""Training on several processes: tables split by rows, checkpoints that any number of processes reads, the same run
whatever their number.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fixtures.training import config, graph
from torch import Tensor
from torch.distributed.tensor import DTensor

from dhns_fast.errors import DataError, InputError
from dhns_fast.files import WriteError
from dhns_fast.ops import build
from dhns_fast.optim import ROW_OPTIMIZERS, RowEmbedding
from dhns_fast.optim.sharded import ShardedEmbedding, share
from dhns_fast.train import Trainer
from dhns_fast.train.assemble import build as assemble
from dhns_fast.train.distributed import Processes, load, save

WORLD = 4
WORLDS = (1, 2, WORLD)
D = 5
# Rows of a whole table: fewer than processes, divided evenly, with a rest, and with processes that own none (4 of 5
# rows in twos).
SIZES = (1, 5, 8, 23)


def test_rows_are_shared_as_dtensors_are() -> None:
    for total in (0, *SIZES, 1000):
        for processes in (1, 2, 3, 4, 7):
            chunks = torch.arange(total).chunk(processes) if total else ()
            for rank in range(processes):
                first, end = share(total, rank, processes)
                assert list(range(first, end)) == (chunks[rank].tolist() if rank < len(chunks) else [])


def check(group: dist.ProcessGroup, world: int, rank: int, E: int, method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(E)
    start = torch.randn(E, D, generator=generator).to(dtype)
    ids = torch.randint(E, (3, 12), generator=generator)
    weight = torch.randn(3, 12, D, generator=generator)
    whole = RowEmbedding(E, D, weight=start.clone())
    first, end = share(E, rank, world)
    mine = ShardedEmbedding(E, D, group, weight=start[first:end].clone())
    assert (mine.row_offset, len(mine.weight)) == (first, end - first)
    late, late_here = (
        RowEmbedding(E, D, weight=start.clone()),
        ShardedEmbedding(E, D, group, weight=start[first:end].clone()),
    )
    optimizers = [
        ROW_OPTIMIZERS[method](tables, lr=0.1, n3=0.01, seed=1) for tables in ([whole, late], [mine, late_here])
    ]
    for step in range(3):
        whole(ids[step]).mul(weight[step]).pow(2).sum().backward()
        # Each process has its share of the batch, some of them none; the last step looks up twice.
        own = slice(*share(12, rank, world)) if step else slice(0, 12 * (rank == 0))
        rows = mine(ids[step, own])
        assert rows.shape == (len(ids[step, own]), D)
        loss = rows.mul(weight[step, own]).pow(2).sum()
        if step == 2:
            loss = loss + mine(ids[step, :1]).sum() * (rank == world - 1)
            whole(ids[step, :1]).sum().backward()
        if step == 1:  # the other table has gradients in this step alone, and of one process
            loss = loss + late_here(ids[step] if rank == world - 1 else ids[step, :0]).sum()
            late(ids[step]).sum().backward()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        assert [int(optimizer.state[table.weight]["step"]) for table in optimizer.tables] == [3, 1]
    # A row's terms are added in another order.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (
        (mine.weight.detach() - whole.weight.detach()[first:end]).float().abs().max().item() <= tolerance
        if end > first
        else True
    )
    everything = torch.arange(E)
    parts = [torch.empty(0)] * world
    dist.all_gather_object(parts, mine.weight.detach(), group=group)
    assert torch.equal(mine.look_up(everything), torch.cat(parts).float())


def state(E: int, processes: Processes, fill: bool) -> dict[str, Tensor]:
    """A table with a state of its own, and something that every process has whole."""
    first, end = share(E, processes.rank, processes.count)
    value = torch.arange(E * D, dtype=torch.float32).view(E, D) if fill else torch.zeros(E, D)
    return {
        "table": processes.spread(value[first:end].clone(), E),
        "sums": processes.spread((value[first:end, 0] + 0.5 if fill else value[first:end, 0]).clone(), E),
        "rng": torch.full((3,), 7 * fill, dtype=torch.uint8),
    }


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x  # type: ignore[no-untyped-call]


def check_checkpoints(folder: Path, everyone: dict[int, Processes]) -> None:
    """What any number of processes wrote, any other number reads; a failed write leaves the one before it."""
    E = SIZES[-1]
    for written, writers in everyone.items():
        place = folder / str(written)
        if writers.rank == 0:
            place.mkdir(exist_ok=True)
        dist.barrier()
        if writers.rank >= 0:
            for step in (1, 2):
                save(place, "last", state(E, writers, True), {"graph": {"triples": "g"}, "step": step}, writers)
        dist.barrier()
        assert sorted(path.name.split("-")[0] for path in place.iterdir()) == ["last", "last.json"]
        for readers in everyone.values():
            if readers.rank >= 0:
                got = state(E, readers, False)
                assert load(place, "last", got, {"triples": "g"}, readers)["step"] == 2
                want = state(E, Processes(), True)
                assert all(torch.equal(whole(got[name]), want[name]) for name in want)
                with pytest.raises(DataError, match="another graph"):
                    load(place, "last", got, {"triples": "h"}, readers)
                with pytest.raises(DataError, match="do not fit the model"):
                    load(place, "last", state(E + 1, readers, False), {"triples": "g"}, readers)
            dist.barrier()
    # One process cannot write: all of them say so, and what was there is untouched.
    two = everyone[2]
    if two.rank >= 0:
        broken = state(E, two, True)
        with pytest.MonkeyPatch.context() as patch:
            if two.rank == 1:
                patch.setattr(os, "fsync", full_disk)
            with pytest.raises(WriteError):
                save(folder / "2", "last", broken, {"graph": {"triples": "g"}, "step": 3}, two)
        got = state(E, two, False)
        assert load(folder / "2", "last", got, {"triples": "g"}, two)["step"] == 2


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Losses of every kind, sides of every triple, both ways to draw corruptions, features and the generator.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (
        50,
        {
            "model": "complex",
            "method": "self-adversarial",
            "optimiser": "rowwise-adagrad",
            "learning_rate": 0.1,
            "features": "none",
        },
    ),
    "shared": (
        6,
        {
            "model": "transe",
            "method": "uniform",
            "optimiser": "adagrad",
            "shared_negatives": 24,
            "corruption": "bernoulli",
        },
    ),
    "dhns": (6, {"model": "rotate", "optimiser": "lazy-adam", "corruption": "bernoulli", "batch_size": 61}),
    "normalised": (
        4,
        {"model": "transe", "optimiser": "lazy-adam", "behaviour": "normalised", "sampling_steps": 5, "batch_size": 61},
    ),
    "release": (4, {"model": "distmult", "optimiser": "adagrad", "behaviour": "release", "train_features": False}),
}


def trainer_of(name: str, folder: Path, processes: Processes | None = None) -> Trainer:
    chosen, kg = config(**RUNS[name][1]), graph()
    if chosen.features == "none":
        kg = dataclasses.replace(kg, features={}, present={})
    return Trainer(chosen, kg, folder, assemble(chosen, kg, processes))


def losses_of(trainer: Trainer, steps: int) -> Tensor:
    """What the processes together have of each term, `[steps, terms]`."""
    rows = []
    for _ in range(steps):
        before = trainer._sums.clone()
        trainer.step()
        rows.append(trainer._sums - before)
    return torch.stack(rows)


def check_training(folder: Path, everyone: dict[int, Processes]) -> None:
    for world, processes in everyone.items():
        if processes.rank < 0:
            continue
        for name, (steps, _) in RUNS.items():
            place = folder / f"{name}-{world}"
            if processes.first:
                place.mkdir()
            processes.wait()
            trainer = trainer_of(name, place, processes)
            losses = losses_of(trainer, steps)
            result = trainer.validate("test")
            trainer.save()
            if processes.first:
                parts = {
                    f"{side}.{field}": getattr(getattr(result, side), field)
                    for side in ("head", "tail")
                    for field in ("greater", "equal")
                }
                torch.save({"losses": losses, **parts}, place / "seen.pt")
            # On from what they have written, on a trainer that has not run.
            again = trainer_of(name, place, processes)
            again.restore()
            assert torch.equal(losses_of(again, 2), losses_of(trainer, 2))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    everyone = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        everyone[world] = Processes(group, rank, world) if rank < world else Processes(None, -1, world)
        if rank < world:
            for E in SIZES:
                check(group, world, rank, E, "lazy-adam", torch.float32)
            for method, dtype in (
                ("adagrad", torch.float32),
                ("rowwise-adagrad", torch.float32),
                ("rowwise-adagrad", torch.bfloat16),
            ):
                check(group, world, rank, SIZES[-1], method, dtype)
    check_checkpoints(Path(folder), everyone)
    check_training(Path(folder), everyone)
    with pytest.raises(InputError, match="weight: got 9 rows"):
        ShardedEmbedding(8, D, dist.group.WORLD, weight=torch.zeros(9, D))  # type: ignore[arg-type]
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


def test_any_number_of_processes_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    build.why_not("cpu")  # once, and not in every process
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    for name, (steps, _) in RUNS.items():
        want = losses_of(trainer_of(name, tmp_path), steps)
        for world in WORLDS:
            place = tmp_path / f"{name}-{world}"
            seen = torch.load(place / "seen.pt")
            assert (seen["losses"] - want).abs().max() < 1e-6 * max(1, want.abs().max().item()), (name, world)
            # One process reads what they have written, and has their ranks.
            alone = trainer_of(name, place)
            alone.restore()
            result = alone.validate("test")
            for key, ranks in seen.items():
                if key != "losses":
                    side, field = key.split(".")
                    assert torch.equal(getattr(getattr(result, side), field), ranks), (name, world, key)
