"""A step as one graph: the same numbers as without it, and nothing in a step that waits for the device.

Without a GPU a tape stands for the graph: it records what a step calls below autograd, every tensor and every number as
it was, and plays that again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from fixtures.training import config, graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dhns_fast import models
from dhns_fast.data import negatives, synthetic
from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import corruption, rows, score, score_triton
from dhns_fast.ranking import evaluate
from dhns_fast.sampler import DiffHEG
from dhns_fast.train import Trainer, graphed
from dhns_fast.train import trainer as trainers

# Kinds of steps that have fixed shapes.
CASES: list[dict[str, Any]] = [
    {"model": "complex"},
    {"model": "distmult", "behaviour": "release"},
    {"model": "rotate", "margin_schedule": "learned", "decay_after": 0.5, "generator_steps": 2},
    {"model": "transe", "behaviour": "normalised", "sampling_steps": 3, "filtered": False},
    {"model": "transe", "norm": 2, "fusion": False, "control": "gaussian"},
    {"model": "rotate", "control": "shuffled", "train_features": True},
    {"model": "complex", "control": "positive-only"},
    {"model": "complex", "loss": "one-vs-all"},
    {"model": "quate", "method": "self-adversarial"},
    {"model": "hole", "method": "uniform", "loss": "one-vs-all"},
    {"model": "pairre", "method": "uniform", "n3": 0.01},
    {"model": "simple", "method": "self-adversarial", "shared_negatives": 24},
    {
        "model": "complex",
        "method": "self-adversarial",
        "corruption": "both",
        "reciprocal": True,
        "dropout": 0.2,
        "n3": 0.01,
        "weighted_penalty": True,
    },
    {"model": "distmult", "method": "self-adversarial", "corruption": "both", "relation_dropout": 0.1, "l2": 0.01},
    {"model": "cp", "method": "self-adversarial", "shared_negatives": 24, "filtered": False},
]
MANY, FEW = {"batch_size": 40, "num_negatives": 4}, {"batch_size": 8, "num_negatives": 3}


class Tape(TorchDispatchMode):
    """What a function calls, to be called again: results go where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, before in self.calls:
            own = {x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_iter(before), tree_iter(func(*args, **kwargs)), strict=True):
                # A view, or what was changed in place, is in its place already.
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in own:
                    old.copy_(new)


class Played:
    def __init__(self, body: graphed.Body) -> None:
        self.tape = Tape()
        with self.tape:
            self.terms = body()
        self.fresh = True

    def replay(self) -> None:
        # Recording has run the step already, which a CUDA graph's does not.
        if not self.fresh:
            with torch.no_grad():
                self.tape.play()
        self.fresh = False


class Tapes:
    """A recorder without a GPU."""

    def __init__(self) -> None:
        self.recorded = 0

    def aside(self, body: graphed.Body) -> graphed.Terms:
        return body()

    def record(self, body: graphed.Body) -> Played:
        self.recorded += 1
        return Played(body)


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in trainer._tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("size", [MANY, FEW], ids=["all rows", "some rows"])
def test_replays_are_the_steps(options: dict[str, Any], size: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "distinct", rows.distinct_of_fixed_shape)
    kg = graph()
    plain, replayed = (Trainer(config(backend="cpu", **size, **options), kg) for _ in range(2))
    recorder = Tapes()
    replayed._graphed = graphed.GraphedStep(recorder)
    # Decays half-way: four kinds of steps, each of which is warmed up.
    steps = 14 if options.get("decay_after") else 8
    plain.steps_per_epoch = replayed.steps_per_epoch = steps // plain.config.epochs
    for _ in range(steps):
        expected, found = plain.step(), replayed.step()
        same(found, expected)
    same(state(replayed), state(plain))
    assert recorder.recorded == (4 if options.get("decay_after") else 2)
    assert torch.equal(plain._bad, replayed._bad)
    assert replayed.progress == plain.progress


def test_a_term_that_is_not_finite_is_noticed_at_its_step() -> None:
    trainer, term = Trainer(config(method="uniform", model="distmult"), graph()), torch.ones(())
    steps = graphed.GraphedStep(Tapes())

    def body() -> graphed.Terms:
        trainer._account({"kgc": term})
        return {"kgc": term.clone()}

    for number in range(9):
        trainer._number.fill_(number)
        term.fill_(torch.nan if number > 6 else number)
        assert steps.run(0, body)["kgc"].equal(term) or number > 6
    assert trainer._bad.tolist() == [7, -1, -1, -1, -1]


def test_steps_are_recorded_anew_after_a_checkpoint_is_read(tmp_path: Any) -> None:
    kg = graph()
    trainer, plain = (Trainer(config(model="distmult", **MANY), kg, tmp_path / name) for name in ("a", "b"))
    recorder = Tapes()
    trainer._graphed = graphed.GraphedStep(recorder)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for both in (trainer, plain):
        for _ in range(7):
            both.step()
        both.save()
        both.step()
        both.restore()
    assert recorder.recorded == 2
    for _ in range(7):
        same(trainer.step(), plain.step())
    assert recorder.recorded == 4
    same(state(trainer), state(plain))


def test_the_oldest_recording_is_given_up() -> None:
    recorder, x = Tapes(), torch.zeros(())
    steps = graphed.GraphedStep(recorder, most=2)

    def body() -> graphed.Terms:
        return {"kgc": x.add_(1).clone()}

    found = [float(steps.run(kind, body)["kgc"]) for kind in (1, 1, 1, 2, 2, 2, 3, 3, 3, 2, 1)]
    assert found == list(range(1, 12))
    assert recorder.recorded == 4


def test_what_cannot_be_recorded_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(Tapes):
        def record(self, body: graphed.Body) -> Played:
            raise graphed.RecordingFailed("a wait within it", drawn)

    said: list[str] = []
    monkeypatch.setattr(backends, "log_once", said.append)
    kg = graph()
    trainer, plain = (Trainer(config(model="distmult"), kg) for _ in range(2))
    trainer._graphed = graphed.GraphedStep(Refuses())
    for _ in range(5):
        drawn = trainer.rng.get_state()
        same(trainer.step(), plain.step())
    assert said == ["a step is launched kernel by kernel and not as one CUDA graph: a wait within it"]
    assert not trainer.cuda_graph
    insists = Trainer(config(model="distmult"), kg)
    insists.config = config(model="distmult", cuda_graph=True)
    insists._graphed = graphed.GraphedStep(Refuses())
    for _ in range(4):
        insists.step()
    with pytest.raises(InputError, match=r"^cuda_graph: got true, but a step cannot be recorded \(a wait within it\)"):
        insists.step()


class Elsewhere(torch.Generator):
    """Numbers for a device without values."""

    device = torch.device("meta")  # type: ignore[assignment]


class NothingFromTheHost(TorchDispatchMode):
    """Copies between devices wait for the device, and cannot be in a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.device.type for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor) and x.ndim}
        made = {x.device.type for x in tree_iter(out) if isinstance(x, Tensor)}
        assert len(given | made) <= 1, f"{func} moves from {given} to {made}"
        return out


def on_meta(trainer: Trainer) -> Trainer:
    """On a device that has no values: whatever asks for one fails, and so does a shape that depends on one."""
    meta = torch.device("meta")
    trainer.model.to(meta)
    trainer.margins.to(meta)
    if trainer.generator is not None:
        trainer.generator.to(meta)
    trainer.optimizer, trainer.generator_optimizer = trainers.build_optimisers(trainer.built)
    for optimizer in filter(None, (trainer.optimizer, trainer.generator_optimizer)):
        # What torch's Adam does is torch's business: fused, it has been in graphs for years.
        optimizer.step = lambda: None  # type: ignore[method-assign]
    trainer.device, trainer.rng = meta, Elsewhere()
    trainer.train, trainer.level_weights = trainer.train.to(meta), trainer.level_weights.to(meta)
    trainer.negatives = trainer.negatives.to(meta)
    for name in ("_sums", "_bad", "_number"):
        setattr(trainer, name, getattr(trainer, name).to(meta))
    return trainer


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("size", [MANY, FEW], ids=["all rows", "some rows"])
def test_a_step_asks_the_device_for_nothing(
    options: dict[str, Any], size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = on_meta(Trainer(config(**size, **options), graph()))
    # A device without values is otherwise refused, and has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(negatives, "as_integers", lambda _, ids, __: ids)
    monkeypatch.setattr(models, "as_integers", lambda _, ids, __: ids)
    for _ in range(2):
        trainer.step()  # what is made once may come from the host
    with NothingFromTheHost():
        for _ in range(2):
            trainer.step()


class NoLooks(TorchDispatchMode):
    """Values that are brought to the host, and shapes that depend on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = "local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal"
        assert not any(word == func.overloadpacket.__name__.strip("_0123456789") for word in looks), func
        mask = args[1] if func.overloadpacket.__name__.startswith("index") and len(args) > 1 else ()
        assert not any(x.dtype == torch.bool for x in tree_iter(mask) if isinstance(x, Tensor)), func
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(backends.TRITON.why_not(torch.device("cpu")) is not None, reason="needs Triton's interpreter")
def test_launchers_of_a_step_ask_the_device_for_nothing() -> None:
    query, table = torch.randn(4, 16), torch.randn(12, 16)
    ids = torch.randint(12, (4, 4))
    target = ids[:, 0].contiguous()
    made = DiffHEG(16, 3, 16, 6.0, 2.0, levels=(0, 1), backend="triton", precision="bf16")
    inputs = torch.randn(2, 4, 16), torch.randn(4, 16), torch.randn(2, 4, 16)
    for guard in (contextlib.nullcontext(), NoLooks()):  # what is made once may look
        with guard, torch.no_grad():
            made.sample(*inputs)
            a = corruption.LossInputs(query, table, ids, "complex_l1", 6.0, 0.5)
            _, _, slope, _ = corruption._triton_loss(a)
            corruption._triton_gradient(corruption.TableInputs(torch.ones(()), query, table, ids, slope, "complex_l1"))
            consumers = score_triton.Scores()
            ova = score.OneVsAllInputs(query, table, target, None, "dot", True)
            _, total, kept = score._one_vs_all(consumers, ova)
            score._gradients(
                consumers, score.BackwardInputs(query, table, None, torch.ones(4), total, target, kept, "dot")
            )


def test_what_makes_steps_unlike_one_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.CUDA.__class__, "why_not", lambda *_: None, raising=False)
    kg = synthetic(60, 4, 400, {"text": 6}, seed=1, valid_fraction=0.08, test_fraction=0.08)

    def reasons(**options: Any) -> str:
        trainer = Trainer(config(**options), kg)
        return "; ".join(graphed.why_not(trainer.built))

    for options in CASES:
        assert reasons(**options) == "the device is cpu", options
    assert "optimiser adagrad has another number of rows" in reasons(optimiser="adagrad", method="uniform")
    assert "optimiser adagrad counts" in reasons(optimiser="adagrad", method="uniform", loss="one-vs-all")
    assert "the entity table is in host memory" in reasons(table_device="host", method="uniform")
    assert "corruption bernoulli divides" in reasons(corruption="bernoulli")
    assert "corruption mixed divides" in reasons(corruption="mixed")
    assert "order shuffled has other triples" in reasons(order="shuffled")
    assert "method near-misses looks for its negatives" in reasons(method="near-misses")
    assert "method grounded looks" in reasons(method="grounded")
    assert "rescal multiplies" in reasons(model="rescal", method="uniform")
    with pytest.raises(InputError, match=r"^cuda_graph: got true, but the device is cpu; accepted: null, false$"):
        Trainer(config(cuda_graph=True), kg)
    for cuda_graph in (None, False):
        assert not Trainer(config(cuda_graph=cuda_graph), kg).cuda_graph


@pytest.mark.parametrize("few", [1, 7, 300])
def test_distinct_ids_of_a_fixed_shape(few: int) -> None:
    generator = torch.Generator().manual_seed(few)
    ids = torch.randint(few, (200,), generator=generator)
    found, place = rows.distinct_of_fixed_shape(ids)
    expected, at = ids.unique(return_inverse=True)
    assert torch.equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == expected[-1]).all()
    assert torch.equal(place, at)
    assert len(found) == len(ids)


@pytest.mark.gpu
def test_on_a_gpu_a_recording_that_fails_leaves_nothing_behind() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = graphed.CudaRecorder(device, torch.Generator(device), [])
    current = torch.cuda.current_stream(device)

    def asks() -> graphed.Terms:
        return {"kgc": torch.zeros((), device=device) + torch.ones(1, device=device).item()}

    with pytest.raises(graphed.RecordingFailed):
        recorder.record(asks)
    assert torch.cuda.current_stream(device) == current
    assert torch.randn(3, device=device).isfinite().all()
    terms = recorder.record(lambda: {"kgc": torch.ones((), device=device)})
    terms.replay()
    assert terms.terms["kgc"].item() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("size", [MANY, FEW], ids=["all rows", "some rows"])
def test_on_a_gpu_a_graph_gives_the_bits_of_its_steps(
    options: dict[str, Any], size: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kg = graph()
    options = {**size, **options, "device": "cuda"}
    plain = Trainer(config(cuda_graph=False, **options), kg)
    caplog.set_level(logging.WARNING, "dhns_fast")
    graphs = Trainer(config(cuda_graph=True, **options), kg)
    steps = 14 if options.get("decay_after") else 8
    plain.steps_per_epoch = graphs.steps_per_epoch = steps // 2
    for number in range(steps):
        # What the first steps of each side make once may wait.
        torch.cuda.set_sync_debug_mode("error" if number >= 4 else "default")
        try:
            expected, found = plain.step(), graphs.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same(found, expected)
    same(state(graphs), state(plain))
    assert graphs.cuda_graph
    assert graphs._graphed is not None
    assert len(graphs._graphed._recorded) == (4 if options.get("decay_after") else 2)
    same(
        {k: torch.tensor(v) for k, v in graphs.validate().items()},
        {k: torch.tensor(v) for k, v in plain.validate().items()},
    )


def test_an_evaluation_looks_once_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.looks = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.looks += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    from dhns_fast import ranking

    kg = graph()
    model = Trainer(config(model="complex", method="uniform"), kg).model
    expected = evaluate(model, kg)
    monkeypatch.setattr(ranking, "PARTS_BATCH", 4)
    seen = []
    look = ranking.refuse_trouble
    monkeypatch.setattr(ranking, "refuse_trouble", lambda *a: (seen.append(1), look(*a)))
    assert dict(evaluate(copy.deepcopy(model), kg, batch_size=4)) == dict(expected)
    assert seen == [1, 1]
