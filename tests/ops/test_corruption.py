"""The fused corruption loss against the gathered form in float64: value, every gradient, memory, and what must be
refused.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.loss import REDUCTIONS, corruption_loss
from dhns_fast.ops import backend as backends
from dhns_fast.reference import loss as reference

REASON = backends.CPU.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")


def case(B: int, N: int, E: int, D: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(B + N + D)
    query, table = (torch.randn(n, D, generator=g, dtype=torch.float64).mul(0.5).to(dtype) for n in (B, E))
    return {
        "query": query.requires_grad_(),
        "table": table.requires_grad_(),
        "answer": torch.randint(E, (B,), generator=g),
        "corrupt": torch.randint(E, (B, N), generator=g),
    }


def run(function: Any, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    value = function(**arguments, **options)
    return [value.detach(), *torch.autograd.grad(3 * value, (arguments["query"], arguments["table"]))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("B", "N", "E", "D"), [(1, 1, 1, 2), (5, 3, 7, 6), (17, 64, 300, 38), (40, 9, 11, 130)])
def test_agrees_with_the_gathered_form(
    reduction: str, B: int, N: int, E: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"reduction": reduction, "offset": 2.5, "temperature": 0.8}
    want = run(reference.corruption_loss, case(B, N, E, D), **options)
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(math.nan))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = run(corruption_loss, case(B, N, E, D, dtype), backend="cpu", **options)
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("B", "N", "E", "D"), [(1, 1, 1, 2), (5, 3, 7, 6), (17, 300, 90, 38)])
def test_shared_corruptions_are_those_of_each_query(
    reduction: str, scaled: bool, B: int, N: int, E: int, D: int
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "offset": 2.5, "temperature": 0.8}
    exclude = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.3

    def arguments(dtype: torch.dtype) -> dict[str, Any]:
        scale = (
            {"scale": torch.rand(B, D, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()}
            if scaled
            else {}
        )
        return case(B, N, E, D, dtype) | scale

    def of_each(**options: Any) -> Tensor:
        """Row by row without what is left out; a query without any corruption left loses by its positive alone."""
        losses = []
        for b in range(B):
            own = {name: options[name][b : b + 1] for name in ("query", "answer", *(["scale"] if scaled else []))}
            ids = options["corrupt"][0][~exclude[b]][None]
            rest = {name: options[name] for name in ("table", "reduction", "offset", "temperature")}
            losses.append(reference.corruption_loss(**own, **rest, corrupt=ids))
        return torch.stack(losses).mean()

    def run_all(function: Any, given: dict[str, Any], **more: Any) -> list[Tensor]:
        value = function(**given, **options, **more)
        return [value.detach(), *torch.autograd.grad(3 * value, [x for x in given.values() if x.requires_grad])]

    want = run_all(of_each, arguments(torch.float64))
    for dtype, backend, tolerance in (
        (torch.float64, None, 1e-12),
        (torch.float64, "eager", 1e-12),
        (torch.float32, "cpu", 2e-5),
    ):
        given = arguments(dtype)
        got = run_all(corruption_loss, given | {"corrupt": given["corrupt"][0]}, exclude=exclude, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


def test_a_scale_with_corruptions_of_each_query() -> None:
    arguments = case(5, 3, 7, 6)
    scale = torch.rand(5, 6, dtype=torch.float64)
    value = corruption_loss(**arguments, reduction="l1", scale=scale)
    torch.testing.assert_close(
        value, reference.corruption_loss(**arguments, reduction="l1", scale=scale), rtol=1e-14, atol=0
    )
    with pytest.raises(BackendUnavailableError, match=r"^backend 'cpu': it takes no scale$"):
        corruption_loss(**arguments, reduction="l1", scale=scale, backend="cpu")
    # Scores of shared corruptions are compiled for float32 alone.
    with pytest.raises(BackendUnavailableError, match="cpu"):
        corruption_loss(**arguments | {"corrupt": arguments["corrupt"][0]}, backend="cpu")


@pytest.mark.parametrize("reduction", ["l1", "l2", "complex_l1"])
def test_distance_of_zero_has_a_gradient_of_zero(reduction: str) -> None:
    table = torch.ones(3, 4, requires_grad=True)
    query = torch.ones(2, 4, requires_grad=True)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    loss = corruption_loss(query, table, ids[:, 0], ids, reduction, backend="cpu")
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (query, table)))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_extreme_scores_do_not_overflow(backend: str) -> None:
    query, table = torch.ones(2, 1, requires_grad=True), torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    answer, corrupt = torch.tensor([0, 1]), torch.tensor([[1, 2], [0, 2]])
    # The first triple: ½·(softplus(−1e4) + ½·ln 2) of 2; the second, told the wrong way round: ½·(1e4 + ½·1e4 + ½·ln 2)
    # of 2.
    value = corruption_loss(query, table, answer, corrupt, temperature=0.0, backend=backend)
    assert value.item() == pytest.approx(0.25 * (1e4 + 0.5e4 + math.log(2)), rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (query, table)))


@pytest.mark.parametrize("reduction", ["dot", "l2"])
def test_gradcheck(reduction: str) -> None:
    arguments = case(3, 4, 5, 4)
    ids = arguments["answer"], arguments["corrupt"]
    # The self-adversarial weights are detached: with temperature 0 they are constant, and the numerical gradient is
    # that of the formula.
    function = lambda q, e: corruption_loss(q, e, *ids, reduction, temperature=0.0, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(function, (arguments["query"], arguments["table"]))


def test_threads_do_not_change_the_result() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                run(corruption_loss, case(50, 16, 40, 64, torch.float32), reduction="complex_l1", backend="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_contract() -> None:
    arguments = case(5, 3, 7, 6, torch.float32)
    ids = torch.cat((arguments["answer"][:, None], arguments["corrupt"]), 1)
    torch.library.opcheck(
        torch.ops.dhns_fast.corruption_loss.default,
        (arguments["query"], arguments["table"], ids, "dot", 0.0, 0.5, "cpu"),
    )
    compiled = torch.compile(corruption_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, arguments), run(corruption_loss, arguments), strict=True):
        assert torch.equal(a, b)
    # Numbers that change from call to call, as a margin with a schedule does.
    for offset in (1.0, 2.0, 3.5):
        found, expected = (
            loss(**arguments, offset=offset, temperature=offset / 4) for loss in (compiled, corruption_loss)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "l3"}, "reduction: got 'l3'; accepted: dot, l2, l1, complex_l1"),
        ({"table": torch.zeros(7, 5)}, r"table: got shape \[7, 5\]; accepted: \[E, D = 6\]"),
        ({"answer": torch.zeros(4, dtype=torch.int64)}, r"answer: got shape \[4\]; accepted: \[B = 5\]"),
        ({"corrupt": torch.zeros(5, 2)}, r"corrupt: got torch.float32 \[5, 2\]; accepted: torch.int64"),
        ({"corrupt": torch.full((5, 2), 7)}, "answer, corrupt: got indices from 0 to 7; accepted: 0 to 6"),
        ({"answer": torch.tensor([0, 1, -1, 2, 3])}, "answer, corrupt: got indices from -1"),
        ({"corrupt": torch.tensor([0, 7])}, "corrupt: got indices from 0 to 7; accepted: 0 to 6"),
        ({"scale": torch.zeros(5, 3)}, r"scale: got shape \[5, 3\]; accepted: \[B = 5, D = 6\]"),
        (
            {"exclude": torch.zeros(5, 3, dtype=torch.bool)},
            "exclude: got a mask with corruptions of each query; accepted: one with corruptions of all",
        ),
        (
            {"corrupt": torch.tensor([0, 1]), "exclude": torch.zeros(5, 2)},
            r"exclude: got torch.float32 \[5, 2\]; accepted: torch.bool",
        ),
        (
            {"corrupt": torch.tensor([0, 1]), "exclude": torch.zeros(5, 3, dtype=torch.bool)},
            r"exclude: got shape \[5, 3\]; accepted: \[B = 5, N = 2\]",
        ),
        (
            {"query": torch.full((5, 6), math.inf)},
            r"query: got 30 values that are not finite, the first inf at \[0, 0\]; accepted: finite values",
        ),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    arguments = case(5, 3, 7, 6, torch.float32)
    arguments["corrupt"][0, 0] = 0
    with pytest.raises(InputError, match=message):
        corruption_loss(**{**arguments, **change}, backend="cpu")
