"""The options of every command, in jsonargparse's words on the inside and in ours on the outside.

Heavy imports happen inside the commands, so that --help and errors in options answer at once.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt

import dhns_fast
from dhns_fast.catalogue import Export, Split
from dhns_fast.errors import printable
from dhns_fast.train.config import TrainConfig

# What --resume may be given: more epochs, data that has moved, another machine.
RESUMABLE = ("epochs", "data", "device", "precision", "backend", "cuda_graph", "checkpoint_every")
# The parser's messages in the words of the command line: types without Python's way of writing them.
MESSAGES = (
    (r'Parser key "(\w+)"', r"--\1"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: ",
        r"Expected \1. Got value: ",
    ),
    (r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1"),
    (
        r"Not of type PositiveInt: (?:invalid literal for int\(\) with base 10: |int\(\) argument must be .*, not )?"
        r"['\"]*([^'\" ]*)['\"]*(?: does not conform to restriction v>0)?",
        r"Expected a positive integer. Got value: \1",
    ),
    ("NoneType", "null"),
    ("Expected a ", "Expected "),
)


class Formatter(DefaultHelpFormatter):
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


class Parser(ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, formatter_class=Formatter, **options)
        # What --resume and --config compare with must be what was typed.
        self.allow_abbrev = False
        # The parser of the program and those of its commands, by name.
        self.family: dict[str, Parser] = {"": self}

    def error(self, message: str, ex: Exception | None = None) -> Any:
        prog = self.prog.replace(" [options]", "")
        text = " ".join(str(message).split())
        # What a command lacks is said by the parser of the program, as COMMAND.NAME.
        for name, parser in self.family.items():
            for action in parser._actions if name else ():
                key = f"{name}.{action.dest}"
                if re.search(rf"required: .*{re.escape(key)}\b", text):
                    prog = f"{self.family[''].prog} {name}".replace(" [options]", "")
                    text = text.replace(key, action.option_strings[0] if action.option_strings else action.dest)
        for pattern, shown in MESSAGES:
            text = re.sub(pattern, shown, text)
        text = re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)
        print(printable(f"{prog}: error: {text}{self._near(text)} (see {prog} --help)"), file=sys.stderr)
        raise SystemExit(2)

    def _near(self, text: str) -> str:
        """What was meant, where a message is about a word that is not known."""
        known = [s.replace("_", "-") for s in self._option_string_actions if s.startswith("--")]
        if match := re.search(r"unrecognized arguments: (--[\w-]+)", text):
            near = difflib.get_close_matches(match[1], known, 1, 0.75)
        elif match := re.search(r"invalid choice: '([^']*)'", text):
            near = difflib.get_close_matches(match[1], list(self.family), 1)
        elif match := re.search(r"one of (.*)\. Got value: (\S+)", text):
            near = difflib.get_close_matches(match[2], re.findall(r"'([^']*)'", match[1]), 1)
        else:
            near = []
        return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> Parser:
    parser = Parser(
        prog="dhns-fast",
        description="Diffusion-based hierarchical negative sampling for multimodal knowledge-graph completion.",
    )
    parser.add_argument("--version", action="version", version=f"dhns-fast {dhns_fast.__version__}")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> Parser:
        sub = Parser(description=text)
        commands.add_subcommand(name, sub, help=text)
        sub.family = parser.family
        parser.family[name] = sub
        return sub

    sub = command("train", "Train a model, choose it on validation, evaluate it on test, and write a run folder.")
    _config_arguments(sub)
    sub.add_argument(
        "--output", type=str | None, default=None, help="folder of the run; by default a new one under runs/"
    )
    sub.add_argument(
        "--log",
        type=str,
        default="",
        help="where epochs are told while they pass: csv (history.csv), tensorboard, or both",
    )
    changing = ", ".join(f"--{name.replace('_', '-')}" for name in RESUMABLE)
    text = f"run folder to continue with its options, of which {changing} may change"
    sub.add_argument("--resume", type=str | None, default=None, help=text)

    def of_run(name: str, text: str, run: str = "run folder") -> Parser:
        sub = command(name, text)
        sub.add_argument("--run", type=str, required=True, help=run)
        sub.add_argument(
            "--data", type=str | None, default=None, help="where the graph is now; by default where training found it"
        )
        sub.add_argument(
            "--device", type=str, default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"
        )
        return sub

    sub = of_run("evaluate", "Evaluate a trained run on a split: filtered, both sides, every rule for ties.")
    sub.add_argument("--split", type=Split, default="test", help="which triples to rank")
    sub.add_argument(
        "--triples", type=str | None, default=None, help="file of triples by name to rank instead, tabs between names"
    )
    text = (
        "entities to rank among: types, those that train has on the same side of the relation; type_constrain, those of "
        "the type_constrain.txt beside the data; the path of such a file; or a file of names, one a line"
    )
    sub.add_argument("--candidates", type=str | None, default=None, help=text)
    sub.add_argument("--raw", action="store_true", help="count known answers as rivals, too")
    sub.add_argument(
        "--relation", type=str | None, default=None, help="recommend: rank this relation's tails for its heads"
    )
    sub.add_argument(
        "--metrics", type=str, default="recall@20,ndcg@20", help="with --relation: metrics, separated by commas"
    )
    sub.add_argument("--json", action="store_true", help="print every metric as JSON instead of tables")
    sub.add_argument(
        "--sampled",
        type=PositiveInt | None,
        default=None,
        help="beside the exact ranks those among so many sampled entities, as papers print",
    )

    text = (
        "Complete a triple by names; put ? for what is unknown: dhns-fast predict --run FOLDER Libreville capital_of ?"
    )
    sub = of_run("predict", text)
    _triple_arguments(sub, "name, #id, or ?", optional=True)
    sub.add_argument(
        "--queries", type=str | None, default=None, help="file of such triples, one a line, tabs between names"
    )
    _format_arguments(sub)
    sub.add_argument("--top", type=PositiveInt, default=10, help="how many answers")
    sub.add_argument(
        "--exclude_known", action="store_true", help="leave out answers that the graph holds instead of marking them"
    )

    text = "What did the diffusion imagine? Generate a triple's head and tail at every level and name the nearest real entities."
    sub = of_run("sample", text, "run folder, trained with method dhns")
    _triple_arguments(sub, "name or #id")
    sub.add_argument("--top", type=PositiveInt, default=3, help="how many entities a level")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")

    sub = of_run("score", "Score triples: the higher, the likelier.")
    sub.add_argument(
        "--triples", type=str, required=True, help="file of triples by name, one a line, tabs between names"
    )
    _format_arguments(sub)

    text = "Write a run's embeddings and names for other programs: NumPy, Parquet, FAISS, word2vec, TensorBoard's projector, safetensors."
    sub = of_run("export", text)
    sub.add_argument("--to", type=Export, default="npy", help="format")
    sub.add_argument("--output", type=str, required=True, help="folder")
    sub.add_argument(
        "--queries",
        type=str | None,
        default=None,
        help="for faiss: file of triples with one ? each; by default of test",
    )

    sub = of_run(
        "pack",
        "Put a run into one portable file: weights, options, graph, names, metrics. --run takes it in the place of a folder.",
    )
    sub.add_argument("--output", type=str, required=True, help="the file")

    sub = command(
        "tune", "Search for hyperparameters with Optuna, judged on validation; the same command continues the search."
    )
    _config_arguments(sub)
    sub.add_argument("--trials", type=PositiveInt, default=30, help="of the whole search, earlier ones included")
    sub.add_argument(
        "--space", type=str | None, default=None, help="YAML file: option to a list of choices, or to low, high and log"
    )
    sub.add_argument("--output", type=str, default="runs/tune", help="folder of the search")

    for name, text in (
        ("compare", "Train the same model with several methods and seeds and print mean ± standard deviation."),
        ("grid", "The comparison on several data sets, within a budget of time; the same command continues it."),
    ):
        sub = command(name, text)
        several = {"data"} if name == "grid" else set()
        _config_arguments(sub, {"model", "method", "seed", "checkpoint_every"} | several)
        methods: tuple[str, ...] = ("uniform", "self-adversarial", "dhns")
        if name == "grid":
            sub.add_argument(
                "--data", type=str, default="atlas", help="embedded data sets or folders, separated by commas"
            )
            sub.add_argument(
                "--budget",
                type=str | None,
                default=None,
                help="time for new runs, 90s, 30m or 2h; by default as long as it takes",
            )
            methods = (*methods, "dhns-release")
            sub.add_argument("--processes", type=PositiveInt, default=1, help="runs side by side")
            sub.add_argument(
                "--learning_rates",
                type=str,
                default="",
                help="to choose among on validation, separated by commas, with seed 0",
            )
            sub.add_argument("--mus", type=str, default="", help="values of mu to choose among on validation, likewise")
            sub.add_argument("--n3s", type=str, default="", help="values of n3 to choose among on validation, likewise")
        sub.add_argument(
            "--models", type=str, default="distmult,complex,transe,rotate", help="models to train, separated by commas"
        )
        sub.add_argument(
            "--methods",
            type=str,
            default=",".join(methods),
            help="methods to compare, separated by commas; a behaviour may follow a hyphen and a control a plus: dhns-normalised+gaussian",
        )
        sub.add_argument("--seeds", type=PositiveInt, default=3, help="number of seeds, from 0")
        sub.add_argument(
            "--output",
            type=str,
            default=f"runs/{name}",
            help="folder of the results; what it holds already is not trained again",
        )

    sub = command("data", "Describe a graph and what is wrong with its splits.")
    sub.add_argument("--data", type=str, default="atlas", help="embedded data set or folder")
    sub.add_argument("--export", type=str | None, default=None, help="folder to write the graph into, as TSV")
    sub.add_argument(
        "--convert",
        type=str | None,
        default=None,
        help="folder for the graph as arrays, which later commands map into memory",
    )
    sub.add_argument("--half", action="store_true", help="with --convert: keep features as float16")

    sub = command(
        "convert",
        "Turn a graph into arrays that are mapped into memory, or a pickled file of features into safetensors.",
    )
    sub.add_argument(
        "source", type=str, help="graph of any layout, or file of features (.pkl, .pickle, .pt, .npy, .npz)"
    )
    sub.add_argument("target", type=str, help="new folder, or new .safetensors file")
    sub.add_argument(
        "--allow_pickle",
        action="store_true",
        help="open a pickle, which can run any program: only from someone you trust",
    )
    sub.add_argument("--half", action="store_true", help="keep features of a graph as float16")
    sub.add_argument("--seed", type=int, default=0, help="of the split, where the graph has none")

    sub = command(
        "plan",
        "Say what a run takes in memory, part by part, whether it fits here, and what to change where it does not.",
    )
    for name, text in (("entities", "of the graph, 5000000 or 5e6"), ("relations", "of the graph")):
        sub.add_argument(f"--{name}", type=str, required=True, help=text)
    sub.add_argument("--triples", type=str | None, default=None, help="of train; by default 5 an entity")
    sub.add_argument(
        "--feature_widths", type=str, default="", help="columns of the feature matrices, separated by commas"
    )
    sub.add_argument("--processes", type=PositiveInt, default=1, help="that train together on this machine")
    sub.add_argument(
        "--memory", type=str | None, default=None, help="of the machine, 16GB; by default what is free here"
    )
    sub.add_argument(
        "--device_memory",
        type=str | None,
        default=None,
        help="of each process's CUDA device; by default what is free here",
    )
    _config_arguments(sub)

    command("build", "Compile the C++ operators ahead of their first use.")
    command("doctor", "Say what this machine can use, and what is missing and why.")
    sub = command(
        "completion", 'Print a script that completes commands and options: eval "$(dhns-fast completion bash)"'
    )
    sub.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="which shell")
    return parser


def _config_arguments(parser: Parser, skip: Collection[str] = ()) -> None:
    """The options of a run, but for those in `skip`, and the file that they may be in."""
    parser.add_argument(
        "--config", type=str | None, default=None, help="YAML file of options; those given here override it"
    )
    parser.add_class_arguments(TrainConfig, skip=set(skip))


def _triple_arguments(parser: Parser, text: str, optional: bool = False) -> None:
    for name in ("head", "relation", "tail"):
        if optional:
            parser.add_argument(name, type=str, nargs="?", default=None, help=text)
        else:
            parser.add_argument(name, type=str, help=text)


def _format_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", action="store_true", help="print CSV")


def typed(parser: Parser, words: Sequence[str]) -> list[str]:
    """Words of a command line as the program's parser takes them: --validation-from-train=.1 has underscores there,
    --levels 0,5 brackets, and numbers no leading zeros.
    """
    hints = {
        option: str(getattr(action, "_typehint", ""))
        for each in parser.family.values()
        for action in each._actions
        for option in action.option_strings
    }
    out: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("-", "_").replace("__", "--", 1)
            out.append(name + equals + (_value(hints.get(name, ""), value) if equals else ""))
        else:
            out.append(_value(hints.get(out[-1], "") if out else "", word))
    return out


def _value(hint: str, text: str) -> str:
    """What is given to an option of a type, in the parser's words."""
    if re.search(r"list\[(int|float)\]", hint):
        if (found := re.fullmatch(r"\[([^][]*)\]|([-+0-9.,eE ]+)", text)) is None:
            return text
        cells = [_number(x) for x in (found[1] or found[2] or "").split(",")]
        return json.dumps(text) if any(x.startswith('"') for x in cells) else f"[{','.join(cells)}]"
    return _number(text) if re.search(r"\bfloat\b|\bint\b|\w+Int\b", hint) else text


def _number(text: str) -> str:
    """A number as it looks. The parser reads YAML 1.1, where 010 is 8, 1_0 is 10 and 1:30 is 90: what begins like a
    number and is none in decimal digits is a quoted text there, which it refuses.
    """
    text = text.strip()
    if re.fullmatch(r"[-+]?[0-9]{1,300}", text):
        return str(int(text))
    plain = re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)
    return text if plain or not re.match(r"[-+.]?[0-9]", text) else json.dumps(text)
