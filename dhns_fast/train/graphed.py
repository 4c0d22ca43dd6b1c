"""A training step as one CUDA graph: its several hundred launches become one, and the GPU no longer waits for Python.

A graph is what a step launched once, with every address and every number as it was then. So it holds for steps of one
kind (the side that is corrupted, the learning rate), reads what changes from step to step from tensors that stay where
they are (weights, the optimisers' state, the registered generator, the number of the step), and may not ask the device
for anything: no shape that depends on values, no number brought to the host.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import denoise
from dhns_fast.optim import HostEmbedding, RowEmbedding

if TYPE_CHECKING:
    from dhns_fast.train.assemble import Run

# Steps of a kind that run as they are before one is recorded: they compile kernels, make the optimisers' state and what
# libraries make on first use, none of which can happen in a graph.
WARM_UP = 2
Terms = dict[str, Tensor]
Body = Callable[[], Terms]


def why_not(run: Run) -> Iterator[str]:
    """The reasons why the steps of a run cannot be a CUDA graph."""
    config, model = run.config, run.model
    if run.device.type != "cuda":
        yield f"the device is {run.device}"
    if run.processes.group is not None:
        yield "several processes train together"
    if isinstance(model.entity, HostEmbedding):
        yield "the entity table is in host memory"
    elif isinstance(model.entity, RowEmbedding):
        yield f"optimiser {config.optimiser_for(run.graph.num_entities)} has another number of rows in every step"
    elif config.optimiser_for(run.graph.num_entities) != "adam":
        yield f"optimiser {config.optimiser} counts its steps on the host"
    if model.fusion is not None and model.fusion.on_host:
        yield f"features of {', '.join(model.fusion.on_host)} stay in host memory"
    if config.corruption in ("bernoulli", "mixed"):
        yield f"corruption {config.corruption} divides every batch in another way"
    if config.order == "shuffled":
        yield "order shuffled has other triples for the number of every step"
    if config.recipe.sampler not in ("", "Diffusion"):
        yield f"method {config.method} looks for its negatives in every step"
    if config.model == "rescal":
        yield "rescal multiplies by the distinct relations of a batch"
    if config.recipe.embeds and config.control != "positive-only" and run.device.type == "cuda":
        reason = "it was asked for" if backends.wanted(config.backend) == "eager" else backends.CUDA.why_not(run.device)
        if reason is not None:
            yield f"the hardness-adaptive loss in plain torch looks at its levels ({reason})"


def resolve(run: Run) -> bool:
    """Whether the steps of a run are to be CUDA graphs, by its option and by what there is.

    Raises:
        InputError: they are asked for and cannot be; the message has the reasons.
    """
    if run.config.cuda_graph is False:
        return False
    reasons = list(why_not(run))
    if not reasons:
        return True
    if run.config.cuda_graph:
        raise InputError("cuda_graph", Shown(f"true, but {'; '.join(reasons)}"), "null, false")
    if run.device.type == "cuda":
        backends.log_once(f"a step is launched kernel by kernel and not as one CUDA graph: {'; '.join(reasons)}")
    return False


class Recorded(Protocol):
    """A step that has been recorded.

    Attributes:
        terms: what the latest :meth:`replay` gave; the next one writes over it.
    """

    terms: Terms

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What records steps: :class:`CudaRecorder`, and in tests something that needs no GPU."""

    def aside(self, body: Body) -> Terms:
        """Run a step as it is, in the circumstances in which it will be recorded."""

    def record(self, body: Body) -> Recorded:
        """Record a step without running it."""


class RecordingFailed(RuntimeError):
    """A step launched what a graph cannot hold.

    Attributes:
        drawn: the generator's state before, which itself can no longer be drawn from.
    """

    def __init__(self, reason: str, drawn: Tensor) -> None:
        self.drawn = drawn
        super().__init__(reason)


class GraphedStep:
    """Runs steps: the first few of a kind as they are, then one is recorded and the rest are replays of it.

    Args:
        recorder: what records.
        most: recordings that are kept; the oldest goes first.
    """

    def __init__(self, recorder: Recorder, most: int = 4) -> None:
        self.recorder, self.most = recorder, most
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, Recorded] = {}

    def run(self, kind: Hashable, body: Body) -> Terms:
        """The loss terms of one step, fresh scalars.

        Args:
            kind: what `body` does otherwise than in other steps; equal kinds launch the same.
            body: one step; reads what changes from tensors that stay where they are.

        Raises:
            RecordingFailed: it cannot be recorded; nothing of the step has happened.
        """
        known = self._recorded.get(kind)
        if known is None:
            if self._seen[kind] < WARM_UP:
                self._seen[kind] += 1
                return self.recorder.aside(body)
            known = self._recorded[kind] = self.recorder.record(body)
            while len(self._recorded) > self.most:
                del self._recorded[next(iter(self._recorded))]
        known.replay()
        return {name: x.clone() for name, x in known.terms.items()}

    def forget(self) -> None:
        """Tensors are elsewhere now: all begins anew."""
        self._seen.clear()
        self._recorded.clear()


@dataclass
class _CudaRecorded:
    graph: torch.cuda.CUDAGraph
    terms: Terms

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records into CUDA graphs of one pool of memory: steps follow one another, and none needs what another left.

    Args:
        device: of the steps.
        generator: that the steps draw from; a graph goes on in its stream of numbers.
        optimizers: that the steps call. Fused Adam counts its steps on the device already; that it may be captured it
            is told while it is.
    """

    def __init__(self, device: torch.device, generator: torch.Generator, optimizers: Sequence[Optimizer]) -> None:
        self.device, self.generator, self.optimizers = device, generator, tuple(optimizers)
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, body: Body) -> Terms:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            terms = body()
        current.wait_stream(self.stream)
        return terms

    def record(self, body: Body) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        drawn = self.generator.get_state()
        graph.register_generator_state(self.generator)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [group["capturable"] for group in groups]
        # Its chains were graphs of their own until now; within this one they are launches.
        denoise.forget_graphs()
        current = torch.cuda.current_stream(self.device)
        try:
            for group in groups:
                group["capturable"] = True
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                terms = body()
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            self._end_capture()
            raise RecordingFailed(str(error).partition("\n")[0][:200], drawn) from error
        finally:
            for group, value in zip(groups, before, strict=True):
                group["capturable"] = value
        return _CudaRecorded(graph, terms)

    def _end_capture(self) -> None:
        """After a recording that fails the device's default generator still counts as recorded, and draws nothing until
        another recording has ended: this one.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            contextlib.suppress(RuntimeError),
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=self.stream),
        ):
            torch.zeros(1, device=self.device)
