"""DiffHEG against the float64 oracle, against its committed answers, and as the release's trainer and later scripts use
it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.cases import BEHAVIOURS, EPS, KINDS, MARGIN, Case, relative, weight_shapes
from fixtures.make import FOLDER
from torch import Tensor

from dhns_fast.data import Ragged
from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import noise as noise_ops
from dhns_fast.reference import noise as reference_noise
from dhns_fast.reference import scoring as reference_scoring
from dhns_fast.sampler import DiffHEG, DiffHEGComplEx, DiffHEGRotatE, DiffHEGTransE, SampleNoise

F32, F64 = torch.float32, torch.float64
# (D, T, B, M, levels): one row, one step, sizes that are no power of two, levels in any order and twice.
SHAPES = [
    pytest.param(36, 20, 7, None, None, id="default"),
    pytest.param(36, 7, 1, 3, (5, 0, 5), id="modalities"),
    pytest.param(4, 1, 7, None, None, id="one-step"),
    pytest.param(10, 7, 3, 2, (6,), id="one-level"),
]
CUDA_BOUNDS = (("tf32", 2e-3), ("bf16", 1e-2))
each_kind = pytest.mark.parametrize("kind", KINDS)
each_behaviour = pytest.mark.parametrize("behaviour", BEHAVIOURS)


def worst(found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> float:
    """The largest relative error over sides and levels; NaN counts as the largest."""
    errors = [
        relative(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return max(errors, key=lambda e: float("inf") if e != e else e)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "backend"),
    [(F32, 1e-5, None), (F32, 1e-5, "eager"), (F64, 1e-12, None)],
    ids=["float32", "eager", "float64"],
)
@pytest.mark.parametrize(("D", "T", "B", "M", "levels"), SHAPES)
@each_behaviour
@each_kind
def test_sample(
    kind: str,
    behaviour: str,
    D: int,
    T: int,
    B: int,
    M: int | None,
    levels: tuple[int, ...] | None,
    dtype: torch.dtype,
    tolerance: float,
    backend: str | None,
    device: torch.device,
) -> None:
    case = Case.make(kind, behaviour, D, T, B, M)
    expected = case.oracle_sample(levels)
    moved = case.to(dtype, device)
    generator = moved.generator(levels=levels, backend=backend)
    found = generator.sample(*moved.embeddings, noise=moved.sample_noise)
    assert len(found[0]) == len(generator.levels)
    assert {x.dtype for side in found for x in side} == {dtype}
    assert worst(found, expected) < tolerance


@each_behaviour
def test_more_rows_than_a_block(behaviour: str, device: torch.device) -> None:
    case = Case.make("distmult", behaviour, 260, 2, 300)
    moved = case.to(F32, device)
    found = moved.generator(levels=(0, 1)).sample(*moved.embeddings, noise=moved.sample_noise)
    assert worst(found, case.oracle_sample((0, 1))) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (F64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("M", [None, 3])
@each_behaviour
@each_kind
def test_denoise_and_loss(
    kind: str, behaviour: str, M: int | None, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    """Predicted noise, the loss, and its gradient in every weight and, under "release" alone, in the embeddings."""
    oracle = Case.make(kind, behaviour, 36, 20, 7, M).requires_grad()
    case = Case.make(kind, behaviour, 36, 20, 7, M).to(dtype, device)
    generator = case.generator()
    for mode, entity in (("tail", case.h), ("head", case.t)):
        found = generator.denoise(case.noise, case.timesteps, entity, case.r, mode)
        assert relative(found, oracle.oracle_denoise(mode)) < tolerance

    loss = oracle.oracle_loss()
    expected = oracle.gradients(loss)
    inputs = [x.requires_grad_() for x in case.embeddings]
    found = generator(*inputs, timesteps=case.timesteps, noise=case.noise)
    assert found.shape == ()
    assert relative(found, loss) < tolerance
    found.backward()
    for name, x in zip("hrt", inputs, strict=True):
        if behaviour == "corrected":
            assert x.grad is None, name
        else:
            assert relative(x.grad, expected[name]) < 5 * tolerance, name
    trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    assert len(trained) == 14
    for name, p in trained.items():
        assert relative(p.grad, expected[name]) < 5 * tolerance, name


@each_behaviour
@each_kind
def test_committed_answers(kind: str, behaviour: str) -> None:
    recorded = np.load(FOLDER / f"{kind}.npz")
    case = Case.make(kind, behaviour).to(F32)
    answer = lambda name: torch.from_numpy(recorded[f"{behaviour}/{name}"])  # noqa: E731
    generator = case.generator()
    heads, tails = generator.sample(*case.embeddings, noise=case.sample_noise)
    assert worst((heads, tails), (list(answer("out_h")), list(answer("out_t")))) < 1e-5
    assert relative(generator(*case.embeddings, timesteps=case.timesteps, noise=case.noise), answer("loss")) < 2e-6
    assert relative(generator.denoise(case.noise, case.timesteps, case.h, case.r, "tail"), answer("eps/tail")) < 2e-6


def test_loss_of_present_rows() -> None:
    """A modality's mean is over the rows that have it; absent ones get no gradient, and a modality without rows counts
    nothing.
    """
    present = torch.rand(4, 7, generator=seeded(1)) < 0.5
    present[2] = False
    oracle = Case.make("complex", M=4, B=7)
    case = Case.make("complex", M=4, B=7)
    case.h.requires_grad_()
    loss = case.generator()(*case.embeddings, timesteps=case.timesteps, noise=case.noise, present=present)
    assert relative(loss, oracle.oracle_loss(present)) < 1e-12
    loss.backward()
    assert torch.equal(case.h.grad.ne(0).any(-1), present)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_large_hidden_bias(behaviour: str) -> None:
    """With a mean of 100 under LayerNorm 2, E[h²] − E[h]² would lose three digits more than the bound allows."""
    case = Case.make("distmult", behaviour, 64, 20, 7)
    case.weights["denoiser.denoiser_block.mlp1.bias"].add_(100)
    single = case.to(F32)
    generator = single.generator()
    assert worst(generator.sample(*single.embeddings, noise=single.sample_noise), case.oracle_sample()) < 1e-4
    assert (
        relative(
            generator.denoise(single.noise, single.timesteps, single.h, single.r, "tail"), case.oracle_denoise("tail")
        )
        < 1e-4
    )


@pytest.mark.parametrize(
    ("precision", "device", "tolerance"),
    [("bf16", "cpu", 1e-2), *(pytest.param(p, "cuda", e, marks=pytest.mark.gpu) for p, e in CUDA_BOUNDS)],
)
@each_behaviour
@each_kind
def test_rounded_operands(kind: str, behaviour: str, precision: str, device: str, tolerance: float) -> None:
    case = Case.make(kind, behaviour, 64, 50, 7)
    single = case.to(F32, device)
    generator = single.generator(precision=precision)
    found = generator.sample(*single.embeddings, noise=single.sample_noise)
    assert 1e-5 < worst(found, case.oracle_sample()) < tolerance  # the lower bound: the choice has an effect
    assert found[0][0].dtype == F32
    predicted = generator.denoise(single.noise, single.timesteps, single.h, single.r, "tail")
    assert 1e-5 < relative(predicted, case.oracle_denoise("tail")) < tolerance


def test_head_starts_where_the_tail_does_unless_told() -> None:
    case = Case.make("transe", "corrected")
    noise = case.sample_noise
    generator = case.generator()
    found = generator.sample(*case.embeddings, noise=SampleNoise(noise.x_T, noise.tail, noise.head))
    assert (
        worst(
            found, generator.sample(*case.embeddings, noise=SampleNoise(noise.x_T, noise.tail, noise.head, noise.x_T))
        )
        == 0
    )
    assert worst(found, generator.sample(*case.embeddings, noise=noise)) > 0.1


@each_behaviour
def test_noise_is_addressed(behaviour: str) -> None:
    """The call's noise is the counter-based one of its seed, by stream, modality, row and step; under "release" the
    head starts nowhere.
    """
    case = Case.make("distmult", behaviour, 10, 4, 3, M=2)
    seed = torch.randint(0, 2**63 - 1, (), generator=seeded()).item()

    def draw(stream: int, step: int) -> Tensor:
        return torch.stack([reference_noise.philox_normal(seed, stream, m, 17, step, 3, 10) for m in range(2)])

    steps = range(case.T, 1, -1)
    noise = SampleNoise(
        x_T=draw(noise_ops.X_T, 0),
        tail=torch.stack([draw(noise_ops.TAIL, t) for t in steps]),
        head=torch.stack([draw(noise_ops.HEAD, t) for t in steps]),
        x_T_head=draw(noise_ops.X_T_HEAD, 0),
    )
    generator = case.generator()
    found = generator.sample(*case.embeddings, generator=seeded(), row_offset=17)
    assert worst(found, generator.sample(*case.embeddings, noise=noise)) < 1e-6


@each_behaviour
def test_parts_of_a_batch(behaviour: str) -> None:
    case = Case.make("rotate", behaviour, 36, 7, 7, M=2).to(F32)
    generator = case.generator()

    def both() -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
        whole = generator.sample(*case.embeddings, generator=seeded())
        cuts = [(0, 1), (1, 5), (5, 7)]
        parts = [
            generator.sample(case.h[:, a:b], case.r[a:b], case.t[:, a:b], generator=seeded(), row_offset=a)
            for a, b in cuts
        ]
        joined = [[torch.cat(pieces, 1) for pieces in zip(*side, strict=True)] for side in zip(*parts, strict=True)]
        return whole, (joined[0], joined[1])

    assert worst(*both()) < 1e-6
    # A generator that predicts nothing passes its noise on: then equal bits mean equal noise.
    torch.nn.init.zeros_(generator.denoiser.output_layer.weight)
    torch.nn.init.zeros_(generator.denoiser.output_layer.bias)
    whole, joined = both()
    assert all(
        torch.equal(a, b) for one, other in zip(whole, joined, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_draws_are_independent_standard_normals() -> None:
    """One step of a generator that predicts nothing gives x_T / √α: four draws (two modalities, two sides) of two
    calls.
    """
    generator = DiffHEG(64, 1, 64, MARGIN, EPS, behaviour="corrected", levels=[0])
    torch.nn.init.zeros_(generator.denoiser.output_layer.weight)
    torch.nn.init.zeros_(generator.denoiser.output_layer.bias)
    h, r, source = torch.zeros(2, 300, 64), torch.zeros(300, 64), seeded()
    draws = torch.cat(
        [x.flatten(1) for _ in range(2) for side in generator.sample(h, r, h, generator=source) for x in side]
    )
    correlation = torch.corrcoef(draws)
    assert (correlation - torch.eye(8)).abs().max() < 0.04  # 5.5 standard errors of 19 200 pairs
    assert draws.mean(1).abs().max() < 0.04
    assert (draws.std(1) - 1).abs().max() < 0.03


def test_seeds() -> None:
    case = Case.make("distmult").to(F32)
    generator = case.generator()

    def sample(source: torch.Generator | None) -> Tensor:
        return torch.stack([x for side in generator.sample(*case.embeddings, generator=source) for x in side])

    source = seeded()
    first, second = sample(source), sample(source)
    assert torch.equal(first, sample(seeded()))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, sample(None))
    assert not torch.equal(first, sample(None))
    losses = [generator(*case.embeddings, generator=source) for source in (seeded(), seeded(), seeded(6))]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_drawn_timesteps_cover_the_schedule() -> None:
    """A row's loss tells which t was drawn: 1..T, each about as often."""
    case = Case.make("distmult", T=3, B=1)
    generator, calls = case.generator(), 300
    with torch.no_grad():
        of_step = [generator(*case.embeddings, timesteps=torch.tensor([t]), noise=case.noise).item() for t in (1, 2, 3)]
        source = seeded()
        drawn = [generator(*case.embeddings, noise=case.noise, generator=source).item() for _ in range(calls)]
    counts = [sum(abs(x - loss) < 1e-12 for x in drawn) for loss in of_step]
    assert sum(counts) == calls
    assert min(counts) > 70  # 100 expected, standard deviation 8


@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=["plain", "no_grad", "inference_mode"]
)
@each_behaviour
def test_results_are_fresh(behaviour: str, mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Usable in autograd whatever mode the call was made in, no gradient into them, and no memory shared with
    anything.
    """
    case = Case.make("transe", behaviour, T=3).to(F32)
    generator = case.generator(levels=(0, 2, 0))
    with mode():
        inputs = [x.clone() for x in case.embeddings]
        noise = SampleNoise(*(x.clone() for x in (case.x_T, case.tail, case.head, case.x_T_head)))
        given = [x.clone() for x in (noise.x_T, noise.tail, noise.head, noise.x_T_head)]
        results = [x for _ in range(2) for side in generator.sample(*inputs, noise=noise) for x in side]
        with generator.frozen():
            results += [x for side in generator.sample(*inputs, generator=seeded()) for x in side]
    assert all(
        torch.equal(a, b) for a, b in zip(given, (noise.x_T, noise.tail, noise.head, noise.x_T_head), strict=True)
    )
    assert not any(x.requires_grad or x.is_inference() for x in results)
    before = [x.clone() for x in results]
    for i, x in enumerate(results):
        x.fill_(i)
    assert [x.unique().tolist() for x in results] == [[float(i)] for i in range(len(results))]
    weight = torch.ones(case.D, requires_grad=True)
    (before[0] * weight).sum().backward()
    assert weight.grad is not None


def test_frozen_weights() -> None:
    case = Case.make("distmult").to(F32)
    generator = case.generator()

    def sample() -> Tensor:
        return generator.sample(*case.embeddings, noise=case.sample_noise)[0][0]

    before = sample()
    with generator.frozen() as same:
        assert same is generator
        assert torch.equal(sample(), before)
        for weight in generator.denoiser.parameters():
            weight.data.mul_(2)  # as fused optimisers write: without a trace
        assert torch.equal(sample(), before)
    assert not torch.allclose(sample(), before)
    for weight in generator.denoiser.parameters():
        weight.data.mul_(0.5)
    assert torch.equal(sample(), before)


@each_kind
def test_state_dict(kind: str) -> None:
    """Exactly the release's names and shapes, loaded strictly; copies, pickles and conversions carry everything else
    along.
    """
    case = Case.make(kind).to(F32)
    generator = case.generator(levels=(0, 3))
    assert {name: tuple(x.shape) for name, x in generator.state_dict().items()} == weight_shapes(kind, case.D)
    expected = generator.sample(*case.embeddings, noise=case.sample_noise)

    saved = io.BytesIO()
    torch.save(generator.state_dict(), saved)
    saved.seek(0)
    loaded = Case.make(kind, seed=1).to(F32).generator(levels=(0, 3))
    assert str(loaded.load_state_dict(torch.load(saved, weights_only=True))) == "<All keys matched successfully>"
    copied = copy.deepcopy(generator)
    for other in (loaded, copied, pickle.loads(pickle.dumps(generator)), copy.deepcopy(generator).double().float()):
        assert worst(other.sample(*case.embeddings, noise=case.sample_noise), expected) == 0
    copied.denoiser.output_layer.weight.data.zero_()
    assert worst(generator.sample(*case.embeddings, noise=case.sample_noise), expected) == 0

    exact = Case.make(kind)
    assert (
        worst(generator.double().sample(*exact.embeddings, noise=exact.sample_noise), exact.oracle_sample((0, 3)))
        < 1e-12
    )


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_autocast_changes_nothing(precision: str) -> None:
    case = Case.make("complex").to(F32)
    generator = case.generator(precision=precision)

    def run() -> list[Tensor]:
        sampled = [x for side in generator.sample(*case.embeddings, noise=case.sample_noise) for x in side]
        predicted = generator.denoise(case.noise, case.timesteps, case.h, case.r, "head")
        return [*sampled, predicted, generator(*case.embeddings, timesteps=case.timesteps, noise=case.noise)]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_rows() -> None:
    case = Case.make("rotate", B=0).to(F32)
    heads, tails = case.generator().sample(*case.embeddings)
    assert [x.shape for x in (*heads, *tails)] == [(0, case.D)] * 10


@pytest.mark.parametrize("cls", [DiffHEGTransE, DiffHEGRotatE, DiffHEGComplEx])
def test_a_fixed_condition_is_left_out_of_the_arguments(cls: type[DiffHEG]) -> None:
    names = list(inspect.signature(DiffHEG).parameters)
    assert list(inspect.signature(cls).parameters) == [name for name in names if name != "condition"]
    generator = cls(8, 10, 4 if cls is DiffHEGRotatE else 8, 6.0, 2.0, "corrected", (0, 3))
    assert (generator.behaviour, generator.levels) == ("corrected", (0, 3))


@pytest.mark.parametrize(
    ("cls", "divisor"), [(DiffHEG, 1), (DiffHEGTransE, 1), (DiffHEGRotatE, 2), (DiffHEGComplEx, 1)]
)
def test_drop_in_for_the_releases_trainer(cls: type[DiffHEG], divisor: int, device: torch.device) -> None:
    """Constructor, move, loss of three modalities added in place, `backward(retain_graph=True)`, three samples used
    together at the end.
    """
    torch.manual_seed(0)
    D, dim_r, B = 16, 16 // divisor, 6
    generator = cls(D, 10, dim_r, 6.0, 2.0).to(device)
    tables = [torch.nn.Embedding(20, D, device=device) for _ in range(3)]
    relation = torch.nn.Embedding(4, dim_r, device=device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    optimizer_model = torch.optim.Adam([p for m in (*tables, relation) for p in m.parameters()], lr=0.01)
    batch_h, batch_r, batch_t = (torch.randint(0, n, (B,), device=device) for n in (20, 4, 20))
    weights = {name: p.detach().clone() for name, p in generator.named_parameters() if p.requires_grad}
    for _ in range(3):
        h, t, r = [e(batch_h) for e in tables], [e(batch_t) for e in tables], relation(batch_r)
        # built before the generator's step, as there
        kgc = sum(((x + y) ** 2).mean() for x, y in zip(h, t, strict=True))
        loss = generator(h[0], r, t[0])
        loss += generator(h[1], r, t[1])
        loss += generator(h[2], r, t[2])
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        assert all(e.weight.grad.ne(0).any() for e in (*tables, relation))  # there, the loss trains the embeddings too
        optimizer.step()
        sampled = [generator.sample(x, r, y) for x, y in zip(h, t, strict=True)]
        hal = sum(
            (one * h[0]).mean() + (other * t[0]).mean()
            for heads, tails in sampled
            for one, other in zip(heads, tails, strict=True)
        )
        (kgc + 0.01 * hal).backward()
        assert all(e.weight.grad.isfinite().all() for e in (*tables, relation))
        optimizer_model.step()
        optimizer_model.zero_grad()
        assert [len(side) for pair in sampled for side in pair] == [5] * 6
    assert loss.isfinite()
    trained = dict(generator.named_parameters())
    assert not [name for name, before in weights.items() if torch.equal(before, trained[name])]


CONSTRUCTOR = [
    ({"embedding_dim": 7}, "embedding_dim: got 7; accepted: an even integer of at least 4"),
    ({"embedding_dim": 2}, "embedding_dim: got 2; accepted: an even integer of at least 4"),
    ({"embedding_dim": 8.0}, "embedding_dim: got 8.0; accepted: an even integer of at least 4"),
    ({"T": 0}, "T: got 0; accepted: integers of at least 1"),
    ({"T": 5.0}, "T: got 5.0; accepted: integers of at least 1"),
    ({"condition": "rotate", "dim_r": 0}, "dim_r: got 0; accepted: integers of at least 1"),
    (
        {"condition": "rotate", "dim_r": 4, "margin": -2.0},
        "margin + eps: got -2.0 + ",
    ),
    ({"condition": "quate"}, "condition: got 'quate'; accepted: distmult, complex, rotate, transe"),
    ({"behaviour": "fixed"}, "behaviour: got 'fixed'; accepted: "),
    ({"precision": "fp16"}, "precision: got 'fp16'; accepted: ieee, tf32, bf16"),
    ({"levels": ()}, "levels: got (); accepted: one or more integers in 0..4 (T - 1)"),
    ({"levels": (0, 5)}, "levels: got (0, 5); accepted: one or more integers in 0..4 (T - 1)"),
    ({"levels": (-1,)}, "levels: got (-1,); accepted: one or more integers in 0..4 (T - 1)"),
    ({"levels": (1.5,)}, "levels: got (1.5,); accepted: one or more integers in 0..4 (T - 1)"),
    ({"backend": "gpu"}, "backend: got 'gpu'; accepted: auto, triton"),
]


@pytest.mark.parametrize(("change", "message"), CONSTRUCTOR, ids=[m[:60] for _, m in CONSTRUCTOR])
def test_refused_by_the_constructor(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"embedding_dim": 8, "T": 5, "dim_r": 8, "margin": 6.0, "eps": 2.0}
    with pytest.raises(InputError) as error:
        DiffHEG(**{**arguments, **change})
    assert message in str(error.value)


def test_fixed_condition_is_fixed() -> None:
    with pytest.raises(
        InputError, match="condition: got 'transe'; accepted: 'rotate' in DiffHEGRotatE; DiffHEG lets you choose it"
    ):
        DiffHEGRotatE(8, 5, 4, 6.0, 2.0, condition="transe")


def test_a_backend_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(BackendUnavailableError, match="backend 'cuda'"):
        DiffHEG(8, 5, 8, 6.0, 2.0, backend="cuda").sample(x, x, x)
    assert len(DiffHEG(8, 5, 8, 6.0, 2.0, backend="eager").sample(x, x, x)[0]) == 5
    monkeypatch.setenv("DHNS_FAST_BACKEND", "fastest")
    with pytest.raises(InputError, match="DHNS_FAST_BACKEND: got 'fastest'; accepted: auto, triton, cuda, cpu, eager"):
        DiffHEG(8, 5, 8, 6.0, 2.0).sample(x, x, x)


X = torch.zeros(3, 8)
STACK = torch.zeros(2, 3, 8)
STEPS = torch.ones(3, dtype=torch.long)
NOISE = SampleNoise(X, torch.zeros(4, 3, 8), torch.zeros(4, 3, 8), X)


def noise(**change: Tensor) -> dict[str, Any]:
    return {"noise": SampleNoise(**{**vars(NOISE), **change})}


CALLS: list[tuple[str, dict[str, Any], str]] = [
    (
        "sample",
        {"x_h": X.double()},
        "x_h: got torch.float64 on cpu; accepted: torch.float32 on cpu, as the generator's weights",
    ),
    (
        "sample",
        {"x_r": X.half()},
        "x_r: got torch.float16 on cpu; accepted: torch.float32 on cpu, as the generator's weights",
    ),
    (
        "sample",
        {"x_t": X.to("meta")},
        "x_t: got torch.float32 on meta; accepted: torch.float32 on cpu, as the generator's weights",
    ),
    (
        "sample",
        {"x_t": None},
        "x_t: got NoneType; accepted: a torch.Tensor (torch.as_tensor makes one of a list or an array)",
    ),
    ("sample", {"x_h": X[0]}, "x_h: got torch.float32 [8]; accepted: shape [B, 8] or [M, B, 8]"),
    ("sample", {"x_h": X[:, :6]}, "x_h: got torch.float32 [3, 6]; accepted: shape [B, 8] or [M, B, 8]"),
    ("sample", {"x_t": X[:2]}, "x_t: got torch.float32 [2, 8]; accepted: shape [B, 8] or [M, B, 8] like x_h [3, 8]"),
    ("sample", {"x_r": X[:, :4]}, "x_r: got torch.float32 [3, 4]; accepted: shape [3, 8]"),
    ("sample", {"x_r": X[:2]}, "x_r: got torch.float32 [2, 8]; accepted: shape [3, 8]"),
    ("sample", {"x_r": X[0]}, "x_r: got torch.float32 [8]; accepted: shape [3, 8]"),
    (
        "sample",
        {"x_h": STACK, "x_t": STACK, "x_r": torch.zeros(5, 3, 8)},
        "x_r: got torch.float32 [5, 3, 8]; accepted: shape [3, 8]",
    ),
    ("sample", noise(x_T=X[:2]), "noise.x_T: got torch.float32 [2, 8]; accepted: shape [3, 8]"),
    ("sample", noise(tail=torch.zeros(5, 3, 8)), "noise.tail: got torch.float32 [5, 3, 8]; accepted: shape [4, 3, 8]"),
    ("sample", noise(head=torch.zeros(4, 8)), "noise.head: got torch.float32 [4, 8]; accepted: shape [4, 3, 8]"),
    ("sample", noise(x_T_head=X[:, :4]), "noise.x_T_head: got torch.float32 [3, 4]; accepted: shape [3, 8]"),
    (
        "sample",
        {"x_h": STACK, "x_t": STACK, **noise()},
        "noise.x_T: got torch.float32 [3, 8]; accepted: shape [2, 3, 8]",
    ),
    (
        "sample",
        noise(tail=torch.zeros(4, 3, 8).double()),
        "noise.tail: got torch.float64 on cpu; accepted: torch.float32 on cpu, as x_h",
    ),
    ("sample", {"row_offset": -1}, "row_offset: got -1; accepted: values >= 0"),
    (
        "forward",
        {"x_t": X.double()},
        "x_t: got torch.float64 on cpu; accepted: torch.float32 on cpu, as the generator's weights",
    ),
    ("forward", {"timesteps": STEPS[:2]}, "timesteps: got torch.int64 [2]; accepted: torch.int64 [3]"),
    ("forward", {"timesteps": STEPS.int()}, "timesteps: got torch.int32 [3]; accepted: torch.int64 [3]"),
    ("forward", {"timesteps": STEPS * 6}, "timesteps: got values from 6 to 6; accepted: 1..5"),
    ("forward", {"noise": X[:2]}, "noise: got torch.float32 [2, 8]; accepted: torch.float32 [3, 8] as x_h"),
    ("forward", {"noise": X.double()}, "noise: got torch.float64 [3, 8]; accepted: torch.float32 [3, 8] as x_h"),
    ("forward", {"noise": X.to("meta")}, "noise: got a tensor on meta; accepted: cpu, as x_h"),
    ("forward", {"timesteps": STEPS.to("meta")}, "timesteps: got a tensor on meta; accepted: cpu, as the generator"),
    ("denoise", {"timesteps": STEPS.to("meta")}, "timesteps: got a tensor on meta; accepted: cpu, as the generator"),
    ("forward", {"present": torch.ones(2, dtype=torch.bool)}, "present: got torch.bool [2]; accepted: shape [3]"),
    ("denoise", {"mode": "both"}, "mode: got 'both'; accepted: tail, head"),
    (
        "denoise",
        {"x_entity": X[:, :4]},
        "x_entity: got torch.float32 [3, 4]; accepted: shape [B, 8] or [M, B, 8] like x [3, 8]",
    ),
    ("denoise", {"timesteps": STEPS * 0}, "timesteps: got values from 0 to 0; accepted: 1..5"),
    ("denoise", {"timesteps": STEPS.float()}, "timesteps: got torch.float32 [3]; accepted: torch.int64 [3]"),
]


@pytest.mark.parametrize(("method", "change", "message"), CALLS, ids=[f"{c}-{m[:60]}" for c, _, m in CALLS])
def test_refused_by_a_call(method: str, change: dict[str, Any], message: str) -> None:
    generator = DiffHEG(8, 5, 8, 6.0, 2.0)
    triple = {"x_h": X, "x_r": X, "x_t": X}
    arguments = triple if method != "denoise" else {"x": X, "timesteps": STEPS, "x_entity": X, "x_r": X, "mode": "tail"}
    with pytest.raises(InputError) as error:
        getattr(generator, method)(**{**arguments, **change})
    assert message in str(error.value)


def test_steps_of_the_release_take_no_times_without_values() -> None:
    generator = DiffHEG(8, 5, 8, 6.0, 2.0)
    for call in (lambda t: generator.q_sample(X, t, X), lambda t: generator.p_sample(X, t, X, X, "tail")):
        with pytest.raises(InputError, match=r"^t: got a tensor on meta"):
            call(STEPS.to("meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x_h", "x_r", "x_t"])
def test_validate(name: str, bad: float) -> None:
    inputs = {
        "x_h": X,
        "x_r": X,
        "x_t": X,
        name: X.clone().index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(bad)),
    }
    checked, trusting = (DiffHEG(8, 5, 8, 6.0, 2.0, validate=validate) for validate in (True, False))
    for call in (checked.sample, checked):
        with pytest.raises(InputError, match=f"^{name}: got NaN or infinity; accepted: finite values"):
            call(**inputs)
    trusting.sample(**inputs)
    checked.sample(X, X, X)


def test_precision_of_another_device() -> None:
    for call in ("sample", "forward"):
        with pytest.raises(
            InputError,
            match="precision: got 'tf32' for inputs on cpu; accepted: 'ieee' or 'bf16'; 'tf32' needs a CUDA device",
        ):
            getattr(DiffHEG(8, 5, 8, 6.0, 2.0, precision="tf32"), call)(X, X, X)


def test_checkpoints_of_something_else() -> None:
    plain, rotate = DiffHEG(8, 5, 8, 6.0, 2.0), DiffHEGRotatE(8, 5, 4, 6.0, 2.0)
    with pytest.raises(
        InputError,
        match=r"state_dict: got a checkpoint of RotatE .*'distmult'",
    ):
        plain.load_state_dict(rotate.state_dict())
    with pytest.raises(InputError, match="state_dict: got a checkpoint of a model other than RotatE"):
        rotate.load_state_dict(plain.state_dict())
    with pytest.raises(InputError, match=r"embedding_dim 12 \(denoiser.output_layer.bias\); accepted: embedding_dim 8"):
        plain.load_state_dict(DiffHEG(12, 5, 12, 6.0, 2.0).state_dict())
    state = plain.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict({**state, "denoiser.extra": X})
    state.pop("denoiser.output_layer.bias")
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict(state)


@pytest.mark.parametrize("reduction", ["l2", "l1"])
def test_nearest_real_entities(reduction: str) -> None:
    """Of every generated row, whatever its shape: the rows of the table that a search over all of them finds."""
    table = torch.randn(70, 8, generator=torch.Generator().manual_seed(0))
    made = table[[3, 60, 7, 9, 0, 1]].reshape(2, 3, 8) + 0.01
    scores, ids = DiffHEG.nearest(made, table, 4, reduction)
    expected = reference_scoring.score_all(made.view(-1, 8).double(), table.double(), reduction).view(2, 3, 70).topk(4)
    assert torch.equal(ids, expected.indices)
    assert relative(scores, expected.values) < 1e-5
    assert ids[..., 0].flatten().tolist() == [3, 60, 7, 9, 0, 1]
    known = Ragged(torch.tensor([0, 1, 1]), torch.tensor([3]))
    assert DiffHEG.nearest(made[0, :2], table, 1, reduction, known)[1].tolist() == [[int(ids[0, 0, 1])], [60]]
