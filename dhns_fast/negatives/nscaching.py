"""Entities from a cache of those that the model scores high."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import SIDES, Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.data.negatives import NegativeSampler
from dhns_fast.errors import InputError
from dhns_fast.models import KGEModel
from dhns_fast.negatives.base import Sampler, candidate_scores, check_query, draw_below
from dhns_fast.ops.score import look_inside


class NSCaching(Sampler):
    """Negatives drawn uniformly from a cache for each (h, r) of tails and each (r, t) of heads, which follows the
    model: after every draw N₁ of the cached and N₂ fresh entities stay, drawn without replacement with probability ∝
    exp(score) (Zhang et al., "NSCaching: simple and efficient negative sampling for knowledge graph embedding", ICDE
    2019, algorithms 2 and 3).

    Fresh entities are no known answers. Drawing without replacement is the top N₁ of score + Gumbel noise. A query that
    train does not have is corrupted uniformly and has no cache.

    Args:
        known: filter of the training triples.
        model: whose scores the cache follows.
        num_negatives: N, drawn with replacement.
        cache: N₁.
        fresh: N₂.
        lazy: draws between two refreshes (0: every draw is followed by one).

    Cost: N₁ + N₂ scores a triple and refresh. Memory: 4·N₁ + 8 bytes a distinct (h, r) and (r, t).
    """

    def __init__(
        self,
        known: CSRFilter,
        model: KGEModel,
        num_negatives: int = 64,
        cache: int = 64,
        fresh: int = 64,
        lazy: int = 0,
    ) -> None:
        super().__init__(known, num_negatives, model)
        cache, fresh = checks.count("cache", cache), checks.count("fresh", fresh)
        lazy = checks.count("lazy", lazy, 0)
        self.cache, self.lazy, self._draws = cache, lazy, 0
        self._start = NegativeSampler(known, known.num_entities, cache)
        self._fresh = NegativeSampler(known, known.num_entities, fresh)
        for side in SIDES:
            # Entry −1: not drawn yet. The last row is that of queries without a cache; it stays so.
            keys, _ = known.side(side).groups()
            self.register_buffer(f"_{side}_keys", keys, persistent=False)
            self.register_buffer(
                f"_{side}", torch.full((len(keys) + 1, cache), -1, dtype=torch.int32, device=known.device)
            )
        self._pending: tuple[Side, Tensor, torch.Generator | None] | None = None

    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        triples = torch.stack([h, r, t], 1)
        keys = self.get_buffer(f"_{side}_keys")
        key = (h if side == "tail" else t) * self.known.num_relations + r
        group = torch.searchsorted(keys, key)
        if len(keys):
            group = torch.where(keys[group.clamp(max=len(keys) - 1)] == key, group, len(keys))
        kept = self.get_buffer(f"_{side}")[group].long()
        kept = torch.where(kept >= 0, kept, self._start.corrupt(triples, side, generator))
        ids = kept.gather(1, draw_below(torch.full_like(h, self.cache), self.num_negatives, generator))
        if self._draws % (self.lazy + 1) == 0:
            candidates = torch.cat([kept, self._fresh.corrupt(triples, side, generator)], 1)
            self._pending = side, group, generator
            self.update(candidates, candidate_scores(self.model, h, r, t, candidates, side))
        self._draws += 1
        return ids

    @torch.no_grad()
    def update(self, ids: Tensor, scores: Tensor) -> None:
        """Put N₁ of the candidates into the caches of the queries of the last `sample`.

        Args:
            ids: candidates int64 [B, C], C >= N₁.
            scores: the model's, [B, C].
        """
        if self._pending is None:
            raise InputError("ids", ids, "candidates of the queries of a `sample` before")
        side, group, generator = self._pending
        checks.shapes(ids=(ids, "B C"), scores=(scores, "B C"), **{"queries of the last sample": (group, "B")})
        if ids.device.type == "cpu":
            look_inside("ids", ids, self.known.num_entities)
        if ids.shape[1] < self.cache:
            raise InputError("ids", ids, f"at least {self.cache} candidates a query, the size of the cache")
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=torch.float64)
        # One that has no score stays out, as long as there are others, be their scores −∞.
        scores = scores.double().clamp_min(torch.finfo(torch.float64).min).nan_to_num(nan=-torch.inf)
        gumbel = scores - (-uniform.clamp_min(1e-300).log()).log()
        new = ids.gather(1, gumbel.topk(self.cache, 1).indices).int()
        # One query may be in several rows: the last of them counts, on every device.
        table = self.get_buffer(f"_{side}")
        last = group.new_zeros(len(table)).scatter_reduce(
            0, group, torch.arange(len(group), device=group.device), "amax"
        )
        new = torch.where((group == len(table) - 1).unsqueeze(1), -1, new[last[group]])
        table.index_put_((group,), new)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._draws)

    def set_extra_state(self, state: Tensor) -> None:
        self._draws = int(state)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        device = self.known.device
        self._start, self._fresh = self._start.to(device), self._fresh.to(device)
        return out
