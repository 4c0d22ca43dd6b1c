"""From options to parts: the graph, the model, the generator, the margins and the optimisers that a configuration
describes.

Training builds on these, and so does whoever wants a trained model without a trainer (:func:`dhns_fast.load_run`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dhns_fast.catalogue import ROW_METHODS
from dhns_fast.data import CSRFilter, KnowledgeGraph, load
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.errors import DataError, InputError
from dhns_fast.fusion import Fusion
from dhns_fast.margins import MARGIN_SCHEDULES, TableMargins
from dhns_fast.models import MODELS, KGEModel, reciprocal
from dhns_fast.negatives import GAN, Constrained, Diffusion, Grounded, ModalitySwap, Nearest, NSCaching, Sampler
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.ambient import plain
from dhns_fast.ops.score import MAX_K
from dhns_fast.optim import HostEmbedding, LightAdagrad, LightAdam, RowEmbedding, ShardedEmbedding, optimizer_for
from dhns_fast.ranking import RankingResult, evaluate
from dhns_fast.sampler import DiffHEG
from dhns_fast.train import checkpoint, distributed, graphed, plan
from dhns_fast.train.checkpoint import of_prefix, with_prefix
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.distributed import Processes

# Of train, where the graph's own validation cannot be used.
HELD_OUT = 0.05
# Of the entities, what a device keeps of a table in host memory: those of most triples of train.
HOT = 0.05
# The name of the entity table among the weights.
ENTITIES = "model.entity.weight"


@dataclass
class Run:
    """A model and what belongs to it, freshly built or loaded from a run folder.

    Attributes:
        config: the options.
        graph: the graph, as :func:`prepare_graph` gives it.
        model: the scoring model.
        generator: the diffusion generator, or None for methods without it.
        margins: the margin schedule of the levels that count.
        folder: where the run was loaded from, or None.
        processes: those that train together.
        best_epoch, best_mrr: of the best validation, of a loaded run.
    """

    config: TrainConfig
    graph: KnowledgeGraph
    model: KGEModel
    generator: DiffHEG | None
    margins: TableMargins
    folder: Path | None = None
    best_epoch: int = 0
    best_mrr: float = -1.0
    processes: Processes = field(default_factory=Processes)

    @property
    def device(self) -> torch.device:
        return self.model.compute_device

    @property
    def precision(self) -> str | None:
        """Of scores; on a CPU they have one precision."""
        return self.config.precision if self.device.type == "cuda" else None

    def evaluate(self, split: str = "test", **options: Any) -> RankingResult:
        """:func:`dhns_fast.evaluate` of the current weights, with the run's backend and precision."""
        self.model.eval()
        with backends.preferring(self.config.backend):
            return evaluate(
                self.model, self.graph, split, group=self.processes.group, precision=self.precision, **options
            )

    def state(self) -> dict[str, Tensor]:
        """Weights of model, margins and generator that training changes; features that it does not are read with the
        graph.
        """
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        tensors = with_prefix("model", {name: x for name, x in self.model.state_dict().items() if name not in frozen})
        tensors |= with_prefix("margins", self.margins.state_dict())
        return tensors | with_prefix("generator", {} if self.generator is None else self.generator.state_dict())

    def load_weights(self, folder: Path, name: str) -> dict[str, Any]:
        """Read a checkpoint's weights from a run folder, written by one process or by several; returns its meta.

        Raises:
            DataError: it is missing, damaged, or of another graph or configuration.
        """
        graph = self.graph.fingerprint()
        if self.processes.group is None and not distributed.exists(folder, name):
            path = folder / f"{name}.safetensors"
            tensors, meta = checkpoint.load(path, graph)
            self.load_state(tensors, path)
            return meta
        tensors = {
            name: self.processes.spread(x, self.graph.num_entities) if name == ENTITIES else x
            for name, x in self.state().items()
        }
        return distributed.load(folder, name, tensors, graph, self.processes)

    def check_state(self, tensors: Mapping[str, Tensor], source: Path | str) -> None:
        """Refuse weights that :meth:`load_state` would not take.

        Raises:
            DataError: they are of another configuration, or not finite; the message names `source`.
        """
        expected = {name: (x.shape, x.dtype) for name, x in self.state().items()}
        given = {
            name: (x.shape, x.dtype)
            for name, x in tensors.items()
            if name.startswith(("model.", "margins.", "generator."))
        }
        if given != expected:
            raise DataError(source, checkpoint.UNFIT)
        if bad := [
            name for name in expected if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all())
        ]:
            raise DataError(source, f"its weights {bad[0]} are not finite")

    def load_state(self, tensors: Mapping[str, Tensor], source: Path | str) -> None:
        """Take over the weights among `tensors`, which :meth:`state` gave; errors are those of :meth:`check_state`."""
        self.check_state(tensors, source)
        self.model.load_state_dict(of_prefix("model", tensors), strict=False)
        self.margins.load_state_dict(of_prefix("margins", tensors))
        if self.generator is not None:
            self.generator.load_state_dict(of_prefix("generator", tensors))


def refuse_other_width(
    path: Path, config: TrainConfig, kg: KnowledgeGraph, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Refuse, before a model is made, weights whose entity table is another than the one that a configuration
    describes: a model of a width that nobody trained may take all memory.

    Args:
        shapes: of a checkpoint's tensors.

    Raises:
        DataError: as :meth:`Run.check_state`.
    """
    if tuple(shapes.get(ENTITIES, ())) != (kg.num_entities, config.dim):
        raise DataError(path, checkpoint.UNFIT)


@plain()
def build(config: TrainConfig, kg: KnowledgeGraph, processes: Processes | None = None, training: bool = True) -> Run:
    """Everything that is trained, with the initial weights of the configuration's seed, on its device.

    Args:
        processes: those that train together, each of which builds its part; None: this one alone.
        training: whether the run is to be trained, and must fit in memory with all that takes
            (:mod:`dhns_fast.train.plan`).

    Raises:
        InputError: train is empty, device, precision or CUDA graphs cannot be had here, or training would not fit in
            memory.
        BackendUnavailableError: the backend cannot run here.
    """
    if not len(kg.train):
        raise InputError(f"train of {kg.name}", 0, "one triple or more")
    device = pick_device(config.device)
    if config.precision == "tf32" and device.type != "cuda":
        raise InputError("precision", "tf32", f"ieee and bf16 on {device}; tf32 on a CUDA device")
    # Refused here and not by the first operator, when the run's folder exists already.
    backends.check(config.backend)
    if training:
        # Reading a graph takes several times what it is, which the C library keeps: the table would come on top of it.
        memory.release()
        plan.refuse_unless_it_fits(config, kg, device, 1 if processes is None else processes.count)
    with Drawing(torch.Generator().manual_seed(config.seed)):
        model = build_model(config, kg, device, processes).to(device)
        generator = build_generator(config, model).to(device).train(training) if config.recipe.generator else None
    run = Run(config, kg, model, generator, build_margins(config).to(device), processes=processes or Processes())
    if training:
        graphed.resolve(run)  # refused here too, and not when the run's folder exists already
    return run


def refuses_the_machine(error: InputError) -> bool:
    """Whether it is about the device or the environment that a run is read on, and about nothing in its files."""
    return error.argument == "device" or error.argument.startswith("DHNS_FAST_")


class Drawing(TorchDispatchMode):
    """Within it, what this thread draws without naming a generator comes from `generator`.

    Layers draw their initial weights from the process-wide generator, which other threads may draw from at the same
    time.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's question whether to guard the method below against tracing: `dhns_fast.optim.dense` says what that
        costs.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:
            if not _takes_generator(func):
                func = getattr(func.overloadpacket, "generator", func)
            if _takes_generator(func):
                kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


def _takes_generator(operator: Any) -> bool:
    return any(argument.name == "generator" for argument in operator._schema.arguments)


@plain()
def prepare_graph(config: TrainConfig) -> tuple[KnowledgeGraph, list[str]]:
    """Load the graph of a run, hold out validation where the options or the state of the graph ask for it, and say what
    was found.

    Returns:
        the graph and sentences for the user.
    """
    named = config.features.split(",") if isinstance(config.features, str) else config.features
    chosen = {"all": None, "none": []}.get(",".join(named), [name.strip() for name in named])
    kg = load(config.data, features=chosen)
    notes = [*kg.notes, *kg.report.lines()]
    share = config.validation_from_train
    if share is None and kg.report.contaminated_validation:
        share = HELD_OUT
        notes.append(
            f"Validation: {share:.0%} of train held out (seed {config.seed}) in place of the graph's own; --validation-from-train decides."
        )
    elif share:
        notes.append(
            f"Validation: {share:.1%} of train held out (seed {config.seed}) in place of the graph's own, as asked."
        )
    return (kg.hold_out_validation(share, config.seed) if share else kg), notes


def build_model(
    config: TrainConfig, kg: KnowledgeGraph, device: torch.device | str = "cpu", processes: Processes | None = None
) -> KGEModel:
    """The scoring model of a configuration, with fusion where the graph has features, to be moved to `device`."""
    fusion = None
    if kg.features:
        fusion = Fusion(
            kg.features, config.dim, present=kg.present, train_features=config.trains_features, attend=config.fused
        )
    options: dict[str, Any] = {"p": config.norm} if config.model == "transe" else {}
    entity = build_table(config, kg, torch.device(device), processes or Processes())
    kind = MODELS[config.model]
    model = (reciprocal(kind) if config.reciprocal else kind)(
        kg.num_entities, kg.num_relations, config.dim, config.margin, config.epsilon, fusion, entity=entity, **options
    )
    if entity is not None:
        # Of its own stream: drawn block by block, a part of the table is what the whole one would be there.
        entity.uniform_(model.entity_range, torch.Generator().manual_seed(config.seed))
    return model


def build_table(
    config: TrainConfig, kg: KnowledgeGraph, device: torch.device, processes: Processes
) -> RowEmbedding | None:
    """The entity table of a row-wise optimiser, without values; None for dense Adam, which trains an `nn.Embedding`.

    Raises:
        InputError: the table cannot be both in host memory and split over processes, or is to be split with a dense
            optimiser.
    """
    E, D = kg.num_entities, config.dim
    if config.dense(E):
        if processes.count > 1:
            raise InputError(
                "optimiser",
                config.optimiser,
                f"{', '.join(ROW_METHODS)} on several processes, which split the table by rows",
            )
        return None
    if config.l2 and not config.weighted_penalty:
        raise InputError(
            "l2", config.l2, "0 with row-wise optimisers, which have no gradient of whole tables, or weighted_penalty"
        )
    dtype = getattr(torch, config.table_dtype)
    if config.table_device == "host":
        if processes.group is not None:
            raise InputError("table_device", "host", "device on several processes, which split the table by rows")
        hot = torch.cat([kg.train[:, 0], kg.train[:, 2]]).bincount(minlength=E).topk(int(HOT * E)).indices
        return HostEmbedding(E, D, device, hot.sort().values, weight=torch.empty(E, D, dtype=dtype))
    if processes.group is None:
        return RowEmbedding(E, D, weight=memory.zeros((E, D), dtype))
    return ShardedEmbedding(E, D, processes.group, dtype)


def build_generator(config: TrainConfig, model: KGEModel, levels: Sequence[float] | None = None) -> DiffHEG:
    """The generator that goes with a model; it samples the levels of positive weight only, unless `levels` says
    otherwise.
    """
    return DiffHEG(
        config.dim,
        config.diffusion_steps,
        model.relation_dim,
        model.margin,
        model.epsilon,
        condition=model.condition,
        behaviour=config.behaviour,
        levels=config.active_levels if levels is None else levels,
        precision=config.precision,
        schedule=config.schedule,
        sampling_steps=config.sampling_steps,
        modalities=1 if model.fusion is None else len(model.fusion.names),
    )


def build_margins(config: TrainConfig) -> TableMargins:
    """The margin schedule of a configuration: factors of γ for the levels of positive weight."""
    noise = Schedule.of(config.noise_schedule, config.diffusion_steps)
    levels = [int(x) for x in noise.levels(config.level_list)]
    made = MARGIN_SCHEDULES[config.margin_schedule]
    return made(levels, config.level_margins, config.level_weights, config.diffusion_steps, config.noise_schedule)


def build_sampler(run: Run, known: CSRFilter) -> Sampler | None:
    """What makes the negatives of a run's method, or None where those are uniform corruptions."""
    config, recipe = run.config, run.config.recipe
    hard = config.hard_negatives
    if not recipe.sampler:
        return None
    if recipe.generator:
        assert run.generator is not None
        made: Sampler = {"Diffusion": Diffusion, "Grounded": Grounded}[recipe.sampler](known, run.model, run.generator)
    elif recipe.sampler == "Constrained":
        made = Constrained(known, config.num_negatives)
    elif recipe.sampler == "NSCaching":
        made = NSCaching(known, run.model, config.num_negatives, config.num_negatives, config.num_negatives)
    elif recipe.sampler == "Nearest":
        made = Nearest(known, run.model, hard, min(config.pool, known.num_entities, MAX_K))
    elif recipe.sampler == "ModalitySwap":
        made = ModalitySwap(known, run.model, hard)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            made = GAN(known, hard, dim=config.dim, learning_rate=config.generator_learning_rate)
    return made.to(run.device)


def build_optimisers(run: Run) -> tuple[Optimizer, Optimizer | None]:
    """The optimisers of model and margins, and of the generator where there is one."""
    config, table = run.config, run.model.entity
    learned = [p for p in (*run.model.parameters(), *run.margins.parameters()) if p.requires_grad]
    if isinstance(table, RowEmbedding):
        others = [p for p in learned if p is not table.weight]
        name = config.optimiser_for(run.graph.num_entities)
        n3 = 0.0 if config.weighted_penalty else config.n3_weight
        optimiser = optimizer_for(name, [table], others, config.learning_rate, n3, config.seed)
    elif config.optimiser == "adagrad":
        optimiser = LightAdagrad(learned, lr=config.learning_rate, fused=True)
    else:
        optimiser = _adam(learned, config.learning_rate)
    if run.generator is None:
        return optimiser, None
    return optimiser, _adam((p for p in run.generator.parameters() if p.requires_grad), config.generator_learning_rate)


def _adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    # Fused, one pass over a table: at D 1024 a tenth of the time of torch's loop on a CPU.
    return LightAdam(parameters, lr=learning_rate, fused=True)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Raises:
        InputError: there is no such device here.
    """
    local = os.environ.get("LOCAL_RANK")
    if name in ("auto", "cuda") and local is not None and torch.cuda.is_available():
        # Started by a launcher: a device for each process.
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Torch itself knows more kinds, and lists them all.
        if re.fullmatch(r"(cpu|cuda)(:\d+)?", name) is None:
            raise RuntimeError("a device of another kind")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        accepted = ", ".join(["auto", "cpu", *(["cuda", *here] if here else [])])
        raise InputError("device", name, f"{accepted} ({str(error).splitlines()[0]})") from None
    return device
