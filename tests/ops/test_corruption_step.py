"""The step that is taken where rows are read: with `pair_update` of the rest it is the loss, then the update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.catalogue import REDUCTIONS, ROW_METHODS
from dhns_fast.errors import InputError
from dhns_fast.ops import build
from dhns_fast.ops.corruption import corruption_loss
from dhns_fast.ops.corruption_step import corruption_step
from dhns_fast.ops.rowwise import pair_update
from dhns_fast.reference import loss as reference
from dhns_fast.reference import optim as reference_optim

RULE: dict[str, Any] = {"rate": 0.03, "beta1": 0.9, "beta2": 0.99, "correction": 1.7, "epsilon": 1e-3, "n3": 0.05}
STREAM = {"seed": 0, "number": 1, "row_offset": 0}
OFFSET, TEMPERATURE = 1.0, 0.5
BACKENDS = ["eager"] + ["cpu"] * (not build.why_not("cpu"))
# One of everything; ragged, rows with many queries; rows that most queries do not meet; more rows than the cache holds.
SHAPES = [(1, 1, 1, 2), (9, 6, 5, 10), (13, 3, 4000, 130), (6, 4, 9000, 64)]
NATIVE = pytest.mark.skipif(len(BACKENDS) == 1, reason="no compiler")


def case(method: str, B: int, N: int, E: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(B + E)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "table": draw(E, D),
        "first": draw(*((E,) if method == "rowwise-adagrad" else (E, D))).abs(),
        "second": draw(E, D).abs() if method == "lazy-adam" else None,
        "query": draw(B, D),
        "ids": torch.randint(E, (B, 1 + N), generator=g),
        "others": torch.randint(E, (B // 2,), generator=g),
    }


def stepped(backend: str, method: str, reduction: str, given: dict[str, Any], rule: dict[str, Any] = RULE) -> Any:
    """Loss, its gradient in query and slopes, then all that has moved; and the rest."""
    given = {name: None if x is None else x.clone() for name, x in given.items()}
    options = reduction, OFFSET, TEMPERATURE, method, *rule.values()
    loss, by_query, slope, rest = corruption_step(*given.values(), *options, backend)
    states = given["table"], given["first"], given["second"]
    pair_update(
        *states, [given["query"]], [rest], [slope], reduction, [], [], method, *rule.values(), *STREAM.values(), backend
    )
    return [loss, by_query, slope, *(x for x in states if x is not None)], rest


def apart(method: str, reduction: str, given: dict[str, Any], rule: dict[str, Any] = RULE) -> list[Tensor]:
    """The same by `corruption_loss` and `pair_update` of all pairs."""
    table, first, second, query, ids, _ = (None if x is None else x.clone() for x in given.values())
    loss, by_query, slope, _ = corruption_loss(query, table, ids, reduction, OFFSET, TEMPERATURE, "cpu")
    pair_update(
        table,
        first,
        second,
        [query],
        [ids],
        [slope],
        reduction,
        [],
        [],
        method,
        *rule.values(),
        *STREAM.values(),
        "cpu",
    )
    return [loss, by_query, slope, *(x for x in (table, first, second) if x is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_oracle(backend: str, method: str, reduction: str, shape: tuple[int, int, int, int]) -> None:
    """Autograd through the reference of the loss, then the reference of the update, in float64."""
    given = case(method, *shape, torch.float64)
    query, ids = given["query"], given["ids"]
    table, leaf = given["table"].clone().requires_grad_(), query.clone().requires_grad_()
    loss = reference.corruption_loss(leaf, table, ids[:, 0], ids[:, 1:], reduction, OFFSET, TEMPERATURE)
    loss.backward()
    assert table.grad is not None
    touched = ids.unique()
    states = [None if given[name] is None else given[name].clone() for name in ("table", "first", "second")]
    reference_optim.row_update(*states, touched, table.grad[touched], method, **RULE)
    want = [loss.detach(), leaf.grad, *(x for x in states if x is not None)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        narrow = {name: x if x is None or x.dtype == torch.int64 else x.to(dtype) for name, x in given.items()}
        got, rest = stepped(backend, method, reduction, narrow)
        del got[2]
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max().item())
        waits = torch.isin(ids, given["others"])
        assert torch.equal(rest, ids.where(waits, torch.tensor(-1)))


@NATIVE
@pytest.mark.parametrize("n3", [0.0, 0.05])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ROW_METHODS)
def test_bits_are_those_of_loss_and_update(method: str, reduction: str, n3: float) -> None:
    threads, rule = torch.get_num_threads(), RULE | {"n3": n3}
    for shape in SHAPES:
        given = case(method, *shape, torch.float32)
        want = apart(method, reduction, given, rule)
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                got, _ = stepped("cpu", method, reduction, given, rule)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (shape, count)
        finally:
            torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused() -> None:
    given = case("adagrad", 3, 2, 7, 6, torch.float32)
    options = {"reduction": "l1", "offset": OFFSET, "temperature": TEMPERATURE, "method": "adagrad", **RULE}
    before = given["table"].clone()
    for changes, message in (
        ({"reduction": "l3"}, "reduction: got 'l3'"),
        ({"method": "adam"}, "method: got 'adam'"),
        ({"second": given["first"]}, "second: got a tensor"),
        ({"query": given["query"][:, :5]}, "table: got shape|query: got shape"),
        ({"query": given["query"].double()}, "table: got torch.float32|query: got torch.float64"),
        ({"ids": given["ids"].int()}, "ids: got torch.int32"),
        ({"ids": given["ids"] - 8}, "answer, corrupt: got indices from"),
        ({"others": given["others"] + 7}, "others: got indices from"),
        ({"others": given["others"].int()}, "others: got torch.int32"),
        ({"others": given["others"][None]}, "others: got shape"),
        ({"table": given["table"].T.contiguous().T}, "table: got strides"),
        ({"table": given["table"].bfloat16()}, "table: got torch.bfloat16|table: got torch.float32"),
    ):
        for backend in BACKENDS:
            with pytest.raises(InputError, match=message):
                corruption_step(**(given | options | changes), backend=backend)
    assert torch.equal(given["table"], before)
