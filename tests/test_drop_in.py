"""What scripts of the release rely on beside losses and samples (which tests/test_golden.py holds against its outputs):
the modules' names, the order of parameters, weights and draws under a seed, its schedule and steps, and what its
constructor takes.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from fixtures.cases import Case, relative
from torch import nn

from dhns_fast.errors import InputError
from dhns_fast.reference import diffusion as reference
from dhns_fast.sampler import DiffHEG, SampleNoise

KINDS = ("distmult", "transe", "rotate")
D, T, B = 16, 12, 5
BLOCK = "denoiser.denoiser_block."
LAYERS = [f"{BLOCK}{name}" for name in ("layer_norm1", "mlp1", "layer_norm2", "mlp2", "time_mlp.1", "time_mlp.3")] + [
    "denoiser.output_layer"
]
ORDER = [f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")]


def namesake(kind: str) -> type[DiffHEG]:
    return importlib.import_module(f"dhns_fast.integrations.mmmodules_{kind}").DiffHEG


def build(kind: str, **options: Any) -> DiffHEG:
    return namesake(kind)(D, T, D // 2 if kind == "rotate" else D, 6.0, 2.0, **options)


def inputs(kind: str, M: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    rows = (B,) if M is None else (M, B)
    h, t = torch.randn(2, *rows, D, generator=source)
    return h, torch.randn(B, D // 2 if kind == "rotate" else D, generator=source), t


@pytest.mark.parametrize("kind", KINDS)
def test_a_namesake_has_its_condition(kind: str) -> None:
    generator = build(kind)
    assert type(generator).__module__ == "dhns_fast.sampler"
    assert (generator.condition, generator.behaviour) == (kind, "release")
    h, r, _ = inputs(kind)
    for mode in ("tail", "head"):
        found = generator.denoiser.scoring_module(h, r, mode)
        assert relative(found, reference.condition(kind, "release", h, r, mode, 8 / (D // 2))) < 1e-6
    with pytest.raises(InputError, match="mode: got 'both'; accepted: tail, head"):
        generator.denoiser.scoring_module(h, r, "both")


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_the_order_and_under_a_seed_the_weights_of_the_release(kind: str) -> None:
    expected = (["denoiser.scoring_module.rel_embedding_range"] if kind == "rotate" else []) + ORDER
    torch.manual_seed(3)
    generator = build(kind)
    assert [name for name, _ in generator.named_parameters()] == expected
    assert list(generator.state_dict()) == expected
    torch.manual_seed(3)  # its constructor makes the layers in this order
    layers = [nn.Linear(3 * D, 4 * D), nn.Linear(4 * D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)]
    state = generator.state_dict()
    for layer, name in zip(layers, [name for name in LAYERS if "norm" not in name], strict=True):
        assert torch.equal(state[f"{name}.weight"], layer.weight)
        assert torch.equal(state[f"{name}.bias"], layer.bias)
    # An optimiser's state finds its parameters by their number.
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.002)
    generator(*inputs(kind)).backward()
    optimizer.step()
    other = copy.deepcopy(generator)
    again = torch.optim.Adam(other.parameters(), lr=0.002)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, its in ((generator, optimizer), (other, again)):
        torch.manual_seed(4)
        its.zero_grad()
        module(*inputs(kind)).backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("M", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_the_release(kind: str, M: int | None) -> None:
    """x_T, then for t = T..2 the tail's noise and the head's, one modality after the other; nothing else of the stream
    is taken.
    """
    torch.manual_seed(0)
    generator = build(kind, draws="release")
    x = inputs(kind, M)
    torch.manual_seed(5)
    noise = [(torch.randn(B, D), [(torch.randn(B, D), torch.randn(B, D)) for _ in range(T - 1)]) for _ in range(M or 1)]
    after = torch.get_rng_state()
    start = torch.stack([first for first, _ in noise])
    tail, head = (
        torch.stack([torch.stack([step[side] for step in steps]) for _, steps in noise], 1) for side in (0, 1)
    )
    fixed = SampleNoise(start, tail, head) if M else SampleNoise(start[0], tail[:, 0], head[:, 0])
    expected = generator.sample(*x, noise=fixed)
    torch.manual_seed(5)
    found = generator.sample(*x)
    assert torch.equal(torch.get_rng_state(), after)
    for ours, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    by_argument = generator.sample(*x, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(by_argument[0], found[0], strict=True))


def test_draws_of_the_loss() -> None:
    generator = build("distmult", draws="release")
    x = inputs("distmult")
    torch.manual_seed(6)
    timesteps, noise = torch.randint(1, T + 1, (B,)), torch.randn(B, D)
    after = torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(generator(*x), generator(*x, timesteps=timesteps, noise=noise))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_and_steps(kind: str) -> None:
    case = Case.make(kind, D=D, T=T, B=B)
    generator = case.generator()
    beta, alpha, bar = reference.schedule(T)
    for name, values in (("betas", beta), ("alphas", alpha), ("alpha_bars", bar)):
        assert getattr(generator, name).dtype == torch.float32
        assert relative(getattr(generator, name), values) < 1e-7
    h, r, t = case.embeddings
    x, steps = case.noise, case.timesteps[:, None]
    assert relative(generator.q_sample(h, steps, x), bar[steps - 1].sqrt() * h + (1 - bar[steps - 1]).sqrt() * x) < 1e-7
    for mode in ("tail", "head"):
        # Layer by layer, and folded.
        entity = h if mode == "tail" else t
        predicted = generator.denoiser(x, steps, entity, r, mode)
        assert relative(predicted, case.oracle_denoise(mode)) < 1e-13
        assert relative(predicted, generator.denoise(x, case.timesteps, entity, r, mode)) < 1e-13
        assert relative(generator.denoiser(x, case.timesteps, entity, r, mode), predicted) == 0
        for step in (T, 1):
            s = torch.full((B, 1), step)
            torch.manual_seed(7)
            found = generator.p_sample(x, s, entity, r, mode)
            torch.manual_seed(7)
            z = torch.randn_like(x) if step > 1 else torch.zeros_like(x)
            i = step - 1
            mean = (x - beta[i] / (1 - bar[i]).sqrt() * generator.denoiser(x, s, entity, r, mode)) / alpha[i].sqrt()
            assert relative(found, mean + beta[i].sqrt() * z) < 1e-6
    assert generator.denoiser_loss(x, h).item() == pytest.approx((x - h).abs().mean().item())


def test_what_the_constructor_takes() -> None:
    # dim_r, margin and eps are read by RotatE alone, for the range of phases.
    for kind in ("distmult", "transe"):
        generator = namesake(kind)(D, T, 3, None, None)
        generator(*inputs(kind)).backward()
        generator.sample(*inputs(kind))
    rotate = namesake("rotate")(D, T, 3, 6.0, 2.0)
    assert rotate.denoiser.scoring_module.rel_embedding_range.item() == pytest.approx(8 / 3)
    rotate.sample(*inputs("rotate"))
    with pytest.raises(
        InputError, match=r"margin \+ eps: got None \+ None; accepted: a positive, finite sum: phases of 'rotate'"
    ):
        namesake("rotate")(D, T, D // 2, None, None)
    for width in (2, 15):
        with pytest.raises(
            InputError,
            match=f"embedding_dim: got {width}; accepted: an even integer of at least 4: of a timestep D/2 sines",
        ):
            namesake("distmult")(width, T, width, 6.0, 2.0)
    with pytest.raises(InputError, match="x_r: got"):
        build("distmult")(*(x[..., : D - 1] if i == 1 else x for i, x in enumerate(inputs("distmult"))))
    with pytest.raises(InputError, match="condition: got 'distmult'; accepted: 'transe'"):
        namesake("transe")(D, T, D, 6.0, 2.0, condition="distmult")


def test_draws_are_refused_where_they_cannot_be_those_of_the_release() -> None:
    with pytest.raises(InputError, match="draws: got 'cuda'; accepted: philox, release"):
        build("distmult", draws="cuda")
    with pytest.raises(InputError, match="draws: got 'release'; accepted: 'philox' for behaviour 'corrected'"):
        build("distmult", draws="release", behaviour="corrected")
    with pytest.raises(InputError, match="row_offset: got 3; accepted: 0 with draws 'release'"):
        build("distmult", draws="release").sample(*inputs("distmult"), row_offset=3)
