"""The oracle against its committed answers, and against the paper's statements computed in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fixtures.cases import BEHAVIOURS, KINDS, Case, relative
from fixtures.make import FOLDER, make

from dhns_fast.reference import diffusion as reference


@pytest.mark.parametrize("kind", KINDS)
def test_committed_answers(kind: str) -> None:
    committed, made = np.load(FOLDER / f"{kind}.npz"), make(kind)
    assert set(committed.files) == set(made)
    answers = [name for name in made if name.startswith(BEHAVIOURS)]
    for name in made.keys() - answers:
        np.testing.assert_array_equal(made[name], committed[name], err_msg=name)
    for name in answers:
        assert relative(torch.from_numpy(made[name]), torch.from_numpy(committed[name])) < 2e-7, name


def test_schedule() -> None:
    beta, alpha, bar = reference.schedule(50)
    assert (beta[0].item(), beta[-1].item()) == pytest.approx((1e-4, 0.02))
    assert beta.diff().tolist() == pytest.approx([(0.02 - 1e-4) / 49] * 49)
    assert bar[-1].item() == pytest.approx(math.prod(alpha.tolist()))
    assert bar[-1].item() == pytest.approx(0.60, abs=5e-3)
    assert reference.default_levels(50) == (0, 5, 6, 12, 25)


def test_time_enters_as_sines_then_cosines() -> None:
    encoding = reference.positional_encoding(torch.tensor([3, 50]), 6, torch.float64)
    frequencies = [1.0, 10000**-0.5, 1e-4]
    expected = [[g(t * f) for g in (math.sin, math.cos) for f in frequencies] for t in (3, 50)]
    assert relative(encoding, torch.tensor(expected, dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_condition_is_the_models_query(kind: str, behaviour: str) -> None:
    """A tail is generated where the model looks for it, but for the swapped signs of the release's TransE; computed in
    complex numbers.
    """
    case = Case.make(kind, behaviour)
    h, r, t = case.embeddings
    as_complex = lambda x: torch.complex(*x.chunk(2, -1))  # noqa: E731
    as_real = lambda x: torch.cat([x.real, x.imag], -1)  # noqa: E731
    swapped = -1 if behaviour == "release" else 1
    if kind == "rotate":
        relation_range = case.weights["denoiser.scoring_module.rel_embedding_range"].item()
        turn = torch.exp(1j * math.pi / relation_range * r)
    elif kind == "complex":
        turn = as_complex(r)
    if kind in ("rotate", "complex"):
        tail, head = as_real(as_complex(h) * turn), as_real(as_complex(t) * turn.conj())
    else:
        tail, head = (h * r, t * r) if kind == "distmult" else (h + swapped * r, t - swapped * r)
    options = case._options
    assert relative(reference.condition(entity=h, relation=r, mode="tail", **options), tail) < 1e-14
    assert relative(reference.condition(entity=t, relation=r, mode="head", **options), head) < 1e-14


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_levels_are_states_of_the_chain(behaviour: str) -> None:
    """The deepest two levels by hand: one step from x_T, and a second one from its result."""
    case = Case.make("distmult", behaviour, T=2, B=3)
    (hard_h, easy_h), (hard_t, easy_t) = case.oracle_sample((0, 1))
    beta = [1e-4, 0.02]
    bar = [1 - beta[0], (1 - beta[0]) * (1 - beta[1])]
    c_tail, c_head = case.h * case.r, case.t * case.r

    def step(x: torch.Tensor, t: int, c: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        noise = reference.predict_noise(case.weights, x, torch.full((3,), t), c)
        x = (x - beta[t - 1] / math.sqrt(1 - bar[t - 1]) * noise) / math.sqrt(1 - beta[t - 1])
        return x if z is None else x + math.sqrt(beta[t - 1]) * z

    tail = step(case.x_T, 2, c_tail, case.tail[0])
    head = step(tail if behaviour == "release" else case.x_T_head, 2, c_head, case.head[0])
    assert relative(easy_t, tail) < 1e-14
    assert relative(easy_h, head) < 1e-14
    last = step(tail, 1, c_tail, None)
    assert relative(hard_t, last) < 1e-14
    assert relative(hard_h, step(last if behaviour == "release" else head, 1, c_head, None)) < 1e-14


def test_corrected_loss_reaches_the_generator_alone() -> None:
    for behaviour, flows in (("release", True), ("corrected", False)):
        case = Case.make("rotate", behaviour).requires_grad()
        gradients = case.gradients(case.oracle_loss())
        assert [gradients[name] is not None for name in "hrt"] == [flows] * 3
        assert gradients["denoiser.output_layer.weight"] is not None
