"""`torch.ops.dhns_fast.row_update`, `pair_update` and `row_gather`: optimisers that read and write the rows of a table
that a step touches, and no other.

    lazy-adam         m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  x ← x − rate·m / (√v·correction + ε)
    adagrad           s ← s + g²,           x ← x − rate·g / (√s + ε)
    rowwise-adagrad   s ← s + mean g²,      x ← x − rate·g / (√s + ε), one s a row

g is the sum of a row's gradients in the order in which they are given, whatever the number of threads, plus the
gradient 3·n3·x·|x| of n3·Σ|x|³. A table is float32, float64 or bfloat16; gradients and states are float32, float64 for
float64. What is written to a bfloat16 table is rounded up with the probability of what is cut off, by 16 bits of Philox
(see `dhns_fast.ops.noise`): column c of a row has those of the counter (c // 8, row + row_offset, number), word c % 8
// 2, the lower half first. So updates below the last bit add up on average, and a table split by rows is rounded as the
whole one is.

`pair_update` is told the gradients of pairs as factors, and computes each where it is added: of queries q_b and
ids[b, c] the row x of each id gets slope[b, c] · ∂term(q_b, x)/∂x, where `corruption_loss` gave the slopes and a
reduction says what a term is. The [B·C, D] of gradients that `row_update` would take are never written. Pairs come
before gradients in the order of a sum. An id of -1 means no row: `corruption_step` has moved it already.

Sources: Kingma & Ba, ICLR 2015; Duchi et al., JMLR 2011; Naumov et al., arXiv 1906.00091 (row-wise Adagrad).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import REDUCTIONS, ROW_METHODS
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory
from dhns_fast.ops.backend import Implementation
from dhns_fast.ops.corruption import corruption_table_gradient
from dhns_fast.ops.noise import philox_words
from dhns_fast.ops.operator import Operator
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.rows import add_rows
from dhns_fast.ops.score import check_parts, look_inside

# The widest row that a Triton program holds (kernels/rowwise.py).
_WIDEST = 8192


class UpdateInputs(NamedTuple):
    table: Tensor  # [E, D], updated in place, as are the states
    first: Tensor  # lazy-adam: m [E, D]; adagrad: s [E, D]; rowwise-adagrad: s [E]
    second: Tensor | None  # lazy-adam: v [E, D]
    rows: list[Tensor]  # each int64 [n]
    gradients: list[Tensor]  # each [n, D]
    method: str
    rate: float  # of this step
    beta1: float
    beta2: float
    correction: float
    epsilon: float
    n3: float
    seed: int
    number: int
    row_offset: int
    backend: str = ""


class PairInputs(NamedTuple):
    table: Tensor  # [E, D], float32 or float64; updated in place, as are the states
    first: Tensor
    second: Tensor | None
    queries: list[Tensor]  # each [B, D]
    ids: list[Tensor]  # each int64 [B, C], -1 for none
    slopes: list[Tensor]  # each [B, C]
    reduction: str
    rows: list[Tensor]  # the rest as of UpdateInputs
    gradients: list[Tensor]
    method: str
    rate: float
    beta1: float
    beta2: float
    correction: float
    epsilon: float
    n3: float
    seed: int
    number: int
    row_offset: int
    backend: str = ""

    @property
    def update(self) -> UpdateInputs:
        """Without the pairs."""
        return UpdateInputs(self.table, self.first, self.second, *self[7:])


class GatherInputs(NamedTuple):
    table: Tensor  # [E, D]
    rows: Tensor  # int64 [n]
    backend: str = ""


def _check_table(table: Tensor) -> None:
    if table.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise InputError("table", table, "torch.float32, torch.float64, torch.bfloat16")


def _check_row_major(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise InputError(name, Shown(f"strides {list(x.stride())}"), "row-major memory, as it is updated in place")


def check_update(a: UpdateInputs) -> None:
    checks.one_of("method", a.method, ROW_METHODS)
    checks.shapes(
        table=(a.table, "E D"),
        first=(a.first, "E" if a.method == "rowwise-adagrad" else "E D"),
        second=(a.second, "E D"),
    )
    _check_table(a.table)
    if (a.second is None) != (a.method != "lazy-adam"):
        raise InputError(
            "second",
            Shown("None" if a.second is None else "a tensor"),
            "the second moment for lazy-adam, None for the others",
        )
    if len(a.rows) != len(a.gradients):
        raise InputError(
            "gradients", Shown(f"{len(a.gradients)} tensors"), f"one for each of the {len(a.rows)} of rows"
        )
    wide, dim = accumulator(a.table.dtype), a.table.shape[1]
    states = {"first": a.first} if a.second is None else {"first": a.first, "second": a.second}
    checks.dtype(wide, **states)
    _check_row_major(table=a.table, **states)
    for i, (rows, gradient) in enumerate(zip(a.rows, a.gradients, strict=True)):
        checks.shapes(**{f"rows[{i}]": (rows, "n"), f"gradients[{i}]": (gradient, f"n {dim}")})
        checks.dtype(torch.int64, **{f"rows[{i}]": rows})
        checks.dtype(wide, **{f"gradients[{i}]": gradient})
        checks.on_device("table", a.table, **{f"rows[{i}]": rows, f"gradients[{i}]": gradient}, **states)


def _check_pairs(a: PairInputs) -> None:
    check_update(a.update)
    if a.table.dtype == torch.bfloat16:
        raise InputError("table", a.table, "torch.float32, torch.float64")
    checks.one_of("reduction", a.reduction, REDUCTIONS)
    dim = a.table.shape[1]
    check_parts(a.reduction, dim)
    if not len(a.queries) == len(a.ids) == len(a.slopes):
        got = f"{len(a.queries)}, {len(a.ids)} and {len(a.slopes)} tensors"
        raise InputError("queries, ids, slopes", Shown(got), "as many of each")
    for i, (query, ids, slope) in enumerate(zip(a.queries, a.ids, a.slopes, strict=True)):
        names = f"queries[{i}]", f"ids[{i}]", f"slopes[{i}]"
        checks.shapes(**{names[0]: (query, f"B {dim}"), names[1]: (ids, "B C"), names[2]: (slope, "B C")})
        checks.dtype(torch.int64, **{names[1]: ids})
        checks.dtype(a.table.dtype, **{names[0]: query, names[2]: slope})
        checks.on_device("table", a.table, **dict(zip(names, (query, ids, slope), strict=True)))


def _check_gather(a: GatherInputs) -> None:
    checks.shapes(table=(a.table, "E D"), rows=(a.rows, "n"))
    _check_table(a.table)
    checks.dtype(torch.int64, rows=a.rows)
    checks.on_device("table", a.table, rows=a.rows)


def _look_update(a: UpdateInputs) -> None:
    for i, rows in enumerate(a.rows):
        look_inside(f"rows[{i}]", rows, len(a.table))


def _look_pairs(a: PairInputs) -> None:
    _look_update(a.update)
    for i, ids in enumerate(a.ids):
        look_inside(f"ids[{i}]", ids, len(a.table), least=-1)


def _look_gather(a: GatherInputs) -> None:
    look_inside("rows", a.rows, len(a.table))


def _native(a: UpdateInputs | PairInputs, *pairs: list[Tensor], reduction: str = REDUCTIONS[0]) -> None:
    torch.ops.dhns_fast_native.row_update(
        ROW_METHODS.index(a.method), a.table, a.first, a.second, a.rows, a.gradients, a.rate, a.beta1, a.beta2, a.correction, a.epsilon, a.n3,
        a.seed, a.number, a.row_offset, REDUCTIONS.index(reduction), *pairs,
    )  # fmt: skip


def _native_update(a: UpdateInputs) -> None:
    _native(a, [], [], [])


def _native_pairs(a: PairInputs) -> None:
    _native(a, a.queries, a.ids, a.slopes, reduction=a.reduction)


def _written_out(a: PairInputs) -> None:
    """By `row_update`, with the gradient of every pair's row in memory, by whatever computes each best here."""
    rows, gradients = [], []
    for query, ids, slope in zip(a.queries, a.ids, a.slopes, strict=True):
        if bool((ids < 0).any()):
            kept = ids >= 0
            query, ids, slope = query[kept.nonzero()[:, 0]], ids[kept][:, None], slope[kept][:, None]
        if not ids.numel():
            continue
        touched, place = ids.unique(return_inverse=True)
        one = query.new_ones(())
        # The operator wants a table of the touched rows alone, or its result would be as large as all of it.
        found = corruption_table_gradient(one, query, a.table[touched], place, slope, a.reduction)
        rows.append(touched)
        gradients.append(found)
    row_update(*a[:3], [*rows, *a.rows], [*gradients, *a.gradients], *a[9:-1])


def _triton_update(a: UpdateInputs) -> None:
    from dhns_fast.kernels import rowwise as kernels

    if a.rows:
        kernels.row_update(a.table, a.first, a.second, torch.cat(a.rows), torch.cat(a.gradients), *a[5:-1])


def _why_not_triton(a: UpdateInputs) -> Iterator[str]:
    if a.table.shape[1] > _WIDEST:
        yield f"rows are at most {_WIDEST} wide"
    if a.table.dtype == torch.float64 and a.table.is_cuda:
        yield "its rates are float32"


def _eager_update(a: UpdateInputs) -> None:
    if not a.rows:
        return
    rows, inverse = torch.cat(a.rows).unique(return_inverse=True)
    gradient = torch.cat(a.gradients)
    g = torch.zeros(len(rows), gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    add_rows(g, inverse, gradient)
    x = a.table[rows].to(g.dtype)
    g += 3 * a.n3 * x * x.abs()
    if a.second is not None:
        m = a.beta1 * a.first[rows] + (1 - a.beta1) * g
        v = a.beta2 * a.second[rows] + (1 - a.beta2) * g * g
        a.first[rows], a.second[rows] = m, v
        x -= a.rate * m / (v.sqrt() * a.correction + a.epsilon)
    else:
        square = g * g
        s = a.first[rows] + (square if a.method == "adagrad" else square.mean(1))
        a.first[rows] = s
        x -= a.rate * g / ((s if s.ndim == 2 else s[:, None]).sqrt() + a.epsilon)
    a.table[rows] = x if x.dtype == a.table.dtype else _stochastic(x, rows + a.row_offset, a.seed, a.number)


def _stochastic(x: Tensor, rows: Tensor, seed: int, number: int) -> Tensor:
    """float32 [n, D] to bfloat16, see above."""
    n, D = x.shape
    counter = torch.arange(-(-D // 8), device=x.device).repeat(n, 1)
    row = rows[:, None].expand_as(counter)
    words = philox_words(
        counter, row & 0xFFFFFFFF, row >> 32, torch.full_like(counter, number), torch.tensor(seed, device=x.device)
    )
    word = torch.stack(words, -1).flatten(1)
    noise = torch.stack((word & 0xFFFF, word >> 16), -1).flatten(1)[:, :D]
    bits = x.view(torch.int32)
    # A sum beyond the largest int32 is a negative number's, whose sign bit it keeps.
    carried = torch.where(x.isnan(), bits | 0x400000, bits + noise.to(torch.int32))
    return (carried >> 16).to(torch.int16).view(torch.bfloat16)


def _native_gather(a: GatherInputs) -> Tensor:
    out = memory.empty((len(a.rows), a.table.shape[1]), accumulator(a.table.dtype), a.table.device)
    torch.ops.dhns_fast_native.row_gather(a.table, a.rows, out)
    return out


def _eager_gather(a: GatherInputs) -> Tensor:
    return a.table.index_select(0, a.rows).to(accumulator(a.table.dtype))


row_update = Operator(
    "row_update",
    UpdateInputs,
    None,
    check=check_update,
    fake=lambda a: None,
    look=_look_update,
    mutates=("table", "first", "second"),
    implementations=(
        Implementation(backends.TRITON, _triton_update, _why_not_triton),
        Implementation(backends.CPU, _native_update),
        Implementation(backends.EAGER, _eager_update),
    ),
)
pair_update = Operator(
    "pair_update",
    PairInputs,
    None,
    check=_check_pairs,
    fake=lambda a: None,
    look=_look_pairs,
    mutates=("table", "first", "second"),
    implementations=(
        Implementation(backends.CPU, _native_pairs),
        Implementation(backends.EAGER, _written_out),
    ),
)
row_gather = Operator(
    "row_gather",
    GatherInputs,
    Tensor,
    check=_check_gather,
    fake=lambda a: a.table.new_empty(len(a.rows), a.table.shape[1], dtype=accumulator(a.table.dtype)),
    look=_look_gather,
    implementations=(Implementation(backends.CPU, _native_gather), Implementation(backends.EAGER, _eager_gather)),
)
