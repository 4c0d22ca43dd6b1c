"""A table split by rows over the processes of a group: look-ups and gradients travel by all-to-all, the table stays
where it is.

Process p of P owns rows p·⌈E/P⌉ .. (p + 1)·⌈E/P⌉ − 1, which is how a DTensor with the placement Shard(0) lies, and as
one the table and its optimiser state are saved: what two processes wrote, four read, or one
(:mod:`dhns_fast.train.distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import memory, rowwise
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.rows import add_rows
from dhns_fast.ops.score import look_inside
from dhns_fast.optim.rows import RowEmbedding, Touched


def share(total: int, rank: int, processes: int) -> tuple[int, int]:
    """(first, end) of the rows of a process, as DTensor's Shard(0) divides `total` rows."""
    each = -(-total // processes)
    return min(rank * each, total), min((rank + 1) * each, total)


class ShardedEmbedding(RowEmbedding):
    """This process's rows of a table whose look-ups and gradients concern all of it.

    Every process of the group must look up, and update, together. A row's gradients are added in the order of the
    processes that hand them over.

    Args:
        num_embeddings: E, of the whole table.
        dim: D.
        group: the processes that hold it.
        dtype: of the table, see :class:`RowEmbedding`.
        weight: this process's rows; not copied. None: zeros.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype | None = None,
        *,
        weight: Tensor | None = None,
    ) -> None:
        self.group, self.processes = group, dist.get_world_size(group)
        first, end = share(num_embeddings, dist.get_rank(group), self.processes)
        if weight is None:
            weight = memory.zeros((end - first, dim), dtype or torch.float32)
        elif len(weight) != end - first:
            raise InputError(
                "weight", Shown(f"{len(weight)} rows"), f"the {end - first} rows from {first} on that this process owns"
            )
        super().__init__(end - first, dim, dtype, weight=weight)
        self.row_offset, self.num_embeddings = first, num_embeddings

    def look_up(self, ids: Tensor) -> Tensor:
        checks.dtype(torch.int64, ids=ids)
        # Out of range it would be sent to a process that there is not.
        if ids.device.type == "cpu":
            look_inside("ids", ids, self.num_embeddings)
        route = _Route(ids, -(-self.num_embeddings // self.processes), self.group)
        asked = route.exchange(route.sort(ids)) - self.row_offset
        with torch.no_grad():
            rows = rowwise.row_gather(self.weight, asked)
        return route.back(rows)

    def update(self, touched: Touched, state: Mapping[str, Any], method: str, arguments: Mapping[str, Any]) -> None:
        dtype = accumulator(self.weight.dtype)
        ids = torch.cat([self._none, *(ids for ids, _ in touched)])
        gradient = torch.cat([self.weight.new_empty(0, self.dim, dtype=dtype), *(gradient for _, gradient in touched)])
        # What several look-ups of this process have in common travels once.
        rows, place = ids.unique(return_inverse=True)
        if len(rows) < len(ids):
            sums = torch.zeros(len(rows), self.dim, dtype=dtype, device=gradient.device)
            add_rows(sums, place, gradient)
            ids, gradient = rows, sums
        route = _Route(ids, -(-self.num_embeddings // self.processes), self.group)
        owned = [(route.exchange(route.sort(ids)) - self.row_offset, route.exchange(route.sort(gradient)))]
        super().update(owned, state, method, arguments)

    def moves(self, has_gradients: bool) -> bool:
        """Every process takes part in an update that one of them has gradients for."""
        anyone = torch.tensor(int(has_gradients), device=self.weight.device)
        dist.all_reduce(anyone, dist.ReduceOp.MAX, group=self.group)
        return bool(anyone)

    @property
    def _none(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.weight.device)


class _Route:
    """Which of this process's ids belong to whom: one exchange of counts, then rows to their owners and back."""

    def __init__(self, ids: Tensor, each: int, group: dist.ProcessGroup) -> None:
        processes = dist.get_world_size(group)
        owner = ids // max(each, 1)
        self.group, self.order = group, owner.argsort(stable=True)
        sent = owner.bincount(minlength=processes)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        # The sizes of what follows must be known here: the one wait of a look-up.
        self.sent, self.received = sent.tolist(), received.tolist()

    def sort(self, x: Tensor) -> Tensor:
        return x[self.order]

    def exchange(self, x: Tensor) -> Tensor:
        """To the owners: what this process is given for the rows that it owns, in the order of the senders."""
        out = x.new_empty(sum(self.received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), self.received, self.sent, group=self.group)
        return out

    def back(self, x: Tensor) -> Tensor:
        """From the owners, in the order of the ids."""
        out = x.new_empty(sum(self.sent), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), self.sent, self.received, group=self.group)
        result = torch.empty_like(out)
        result[self.order] = out
        return result
