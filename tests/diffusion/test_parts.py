"""The parts of the generator one by one: schedule, conditions and the folding of weights, against the oracle in
float64.
"""

from __future__ import annotations

import pytest
import torch
from fixtures.cases import BEHAVIOURS, KINDS, Case, relative

from dhns_fast.catalogue import SCHEDULES, default_levels
from dhns_fast.diffusion.conditions import CONDITIONS
from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS
from dhns_fast.diffusion.folding import Moments, fold
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.reference import diffusion as reference


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 7, 50, 1000])
def test_schedule(T: int, name: str) -> None:
    beta, alpha, bar = reference.schedule(T, kind=name)
    schedule = Schedule.of(name, T)
    assert schedule.T == T
    assert schedule.beta == pytest.approx(beta.tolist(), rel=1e-12)
    assert schedule.alpha_bar == pytest.approx(bar.tolist(), rel=1e-9)
    steps = schedule.steps()
    assert steps.times == tuple(range(1, T + 1))
    expected = {
        "mean_scale": 1 / alpha.sqrt(),
        "noise_scale": beta / (1 - bar).sqrt() / alpha.sqrt(),
        "sigma": beta.sqrt(),
    }
    for column, values in expected.items():
        assert getattr(steps, column) == pytest.approx(values.tolist(), rel=1e-9), column
    assert relative(schedule.forward_coefficients(), torch.stack([bar.sqrt(), (1 - bar).sqrt()], 1)) < 1e-14
    assert default_levels(T) == reference.default_levels(T)
    if name != "linear" and T >= 50:
        assert bar[-1] < 1e-3  # the chain starts from noise


@pytest.mark.parametrize("mode", ["tail", "head"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_conditions(kind: str, behaviour: str, mode: str) -> None:
    case = Case.make(kind, behaviour, M=2)
    entity, relation = case.h.requires_grad_(), case.r.requires_grad_()
    relation_range = case.weights.get("denoiser.scoring_module.rel_embedding_range", torch.ones(1).double())
    found = CONDITIONS[kind].formula(entity, relation, mode == "tail", behaviour == "release", relation_range)
    expected = reference.condition(kind, behaviour, entity, relation, mode, relation_range.item())
    assert relative(found, expected) < 1e-14
    for one, other in zip(
        *(torch.autograd.grad((c * case.noise).sum(), [entity, relation]) for c in (found, expected)), strict=True
    ):
        assert relative(one, other) < 1e-13
    assert relation.shape[-1] * CONDITIONS[kind].relation_divisor == case.D


def test_moments_of_parts_are_those_of_the_whole() -> None:
    """Also where the mean is 10⁴ spreads away, which mean squares lose in float32."""
    source = torch.Generator().manual_seed(0)
    for offset, tolerance in ((0.0, 1e-6), (1e4, 1e-3)):
        parts = [torch.randn(5, 36, generator=source, dtype=torch.float64) + offset for _ in range(3)]
        whole = torch.cat(parts, 1)
        merge = lambda parts: Moments.of(parts[0]).merged_rstd(*map(Moments.of, parts[1:]))  # noqa: E731
        expected = (whole.var(1, correction=0, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        assert relative(merge(parts), expected) < 1e-12
        assert relative(merge([x.float() for x in parts]), expected) < tolerance


def test_folded_weights_predict_the_same_noise() -> None:
    """One matrix for each part of layer 1 and one for all behind it; the rows of the last are centred, so that a common
    part of h drops out.
    """
    case = Case.make("distmult", D=10, T=20, B=7)
    denoiser = case.generator().denoiser
    x, c, i = case.noise, case.h * case.r, case.timesteps - 1
    table = reference.time_embedding(case.weights, torch.arange(1, case.T + 1))
    assert relative(denoiser.denoiser_block.time_table(case.T), table) < 1e-14
    folded = fold(denoiser, case.T)
    tau = Moments(*(m[i] for m in folded.time_moments))
    first = (x @ folded.state.T + folded.time[i] + c @ folded.condition.T) * tau.merged_rstd(
        Moments.of(x), Moments.of(c)
    ) + folded.bias1
    h = first.relu()
    found = h @ folded.output.T * Moments.of(h).merged_rstd() + folded.bias2
    assert relative(found, case.oracle_denoise("tail")) < 1e-13
    assert folded.output.sum(1).abs().max() < 1e-13
