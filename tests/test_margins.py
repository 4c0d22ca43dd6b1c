"""Margin schedules: their values, their gradients through every backend, and what learning does to them."""

from __future__ import annotations

import pytest
import torch

from dhns_fast.errors import InputError
from dhns_fast.loss import hal_from_embeddings, hardness_adaptive_loss
from dhns_fast.margins import MARGIN_SCHEDULES, LearnedMargins
from dhns_fast.ops import backend as backends
from dhns_fast.reference import loss as reference

LEVELS, TABLE, WEIGHTS, T = [0, 5, 6, 12, 25], [0.1, 0.3, 0.5, 0.7, 0.9], [0.0, 0.5, 1.0, 1.0, 0.5], 50
BACKENDS = ["eager", *(["cpu"] if backends.CPU.why_not(torch.device("cpu")) is None else [])]


def signal(level: int) -> float:
    """1 − √ᾱ after `level` steps of the schedule from 1e-4 to 0.02."""
    left = 1.0
    for i in range(level):
        left *= 1 - (1e-4 + (0.02 - 1e-4) * i / (T - 1))
    return 1 - left**0.5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("table", TABLE),
        ("linear", [0.1 + 0.8 * s / 25 for s in LEVELS]),
        ("signal", [0.1 + 0.8 * signal(s) / signal(25) for s in LEVELS]),
        ("learned", TABLE),
    ],
)
def test_values(name: str, values: list[float]) -> None:
    schedule = MARGIN_SCHEDULES[name]
    assert schedule(LEVELS, TABLE, [1.0] * 5, T)().tolist() == pytest.approx(values, rel=1e-6)
    # A level of weight 0 has none, and is an end of the interpolation all the same.
    assert schedule(LEVELS, TABLE, WEIGHTS, T)().tolist() == pytest.approx(values[1:], rel=1e-6)
    assert schedule([3, 3], [0.2, 0.4], [1.0, 1.0], 4)().tolist() == pytest.approx(
        [0.2, 0.4 if name in ("table", "learned") else 0.2]
    )


@pytest.mark.parametrize("name", MARGIN_SCHEDULES)
def test_only_what_is_learned_is_kept_in_checkpoints(name: str) -> None:
    margins = MARGIN_SCHEDULES[name](LEVELS, TABLE, WEIGHTS, T)
    assert (
        set(margins.state_dict())
        == set(dict(margins.named_parameters()))
        == ({"logits"} if name == "learned" else set())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_learned_margins(backend: str) -> None:
    L, M, B, D = 4, 2, 5, 6
    g = torch.Generator().manual_seed(0)
    head, relation, tail = torch.randn(3, B, D, generator=g, dtype=torch.float64)
    made = torch.randn(2, L, M, B, D, generator=g, dtype=torch.float64)
    positive, negative = (
        torch.randn(B, generator=g, dtype=torch.float64),
        torch.randn(L, 3, B, generator=g, dtype=torch.float64),
    )
    weight = torch.tensor(WEIGHTS[1:], dtype=torch.float64)
    margins = LearnedMargins(LEVELS, TABLE, WEIGHTS, T).double()
    for ours, theirs, inputs in (
        (hal_from_embeddings, reference.hal_from_embeddings, ("transe", head, relation, tail, *made)),
        (hardness_adaptive_loss, reference.hardness_adaptive_loss, (positive, negative)),
    ):
        (got,) = torch.autograd.grad(ours(*inputs, margins() * 6.0, weight, backend=backend), margins.logits)
        (want,) = torch.autograd.grad(theirs(*inputs, margins() * 6.0, weight), margins.logits)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        assert want.any()


def test_learning_makes_levels_push_equally_and_keeps_the_sum() -> None:
    g = torch.Generator().manual_seed(1)
    positive, negative = (
        torch.randn(20, generator=g),
        torch.randn(4, 3, 20, generator=g) - torch.arange(4.0).view(4, 1, 1) / 2,
    )
    margins, weight = LearnedMargins(LEVELS, TABLE, WEIGHTS, T), [1.0, 1.0, 1.0, 1.0]
    optimizer = torch.optim.Adam(margins.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        hardness_adaptive_loss(positive, negative, margins() * 3.0, weight, mu=1.0).backward()
        optimizer.step()
    factors = margins().detach()
    assert factors.sum().item() == pytest.approx(2.4, rel=1e-6)
    push = torch.sigmoid(factors.view(4, 1, 1) * 3.0 + negative).mean((1, 2))
    torch.testing.assert_close(push, push.mean().expand(4), rtol=1e-3, atol=0)


def test_refused() -> None:
    with pytest.raises(InputError, match="levels, factors, weights: got 5, 4 and 5; accepted: one of each a level"):
        MARGIN_SCHEDULES["table"](LEVELS, TABLE[1:], WEIGHTS, T)
    with pytest.raises(
        InputError, match=r"factors: got \[0.0, .*\]; accepted: numbers above 0 at the levels of weight > 0"
    ):
        LearnedMargins(LEVELS, [0.0, 0.0, 0.5, 0.7, 0.9], WEIGHTS, T)
