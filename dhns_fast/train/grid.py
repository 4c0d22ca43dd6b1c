"""Does it help? Models × data sets × methods × seeds, trained alike; results are kept cell by cell, so that a grid can
be continued.

`dhns-fast compare` is the grid of one data set, `dhns-fast grid` of several, within a budget of time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dhns_fast import checks, files
from dhns_fast.catalogue import BEHAVIOURS, CONTROLS, METHODS, MODELS
from dhns_fast.errors import DataError, DhnsError, InputError
from dhns_fast.train.assemble import build, prepare_graph
from dhns_fast.train.card import escaped
from dhns_fast.train.config import UNDECISIVE, TrainConfig
from dhns_fast.train.memory import keep_freed_memory
from dhns_fast.train.run import versions
from dhns_fast.train.trainer import Diverged, Trainer

METRICS = ("mrr", "hits@1", "hits@10")
# What a cell keeps beside them.
KEPT = ("valid_mrr", "best_epoch", "epochs", "epoch_seconds", "step_cpu_ms", "seconds")
UNITS = {"s": 1, "m": 60, "h": 3600}
# Options that a grid chooses on validation, each with what it is called where several values of it are given.
TUNED = {"learning_rate": "learning_rates", "mu": "mus", "n3": "n3s"}
# Quantile .975 of Student's t with 1, 2, ... degrees of freedom; beyond the table 1.96 + 2.6 / df is within a
# hundredth.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass
class Row:
    """Test metrics of one model and method on one data set, by seed.

    Attributes:
        method: a variant, see :func:`variant`.
        results: seed → metrics and `epoch_seconds`; seeds that found no time, or diverged, are missing.
        chosen: the options that were chosen on validation.
    """

    data: str
    model: str
    method: str
    results: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    chosen: dict[str, float] = dataclasses.field(default_factory=dict)

    def text(self, metric: str) -> str:
        """`mean ± std`, the sample standard deviation over seeds (none for a single seed); a dash where there is no
        result.
        """
        values = [result[metric] for result in self.results.values()]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}" if values else "–"

    @property
    def seconds(self) -> float | None:
        """Mean over seeds of the median seconds of an epoch."""
        return statistics.mean(result["epoch_seconds"] for result in self.results.values()) if self.results else None

    def minus(self, other: Row) -> Difference | None:
        """Paired difference of the MRR to another row over the seeds that both have; None for fewer than two."""
        pairs = [
            self.results[seed]["mrr"] - other.results[seed]["mrr"]
            for seed in self.results.keys() & other.results.keys()
        ]
        if len(pairs) < 2:
            return None
        return Difference(statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5, len(pairs))


class Difference(NamedTuple):
    """Mean, standard error and number of paired differences."""

    mean: float
    error: float
    seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, by Student's t."""
        free = self.seeds - 1
        reach = self.error * (T_975[free - 1] if free <= len(T_975) else 1.96 + 2.6 / free)
        return self.mean - reach, self.mean + reach

    @property
    def better(self) -> bool:
        """Whether it is above 0 by more than two standard errors, over three seeds or more."""
        return self.seeds >= 3 and self.mean > 2 * self.error

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def variant(text: str) -> dict[str, str]:
    """The options that a variant of a method names: METHOD, METHOD-BEHAVIOUR, and either with +CONTROL, as in
    dhns-normalised+gaussian.

    Raises:
        InputError: there is no such method, behaviour or control.
    """
    name, plus, control = text.partition("+")
    options = {"method": name}
    head, _, tail = name.rpartition("-")
    if tail in BEHAVIOURS and head in METHODS:
        options = {"method": head, "behaviour": tail}
    if options["method"] not in METHODS or (plus and control not in CONTROLS):
        accepted = f"{', '.join(METHODS)}; a behaviour may follow a hyphen ({', '.join(BEHAVIOURS)}), and a control a plus ({', '.join(CONTROLS)})"
        raise InputError("methods", text, accepted)
    return options | ({"control": control} if plus else {})


def run_grid(
    base: TrainConfig,
    data: Sequence[str],
    models: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    folder: Path,
    budget: float | None = None,
    on_run: Callable[[str], None] = lambda line: None,
    tuned: Mapping[str, Sequence[float]] = MappingProxyType({}),
    processes: int = 1,
) -> list[Row]:
    """Train every model with every method on every data set and seeds 0..seeds − 1, choose on validation, evaluate on
    test.

    Where several values of an option are to be tried, seed 0 is trained with each combination of them (a method without
    negatives beside has no μ), and the other seeds with that of the best validation: every method has its own. All
    cells of a seed come before those of the next, so that a budget leaves fewer seeds and not fewer rows. A cell is not
    begun when it would not end in time, going by what the row's other cells took, or else by the longest cell so far.

    Args:
        base: all other options. A margin given here holds for every model; None gives each its default.
        data: embedded data sets or folders.
        methods: variants of methods, see :func:`variant`.
        folder: one JSON file a cell, named by a digest of its options and of the graph; those present are not trained
            again. One process (and its own) at a time writes to it.
        budget: seconds for new cells; None for as long as it takes.
        on_run: called with a line after each cell, and for those left out.
        tuned: values to try, by the name of the option, of those in :data:`TUNED`; none: the value of `base`.
        processes: cells that are trained side by side, on a CPU with an equal share of its threads each.

    Raises:
        InputError: an unknown model or method, no seed, or an option that does not go with one of them.
        DhnsError: a process of the grid ended before its cell did.
    """
    for name in models or [""]:
        checks.one_of("models", name, tuple(MODELS))
    for name in methods or [""]:
        variant(name)
    seeds, processes = checks.count("seeds", seeds), checks.count("processes", processes)
    # Everything is checked before the first run, which may take hours. What is named twice is trained once.
    data, models, methods = (list(dict.fromkeys(names)) for names in (data, models, methods))
    rows = [Row(d, model, method) for d in data for model in models for method in methods]
    candidates = {id(row): _candidates(base, row, tuned) for row in rows}
    several = [name for name, values in tuned.items() if len(set(values)) > 1]
    graphs: dict[str, dict[str, str]] = {}
    for first in rows[:: len(models) * len(methods)]:
        config = candidates[id(first)][0]
        kg, _ = prepare_graph(config)
        if not len(kg.test):
            raise InputError("data", kg.name, "a graph with test triples to compare on")
        build(config, kg)
        graphs[config.data] = kg.fingerprint()
    files.make_folder(folder)
    with files.owned(folder), _Cells(folder, budget, on_run, processes, graphs, several) as cells:
        for seed, row in itertools.product(range(seeds), rows):
            for config in candidates[id(row)]:
                # A damaged file ends the grid before it trains, and not when hours of cells are running.
                seeded = dataclasses.replace(config, seed=seed)
                kept(cells.path(seeded), seeded)
        for seed in range(seeds):
            wanted = [(row, dataclasses.replace(config, seed=seed)) for row in rows for config in candidates[id(row)]]
            found = cells.run(wanted)
            for row in rows:
                results = [(config, result) for other, config, result in found if other is row]
                if not results:
                    continue
                config, result = max(results, key=lambda pair: pair[1]["valid_mrr"])
                row.results[seed] = result
                if len(candidates[id(row)]) > 1:
                    row.chosen = chosen(config, several)
                    candidates[id(row)] = [config]
    return rows


def chosen(config: TrainConfig, names: Iterable[str]) -> dict[str, float]:
    """The values of options that a configuration has and makes use of."""
    values = {name: getattr(config, name) for name in names if name != "mu" or config.recipe.beside}
    return {name: value for name, value in values.items() if value is not None}


def _candidates(base: TrainConfig, row: Row, tuned: Mapping[str, Sequence[float]]) -> list[TrainConfig]:
    """The configurations of a row at seed 0 among which validation chooses."""
    options = {"data": row.data, "model": row.model, "seed": 0, **variant(row.method)}
    first = dataclasses.replace(base, **options)  # type: ignore[arg-type]
    for name, values in tuned.items():
        for value in values:
            try:
                dataclasses.replace(first, **{name: value})  # type: ignore[arg-type]
            except InputError as error:
                raise InputError(TUNED[name], value, error.accepted) from None
    tried = {name: set(values) for name, values in tuned.items() if values and (name != "mu" or first.recipe.beside)}
    return [
        dataclasses.replace(first, **dict(zip(tried, values, strict=True)))  # type: ignore[arg-type]
        for values in itertools.product(*map(sorted, tried.values()))
    ]


class _Cells:
    """Trains cells, one after the other or in processes side by side, and keeps each result in a file.

    Args:
        graphs: fingerprints of the graphs by the name of the data.
        told: options whose values the lines of progress say.
    """

    def __init__(
        self,
        folder: Path,
        budget: float | None,
        on_run: Callable[[str], None],
        processes: int,
        graphs: Mapping[str, Mapping[str, str]],
        told: Sequence[str],
    ) -> None:
        self.folder, self.budget, self.on_run, self.graphs, self.told = folder, budget, on_run, graphs, told
        self.begin, self.longest = time.monotonic(), 0.0
        self.pool = None
        if processes > 1:
            threads = max(1, torch.get_num_threads() // processes)
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(
                processes, mp_context=spawn, initializer=_prepare_process, initargs=(threads,)
            )
        self.processes = processes

    def __enter__(self) -> _Cells:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.pool is not None:
            # SIGTERM reaches the first process alone.
            for process in multiprocessing.active_children():
                process.terminate()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, wanted: Sequence[tuple[Row, TrainConfig]]) -> list[tuple[Row, TrainConfig, dict[str, float]]]:
        """The results of the cells that found time and did not diverge, in their order."""
        found: dict[int, dict[str, float]] = {}
        running: dict[Future[dict[str, float]], int] = {}
        for i, (row, config) in enumerate(wanted):
            name, path = self.name(config), self.path(config)
            if (known := kept(path, config)) is not None:
                self._done(name, known, "kept")
                found[i] = known
                continue
            while len(running) >= self.processes:
                self._collect(wanted, running, found)
            own = [*row.results.values(), *(found[j] for j in found if wanted[j][0] is row)]
            expected = max((result.get("seconds", 0.0) for result in own), default=self.longest)
            if self.budget is not None and time.monotonic() - self.begin + expected > self.budget:
                self.on_run(f"{name}: left out, no time")
            elif self.pool is not None:
                running[self.pool.submit(_train, config, path)] = i
            else:
                try:
                    found[i] = _train(config, path)
                except Diverged as error:
                    self.on_run(f"{name}: {error}")
                else:
                    self._done(name, found[i])
        while running:
            self._collect(wanted, running, found)
        return [(*wanted[i], found[i]) for i in sorted(found)]

    def _collect(
        self,
        wanted: Sequence[tuple[Row, TrainConfig]],
        running: dict[Future[dict[str, float]], int],
        found: dict[int, dict[str, float]],
    ) -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            i = running.pop(future)
            name = self.name(wanted[i][1])
            try:
                found[i] = future.result()
            except Diverged as error:
                self.on_run(f"{name}: {error}")
            except BrokenProcessPool:
                raise DhnsError(
                    f"{name}: its process ended before it did (out of memory?); the same command continues"
                ) from None
            else:
                self._done(name, found[i])

    def name(self, config: TrainConfig) -> str:
        """What the lines of progress call a cell."""
        values = ", ".join(f"{name} {value:g}" for name, value in chosen(config, self.told).items())
        return _stem(config) + (f" ({values})" if values else "")

    def path(self, config: TrainConfig) -> Path:
        """Where the result of a cell is kept: by its options and by what the graph holds."""
        # When checkpoints are written changes nothing, and a cell writes none; a CUDA graph gives the same numbers.
        options = _decisive(config.to_dict()) | {"graph": self.graphs[config.data]}
        return self.folder / f"{_stem(config)}-{files.digest(options)[:12]}.json"

    def _done(self, name: str, result: dict[str, float], note: str = "") -> None:
        if not note:
            self.longest = max(self.longest, result["seconds"])
            note = f"best epoch {result['best_epoch']} of {result['epochs']}"
        self.on_run(f"{name}: MRR {result['mrr']:.4f}, Hits@10 {result['hits@10']:.4f} ({note})")


def _stem(config: TrainConfig) -> str:
    control = "" if config.control == "none" else f"-{config.control}"
    return f"{config.model}-{config.method}-{config.behaviour}{control}-seed{config.seed}"


def _end_with(parent: int, seconds: float = 1.0) -> None:
    """End this process when its parent has, which SIGKILL gives no time to end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    _end_with(os.getppid())
    # Ctrl-C reaches every process of the terminal; the first one says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def differences(
    rows: Sequence[Row], baseline: str = "self-adversarial"
) -> list[tuple[Row, dict[str, Difference | None]]]:
    """Each row beside what it must beat: `baseline` of the same data and model, and the controls of its own method."""
    out = []
    for row in rows:
        rivals = [x for x in rows if (x.data, x.model) == (row.data, row.model) and x is not row]
        named = [x for x in rivals if x.method == baseline or x.method.startswith(f"{row.method}+")]
        out.append((row, {x.method: row.minus(x) for x in named}))
    return out


def markdown(rows: Sequence[Row], baseline: str = "self-adversarial") -> list[str]:
    """The table of a grid: metrics, what was chosen, paired differences with their 95 % intervals, and time a step."""
    lines = [
        f"| data | model | method | MRR | Hits@1 | Hits@10 | seeds | chosen | − {baseline} | − own controls | CPU ms a step |",
        "|---|---|---|---|---|---|--:|---|---|---|--:|",
    ]
    for row, rivals in differences(rows, baseline):
        if not row.results:
            continue
        own = {name: x for name, x in rivals.items() if name != baseline}
        steps = [result["step_cpu_ms"] for result in row.results.values() if "step_cpu_ms" in result]
        cells = (
            escaped(Path(row.data).name), row.model, row.method, *map(row.text, METRICS), len(row.results),
            ", ".join(f"{name} {value:g}" for name, value in row.chosen.items()), _signed(rivals.get(baseline)),
            "; ".join(f"{name.partition('+')[2]} {_signed(x)}" for name, x in own.items()), f"{statistics.mean(steps):.0f}" if steps else "–",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _signed(difference: Difference | None) -> str:
    return "–" if difference is None else f"**{difference}**" if difference.better else str(difference)


def write_table(rows: Sequence[Row], path: Path) -> None:
    """CSV, a line a seed."""
    flat = [
        {
            "data": r.data,
            "model": r.model,
            "method": r.method,
            "seed": seed,
            **{key: result[key] for key in ("epoch_seconds", *METRICS)},
        }
        for r in rows
        for seed, result in r.results.items()
    ]
    files.write_rows(path, flat)


def seconds_of(text: str) -> float:
    """90, 90s, 30m or 2h in seconds.

    Raises:
        InputError: the text is nothing of that.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise InputError("budget", text, "a time such as 90s, 30m or 2h")
    return float(match[1]) * UNITS[match[2] or "s"]


def kept(path: Path, config: TrainConfig | None = None) -> dict[str, float] | None:
    """The result of a cell's file; None where there is none.

    Args:
        config: the cell's options; None believes the file's.

    Raises:
        DataError: the file is damaged, or of other options.
    """
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        whole = cell.pop(files.CHECKSUM) == files.digest(cell) and cell["result"].keys() == {*METRICS, *KEPT}
        whole = whole and all(type(x) in (int, float) and math.isfinite(x) for x in cell["result"].values())
        # A file that took another's name has numbers, too.
        whole = whole and (config is None or _decisive(cell["config"]) == _decisive(config.to_dict()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        whole = False
    if not whole:
        raise DataError(path, "not a result of compare or grid; remove it to train this run again")
    return cell["result"]


def _decisive(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in UNDECISIVE}


def _train(config: TrainConfig, path: Path) -> dict[str, float]:
    begin = time.monotonic()
    kg, _ = prepare_graph(config)
    trainer = Trainer(config, kg)
    clock, spent = time.process_time(), 0.0

    def on_step(_: object) -> None:
        nonlocal clock, spent
        now = time.process_time()
        spent, clock = spent + now - clock, now

    def on_epoch(_: object) -> None:
        nonlocal clock
        clock = time.process_time()

    progress = trainer.fit(on_step, on_epoch)
    ranks = trainer.validate("test")
    result = {metric: ranks[metric] for metric in METRICS}
    result |= {
        "valid_mrr": progress.best_mrr,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "epoch_seconds": statistics.median(row["seconds"] for row in progress.history),
        # Of all threads, validations left out: what other processes take of a machine does not count.
        "step_cpu_ms": 1000 * spent / max(progress.step, 1),
        "seconds": time.monotonic() - begin,
    }
    provenance = {**versions(), "device": str(trainer.device), "threads": torch.get_num_threads()}
    cell = {"result": result, "config": config.to_dict(), "provenance": provenance}
    files.write_json(path, cell | {files.CHECKSUM: files.digest(cell)})
    return result
