"""Hyperparameter search: Optuna's trees over a space that fits the model, judged on validation; the same command
continues a search.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dhns_fast import checks, files
from dhns_fast.data import KnowledgeGraph
from dhns_fast.data.load import located
from dhns_fast.errors import DataError, InputError, Shown, shown
from dhns_fast.train import strict_yaml
from dhns_fast.train.assemble import build, prepare_graph
from dhns_fast.train.config import UNDECISIVE, TrainConfig
from dhns_fast.train.trainer import Diverged, Epoch, Trainer

if TYPE_CHECKING:
    import optuna

Space = Mapping[str, Any]


def default_space(config: TrainConfig) -> dict[str, Any]:
    """What is searched for a model and method: option → a list of choices, or {low, high, log}."""
    space: dict[str, Any] = {"learning_rate": {"low": 1e-4, "high": 3e-2, "log": True}}
    if config.loss == "corruption":
        space["num_negatives"] = [16, 32, 64, 128, 256]
        if config.method != "uniform":
            space["temperature"] = {"low": 0.1, "high": 2.0}
    if config.product_model:
        space["n3"] = {"low": 1e-8, "high": 1e-2, "log": True}
    else:
        space["margin"] = {"low": 1.0, "high": 24.0}
    if config.method == "dhns":
        space |= {
            "generator_learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "mu": {"low": 1e-4, "high": 1.0, "log": True},
        }
    return space


def read_space(path: Path) -> dict[str, Any]:
    """A space from a YAML file.

    Raises:
        DataError: it is none; the message says what of it.
    """
    space, lines = strict_yaml.read(path)
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    if not space:
        raise DataError(path, "names no option to search")
    for name, choice in space.items():
        try:
            checks.one_of("option", name, known)
            _refuse_shared(name)
        except InputError as error:
            raise DataError(path, str(error), lines.get(name)) from None
        bounds = isinstance(choice, dict) and {"low", "high"} <= choice.keys() <= {"low", "high", "log"}
        if not bounds and not (isinstance(choice, list) and choice):
            raise DataError(
                path,
                f"{name}: got {choice!r}; accepted: a list of choices, or low, high and perhaps log: true",
                lines.get(name),
            )
        if bounds and not _ordered(choice):
            accepted = "numbers, low below high, and above 0 with log: true"
            raise DataError(path, f"{name}: got {choice!r}; accepted: {accepted}", lines.get(name))
    return space


def _refuse_shared(name: str) -> None:
    if name in _SHARED:
        raise InputError(name, Shown("an option of the space"), "one value for all trials, which share their graph")


def _ordered(bounds: Mapping[str, Any]) -> bool:
    low, high = bounds["low"], bounds["high"]
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high))
    return numbers and low < high and (low > 0 or not bounds.get("log", False))


def tune(
    base: TrainConfig,
    trials: int,
    folder: str | Path,
    space: Space | None = None,
    on_trial: Callable[[str], None] = lambda line: None,
) -> TrainConfig:
    """Search for the options of the best realistic MRR on validation; trials that fall behind the others are ended
    early.

    Args:
        base: all other options.
        trials: of the whole search, those that the folder holds already included.
        folder: of the search: `study.journal` (Optuna's), `trials.csv`, and `best.yaml`, which `dhns-fast train
            --config` takes.
        space: see :func:`default_space`, which it replaces.
        on_trial: called with a line after each trial.

    Raises:
        InputError: Optuna is missing, the graph has no validation, the space has an option that decides the graph, or
            the folder holds a search of other options, another space or other data, or is in use.
    """
    trials = checks.count("trials", trials)
    # Or best.yaml would mean another graph in another folder.
    base = dataclasses.replace(base, data=located(base.data))
    if importlib.util.find_spec("optuna") is None:
        raise InputError("optuna", None, "the package optuna: pip install 'dhns-fast[hpo]'")
    space = default_space(base) if space is None else space
    kg, _ = prepare_graph(base)
    if not len(kg.valid):
        raise InputError("data", kg.name, "a graph with validation triples to judge by")
    # Bad options are refused before the first trial.
    build(base, kg)
    for name, choice in space.items():
        _refuse_shared(name)
        for value in choice if isinstance(choice, list) else (choice["low"], choice["high"]):
            dataclasses.replace(base, **{name: value})
    folder = Path(folder)
    files.make_folder(folder)
    with files.owned(folder):
        return _search(base, trials, folder, space, on_trial, kg)


# What decides the graph and what validation is held out of it, which all trials share.
_SHARED = ("data", "features", "validation_from_train", "seed")
# Of a trial's options those that change where it runs and not what comes of it.
_PLACE = (*UNDECISIVE, "device", "backend")


def _search(
    base: TrainConfig, trials: int, folder: Path, space: Space, on_trial: Callable[[str], None], kg: KnowledgeGraph
) -> TrainConfig:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    # A third of the trials see how the others did before one may be ended.
    pruner = optuna.pruners.MedianPruner(n_startup_trials=max(2, trials // 3))
    study = optuna.create_study(
        study_name="dhns-fast",
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        pruner=pruner,
    )
    options = {name: value for name, value in base.to_dict().items() if name not in _PLACE}
    # As it comes back from the journal.
    of = json.loads(json.dumps({"options": options, "space": dict(space), "graph": kg.fingerprint()}))
    before = study.user_attrs.get("of", of if not study.trials else {})
    if before.get("graph") == of["graph"]:  # wherever it lay
        kept = {name: value for name, value in before["options"].items() if name not in _PLACE}
        before = before | {"options": kept | {"data": base.data}}
    if before != of:
        raise InputError("output", Shown(f"{str(folder)!r}, a search with {_difference(before, of)}"), "another folder")
    study.set_user_attr("of", of)

    def objective(trial: optuna.Trial) -> float:
        config = dataclasses.replace(base, **{name: _suggest(trial, name, choice) for name, choice in space.items()})

        def on_epoch(epoch: Epoch) -> None:
            if epoch.valid:
                trial.report(epoch.valid["valid_mrr"], epoch.epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

        try:
            return Trainer(config, kg).fit(on_epoch=on_epoch).best_mrr
        except Diverged as error:
            raise optuna.TrialPruned(str(error)) from None

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while (done := len(study.get_trials(deepcopy=False, states=ended))) < trials:
        # A generator of its own for each trial: a search that goes on draws what one without a break would.
        seed = int(np.random.SeedSequence([base.seed % (1 << 64), done]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        study.optimize(objective, n_trials=1)
        trial = study.trials[-1]
        said = "ended early" if trial.value is None else f"valid MRR {trial.value:.4f}"
        on_trial(
            f"trial {done + 1} of {trials}: {said}, {', '.join(f'{k} {_short(v)}' for k, v in trial.params.items())}"
        )
        _keep(study, folder)
    if not study.get_trials(deepcopy=False, states=ended[:1]):
        raise InputError("trials", trials, "more, or another space: every trial diverged or was ended early")
    best = dataclasses.replace(base, **study.best_params)
    best.save(folder / "best.yaml")
    _keep(study, folder)
    return best


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What an earlier search in a folder had otherwise, in a few words."""
    options, other = (x.get("options", {}) for x in (before, now))
    for name in other:
        if options.get(name) != other[name]:
            return f"{name} {shown(options.get(name))}"
    return "another space" if before.get("space") != now["space"] else "other data in the same place"


def _suggest(trial: optuna.Trial, name: str, choice: Any) -> Any:
    if isinstance(choice, list):
        return trial.suggest_categorical(name, choice)
    low, high, log = choice["low"], choice["high"], bool(choice.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _keep(study: optuna.Study, folder: Path) -> None:
    rows = [
        {"trial": t.number, "state": t.state.name.lower(), "valid_mrr": t.value, **t.params}
        for t in study.get_trials(deepcopy=False)
    ]
    files.write_rows(folder / "trials.csv", rows)
