"""What every sampler of negatives is: the protocol, and what several of them need."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast import checks
from dhns_fast.catalogue import SIDES, Side
from dhns_fast.data.filter import CSRFilter, Ragged
from dhns_fast.data.negatives import NegativeSampler
from dhns_fast.errors import InputError, Shown
from dhns_fast.models import KGEModel
from dhns_fast.ops.score import look_inside

# Elements of the candidates' embeddings that are gathered at once to score them: 32 MB of float32.
GATHERED = 1 << 23


class Sampler(nn.Module):
    """Negatives of triples, by id or as embeddings.

    A subclass writes `sample`, `generate` or both. Whatever training changes (caches, generators) is in its
    `state_dict`; the scoring model that it looks at is not.

    Attributes:
        by_id: whether `sample` gives ids.
        by_embedding: whether `generate` gives embeddings.
        learns: whether `update` wants the scores of what training has drawn.
        optimizer: of what `update` trains, or None.
        num_negatives: N.
    """

    by_id: ClassVar[bool] = True
    by_embedding: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, known: CSRFilter, num_negatives: int, model: KGEModel | None = None) -> None:
        super().__init__()
        checks.instance(CSRFilter, "a CSRFilter", known=known)
        self.num_negatives = num_negatives = checks.count("num_negatives", num_negatives)
        self.uniform = NegativeSampler(known, known.num_entities, num_negatives)
        # In a tuple, so that the model is no part of this module.
        self._held = (model,)

    @property
    def known(self) -> CSRFilter:
        """The answers that the graph knows, which are no negatives."""
        return self.uniform.known

    @property
    def model(self) -> KGEModel:
        """The scoring model that is looked at."""
        model = self._held[0]
        assert model is not None
        return model

    def sample(
        self, h: Tensor, r: Tensor, t: Tensor, side: Side = "tail", generator: torch.Generator | None = None
    ) -> Tensor:
        """Entities to put in place of one side of each triple, int64 [B, N].

        Args:
            h, r, t: ids, int64 [B] each, in range.
            side: the side that is replaced.
            generator: source of randomness, on the device of the ids; None: the device's own.

        Raises:
            InputError: an argument does not fit, or this sampler makes embeddings alone.
        """
        raise InputError("sample", Shown(type(self).__name__), "samplers by id; this one has generate alone")

    def generate(
        self, h: Tensor, r: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings to put in place of heads and of tails, one for each of L levels and M modalities: two tensors [L,
        M, B, D] without gradient.

        Args:
            h, r, t, generator: as of `sample`.

        Raises:
            InputError: an argument does not fit, or this sampler makes ids alone.
        """
        raise InputError("generate", Shown(type(self).__name__), "samplers of embeddings; this one has sample alone")

    def update(self, ids: Tensor, scores: Tensor) -> None:
        """Learn from how the model scored what the last `sample` gave: ids int64 [B, N], scores [B, N]. Most samplers
        have nothing to learn.
        """

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        probe = args[0](torch.empty(0))
        if probe.device != self.known.device:
            self.uniform = self.uniform.to(probe.device)
        return out


def check_query(known: CSRFilter, h: Tensor, r: Tensor, t: Tensor, side: str = "tail") -> None:
    """Refuse ids that are not int64 [B] each where the filter is, or (on the CPU) out of its range; or an unknown
    side.
    """
    checks.one_of("side", side, SIDES)
    checks.tensor(h=h, r=r, t=t)
    checks.dtype(torch.int64, h=h, r=r, t=t)
    checks.shapes(h=(h, "B"), r=(r, "B"), t=(t, "B"))
    checks.on_device("the filter", known.tail.packed, h=h, r=r, t=t)
    if h.device.type == "cpu":
        for name, ids, end in (
            ("h", h, known.num_entities),
            ("r", r, known.num_relations),
            ("t", t, known.num_entities),
        ):
            look_inside(name, ids, end)


def draw_below(count: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Uniform integers in [0, count), int64 [B, n], of counts int64 [B]; 0 where the count is 0."""
    # float64: 53 random bits, and the product stays below the count after rounding.
    draw = torch.rand(len(count), n, generator=generator, device=count.device, dtype=torch.float64)
    return draw.mul_(count.unsqueeze(1)).long()


def answers(known: CSRFilter, h: Tensor, r: Tensor, t: Tensor, side: Side) -> Ragged:
    """The known answers of each query and the answer that the triple itself gives, rising and unique."""
    entity, own = (h, t) if side == "tail" else (t, h)
    E = known.num_entities
    index = torch.arange(len(h), device=h.device)
    keys = torch.cat([known.answers(side, entity, r).keys(E), index * E + own]).unique()
    return Ragged.of_keys(keys, len(h), E)


@torch.no_grad()
def candidate_scores(model: KGEModel, h: Tensor, r: Tensor, t: Tensor, ids: Tensor, side: Side) -> Tensor:
    """Scores [B, C] of candidates int64 [B, C] in place of one side of each triple, without gradient."""
    if ids.numel() >= model.num_entities:
        table, place = model.table(), ids
    else:
        unique, place = ids.unique(return_inverse=True)
        table = model.embed(unique)
    table = model.view(table, side)
    q, scale = model.query(h if side == "tail" else t, r, side)
    rows = max(1, GATHERED // max(1, ids.shape[1] * table.shape[1]))
    parts = [
        model.match(
            (q[i : i + rows], None if scale is None else scale[i : i + rows]), F.embedding(place[i : i + rows], table)
        )
        for i in range(0, len(ids), rows)
    ]
    return torch.cat(parts) if parts else q.new_empty(ids.shape)


@torch.no_grad()
def fused(model: KGEModel, embeddings: Tensor, ids: Tensor) -> Tensor:
    """Embeddings [M, B, D] in place of entities int64 [B], as they are scored: joint over the modalities that these
    have, or the structure.
    """
    fusion = model.fusion
    if fusion is None or fusion.attention is None:
        return embeddings[0]
    return torch.einsum("mn,mnd->nd", fusion.weights(embeddings, fusion.mask(ids)), embeddings)
