"""Ranks and best entities over a table split by rows among processes: the very results of the whole table, on every
process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dhns_fast.data.filter import Ragged
from dhns_fast.errors import InputError
from dhns_fast.ops import build
from dhns_fast.reference.scoring import REDUCTIONS
from dhns_fast.scoring import rank_all, topk_all

WORLD = 3
# Entities on each process, by the number of processes: uneven, none at all, and more than a tile.
PARTS = {1: [(1,), (300,)], 2: [(1, 0), (0, 70), (1500, 3)], 3: [(0, 1, 0), (70, 1, 229), (1030, 1025, 64)]}


def case(entities: int, dim: int = 34) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Ragged]:
    """Scores with ties across all parts, NaN in one entity, a third of the entities known."""
    generator = torch.Generator().manual_seed(entities)
    query, entity = (torch.randn(n, dim, generator=generator) for n in (9, entities))
    entity[entities // 2 :] = entity[: entities - entities // 2].clone()
    if entities > 1:
        entity[1] = torch.nan
    target = torch.randint(0, entities, (9,), generator=generator)
    rows = [
        torch.randperm(entities, generator=generator)[: (row % 3) * entities // 4].sort().values for row in range(9)
    ]
    return query, entity, target, Ragged(torch.tensor([0, *map(len, rows)]).cumsum(0), torch.cat(rows))


def check(group: dist.ProcessGroup, world: int, rank: int, backend: str) -> None:
    # Library products (dot in eager) are what depends on shapes; the rest is quicker compiled.
    for sizes, reduction in itertools.product(PARTS[world], REDUCTIONS if backend == "cpu" else REDUCTIONS[:2]):
        total = sum(sizes)
        query, entity, target, known = case(total)
        part = entity.split(sizes)[rank]
        for filtered, scale in ((None, None), (known, query.abs() + 0.5)):
            options: dict[str, Any] = {"scale": scale, "backend": backend}
            whole, mine = (
                rank_all(query, e, target, reduction, filtered, group=g, **options)
                for e, g in ((entity, None), (part, group))
            )
            assert torch.equal(whole.greater, mine.greater)
            assert torch.equal(whole.equal, mine.equal)
            for k in {1, min(1024, total)}:
                best = topk_all(query, entity, k, reduction, filtered, **options)
                merged = topk_all(query, part, k, reduction, filtered, group=group, **options)
                assert all(torch.equal(x, y) for x, y in zip(best, merged, strict=True))


def refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def work(rank: int, folder: str, backends: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {world: dist.new_group(list(range(world))) for world in PARTS}
    for world, group in groups.items():
        if rank < world:
            for backend in backends:
                check(group, world, rank, backend)
    query, target, everyone = torch.ones(2, 4), torch.tensor([0, 1]), groups[WORLD]
    refuse(
        lambda: rank_all(query, query[:0], target, group=everyone), "entity: got an empty table [0, D] on every process"
    )
    refuse(
        lambda: rank_all(query, query, torch.tensor([0, 6]), group=everyone), "target: got entity 6; accepted: 0 to 5"
    )
    refuse(lambda: topk_all(query, query, 7, group=everyone), "k: got 7; accepted: integers from 1 to 6")
    other = torch.ones(2 + rank, 4)
    refuse(
        lambda: topk_all(other, query, 1, group=everyone), "query: got shapes [[2, 4], [3, 4], [4, 4]] on the processes"
    )
    dist.destroy_process_group()


def test_a_table_in_parts_has_the_ranks_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    backends = ["eager"] if build.why_not("cpu") else ["eager", "cpu"]
    mp.spawn(work, args=(str(tmp_path), backends), nprocs=WORLD)
