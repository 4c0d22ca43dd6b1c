"""What there is to choose from: models, reductions, methods, behaviours, precisions, ... Each is declared here, once.

Types of options, the package's exports, lists in messages and in documents, and the numbers that C++ uses are made from
these. Free of torch, so that options are checked, and refused, at once. docs/extending.md says what else an entry
needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

# How a query and an entity meet (dhns_fast.scoring). Their order is that of `Reduction` in csrc/reductions.h.
REDUCTIONS = ("dot", "l2", "l1", "complex_l1")


class Model(NamedTuple):
    """What the package knows of a scoring model before it imports torch.

    Attributes:
        title: name of its class in :mod:`dhns_fast.models`.
        reduction: one of :data:`REDUCTIONS`; TransE takes the one of its norm.
        parts: of which an embedding consists, and by which its width is divided: 2 for complex numbers and for the two
            roles of an entity, 4 for quaternions.
        dhns: the generator has a condition, and the hardness-adaptive loss an interaction, of this model's name.
        phases: relation parameters are phases `[D/2]` in radians there.
    """

    title: str
    reduction: str
    parts: int = 1
    dhns: bool = False
    phases: bool = False

    @property
    def distance(self) -> bool:
        """Whether scores are γ minus a distance; the others are products, without a margin."""
        return self.reduction != "dot"


MODELS = {
    "transe": Model("TransE", "l1", dhns=True),
    "distmult": Model("DistMult", "dot", dhns=True),
    "complex": Model("ComplEx", "dot", parts=2, dhns=True),
    "rotate": Model("RotatE", "complex_l1", parts=2, dhns=True, phases=True),
    "simple": Model("SimplE", "dot", parts=2),
    "quate": Model("QuatE", "dot", parts=4),
    "rescal": Model("RESCAL", "dot"),
    "cp": Model("CP", "dot", parts=2),
    "pairre": Model("PairRE", "l1"),
    "hole": Model("HolE", "dot"),
}
# The models that DHNS can generate negatives for, by the names of their conditions and interactions.
CONDITIONED = tuple(name for name, model in MODELS.items() if model.dhns)


class Recipe(NamedTuple):
    """What a training method puts beside the true triples.

    Attributes:
        sampler: name of the class in :mod:`dhns_fast.negatives` whose negatives it takes, or "" for uniform corruptions
            alone.
        beside: they are hard ones beside N uniform corruptions, weighted by μ; otherwise they are the N corruptions.
        embeds: they are embeddings of every modality, which the hardness-adaptive loss takes.
        generator: a diffusion generator is trained for them.
        weighted: corruptions have self-adversarial weights.
    """

    sampler: str = ""
    beside: bool = False
    embeds: bool = False
    generator: bool = False
    weighted: bool = True

    @property
    def conditioned(self) -> bool:
        """Whether it goes with the models of :data:`CONDITIONED` alone."""
        return self.embeds or self.generator


METHODS = {
    "uniform": Recipe(weighted=False),
    "self-adversarial": Recipe(),
    "dhns": Recipe("Diffusion", beside=True, embeds=True, generator=True),
    "nscaching": Recipe("NSCaching"),
    "relation-constrained": Recipe("Constrained"),
    "near-misses": Recipe("Nearest", beside=True),
    "modality-swap": Recipe("ModalitySwap", beside=True, embeds=True),
    "kbgan": Recipe("GAN", beside=True),
    "grounded": Recipe("Grounded", beside=True, generator=True),
}
# What stands in the place of the negatives of a method, to tell its gain from theirs (dhns_fast.negatives.controls).
CONTROLS = ("none", "gaussian", "shuffled", "positive-only")
LOSSES = ("corruption", "one-vs-all")
CORRUPTIONS = ("uniform", "bernoulli")
# How an epoch takes the triples of train: each step draws its own, or all once, in an order of the epoch.
ORDERS = ("independent", "shuffled")
# Which sides a step of training asks for: one, the other in the next step; one a triple, by its relation or by a coin;
# or both of every triple.
SIDES_ASKED = (*CORRUPTIONS, "mixed", "both")
BEHAVIOURS = ("corrected", "release", "normalised")
SCHEDULES = ("linear", "scaled", "cosine")
PRECISIONS = ("ieee", "tf32", "bf16")
BACKENDS = ("auto", "triton", "cuda", "cpu", "eager")
MARGIN_SCHEDULES = ("table", "linear", "signal", "learned")
LOGGERS = ("csv", "tensorboard")
EXPORTS = ("npy", "parquet", "safetensors", "faiss", "word2vec", "projector")
# Optimisers of the rows that a step touches, by dhns_fast.optim; their order is that of `RowMethod` in
# csrc/rowwise_cpu.h.
ROW_METHODS = ("lazy-adam", "adagrad", "rowwise-adagrad")
OPTIMISERS = ("auto", "adam", *ROW_METHODS)
TABLE_DTYPES = ("float32", "bfloat16")
TABLE_DEVICES = ("device", "host")
SIDES: tuple[Side, ...] = ("tail", "head")
SPLITS = ("train", "valid", "test")


def default_schedule(behaviour: str) -> str:
    """The noise schedule of a behaviour: the release's, or the one that ends in noise at any T."""
    return "scaled" if behaviour == "normalised" else "linear"


def default_levels(T: int) -> tuple[int, ...]:
    """The paper's five hardness levels, hardest first: level s is the state that the step at t = s + 1 produced."""
    return (0, T // 10, T // 8, T // 4, T // 2)


if TYPE_CHECKING:
    # A type checker cannot read a Literal off a tuple.
    ModelName = str
    Method = str
    Loss = str
    Corruption = str
    SidesAsked = str
    Order = str
    Behaviour = str
    Precision = str
    Backend = str
    MarginSchedule = str
    Optimiser = str
    ScheduleName = str
    Control = str
    Export = str
    TableDtype = str
    TableDevice = str
    Split = str
    Side = Literal["tail", "head"]
else:

    def _literal(names: Any) -> Any:
        return Literal[tuple(names)]

    ModelName, Method, Loss = _literal(MODELS), _literal(METHODS), _literal(LOSSES)
    Corruption, Behaviour, Precision = _literal(CORRUPTIONS), _literal(BEHAVIOURS), _literal(PRECISIONS)
    Backend, MarginSchedule, Optimiser, Side = map(_literal, (BACKENDS, MARGIN_SCHEDULES, OPTIMISERS, SIDES))
    ScheduleName, Control = _literal(SCHEDULES), _literal(CONTROLS)
    SidesAsked, Order = _literal(SIDES_ASKED), _literal(ORDERS)
    Export, Split = _literal(EXPORTS), _literal(SPLITS)
    TableDtype, TableDevice = _literal(TABLE_DTYPES), _literal(TABLE_DEVICES)
