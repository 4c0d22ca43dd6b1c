"""The training loop of DHNS and of its rivals: corruptions, generator step, generated negatives, one backward,
validation, checkpoints.

One step (Niu & Zhang, DASFAA 2025, algorithm 1): score positives and corruptions; update the generator on the diffusion
loss; sample with the updated generator; add the hardness-adaptive loss; one backward; update the model.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast import checks, files
from dhns_fast.catalogue import SIDES, SPLITS, Side
from dhns_fast.data import KnowledgeGraph, NegativeSampler
from dhns_fast.data.order import EpochOrder
from dhns_fast.errors import DataError, DhnsError, InputError, NotFiniteError, Shown
from dhns_fast.loss import corruption_loss, hal_from_embeddings
from dhns_fast.models import Dropout
from dhns_fast.negatives import Diffusion, Grounded, controls
from dhns_fast.negatives.base import candidate_scores
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.ambient import plain
from dhns_fast.ops.power import power_sum
from dhns_fast.ops.rows import distinct
from dhns_fast.optim import RowEmbedding, row_optimizer
from dhns_fast.ranking import RankingResult
from dhns_fast.scoring import one_vs_all_loss
from dhns_fast.train import checkpoint, distributed, graphed
from dhns_fast.train.assemble import ENTITIES, Run, build, build_optimisers, build_sampler
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.loggers import Logger
from dhns_fast.train.progress import shown

# In the order in which a step computes them: where several are not finite, the first is the cause.
TERMS = ("kgc", "n3", "l2", "diffusion", "hal")
# Beyond them features are named as what may make a run diverge; those of encoders are below 100.
LARGE_FEATURES = 1e4
# Steps between looks at the loss on a device where looking stalls the stream.
LOOK_EVERY = 50
# What of a checkpoint's tensors several processes divide by rows: the entity table and what its optimiser, the first,
# keeps of it.
DIVIDED = (ENTITIES, "optimizer.0.first", "optimizer.0.second")
# Whose negatives several processes draw alike.
TOGETHER = ("uniform", "self-adversarial", "dhns")
# Of :meth:`dhns_fast.sampler.DiffHEG.scales`, for all of a batch.
Scales = tuple[Tensor, Tensor] | None


class Diverged(DhnsError, RuntimeError):
    """The loss is no longer finite; the message names the step and the term."""


class Interrupted(DhnsError):
    """Training was asked to stop; `path` is the checkpoint that continues it, or None when no folder was given."""

    def __init__(self, step: int, path: Path | None) -> None:
        self.path = path
        super().__init__(
            f"interrupted after step {step}" + (f", saved {path}" if path else ", nothing saved (no output folder)")
        )


@functools.lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> EpochOrder:
    """The same object for every step of an epoch: it keeps the places it has computed."""
    return EpochOrder(n, seed, epoch)


@dataclass
class Epoch:
    """What is reported of an epoch: mean loss terms, seconds, and metrics where it ended with a validation."""

    epoch: int
    seconds: float
    losses: dict[str, float]
    valid: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            **{f"loss_{k}": v for k, v in self.losses.items()},
            **self.valid,
        }


@dataclass
class Progress:
    """Where a run stands; everything a checkpoint keeps beside tensors.

    Attributes:
        rate: by what plateaus have multiplied the learning rate.
        plateau_mrr, plateau_stale: the best MRR that plateaus know, and validations since.
        seconds: of training so far, all its parts together.
    """

    epoch: int = 0
    step_of_epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_mrr: float = -1.0
    stale: int = 0
    rate: float = 1.0
    plateau_mrr: float = -1.0
    plateau_stale: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains one model on one graph.

    Args:
        config: every option of the run.
        kg: the graph, as :func:`prepare_graph` returns it.
        folder: where checkpoints go (`best.safetensors`, `last.safetensors`); None keeps everything in memory.
        built: what :func:`dhns_fast.train.assemble.build` made of the two, or parts of your own; None builds them.

    Attributes:
        model: the scoring model; after :meth:`fit` with the weights of the best validation.
        generator: the diffusion generator, or None for methods without it.
        margins: the margin schedule of the levels that count.
        progress: epochs done, best validation and history.
        stop_requested: set it to end :meth:`fit` after the step in flight.
        fitted: whether :meth:`fit` has come to its end.
        loggers: told of every epoch.

    Raises:
        InputError: train is empty, device or precision cannot be used here, or a CUDA graph is asked for and cannot be.
        BackendUnavailableError: the backend cannot run here.
    """

    @plain()
    def __init__(
        self, config: TrainConfig, kg: KnowledgeGraph, folder: Path | None = None, built: Run | None = None
    ) -> None:
        self.config, self.kg, self.folder = config, kg, folder
        self.built = build(config, kg) if built is None else built
        self.model, self.generator, self.margins = self.built.model, self.built.generator, self.built.margins
        self.device, self.processes = self.built.device, self.built.processes
        if self.processes.count > 1:
            checks.one_of("method", config.method, TOGETHER)
            checks.one_of("control", config.control, ("none", "positive-only"))
        # Whether the entity table gives, and its optimiser takes, the rows of a step.
        self.rows = isinstance(self.model.entity, RowEmbedding)
        self.optimizer, self.generator_optimizer = build_optimisers(self.built)
        self.progress = Progress()
        self.stop_requested = self.fitted = False
        self.loggers: list[Logger] = []
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.dropout: Dropout | None = None
        if config.dropout or config.relation_dropout:
            if self.processes.count > 1:
                raise InputError("dropout", max(config.dropout, config.relation_dropout), "0 on several processes")
            self.dropout = Dropout(config.dropout, config.relation_dropout, self.rng)
        self.train = kg.train.to(self.device)
        known = kg.known().to(self.device)
        self.negatives = NegativeSampler(
            known,
            kg.num_entities,
            config.num_negatives,
            "bernoulli" if config.corruption == "bernoulli" else "uniform",
            config.filtered,
        )
        self.sampler = build_sampler(self.built, known)
        self.batch_size = min(config.batch_size, len(kg.train))
        if self.batch_size < self.processes.count:
            raise InputError(
                "batch_size", self.batch_size, f"one triple or more for each of {self.processes.count} processes"
            )
        self.steps_per_epoch = len(kg.train) // self.batch_size
        self.temperature = config.temperature if config.recipe.weighted else 0.0
        self.level_weights = torch.tensor([w for w in config.level_weights if w > 0], device=self.device)
        self._best: dict[str, Tensor] | None = None
        # Since when time counts as training, None outside of `fit`; and when a checkpoint was last written.
        self._counted: float | None = None
        self._saved = 0.0
        self._sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        # What the filter was sorted in, too, would be kept for as long as this runs.
        memory.release()
        self._bad = torch.full((len(TERMS),), -1, device=self.device)
        # Of the step in flight, where the device reads it.
        self._number = torch.zeros((), dtype=torch.int64, device=self.device)
        self._graphed = self._make_graphed() if graphed.resolve(self.built) else None

    @plain()
    def fit(
        self,
        on_step: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        show: bool = True,
    ) -> Progress:
        """Train to the last epoch or until validation stops improving, then load the best weights into the model.

        Args:
            on_step: called after every step.
            on_epoch: called after every epoch.
            show: progress on stderr, where neither of the callbacks is given.

        Raises:
            Diverged: a loss term is no longer finite.
            Interrupted: `stop_requested` was set; a checkpoint was written if there is a folder.
            InputError: another process writes to the folder.
        """
        if show and on_step is None and on_epoch is None:
            with shown(self) as callbacks:
                return self.fit(*callbacks)
        with files.owned(self.folder) if self.folder is not None and self.processes.first else contextlib.nullcontext():
            self._counted = self._saved = time.monotonic()
            try:
                return self._fit(on_step, on_epoch)
            finally:
                self._counted = None

    def _fit(self, on_step: Callable[[Progress], None] | None, on_epoch: Callable[[Epoch], None] | None) -> Progress:
        config, progress = self.config, self.progress
        while progress.epoch < config.epochs and not (config.patience and progress.stale >= config.patience):
            begin = time.perf_counter()
            self.model.train()
            while progress.step_of_epoch < self.steps_per_epoch:
                self.step()
                progress.step_of_epoch += 1
                if on_step is not None:
                    on_step(progress)
                if self._stops():
                    raise Interrupted(progress.step, self.save())
                if self._due():
                    self.save()
            self._refuse_bad()
            losses = dict(zip(TERMS, (self._sums / self.steps_per_epoch).tolist(), strict=True))
            self._sums.zero_()
            progress.epoch, progress.step_of_epoch = progress.epoch + 1, 0
            epoch = Epoch(progress.epoch, time.perf_counter() - begin, losses)
            if len(self.kg.valid) and (progress.epoch % config.validate_every == 0 or progress.epoch == config.epochs):
                epoch.valid = self._validate()
            progress.history.append(epoch.row())
            if on_epoch is not None:
                on_epoch(epoch)
            for logger in self.loggers:
                logger.log(epoch.epoch, epoch.row())
            if epoch.valid:
                self.save()
        if progress.best_mrr < 0:
            # Without a validation there is nothing to choose by: the last weights are the result.
            progress.best_epoch = progress.epoch
            self._keep_best()
        self.save()
        if self._best is None:
            self.load_best()
        else:
            self.built.load_state(self._best, "best weights")
        self.fitted = True
        return progress

    @plain()
    def step(self) -> dict[str, Tensor]:
        """One training step; returns the loss terms (detached scalars on the device)."""
        with backends.preferring(self.config.backend):
            return self._step()

    def _step(self) -> dict[str, Tensor]:
        config, number = self.config, self.progress.step
        if config.decay_after is not None or config.plateau_factor is not None:
            late = (
                config.decay_after is not None and number >= config.decay_after * config.epochs * self.steps_per_epoch
            )
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * self.progress.rate * (0.1 if late else 1.0)
        self._number.fill_(number)
        body = functools.partial(self._body, number)
        if self._graphed is not None:
            # What a step takes for a constant: whether its number is even, and the learning rates.
            kind = number % 2, tuple(group["lr"] for group in self.optimizer.param_groups)
            try:
                done = self._graphed.run(kind, body)
            except graphed.RecordingFailed as error:
                done = self._without_graph(error, body)
        else:
            done = body()
        self.progress.step = number + 1
        self._look()
        return done

    def _body(self, number: int) -> dict[str, Tensor]:
        """What step `number` launches on the device; of the number it may read whether it is even."""
        config = self.config
        batch = self._positives(number)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        asked = self._asked(batch, number)
        with self._naming("kgc", terms), self._at_once(asked):
            terms["kgc"] = self._kgc(asked)
        terms |= self._penalties(asked)
        if config.recipe.beside:
            self._beside(batch, number, terms)
        # The diffusion loss has done its backward already, in the generator's step.
        torch.stack([loss for name, loss in terms.items() if name != "diffusion"]).sum().backward()
        self.processes.sum_gradients(self._whole)
        self.optimizer.step()
        done = {name: loss.detach() for name, loss in terms.items()}
        self._account(done)
        return done

    @property
    def cuda_graph(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self._graphed is not None

    def _make_graphed(self) -> graphed.GraphedStep:
        optimizers = [optimizer for _, optimizer in self._optimizers()]
        return graphed.GraphedStep(graphed.CudaRecorder(self.device, self.rng, optimizers))

    def _without_graph(self, error: graphed.RecordingFailed, body: graphed.Body) -> dict[str, Tensor]:
        """The step whose recording has failed, and all that follow, as they are."""
        if self.config.cuda_graph:
            raise InputError("cuda_graph", Shown(f"true, but a step cannot be recorded ({error})"), "null, false")
        backends.log_once(f"a step is launched kernel by kernel and not as one CUDA graph: {error}")
        self._graphed = None
        self.rng = torch.Generator(self.device)
        self.rng.set_state(error.drawn)
        if self.dropout is not None:
            self.dropout.generator = self.rng
        return body()

    @plain()
    def validate(self, split: str = "valid") -> RankingResult:
        """Evaluate the current weights. Known answers of "valid" are those of train and valid: test has no say in which
        epoch is kept.
        """
        return self.built.evaluate(split, filter_by=("train", "valid") if split == "valid" else SPLITS)

    def save(self) -> Path | None:
        """Write `last.safetensors`, from which :meth:`restore` continues bit-identically on the CPU; None without a
        folder.

        Raises:
            Diverged: weights or the optimiser's state are no longer finite; an earlier checkpoint stays.
            WriteError: the file cannot be written; an earlier checkpoint stays.
        """
        now = self._saved = time.monotonic()
        if self._counted is not None:
            self.progress.seconds += now - self._counted
            self._counted = now
        if self.folder is None:
            return None
        tensors = self._tensors()
        self._refuse_not_finite(tensors)
        stateful = {name: checkpoint.with_state(optimizer) for name, optimizer in self._optimizers()}
        meta = {
            "progress": vars(self.progress),
            "graph": self._graph,
            "optimizers": stateful,
            "device": self.device.type,
        }
        return self._write("last", tensors, meta)

    def _due(self) -> bool:
        """Whether it is time for a checkpoint; of several processes the first one says so, now and then."""
        if self.processes.count > 1 and self.progress.step % LOOK_EVERY:
            return False
        return bool(self.processes.agree(time.monotonic() - self._saved >= 60 * self.config.checkpoint_every))

    def _tensors(self) -> dict[str, Tensor]:
        """Everything of :meth:`save` that is a tensor."""
        tensors = self.built.state()
        for name, optimizer in self._optimizers():
            tensors |= checkpoint.flatten_optimizer(name, optimizer)
        if self.sampler is not None:
            tensors |= checkpoint.with_prefix("sampler", self.sampler.state_dict())
        return tensors | {"rng": self.rng.get_state(), "sums": self._sums}

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        """With the names that they have in checkpoints."""
        of_sampler = None if self.sampler is None else self.sampler.optimizer
        every = (
            ("optimizer", self.optimizer),
            ("generator_optimizer", self.generator_optimizer),
            ("sampler_optimizer", of_sampler),
        )
        return [(name, optimizer) for name, optimizer in every if optimizer is not None]

    @functools.cached_property
    def _graph(self) -> dict[str, str]:
        return self.kg.fingerprint()

    @plain()
    def restore(self) -> None:
        """Continue from `last.safetensors` of the folder. On another kind of device random numbers begin anew, from the
        seed and the step.

        Raises:
            DataError: it is missing, damaged, of another graph or configuration, or says what cannot be; nothing is
                changed then.
        """
        if self.folder is None:
            raise InputError("folder", None, "the folder of a run, to restore from")
        if self.processes.group is not None or distributed.exists(self.folder, "last"):
            self._restore_parts()
            return
        path = self.folder / "last.safetensors"
        tensors, meta = checkpoint.load(path, self._graph)
        if "progress" not in meta:
            raise DataError(path, "holds weights only and no state of training to continue from")
        self._take(tensors, meta, path)

    def _take(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path, parts: bool = False) -> None:
        """Everything is looked at before anything is changed."""
        progress = checkpoint.record(path, Progress, meta.get("progress"))
        if progress.step_of_epoch > self.steps_per_epoch or progress.best_epoch > progress.epoch:
            raise DataError(path, f"its progress cannot be: {vars(progress) | {'history': '...'}}")
        self.built.check_state(tensors, path)
        of_sampler = checkpoint.of_prefix("sampler", tensors)
        own = {} if self.sampler is None else self.sampler.state_dict()
        if {name: (x.shape, x.dtype) for name, x in of_sampler.items()} != {
            name: (x.shape, x.dtype) for name, x in own.items()
        }:
            raise DataError(path, "the state of its sampler does not fit the method that the configuration describes")
        given = meta.get("optimizers")
        stateful = given if isinstance(given, dict) else {}
        states = [
            (optimizer, checkpoint.optimizer_state(name, optimizer, tensors, path, stateful.get(name), parts))
            for name, optimizer in self._optimizers()
        ]
        sums = tensors.get("sums", torch.empty(0))
        if sums.shape != self._sums.shape or sums.dtype != self._sums.dtype or not bool(sums.isfinite().all()):
            raise DataError(path, "its sums of losses are damaged")
        rng = torch.Generator(self.device)
        try:
            if meta.get("device") == self.device.type:
                rng.set_state(tensors["rng"])
            else:
                rng.manual_seed(self.config.seed + 1_000_003 * progress.step)
        except (KeyError, TypeError, RuntimeError):
            raise DataError(path, "the state of its random numbers is damaged") from None
        self.built.load_state(tensors, path)
        for optimizer, state in states:
            optimizer.load_state_dict(state)
        if self.sampler is not None:
            self.sampler.load_state_dict(of_sampler)
        self.rng.set_state(rng.get_state())
        self._sums.copy_(sums)
        self.progress = progress
        if self._graphed is not None:
            # The optimisers' state is in other tensors now.
            self._graphed.forget()

    def load_best(self) -> None:
        """Load `best.safetensors` of the folder, for evaluation and prediction.

        Raises:
            DataError: it is missing, damaged, or of another graph.
        """
        if self.folder is None:
            raise InputError("folder", None, "the folder of a run, to load from")
        best = checkpoint.best(self.folder, self.built.load_weights(self.folder, "best"))
        self.progress.best_epoch, self.progress.best_mrr = best.best_epoch, best.best_mrr

    def _positives(self, number: int) -> Tensor:
        """The triples `[B, 3]` of step `number`: drawn independently, with replacement, as in the release, or the next
        of the epoch's order.
        """
        if self.config.order == "shuffled":
            return self.train[self._shuffled(number) % len(self.train)]
        return self.train[torch.randint(len(self.train), (self.batch_size,), generator=self.rng, device=self.device)]

    def _shuffled(self, number: int) -> Tensor:
        """Where in train the triples of step `number` are, int64 `[B]`; of corruption mixed, n more for their heads."""
        n, mixed = len(self.train), self.config.corruption == "mixed"
        epoch, step = divmod(number, self.steps_per_epoch)
        order = _epoch_order(2 * n if mixed else n, self.config.seed, epoch // 2 if mixed else epoch)
        return order.take(n * (epoch % 2) * mixed + step * self.batch_size, self.batch_size, self.device)

    def _asked(self, batch: Tensor, number: int) -> list[tuple[Tensor, Side]]:
        """The triples `[n, 3]` of a batch and the side that is asked for: tails and heads in alternate batches, a tail
        batch first, or a side a triple, or both.
        """
        if self.config.corruption == "both":
            return [(batch, side) for side in SIDES]
        if self.config.corruption != "uniform":
            if self.config.corruption == "mixed" and self.config.order == "shuffled":
                heads = self._shuffled(number) >= len(self.train)
            else:  # uniform corruptions have a coin's sides
                heads = self.negatives.sides(batch, self.rng)
            return [(batch[mask], side) for mask, side in zip((heads, ~heads), SIDES[::-1], strict=True) if mask.any()]
        return [(batch, SIDES[number % 2])]

    def _at_once(self, asked: list[tuple[Tensor, Side]]) -> contextlib.AbstractContextManager[None]:
        """Within it corruptions' rows of a large table move while they are scored, where the rest of the step has to do
        with rows of true triples alone.
        """
        config, table, optimizer = self.config, self.model.entity, row_optimizer(self.optimizer)
        one_loss = len(asked) == 1 and not config.shared_negatives
        reads_others = config.recipe.beside and not config.recipe.embeds
        if optimizer is None or not isinstance(table, RowEmbedding) or not table.direct or not one_loss or reads_others:
            return contextlib.nullcontext()
        return optimizer.at_once(table, asked[0][0][:, ::2].flatten())

    def _kgc(self, parts: list[tuple[Tensor, Side]]) -> Tensor:
        """KGC loss: the mean over the triples of all parts."""
        if self.config.loss == "one-vs-all":
            with self._dropping():
                return self._one_vs_all(parts)
        if self.config.shared_negatives:
            parts = [(chunk, side) for part, side in parts for chunk in part.split(self.config.shared_negatives)]
        total = sum(len(part) for part, _ in parts)
        losses = []
        for part, side in parts:
            mine = self.processes.part(len(part))
            losses.append(self._kgc_of_side(part, side, mine) * ((mine.stop - mine.start) / total))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _one_vs_all(self, parts: Sequence[tuple[Tensor, Side]]) -> Tensor:
        """Mean over the queries of some sides of cross-entropies against all entities."""
        model, precision = self.model, self.built.precision
        table = model.table()
        candidates = model.dropped(table)
        asked: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        for part, side in parts:
            h, r, t = part.unbind(1)
            known, answer = (h, t) if side == "tail" else (t, h)
            query, scale = model.compose(model.dropped(F.embedding(known, table)), r, side)
            asked.append((query, scale, answer, model.view(candidates, side)))
        queries, scales, answers, views = zip(*asked, strict=True)
        if all(view is views[0] for view in views) and all(scale is None for scale in scales):
            # Against one table all sides are one product, with one gradient of the table.
            queries, scales, answers, views = (torch.cat(queries),), (None,), (torch.cat(answers),), views[:1]
        total = sum(map(len, queries))
        losses = [
            one_vs_all_loss(query, view, answer, model.reduction, scale=scale, precision=precision)
            * (len(query) / total)
            for query, scale, answer, view in zip(queries, scales, answers, views, strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _penalties(self, asked: Sequence[tuple[Tensor, Side]]) -> dict[str, Tensor]:
        """n3 and l2, of tables or of the rows of the step's queries."""
        config, model = self.config, self.model
        out = {}
        for name, weight, exponent in (("n3", config.n3_weight, 3), ("l2", config.l2, 2)):
            if weight and config.weighted_penalty:
                rows = []
                for part, side in asked:
                    h, r, t = part[self.processes.part(len(part))].unbind(1)
                    rows += [model.entity(torch.cat((h, t))), model.relation(model.asked_with(r, side))]
                total = sum(len(part) for part, _ in asked)
                out[name] = weight / total * torch.stack([model.powers(x, exponent) for x in rows]).sum()
            elif weight:
                norm = power_sum(model.relation.weight, exponent)
                # That of the rows that a step touches is the business of their optimiser.
                if not self.rows:
                    norm = power_sum(model.entity.weight, exponent) + norm
                out[name] = weight / self.processes.count * norm
        return out

    def _kgc_of_side(self, batch: Tensor, side: Side, mine: slice) -> Tensor:
        """The mean loss of this process's share of a batch, whose draws are those of all of it."""
        h, r, t = batch.unbind(1)
        exclude = None
        if self.config.shared_negatives:
            corrupt, exclude = self.negatives.shared(batch, side, self.rng, mine)
        elif self.sampler is not None and not self.config.recipe.beside:
            corrupt = self.sampler.sample(h, r, t, side, self.rng)
        else:
            corrupt = self.negatives.corrupt(batch, side, self.rng, mine)
        with self._dropping():
            return self._against(batch[mine], side, corrupt, self.temperature, exclude)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Within it the model has dropout, if the options ask for it."""
        self.model.dropout = self.dropout
        try:
            yield
        finally:
            self.model.dropout = None

    def _against(
        self, batch: Tensor, side: Side, corrupt: Tensor, temperature: float, exclude: Tensor | None = None
    ) -> Tensor:
        """The loss of true triples `[B, 3]` against corruptions by id, `[B, N]` or `[N]` for all."""
        h, r, t = batch.unbind(1)
        known, answer = (h, t) if side == "tail" else (t, h)
        model = self.model
        options = (model.reduction, model.offset, temperature)
        if self.rows:
            # The queries' rows are looked up by themselves: taken out of the others' they would have a gradient as
            # large as those.
            query, scale = model.compose(model.dropped(model.embed(known)), r, side)
            if len(h) and model.dropout is None and model.as_stored(side):
                # One process has the whole table, and scores its rows where they lie.
                assert isinstance(model.entity, RowEmbedding)
                return corruption_loss(query, model.entity, answer, corrupt, *options, scale=scale, exclude=exclude)
            unique, inverse = torch.cat([answer, corrupt.flatten()]).unique(return_inverse=True)
            table = model.view(model.dropped(model.embed(unique)), side)
            if not len(h):  # a share of nothing, which looks up all the same, as the other processes wait for it
                return table.sum() + query.sum()
            answer, corrupt = inverse[: len(h)], inverse[len(h) :].view_as(corrupt)
            return corruption_loss(query, table, answer, corrupt, *options, scale=scale, exclude=exclude)
        if corrupt.numel() + 2 * len(batch) >= model.num_entities:
            table = model.table()
        else:
            # Fewer rows than entities: fuse and normalise the distinct ones only.
            unique, inverse = distinct(torch.cat([known, answer, corrupt.flatten()]))
            table = model.embed(unique)
            known, answer, corrupt = (
                inverse[: len(h)],
                inverse[len(h) : 2 * len(h)],
                inverse[2 * len(h) :].view_as(corrupt),
            )
        query, scale = model.compose(model.dropped(F.embedding(known, table)), r, side)
        table = model.view(model.dropped(table), side)
        return corruption_loss(query, table, answer, corrupt, *options, scale=scale, exclude=exclude)

    def _beside(self, batch: Tensor, number: int, terms: dict[str, Tensor]) -> None:
        """The loss of the negatives beside uniform corruptions, or of the control in their place."""
        config = self.config
        # This process's rows of the batch, and what they are of all.
        mine = self.processes.part(len(batch))
        whole, batch = batch, batch[mine]
        share = len(batch) / len(whole)
        if config.control == "positive-only":
            weight = self.level_weights if config.recipe.generator and config.recipe.embeds else torch.ones(1)
            terms["hal"] = share * controls.positive_only(self.model.score_hrt(batch), weight, config.mu)
            return
        h, r, t = batch.unbind(1)
        parts: tuple[Tensor, ...] = ()
        scales = None
        if config.recipe.conditioned:
            parts = self.model.modalities(h), self.model.relation(r), self.model.modalities(t)
        if self.generator is not None:
            if config.behaviour == "normalised":
                head, relation, tail = parts
                # The mean of no rows is NaN.
                scales = self.generator.scales(
                    head, relation, tail, lambda x: self.processes.sum(share * x if share else torch.zeros_like(x))
                )
            self._train_generator(whole, mine, parts, scales, terms)
        with self._naming("hal", terms):
            loss = (
                self._embedded(batch, mine, parts, scales)
                if config.recipe.embeds
                else self._hard(batch, SIDES[number % 2], parts, scales)
            )
            terms["hal"] = share * loss

    def _train_generator(
        self, whole: Tensor, mine: slice, parts: tuple[Tensor, ...], scales: Scales, terms: dict[str, Tensor]
    ) -> None:
        """The generator's update, on heads and tails [M, B, D] and relations [B, dim_r] of this process's rows of a
        batch of these scales.
        """
        config, model, generator, optimizer = self.config, self.model, self.generator, self.generator_optimizer
        assert generator is not None
        assert optimizer is not None
        h, _, t = whole[mine].unbind(1)
        both = None if model.fusion is None else model.fusion.mask(h) & model.fusion.mask(t)
        drawn: dict[str, Any] = {"generator": self.rng}
        with self._naming("diffusion", terms):
            for _ in range(config.generator_steps):
                optimizer.zero_grad(set_to_none=True)
                if self.processes.count > 1:
                    drawn = self._diffusion_draws(whole, mine, parts[0])
                terms["diffusion"] = generator(*parts, present=both, scales=scales, **drawn)
                # Under "release" this reaches the embeddings too, and the graph is used again by the losses that
                # follow.
                terms["diffusion"].backward(retain_graph=config.behaviour == "release")
                self.processes.sum_gradients(generator.parameters())
                optimizer.step()

    def _diffusion_draws(self, whole: Tensor, mine: slice, head: Tensor) -> dict[str, Tensor]:
        """What the generator's loss draws for all of a batch, this process's share of it, and what all of its rows are
        divided by.
        """
        assert self.generator is not None
        fusion, (M, _, D), B = self.model.fusion, head.shape, len(whole)
        timesteps = torch.randint(1, self.generator.T + 1, (M, B), generator=self.rng, device=self.device)
        noise = torch.randn((M, B, D), generator=self.rng, device=self.device, dtype=head.dtype)
        if fusion is None:
            count = torch.full((M,), B, device=self.device)
        else:
            count = (fusion.mask(whole[:, 0]) & fusion.mask(whole[:, 2])).sum(1)
        return {"timesteps": timesteps[:, mine], "noise": noise[:, mine], "count": count}

    def _embedded(self, batch: Tensor, mine: slice, parts: tuple[Tensor, ...], scales: Scales) -> Tensor:
        """The hardness-adaptive loss on negatives that are embeddings."""
        config, model, sampler = self.config, self.model, self.sampler
        assert sampler is not None
        h, r, t = batch.unbind(1)
        head, relation, tail = parts
        if isinstance(sampler, Diffusion):
            made = sampler.generate_from(head, relation, tail, self.rng, mine.start, scales)
        else:
            made = sampler.generate(h, r, t, self.rng)
        heads, tails = self._controlled(made)
        attention = None if model.fusion is None else model.fusion.attention
        levels = config.recipe.generator
        return hal_from_embeddings(
            model.condition,
            head if attention is not None else head[0],
            model.hal_relation(relation),
            tail if attention is not None else tail[0],
            heads,
            tails,
            # Factors of γ; product models have no margin in their score, hence none here, nor have negatives without
            # levels.
            margin=self.margins() * model.offset if levels else [0.0] * len(heads),
            weight=self.level_weights if levels else [1.0] * len(heads),
            mu=config.mu,
            gamma=model.offset,
            attention=attention,
            present=(model.fusion.mask(h), model.fusion.mask(t))
            if model.fusion is not None and attention is not None
            else None,
            **model.hal_options(),
        )

    def _hard(self, batch: Tensor, side: Side, parts: tuple[Tensor, ...], scales: Scales) -> Tensor:
        """μ times the loss of true triples against negatives by id, each of equal weight."""
        config, sampler = self.config, self.sampler
        assert sampler is not None
        h, r, t = batch.unbind(1)
        if isinstance(sampler, Grounded):
            head, relation, tail = parts
            made = self._controlled(sampler.generate_from(head, relation, tail, self.rng, 0, scales))
            ids = sampler.ground(made[side == "tail"], h, r, t, side, self.rng)
        else:
            ids = sampler.sample(h, r, t, side, self.rng)
            if sampler.learns:
                sampler.update(ids, candidate_scores(self.model, h, r, t, ids, side))
            if config.control == "shuffled":
                ids = controls.shuffled(ids, 0, self.rng)
        with self._dropping():
            return config.mu * self._against(batch, side, ids, 0.0)

    def _controlled(self, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Generated heads and tails [L, M, B, D], or what the control puts in their place."""
        if self.config.control == "gaussian":
            return controls.gaussian(made[0], self.rng), controls.gaussian(made[1], self.rng)
        if self.config.control == "shuffled":
            return controls.shuffled(made[0], 2, self.rng), controls.shuffled(made[1], 2, self.rng)
        return made

    @contextlib.contextmanager
    def _naming(self, term: str, terms: Mapping[str, Tensor]) -> Iterator[None]:
        """Losses refuse what is not finite; in training that is divergence, of this step and of the first term that is
        not.
        """
        try:
            yield
        except NotFiniteError as error:
            term = next((name for name in TERMS if name in terms and not terms[name].isfinite()), term)
            raise Diverged(
                f"{self._where(self.progress.step)}: term {term!r} is not finite ({error}); {self._advice()}"
            ) from error

    def _where(self, step: int) -> str:
        return f"step {step + 1} (epoch {step // self.steps_per_epoch + 1})"

    def _advice(self) -> str:
        advice = "a smaller --learning-rate, --generator-learning-rate or --margin usually helps"
        for name, x in self.kg.features.items():
            # Without a copy of them: a run that failed may have no memory for one.
            if x.numel() and (largest := max(-x.min().item(), x.max().item())) > LARGE_FEATURES:
                return f"{advice}, and numbers of order 1 in features {name!r}, which go up to {largest:.3g}"
        return advice

    def _account(self, terms: dict[str, Tensor]) -> None:
        """Add to the epoch's sums and note the first step at which a term was not finite, on the device."""
        zero = self._sums.new_zeros(())
        values = self.processes.sum(torch.stack([terms.get(name, zero).double() for name in TERMS]))
        self._sums += values
        self._bad.copy_(torch.where((self._bad < 0) & ~values.isfinite(), self._number, self._bad))

    def _look(self) -> None:
        """Look for terms that are not finite, where that costs nothing or has been put off long enough."""
        if self.device.type == "cpu" or self.progress.step % LOOK_EVERY == 0:
            self._refuse_bad()

    def _refuse_bad(self) -> None:
        bad = {name: step for name, step in zip(TERMS, self._bad.tolist(), strict=True) if step >= 0}
        if bad:
            name = min(bad, key=lambda term: bad[term])
            raise Diverged(f"{self._where(bad[name])}: term {name!r} is not finite; {self._advice()}")

    def _refuse_not_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """The last step of an epoch can spoil weights that no loss has seen yet. (Of several processes all would have
        to see it.)
        """
        for name, x in tensors.items() if self.processes.count == 1 else ():
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise Diverged(f"{self._where(self.progress.step - 1)}: {name} is no longer finite; {self._advice()}")

    def _validate(self) -> dict[str, float]:
        result = self.validate()
        config, progress = self.config, self.progress
        if config.plateau_factor is not None:
            if result["mrr"] > progress.plateau_mrr * (1 + config.plateau_threshold) or progress.plateau_mrr < 0:
                progress.plateau_mrr, progress.plateau_stale = result["mrr"], 0
            else:
                progress.plateau_stale += 1
            if progress.plateau_stale > config.plateau_patience:
                progress.rate, progress.plateau_stale = progress.rate * config.plateau_factor, 0
        if result["mrr"] > progress.best_mrr:
            progress.best_mrr, progress.best_epoch, progress.stale = result["mrr"], progress.epoch, 0
            self._keep_best()
        else:
            progress.stale += 1
        return {"valid_mrr": result["mrr"], "valid_hits@1": result["hits@1"], "valid_hits@10": result["hits@10"]}

    def _keep_best(self) -> None:
        self._refuse_not_finite(self.built.state())
        if self.folder is None:
            self._best = {name: x.detach().clone() for name, x in self.built.state().items()}
        else:
            # In the file alone: a copy in memory would be as large as the table.
            meta = {"best_epoch": self.progress.best_epoch, "best_mrr": self.progress.best_mrr, "graph": self._graph}
            self._write("best", self.built.state(), meta)

    def _write(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """A checkpoint of this process, or of all of them together."""
        assert self.folder is not None
        if self.processes.group is not None:
            return distributed.save(self.folder, name, self._spread(tensors), meta, self.processes)
        path = self.folder / f"{name}.safetensors"
        checkpoint.save(path, tensors, meta)
        return path

    def _spread(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a state is divided by rows, as the distributed tensors that it is a part of."""
        return {
            name: self.processes.spread(x, self.kg.num_entities) if name in DIVIDED else x
            for name, x in tensors.items()
        }

    def _restore_parts(self) -> None:
        """Continue from what several processes have written, however many."""
        assert self.folder is not None
        for optimizer in filter(None, (self.optimizer, self.generator_optimizer)):
            distributed.begin(optimizer)
        tensors = self._tensors()
        meta = distributed.load(self.folder, "last", self._spread(tensors), self._graph, self.processes)
        self._take(tensors, meta, self.folder / "last.json", parts=True)

    @property
    def _whole(self) -> Iterator[nn.Parameter]:
        """What every process has all of, and hence an equal gradient."""
        yield from (
            p
            for p in (*self.model.parameters(), *self.margins.parameters())
            if not (self.rows and p is self.model.entity.weight)
        )

    def _stops(self) -> bool:
        """Whether a process was asked to stop; several agree on it now and then."""
        if self.processes.count == 1:
            return self.stop_requested
        if self.progress.step % LOOK_EVERY:
            return False
        return bool(self.processes.sum(torch.tensor(float(self.stop_requested), device=self.device)))
