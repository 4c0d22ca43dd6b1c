"""The command line `dhns-fast`: train, evaluate, predict, sample, compare, grid, data, bench, build, doctor.

Exit codes: 0; 2 for bad input, with one line on stderr; 130 after Ctrl-C, with what was saved; 1 for anything else.
DHNS_FAST_DEBUG=1 adds a traceback to the latter.
Heavy imports happen inside the commands, so that --help and errors in options answer at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import PositiveInt

import dhns_fast
from dhns_fast.catalogue import METHODS
from dhns_fast.errors import DhnsError, InputError
from dhns_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from dhns_fast.ranking import RankingResult
    from dhns_fast.train.run import Report
    from dhns_fast.train.trainer import Epoch, Progress, Trainer

TRAINING = ("train", "compare", "grid")
# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
COLUMNS = ("mrr", "hits@1", "hits@3", "hits@10", "mr", "amri")
# Of tables that do not go to a terminal: names should not be broken in a file or a pipe.
WIDTH = 160

# The parser's messages in the words of the command line: --run for evaluate.run, types without Python's way of writing them.
MESSAGES = (
    (r"\b[a-z]+\.(head|relation|tail)\b", r"\1"),
    (r"\b[a-z]+\.run\b", "--run"),
    (r"\bbench\.[a-z]+\.(before|after)\b", r"\1"),
    (r'Parser key "(\w+)"', r"--\1"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected \1. Got value: "),
    (r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1"),
    ("NoneType", "null"),
    ("Expected a ", "Expected "),
)


class _Formatter(DefaultHelpFormatter):
    """Shows options with dashes, as they are typed."""

    def _format_action_invocation(self, action: Any) -> str:
        shown = [s.replace("_", "-") for s in action.option_strings if not s.endswith("+")]
        if not shown or action.nargs == 0:
            return ", ".join(shown) or super()._format_action_invocation(action)
        return f"{', '.join(shown)} {self._format_args(action, (action.dest or '').rpartition('.')[2].upper())}"

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        positional = [action for action in actions if not action.option_strings]
        text = super()._format_usage(usage, positional, groups, prefix)
        return text.replace(" [options]", "").rstrip() + " [options]\n\n"


class _Parser(ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, formatter_class=_Formatter, **options)
        # What --resume and --config compare with must be what was typed.
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> Any:
        prog = self.prog.replace(" [options]", "")
        text = " ".join(str(message).split())
        for pattern, shown in MESSAGES:
            text = re.sub(pattern, shown, text)
        text = re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)
        print(f"{prog}: error: {text} (see {prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> _Parser:
    parser = _Parser(
        prog="dhns-fast", description="Diffusion-based hierarchical negative sampling for multimodal knowledge-graph completion."
    )
    parser.add_argument("--version", action="version", version=f"dhns-fast {dhns_fast.__version__}")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> _Parser:
        sub = _Parser(description=text)
        commands.add_subcommand(name, sub, help=text)
        return sub

    sub = command("train", "Train a model, choose it on validation, evaluate it on test, and write a run folder.")
    sub.add_argument("--config", type=str | None, default=None, help="YAML file of options; those given here override it")
    sub.add_class_arguments(TrainConfig)
    sub.add_argument("--output", type=str | None, default=None, help="folder of the run; by default a new one under runs/")
    sub.add_argument("--resume", type=str | None, default=None, help="run folder to continue; its options are used, --epochs may be raised")

    sub = command("evaluate", "Evaluate a trained run on a split: filtered, both sides, every rule for ties.")
    sub.add_argument("--run", type=str, required=True, help="run folder")
    sub.add_argument("--split", type=Literal["train", "valid", "test"], default="test", help="which triples to rank")
    sub.add_argument("--json", action="store_true", help="print every metric as JSON instead of tables")

    sub = command(
        "predict", "Complete a triple by names; put ? for what is unknown: dhns-fast predict --run FOLDER Libreville capital_of ?"
    )
    sub.add_argument("--run", type=str, required=True, help="run folder")
    _triple_arguments(sub, "name, #id, or ?")
    sub.add_argument("--top", type=PositiveInt, default=10, help="how many answers")
    sub.add_argument("--exclude_known", action="store_true", help="leave out answers that the graph holds instead of marking them")

    sub = command(
        "sample", "What did the diffusion imagine? Generate a triple's head and tail at every level and name the nearest real entities."
    )
    sub.add_argument("--run", type=str, required=True, help="run folder, trained with method dhns")
    _triple_arguments(sub, "name or #id")
    sub.add_argument("--top", type=PositiveInt, default=3, help="how many entities a level")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")

    for name, text in (
        ("compare", "Train the same model with several methods and seeds and print mean ± standard deviation."),
        ("grid", "The comparison on several data sets, within a budget of time; the same command continues it."),
    ):
        sub = command(name, text)
        sub.add_argument("--config", type=str | None, default=None, help="YAML file of options; those given here override it")
        several = {"data"} if name == "grid" else set()
        sub.add_class_arguments(TrainConfig, skip={"model", "method", "seed"} | several)
        methods: tuple[str, ...] = METHODS
        if name == "grid":
            sub.add_argument("--data", type=str, default="atlas", help="embedded data sets or folders, separated by commas")
            sub.add_argument(
                "--budget", type=str | None, default=None, help="time for new runs, 90s, 30m or 2h; by default as long as it takes"
            )
            methods = (*METHODS, "dhns-release")
        sub.add_argument("--models", type=str, default="distmult,complex,transe,rotate", help="models to train, separated by commas")
        sub.add_argument(
            "--methods",
            type=str,
            default=",".join(methods),
            help="methods to compare, separated by commas; dhns-release is dhns with that behaviour",
        )
        sub.add_argument("--seeds", type=PositiveInt, default=3, help="number of seeds, from 0")
        sub.add_argument(
            "--output", type=str, default=f"runs/{name}", help="folder of the results; what it holds already is not trained again"
        )

    sub = command("data", "Describe a graph and what is wrong with its splits.")
    sub.add_argument("--data", type=str, default="atlas", help="embedded data set or folder")
    sub.add_argument("--export", type=str | None, default=None, help="folder to write the graph into, as TSV")

    sub = command("bench", "Read what pytest --benchmark measured: report writes tables and charts, compare looks for what became slower.")
    actions = sub.add_subcommands(dest="action", metavar="ACTION")
    text = "Fill the tables that documents ask for with <!-- bench:NAME --> markers, and draw the charts."
    actions.add_subcommand("report", report := _Parser(description=text), help=text)
    report.add_argument("--results", type=str, default="bench/results", help="folder of the results")
    report.add_argument("--documents", type=str, default="README.md,docs", help="Markdown files and folders of such, separated by commas")
    report.add_argument("--charts", type=str | None, default="docs/img", help="folder for PNG charts; null draws none")
    report.add_argument("--check", action="store_true", help="write nothing, and exit with 1 when a table is out of date")
    text = "Compare two runs of one machine; exit with 1 when something of ours became slower, larger or wrong."
    actions.add_subcommand("compare", versus := _Parser(description=text), help=text)
    versus.add_argument("before", type=str, help="results folder or file of the earlier run")
    versus.add_argument("after", type=str, help="of the later run")

    command("build", "Compile the C++ operators ahead of their first use.")
    command("doctor", "Say what this machine can use, and what is missing and why.")
    return parser


def _triple_arguments(parser: _Parser, text: str) -> None:
    for name in ("head", "relation", "tail"):
        parser.add_argument(name, type=str, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    command = ""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown with ?, and is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        parser = _parser()
        options = parser.parse_args(words)
        command = f" {options.command}"
        given = parser.parse_args(words, defaults=False)[options.command]
        return _run(options.command, options[options.command], given.as_dict())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except InputError as error:
        print(f"dhns-fast{command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dhns-fast{command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read stdout is gone; what is still in its buffer must not raise again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DhnsError as error:
        print(f"dhns-fast{command}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # No traceback by default: it buries the message.
        debug = bool(os.environ.get("DHNS_FAST_DEBUG"))
        hint = "" if debug else " (DHNS_FAST_DEBUG=1 shows where)"
        print(f"dhns-fast{command}: {type(error).__name__}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        if debug:
            traceback.print_exc()
        return 1


def _run(command: str, values: Namespace, given: Mapping[str, Any]) -> int:
    from rich.console import Console

    # Names of entities, files and modalities are printed as they are: "[...]" and ":...:" in them are no markup.
    terminal = sys.stdout.isatty()
    console = Console(markup=False, emoji=False, highlight=False, width=None if terminal else WIDTH, soft_wrap=not terminal)
    if command in TRAINING:
        _keep_memory()
    return COMMANDS[command](values, given, console) or 0


def _keep_memory() -> None:
    """Tells glibc to keep blocks that are freed. It maps large ones anew each time, and the kernel clears them page by page: on a CPU that
    was half of an epoch of DistMult (MKG-Y, D 1024: 1.38 s, 0.74 s without; bench/bench_plain.py at size reference). Whoever has set the
    allocator in the environment is left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _underscored(word: str) -> str:
    """--validation-from-train=.1 -> --validation_from_train=.1: options are typed with dashes, fields have underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config(values: Namespace, given: Mapping[str, Any]) -> TrainConfig:
    """The options of a run: what was given, then what --config names, then defaults."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if values.config is not None:
        return TrainConfig.load(Path(values.config), **{name: given[name] for name in names if name in given})
    options = values.as_dict()
    return TrainConfig(**{name: options[name] for name in names if name in options})


def _train(values: Namespace, given: Mapping[str, Any], console: Console) -> int:
    config = None if values.resume is not None else _config(values, given)

    from dhns_fast.train import run
    from dhns_fast.train.trainer import Interrupted, Trainer, prepare_graph

    if config is None:
        if extra := sorted(given.keys() - {"resume", "epochs"}):
            shown = ", ".join("--" + name.replace("_", "-") for name in extra)
            raise InputError(f"--resume uses the options of {values.resume}/config.yaml; leave out {shown} (only --epochs may change)")
        folder = Path(values.resume)
        config = TrainConfig.load(run.config_path(folder), **({"epochs": values.epochs} if "epochs" in given else {}))
    kg, notes = prepare_graph(config)
    _notes(console, notes)
    if values.resume is None:
        # Made last: bad data or options leave no folder behind.
        trainer = Trainer(config, kg)
        trainer.folder = folder = run.new_folder(values.output, config)
    else:
        trainer = Trainer(config, kg, folder)
        trainer.restore()
        if config.epochs < trainer.progress.epoch:
            raise InputError(f"--epochs must be at least {trainer.progress.epoch}, which {folder} has done, got {config.epochs}")
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    console.print(
        f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations, {len(kg.train)}/{len(kg.valid)}/{len(kg.test)} triples, "
        f"modalities: {', '.join(kg.features) or 'none'}. {config.model} ({config.method}, {config.behaviour}), D {config.dim}, "
        f"{parameters:,} parameters, {trainer.device}.",
    )
    try:
        with _interruptible(trainer), _progress(trainer, console) as (on_step, on_epoch):
            report = run.train(trainer, on_step, on_epoch)
        _report(trainer, report, console)
    except (Interrupted, KeyboardInterrupt) as stop:
        saved = folder / "last.safetensors"
        again = f"; continue with: dhns-fast train --resume {shlex.quote(str(folder))}"
        kept = f"interrupted, saved {saved}" if saved.exists() else "interrupted, nothing saved yet"
        raise KeyboardInterrupt(f"{stop if isinstance(stop, Interrupted) else kept}{again * saved.exists()}") from None
    print(f"Written to {folder}")
    return 0


def _report(trainer: Trainer, report: Report, console: Console) -> None:
    from dhns_fast import plots

    if report.results:
        title = f"Test, filtered, both sides, realistic ranks (best epoch {report.progress.best_epoch}, {report.seconds:.0f} s of training)"
        _table(console, title, report.results)
        trained = report.results["trained"]
        if trained.unseen.any():
            part = trained.select(trained.unseen)
            console.print(f"{len(part.triples)} test triples mention an entity never seen in train: MRR {part['mrr']:.4f}")
    assert trainer.folder is not None
    if plots.available():
        plots.draw_all(trainer, trainer.folder / "plots")
    else:
        _notes(console, ["no plots: matplotlib cannot be imported (pip install 'dhns-fast[plot]')"])


def _notes(console: Console, lines: Sequence[str]) -> None:
    from rich.text import Text

    for line in lines:
        console.print(Text.assemble(("note", "yellow"), f" {line}"))


@contextlib.contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends training after the step in flight, with a checkpoint; a second one, or one after training, acts at once."""

    def ask(signum: int, frame: Any) -> None:
        if trainer.stop_requested or trainer.fitted:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _progress(trainer: Trainer, console: Console) -> Iterator[tuple[Callable[[Progress], None], Callable[[Epoch], None]]]:
    from rich import progress as rich_progress

    total = trainer.config.epochs * trainer.steps_per_epoch
    columns = ("{task.description}", rich_progress.BarColumn(), "{task.completed}/{task.total} steps", rich_progress.TimeRemainingColumn())
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=trainer.progress.step)

        def on_epoch(epoch: Epoch) -> None:
            bar.update(task, description=f"epoch {epoch.epoch} loss {epoch.losses['kgc']:.4f}")
            if epoch.valid:
                losses = "  ".join(f"{name} {value:.4f}" for name, value in epoch.losses.items() if value)
                console.print(
                    f"epoch {epoch.epoch:4d}  {epoch.seconds:6.2f} s  {losses}  "
                    f"valid MRR {epoch.valid['valid_mrr']:.4f}  Hits@10 {epoch.valid['valid_hits@10']:.4f}",
                )

        yield lambda state: bar.update(task, completed=state.step), on_epoch


def _table(console: Console, title: str, results: Mapping[str, RankingResult], first: str = "model", rule: str = "both.realistic") -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    table.add_column("triples", justify="right")
    for name in ("MRR", "Hits@1", "Hits@3", "Hits@10", "MR", "AMRI"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        shown = [f"{result[f'{rule}.{c}']:.1f}" if c == "mr" else f"{result[f'{rule}.{c}']:.4f}" for c in COLUMNS]
        table.add_row(name, str(len(result.triples)), *shown)
    console.print(table)


def _evaluate(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.train import run

    result = run.open_run(Path(values.run)).validate(values.split)
    if values.json:
        import json

        print(json.dumps({**result, "openke": result.openke()}, indent=1))
        return
    parts = {"all": result}
    if result.unseen.any():
        parts |= {"entities all in train": result.select(~result.unseen), "an entity not in train": result.select(result.unseen)}
    _table(console, f"{values.split}, filtered, both sides, realistic ranks", parts, "triples of")
    by_rule = {f"{rule} {side}": (rule, side) for rule in ("optimistic", "realistic", "pessimistic") for side in ("both", "head", "tail")}
    from rich.table import Table

    table = Table(title="By rule for ties and side (optimistic, both: what OpenKE prints)", title_justify="left")
    for name in ("rule", "side", "MRR", "Hits@1", "Hits@10", "MR"):
        table.add_column(name, justify="left" if name in ("rule", "side") else "right")
    for rule, side in by_rule.values():
        shown = [f"{result[f'{side}.{rule}.{m}']:.4f}" for m in ("mrr", "hits@1", "hits@10")] + [f"{result[f'{side}.{rule}.mr']:.1f}"]
        table.add_row(rule, side, *shown)
    console.print(table)
    _table(console, "By relation category", result.per_category(), "category")
    by_size = sorted(result.per_relation().items(), key=lambda item: -len(item[1].triples))
    _table(console, f"By relation, {min(20, len(by_size))} most frequent of {len(by_size)}", dict(by_size[:20]), "relation")


def _predict(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    from dhns_fast.predict import predict
    from dhns_fast.train import run

    trainer = run.open_run(Path(values.run))
    answers = predict(trainer.model, trainer.kg, values.head, values.relation, values.tail, values.top, values.exclude_known)
    table = Table(title=f"({values.head}, {values.relation}, {values.tail})", title_justify="left")
    for name in ("", "answer", "score", "known"):
        table.add_column(name, justify="left" if name in ("answer", "known") else "right")
    for i, answer in enumerate(answers, 1):
        table.add_row(str(i), answer.name, f"{answer.score:.3f}", f"in {answer.known}" if answer.known else "")
    console.print(table)


def _sample(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    from dhns_fast.predict import imagine
    from dhns_fast.train import run

    trainer = run.open_run(Path(values.run))
    if trainer.generator is None:
        raise InputError(f"run {values.run!r} was trained with method {trainer.config.method!r}, which has no generator; sample needs dhns")
    made = imagine(trainer.model, trainer.generator, trainer.kg, (values.head, values.relation, values.tail), values.top, values.seed)
    table = Table(title=f"Generated for ({values.head}, {values.relation}, {values.tail}), hard to easy", title_justify="left")
    for name in ("level", "in place of", "nearest real entities (L2 distance of structural embeddings)"):
        table.add_column(name)
    for item in made:
        table.add_row(str(item.level), item.side, ", ".join(f"{name} ({distance:.2f})" for name, distance in item.nearest))
    console.print(table)


def _compare(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    base = _config(values, given)
    _run_grid(base, [base.data], values, console, "compare.csv", f"{base.data}, ")


def _grid(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    base = _config(values, given)
    _run_grid(base, _names(base.data), values, console, "grid.csv", "")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("[]").split(",")]


def _run_grid(base: TrainConfig, data: Sequence[str], values: Namespace, console: Console, file: str, title: str) -> None:
    from rich.table import Table

    from dhns_fast.train import grid

    folder, budget = Path(values.output), values.get("budget")
    seconds = None if budget is None else grid.seconds_of(budget)
    try:
        rows = grid.run_grid(base, data, _names(values.models), _names(values.methods), values.seeds, folder, seconds, console.print)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; finished runs are kept in {folder}, the same command continues") from None
    grid.write_table(rows, folder / file)
    table = Table(title=f"{title}D {base.dim}, test, realistic, mean ± std over seeds", title_justify="left")
    for name in (*(["data"] if len(data) > 1 else []), "model", "method"):
        table.add_column(name)
    for name in ("MRR", "Hits@1", "Hits@10", "seeds", "s/epoch"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (*(row.text(m) for m in grid.METRICS), f"{len(row.results)}", "–" if row.seconds is None else f"{row.seconds:.2f}")
        table.add_row(*([row.data] if len(data) > 1 else []), row.model, row.method, *figures)
    console.print(table)


def _data(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    from dhns_fast.data import load, write
    from dhns_fast.ranking import relation_categories

    kg = load(values.data)
    if values.export is not None:
        write(kg, Path(values.export))
    table = Table(title=f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations", title_justify="left")
    for name in ("split", "triples", "distinct", "with an entity not in train"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in ("train", "valid", "test"):
        unseen = kg.report.unseen_entity.get(split)
        table.add_row(split, str(kg.report.size[split]), str(kg.report.distinct[split]), "" if unseen is None else str(unseen))
    console.print(table)
    for name, x in kg.features.items():
        console.print(f"modality {name}: {x.shape[1]} columns, {int(kg.present[name].sum())} of {kg.num_entities} entities")
    categories = relation_categories(kg)
    counts = {c: categories.count(c) for c in ("1-1", "1-n", "n-1", "n-n")}
    console.print("relations: " + ", ".join(f"{n} of kind {c}" for c, n in counts.items()))
    lines = kg.report.lines()
    _notes(console, lines)
    if not lines:
        console.print("splits: clean")
    if values.export is not None:
        console.print(f"Written to {values.export}")


def _bench(values: Namespace, given: Mapping[str, Any], console: Console) -> int:
    return {"report": _bench_report, "compare": _bench_compare}[values.action](values[values.action], console)


def _bench_report(values: Namespace, console: Console) -> int:
    from dhns_fast import bench

    documents: list[Path] = []
    for name in values.documents.strip("[]").split(","):
        path = Path(name.strip())
        if not path.exists():
            raise InputError(f"documents: {name.strip()} does not exist")
        documents += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    stale = bench.update(documents, Path(values.results), values.check)
    if values.check:
        for path in stale:
            print(f"dhns-fast bench: {path} is out of date; dhns-fast bench report writes it", file=sys.stderr)
        return int(bool(stale))
    from dhns_fast import plots

    charts: list[Path] = []
    if values.charts is not None and plots.available():
        charts = bench.draw(bench.load_results(Path(values.results)), Path(values.charts))
    elif values.charts is not None:
        _notes(console, ["no charts: matplotlib cannot be imported (pip install 'dhns-fast[plot]')"])
    for path in [*stale, *charts]:
        console.print(f"Written: {path}")
    return 0


def _bench_compare(values: Namespace, console: Console) -> int:
    from rich.table import Table

    from dhns_fast import bench

    changes = bench.compare(*(bench.load_results(Path(path)) for path in (values.before, values.after)))
    table = Table(title=f"{values.before} and {values.after}: medians of ours; rivals: what theirs changed by", title_justify="left")
    for name in ("case", "ms before", "after", "after/before", "rivals", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "verdict") else "right")
    for c in changes:
        ratio = f"{c.after / c.before:.2f}" if c.after and c.before else ""
        table.add_row(c.case, *map(bench.number, (c.before, c.after)), ratio, f"{c.drift:.2f}", c.verdict)
    console.print(table)
    return int(any(c.regression for c in changes))


def _build(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from dhns_fast.ops import build

    console.print(f"Built {build.build(verbose=True)}")


def _doctor(values: Namespace, given: Mapping[str, Any], console: Console) -> None:
    from rich.text import Text

    from dhns_fast.doctor import findings

    for finding in findings():
        mark = ("yes", "green") if finding.ok else ("no ", "yellow")
        console.print(Text.assemble(mark, f" {finding.what}: {finding.detail}"))


COMMANDS: dict[str, Callable[[Namespace, Mapping[str, Any], Console], int | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "sample": _sample,
    "compare": _compare,
    "grid": _grid,
    "data": _data,
    "bench": _bench,
    "build": _build,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
