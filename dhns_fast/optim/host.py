"""A table in the host's memory for a device that cannot hold it, with the rows that are asked for most often on the
device.

Rows are divided once, by how often they are expected: the hot ones and their optimiser state live on the device, all
others in pinned host memory. No row is in use in two places, hence nothing to invalidate, and the result does not
depend on which rows are hot (but for the random bits that round a bfloat16 table).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import rowwise
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.score import look_inside
from dhns_fast.optim.rows import RowEmbedding, Touched


class HostEmbedding(RowEmbedding):
    """A row table whose cold rows lie in host memory; look-ups and gradients are on the device.

    `weight` holds the cold rows' values in place (the places of hot rows in it are stale); :meth:`gathered` gives the
    whole table.

    Args:
        num_embeddings: E.
        dim: D.
        device: where look-ups are wanted.
        hot: ids int64 `[H]` of rows to keep on the device, each once, such as the entities of most triples; None: none.
        dtype: of the table, see :class:`RowEmbedding`.
        weight: `[E, D]` on the host to take instead of making one.
    """

    complete = False
    slot: Tensor
    hot_rows: Tensor
    hot: Tensor

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        device: torch.device | str,
        hot: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__(num_embeddings, dim, dtype, weight=weight)
        self.device = torch.device(device)
        if self.weight.device.type != "cpu":
            raise InputError("weight", Shown(f"a tensor on {self.weight.device}"), "one in host memory")
        if self.device.type == "cuda":
            self.weight.data = self.weight.data.pin_memory()
        if hot is not None:
            checks.tensor(hot=hot)
        hot = torch.empty(0, dtype=torch.int64) if hot is None else hot.detach().cpu().clone()
        checks.shapes(hot=(hot, "H"))
        checks.dtype(torch.int64, hot=hot)
        if len(hot) and (int(hot.min()) < 0 or int(hot.max()) >= num_embeddings or len(hot.unique()) < len(hot)):
            raise InputError("hot", hot, f"ids from 0 to {num_embeddings - 1}, each once")
        slot = torch.full((num_embeddings,), -1, dtype=torch.int32)
        slot[hot] = torch.arange(len(hot), dtype=torch.int32)
        self.register_buffer("slot", slot.to(self.device), persistent=False)
        self.register_buffer("hot_rows", hot, persistent=False)
        self.register_buffer("hot", self.weight.detach()[hot].to(self.device), persistent=False)

    def _apply(self, function: Any, recurse: bool = True) -> HostEmbedding:
        """The table stays where it is when the module that holds it moves."""
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.gathered()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.hot.copy_(self.weight.detach()[self.hot_rows])

    def look_up(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError("ids", ids, "torch.int64 or torch.int32")
        # A negative number would count from the end.
        if ids.device.type == "cpu":
            look_inside("ids", ids, self.num_embeddings)
        slot = self.slot[ids].long()
        cold = slot < 0
        out = torch.empty(len(ids), self.dim, dtype=accumulator(self.weight.dtype), device=self.device)
        with torch.no_grad():
            wanted = ids[cold].cpu()
            out[cold] = rowwise.row_gather(self.weight, wanted).to(self.device)
            out[~cold] = rowwise.row_gather(self.hot, slot[~cold])
        return out

    def new_state(self, method: str) -> dict[str, Tensor]:
        cold = super().new_state(method)
        hot = {f"hot_{name}": x.new_zeros((len(self.hot), *x.shape[1:])).to(self.device) for name, x in cold.items()}
        return {**cold, **hot, "hot_rows": self.hot_rows.clone()}

    def check_state(self, state: Mapping[str, Any], where: str) -> None:
        if not torch.equal(state["hot_rows"].cpu(), self.hot_rows):
            raise InputError(f"{where}['hot_rows']", state["hot_rows"], "a state of a table with the same hot rows")

    def update(self, touched: Touched, state: Mapping[str, Any], method: str, arguments: Mapping[str, Any]) -> None:
        hot, cold = [], []
        for ids, gradient in touched:
            slot = self.slot[ids].long()
            away = slot < 0
            cold.append((ids[away].cpu(), gradient[away].cpu()))
            hot.append((slot[~away], gradient[~away]))
        super().update(cold, state, method, arguments)
        if len(self.hot):
            own = {name.removeprefix("hot_"): x for name, x in state.items() if name.startswith("hot_")}
            rows, gradients = ([pair[i] for pair in hot] for i in (0, 1))
            rowwise.row_update(
                self.hot, own["first"], own.get("second"), rows, gradients, method, row_offset=0, **arguments
            )

    def whole(self) -> Tensor:
        return self.gathered().to(self.device, accumulator(self.weight.dtype))

    def part(self, begin: int, end: int) -> Tensor:
        return self.look_up(torch.arange(begin, end, device=self.device))

    def uniform_(self, bound: float, generator: torch.Generator | None = None) -> HostEmbedding:
        super().uniform_(bound, generator)
        self.hot.copy_(self.weight.detach()[self.hot_rows])
        return self

    def gathered(self) -> Tensor:
        """The whole table `[E, D]` in host memory, hot rows in their places."""
        with torch.no_grad():
            self.weight[self.hot_rows] = self.hot.cpu()
        return self.weight.detach()
