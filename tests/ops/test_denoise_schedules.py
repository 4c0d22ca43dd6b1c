"""The chain on other schedules, with a clip, strided and normalised: every backend against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.reference import diffusion as reference
from dhns_fast.sampler import DiffHEG, SampleNoise

T = 12
# At T = 12 the scaled β reach .999: the first step multiplies what float32 has rounded by 30, and by hundreds where it
# is a long one.
TOLERANCE = {False: 3e-5, True: 2e-4}
BACKENDS = ("eager", "cpu", "triton")
# The clip is so narrow that it binds in most steps; levels (3, 6) end the strided chain above 0.
CASES: dict[str, dict[str, Any]] = {
    "scaled": {"behaviour": "corrected", "schedule": "scaled"},
    "cosine clipped": {"behaviour": "release", "schedule": "cosine", "clip": 0.7},
    "normalised": {"behaviour": "normalised"},
    "strided": {"behaviour": "normalised", "sampling_steps": 5, "levels": (0, 3, 6)},
    "strided to a level": {"behaviour": "corrected", "schedule": "cosine", "sampling_steps": 4, "levels": (3, 6)},
}


def make(D: int, kind: str = "distmult", levels: tuple[float, ...] = (0, 2, 6), **options: Any) -> DiffHEG:
    torch.manual_seed(D)
    made = DiffHEG(D, T, D // 2 if kind == "rotate" else D, 6.0, 2.0, condition=kind, levels=levels, **options)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.05))
    return made


def inputs(M: int, B: int, D: int, dim_r: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.rand(M, 1, 1) + 0.05
    return torch.randn(M, B, D) * scale, torch.randn(B, dim_r) * 0.3, torch.randn(M, B, D) * scale


def truth(made: DiffHEG, h: Tensor, r: Tensor, t: Tensor, noise: SampleNoise) -> list[Tensor]:
    weights = {name: value.double() for name, value in made.state_dict().items()}
    times = None
    if made.sampling_steps is not None:
        times = made._steps.times
        assert len(times) - (min(made.levels) > 0) == made.sampling_steps
    each = [
        reference.sample(
            weights,
            *(x.double() for x in (h[m], r, t[m], noise.x_T[m], noise.tail[:, m], noise.head[:, m])),
            T,
            made.condition,
            made.behaviour,
            relation_range=float(weights.get("denoiser.scoring_module.rel_embedding_range", torch.ones(()))),
            levels=made.levels,
            x_T_head=noise.x_T_head[m].double(),  # type: ignore[index]
            schedule_kind=made.schedule,
            clip=made.clip,
            times=times,
        )
        for m in range(len(h))
    ]
    return [torch.stack([each[m][side][k] for m in range(len(h))]) for side in (0, 1) for k in range(len(made.levels))]


def fixed_noise(made: DiffHEG, M: int, B: int, D: int) -> SampleNoise:
    steps = len(made._steps.times) - 1
    return SampleNoise(
        torch.randn(M, B, D), torch.randn(steps, M, B, D), torch.randn(steps, M, B, D), torch.randn(M, B, D)
    )


def both(sides: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*sides[0], *sides[1]]


def agrees(made: DiffHEG, M: int, B: int, D: int) -> None:
    h, r, t = inputs(M, B, D, made.dim_r)
    noise = fixed_noise(made, M, B, D)
    heads, tails = made.sample(h, r, t, noise=noise)
    for found, expected in zip(heads + tails, truth(made, h, r, t, noise), strict=True):
        assert (found.double() - expected).norm() < TOLERANCE[made.sampling_steps is not None] * expected.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chain_agrees_with_the_oracle(backend: str, case: str) -> None:
    M, B, D = (2, 13, 34) if backend != "triton" else (1, 3, 6)
    agrees(make(D, backend=backend, **CASES[case]), M, B, D)


@pytest.mark.parametrize("kind", ["transe", "rotate", "complex"])
def test_normalised_conditions_agree_with_the_oracle(kind: str) -> None:
    agrees(make(8, kind, behaviour="normalised", backend="eager"), 2, 5, 8)


@pytest.mark.parametrize("case", ["normalised", "strided"])
def test_kernels_of_wide_states_agree_with_the_oracle(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("dhns_fast.kernels.denoise")
    monkeypatch.setattr(kernels, "WHOLE_WIDTH", dict.fromkeys(kernels.WHOLE_WIDTH, 0))
    agrees(make(6, backend="triton", **CASES[case]), 1, 3, 6)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_clip_that_never_binds_changes_nothing(backend: str) -> None:
    plain, wide = (make(8, backend=backend, behaviour="corrected", clip=clip) for clip in (None, 1e9))
    h, r, t = inputs(2, 5, 8, 8)
    noise = fixed_noise(plain, 2, 5, 8)
    for a, b in zip(*(both(made.sample(h, r, t, noise=noise)) for made in (plain, wide)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["distmult", "rotate"])
def test_normalised_loss_agrees_with_the_oracle(kind: str) -> None:
    made = make(8, kind, behaviour="normalised").double()
    h, r, t = (x.double().requires_grad_() for x in inputs(1, 5, 8, made.dim_r))
    steps, noise = torch.randint(1, T + 1, (5,)), torch.randn(5, 8, dtype=torch.float64)
    weights = dict(made.state_dict())
    span = float(weights.get("denoiser.scoring_module.rel_embedding_range", torch.ones(())))
    expected = reference.diffusion_loss(
        weights, h[0], r, t[0], steps, noise, T, kind, "normalised", span, made.schedule
    )
    found = made(h[0], r, t[0], steps, noise)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert h.grad is None


def test_normalised_does_not_depend_on_the_scale_and_scales_its_results() -> None:
    made = make(8, behaviour="normalised", backend="eager")
    h, r, t = inputs(2, 5, 8, 8)
    noise = fixed_noise(made, 2, 5, 8)
    one, other = (both(made.sample(h * k, r * k, t * k, noise=noise)) for k in (1, 20))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a * 20, b, rtol=1e-4, atol=1e-4)
    entity, _ = made.scales(h, r, t)
    assert all((x.abs() <= 3.001 * entity).all() for x in (one[0], one[3]))  # level 0: the clip of the clean embedding
    zeros = torch.zeros(1, 8)
    assert all(x.isfinite().all() for x in both(made.sample(zeros, zeros, zeros)))


def test_split_batches_are_the_whole_one_with_its_scales() -> None:
    made = make(8, behaviour="normalised", backend="cpu")
    h, r, t = inputs(2, 9, 8, 8)
    scales = made.scales(h, r, t)

    def part(rows: slice) -> list[Tensor]:
        given = {"generator": torch.Generator().manual_seed(3), "row_offset": rows.start, "scales": scales}
        return both(made.sample(h[:, rows], r[rows], t[:, rows], **given))

    for a, b, expected in zip(part(slice(0, 4)), part(slice(4, 9)), part(slice(0, 9)), strict=True):
        assert torch.equal(torch.cat([a, b], 1), expected)


def test_kept_scales_are_running_means_and_rows_do_not_depend_on_their_batch() -> None:
    made = make(8, behaviour="normalised", backend="cpu", modalities=2)
    h, r, t = inputs(2, 9, 8, 8)
    expected = None
    for k in (1.0, 3.0):
        made(k * h, k * r, k * t)
        squares = torch.cat(
            [(k * h).square().mean((1, 2)) / 2 + (k * t).square().mean((1, 2)) / 2, (k * r).square().mean()[None]]
        )
        expected = squares if expected is None else expected + 0.1 * (squares - expected)
    assert torch.allclose(made.mean_squares, expected, rtol=1e-5)
    made.eval()
    made(5 * h, r, t)
    assert torch.allclose(made.mean_squares, expected, rtol=1e-5)  # a loss that is only looked at keeps nothing

    def of(rows: slice) -> list[Tensor]:
        drawn = {"generator": torch.Generator().manual_seed(3), "row_offset": rows.start}
        return both(made.sample(h[:, rows], r[rows], t[:, rows], **drawn))

    for a, b in zip(of(slice(3, 4)), of(slice(0, 9)), strict=True):
        assert torch.equal(a, b[:, 3:4])
    other = make(8, behaviour="normalised", backend="cpu", modalities=2)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.mean_squares, made.mean_squares)
    without = make(8, behaviour="corrected", modalities=2)
    without.load_state_dict(made.state_dict())
    other.load_state_dict(without.state_dict())
    assert not other.mean_squares.any()
    # One that has kept nothing yet takes those of the call.
    drawn = [torch.Generator().manual_seed(5) for _ in range(2)]
    for a, b in zip(
        both(other.eval().sample(h, r, t, generator=drawn[0])),
        both(other.train().sample(h, r, t, generator=drawn[1])),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="1 modalities"):
        made.sample(h[0], r, t[0])


def test_levels_by_the_share_of_lost_signal() -> None:
    made = DiffHEG(8, 50, 8, 6.0, 2.0, behaviour="normalised", levels=(0, 0.05, 0.5, 0.97))
    lost = [made._schedule.lost(s) for s in made.levels]
    assert lost == pytest.approx([0, 0.05, 0.5, 0.97], abs=0.04)
    assert list(made.levels) == sorted(made.levels)


def test_strided_steps_land_on_every_level_and_are_as_many_as_asked() -> None:
    for levels in ((0, 5, 6, 12, 25), (5, 12), (3,)):
        least = len(set(levels) - {min(levels)}) + 1
        for number in range(least, 50 - min(levels) + 1):
            steps = DiffHEG(8, 50, 8, 6.0, 2.0, levels=levels, sampling_steps=number)._steps
            assert len(steps.times) - (min(levels) > 0) == number
            assert [(0, *steps.times)[place] for place in steps.place(levels)] == list(levels)
        for wrong in (least - 1, 51 - min(levels)):
            with pytest.raises(
                InputError,
                match=f"^sampling_steps: got {wrong}; accepted: integers from {least} to {50 - min(levels)}$",
            ):
                DiffHEG(8, 50, 8, 6.0, 2.0, levels=levels, sampling_steps=wrong)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match=r"^schedule: got 'sine'; accepted: linear, scaled, cosine"):
        DiffHEG(8, 50, 8, 6.0, 2.0, schedule="sine")
    with pytest.raises(InputError, match=r"^clip: got -1.0; accepted: None or a number above 0$"):
        DiffHEG(8, 50, 8, 6.0, 2.0, clip=-1.0)
