"""`torch.ops.dhns_fast.corruption_step`: `corruption_loss`, and the step of a row-wise optimiser for rows that this
loss alone gives a gradient, taken while they are in the cache.

`corruption_loss` reads a row, and `pair_update` reads it again once the whole batch has been scored. In a table that no
cache holds that is half of a step's memory traffic. Here a row moves as soon as the last query to meet it has read it:
what it has been given by then is all that it will be given, unless it is among `others`, the rows that something else
in the step reads or gives gradients to. Those wait for `pair_update`, which is told of them by `rest`: their ids, and
-1 for pairs that are done. (Rows that queries of two threads meet move when all have been scored.) A row gets the bits
that `pair_update` of all pairs would give it.

It returns the loss, its gradient in query, the slopes of `corruption_loss`, and rest int64 [B, 1 + N]. The gradient of
the whole objective by this loss is taken to be 1. A loss that is not finite has moved rows all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import REDUCTIONS, ROW_METHODS
from dhns_fast.ops import backend as backends
from dhns_fast.ops import corruption, corruption_eager, rowwise
from dhns_fast.ops.backend import Implementation, Unfit
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.score import look_inside


class StepInputs(NamedTuple):
    table: Tensor  # [E, D], float32 or float64; updated in place, as are the states
    first: Tensor  # see UpdateInputs
    second: Tensor | None
    query: Tensor  # [B, D]
    ids: Tensor  # int64 [B, 1 + N]
    others: Tensor  # int64 [n]
    reduction: str
    offset: float
    temperature: float
    method: str
    rate: float
    beta1: float
    beta2: float
    correction: float
    epsilon: float
    n3: float
    backend: str = ""

    @property
    def loss(self) -> corruption.LossInputs:
        return corruption.LossInputs(self.query, self.table, self.ids, self.reduction, self.offset, self.temperature)


def _check(a: StepInputs) -> None:
    corruption.check_loss(a.loss)
    rule = a.rate, a.beta1, a.beta2, a.correction, a.epsilon, a.n3
    rowwise.check_update(rowwise.UpdateInputs(a.table, a.first, a.second, [], [], a.method, *rule, 0, 0, 0))
    checks.shapes(others=(a.others, "n"))
    checks.dtype(torch.int64, others=a.others)
    checks.on_device("query", a.query, others=a.others)


def _look(a: StepInputs) -> None:
    corruption.look(a.loss)
    look_inside("others", a.others, len(a.table))


def _fake(a: StepInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, ids = a.query, a.ids
    return query.new_empty(()), query.new_empty(query.shape), query.new_empty(ids.shape), ids.new_empty(ids.shape)


def _native(a: StepInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = a.query
    _, by_query, slope, rest = _fake(a)
    partial = query.new_empty(len(query), dtype=torch.float64)
    parts = min(torch.get_num_threads(), len(query))
    run = torch.ops.dhns_fast_native.corruption_step
    if not run(
        REDUCTIONS.index(a.reduction), query, a.table, a.ids, a.offset, a.temperature, slope, by_query, partial, ROW_METHODS.index(a.method), a.first,
        a.second, a.others, parts, *a[10:16], rest,
    ):  # fmt: skip
        raise Unfit
    return partial.sum().to(query.dtype), by_query, slope, rest


def _eager(a: StepInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, by_query, slope, _ = corruption_eager.loss(a.loss)
    waits = torch.isin(a.ids, a.others)
    rowwise.pair_update(
        *a[:3], [a.query], [a.ids.masked_fill(waits, -1)], [slope], a.reduction, [], [], *a[9:16], seed=0, number=0, row_offset=0, backend="eager"
    )  # fmt: skip
    return loss, by_query, slope, a.ids.masked_fill(~waits, -1)


corruption_step = Operator(
    "corruption_step",
    StepInputs,
    tuple[Tensor, Tensor, Tensor, Tensor],
    check=_check,
    fake=_fake,
    look=_look,
    mutates=("table", "first", "second"),
    implementations=(
        Implementation(backends.CPU, _native, looks=True),
        Implementation(backends.EAGER, _eager),
    ),
)
