"""Embedding tables whose gradient is the rows that a step looked up, and the optimisers that update those rows alone.

    table = RowEmbedding(5_000_000, 128)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    loss = f(table(ids)); loss.backward(); optimizer.step(); optimizer.zero_grad()

A look-up is a leaf of the graph: autograd ends at the gathered rows, and no [E, D] gradient exists. A step costs what
it touches, whatever E is.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import memory, rowwise
from dhns_fast.ops.corruption import corruption_loss
from dhns_fast.ops.corruption_step import corruption_step
from dhns_fast.ops.precision import accumulator
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

# What a table may consist of.
DTYPES = torch.float32, torch.float64, torch.bfloat16
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
    row x of each id (:mod:`dhns_fast.ops.rowwise`). They are multiplied out when the optimiser steps, hence copies of
    what the caller may change before.
    """

    query: Tensor
    ids: Tensor
    slope: Tensor  # [B, C]
    reduction: str
    # Of the table: the slopes of distances are taken at its rows as they are then.
    version: int


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
    """A table like `nn.Embedding`, whose look-ups a :class:`RowOptimizer` collects; they are leaves of the graph, which
    torch changes in no place (`x = table(ids); x *= 2` raises).

    Args:
        num_embeddings: E.
        dim: D.
        dtype: torch.float32, torch.float64, or torch.bfloat16, which is looked up and computed as float32; None: that
            of `weight`, float32 without one.
        weight: `[E, D]`, row-major and of one of these dtypes, to take instead of making one; it is not copied.

    Attributes:
        weight: the table `[E, D]`. A gradient that reaches it other than by look-ups is dense and refused by the
            optimiser.
        row_offset: what the first row is in the whole table, where this is a part of one.

    Raises:
        InputError: an argument is not of these kinds, shapes and dtypes; in a look-up, ids are not int64, or (on the
            CPU) out of range.
    """

    row_offset = 0
    # Whether `weight` has the values of all rows that are here.
    complete: ClassVar[bool] = True

    def __init__(
        self, num_embeddings: int, dim: int, dtype: torch.dtype | None = None, *, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        num_embeddings, dim = checks.count("num_embeddings", num_embeddings, 0), checks.count("dim", dim)
        if dtype is not None:
            checks.one_of("dtype", dtype, DTYPES)
        if weight is None:
            weight = memory.zeros((num_embeddings, dim), dtype or torch.float32).normal_()
        checks.tensor(weight=weight)
        checks.shapes(weight=(weight, f"{num_embeddings} {dim}"))
        if weight.dtype not in ((dtype,) if dtype else DTYPES):
            accepted = f"{dtype}, as dtype says" if dtype else ", ".join(map(str, DTYPES))
            raise InputError("weight", weight, accepted)
        if not weight.is_contiguous():
            raise InputError(
                "weight", Shown(f"strides {list(weight.stride())}"), "row-major memory, as it is updated in place"
            )
        self.num_embeddings, self.dim = num_embeddings, dim
        self.weight = nn.Parameter(weight.detach())
        # Of look-ups that a gradient has reached: ids and rows, by the number of the look-up.
        self._touched: dict[int, tuple[Tensor, Tensor]] = {}
        self._looked_up = 0
        self._pairs: list[Pairs] = []
        self._at_once: _AtOnce | None = None

    @property
    def direct(self) -> bool:
        """Whether :meth:`against` can read the table where it lies: all of it is here, in the numbers it is computed
        in. Elsewhere rows are looked up first.
        """
        weight = self.weight
        return type(self) is RowEmbedding and weight.device.type == "cpu" and weight.dtype != torch.bfloat16

    def check_direct(self) -> None:
        """Refuse, with InputError, a table that is not :attr:`direct`."""
        if not self.direct:
            got = Shown(f"a {type(self).__name__} of {self.weight.dtype} on {self.weight.device}")
            raise InputError("table", got, "a direct one; corruption_loss takes any")

    @property
    def shape(self) -> tuple[int, int]:
        """[E, D] of the whole table."""
        return self.num_embeddings, self.dim

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[*ids, D]` of ids int64; gradients that reach them are collected until :meth:`take`."""
        checks.tensor(ids=ids)
        flat = ids.reshape(-1)
        try:
            rows = self.look_up(flat)
        except InputError as error:
            # The operator's name of its argument is not the caller's.
            if error.argument != "rows":
                raise
            raise InputError("ids", error.got, error.accepted) from None
        if self._is_trained():
            # A copy: ids are read when the optimiser steps, and the caller may fill them anew before.
            self._collect(flat.clone(), rows.requires_grad_())
        return rows.view(*ids.shape, self.dim)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def _collect(self, ids: Tensor, rows: Tensor) -> None:
        """Note a look-up as soon as a backward pass gives it a gradient, and not before: one that none ever reaches
        leaves nothing behind, and a gradient that is still to come survives `zero_grad`.
        """
        self._looked_up = number = self._looked_up + 1
        # Weak, or table and rows would hold each other.
        owner = weakref.ref(self)

        def reached(rows: Tensor) -> None:
            table = owner()
            if table is not None:
                table._touched[number] = ids, rows

        rows.register_post_accumulate_grad_hook(reached)

    def against(
        self, query: Tensor, ids: Tensor, reduction: str, offset: float, temperature: float, backend: str | None = None
    ) -> Tensor:
        """The loss of queries [B, D] against the rows of ids int64 [B, 1 + N], true answers first, as
        :func:`dhns_fast.loss.corruption_loss` gives it; only of a :attr:`direct` table.

        Rows are read where they lie, and of their gradients only the factors are kept (:class:`Pairs`), until the
        optimiser adds them up: neither the looked-up rows nor their gradients are ever written.

        Raises:
            InputError: the table is not direct, or offset or temperature requires a gradient, which nothing here
                computes.
        """
        self.check_direct()
        for name, value in (("offset", offset), ("temperature", temperature)):
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise InputError(name, Shown("a tensor that requires a gradient"), "numbers; it would get none")
        # Like a look-up's rows a leaf, which a gradient reaches where one of all is asked for, and not that of the
        # query alone (torch.autograd.grad).
        reached, found = torch.empty(0, dtype=self.weight.dtype), list[Pairs]()
        if self._is_trained():
            owner = weakref.ref(self)

            def take(_: Tensor) -> None:
                if (table := owner()) is not None:
                    table._pairs.append(found.pop())

            reached.requires_grad_().register_post_accumulate_grad_hook(take)
        arguments = self, ids, reduction, offset, temperature, backend or "", found
        return _Against.apply(query, reached, *arguments)

    def whole(self) -> Tensor:
        """The rows here `[n, D]`, outside of autograd: the table itself, or a float32 copy of a bfloat16 one."""
        return self.weight.detach().to(accumulator(self.weight.dtype))

    def part(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end − 1 of those here, like :meth:`whole`."""
        return self.weight.detach()[begin:end].to(accumulator(self.weight.dtype))

    @torch.no_grad()
    def uniform_(self, bound: float, generator: torch.Generator | None = None) -> RowEmbedding:
        """Fill with numbers in ±bound. A part of a table draws what the whole one would, and keeps its rows.

        Args:
            generator: on the CPU.
        """
        for first in range(0, self.num_embeddings, BLOCK):
            count = min(BLOCK, self.num_embeddings - first)
            values = torch.empty(count, self.dim, dtype=torch.float32, device="cpu")
            values.uniform_(-bound, bound, generator=generator)
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
        """(ids, gradients) of every look-up that a gradient has reached since the last call, in the order of the
        look-ups.
        """
        touched, self._touched = self._touched, {}
        taken: Touched = []
        for _, (ids, rows) in sorted(touched.items(), key=lambda entry: entry[0]):
            if rows.grad is not None and len(ids):
                taken.append((ids, rows.grad))
                # A further pass through the same graph gives another step's gradient.
                rows.grad = None
        return taken

    def take_pairs(self) -> list[Pairs]:
        """What :meth:`against` has been given gradients for since the last call, in the order of backward passes."""
        pairs, self._pairs = self._pairs, []
        return pairs

    def update_pairs(
        self, pairs: list[Pairs], touched: Touched, state: Mapping[str, Any], method: str, arguments: Mapping[str, Any]
    ) -> None:
        """:meth:`update` with the gradients of pairs, all of one reduction, before the others."""
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

    def moves(self, has_gradients: bool) -> bool:
        """Whether a step moves this table, which has gradients for it here or not."""
        return has_gradients

    def new_state(self, method: str) -> dict[str, Tensor]:
        """The state of a method, zero: two moments `[E, D]`, a sum of squares `[E, D]`, or `[E]`."""
        dtype = accumulator(self.weight.dtype)
        shape = self.weight.shape[:1] if method == "rowwise-adagrad" else self.weight.shape
        names = ("first", "second") if method == "lazy-adam" else ("first",)
        return {name: memory.zeros(shape, dtype, self.weight.device) for name in names}

    def check_state(self, state: Mapping[str, Any], where: str) -> None:
        """Refuse a state, of the right shapes, that is of another table than this; `where` names it."""

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.dim}, dtype={self.weight.dtype}"


class _Against(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        reached: Tensor,
        table: RowEmbedding,
        ids: Tensor,
        reduction: str,
        offset: float,
        temperature: float,
        backend: str,
        found: list[Pairs],
    ) -> Tensor:
        weight, trained = table.weight.detach(), reached.requires_grad
        # A table that is frozen, or not trained by this call, does not move, and the next that is takes the permission.
        now = None
        if trained:
            now, table._at_once = table._at_once, None
        ctx.table, ctx.reduction, ctx.found = table, reduction, found
        ctx.at_once = now is not None and now.pays(ids)
        options = reduction, offset, temperature
        if now is not None and ctx.at_once:
            loss, by_query, slope, ids = corruption_step(
                weight, now.first, now.second, query, ids, now.others, *options, now.method, *now.rule, backend
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
        by_reached = None
        if ctx.needs_input_grad[1]:
            version = ctx.table.weight._version
            pairs = Pairs(query.detach().clone(), ids.clone(), grad * slope, ctx.reduction, version)
            ctx.found[:] = [pairs]
            by_reached = grad.new_empty(0, dtype=ctx.table.weight.dtype)
        return grad * by_query, by_reached, *[None] * 7


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss of a step's closure, which is differentiated even under `torch.no_grad`; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class RowOptimizer(Unguarded):
    """Base of the optimisers of :class:`RowEmbedding` tables.

    Args:
        tables: what to train, each once; everything else of a model goes to an optimiser of its own.
        lr: learning rate.
        eps: ε, added to the root.
        n3: λ of the regulariser λ·Σ|x|³ over the rows that a step touches, whose gradient is added without a graph.
        seed: of the stochastic rounding of bfloat16 tables.
        backend: "triton", "cpu" (C++), "eager", or None for the best there is.

    Raises:
        InputError: an argument is out of range; in :meth:`step`, an option of the group, a gradient of the whole table,
            or losses of two reductions. Nothing has moved then, and no gradient is lost.
        BackendUnavailableError: `backend` cannot be had here.
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
        if not isinstance(tables, Iterable):
            raise InputError("tables", Shown(type(tables).__name__), "a list of RowEmbedding modules")
        self.tables = list(tables)
        known: set[int] = set()
        for i, table in enumerate(self.tables):
            if not isinstance(table, RowEmbedding):
                raise InputError(f"tables[{i}]", Shown(type(table).__name__), "RowEmbedding modules")
            if id(table.weight) in known:
                raise InputError(f"tables[{i}]", Shown("a table that is there already"), "each table once")
            known.add(id(table.weight))
        if not self.tables:
            raise InputError("tables", Shown("none"), "one or more RowEmbedding modules")
        defaults = {"lr": lr, "eps": eps, "n3": n3, "seed": seed, "betas": betas}
        _check_options(defaults)
        if not lr:
            raise InputError("lr", lr, "positive numbers")
        defaults["seed"] = int(seed)
        if backend:
            backends.check(backend, (backends.TRITON, backends.CPU, backends.EAGER))
        self.backend = backend or ""
        super().__init__([table.weight for table in self.tables], defaults)
        for table in self.tables:
            self.state[table.weight] = {
                "step": torch.tensor(0, dtype=torch.int64, device="cpu"),
                **table.new_state(self.method),
            }

    def __getstate__(self) -> dict[str, Any]:
        # Torch's is of its own attributes alone; a copy must have the tables too.
        return {**super().__getstate__(), "tables": self.tables, "backend": self.backend}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: tables are given when the optimiser is made, and other parameters to one of their own."""
        if self.param_groups:
            raise InputError(
                "param_group", Shown("another group"), "none: an optimiser of its own (Together joins them)"
            )
        super().add_param_group(param_group)

    def schedule(self, group: Mapping[str, Any], number: int) -> dict[str, float]:
        """`rate`, `beta1`, `beta2` and `correction` of update `number`, from 1."""
        return {"rate": group["lr"], "beta1": 0.0, "beta2": 0.0, "correction": 1.0}

    def _state_of(self, table: RowEmbedding) -> dict[str, Tensor]:
        state = self.state.get(table.weight)
        if not state:
            got = Shown("a table whose weight has been replaced")
            raise InputError("tables", got, "the weights that the optimiser was made with")
        return state

    def _rule(self, table: RowEmbedding) -> dict[str, float]:
        """What the next step does to a row of a table: the numbers between `method` and `seed` of `row_update`."""
        group = self.param_groups[0]
        number = int(self._state_of(table)["step"]) + 1
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

        Raises:
            InputError: the table is not one of this optimiser's or not direct, or `others` are no such ids.
        """
        if not any(table is own for own in self.tables):
            raise InputError("table", Shown(f"another {type(table).__name__}"), "one of the optimiser's tables")
        table.check_direct()
        checks.tensor(others=others)
        checks.shapes(others=(others, "n"))
        checks.dtype(torch.int64, others=others)
        state = self._state_of(table)
        rule = self._rule(table)
        table._at_once = _AtOnce(state["first"], state.get("second"), others, self.method, tuple(rule.values()))
        try:
            yield
        finally:
            table._at_once = None

    def check_step(self) -> None:
        """Refuse, before any table has moved, what :meth:`step` cannot take.

        Raises:
            InputError: an option of the group that is none, a gradient of a whole table, losses of two reductions
                against one, a table that was changed after a loss of distances against it, or whose weight has been
                replaced, or is no longer of the dtype that its state has.
        """
        _check_options(self.param_groups[0], "param_groups[0]")
        for table in self.tables:
            if table.weight.grad is not None:
                raise InputError(
                    "tables",
                    Shown("a gradient of a whole table"),
                    "gradients of looked-up rows; torch.optim.Adam takes whole tables",
                )
            for pair in table._pairs:
                if pair.reduction != table._pairs[0].reduction:
                    accepted = f"{table._pairs[0].reduction!r}, as of the step's other pairs"
                    raise InputError("reduction", pair.reduction, accepted)
                if pair.reduction != "dot" and pair.version != table.weight._version:
                    got = Shown(f"rows changed between backward and step, of a {pair.reduction} loss against them")
                    raise InputError("tables", got, "changes before the loss, or after step()")
            state = self._state_of(table)
            moments = table.weight.detach(), state["first"], state.get("second")
            rule = tuple(self._rule(table).values())
            rowwise.check_update(rowwise.UpdateInputs(*moments, [], [], self.method, *rule, 0, 0, 0))  # type: ignore[arg-type,call-arg]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that a gradient has reached since the last step."""
        loss = _evaluated(closure)
        self.check_step()
        group = self.param_groups[0]
        for table in self.tables:
            touched, pairs = table.take(), table.take_pairs()
            # A table's steps are counted as torch counts a parameter's: those that have a gradient for it.
            if not table.moves(bool(touched or pairs)):
                continue
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
        """Forget the gradients that have reached rows since the last step. Those of a backward pass that is still to
        come do not belong to them, wherever its forward pass was.
        """
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.take()
            table.take_pairs()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back a state. Unlike torch's, moments keep their dtype where the table is bfloat16, and no copy of them
        is made.

        Raises:
            InputError: it is not a state of such an optimiser of such tables; nothing has been loaded then.
        """
        state_dict = _before_loading(self, state_dict)
        loaded = self.check_state(state_dict)
        for own, value in loaded:
            own.copy_(value)
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: copy.deepcopy(value) for name, value in given.items() if name != "params"})
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def check_state(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """(own tensor, what is to be copied into it) of every part of a state.

        Raises:
            InputError: a key, a shape or a dtype is not what this optimiser has, an option is out of range, or a number
                of steps or a sum of squares is below 0.
        """
        _check_groups(state_dict, self.param_groups)
        for index, (group, given) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            _check_options({**group, **given}, f"state_dict['param_groups'][{index}]")
        states = {int(index) if str(index).isdecimal() else index: x for index, x in state_dict["state"].items()}
        if set(states) != set(range(len(self.tables))):
            numbers = ", ".join(map(str, range(len(self.tables))))
            raise InputError(
                "state_dict['state']", Shown(f"states of {', '.join(map(str, states)) or 'none'}"), numbers
            )
        loaded = []
        for index, table in enumerate(self.tables):
            own, values, where = self.state[table.weight], states[index], f"state_dict['state'][{index}]"
            if not isinstance(values, Mapping) or set(values) != set(own):
                got = Shown(", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__)
                raise InputError(where, got, f"{', '.join(own)}, the state of {type(self).__name__}")
            for name, mine in own.items():
                try:
                    value = torch.as_tensor(values[name])
                except (TypeError, ValueError, RuntimeError):
                    raise InputError(f"{where}[{name!r}]", values[name], "tensors") from None
                if value.shape != mine.shape or value.dtype != mine.dtype:
                    raise InputError(f"{where}[{name!r}]", value, f"{mine.dtype} {list(mine.shape)}")
                # The first moment of Adam alone may be of either sign.
                either_sign = name.endswith("first") and self.method == "lazy-adam"
                if not either_sign and value.numel() and not value.min() >= 0:
                    raise InputError(f"{where}[{name!r}]", Shown(f"a least value of {value.min()}"), "values >= 0")
                loaded.append((mine, value))
            table.check_state(values, where)
        return loaded


def _before_loading(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state as the hooks for it leave it; the caller's own dictionary stays as it is."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    if hooks:
        state_dict = dict(state_dict)
    for hook in hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict  # type: ignore[arg-type]
    return state_dict


def _check_groups(state_dict: Mapping[str, Any], own: list[dict[str, Any]]) -> None:
    """Refuse what is no state of an optimiser of as many groups, of as many parameters each."""
    if not isinstance(state_dict, Mapping):
        raise InputError("state_dict", Shown(type(state_dict).__name__), "what state_dict() returned")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            got = Shown(type(state_dict[key]).__name__ if key in state_dict else "nothing")
            raise InputError(f"state_dict[{key!r}]", got, "what state_dict() returned")
    groups = state_dict["param_groups"]
    counts = [len(group.get("params", ())) if isinstance(group, Mapping) else 0 for group in groups]
    wanted = [len(group["params"]) for group in own]
    if counts != wanted:
        raise InputError("state_dict['param_groups']", Shown(f"groups of {counts} parameters"), f"{wanted}")


def _check_options(options: Mapping[str, Any], where: str = "") -> None:
    """Refuse options of a group that are out of range; a schedule may bring the rate to 0.

    Args:
        where: the group, as its user calls it; "" for arguments of their own.
    """

    def named(option: str) -> str:
        return f"{where}[{option!r}]" if where else option

    for option in ("lr", "eps", "n3"):
        checks.finite(**{named(option): options[option]})
        if not options[option] >= 0 or (option == "eps" and not options[option]):
            accepted = "positive numbers" if option == "eps" else "numbers of at least 0"
            raise InputError(named(option), options[option], accepted)
    betas = options["betas"]
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all(hasattr(beta, "__float__") and 0 <= beta < 1 for beta in betas)
    ):
        raise InputError(named("betas"), betas, "two numbers of at least 0 and below 1")
    checks.count(named("seed"), options["seed"], -checks.SEEDS - 1, checks.SEEDS)


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

    Raises:
        InputError: they are none, or something else.
    """

    optimizers: list[torch.optim.Optimizer]

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        parts = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
        for i, part in enumerate(parts):
            if not isinstance(part, torch.optim.Optimizer):
                raise InputError(f"optimizers[{i}]", Shown(type(part).__name__), "optimisers")
        if not parts:
            raise InputError("optimizers", Shown("none"), "one or more optimisers")
        # What schedules read there they then do to every group, hence what all parts have.
        common = set.intersection(*(set(part.defaults) for part in parts))
        defaults = {name: value for name, value in parts[0].defaults.items() if name in common}
        # Torch's constructor would make groups and a state of this one's own; this makes all else.
        self.__setstate__({"optimizers": parts, "defaults": defaults})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """What the parts keep of each parameter."""
        return {parameter: x for optimizer in self.optimizers for parameter, x in optimizer.state.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it does not say which of the parts is meant."""
        raise InputError("param_group", Shown("another group"), "none: add it to one of .optimizers")

    def check_step(self) -> None:
        """:meth:`RowOptimizer.check_step` of the row-wise parts."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, (RowOptimizer, Together)):
                optimizer.check_step()

    def check_state(self, state_dict: Mapping[str, Any]) -> None:
        """:meth:`RowOptimizer.check_state` of the row-wise parts."""
        for optimizer, part in self._parts_of(state_dict):
            if isinstance(optimizer, (RowOptimizer, Together)):
                optimizer.check_state(part)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluated(closure)
        # What one of the others refuses must be known before the first has moved anything.
        self.check_step()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        out: dict[str, Any] = {"state": {}, "param_groups": []}
        for first, part in zip(self._firsts(), (optimizer.state_dict() for optimizer in self.optimizers), strict=True):
            out["state"] |= {first + index: values for index, values in part["state"].items()}
            out["param_groups"] += [
                {**group, "params": [first + index for index in group["params"]]} for group in part["param_groups"]
            ]
        for after in self._optimizer_state_dict_post_hooks.values():
            out = after(self, out) or out
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises:
            InputError: it is of other groups, or not a state of the row-wise part; nothing has been loaded then.
        """
        state_dict = _before_loading(self, state_dict)
        self.check_state(state_dict)
        for optimizer, part in self._parts_of(state_dict):
            optimizer.load_state_dict(part)
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def _parts_of(self, state_dict: Mapping[str, Any]) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
        """Each of the optimisers with its own part of a state."""
        _check_groups(state_dict, self.param_groups)
        groups = iter(state_dict["param_groups"])
        parts = []
        for first, optimizer in zip(self._firsts(), self.optimizers, strict=True):
            own = [{**next(groups), "params": group["params"]} for group in optimizer.state_dict()["param_groups"]]
            indices = [index for group in own for index in group["params"]]
            state = {
                index: state_dict["state"][first + index] for index in indices if first + index in state_dict["state"]
            }
            parts.append((optimizer, {"state": state, "param_groups": own}))
        return parts

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

    Raises:
        InputError: an argument is none of these.
    """
    checks.one_of("name", name, ROW_OPTIMIZERS)
    dense = list(others)
    rows = ROW_OPTIMIZERS[name](tables, lr=lr, n3=n3, seed=seed)
    if not dense:
        return rows
    return Together([rows, LightAdam(dense, lr=lr, fused=True) if name == "lazy-adam" else LightAdagrad(dense, lr=lr)])
