"""The command line `dhns-fast`: train, evaluate, predict, sample, compare, data, build, doctor.

Exit codes: 0; 2 for bad input, with one line on stderr; 130 after Ctrl-C, with what was saved; 1 for anything else.
Heavy imports happen inside the commands, so that --help and errors in options answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace  # type: ignore[attr-defined]

import dhns_fast
from dhns_fast.errors import DhnsError, InputError
from dhns_fast.train.config import METHODS, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from dhns_fast.ranking import RankingResult
    from dhns_fast.train.trainer import Epoch, Progress, Trainer

COLUMNS = ("mrr", "hits@1", "hits@3", "hits@10", "mr", "amri")


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

    def error(self, message: str, ex: Exception | None = None) -> Any:
        prog = self.prog.replace(" [options]", "")
        text = " ".join(str(message).replace("Parser key", "option").split())
        # Required options are reported as command.name, types as Python writes them.
        text = text.replace("typing.", "").replace(f"{prog.rpartition(' ')[2]}.", "--")
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
    sub.add_argument("--config", action=ActionConfigFile, help="YAML file of options; options after it override it.")
    sub.add_class_arguments(TrainConfig)
    sub.add_argument("--output", type=str | None, default=None, help="folder of the run; by default a new one under runs/")
    sub.add_argument("--resume", type=str | None, default=None, help="run folder to continue; its options are used, --epochs may be raised")

    sub = command("evaluate", "Evaluate a trained run on a split: filtered, both sides, every rule for ties.")
    sub.add_argument("--run", type=str, required=True, help="run folder")
    sub.add_argument("--split", type=str, default="test", help="train, valid or test")
    sub.add_argument("--json", type=bool, default=False, help="print every metric as JSON instead of tables")

    sub = command(
        "predict", "Complete a triple by names; put ? for what is unknown: dhns-fast predict --run FOLDER Libreville capital_of ?"
    )
    sub.add_argument("--run", type=str, required=True, help="run folder")
    _triple_arguments(sub, "name, #id, or ?")
    sub.add_argument("--top", type=int, default=10, help="how many answers")
    sub.add_argument("--exclude_known", type=bool, default=False, help="leave out answers that the graph holds instead of marking them")

    sub = command(
        "sample", "What did the diffusion imagine? Generate a triple's head and tail at every level and name the nearest real entities."
    )
    sub.add_argument("--run", type=str, required=True, help="run folder, trained with method dhns")
    _triple_arguments(sub, "name or #id")
    sub.add_argument("--top", type=int, default=3, help="how many entities a level")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")

    sub = command("compare", "Train the same model with several methods and seeds and print mean ± standard deviation.")
    sub.add_argument("--config", action=ActionConfigFile, help="YAML file of options; options after it override it.")
    sub.add_class_arguments(TrainConfig, skip={"model", "method", "seed"})
    sub.add_argument("--models", type=list[str], default=["distmult", "complex", "transe", "rotate"], help="models to train")
    sub.add_argument(
        "--methods", type=list[str], default=list(METHODS), help="methods to compare; dhns-release is dhns with that behaviour"
    )
    sub.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    sub.add_argument("--output", type=str, default="runs/compare", help="folder of the results; what it holds already is not trained again")

    sub = command("data", "Describe a graph and what is wrong with its splits.")
    sub.add_argument("--data", type=str, default="atlas", help="embedded data set or folder")
    sub.add_argument("--export", type=str | None, default=None, help="folder to write the graph into, as TSV")

    command("build", "Compile the C++ operators ahead of their first use.")
    command("doctor", "Say what this machine can use, and what is missing and why.")
    return parser


def _triple_arguments(parser: _Parser, text: str) -> None:
    for name in ("head", "relation", "tail"):
        parser.add_argument(name, type=str, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        options = _parser().parse_args(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(soft_wrap=not sys.stdout.isatty())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    if options.command is None:
        print("dhns-fast: error: give a command (see dhns-fast --help)", file=sys.stderr)
        return 2
    values = options[options.command]
    try:
        return COMMANDS[options.command](values, words, console) or 0
    except InputError as error:
        print(f"dhns-fast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dhns-fast {options.command}: interrupted, nothing saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except DhnsError as error:
        print(f"dhns-fast {options.command}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # No traceback by default: it buries the message. The log level brings it back for a report.
        print(f"dhns-fast {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        if logging.getLogger("dhns_fast").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        return 1


def _underscored(word: str) -> str:
    """--validation-from-train=.1 -> --validation_from_train=.1: options are typed with dashes, fields have underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config(values: Namespace, **changes: Any) -> TrainConfig:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    options = {k: v for k, v in values.as_dict().items() if k in names}
    return TrainConfig(**options | changes)


def _train(values: Namespace, words: Sequence[str], console: Console) -> int:
    from dhns_fast import plots
    from dhns_fast.train import run
    from dhns_fast.train.trainer import Interrupted, Trainer, prepare_graph

    if values.resume is not None:
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if extra := sorted(given - {"--resume", "--epochs"}):
            shown = ", ".join(name.replace("_", "-") for name in extra)
            raise InputError(f"--resume uses the options of {values.resume}/config.yaml; leave out {shown} (only --epochs may change)")
        folder = Path(values.resume)
        config = TrainConfig.load(run.config_path(folder))
        if "--epochs" in given:
            config = dataclasses.replace(config, epochs=values.epochs)
    else:
        config = _config(values)
    kg, notes = prepare_graph(config)
    for note in notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    if values.resume is None:
        # Made last: bad data or options leave no folder behind.
        trainer = Trainer(config, kg)
        trainer.folder = folder = run.new_folder(values.output, config)
    else:
        trainer = Trainer(config, kg, folder)
        trainer.restore()
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    console.print(
        f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations, {len(kg.train)}/{len(kg.valid)}/{len(kg.test)} triples, "
        f"modalities: {', '.join(kg.features) or 'none'}. {config.model} ({config.method}, {config.behaviour}), D {config.dim}, "
        f"{parameters:,} parameters, {trainer.device}.",
        highlight=False,
    )
    try:
        with _interruptible(trainer), _progress(trainer, console) as (on_step, on_epoch):
            report = run.train(trainer, on_step, on_epoch)
    except Interrupted as stop:
        again = f"; continue with: dhns-fast train --resume {folder}" if stop.path else ""
        print(f"dhns-fast train: {stop}{again}", file=sys.stderr)
        return 130
    if report.results:
        title = f"Test, filtered, both sides, realistic ranks (best epoch {report.progress.best_epoch}, {report.seconds:.0f} s of training)"
        _table(console, title, report.results)
        trained = report.results["trained"]
        if trained.unseen.any():
            part = trained.select(trained.unseen)
            console.print(f"{len(part.triples)} test triples mention an entity never seen in train: MRR {part['mrr']:.4f}", highlight=False)
    if plots.available():
        plots.draw_all(trainer, folder / "plots")
    else:
        console.print("[yellow]note[/] no plots: matplotlib is not installed (pip install 'dhns-fast[plot]')", highlight=False)
    console.print(f"Written to {folder}", highlight=False)
    return 0


@contextlib.contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends training after the step in flight, with a checkpoint; a second one ends it at once."""

    def ask(signum: int, frame: Any) -> None:
        if trainer.stop_requested:
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
                    highlight=False,
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


def _evaluate(values: Namespace, words: Sequence[str], console: Console) -> None:
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


def _predict(values: Namespace, words: Sequence[str], console: Console) -> None:
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


def _sample(values: Namespace, words: Sequence[str], console: Console) -> None:
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


def _compare(values: Namespace, words: Sequence[str], console: Console) -> None:
    from rich.table import Table

    from dhns_fast.train.compare import compare

    base = _config(values)

    def on_run(line: str) -> None:
        console.print(line, highlight=False)

    rows = compare(base, values.models, values.methods, values.seeds, Path(values.output), on_run)
    table = Table(title=f"{base.data}, D {base.dim}, test, realistic, mean ± std over {values.seeds} seeds", title_justify="left")
    for name in ("model", "method", "MRR", "Hits@1", "Hits@10", "s/epoch"):
        table.add_column(name, justify="left" if name in ("model", "method") else "right")
    for row in rows:
        table.add_row(row.model, row.method, *(row.text(m) for m in ("mrr", "hits@1", "hits@10")), f"{row.seconds:.2f}")
    console.print(table)


def _data(values: Namespace, words: Sequence[str], console: Console) -> None:
    from rich.table import Table

    from dhns_fast.data import load, write
    from dhns_fast.ranking import relation_categories

    kg = load(values.data)
    table = Table(title=f"{kg.name}: {kg.num_entities} entities, {kg.num_relations} relations", title_justify="left")
    for name in ("split", "triples", "distinct", "with an entity not in train"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in ("train", "valid", "test"):
        unseen = kg.report.unseen_entity.get(split)
        table.add_row(split, str(kg.report.size[split]), str(kg.report.distinct[split]), "" if unseen is None else str(unseen))
    console.print(table)
    for name, x in kg.features.items():
        console.print(
            f"modality {name}: {x.shape[1]} columns, {int(kg.present[name].sum())} of {kg.num_entities} entities", highlight=False
        )
    categories = relation_categories(kg)
    counts = {c: categories.count(c) for c in ("1-1", "1-n", "n-1", "n-n")}
    console.print("relations: " + ", ".join(f"{n} of kind {c}" for c, n in counts.items()), highlight=False)
    lines = kg.report.lines()
    console.print("\n".join(f"[yellow]note[/] {line}" for line in lines) if lines else "splits: clean", highlight=False)
    if values.export is not None:
        write(kg, Path(values.export))
        console.print(f"Written to {values.export}", highlight=False)


def _build(values: Namespace, words: Sequence[str], console: Console) -> None:
    from dhns_fast.ops import build

    console.print(f"Built {build.build(verbose=True)}", highlight=False)


def _doctor(values: Namespace, words: Sequence[str], console: Console) -> None:
    from dhns_fast.doctor import findings

    for finding in findings():
        mark = "[green]yes[/]" if finding.ok else "[yellow]no [/]"
        console.print(f"{mark} {finding.what}: {finding.detail}", highlight=False)


COMMANDS: dict[str, Callable[[Namespace, Sequence[str], Console], int | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "sample": _sample,
    "compare": _compare,
    "data": _data,
    "build": _build,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
