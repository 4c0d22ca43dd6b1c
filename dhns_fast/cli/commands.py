"""What each command does with its options."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console

from dhns_fast import files
from dhns_fast.cli import signals, tables
from dhns_fast.cli.parser import RESUMABLE, build_parser
from dhns_fast.errors import InputError, Shown
from dhns_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from dhns_fast.ranking import RankingResult
    from dhns_fast.train import Run, Trainer
    from dhns_fast.train.distributed import Processes
    from dhns_fast.train.run import Report

TRAINING = ("train", "tune", "compare", "grid")
# Options that name files and folders. A shell expands `~` at the beginning of a word, and not in --run=~/x.
PATHS = ("config", "output", "resume", "run", "triples", "queries", "candidates", "space", "export", "convert")


def run(command: str, values: Namespace, given: Mapping[str, Any]) -> int:
    """Run a command with its options, those `given` on the command line among them; returns the exit code."""
    if command in TRAINING:
        from dhns_fast.train.memory import keep_freed_memory

        keep_freed_memory()
    for name in PATHS if command != "plan" else ("config",):
        if isinstance(path := values.get(name), str):
            found = str(files.expanded(f"--{name}", path))
            values[name] = found if path.startswith("~") else path
    return COMMANDS[command](values, given, tables.stdout()) or 0


def _config(values: Namespace, given: Mapping[str, Any]) -> TrainConfig:
    """The options of a run: what was given, then what --config names, then defaults."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if values.config is not None:
        return TrainConfig.load(Path(values.config), **{name: given[name] for name in names if name in given})
    options = values.as_dict()
    return TrainConfig(**{name: options[name] for name in names if name in options})


def _train(values: Namespace, given: Mapping[str, Any], console: Console) -> int:
    config = None if values.resume is not None else _config(values, given)

    from dhns_fast.train import Interrupted, Trainer, build, distributed, loggers, prepare_graph, progress
    from dhns_fast.train import run as runs

    with contextlib.ExitStack() as held:
        if config is None:
            if extra := sorted(given.keys() - {"resume", "log", *RESUMABLE}):
                shown = ", ".join("--" + name.replace("_", "-") for name in extra)
                accepted = f"the options of {values.resume}/config.yaml and {', '.join('--' + x.replace('_', '-') for x in RESUMABLE)}"
                raise InputError("--resume", Shown(f"{values.resume} and {shown}"), accepted)
            folder = Path(values.resume)
            config = TrainConfig.load(
                runs.config_path(folder), **{name: given[name] for name in RESUMABLE if name in given}
            )
        processes = _processes(config.device)
        if not processes.first:
            console.quiet = True
        resumed = values.resume is not None
        if processes.group is not None and not resumed:
            if values.output is None:
                raise InputError("--output", None, "a folder, the same for all processes")
            if distributed.restarted() and distributed.exists(Path(values.output), "last"):
                # The launcher has started everyone anew after one has died: on from where the last checkpoint is.
                folder, resumed = Path(values.output), True
                config = TrainConfig.load(runs.config_path(folder))
        if resumed and processes.first:
            # Before it is read: another process may be writing.
            held.enter_context(files.owned(folder))
        kg, notes = prepare_graph(config)
        tables.notes(console, notes)
        built, logs = build(config, kg, processes), loggers.chosen(values.log)
        if not resumed:
            # Made last: bad data or options leave no folder behind.
            if processes.first:
                anew = distributed.restarted()
                folder = runs.new_folder(values.output, config, anew)
                held.enter_context(files.owned(folder))
                if not anew:
                    # Another process may have begun, and even finished, before this one had it.
                    runs.refuse_used(folder)
            folder = Path(processes.agree(str(folder) if processes.first else None))
        trainer = Trainer(config, kg, folder, built)
        if resumed:
            trainer.restore()
            if config.epochs < trainer.progress.epoch:
                raise InputError(
                    "--epochs", config.epochs, f"{trainer.progress.epoch}, which {folder} has done, or more"
                )
        trainer.loggers = loggers.make(logs, folder, trainer.progress.history) if processes.first else []
        parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        console.print(
            f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations, {len(kg.train)}/{len(kg.valid)}/{len(kg.test)} triples, "
            f"modalities: {', '.join(kg.features) or 'none'}. {config.model} ({config.method}, {config.behaviour}), D {config.dim}, "
            f"{parameters:,} parameters, {trainer.device}.",
        )
        _prepare_operators(trainer)

        def ask() -> bool:
            trainer.stop_requested = not trainer.fitted
            return trainer.stop_requested

        try:
            with signals.current.asking(ask), progress.shown(trainer, console) as (on_step, on_epoch):
                report = runs.train(trainer, on_step, on_epoch)
            _report(trainer, report, console)
            processes.leave()
        except (Interrupted, KeyboardInterrupt) as stop:
            saved = folder / ("last.safetensors" if processes.group is None else "last.json")
            again = f"; continue with: dhns-fast train --resume {shlex.quote(str(folder))}"
            kept = f"interrupted, saved {saved}" if saved.exists() else "interrupted, nothing saved yet"
            raise KeyboardInterrupt(
                f"{stop if isinstance(stop, Interrupted) else kept}{again * saved.exists()}"
            ) from None
        finally:
            for logger in trainer.loggers:
                logger.close()
    if processes.first:
        console.print(f"Written to {folder}")
    return 0


def _prepare_operators(trainer: Trainer) -> None:
    """Compiled now, where Ctrl-C ends the command at once, and not in the first step, after which it would be
    heeded.
    """
    from dhns_fast.ops import backend

    compiled = backend.CUDA if trainer.device.type == "cuda" else backend.CPU
    if (trainer.config.backend or os.environ.get(backend.ENVIRONMENT) or "auto") in ("auto", compiled.name):
        # What fails is said by the first operator that wanted it.
        compiled.why_not(trainer.device)


def _processes(device: str) -> Processes:
    """This process and the others that a launcher has started beside it."""
    from dhns_fast.train.assemble import pick_device
    from dhns_fast.train.distributed import Processes

    return Processes.join(pick_device(device))


def _report(trainer: Trainer, report: Report, console: Console) -> None:
    from dhns_fast import plots
    from dhns_fast import report as pages

    if report.results:
        title = f"Test, filtered, both sides, realistic ranks (best epoch {report.progress.best_epoch}, {report.progress.seconds:.0f} s of training)"
        tables.metrics(console, title, report.results)
        trained = report.results["trained"]
        if trained.unseen.any():
            part = trained.select(trained.unseen)
            console.print(
                f"{len(part.triples)} test triples mention an entity never seen in train: MRR {part['mrr']:.4f}"
            )
    assert trainer.folder is not None
    if trainer.processes.count > 1:
        return
    pages.of_run(trainer, report.results, trainer.folder / "report.html")
    if plots.available():
        plots.draw_all(trainer, trainer.folder / "plots")
    else:
        tables.notes(console, ["no plots: matplotlib cannot be imported (pip install 'dhns-fast[plot]')"])


def _open(values: Namespace) -> Run:
    from dhns_fast.train import run as runs

    return runs.load_run(values.run, values.data, values.device, _processes(values.device))


def _evaluate(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.predict import read_candidates, read_triples

    run = _open(values)
    if values.relation is not None:
        if extra := [name for name in ("triples", "candidates", "raw") if given.get(name)]:
            raise InputError("--relation", Shown(f"it and --{extra[0]}"), "--split and --metrics beside it")
        _evaluate_items(run, values, console)
        return
    options: dict[str, Any] = {"filtered": not values.raw}
    if values.triples is not None:
        options["triples"] = read_triples(Path(values.triples), run.graph)[1]
    if values.candidates is not None:
        options["candidates"] = read_candidates(values.candidates, run.graph, run.config.data)
    result = run.evaluate(values.split, **options)
    run.processes.leave()
    if run.processes.first:
        _print_ranks(result, values, console)


def _evaluate_items(run: Run, values: Namespace, console: Console) -> None:
    from dhns_fast.items import evaluate_relation

    found = evaluate_relation(run.model, run.graph, values.relation, values.split, _names(values.metrics))
    if values.json:
        print(files.as_json(found, indent=1))
        return
    table = tables.table(f"{values.split}, items of {values.relation}, means over users", ("metric", "value"))
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


def _print_ranks(result: RankingResult, values: Namespace, console: Console) -> None:
    sampled = None if values.sampled is None else result.sampled(values.sampled)
    if values.json:
        more = {} if sampled is None else {"sampled": dict(sampled), "inflation": tables.inflation(result, sampled)}
        print(files.as_json({**result, "openke": result.openke(), **more}, indent=1))
        return
    if sampled is not None:
        tables.metrics(
            console,
            "The same weights, ranked among all entities and among a sample",
            {"all": result, f"{values.sampled}": sampled},
            "among",
        )
        factors = ", ".join(
            f"{name} ×{factor:.3g}" for name, factor in tables.inflation(result, sampled).items() if factor
        )
        console.print(f"What the sample flatters by: {factors}")
    parts, how = {"all": result}, "raw" if values.raw else "filtered"
    how += "" if values.candidates is None else f", among {values.candidates}"
    if result.unseen.any():
        parts |= {
            "entities all in train": result.select(~result.unseen),
            "an entity not in train": result.select(result.unseen),
        }
    tables.metrics(
        console,
        f"{values.triples or values.split}, {how}, both sides, realistic ranks",
        parts,
        "triples of",
    )
    ties = bool(result.head.equal.any() or result.tail.equal.any())
    title = f"By rule for ties and side ({'optimistic, both: what OpenKE prints' if ties else 'there are no ties'})"
    table = tables.table(title, ("rule", "side", "MRR", "Hits@1", "Hits@10", "MR"), left=2)
    for rule in ("optimistic", "realistic", "pessimistic") if ties else ("every",):
        for side in ("both", "head", "tail"):
            key = f"{side}.{rule if ties else 'realistic'}"
            shown = [f"{result[f'{key}.{m}']:.4f}" for m in ("mrr", "hits@1", "hits@10")] + [
                f"{result[f'{key}.mr']:.1f}"
            ]
            table.add_row(rule, side, *shown)
    console.print(table)
    tables.metrics(console, "By relation category", result.per_category(), "category")
    by_size = sorted(result.per_relation().items(), key=lambda item: -len(item[1].triples))
    tables.metrics(
        console, f"By relation, {min(20, len(by_size))} most frequent of {len(by_size)}", dict(by_size[:20]), "relation"
    )


def _predict(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.predict import complete, predict, read_triples

    words = (values.head, values.relation, values.tail)
    if (values.queries is None) == (None in words) or (values.queries and any(words)):
        found = Shown(" ".join(word for word in words if word) or "none")
        raise InputError("triple", found, "head, relation and tail with one '?', or --queries FILE in their place")
    run = _open(values)
    if values.queries is not None:
        triples, ids = read_triples(Path(values.queries), run.graph, unknowns=1)
        answers = complete(run.model, run.graph, ids, values.top, values.exclude_known)
    else:
        triples = [words]
        answers = [predict(run.model, run.graph, *words, values.top, values.exclude_known)]
    if values.json or values.csv:
        parts = ("head", "relation", "tail")
        asked = [dict(zip(parts, triple, strict=True)) for triple in triples]
        rows = [[dataclasses.asdict(answer) for answer in row] for row in answers]
        content = [{"query": query, "answers": row} for query, row in zip(asked, rows, strict=True)]
        flat = ({**query, "rank": i, **x} for query, row in zip(asked, rows, strict=True) for i, x in enumerate(row, 1))
        _machine(values, content, (*parts, "rank", "id", "name", "score", "known"), flat)
        return
    for triple, row in zip(triples, answers, strict=True):
        table = tables.table(
            f"({', '.join(triple)})", ("", "id", "answer", "score", "known"), left=0, text=("answer", "known")
        )
        for i, answer in enumerate(row, 1):
            table.add_row(
                str(i),
                f"#{answer.id}",
                answer.name,
                f"{answer.score:.3f}",
                f"in {answer.known}" if answer.known else "",
            )
        console.print(table)


def _machine(values: Namespace, content: Any, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print what a program asked for, with --json or --csv, and nothing beside it."""
    import csv
    import io

    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        # What the locale's encoding lacks would become question marks.
        sys.stdout.reconfigure(encoding="utf-8")
    if values.json:
        print(files.as_json(content, indent=1, ensure_ascii=sys.stdout.isatty()))
        return
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: tables.exact(value) for name, value in row.items()} for row in rows)


def _score(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.predict import read_triples, score

    run = _open(values)
    triples, ids = read_triples(Path(values.triples), run.graph)
    scores = score(run.model, ids).tolist()
    columns = ("head", "relation", "tail", "score")
    rows = [dict(zip(columns, (*triple, x), strict=True)) for triple, x in zip(triples, scores, strict=True)]
    if values.json or values.csv:
        _machine(values, rows, columns, rows)
        return
    for row in rows:
        print(*map(tables.exact, row.values()), sep="\t")


def _export(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.export import export
    from dhns_fast.predict import read_triples

    run = _open(values)
    queries = None if values.queries is None else read_triples(Path(values.queries), run.graph, unknowns=1)[1]
    made = export(run.model, run.graph, values.to, values.output, queries)
    print(f"Written to {values.output}: {', '.join(path.name for path in made)}")


def _pack(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.train.pack import pack

    print(f"Written: {pack(_open(values), values.output)}")


def _tune(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    base = _config(values, given)

    from dhns_fast.train import tune

    space = None if values.space is None else tune.read_space(Path(values.space))
    try:
        tune.tune(base, values.trials, Path(values.output), space, console.print)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished trials are kept in {values.output}, the same command continues"
        ) from None
    print(f"Written to {values.output}; train with: dhns-fast train --config {shlex.quote(values.output)}/best.yaml")


def _sample(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.predict import imagine

    run = _open(values)
    if run.generator is None:
        found = Shown(f"{values.run}, trained with method {run.config.method!r}, which has no generator")
        raise InputError("run", found, "a run of method 'dhns'")
    made = imagine(
        run.model, run.generator, run.graph, (values.head, values.relation, values.tail), values.top, values.seed
    )
    columns = ("level", "in place of", "nearest real entities (L2 distance of structural embeddings)")
    table = tables.table(
        f"Generated for ({values.head}, {values.relation}, {values.tail}), hard to easy", columns, left=3
    )
    for item in made:
        table.add_row(
            str(item.level), item.side, ", ".join(f"{name} ({distance:.2f})" for name, distance in item.nearest)
        )
    console.print(table)


def _compare(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    base = _config(values, given)
    _run_grid(base, [base.data], values, console, "compare.csv", f"{base.data}, ")


def _grid(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    base = _config(values, given)
    _run_grid(base, _names(base.data), values, console, "grid.csv", "")


def _names(text: str) -> list[str]:
    # A comma before key=value belongs to the name of a synthetic graph.
    return [name.strip() for name in re.split(r",(?!\s*\w+=)", text.strip("[]"))]


def _numbers(name: str, text: str) -> list[float]:
    try:
        found = [math.nan if "_" in x else float(x) for x in _names(text)] if text else []
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise InputError(name, text, "numbers separated by commas")
    return found


def _run_grid(
    base: TrainConfig, data: Sequence[str], values: Namespace, console: Console, file: str, title: str
) -> None:
    from dhns_fast import report
    from dhns_fast.train import grid

    folder, budget = Path(values.output), values.get("budget")
    seconds = None if budget is None else grid.seconds_of(budget)
    tuned = {option: _numbers(name, values.get(name) or "") for option, name in grid.TUNED.items()}
    methods, processes = _names(values.methods), values.get("processes") or 1
    try:
        rows = grid.run_grid(
            base,
            data,
            _names(values.models),
            methods,
            values.seeds,
            folder,
            seconds,
            console.print,
            tuned,
            processes,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished runs are kept in {folder}, the same command continues"
        ) from None
    grid.write_table(rows, folder / file)
    files.write_text(folder / f"{Path(file).stem}.md", "\n".join(grid.markdown(rows)) + "\n")
    keys = (*(["data"] if len(data) > 1 else []), "model", "method")
    columns = (*keys, "MRR", "Hits@1", "Hits@10", "seeds", "s/epoch")
    table = tables.table(f"{title}D {base.dim}, test, realistic, mean ± std over seeds", columns, left=len(keys))
    cells = []
    for row in rows:
        seconds_a_epoch = "–" if row.seconds is None else f"{row.seconds:.2f}"
        figures = (*(row.text(m) for m in grid.METRICS), f"{len(row.results)}", seconds_a_epoch)
        cells.append([*(getattr(row, key) for key in keys), *figures])
        table.add_row(*cells[-1])
    console.print(table)
    report.of_grid(rows, columns, cells, str(table.title), folder / "report.html")


def _data(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.data import convert, load, write
    from dhns_fast.ranking import relation_categories

    if values.convert is not None:
        # From here on it is the converted graph that is described: the source may not fit in memory.
        values.data = convert(values.data, Path(values.convert), half=values.half)
    kg = load(values.data)
    if values.export is not None:
        write(kg, Path(values.export))
    title = f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations"
    table = tables.table(title, ("split", "triples", "distinct", "with an entity not in train"))
    for split in kg.splits:
        unseen = kg.report.unseen_entity.get(split)
        table.add_row(
            split, str(kg.report.size[split]), str(kg.report.distinct[split]), "" if unseen is None else str(unseen)
        )
    console.print(table)
    for name, x in kg.features.items():
        console.print(
            f"modality {name}: {x.shape[1]} columns, {int(kg.present[name].sum())} of {kg.num_entities} entities"
        )
    categories = relation_categories(kg)
    counts = {c: categories.count(c) for c in ("1-1", "1-n", "n-1", "n-n")}
    console.print("relations: " + ", ".join(f"{n} of kind {c}" for c, n in counts.items()))
    lines = kg.report.lines()
    tables.notes(console, [*kg.notes, *lines])
    if not lines:
        console.print("splits: clean")
    for folder in (values.export, values.convert):
        if folder is not None:
            console.print(f"Written to {folder}")


def _convert(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    import warnings

    from dhns_fast.data import convert

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = convert(values.source, values.target, values.allow_pickle, values.half, values.seed)
    tables.notes(console, [str(warning.message) for warning in caught])
    console.print(f"Written to {written}")


def _plan(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    config = _config(values, given)

    from dhns_fast.train import plan

    entities = plan.count("--entities", values.entities)
    sizes = plan.Sizes(
        entities,
        plan.count("--relations", values.relations),
        5 * entities if values.triples is None else plan.count("--triples", values.triples),
        tuple(plan.count("--feature-widths", width) for width in _names(values.feature_widths) if width),
    )
    device = "cuda" if config.device.startswith("cuda") or values.device_memory is not None else None
    free = plan.free_memory(device or config.device)
    host, accelerator = (
        found if asked is None else plan.count(option, asked, exact=False)
        for found, asked, option in zip(
            free, (values.memory, values.device_memory), ("--memory", "--device-memory"), strict=True
        )
    )
    made = plan.plan(config, sizes, values.processes, device, host, accelerator)
    title = f"{config.model} ({config.method}), D {config.dim}, {config.optimiser_for(entities)}, memory of each of {values.processes} process(es)"
    table = tables.table(title, ("part", "where", "size", "why"), left=2, text=("why",))
    for row in plan.rows(made):
        table.add_row(*row)
    console.print(table)
    console.print("This fits." if made.fits else "This does not fit. What to change:")
    for line in made.advice:
        console.print(f"  {line}")


def _build(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.ops import build

    console.print(f"Built {build.build(verbose=True)}")


def _doctor(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from rich.text import Text

    from dhns_fast.doctor import findings

    for finding in findings():
        mark = ("yes", "green") if finding.ok else ("no ", "yellow")
        console.print(Text.assemble(mark, f" {finding.what}: {finding.detail}"))


def _completion(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    import importlib.util

    if importlib.util.find_spec("shtab") is None:
        raise InputError(
            "completion", values.shell, "nothing here: it needs the package shtab, pip install 'dhns-fast[completion]'"
        )
    import shtab

    script = shtab.complete(build_parser(), shell=values.shell)
    # Options as they are typed.
    print(re.sub(r"(?<![\w-])--[a-z]\w+", lambda option: option[0].replace("_", "-"), script))


COMMANDS: dict[str, Callable[[Namespace, Mapping[str, Any], Console], int | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "sample": _sample,
    "score": _score,
    "export": _export,
    "pack": _pack,
    "tune": _tune,
    "compare": _compare,
    "grid": _grid,
    "data": _data,
    "convert": _convert,
    "plan": _plan,
    "build": _build,
    "completion": _completion,
    "doctor": _doctor,
}
