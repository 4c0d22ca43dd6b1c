"""What a run takes in memory, before anything is allocated: part by part, on host and device, and what to change where
it does not fit.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from dhns_fast.catalogue import SIDES
from dhns_fast.data import KnowledgeGraph
from dhns_fast.diffusion.denoiser import Denoiser
from dhns_fast.errors import InputError, Shown
from dhns_fast.models import MODELS
from dhns_fast.train.config import TrainConfig

# An interpreter with torch and this package (measured: 261 MB after the first steps on a graph of nothing).
PROCESS = 300 << 20
# A name in a list of Python strings, and its place.
NAME = 72
# Of a triple: three ids; one key in each side's filter; what the sampler searches through on a device other than the
# CPU.
TRIPLE, FILTER, SAMPLER = 24, 16, 16
# Of a triple and one of its candidates, whose row is read where it lies: ids, slopes, and what they are grouped by row
# in.
PAIR = 96
# Share of the memory that is free now which a run may count on.
USABLE = 0.95
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Sizes:
    """Of a graph.

    Attributes:
        entities, relations, triples: E, R, and the number of triples of train.
        features: widths D_m of the modalities.
        feature_bytes: of a number of a feature matrix: 4, or 2 for float16; 0 where features stay on disk, mapped.
    """

    entities: int
    relations: int
    triples: int
    features: tuple[int, ...] = ()
    feature_bytes: int = 4


@dataclass(frozen=True)
class Part:
    """Something that takes memory in each process: where ("host" or "device"), and why so much."""

    name: str
    where: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """The parts of a run, a process, and what they must fit in.

    Attributes:
        processes: that share the machine.
        device: "cpu", where host and device are one memory, or "cuda".
        host, accelerator: bytes free for a process on either; None where unknown or not used.
        advice: changes in the order in which they were tried, each with what it leads to; empty where everything fits.
    """

    parts: tuple[Part, ...]
    processes: int
    device: str
    host: int | None
    accelerator: int | None
    advice: tuple[str, ...] = ()

    def total(self, where: str) -> int:
        """Bytes in "host" or "device" memory; on a CPU all of it is the host's."""
        return sum(part.bytes for part in self.parts if self.device == "cpu" or part.where == where) * (
            self.device != "cpu" or where == "host"
        )

    @property
    def fits(self) -> bool:
        return all(
            limit is None or self.total(where) <= limit * USABLE
            for where, limit in (("host", self.host), ("device", self.accelerator))
        )

    def refuse_unless_it_fits(self) -> None:
        """Raises InputError, in one line, where a memory is too small."""
        for where, limit in (("host", self.host), ("device", self.accelerator)):
            if limit is not None and self.total(where) > limit * USABLE:
                largest = ", ".join(f"{p.name} {size(p.bytes)}" for p in sorted(self.parts, key=lambda p: -p.bytes)[:3])
                raise InputError(
                    "memory",
                    Shown(f"a run that takes {size(self.total(where))} of {where} memory a process ({largest})"),
                    f"{size(int(limit * USABLE))} a process, what is free here; "
                    + "; ".join(self.advice or ("less of everything",)),
                )


def size(number: int) -> str:
    """Bytes as people write them: "3.2 GB", 10⁹ bytes a GB."""
    for unit, digits in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if number >= 10**digits:
            return f"{number / 10**digits:.3g} {unit}"
    return f"{number} B"


def plan(
    config: TrainConfig,
    sizes: Sizes,
    processes: int = 1,
    device: str | None = None,
    host: int | None = None,
    accelerator: int | None = None,
    advise: bool = True,
) -> Plan:
    """Count what a configuration takes on a graph of these sizes.

    Args:
        config: its options of model, method, optimiser and batch count.
        processes: that train together on this machine, each with its part of the table and its share of the batch.
        device: "cpu" or "cuda"; None: what the configuration means here.
        host, accelerator: bytes free for all processes together, and on each one's device; None: no limit.
        advise: where it does not fit, look for what would.

    Raises:
        InputError: a size is out of range.
    """
    for name, value, least in (
        ("entities", sizes.entities, 1),
        ("relations", sizes.relations, 1),
        ("triples", sizes.triples, 0),
    ):
        if value < least:
            raise InputError(name, value, f"integers of at least {least}")
    if processes < 1:
        raise InputError("processes", processes, "integers of at least 1")
    kind = device or (
        "cuda" if config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    )
    made = Plan(
        tuple(_parts(config, sizes, processes, kind)),
        processes,
        kind,
        None if host is None else host // processes,
        accelerator if kind == "cuda" else None,
    )
    if made.fits or not advise:
        return made
    return dataclasses.replace(made, advice=tuple(_advice(config, sizes, processes, kind, host, accelerator)))


def _parts(config: TrainConfig, sizes: Sizes, processes: int, kind: str) -> list[Part]:
    E, D, B, N = sizes.entities, config.dim, -(-config.batch_size // processes), config.num_negatives
    rows = -(-E // processes)
    optimiser = config.optimiser_for(E)
    narrow = 2 if config.table_dtype == "bfloat16" else 4
    where = config.table_device
    moments, each = {"adam": (2, D), "lazy-adam": (2, D), "adagrad": (1, D), "rowwise-adagrad": (1, 1)}[optimiser]
    # Widths of relations and the generator's weights are facts of their classes. (On "meta", the model's normal draws
    # would import torch._dynamo.)
    with torch.random.fork_rng(devices=[]):
        small = MODELS[config.model](1, 1, D)
    with torch.device("meta"):
        generator = sum(p.numel() for p in Denoiser(D, None).parameters()) if config.recipe.generator else 0
    out = [
        Part("entity table", where, rows * D * narrow, f"{rows:,} rows of {D} numbers of {narrow} bytes"),
        Part("optimiser state", where, rows * each * moments * 4, f"{optimiser}: {moments * each} float32 a row"),
    ]
    if config.dense(E):
        out.append(Part("dense gradient", "device", rows * D * 4, f"{optimiser} updates every row in every step"))
        if (config.n3_weight or config.l2) and not config.weighted_penalty:
            out.append(Part("regulariser", "device", 2 * rows * D * 4, "penalty of the whole table, with its graph"))
    relations = sizes.relations * (1 + config.reciprocal) * small.relation_dim
    projections = sum(width * D for width in sizes.features)
    others = relations + projections + generator
    out.append(
        Part(
            "other weights",
            "device",
            others * 16,
            "relations, projections, generator; each with its gradient and state",
        )
    )
    out += [
        Part("triples", "device", sizes.triples * TRIPLE, f"{TRIPLE} bytes each"),
        Part(
            "known answers",
            "device",
            sizes.triples * (FILTER + SAMPLER * (config.filtered and kind == "cuda")),
            "filter and corruption; the filter of a converted graph is mapped, and takes what is looked at",
        ),
        Part("names", "host", (E + sizes.relations) * NAME, "of entities and relations"),
    ]
    if sizes.features and sizes.feature_bytes:
        out.append(
            Part(
                "features",
                "device",
                E * sum(sizes.features) * sizes.feature_bytes,
                "read whole; mapped from disk they take none",
            )
        )
    touched = (
        min(E, B * (N + 2)) if not config.shared_negatives else min(E, 2 * B + N * -(-B // config.shared_negatives))
    )
    candidates = B * (N + 1) if not config.shared_negatives else B * N
    if hard := config.hard_negatives * (config.recipe.beside and not config.recipe.generator):
        touched, candidates = min(E, touched + B * hard), candidates + B * hard
    in_place = (
        kind == "cpu"
        and processes == 1
        and not config.dense(E)
        and (narrow, where) == (4, "device")
        and not (config.shared_negatives or config.dropout or config.relation_dropout)
        and not (sizes.features and config.fused)
        and all(small.as_stored(side) for side in SIDES)
    )
    if in_place:
        step, why = candidates * PAIR, f"{candidates:,} candidates, scored and updated where they lie"
    else:
        step = 2 * touched * D * 4 + candidates * (4 + 3 * 8)
        why = f"{touched:,} rows looked up, their gradients, indices"
    step += 6 * B * D * 4
    if config.recipe.generator:
        modalities = 1 + len(sizes.features)
        step += modalities * B * D * 4 * (2 * len(config.active_levels) + 16)
    out.append(Part("a step", "device", step, why))
    out.append(Part("process", "host", PROCESS, "Python, torch, operators"))
    return out


def _advice(
    config: TrainConfig, sizes: Sizes, processes: int, device: str, host: int | None, accelerator: int | None
) -> list[str]:
    """Changes, one on top of the other, until everything fits."""
    lines: list[str] = []

    def tried(text: str, changed: TrainConfig, count: int = processes) -> bool:
        result = plan(changed, sizes, count, device, host, accelerator, advise=False)
        needs = size(result.total("device" if device == "cuda" else "host"))
        lines.append(f"{text}: {needs} a process{', which fits' if result.fits else ''}")
        return result.fits

    if config.optimiser_for(sizes.entities) != "rowwise-adagrad":
        config = dataclasses.replace(config, optimiser="rowwise-adagrad")
        if tried("--optimiser rowwise-adagrad", config):
            return lines
    if config.table_dtype != "bfloat16":
        config = dataclasses.replace(config, table_dtype="bfloat16")
        if tried("and --table-dtype bfloat16", config):
            return lines
    if device == "cuda":
        if config.table_device != "host":
            hosted = dataclasses.replace(config, table_device="host")
            if tried("and --table-device host", hosted):
                return lines
        for count in (2, 4, 8, 16, 32, 64):
            if count > processes and tried(f"and {count} processes with a device each", config, count):
                return lines
    if sizes.features and sizes.feature_bytes:
        sizes = dataclasses.replace(sizes, feature_bytes=0)
        if tried("and features as .npy files, which are mapped", config):
            return lines
    for dim in range(config.dim // 8 * 8, 0, -8):
        smaller = dataclasses.replace(config, dim=dim)
        if plan(smaller, sizes, processes, device, host, accelerator, advise=False).fits:
            tried(f"and --dim {dim}", smaller)
            return lines
    lines.append("no --dim makes it fit: a machine with more memory is needed")
    return lines


def free_memory(device: str = "cpu") -> tuple[int | None, int | None]:
    """Bytes free now: (of the host, within the limit of this process's control group; of the CUDA device, None for
    "cpu").
    """
    return _free_host(), torch.cuda.mem_get_info()[0] if device == "cuda" and torch.cuda.is_available() else None


def _free_host() -> int | None:
    free: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        for path in CGROUPS:
            if path.exists() and (text := path.read_text().strip()).isdigit():
                free.append(int(text))
    except OSError:
        pass
    if not free and hasattr(os, "sysconf"):
        try:
            free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (ValueError, OSError):
            return None
    return min(free, default=None)


def count(argument: str, text: str, exact: bool = True) -> int:
    """A number as people write it: 5000000, 5e6, 5M, 16GB, 1.5 TB, and 16GiB for 16 · 1024³.

    Args:
        exact: refuse what is not whole; otherwise it is rounded down, as 7.7GiB of memory.

    Raises:
        InputError: it is none, below 0, not whole where it must be, or 10^18 or more.
    """
    found = re.fullmatch(r"\s*([0-9]{1,40}(?:\.[0-9]{0,40})?(?:[eE]\+?[0-9]{1,3})?)\s*(?:([kMGT])(i?))?B?\s*", text)
    if found is None:
        raise InputError(argument, text, "numbers like 5000000, 5e6, 5M, 16GB or 16GiB")
    value = Fraction(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ")
    if (exact and value.denominator != 1) or value >= 10**18:
        raise InputError(argument, text, f"{'whole ' * exact}numbers below 10^18")
    return int(value)


def refuse_unless_it_fits(config: TrainConfig, kg: KnowledgeGraph, device: torch.device, processes: int = 1) -> None:
    """Refuse a run that would not fit in the memory that is free now and that this process has already.

    Raises:
        InputError: it would not; the message says what takes most and what to change.
    """
    widths = tuple(x.shape[1] for x in kg.features.values())
    sizes = Sizes(kg.num_entities, kg.num_relations, len(kg.train), widths)
    host, accelerator = free_memory(device.type)
    if host is not None:
        host += processes * resident()
    plan(config, sizes, processes, device.type, host, accelerator).refuse_unless_it_fits()


def resident() -> int:
    """Bytes of memory that this process has."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def rows(made: Plan) -> Sequence[tuple[str, str, str, str]]:
    """(part, where, size, why) of a plan, the largest first, with a total for each memory."""
    out = [
        (p.name, "host" if made.device == "cpu" else p.where, size(p.bytes), p.why)
        for p in sorted(made.parts, key=lambda p: -p.bytes)
    ]
    for where, limit in (("host", made.host), ("device", made.accelerator)):
        if made.device == "cuda" or where == "host":
            free = (
                "free memory unknown"
                if limit is None
                else f"of {size(limit)} free, {'fits' if made.total(where) <= limit * USABLE else 'too much'}"
            )
            out.append(("total", where, size(made.total(where)), free))
    return out
