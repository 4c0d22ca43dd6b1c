"""The consumers of distances to all entities in CUDA C++ (csrc/score.cu): the functions of `dhns_fast.ops.score_eager`
as methods.

Products of `dot` and the gradients are Triton's. The kernels read float32 and bfloat16 tables as they are; float16, and
narrow tables with a scale, are widened a share at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.kernels import score as kernels
from dhns_fast.ops import score_triton

_REDUCTIONS = {name: code for code, name in enumerate(REDUCTIONS)}  # csrc/reductions.h
_CONSUMERS = {"rank": 0, "maxima": 1, "best": 1, "again": 2, "logsumexp": 3, "scores": 4, "doubt": 5}
# Rows and columns of a block's tile, as csrc/score.cu has them.
TILE = kernels.Config(128, 128, 32, 8, 2)


@dataclass(frozen=True)
class Distances:
    """Operands of distances as the kernel gets them; what :func:`dhns_fast.kernels.score.best` asks of sweeps.

    Args:
        query, scale: float32 [B, D].
        native: the operators distance_sweep and distance_targets.
    """

    query: Tensor
    entity: Tensor
    scale: Tensor | None
    reduction: str
    native: Any
    config: kernels.Config = TILE

    @classmethod
    def of(cls, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Distances:
        return cls(
            query.float(), entity, None if scale is None else scale.float(), reduction, torch.ops.dhns_fast_native
        )

    @property
    def widened(self) -> bool:
        return self.entity.dtype != torch.float32 and (self.entity.dtype != torch.bfloat16 or self.scale is not None)

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(first entity, table): all of it, or a share at a time where it has to be widened."""
        size = (
            max(self.config.BN, kernels.ROUNDED_BYTES // (4 * self.entity.shape[1]))
            if self.widened
            else max(1, len(self.entity))
        )
        for base in range(0, len(self.entity), size):
            part = self.entity[base : base + size]
            yield base, part.float() if self.widened else part

    def sweep(
        self, consumer: str, query: Tensor, entity: Tensor, base: int, out: list[Tensor],
        known: tuple[Tensor, Tensor] | None = None, target: Tensor | None = None, goal: Tensor | None = None, slots: int = 0,
        doubt: Tensor | None = None,
    ) -> None:  # fmt: skip
        first = query.data_ptr() - self.query.data_ptr()  # a share of the queries has its share of the scales
        start = first // (self.query.element_size() * self.query.shape[1])
        scale = None if self.scale is None else self.scale[start : start + len(query)]
        filters = known is not None and known[1].numel() > 0
        offsets, ids = known if known is not None and filters else (None, None)
        again = consumer == "again"
        # The scores of "again" and "scores" are the second result of the others.
        results = (None, out[0]) if consumer in ("again", "scores") else (out[0], out[1] if len(out) > 1 else None)
        self.native.distance_sweep(
            _REDUCTIONS[self.reduction], _CONSUMERS[consumer], query, scale, entity, offsets, ids, None if again else target,
            target if again else doubt, goal, *results, base, kernels.shares_of(query, entity, self.config)[0], slots,
        )  # fmt: skip

    def targets(self, target: Tensor) -> Tensor:
        own = self.entity[target]
        out = torch.empty(len(self.query), device=self.query.device)
        row = torch.arange(len(target), device=target.device)
        own = own.float() if self.widened else own
        self.native.distance_targets(_REDUCTIONS[self.reduction], self.query, self.scale, own, row, out)
        return out

    def ranks(self, target: Tensor, at_target: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        if kernels.by_product(self.query, self.entity, self.scale, self.reduction) and not self.widened:

            def settle(part: Tensor, base: int, doubt: Tensor) -> Tensor:
                shares = kernels.shares_of(self.query, part, self.config)[0]
                counts = torch.empty(shares, 3, len(self.query), dtype=torch.int32, device=doubt.device)
                known, words = (offsets, ids), doubt.shape[1]
                self.sweep("doubt", self.query, part, base, [counts], known, target, at_target, words, doubt)
                return counts

            return kernels.near_ranks(self.query, self.entity, target, at_target, offsets, ids, settle)
        total = torch.zeros(3, len(self.query), dtype=torch.int64, device=self.query.device)
        for base, part in self.parts():
            shares = kernels.shares_of(self.query, part, self.config)[0]
            counts = torch.empty(shares, 3, len(self.query), dtype=torch.int32, device=self.query.device)
            self.sweep("rank", self.query, part, base, [counts], (offsets, ids), target, at_target)
            total += counts.sum(0, dtype=torch.int64)
        return total

    def logsumexp(self) -> Tensor:
        found = []
        for base, part in self.parts():
            out = torch.empty(
                2, kernels.shares_of(self.query, part, self.config)[0], len(self.query), device=self.query.device
            )
            self.sweep("logsumexp", self.query, part, base, [out[0], out[1]])
            found.append(out[0] + out[1].log())
        return torch.cat(found).logsumexp(0)

    def scores(self) -> Tensor:
        out = torch.empty(len(self.query), len(self.entity), device=self.query.device)
        for base, part in self.parts():
            scores = out if len(part) == len(self.entity) else out.new_empty(len(self.query), len(part))
            self.sweep("scores", self.query, part, base, [scores])
            if scores is not out:
                out[:, base : base + len(part)] = scores
        return out


class Scores(score_triton.Scores):
    """The consumers of distances."""

    distances: Callable[..., Distances] = staticmethod(Distances.of)

    def target_scores(
        self, query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str
    ) -> Tensor:
        return self.distances(query, entity, scale, reduction).targets(target)

    def rank_counts(
        self,
        query: Tensor,
        entity: Tensor,
        target: Tensor,
        at_target: Tensor,
        offsets: Tensor,
        ids: Tensor,
        scale: Tensor | None,
        reduction: str,
    ) -> Tensor:
        return self.distances(query, entity, scale, reduction).ranks(target, at_target, offsets, ids)

    def topk_all(
        self, query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
    ) -> tuple[Tensor, Tensor]:
        return kernels.best(self.distances(query, entity, scale, reduction), k, offsets, ids)

    def logsumexp_all(self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
        return self.distances(query, entity, scale, reduction).logsumexp()

    def score_all(self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
        return self.distances(query, entity, scale, reduction).scores()
