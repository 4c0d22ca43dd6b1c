"""Embedding tables whose gradient is the rows that a step looked up, and the optimisers that update those rows alone.

    table = RowEmbedding(5_000_000, 128)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    loss = f(table(ids)); loss.backward(); optimizer.step(); optimizer.zero_grad()

A look-up is a leaf of the graph: autograd ends at the gathered rows, and no [E, D] gradient exists. A step costs what
it touches, whatever E is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import memory, rowwise
from dhns_fast.ops.corruption import corruption_loss
from dhns_fast.ops.corruption_step import corruption_step
from dhns_fast.optim.dense import LightAdagrad, LightAdam, Unguarded

__all__ = [
    "ROW_OPTIMIZERS",
    "LazyAdam",
    "RowAdagrad",
    "RowEmbedding",
    "RowOptimizer",
    "RowwiseAdagrad",
    "Together",
    "optimizer_for",
    "row_optimizer",
]

# Rows that initial values are drawn for at once.
BLOCK = 1 << 16
# Rows of a table for each that a step reads, from which on they move where they are read, by the dimensions of a state:
# a number a row, or one for each of the table. One thread of a Xeon at 2.5 GHz, 66 560 ids of D 128, at once against
# apart at 100 000 and 1 000 000 rows: lazy Adam +10 and -5 %, Adagrad +3 and -9 %, row-wise Adagrad -2 and -16 %;
# it +18 % at 20 000 (`pytest --benchmark --benchmark-clock cpu bench/bench_optimiser.py -k at_once`).
SPARSE = {1: 1.5, 2: 8.0}
Touched = list[tuple[Tensor, Tensor]]


class Pairs(NamedTuple):
    """Gradients of rows as factors: of queries [B, D] and ids int64 [B, C], slope[b, c] · ∂term(query_b, x)/∂x for the
    row x of each id (:mod:`dhns_fast.ops.rowwise`).
    """

    query: Tensor
    ids: Tensor
    slope: Tensor  # [B, C]
    reduction: str


class _AtOnce(NamedTuple):
    """What :meth:`RowOptimizer.at_once` tells a table."""

    first: Tensor
    second: Tensor | None
    others: Tensor
    method: str
    # rate, beta1, beta2, correction, epsilon, n3
    rule: tuple[float, ...]

    def pays(self, ids: Tensor) -> bool:
        """Whether rows should move where they are read. A pass of its own meets them in their order, which memory
        serves nearly twice as fast as any other where every other row has a turn; what is saved is less than that then,
        and all the more with a state as wide as the table.
        """
        return len(self.first) >= SPARSE[self.first.ndim] * ids.numel()


class RowEmbedding(nn.Module):
    """A table like `nn.Embedding`, whose look-ups a :class:`RowOptimizer` collects.

    Args:
        num_embeddings: E.
        dim: D.
        dtype: torch.float32, torch.float64, or torch.bfloat16, which is looked up and computed as float32.
        weight: `[E, D]` to take instead of making one; it is not copied.

    Attributes:
        weight: the table `[E, D]`. A gradient that reaches it other than by look-ups is dense and refused by the
            optimiser.
        row_offset: what the first row is in the whole table, where this is a part of one.
    """

    row_offset = 0

    def __init__(
        self, num_embeddings: int, dim: int, dtype: torch.dtype = torch.float32, *, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        num_embeddings, dim = checks.count("num_embeddings", num_embeddings, 0), checks.count("dim", dim)
        if weight is None:
            weight = memory.zeros((num_embeddings, dim), dtype).normal_()
        checks.shapes(weight=(weight, f"{num_embeddings} {dim}"))
        self.num_embeddings, self.dim = num_embeddings, dim
        self.weight = nn.Parameter(weight.detach())
        self._touched: Touched = []
        self._pairs: list[Pairs] = []
        self._at_once: _AtOnce | None = None

    @property
    def direct(self) -> bool:
        """Whether :meth:`against` can read the table where it lies: all of it is here, in the numbers it is computed
        in. Elsewhere rows are looked up first.
        """
        weight = self.weight
        return type(self) is RowEmbedding and weight.device.type == "cpu" and weight.dtype != torch.bfloat16

    @property
    def shape(self) -> tuple[int, int]:
        """[E, D] of the whole table."""
        return self.num_embeddings, self.dim

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[*ids, D]`; what is differentiated through them is collected until :meth:`take`."""
        checks.tensor(ids=ids)
        flat = ids.reshape(-1)
        rows = self.look_up(flat)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._touched.append((flat, rows.requires_grad_()))
        return rows.view(*ids.shape, self.dim)

    def against(
        self, query: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float, backend: str | None = None
    ) -> Tensor:
        """The loss of queries [B, D] against the rows of ids int64 [B, 1 + N], true answers first, as
        :func:`dhns_fast.loss.corruption_loss` gives it; only of a :attr:`direct` table.

        Rows are read where they lie, and of their gradients only the factors are kept (:class:`Pairs`), until the
        optimiser adds them up: neither the looked-up rows nor their gradients are ever written.
        """
        return _Against.apply(query, self.weight, self, ids, reduction, offset, temperature, backend or "")

    def whole(self) -> Tensor:
        """The rows here `[n, D]`, outside of autograd: the table itself, or a float32 copy of a bfloat16 one."""
        return self.weight.detach().to(rowwise.computed_in(self.weight.dtype))

    def part(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end − 1 of those here, like :meth:`whole`."""
        return self.weight.detach()[begin:end].to(rowwise.computed_in(self.weight.dtype))

    @torch.no_grad()
    def uniform_(self, bound: float, generator: torch.Generator | None = None) -> RowEmbedding:
        """Fill with numbers in ±bound. A part of a table draws what the whole one would, and keeps its rows.

        Args:
            generator: on the CPU.
        """
        for first in range(0, self.num_embeddings, BLOCK):
            count = min(BLOCK, self.num_embeddings - first)
            values = torch.empty(count, self.dim).uniform_(-bound, bound, generator=generator)
            begin, end = max(first, self.row_offset), min(first + count, self.row_offset + len(self.weight))
            if begin < end:
                self.weight[begin - self.row_offset : end - self.row_offset] = values[begin - first : end - first].to(
                    self.weight
                )
        return self

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows `[n, D]` of ids int64 `[n]`, outside of autograd; float32 of a bfloat16 table."""
        with torch.no_grad():
            return rowwise.row_gather(self.weight, ids)

    def take(self) -> Touched:
        """(ids, gradients) of every look-up since the last call that a gradient has reached, in the order of the
        look-ups.
        """
        touched, self._touched = self._touched, []
        return [(ids, rows.grad) for ids, rows in touched if rows.grad is not None and len(ids)]

    def take_pairs(self) -> list[Pairs]:
        """What :meth:`against` has been given gradients for since the last call, in the order of backward passes."""
        pairs, self._pairs = self._pairs, []
        return pairs

    def update_pairs(
        self, pairs: list[Pairs], touched: Touched, state: Mapping[str, Any], method: str, arguments: Mapping[str, Any]
    ) -> None:
        """:meth:`update` with the gradients of pairs before the others."""
        for reduction in dict.fromkeys(pair.reduction for pair in pairs[1:]):
            if reduction != pairs[0].reduction:
                raise InputError("reduction", reduction, f"{pairs[0].reduction!r}, as of the step's other pairs")
        rowwise.pair_update(
            self.weight.detach(),
            state["first"],
            state.get("second"),
            [pair.query for pair in pairs],
            [pair.ids for pair in pairs],
            [pair.slope for pair in pairs],
            pairs[0].reduction,
            [ids for ids, _ in touched],
            [gradient for _, gradient in touched],
            method,
            row_offset=self.row_offset,
            **arguments,
        )

    def update(self, touched: Touched, state: Mapping[str, Any], method: str, arguments: Mapping[str, Any]) -> None:
        """Apply gradients to the rows and to the optimiser's state of this table."""
        rows, gradients = [list(x) for x in zip(*touched, strict=True)] if touched else ([], [])
        rowwise.row_update(
            self.weight.detach(),
            state["first"],
            state.get("second"),
            rows,
            gradients,
            method,
            row_offset=self.row_offset,
            **arguments,
        )

    def new_state(self, method: str) -> dict[str, Tensor]:
        """The state of a method, zero: two moments `[E, D]`, a sum of squares `[E, D]`, or `[E]`."""
        dtype = rowwise.computed_in(self.weight.dtype)
        shape = self.weight.shape[:1] if method == "rowwise-adagrad" else self.weight.shape
        names = ("first", "second") if method == "lazy-adam" else ("first",)
        return {name: memory.zeros(shape, dtype, self.weight.device) for name in names}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.dim}, dtype={self.weight.dtype}"


class _Against(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        weight: Tensor,
        table: RowEmbedding,
        ids: Tensor,
        reduction: str,
        offset: float,
        temperature: float,
        backend: str,
    ) -> Tensor:
        now, table._at_once = table._at_once, None
        ctx.table, ctx.reduction, ctx.at_once = table, reduction, now is not None and now.pays(ids)
        options = reduction, offset, temperature
        if now is not None and ctx.at_once:
            loss, by_query, slope, ids = corruption_step(
                weight.detach(), now.first, now.second, query, ids, now.others, *options, now.method, *now.rule, backend
            )
        else:
            loss, by_query, slope, _ = corruption_loss(query, weight, ids, *options, backend, None)
        ctx.save_for_backward(query, ids, by_query, slope)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.at_once and grad.item() != 1:
            raise InputError("loss", Shown(f"a gradient of {grad.item()}"), "1, as rows have been moved by it already")
        query, ids, by_query, slope = ctx.saved_tensors
        ctx.table._pairs.append(Pairs(query.detach(), ids, grad * slope, ctx.reduction))
        return grad * by_query, *[None] * 7


class RowOptimizer(Unguarded):
    """Base of the optimisers of :class:`RowEmbedding` tables.

    Args:
        tables: what to train; everything else of a model goes to an optimiser of its own.
        lr: learning rate.
        eps: ε, added to the root.
        n3: λ of the regulariser λ·Σ|x|³ over the rows that a step touches, whose gradient is added without a graph.
        seed: of the stochastic rounding of bfloat16 tables.
        backend: "triton", "cpu" (C++), "eager", or None for the best there is.

    Raises:
        InputError: an argument is out of range; in :meth:`step`, a gradient of the whole table.
    """

    method: ClassVar[str]

    def __init__(
        self,
        tables: Iterable[RowEmbedding],
        lr: float,
        eps: float,
        n3: float = 0.0,
        seed: int = 0,
        backend: str | None = None,
        betas: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.tables = list(tables)
        for i, table in enumerate(self.tables):
            if not isinstance(table, RowEmbedding):
                raise InputError(f"tables[{i}]", Shown(type(table).__name__), "RowEmbedding modules")
        if not self.tables:
            raise InputError("tables", Shown("none"), "one or more RowEmbedding modules")
        for name, value, least in (("lr", lr, None), ("eps", eps, None), ("n3", n3, 0)):
            checks.finite(**{name: value})
            if not (value >= 0 if least == 0 else value > 0):
                raise InputError(name, value, "numbers of at least 0" if least == 0 else "positive numbers")
        if (
            not isinstance(betas, (tuple, list))
            or len(betas) != 2
            or not all(hasattr(beta, "__float__") and 0 <= beta < 1 for beta in betas)
        ):
            raise InputError("betas", betas, "two numbers of at least 0 and below 1")
        self.backend = backend or ""
        defaults = {"lr": lr, "eps": eps, "n3": n3, "seed": seed, "betas": betas}
        super().__init__([table.weight for table in self.tables], defaults)
        for table in self.tables:
            self.state[table.weight] = {"step": torch.tensor(0, dtype=torch.int64), **table.new_state(self.method)}

    def schedule(self, group: Mapping[str, Any], number: int) -> dict[str, float]:
        """`rate`, `beta1`, `beta2` and `correction` of update `number`, from 1."""
        return {"rate": group["lr"], "beta1": 0.0, "beta2": 0.0, "correction": 1.0}

    def _rule(self, table: RowEmbedding) -> dict[str, float]:
        """What the next step does to a row of a table: the numbers between `method` and `seed` of `row_update`."""
        group = self.param_groups[0]
        number = int(self.state[table.weight]["step"]) + 1
        return self.schedule(group, number) | {"epsilon": group["eps"], "n3": group["n3"]}

    @contextlib.contextmanager
    def at_once(self, table: RowEmbedding, others: Tensor) -> Iterator[None]:
        """Within it the next :meth:`RowEmbedding.against` moves the rows that it reads while they are in the cache, and
        leaves to :meth:`step` those that may not move yet (:mod:`dhns_fast.ops.corruption_step`): numbers are the same,
        in less time where the table is larger than the caches. It is for a step with one such loss, whose gradient is
        1, and which is taken: nothing takes it back.

        Args:
            table: one of this optimiser's, :attr:`RowEmbedding.direct`.
            others: int64 `[n]`, rows that anything else in the step reads afterwards, or gives a gradient to.
        """
        state = self.state[table.weight]
        rule = self._rule(table)
        table._at_once = _AtOnce(state["first"], state.get("second"), others, self.method, tuple(rule.values()))
        try:
            yield
        finally:
            table._at_once = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that were looked up since the last step and that a gradient has reached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for table in self.tables:
            if table.weight.grad is not None:
                raise InputError(
                    "tables",
                    Shown("a gradient of a whole table"),
                    "gradients of looked-up rows; torch.optim.Adam takes whole tables",
                )
            touched, pairs = table.take(), table.take_pairs()
            state = self.state[table.weight]
            rule = self._rule(table)
            number = int(state["step"]) + 1
            state["step"].fill_(number)
            arguments = rule | {"seed": group["seed"], "number": number, "backend": self.backend}
            if pairs:
                table.update_pairs(pairs, touched, state, self.method, arguments)
            else:
                table.update(touched, state, self.method, arguments)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the look-ups of a step that is not taken."""
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.take()
            table.take_pairs()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back a state. Unlike torch's, moments keep their dtype where the table is bfloat16, and no copy of them
        is made.
        """
        for index, values in state_dict["state"].items():
            own = self.state[self.tables[int(index)].weight]
            for name, value in values.items():
                own[name].copy_(torch.as_tensor(value))
        for own, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in given.items() if name != "params"})


class LazyAdam(RowOptimizer):
    """Adam (Kingma & Ba 2015) of the rows that a step touches; moments of the others stay. It is Adam where every row
    is touched.

    Args: those of :class:`RowOptimizer`, and `betas`.
    """

    method = "lazy-adam"

    def __init__(
        self,
        tables: Iterable[RowEmbedding],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        n3: float = 0.0,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(tables, lr, eps, n3, seed, backend, betas)

    def schedule(self, group: Mapping[str, Any], number: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "rate": group["lr"] / (1 - beta1**number),
            "beta1": beta1,
            "beta2": beta2,
            "correction": (1 - beta2**number) ** -0.5,
        }


# not `Adagrad`: PyKEEN, imported later, resolves optimisers by name among all subclasses, and would fail
class RowAdagrad(RowOptimizer):
    """Adagrad (Duchi et al. 2011): a sum of squares for each number."""

    method = "adagrad"

    def __init__(
        self,
        tables: Iterable[RowEmbedding],
        lr: float = 0.1,
        eps: float = 1e-10,
        n3: float = 0.0,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(tables, lr, eps, n3, seed, backend)


class RowwiseAdagrad(RowAdagrad):
    """Adagrad with one sum a row, of the mean square of its gradient (Naumov et al. 2019): the state takes 1/D of the
    table.
    """

    method = "rowwise-adagrad"


ROW_OPTIMIZERS: dict[str, type[LazyAdam | RowAdagrad]] = {
    kind.method: kind for kind in (LazyAdam, RowAdagrad, RowwiseAdagrad)
}


class Together(torch.optim.Optimizer):
    """Optimisers of different parameters of one model, as one: parameters are numbered through in their order.

    Args:
        optimizers: one or more.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"state": {}, "param_groups": []}
        for first, part in zip(self._firsts(), (optimizer.state_dict() for optimizer in self.optimizers), strict=True):
            out["state"] |= {first + index: values for index, values in part["state"].items()}
            out["param_groups"] += [
                {**group, "params": [first + index for index in group["params"]]} for group in part["param_groups"]
            ]
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        groups = iter(state_dict["param_groups"])
        for first, optimizer in zip(self._firsts(), self.optimizers, strict=True):
            own = [{**next(groups), "params": group["params"]} for group in optimizer.state_dict()["param_groups"]]
            indices = [index for group in own for index in group["params"]]
            state = {
                index: state_dict["state"][first + index] for index in indices if first + index in state_dict["state"]
            }
            optimizer.load_state_dict({"state": state, "param_groups": own})

    def _firsts(self) -> list[int]:
        counts = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in self.optimizers]
        return [sum(counts[:i]) for i in range(len(counts))]


def row_optimizer(optimizer: torch.optim.Optimizer) -> RowOptimizer | None:
    """The row-wise part of what :func:`optimizer_for` returned, None of any other optimiser."""
    parts = optimizer.optimizers if isinstance(optimizer, Together) else [optimizer]
    return next((part for part in parts if isinstance(part, RowOptimizer)), None)


def optimizer_for(
    name: str, tables: Iterable[RowEmbedding], others: Iterable[nn.Parameter], lr: float, n3: float = 0.0, seed: int = 0
) -> torch.optim.Optimizer:
    """What trains a model whose large tables are `tables`: their row-wise optimiser, and its dense counterpart for all
    else.

    Args:
        name: "lazy-adam", "adagrad" or "rowwise-adagrad".
        others: the parameters of the dense one.
        lr, n3, seed: of :class:`RowOptimizer`.
    """
    dense = list(others)
    rows = ROW_OPTIMIZERS[name](tables, lr=lr, n3=n3, seed=seed)
    if not dense:
        return rows
    return Together([rows, LightAdam(dense, lr=lr, fused=True) if name == "lazy-adam" else LightAdagrad(dense, lr=lr)])
