"""The diffusion loss and all its gradients against autograd through the definition, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dhns_fast.diffusion.denoiser import Denoiser
from dhns_fast.diffusion.folding import fold
from dhns_fast.errors import BackendUnavailableError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import diffusion_loss as operator
from dhns_fast.ops.diffusion_loss import diffusion_loss
from dhns_fast.reference import diffusion as reference

T = 5


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.preferring(request.param):
        yield request.param


def case(rows: tuple[int, ...], D: int, dtype: torch.dtype = torch.float64) -> tuple[Denoiser, list[Tensor]]:
    torch.manual_seed(D)
    net = Denoiser(D, None).to(dtype)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    noisy, condition = (torch.randn(*rows, D, dtype=dtype, requires_grad=True) for _ in range(2))
    # One noise, one timestep and one weight for both sides, as the sampler gives them.
    noise, timesteps, weight = (
        torch.randn(*rows[1:], D, dtype=dtype),
        torch.randint(1, T + 1, rows[1:]),
        torch.rand(rows[1:], dtype=dtype),
    )
    return net, [noisy, condition, noise, timesteps, weight]


def by_definition(net: Denoiser, given: list[Tensor]) -> Tensor:
    noisy, condition, noise, timesteps, weight = given
    weights = {f"denoiser.{name}": value for name, value in net.named_parameters()}
    D = noisy.shape[-1]
    predicted = reference.predict_noise(
        weights, noisy.reshape(-1, D), timesteps.expand(noisy.shape[:-1]).flatten(), condition.reshape(-1, D)
    )
    return ((noise - predicted.view_as(noisy)).abs().mean(-1) * weight).sum()


def gradients(loss: Tensor, net: Denoiser, given: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(2 * loss, [*net.parameters(), *given[:2]]))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


# More rows than a block, a ragged last block, one row; the narrowest width.
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("rows", "D"), [((2, 2, 7), 10), ((2, 1, 1), 4), ((2, 3, 70), 36), ((2, 3, 200), 16)])
def test_loss_and_gradients(rows: tuple[int, ...], D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_CPU_BLOCK_ELEMENTS", 1)
    net, given = case(rows, D)
    loss, expected = diffusion_loss(*given, fold(net, T), "ieee"), by_definition(net, given)
    assert relative(loss.detach(), expected.detach()) < 1e-12
    for found, truth in zip(gradients(loss, net, given), gradients(expected, net, given), strict=True):
        assert relative(found, truth) < 1e-9


# The gradient of |error| is a sign: rounding that turns one of 2432 moves a weight's gradient by several per cent of
# its norm.
@pytest.mark.parametrize(("precision", "tolerance", "of_gradients"), [("ieee", 1e-5, 1e-4), ("bf16", 0.01, 0.2)])
def test_float32_and_bf16(precision: str, tolerance: float, of_gradients: float) -> None:
    net, given = case((2, 2, 19), 32)
    expected = by_definition(net, given)
    truths = gradients(expected, net, given)
    net, given = (
        net.float(),
        [x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given],
    )
    loss = diffusion_loss(*given, fold(net, T), precision)
    assert relative(loss.detach(), expected.detach()) < tolerance
    for found, truth in zip(gradients(loss, net, given), truths, strict=True):
        assert relative(found, truth) < of_gradients


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wanted", ["weights", "inputs", "nothing"])
def test_only_the_gradients_that_are_wanted(wanted: str) -> None:
    net, given = case((2, 1, 6), 8)
    expected = by_definition(net, given)
    truths = dict(
        zip(
            [*(n for n, _ in net.named_parameters()), "noisy", "condition"],
            gradients(expected, net, given),
            strict=True,
        )
    )
    net.requires_grad_(wanted == "weights")
    given = [x.detach().requires_grad_(wanted == "inputs" and k < 2) for k, x in enumerate(given[:3])] + given[3:]
    loss = diffusion_loss(*given, fold(net, T), "ieee")
    assert relative(loss.detach(), expected.detach()) < 1e-12
    if wanted == "nothing":
        assert not loss.requires_grad
        return
    (2 * loss).backward()
    found = {"noisy": given[0].grad, "condition": given[1].grad, **{name: w.grad for name, w in net.named_parameters()}}
    for name, grad in found.items():
        assert (grad is not None) == ((name in ("noisy", "condition")) == (wanted == "inputs"))
        assert grad is None or relative(grad, truths[name]) < 1e-9


def flat_case(N: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Every tensor of the operator."""
    net, given = case((1, N), D, dtype)
    folded = fold(net, T)
    weights = (*folded[:3], *folded.time_moments, *folded[4:])
    return [x.detach() for x in (*(g.view(-1, D) for g in given[:3]), *(g.view(-1) for g in given[3:]), *weights)]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given, before = flat_case(1000, 12, torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(operator.OPERATOR(*given, "ieee", True, True, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_no_rows_lose_nothing(backend: str) -> None:
    loss, *grads = operator.OPERATOR(*flat_case(0, 6), "ieee", True, True, backend)
    assert loss == 0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_so_everywhere(value: float) -> None:
    given = flat_case(5, 6)
    given[0][2, 3] = value
    found, expected = (operator.OPERATOR(*given, "ieee", True, True, name) for name in ("cpu", "eager"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-9, atol=1e-12)


def test_strided_inputs_are_read_as_they_are(backend: str) -> None:
    given = flat_case(7, 6)
    expected = operator.OPERATOR(*given, "ieee", True, True, backend)
    strided = [x.t().contiguous().t() if x.ndim == 2 else x.repeat_interleave(2)[::2] for x in given]
    for a, b in zip(operator.OPERATOR(*strided, "ieee", True, True, backend), expected, strict=True):
        assert torch.equal(a, b)


def test_bf16_products_are_not_of_the_cpu_backend() -> None:
    with pytest.raises(BackendUnavailableError, match="'ieee', not 'bf16'"):
        operator.OPERATOR(*flat_case(2, 4), "bf16", False, False, "cpu")


def test_operator_is_registered_soundly() -> None:
    net, given = case((6,), 6)
    given[2:] = [
        torch.randn(6, 6, dtype=torch.float64),
        torch.randint(1, T + 1, (6,)),
        torch.rand(6, dtype=torch.float64),
    ]
    folded = fold(net, T)
    weights = [w.detach().requires_grad_() for w in (*folded[:3], *folded.time_moments, *folded[4:])]
    torch.library.opcheck(torch.ops.dhns_fast.diffusion_loss.default, (*given, *weights, "ieee", True, True))


def test_compiles_into_one_graph() -> None:
    net, given = case((2, 1, 5), 8)

    def step(*given: Tensor) -> Tensor:
        return diffusion_loss(*given, fold(net, T), "ieee") * 2  # type: ignore[arg-type]

    expected, found = step(*given), torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert relative(found.detach(), expected.detach()) < 1e-12
    for a, b in zip(gradients(found, net, given), gradients(expected, net, given), strict=True):
        assert relative(a, b) < 1e-9
