"""Everything that decides a training run, as one typed dataclass: the command line's options, the YAML file, and what a
run folder keeps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dhns_fast import catalogue, checks, files
from dhns_fast.catalogue import (
    Backend,
    Behaviour,
    Control,
    Loss,
    MarginSchedule,
    Method,
    ModelName,
    Optimiser,
    Order,
    Precision,
    ScheduleName,
    SidesAsked,
    TableDevice,
    TableDtype,
)
from dhns_fast.errors import DataError, InputError, is_text
from dhns_fast.train import strict_yaml

# Up to here a step of dense Adam is a matter of a quarter of a second (D 128, one thread), and what the release
# computes.
DENSE_ENTITIES = 100_000
# What trains whole tables.
DENSE_OPTIMISERS = ("adam", "adagrad")
# What options reach at most: a width whose square torch can count, times whose table fits a memory, numbers of 63 bits,
# and scales of embeddings that have a square in float32.
LARGEST_DIM, LARGEST_STEPS, LARGEST_INTEGER, LARGEST_SCALE = 1 << 20, 100_000, (1 << 63) - 1, 1e15
KINDS = {int: "integers", float: "finite numbers", str: "text", bool: "true or false", NoneType: "null"}
# Options that change nothing of a result.
UNDECISIVE = ("checkpoint_every", "cuda_graph")


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run.

    Args:
        data: name of an embedded data set ("atlas") or of a synthetic one
            ("synthetic:entities=1000,relations=10,triples=5000"), or path of a folder or file in one of the layouts of
            docs/data.md.
        features: modalities to use, by file name and separated by commas; "all" for every one found, "none" for the
            structure alone.
        model: scoring model; method dhns goes with the first four.
        dim: D, width of entity embeddings; even for method dhns and for complex, rotate, simple and cp, a multiple of 4
            for quate.
        margin: γ; by default 6 for distance models and, for product models, what gives the release's initial range at
            any width.
        epsilon: ε of the initial range (γ + ε)/D.
        norm: TransE's norm.
        fusion: score on attention-fused modalities; by default yes, except for DistMult and ComplEx under behaviour
            release.
        reciprocal: heads are asked for with an inverse of the relation that has parameters of its own; not with methods
            whose generator is conditioned on the relation.
        train_features: let the optimiser change the feature matrices; by default only under behaviour release.
        method: how negatives are made and weighed: uniform corruptions of equal weight or with self-adversarial
            weights; corruptions from a cache that follows the model (nscaching) or from the relation's pseudo-type
            (relation-constrained); or self-adversarial ones and, beside them, weighted by mu: the diffusion-generated
            hierarchy (dhns), the real entities nearest to it (grounded) or to the true answer (near-misses), those that
            a learning generator draws (kbgan), or the true entity with a modality of another (modality-swap).
        control: what stands in the place of the negatives beside: none leaves them, gaussian is noise of their norm,
            shuffled those made for another triple of the batch, positive-only none at all but the loss's positive term.
        loss: how the true entity is told from others: corruption by N sampled ones, one-vs-all by a softmax over all
            entities (of the options, num_negatives, shared_negatives, filtered and temperature then have no effect;
            method dhns adds its generated negatives all the same).
        behaviour: of the generator: corrected, release for the authors' code with its quirks, or normalised for
            embeddings of unit variance.
        epochs: passes of ⌊n/B⌋ batches over train.
        batch_size: B, positives a batch; reduced to the size of train where that is smaller.
        order: of positives: independent draws, with replacement, as in the release; or shuffled, each triple once an
            epoch but for the n mod B that are left (with corruption mixed: in two epochs once for each side).
        num_negatives: N, corruptions of each positive.
        shared_negatives: positives that share one set of N corruptions, scored as a matrix product, where N may then be
            in the thousands; 0: each has its own.
        corruption: uniform alternates tail and head batches; bernoulli picks the side of each triple by its relation's
            cardinality, mixed by a coin; both asks for the tail and for the head of every triple, 2B queries a step, of
            which the loss is the mean.
        filtered: draw only corruptions that train does not know as answers.
        temperature: a of the self-adversarial weights.
        optimiser: of the model: adam updates every row of the entity table in every step, lazy-adam, adagrad and
            rowwise-adagrad (one number of state a row) those that the step touches, with n3 of those rows alone. Where
            a step touches every row (one-vs-all, trained features) there are adam and adagrad, which is then torch's.
            auto: adam up to 100 000 entities and wherever a step touches every row, lazy-adam beyond. The generator's
            is always Adam.
        table_dtype: of the entity table; bfloat16, rounded stochastically, goes with the row-wise optimisers.
        table_device: host keeps the entity table and its state in host memory but for the entities of most triples
            (row-wise optimisers only).
        learning_rate: of the model.
        decay_after: share of all steps after which the model's learning rate is a tenth, .5 as RotatE's authors have
            it; by default never.
        plateau_factor: of the model's learning rate, each time validation MRR has not risen for more than
            plateau_patience validations; by default it does not fall so.
        plateau_patience: see above.
        plateau_threshold: by what share of itself the best MRR has to rise to count.
        generator_learning_rate: of the generator.
        generator_steps: updates of the generator a batch.
        diffusion_steps: T.
        schedule: of noise; by default scaled, which ends in noise at any T, under behaviour normalised, and else
            linear, the release's.
        sampling_steps: of a strided deterministic chain that lands on the levels; by default all diffusion_steps.
        levels: depths at which the denoising chain is read, hardest first, as times, or between 0 and 1 as
            shares of lost signal; by default {0, T//10, T//8, T//4, T//2}.
        level_weights: weight of each level; a level of weight 0 is neither sampled nor scored.
        level_margins: margin of each level as a factor of γ (distance models; product models have none).
        margin_schedule: margins between the first and the last level: table takes level_margins as they are, linear and
            signal put them at the level's diffusion time or share of lost signal, learned starts at the table and lets
            training divide its sum.
        mu: weight of the hardness-adaptive loss, or of the corruption loss of other negatives beside.
        hard_negatives: of near-misses, kbgan and modality-swap, for each positive.
        pool: entities nearest to the answer that near-misses draws from.
        n3: weight λ₃ of ‖E‖₃³ + ‖R‖₃³; by default 5e-6 for product models, 0 for distance models.
        dropout: share of the numbers of entity embeddings that the corruption or one-vs-all loss leaves out, in queries
            and in candidates (an entity has one mask a step in each); the others grow by 1/(1 − share).
        relation_dropout: the same of relation parameters, in queries.
        l2: weight λ₂ of ‖E‖₂² + ‖R‖₂²; with a row-wise optimiser only where penalties are weighted.
        weighted_penalty: n3 and l2 are means over the step's queries of the rows of head, relation and tail, which
            weighs rows by their frequency (complex: of moduli), in place of sums over the tables.
        seed: decides everything random.
        validate_every: epochs between validations.
        patience: validations without a better realistic MRR before training stops; 0 never stops early.
        validation_from_train: share of train to hold out as validation instead of the graph's own; by default 0.05
            where that is contaminated or missing, and 0 elsewhere.
        checkpoint_every: minutes between checkpoints from which an interrupted run continues; validations write one
            too.
        precision: operands of matrix products: of the generator's and, on a GPU, of those of scores against all
            entities.
        backend: implementation of all operators that have it, as the environment variable DHNS_FAST_BACKEND; the others
            choose.
        device: cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.
        cuda_graph: launch a whole step at once on a GPU, with the same numbers; by default where every step has the
            same shapes (docs/gpu.md), true insists on it.
    """

    data: str = "atlas"
    features: str | list[str] = "all"
    model: ModelName = "complex"
    dim: int = 64
    margin: float | None = None
    epsilon: float = 2.0
    norm: Literal[1, 2] = 1
    fusion: bool | None = None
    reciprocal: bool = False
    train_features: bool | None = None
    method: Method = "dhns"
    control: Control = "none"
    loss: Loss = "corruption"
    behaviour: Behaviour = "corrected"
    epochs: int = 15
    batch_size: int = 500
    order: Order = "independent"
    num_negatives: int = 64
    shared_negatives: int = 0
    corruption: SidesAsked = "uniform"
    filtered: bool = True
    temperature: float = 0.5
    optimiser: Optimiser = "auto"
    table_dtype: TableDtype = "float32"
    table_device: TableDevice = "device"
    learning_rate: float = 0.002
    decay_after: float | None = None
    plateau_factor: float | None = None
    plateau_patience: int = 5
    plateau_threshold: float = 0.0001
    generator_learning_rate: float = 0.002
    generator_steps: int = 1
    diffusion_steps: int = 50
    schedule: ScheduleName | None = None
    sampling_steps: int | None = None
    levels: list[float] | None = None
    level_weights: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.5, 1.0, 1.0, 0.5])
    level_margins: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    margin_schedule: MarginSchedule = "table"
    mu: float = 0.01
    hard_negatives: int = 4
    pool: int = 50
    n3: float | None = None
    dropout: float = 0.0
    relation_dropout: float = 0.0
    l2: float = 0.0
    weighted_penalty: bool = False
    seed: int = 0
    validate_every: int = 5
    patience: int = 10
    validation_from_train: float | None = None
    checkpoint_every: float = 10
    precision: Precision | None = None
    backend: Backend | None = None
    device: str = "auto"
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        # YAML files and callers in Python have no parser that checks types for them.
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                checks.one_of(name, getattr(self, name), get_args(hint))
            if not _fits(getattr(self, name), hint):
                raise InputError(name, getattr(self, name), _accepted(hint))
        at_least = {
            "dim": 4, "epochs": 1, "batch_size": 1, "num_negatives": 1, "generator_steps": 1, "diffusion_steps": 1, "validate_every": 1,
            "patience": 0, "mu": 0, "temperature": 0, "seed": 0, "shared_negatives": 0, "n3": 0, "l2": 0, "plateau_patience": 0,
            "plateau_threshold": 0, "hard_negatives": 1, "pool": 1, "sampling_steps": 1,
        }  # fmt: skip
        for name, low in at_least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise InputError(name, value, f"{low} or more")
        at_most = {
            "dim": LARGEST_DIM,
            "diffusion_steps": LARGEST_STEPS,
            "margin": LARGEST_SCALE,
            "epsilon": LARGEST_SCALE,
        }
        for name, value in vars(self).items():
            if isinstance(value, str) and not is_text(value):
                raise InputError(name, value, "text in UTF-8, which the file of a run's options is")
            high = at_most.get(name, LARGEST_INTEGER if isinstance(value, int) else None)
            if isinstance(value, (int, float)) and high is not None and abs(value) > high:
                raise InputError(name, value, f"{high} or less")
        for name in ("decay_after", "plateau_factor"):
            if (share := getattr(self, name)) is not None and not 0 < share < 1:
                raise InputError(name, share, "shares above 0 and below 1")
        for name in ("dropout", "relation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "shares from 0 to below 1")
        for name in ("learning_rate", "generator_learning_rate", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise InputError(name, getattr(self, name), "numbers above 0")
        recipe = self.recipe
        if recipe.conditioned and self.model not in catalogue.CONDITIONED:
            others = ", ".join(name for name, x in catalogue.METHODS.items() if not x.conditioned)
            raise InputError(
                "method",
                self.method,
                f"{others} for model {self.model}; {self.method} for {', '.join(catalogue.CONDITIONED)}",
            )
        if self.loss == "one-vs-all" and self.method != "uniform" and not recipe.beside:
            possible = ", ".join(name for name, x in catalogue.METHODS.items() if name == "uniform" or x.beside)
            raise InputError(
                "method", self.method, f"{possible} for loss one-vs-all, which has no corruptions to weigh"
            )
        if self.shared_negatives and recipe.sampler and not recipe.beside:
            raise InputError(
                "shared_negatives",
                self.shared_negatives,
                f"0 for method {self.method}, whose corruptions are each triple's own",
            )
        if self.control != "none" and not recipe.beside:
            possible = ", ".join(name for name, x in catalogue.METHODS.items() if x.beside)
            raise InputError("control", self.control, f"none for method {self.method}; the others for {possible}")
        if self.control == "gaussian" and not recipe.conditioned:
            raise InputError(
                "control",
                self.control,
                f"none, shuffled, positive-only for method {self.method}, which makes no embeddings",
            )
        parts = math.lcm(catalogue.MODELS[self.model].parts, 2 if recipe.generator else 1)
        if self.dim % parts:
            raise InputError("dim", self.dim, f"multiples of {parts} for model {self.model} and method {self.method}")
        if self.reciprocal and recipe.conditioned:
            raise InputError(
                "reciprocal", True, f"false for method {self.method}, which generates heads by the relation"
            )
        if self.touches_every_row and self.optimiser not in ("auto", *DENSE_OPTIMISERS):
            raise InputError(
                "optimiser",
                self.optimiser,
                f"auto, {', '.join(DENSE_OPTIMISERS)} where a step touches every row (one-vs-all, trained features)",
            )
        if self.optimiser == "adam" or self.touches_every_row:
            for name, default in (("table_dtype", "float32"), ("table_device", "device")):
                if getattr(self, name) != default:
                    raise InputError(
                        name, getattr(self, name), f"{default}; others with {', '.join(catalogue.ROW_METHODS)}"
                    )
        if self.validation_from_train is not None and not 0 <= self.validation_from_train < 1:
            raise InputError("validation_from_train", self.validation_from_train, "shares from 0 to below 1")
        levels = self.level_list
        for name in ("level_weights", "level_margins"):
            if len(getattr(self, name)) != len(levels):
                accepted = f"one value for each of the {len(levels)} levels {levels}: levels, level_weights and level_margins go together"
                raise InputError(name, getattr(self, name), accepted)
        if not levels or any(not (0 < x < 1 or x in range(self.diffusion_steps)) for x in levels):
            accepted = f"one or more integers from 0 to {self.diffusion_steps - 1}, diffusion_steps - 1, or shares between 0 and 1"
            raise InputError("levels", levels, accepted)
        if min(self.level_weights) < 0 or not sum(self.level_weights) > 0:
            raise InputError("level_weights", self.level_weights, "numbers of at least 0 that are not all 0")
        if self.margin_schedule == "learned":
            if self.product_model:
                raise InputError("margin_schedule", "learned", f"table; {self.model} has no margins")
            active = [m for m, w in zip(self.level_margins, self.level_weights, strict=True) if w > 0]
            if min(active) <= 0:
                raise InputError(
                    "level_margins",
                    self.level_margins,
                    "numbers above 0 where level_weights are, for margins to be learned",
                )

    @property
    def recipe(self) -> catalogue.Recipe:
        """What the method consists of."""
        return catalogue.METHODS[self.method]

    @property
    def trains_features(self) -> bool:
        """Whether the optimiser changes the feature matrices, with the default filled in."""
        return self.behaviour == "release" if self.train_features is None else self.train_features

    @property
    def touches_every_row(self) -> bool:
        """Whether every step has a gradient for every entity. (Trained features matter where there are any; the options
        do not know.)
        """
        return self.loss == "one-vs-all" or self.trains_features

    @property
    def n3_weight(self) -> float:
        """λ₃, with the default filled in."""
        return self.n3 if self.n3 is not None else 5e-6 if self.product_model else 0.0

    def dense(self, num_entities: int) -> bool:
        """Whether the optimiser takes a gradient of the whole table of so many entities, or the rows of a step."""
        return self.touches_every_row or self.optimiser_for(num_entities) == "adam"

    def optimiser_for(self, num_entities: int) -> str:
        """The model's optimiser on a graph of so many entities, with auto decided."""
        if self.optimiser != "auto":
            return self.optimiser
        narrow = self.table_dtype != "float32" or self.table_device != "device"
        return "adam" if self.touches_every_row or (num_entities <= DENSE_ENTITIES and not narrow) else "lazy-adam"

    @property
    def noise_schedule(self) -> str:
        """The schedule, with the default filled in."""
        return catalogue.default_schedule(self.behaviour) if self.schedule is None else self.schedule

    @property
    def level_list(self) -> list[float]:
        """The levels, with the default filled in: whole times, and shares of lost signal as they are."""
        levels = catalogue.default_levels(self.diffusion_steps) if self.levels is None else self.levels
        return [int(x) if x == int(x) else x for x in levels]

    @property
    def active_levels(self) -> list[float]:
        """The levels of weight > 0: those that are sampled and scored."""
        return [level for level, weight in zip(self.level_list, self.level_weights, strict=True) if weight > 0]

    @property
    def product_model(self) -> bool:
        return not catalogue.MODELS[self.model].distance

    @property
    def fused(self) -> bool:
        """Whether modalities are fused for scoring, with the default filled in."""
        return not (self.product_model and self.behaviour == "release") if self.fusion is None else self.fusion

    def read_on(self, device: str) -> TrainConfig:
        """The options for whoever reads the result: what training needed of its machine does not bind them."""
        return dataclasses.replace(self, device=device, precision=None, backend=None, cuda_graph=None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path, resolved: Mapping[str, object] | None = None) -> None:
        """Write the options as YAML; `resolved` says in comments what null and auto came to mean. A file that says the
        same stays as it is.
        """
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        for name, value in (resolved or {}).items():
            text = re.sub(rf"^({name}: (?:null|auto))$", rf"\1  # {value}", text, flags=re.MULTILINE)
        files.write_text(path, text)

    @classmethod
    def load(cls, path: Path, **changes: Any) -> TrainConfig:
        """Read a YAML file of options.

        Args:
            path: the file; options that it does not name have their defaults.
            changes: options that override the file's.

        Raises:
            DataError: it is missing, no mapping of options, or one of its options is unknown or not acceptable; the
                message names the line.
            InputError: one of `changes` is not acceptable.
        """
        options, lines = strict_yaml.read(path)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            line = lines.get(str(unknown[0]))
            try:
                checks.one_of("option", unknown[0], known)
            except InputError as error:
                raise DataError(path, str(error), line) from None
        try:
            return cls(**(options | changes))
        except InputError as error:
            if error.argument in changes:
                raise
            raise DataError(path, str(error), lines.get(error.argument)) from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type that a field declares; numbers must be finite, an integer is a number, and a tuple
    a list.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(x, args[0]) for x in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint


def _accepted(hint: Any) -> str:
    """What :func:`_fits` accepts, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_accepted, args))
    if origin is Literal:
        return ", ".join(map(str, args))
    return f"lists of {_accepted(args[0])}" if origin is list else KINDS[hint]
