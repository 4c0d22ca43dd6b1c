"""Row tables and their optimisers: torch's own as the truth, states, checkpoints, gradients that do not belong here,
host-resident tables.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.errors import InputError
from dhns_fast.loss import corruption_loss
from dhns_fast.ops import build
from dhns_fast.optim import (
    ROW_OPTIMIZERS,
    HostEmbedding,
    LazyAdam,
    RowAdagrad,
    RowEmbedding,
    RowOptimizer,
    RowwiseAdagrad,
    Together,
    optimizer_for,
)

E, D = 40, 6


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randint(E, (5, 3), generator=g), torch.randn(5, 3, D, generator=g, dtype=torch.float64))
        for _ in range(count)
    ]


def train(table: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, every: bool = False) -> Tensor:
    for ids, weight in batches(count):
        optimizer.zero_grad()
        # Two look-ups a step, with rows in common.
        loss = (table(ids).double() * weight).pow(2).sum() + table(ids[:, 0]).double().sum()
        if every:
            loss = loss + 1e-3 * table(torch.arange(E)).double().pow(2).sum()
        loss.backward()
        optimizer.step()
    return table.weight.detach().double()


@pytest.mark.parametrize(
    ("ours", "theirs", "every"),
    [
        (lambda t: LazyAdam([t], lr=0.05), lambda w: torch.optim.Adam([w], lr=0.05), True),
        (lambda t: RowAdagrad([t], lr=0.05), lambda w: torch.optim.Adagrad([w], lr=0.05), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_updates_are_torchs(ours: object, theirs: object, every: bool, dtype: torch.dtype) -> None:
    start = torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = nn.Embedding.from_pretrained(start.clone(), freeze=False)
    want = train(dense, theirs(dense.weight), every=every)  # type: ignore[operator]
    table = RowEmbedding(E, D, weight=start.to(dtype))
    got = train(table, ours(table), every=every)  # type: ignore[operator]
    assert (got - want).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert table.weight.grad is None


@pytest.mark.parametrize("place", ["first", "between", "last", "after a pass that is not taken"])
def test_zero_grad_forgets_what_torchs_forgets(place: str) -> None:
    start, results = torch.randn(E, D), []
    for kind in (nn.Embedding, RowEmbedding):
        if kind is RowEmbedding:
            table: Any = RowEmbedding(E, D, weight=start.clone())
            optimizer: torch.optim.Optimizer = RowAdagrad([table], lr=0.1)
        else:
            table = nn.Embedding.from_pretrained(start.clone(), freeze=False)
            optimizer = torch.optim.Adagrad([table.weight], lr=0.1)
        for ids, _ in batches():
            if place == "first":
                optimizer.zero_grad()
            rows = table(ids)
            loss = rows.pow(2).sum() + rows[:, 0].sum() + table(ids[:, 0]).sum()
            if place == "between":
                optimizer.zero_grad()
            elif place.startswith("after"):
                loss.backward(retain_graph=True)
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if place == "last":
                optimizer.zero_grad()
        results.append(table.weight.detach())
    assert (results[0] - start).abs().max() > 0.1
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_passes_through_one_look_up_add_up_until_a_step() -> None:
    table = RowEmbedding(E, D)
    rows = table(torch.tensor([3, 5]))
    for factor in (1.0, 2.0):
        (factor * rows).sum().backward(retain_graph=True)
    [(ids, gradient)] = table.take()
    assert ids.tolist() == [3, 5]
    assert torch.equal(gradient, torch.full((2, D), 3.0))
    rows.sum().backward()
    assert torch.equal(table.take()[0][1], torch.ones(2, D))
    # A share of nothing has a loss all the same.
    table(torch.tensor([], dtype=torch.int64)).sum().backward()
    assert table.take() == []
    # In the order of the look-ups, which a sum's bits depend on, whatever the order of the passes.
    losses = [table(torch.tensor([i])).sum() for i in range(3)]
    for loss in reversed(losses):
        loss.backward()
    assert [int(ids) for ids, _ in table.take()] == [0, 1, 2]


@pytest.mark.parametrize("how", ["frozen", "no_grad"])
def test_a_table_that_is_not_trained_stays(how: str) -> None:
    table = RowEmbedding(200, D)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    before = table.weight.detach().clone()
    query, ids = torch.randn(3, D, requires_grad=True), torch.arange(6).view(3, 2)
    table.weight.requires_grad_(how != "frozen")
    with optimizer.at_once(table, ids[:0, 0]):
        with torch.no_grad() if how == "no_grad" else contextlib.nullcontext():
            loss = corruption_loss(query, table, ids[:, 0], ids[:, 1:]) + table(ids).sum()
        if how == "frozen":
            loss.backward()
            assert query.grad is not None
        optimizer.step()
        assert torch.equal(table.weight, before)
        # What was asked for is still there for the loss that trains.
        table.weight.requires_grad_()
        corruption_loss(query, table, ids[:, 0], ids[:, 1:]).backward()
    optimizer.step()
    assert not torch.equal(table.weight, before)


def test_lazy_adam_leaves_what_it_does_not_touch() -> None:
    table = RowEmbedding(E, D)
    optimizer = LazyAdam([table], lr=0.1)
    before = table.weight.detach().clone()
    for ids in (torch.tensor([1, 2]), torch.tensor([2])):
        table(ids).sum().backward()
        optimizer.step()
    state = optimizer.state[table.weight]
    assert torch.equal(table.weight.detach()[3:], before[3:])
    assert state["first"][1].ne(0).all()
    assert not state["first"][3:].any()
    assert int(state["step"]) == 2


def test_a_table_counts_the_steps_that_it_has_a_gradient_in() -> None:
    first, second = RowEmbedding(E, D), RowEmbedding(E, D)
    optimizer = LazyAdam([first, second], lr=0.1)
    dense = torch.nn.Parameter(second.weight.detach().clone())
    adam = torch.optim.Adam([dense], lr=0.1)
    for number in range(6):
        loss = first(torch.arange(E)).sum()
        if number == 4:
            loss = loss + second(torch.arange(E)).pow(3).sum()
            dense.pow(3).sum().backward()
            adam.step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(second.weight.detach(), dense.detach())
    assert [int(optimizer.state[table.weight]["step"]) for table in (first, second)] == [6, 1]


def test_rowwise_adagrad_has_one_number_a_row() -> None:
    table = RowEmbedding(E, D, torch.float64)
    optimizer = RowwiseAdagrad([table], lr=0.1, eps=1e-10)
    want = table.weight.detach().clone()
    table(torch.tensor([4])).mul(torch.arange(D)).sum().backward()
    optimizer.step()
    g = torch.arange(D, dtype=torch.float64)
    want[4] -= 0.1 * g / (g.pow(2).mean().sqrt() + 1e-10)
    assert torch.allclose(table.weight.detach(), want, rtol=0, atol=1e-12)
    assert optimizer.state[table.weight]["first"].shape == (E,)


def test_n3_joins_the_gradient_of_touched_rows() -> None:
    start = torch.randn(E, D, dtype=torch.float64)
    touched = torch.unique(torch.cat([ids.flatten() for ids, _ in batches(1)]))
    dense = nn.Embedding.from_pretrained(start.clone(), freeze=False)
    optimizer = torch.optim.Adagrad([dense.weight], lr=0.05)
    for ids, weight in batches(1):
        loss = (
            (dense(ids) * weight).pow(2).sum() + dense(ids[:, 0]).sum() + 0.1 * dense.weight[touched].abs().pow(3).sum()
        )
        loss.backward()
        optimizer.step()
    table = RowEmbedding(E, D, weight=start.clone())
    got = train(table, RowAdagrad([table], lr=0.05, n3=0.1), 1)
    assert torch.allclose(got, dense.weight.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(ROW_OPTIMIZERS.values()))
def test_a_restored_optimiser_continues_bit_by_bit(kind: type[LazyAdam]) -> None:
    table = RowEmbedding(E, D, torch.bfloat16)
    optimizer = kind([table], lr=0.05, seed=4)
    train(table, optimizer, 3)
    twin = copy.deepcopy(table)
    other = kind([twin], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[twin.weight]["first"].dtype == torch.float32
    assert torch.equal(train(table, optimizer), train(twin, other))


def changed(**values: Any) -> dict[str, Any]:
    """A state of an optimiser of one table, with other values."""
    state = RowAdagrad([RowEmbedding(4, 4)]).state_dict()
    for name, value in values.items():
        if name in state["state"][0]:
            state["state"][0][name] = torch.as_tensor(value)
        else:
            state["param_groups"][0][name] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: LazyAdam([RowEmbedding(4, 4)]).state_dict(), r"state_dict\['state'\]\[0\]: got step, first, second"),
        (lambda: RowwiseAdagrad([RowEmbedding(4, 4)]).state_dict(), r"\['first'\]: got torch.float32 \[4\]; accepted"),
        (lambda: RowAdagrad([RowEmbedding(1, 4)]).state_dict(), r"\['first'\]: got torch.float32 \[1, 4\]"),
        (lambda: RowAdagrad([RowEmbedding(4, 4, torch.float64)]).state_dict(), r"\['first'\]: got torch.float64"),
        (
            lambda: RowAdagrad([RowEmbedding(4, 4), RowEmbedding(4, 4)]).state_dict(),
            r"state_dict\['param_groups'\]: got groups of \[2\] parameters",
        ),
        (lambda: {**RowAdagrad([RowEmbedding(4, 4)]).state_dict(), "state": {}}, r"\['state'\]: got states of none"),
        (lambda: {"state": {}}, r"state_dict\['param_groups'\]: got nothing"),
        (lambda: changed(lr="x"), r"^state_dict\['param_groups'\]\[.\]\['lr'\]: got 'x'"),
        (lambda: changed(lr=-1), r"\['lr'\]: got -1; accepted: numbers of at least 0"),
        (lambda: changed(eps=0.0), r"\['eps'\]: got 0\.0; accepted: positive"),
        (lambda: changed(betas=(1.0, 0.9)), r"\['betas'\]: got \(1\.0, 0\.9\)"),
        (lambda: changed(betas=None), r"\['betas'\]: got None"),
        (lambda: changed(seed=0.5), r"\['seed'\]: got 0\.5"),
        (lambda: changed(step=-5), r"\['step'\]: got a least value of -5; accepted: values >= 0"),
        (lambda: changed(first=torch.full((4, 4), torch.nan)), r"\['first'\]: got a least value of nan"),
        (lambda: [], "state_dict: got list"),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_state_of_something_else_is_refused(state: Callable[[], Any], message: str, together: bool) -> None:
    table = RowEmbedding(4, 4)
    optimizer: torch.optim.Optimizer = RowAdagrad([table])
    own = optimizer.state[table.weight]
    own["first"].fill_(7)
    given = state()
    if together:
        # The dense part comes first, and must not be loaded either.
        dense = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.5)
        optimizer = Together([dense, optimizer])
        if isinstance(given, dict) and "param_groups" in given:
            groups = [{**dense.state_dict()["param_groups"][0], "lr": 9.0}]
            groups += [{**group, "params": [1 + i for i in group["params"]]} for group in given["param_groups"]]
            given = {"state": {1 + i: x for i, x in given["state"].items()}, "param_groups": groups}
        message = message.replace(r"\[2\]", r"\[1, 2\]")
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(given)
    assert bool((own["first"] == 7).all())
    assert optimizer.param_groups[0]["lr"] in (0.1, 0.5)


def test_copies_train_their_own_tables() -> None:
    table, layer = RowEmbedding(E, D), nn.Linear(D, 1)
    optimizer = optimizer_for("lazy-adam", [table], layer.parameters(), lr=0.1, seed=3)
    ids = torch.tensor([2, 4])
    start = table.weight.detach().clone()
    pairs = [copy.deepcopy((table, layer, optimizer)), pickle.loads(pickle.dumps((table, layer, optimizer)))]
    pairs.append((table, layer, optimizer))
    for own, linear, step in pairs:
        assert torch.equal(own.weight, start)
        linear(own(ids)).sum().backward()
        step.step()
        step.zero_grad()
    assert not torch.equal(table.weight, start)
    for own, linear, step in pairs[:2]:
        assert torch.equal(own.weight, table.weight)
        assert torch.equal(linear.weight, layer.weight)
        assert step.param_groups[0]["seed"] == 3


def test_optimisers_together_are_an_optimiser() -> None:
    table, layer = RowEmbedding(E, D), nn.Linear(D, 1)
    optimizer = optimizer_for("lazy-adam", [table], layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)
    seen: list[torch.optim.Optimizer] = []
    optimizer.register_step_post_hook(lambda it, *_: seen.append(it))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["inside"])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(table(torch.tensor([1, 2]))).square().sum()
        loss.backward()
        return loss

    before = table.weight.detach().clone()
    with torch.no_grad():
        assert optimizer.step(closure) > 0  # type: ignore[arg-type]
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule.step()
    assert all(group["lr"] > rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert seen == [optimizer]
    assert not torch.equal(table.weight, before)
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict({"inside": state})
    assert set(optimizer.state) == {table.weight, layer.weight, layer.bias}
    # What only one part has is no default: a schedule would set it in all groups.
    assert "betas" not in optimizer_for("adagrad", [table], layer.parameters(), lr=0.1).defaults


def test_a_step_that_is_refused_has_moved_nothing() -> None:
    tables, layer = [RowEmbedding(E, D), RowEmbedding(E, D)], nn.Linear(D, 1)
    rows = LazyAdam(tables, lr=0.1)
    both = Together([torch.optim.SGD(layer.parameters(), lr=0.1), rows])
    before = [x.detach().clone() for x in (tables[0].weight, layer.weight)]
    ids = torch.arange(3)

    def whole() -> None:
        tables[1].weight.sum().backward()

    def mixed() -> None:
        for reduction in ("dot", "l1"):
            corruption_loss(torch.randn(3, D), tables[1], ids, ids[:, None], reduction).backward()

    def wide() -> None:
        tables[1].double()

    def replaced() -> None:
        tables[1].weight = nn.Parameter(torch.zeros(E, D))

    def endless() -> None:
        rows.param_groups[0]["lr"] = torch.inf

    for spoil, message in (
        (whole, "^tables: got a gradient of a whole table"),
        (mixed, "^reduction: got 'l1'; accepted: 'dot'"),
        (wide, "^first: got torch.float32"),
        (replaced, "^tables: got a table whose weight has been replaced"),
        (endless, r"^param_groups\[0\]\['lr'\]: got inf; accepted: finite"),
    ):
        layer(tables[0](ids)).sum().backward()
        spoil()
        for optimizer in (rows, both):
            with pytest.raises(InputError, match=message):
                optimizer.step()
        assert torch.equal(tables[0].weight, before[0])
        assert torch.equal(layer.weight, before[1])
        assert int(rows.state[tables[0].weight]["step"]) == 0
        assert len(tables[0].take()) == 1
        both.zero_grad()


def test_look_ups_without_a_gradient_change_nothing() -> None:
    table = RowEmbedding(E, D)
    optimizer = RowwiseAdagrad([table])
    before = table.weight.detach().clone()
    with torch.no_grad():
        table(torch.tensor([0]))
    table(torch.tensor([1]))
    optimizer.step()
    assert not table._touched  # nor are they kept, however many there are
    table(torch.tensor([2])).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(table.weight.detach(), before)


def test_arguments_are_checked() -> None:
    table, start, ids = RowEmbedding(E, D), torch.randn(3, 3), torch.arange(3)
    learned: Any = nn.Parameter(torch.ones(()))
    for make, message in (
        (lambda: LazyAdam([]), "tables: got none"),
        (lambda: LazyAdam([nn.Embedding(2, 2)]), r"tables\[0\]: got Embedding"),  # type: ignore[list-item]
        (lambda: LazyAdam([table], lr=0.0), "lr: got 0.0"),
        (lambda: LazyAdam([table], betas=(1.0, 0.9)), "betas: got"),
        (lambda: RowAdagrad([table], n3=-1.0), "n3: got -1.0"),
        (lambda: LazyAdam(table), "tables: got RowEmbedding; accepted: a list"),  # type: ignore[arg-type]
        (lambda: LazyAdam([table, table]), r"tables\[1\]: got a table that is there already"),
        (lambda: LazyAdam([table], seed=2**63), "seed: got 9223372036854775808"),
        (lambda: LazyAdam([table], seed=0.5), r"seed: got 0\.5"),  # type: ignore[arg-type]
        (lambda: LazyAdam([table], backend="gpu"), "backend: got 'gpu'"),
        (lambda: LazyAdam([table]).add_param_group({"params": [nn.Parameter(start)]}), "param_group: got another"),
        (lambda: LazyAdam([table]).at_once(RowEmbedding(E, D), ids).__enter__(), "table: got another RowEmbedding"),
        (lambda: optimizer_for("adam", [table], [], 0.1), "name: got 'adam'; accepted: lazy-adam, adagrad, rowwise"),
        (lambda: Together([]), "optimizers: got none"),
        (lambda: Together([table]), r"optimizers\[0\]: got RowEmbedding"),  # type: ignore[list-item]
        (lambda: Together([LazyAdam([table])]).add_param_group({"params": []}), "param_group: got another group"),
        (lambda: RowEmbedding(3, 2, weight=torch.zeros(2, 2)), "weight: got shape"),
        (lambda: RowEmbedding(3, 3, torch.int64), "dtype: got torch.int64; accepted: torch.float32"),
        (lambda: RowEmbedding(3, 3, "float32"), "dtype: got 'float32'"),  # type: ignore[arg-type]
        (lambda: RowEmbedding(1, 1, weight=[[1.0]]), "weight: got list"),  # type: ignore[arg-type]
        (lambda: RowEmbedding(1, 1, weight=np.ones((1, 1))), "weight: got ndarray"),  # type: ignore[arg-type]
        (lambda: RowEmbedding(3, 3, weight=start.long()), "weight: got torch.int64"),
        (lambda: RowEmbedding(3, 3, weight=start.half()), "weight: got torch.float16"),
        (lambda: RowEmbedding(3, 3, torch.float32, weight=start.double()), "weight: got torch.float64.*as dtype says"),
        (lambda: RowEmbedding(3, 3, weight=start.t()), r"weight: got strides \[1, 3\]"),
        (lambda: table(torch.tensor([E])), f"^ids: got indices from {E} to {E}"),
        (lambda: table(torch.tensor([0.5])), "^ids: got torch.float32"),
        (lambda: HostEmbedding(E, D, "cpu")(torch.tensor([-1])), "^ids: got indices from -1"),
        (lambda: HostEmbedding(E, D, "cpu")(torch.tensor([0.5])), "^ids: got torch.float32"),
        (lambda: table.against(start, ids[:, None], "dot", learned, 1.0), "^offset: got a tensor"),
        (lambda: LazyAdam([table]).at_once(table, start).__enter__(), "others: got shape"),
        (lambda: HostEmbedding(E, D, "cpu", torch.tensor([1, 1])), "hot: got"),
        (lambda: HostEmbedding(E, D, "cpu", [1]), "hot: got list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            make()


@pytest.mark.parametrize("kind", list(ROW_OPTIMIZERS.values()))
@pytest.mark.parametrize("hot", [None, torch.tensor([7, 3, 39, 0])])
def test_a_host_resident_table_trains_alike(device: torch.device, kind: type[LazyAdam], hot: Tensor | None) -> None:
    start = torch.randn(E, D)
    plain = RowEmbedding(E, D, weight=start.clone()).to(device)
    given = None if hot is None else hot.clone()
    hosted = HostEmbedding(E, D, device, given, weight=start.clone()).to(device)
    if given is not None:
        given.fill_(1)  # the caller's again
    assert hosted.weight.device.type == "cpu"
    for table in (plain, hosted):
        optimizer: RowOptimizer = kind([table], lr=0.05)
        for ids, weight in batches():
            (table(ids.to(device)) * weight.float().to(device)).pow(2).sum().backward()
            optimizer.step()
    want = plain.weight.detach().cpu()
    assert (
        torch.equal(hosted.gathered(), want)
        if device.type == "cpu"
        else torch.allclose(hosted.gathered(), want, atol=1e-5)
    )
    again = HostEmbedding(E, D, device, hot)
    again.load_state_dict(hosted.state_dict())
    ids = torch.arange(E, device=device)
    assert torch.equal(again.look_up(ids), hosted.look_up(ids))
    kind([again]).load_state_dict(optimizer.state_dict())
    if hot is not None:
        with pytest.raises(InputError, match=r"^state_dict\['state'\]\[0\]\['hot_rows'\]: got"):
            kind([HostEmbedding(E, D, device, hot.flip(0))]).load_state_dict(optimizer.state_dict())


def test_optimisers_together_keep_one_state() -> None:
    def make() -> tuple[RowEmbedding, nn.Linear, Together]:
        torch.manual_seed(0)
        table, layer = RowEmbedding(E, D), nn.Linear(D, 1)
        return table, layer, Together([LazyAdam([table], lr=0.05), torch.optim.Adam(layer.parameters(), lr=0.05)])

    def step(table: RowEmbedding, layer: nn.Linear, optimizer: Together) -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(table(torch.tensor([1, 5]))).pow(2).sum().backward()
        optimizer.step()

    one, other = make(), make()
    step(*one)
    state = copy.deepcopy(one[2].state_dict())
    assert sorted(state["state"]) == [0, 1, 2]
    other[2].load_state_dict(state)
    other[0].load_state_dict(one[0].state_dict())
    other[1].load_state_dict(one[1].state_dict())
    step(*one)
    step(*other)
    assert torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(one[1].weight, other[1].weight)


def test_no_name_is_one_of_torch() -> None:
    """Whoever resolves optimisers by name among all subclasses, as PyKEEN does when it is imported, must not find two
    of one name.
    """
    ours = {kind.__name__.lower() for kind in (*ROW_OPTIMIZERS.values(), RowOptimizer, Together)}
    assert not ours & {name.lower() for name in dir(torch.optim)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_a_table_scored_where_it_lies_learns_what_looked_up_rows_do(name: str, reduction: str) -> None:
    g = torch.Generator().manual_seed(5)
    start, weight = torch.randn(E, D, generator=g), torch.randn(4, D, generator=g)
    tables, losses = [], []
    for direct in (True, False):
        table = RowEmbedding(E, D, weight=start.clone())
        optimizer = ROW_OPTIMIZERS[name]([table], lr=0.05)
        g.manual_seed(6)
        for _ in range(4):
            ids = torch.randint(E, (7, 5), generator=g)
            query = table(ids[:, 0]) * weight[ids[:, 1] % 4]
            other = table
            if not direct:
                rows, place = ids[:, 1:].unique(return_inverse=True)
                other, own = table(rows), place
            else:
                own = ids[:, 1:]
            loss = 2 * corruption_loss(query, other, own[:, 0], own[:, 1:], reduction, 1.0, 0.5)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert table.take_pairs() == []
        tables.append(table.weight.detach())
    assert (tables[0] - start).abs().max() > 0.05
    torch.testing.assert_close(tables[0], tables[1], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(torch.stack(losses[:4]), torch.stack(losses[4:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_rows_that_move_at_once_end_where_they_would(name: str, reduction: str) -> None:
    g = torch.Generator().manual_seed(7)
    E = 2000  # rows enough for a state as wide as the table
    start, weight = torch.randn(E, D, generator=g), torch.randn(4, D, generator=g)
    results = []
    for at_once in (True, False):
        table = RowEmbedding(E, D, weight=start.clone())
        optimizer = ROW_OPTIMIZERS[name]([table], lr=0.05, n3=0.01)
        g.manual_seed(8)
        for _ in range(4):
            ids = torch.randint(E, (7, 6), generator=g)
            # The known entities of queries and a penalty of true answers are in the graph too.
            known, answer = ids[:, 0], ids[:, 1]
            query = table(known) * weight[known % 4]
            moving = optimizer.at_once(table, torch.cat((known, answer))) if at_once else contextlib.nullcontext()
            with moving:
                loss = corruption_loss(query, table, answer, ids[:, 2:], reduction, 1.0, 0.5)
            moved = int((table.weight != start).any(1).sum())
            (loss + 0.1 * table(answer).square().sum()).backward()
            if at_once and not build.why_not("cpu"):
                assert moved > 0
            optimizer.step()
        assert table.take_pairs() == []
        results.append((table.weight.detach(), *optimizer.state_dict()["state"][0].values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_that_have_moved_take_no_other_gradient() -> None:
    table = RowEmbedding(E, D)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    query, ids = torch.randn(3, D, requires_grad=True), torch.arange(6).view(3, 2)
    with optimizer.at_once(table, ids[:0, 0]):
        loss = corruption_loss(query, table, ids[:, 0], ids[:, 1:])
    with pytest.raises(InputError, match=r"^loss: got a gradient of 0\.5; accepted: 1, as rows have been moved"):
        (0.5 * loss).backward()
    # Outside of it nothing moves before the step.
    before = table.weight.detach().clone()
    corruption_loss(query, table, ids[:, 0], ids[:, 1:]).backward()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_changes_between_backward_and_step_is_not_read_again(reduction: str) -> None:
    g = torch.Generator().manual_seed(9)
    start, users = torch.randn(E, D, generator=g), torch.randn(5, D, generator=g)
    ids = torch.randint(E, (5, 4), generator=g)
    moved = []
    for changed in (False, True):
        table, query, buffer = RowEmbedding(E, D, weight=start.clone()), nn.Parameter(users.clone()), ids.clone()
        optimizer = RowAdagrad([table], lr=0.1)
        loss = corruption_loss(query, table, buffer[:, 0], buffer[:, 1:], reduction)
        (loss + table.against(query, buffer, reduction, 0.0, 0.5) + table(buffer).square().sum()).backward()
        if changed:
            # As an optimiser of the queries that steps first, and a buffer that the next batch is read into.
            with torch.no_grad():
                query.neg_()
                buffer.zero_()
        optimizer.step()
        moved.append(table.weight.detach())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], start)


def test_rows_have_a_gradient_where_one_is_asked_for() -> None:
    """Not that of the query alone, as to look at its norm."""
    users, ids = torch.randn(2, D, requires_grad=True), torch.tensor([[0, 1], [2, 3]])
    moved = []
    for peeks in (0, 2):
        table = RowEmbedding(E, D, weight=torch.ones(E, D))
        optimizer = RowAdagrad([table], lr=0.1)
        loss = corruption_loss(users.detach().requires_grad_() if not peeks else users, table, ids[:, 0], ids[:, 1:])
        for _ in range(peeks):
            assert torch.autograd.grad(loss, users, retain_graph=True)[0].any()
        optimizer.step()
        assert (table.weight == 1).all()
        loss.backward()
        optimizer.step()
        moved.append(optimizer.state_dict()["state"][0]["first"])
    assert torch.equal(*moved)
    assert moved[0].any()


def test_what_cannot_be_read_where_it_lies_is_refused() -> None:
    ids = torch.tensor([[0, 1]])
    for table in (RowEmbedding(E, D, torch.bfloat16), HostEmbedding(E, D, "cpu", torch.tensor([1]))):
        with pytest.raises(InputError, match=r"^table: got a .*; accepted: a direct one; corruption_loss takes any"):
            table.against(torch.randn(1, D), ids, "dot", 0.0, 0.5)
        with pytest.raises(InputError, match=r"^table: got a "), RowAdagrad([table]).at_once(table, ids[0]):
            pass


def test_a_state_is_loaded_whole_or_not_and_never_shared() -> None:
    tables = [RowEmbedding(E, D) for _ in range(2)]
    nested = Together([RowAdagrad([tables[0]]), Together([RowAdagrad([tables[1]])])])
    state = copy.deepcopy(nested.state_dict())
    state["state"][0]["first"].fill_(5)
    state["state"][1]["first"] = torch.zeros(E, D + 1)
    with pytest.raises(InputError, match=r"\['first'\]: got"):
        nested.load_state_dict(state)
    assert not nested.state_dict()["state"][0]["first"].any()
    # A rate that is a tensor, as capturable optimisers have it.
    state = nested.optimizers[0].state_dict()
    state["param_groups"][0]["lr"] = torch.tensor(0.2)
    nested.optimizers[0].load_state_dict(state)
    state["param_groups"][0]["lr"].fill_(9)
    assert nested.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)


def test_slopes_of_distances_are_those_of_the_rows_that_were_scored() -> None:
    ids, users = torch.tensor([[0, 1], [2, 3]]), torch.randn(2, D)
    for reduction in REDUCTIONS:
        table = RowEmbedding(E, D)
        optimizer = RowAdagrad([table], lr=0.1)
        corruption_loss(users, table, ids[:, 0], ids[:, 1:], reduction).backward()
        with torch.no_grad():
            table.weight.mul_(0.5)
        before = table.weight.detach().clone()
        if reduction != "dot":
            with pytest.raises(
                InputError, match=f"^tables: got rows changed between backward and step, of a {reduction}"
            ):
                optimizer.step()
            assert torch.equal(table.weight, before)
            optimizer.zero_grad()
            corruption_loss(users, table, ids[:, 0], ids[:, 1:], reduction).backward()
        optimizer.step()
        assert not torch.equal(table.weight, before)


def test_pairs_are_forgotten_with_a_step_that_is_not_taken() -> None:
    table = RowEmbedding(E, D)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    before = table.weight.detach().clone()
    query = torch.randn(3, D, requires_grad=True)
    corruption_loss(query, table, torch.tensor([0, 1, 2]), torch.tensor([[3], [4], [5]])).backward()
    assert query.grad is not None
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(table.weight, before)
    half = RowEmbedding(E, D, torch.bfloat16)
    assert not half.direct
    assert not HostEmbedding(E, D, "cpu").direct
    optimizer = RowwiseAdagrad([half], lr=0.1)
    corruption_loss(query, half, torch.tensor([0, 1, 2]), torch.tensor([[3], [4], [5]])).backward()
    assert len(half.take()) == 1
    for mixed in ("dot", "l1"):
        corruption_loss(query, table, torch.tensor([0, 1, 2]), torch.tensor([[3], [4], [5]]), mixed).backward()
    with pytest.raises(InputError, match=r"^reduction: got 'l1'; accepted: 'dot'"):
        RowwiseAdagrad([table], lr=0.1).step()
    with pytest.raises(InputError, match=r"^exclude: got a mask"):
        corruption_loss(
            query, table, torch.arange(3), torch.ones(3, 1, dtype=torch.int64), exclude=torch.ones(3, 1) > 0
        )
