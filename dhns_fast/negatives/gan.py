"""Entities drawn by a generator that learns which ones the model takes for true."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import Side
from dhns_fast.data.filter import CSRFilter
from dhns_fast.data.negatives import NegativeSampler
from dhns_fast.errors import InputError
from dhns_fast.models import DistMult, KGEModel
from dhns_fast.negatives.base import Sampler, check_query
from dhns_fast.optim import LightAdam

# Of rewards: means and differences of them are finite.
LARGEST = 1e18


class GAN(Sampler):
    """Negatives drawn by a second model from C uniform candidates, with probability softmax(its score); it learns by
    REINFORCE, the reward being the score that the trained model gives to what was drawn (Cai and Wang, "KBGAN:
    adversarial learning for knowledge graph embeddings", NAACL 2018). The baseline that is subtracted from the reward
    is its mean over the batch before.

    The paper draws one negative of 20 candidates and trains the generator beforehand; here N are drawn with replacement
    and it starts untrained, unless `generator_model` is given.

    Args:
        known: filter of the training triples.
        num_negatives: N.
        candidates: C.
        dim: width of the generator's embeddings, a DistMult.
        learning_rate: of its Adam.
        generator_model: another model on the same entities and relations in its place.

    Cost: C scores of width `dim` a triple, and the update of a table [E, dim].
    """

    learns = True
    baseline: Tensor
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        known: CSRFilter,
        num_negatives: int = 4,
        candidates: int = 20,
        dim: int = 64,
        learning_rate: float = 1e-3,
        generator_model: KGEModel | None = None,
    ) -> None:
        super().__init__(known, num_negatives)
        candidates = checks.count("candidates", candidates)
        self._candidates = NegativeSampler(known, known.num_entities, candidates)
        self.policy = (
            DistMult(known.num_entities, known.num_relations, dim) if generator_model is None else generator_model
        )
        self.optimizer = LightAdam(self.policy.parameters(), lr=learning_rate)
        self.register_buffer("baseline", torch.zeros(()))
        self._pending: tuple[Tensor, Tensor, Tensor, Side, Tensor, Tensor] | None = None

    @torch.no_grad()
    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        check_query(self.known, h, r, t, side)
        candidates = self._candidates.corrupt(torch.stack([h, r, t], 1), side, generator)
        share = self._scores(h, r, t, candidates, side).softmax(1)
        place = torch.multinomial(share, self.num_negatives, replacement=True, generator=generator)
        self._pending = h, r, t, side, candidates, place
        return candidates.gather(1, place)

    def update(self, ids: Tensor, scores: Tensor) -> None:
        """One step of REINFORCE on the last `sample`: ids int64 [B, N] as it gave them, the model's scores [B, N] as
        the reward. One that is not finite counts as the baseline, and of larger ones than 1e18 their sign.
        """
        if self._pending is None:
            raise InputError("ids", ids, "what the last `sample` gave, once")
        h, r, t, side, candidates, place = self._pending
        checks.shapes(ids=(ids, "B N"), scores=(scores, "B N"), **{"ids of the last sample": (place, "B N")})
        if ids.device.type == place.device.type == "cpu" and not torch.equal(ids, candidates.gather(1, place)):
            raise InputError("ids", ids, "what the last `sample` gave, as it gave them")
        reward = scores.detach().to(self.baseline)
        reward = torch.where(reward.isfinite(), reward.clamp(-LARGEST, LARGEST), self.baseline)
        self._pending = None
        with torch.enable_grad():
            chosen = self._scores(h, r, t, candidates, side).log_softmax(1).gather(1, place)
            self.optimizer.zero_grad(set_to_none=True)
            (-(reward - self.baseline) * chosen).mean().backward()
        self.optimizer.step()
        self.baseline.copy_(reward.mean())

    def _scores(self, h: Tensor, r: Tensor, t: Tensor, candidates: Tensor, side: Side) -> Tensor:
        policy = self.policy
        return policy.match(
            policy.query(h if side == "tail" else t, r, side), policy.view(policy.embed(candidates), side)
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        self._candidates = self._candidates.to(self.known.device)
        return out
