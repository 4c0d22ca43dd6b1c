"""PyKEEN's models under our operators: evaluation, prediction, training on corruptions, and DHNS as one of its negative
samplers.

    from dhns_fast.integrations.pykeen import evaluate
    results = evaluate(model, testing, known=(training, validation))
    results["both.realistic.inverse_harmonic_mean_rank"]

Ranks are exact, and PyKEEN's to the last tie but for rounding: both sides, all its rules for ties, its keys. PyKEEN's
RotatE is the Euclidean norm over all components, whatever its `p` says; that of the paper and of
:mod:`dhns_fast.models` sums the moduli. Which reduction stands for a model is in `FORMS`, and logged once. A model that
is not there is refused, as is inductive inference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dhns_fast.catalogue import Side
from dhns_fast.checks import whole
from dhns_fast.data import CSRFilter, NegativeSampler
from dhns_fast.errors import InputError, Shown
from dhns_fast.integrations.foreign import ForeignModel, by_relation, real
from dhns_fast.loss import corruption_loss
from dhns_fast.ranking import RankingResult, rank_side

if TYPE_CHECKING:
    from dhns_fast.sampler import DiffHEG

try:
    from pykeen.evaluation import RankBasedEvaluator, RankBasedMetricResults
    from pykeen.evaluation.rank_based_evaluator import _iter_ranks
    from pykeen.losses import NSSALoss
    from pykeen.sampling import NegativeSampler as PyKEENSampler
    from pykeen.training import TrainingLoop
except ImportError as error:
    _missing: ImportError | None = error

    class _Absent:
        """In place of a base class of PyKEEN, so that this module can be looked at without it."""

        def __init__(self, *args: Any, **options: Any) -> None:
            raise ImportError(f"{type(self).__name__} needs PyKEEN (pip install 'dhns-fast[rivals]')") from _missing

    RankBasedEvaluator = PyKEENSampler = TrainingLoop = _Absent
else:
    _missing = None

logger = logging.getLogger(__name__)

__all__ = [
    "CorruptionLossTrainingLoop",
    "DHNSNegativeSampler",
    "DhnsFastEvaluator",
    "PyKEENModel",
    "evaluate",
    "predict",
]

# The parts of an entity's or a relation's representation, as PyKEEN's interaction takes them: each `[n, ...]`.
Parts = Sequence[Tensor]
Query = tuple[Tensor, Tensor | None]


class Form(NamedTuple):
    """How an interaction of PyKEEN is a query, an entity view and a reduction.

    Attributes:
        reduction: by the interaction.
        query: (interaction, parts of the known entities `[B, ...]`, tables of relations, relation ids int64 `[B]`,
            tails are asked for) -> q and a scale or None.
        view: parts of all candidates -> `[E, D]`.
        constant: as `query`; what a score has beside the reduction, `[B]`: it changes no rank.
    """

    reduction: Callable[[Any], str]
    query: Callable[[Any, Parts, Parts, Tensor, bool], Query]
    view: Callable[[Parts], Tensor] = lambda parts: real(parts[0]).flatten(1)
    constant: Callable[[Any, Parts, Parts, Tensor, bool], Tensor] | None = None


def _norm(interaction: Any) -> str:
    if interaction.p not in (1, 2):
        raise InputError("model", Shown(f"{type(interaction).__name__} with p = {interaction.p}"), "p = 1 or 2")
    return f"l{int(interaction.p)}"


def _trilinear(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    """Σ h∘r∘t; complex: Re Σ h∘r∘conj(t)."""
    r = R[0][ids]
    return real(e[0] * (r if tail else r.conj())).flatten(1), None


def _translation(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    r = R[0][ids]
    return (e[0] + r if tail else e[0] - r), None


def _scaled_translation(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    """−‖h∘r_h + r_m − t∘r_t‖ of (r_h, r_t) or (r_h, r_m, r_t); TripleRE adds u to r_h and r_t."""
    of_head, *between, of_tail = (table[ids] for table in R)
    shift = getattr(i, "u", None) or 0.0
    own, other = (of_head + shift, of_tail + shift) if tail else (of_tail + shift, of_head + shift)
    q = e[0] * own
    for x in between:
        q = q + x if tail else q - x
    return q, other


def _correlation(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    """HolE: Σ_k r_k Σ_i h_i t_{i+k}: r ⋆ t for heads, the convolution of h and r for tails."""
    known, r = torch.fft.rfft(e[0]), torch.fft.rfft(R[0][ids])
    return torch.fft.irfft(known * (r if tail else r.conj()), n=e[0].shape[-1]), None


def _simple(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    """½·(Σ h₀∘r₀∘t₀ + Σ h₁∘r₁∘t₁): the same for either side."""
    return 0.5 * torch.cat([part * table[ids] for part, table in zip(e, R, strict=True)], -1), None


def _quaternion(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    formula = "bdi,bdj,ijk->bdk" if tail else "bdk,bdj,ijk->bdi"
    return -torch.einsum(formula, e[0], R[0][ids], i.table).flatten(1), None


def _bilinear(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    return by_relation(e[0], ids, lambda found: R[0][found] if tail else R[0][found].mT), None


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """a, b of a batch norm in eval mode, a∘x + b."""
    if norm is None:
        return torch.ones_like(like), torch.zeros_like(like)
    a = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return a, norm.bias - norm.running_mean * a


def _tucker_core(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Tensor:
    """M_r·(a₂∘t) for heads, M_rᵀ·(a₁∘h + b₁) for tails, M_r = core ×₂ r."""
    (a1, b1), (a2, _) = (_affine(norm, e[0][0]) for norm in (i.head_batch_norm, i.head_relation_batch_norm))
    known = a1 * e[0] + b1 if tail else a2 * e[0]
    formula = "ijk,rj->rik" if tail else "ijk,rj->rki"
    return by_relation(known, ids, lambda found: torch.einsum(formula, i.core_tensor, R[0][found]))


def _tucker(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    (a1, _), (a2, b2) = (_affine(norm, e[0][0]) for norm in (i.head_batch_norm, i.head_relation_batch_norm))
    x = _tucker_core(i, e, R, ids, tail)
    return (a2 * x + b2 if tail else a1 * x), None


def _tucker_constant(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Tensor:
    (_, b1), (_, b2) = (_affine(norm, e[0][0]) for norm in (i.head_batch_norm, i.head_relation_batch_norm))
    return e[0].new_zeros(len(ids)) if tail else _tucker_core(i, e, R, ids, tail) @ b1 + e[0] @ b2


def _transf(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    """2·h·t + r·t − h·r."""
    return 2 * e[0] + (R[0][ids] if tail else -R[0][ids]), None


def _autosf(i: Any, e: Parts, R: Parts, ids: Tensor, tail: bool) -> Query:
    q = [torch.zeros_like(part) for part in e]
    for h, r, t, sign in i.coefficients:
        known, wanted = (h, t) if tail else (t, h)
        q[wanted] = q[wanted] + sign * e[known] * R[r][ids]
    return torch.cat(q, -1), None


def _concatenated(parts: Parts) -> Tensor:
    return torch.cat(list(parts), -1)


def _dot(interaction: Any) -> str:
    return "dot"


# By the name of the interaction's class in pykeen.nn.modules; a subclass of one has a score of its own and is not
# meant.
FORMS: dict[str, Form] = {
    "TransEInteraction": Form(_norm, _translation),
    "UMInteraction": Form(_norm, lambda i, e, R, ids, tail: (e[0], None)),
    "RotatEInteraction": Form(lambda i: "l2", _trilinear),
    "PairREInteraction": Form(_norm, _scaled_translation),
    "LineaREInteraction": Form(_norm, _scaled_translation),
    "TripleREInteraction": Form(_norm, _scaled_translation),
    "DistMultInteraction": Form(_dot, _trilinear),
    "ComplExInteraction": Form(_dot, _trilinear),
    "CPInteraction": Form(_dot, _trilinear),
    "HolEInteraction": Form(_dot, _correlation),
    "SimplEInteraction": Form(_dot, _simple, _concatenated),
    "AutoSFInteraction": Form(_dot, _autosf, _concatenated),
    "QuatEInteraction": Form(_dot, _quaternion),
    "RESCALInteraction": Form(_dot, _bilinear),
    "TuckERInteraction": Form(_dot, _tucker, constant=_tucker_constant),
    "TransFInteraction": Form(
        _dot, _transf, constant=lambda i, e, R, ids, tail: (e[0] * R[0][ids]).sum(-1) * (-1 if tail else 1)
    ),
    "DistMAInteraction": Form(
        _dot,
        lambda i, e, R, ids, tail: (e[0] + R[0][ids], None),
        constant=lambda i, e, R, ids, tail: (e[0] * R[0][ids]).sum(-1),
    ),
}


class PyKEENModel(ForeignModel):
    """A model of PyKEEN as :func:`dhns_fast.ranking.evaluate` and the operators take it.

    Its representations are computed once, here, and are those of its eval mode; make a new one after a step of
    training.

    Args:
        model: a `pykeen.models.ERModel` whose interaction is in `FORMS`. With inverse relations heads are asked for
            through them, as PyKEEN does.

    Raises:
        InputError: the model's interaction is not among `FORMS`.
    """

    def __init__(self, model: Any) -> None:
        interaction: Any = getattr(model, "interaction", None)
        if type(interaction).__name__ == "ClampedInteraction":  # PyKEEN's SimplE comes in one
            if interaction.clamp_score is not None:
                raise InputError(
                    "model",
                    Shown(f"scores clamped to {interaction.clamp_score}"),
                    "scores as they are (clamp_score=None)",
                )
            interaction = interaction.base
        kind = type(interaction)
        if kind.__module__ != "pykeen.nn.modules" or kind.__name__ not in FORMS:
            found = kind.__name__ if interaction is not None else type(model).__name__
            accepted = ", ".join(name.removesuffix("Interaction") for name in FORMS)
            raise InputError("model", Shown(found), f"PyKEEN models whose interaction is one of {accepted}")
        self.model, self.interaction, self.form = model, interaction, FORMS[kind.__name__]
        real_relations = int(model.num_real_relations)
        super().__init__(
            f"PyKEEN's {type(model).__name__}",
            int(model.num_entities),
            real_relations,
            self.form.reduction(interaction),
        )
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                self.load()
        finally:
            model.train(training)

    def load(self) -> None:
        """Take the representations as they are now; gradients flow into the model where they are enabled."""
        self.tables = [representation(indices=None) for representation in self.model.entity_representations]
        self.parts = {
            "head": [self.tables[i] for i in self.interaction.head_indices],
            "tail": [self.tables[i] for i in self.interaction.tail_indices],
        }
        self.relations = [representation(indices=None) for representation in self.model.relation_representations]
        self._views: dict[str, Tensor] = {}

    def _asked(self, entity: Tensor, relation: Tensor, side: str) -> tuple[Parts, Parts, Tensor, bool]:
        """What a form reads: with inverse relations every query is one for a tail."""
        tail = side == "tail"
        if self.model.use_inverse_triples:
            pair = torch.stack([entity, relation], 1)
            relation = self.model.relation_inverter.map(pair, index=1, invert=not tail)[:, 1]
            tail = True
        return [part[entity] for part in self.parts["head" if tail else "tail"]], self.relations, relation, tail

    def query(self, entity: Tensor, relation: Tensor, side: str) -> Query:
        return self.form.query(self.interaction, *self._asked(entity, relation, side))

    def entities(self, side: str) -> Tensor:
        side = "tail" if self.model.use_inverse_triples else side
        if side not in self._views:
            self._views[side] = self.form.view(self.parts[side])
        return self._views[side]

    def finish(self, reduced: Tensor, entity: Tensor, relation: Tensor, side: str) -> Tensor:
        if self.form.constant is not None:
            reduced = reduced + self.form.constant(self.interaction, *self._asked(entity, relation, side))[:, None]
        if (
            getattr(self.interaction, "power_norm", False)
            and self.reduction == "l2"
            and "RotatE" not in type(self.interaction).__name__
        ):
            reduced = -reduced.square()
        return reduced.sigmoid() if self.model.predict_with_sigmoid else reduced


class PyKEENRankingResult(RankingResult):
    """A :class:`dhns_fast.ranking.RankingResult` that also has the rest of PyKEEN's keys, computed by PyKEEN from the
    same ranks.
    """

    _pykeen: Any = None

    def pykeen(self) -> Any:
        """The same as PyKEEN's `RankBasedMetricResults`."""
        if self._pykeen is None:
            if _missing is not None:
                raise ImportError("this key is computed by PyKEEN (pip install 'dhns-fast[rivals]')") from _missing
            evaluator = RankBasedEvaluator()
            self._pykeen = _pykeen_result(evaluator, {"head": self.head, "tail": self.tail})
        return self._pykeen

    def __getitem__(self, key: str) -> float:
        try:
            return super().__getitem__(key)
        except KeyError as unknown:
            # PyKEEN's dict has metrics that its `get_metric` refuses, such as pessimistic z-scores.
            if key in (named := self.pykeen().to_flat_dict()):
                return named[key]
            try:
                return self.pykeen().get_metric(key)
            except (KeyError, ValueError):
                raise unknown from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.pykeen().to_flat_dict())

    def __len__(self) -> int:
        return len(self.pykeen().to_flat_dict())

    def get_metric(self, name: str) -> float:
        """As PyKEEN's results have it."""
        return self[name]

    def to_flat_dict(self) -> Mapping[str, float]:
        """All of PyKEEN's keys."""
        return self.pykeen().to_flat_dict()


def _pykeen_result(evaluator: Any, sides: Mapping[str, Any]) -> Any:
    """PyKEEN's metrics of ranks that were counted here, in the dtypes of its own ranks, in which it also sums: from
    float64 a z-score of 10 000 triples differs in the fifth digit.
    """
    dtypes = {"optimistic": torch.int64, "realistic": torch.float32, "pessimistic": torch.int64}
    ranks = {
        (side, rule): [found.rank(rule).to(dtype).numpy()]
        for side, found in sides.items()
        for rule, dtype in dtypes.items()
    }
    candidates = {side: [found.candidates.numpy()] for side, found in sides.items()}
    return RankBasedMetricResults.from_ranks(
        evaluator.metrics, list(_iter_ranks(ranks=ranks, num_candidates=candidates))
    )


def evaluate(model: Any, triples: Any, known: Any = (), batch_size: int = 4096) -> PyKEENRankingResult:
    """Rank the true head and tail of every triple among all entities, as PyKEEN's `RankBasedEvaluator` does.

    Args:
        model: a PyKEEN model whose interaction is in `FORMS`, on any device.
        triples: int `[n, 3]` in PyKEEN's ids (head, relation, tail), or a triples factory.
        known: triples or factories that are no rivals, usually training and validation; `triples` always are such.
            None: raw ranks.
        batch_size: queries at once.

    Returns:
        results by PyKEEN's keys and ours: `results["both.realistic.inverse_harmonic_mean_rank"]`, `results["mrr"]`,
        `results.per_relation()`.

    Raises:
        InputError: the model is not known, or ids are out of range.
    """
    found = PyKEENModel(model).evaluate(triples, known, batch_size)
    return PyKEENRankingResult(
        found.triples, found.head, found.tail, found.categories, found.unseen, found.relation_names
    )


def predict(
    model: Any, entity: Any, relation: Any, side: Side = "tail", k: int = 10, known: Any = (), batch_size: int = 4096
) -> tuple[Tensor, Tensor]:
    """The k best answers of queries, exactly, without the scores of all entities in memory.

    Args:
        model: as of :func:`evaluate`.
        entity, relation: ids, one or int `[B]`: of heads where tails are asked for, of tails where heads are.
        side: "tail" or "head", the side that is asked for.
        k: 1 to min(E, 1024).
        known: triples or factories whose answers are left out.

    Returns:
        PyKEEN's scores `[B, k]`, best first, and entity ids int64 `[B, k]`; where fewer than k are left, −inf and −1.
    """
    return PyKEENModel(model).predict(entity, relation, side, k, known, batch_size)


class DhnsFastEvaluator(RankBasedEvaluator):
    """PyKEEN's `RankBasedEvaluator` with the ranks counted here: `pipeline(..., evaluator=DhnsFastEvaluator)`, also in
    early stopping.

    Batch, slice size and progress bar have no meaning here and are not looked at; models are those of :func:`evaluate`.
    """

    def evaluate(
        self,
        model: Any,
        mapped_triples: Tensor,
        batch_size: int | None = None,
        slice_size: int | None = None,
        device: Any = None,
        use_tqdm: bool = True,
        tqdm_kwargs: Mapping[str, Any] | None = None,
        restrict_entities_to: Collection[int] | None = None,
        restrict_relations_to: Collection[int] | None = None,
        do_time_consuming_checks: bool = True,
        additional_filter_triples: Any = None,
        pre_filtered_triples: bool = True,
        targets: Collection[str] = ("head", "tail"),
    ) -> Any:
        """As PyKEEN's, with its arguments."""
        if self.mode is not None:
            raise InputError("mode", self.mode, "None: inductive inference is not known here")
        if unknown := set(targets) - {"head", "tail"}:
            raise InputError("targets", sorted(unknown), "head, tail")
        model = model if device is None else model.to(device)
        adapted = PyKEENModel(model)
        table = adapted.triples(mapped_triples, "mapped_triples")
        if not pre_filtered_triples:
            table = _restricted(table, restrict_entities_to, restrict_relations_to)
        candidates = None
        if restrict_entities_to is not None:
            candidates = torch.as_tensor(sorted({int(e) for e in restrict_entities_to}))
            if len(left := _restricted(table, restrict_entities_to, None)) != len(table):
                raise InputError(
                    "mapped_triples",
                    Shown(f"{len(table) - len(left)} triples with an entity outside restrict_entities_to"),
                    "none such",
                )
        if not len(table):
            raise InputError("mapped_triples", Shown("no triples"), "one or more")
        index = None
        if self.filtered:
            others = additional_filter_triples if additional_filter_triples is not None else ()
            if not len(others):
                logger.warning("no additional_filter_triples are given: answers in training count as rivals")
            index = CSRFilter.from_triples(
                [adapted.filter(others, "additional_filter_triples"), table],
                adapted.num_entities,
                adapted.num_relations,
            )
        sides = {
            side: rank_side(adapted, table, side, index, candidates=candidates)
            for side in ("head", "tail")
            if side in targets
        }
        return _pykeen_result(self, sides)


def _restricted(triples: Tensor, entities: Collection[int] | None, relations: Collection[int] | None) -> Tensor:
    kept = torch.ones(len(triples), dtype=torch.bool)
    for columns, ids in (((0, 2), entities), ((1,), relations)):
        if ids is not None:
            among = torch.as_tensor(sorted({int(x) for x in ids}))
            for column in columns:
                kept &= torch.isin(triples[:, column], among)
    return triples[kept]


class CorruptionLossTrainingLoop(TrainingLoop):
    """PyKEEN's training loop with the self-adversarial loss of corruptions as one operator, which gathers no `[B, N,
    D]`.

    `pipeline(..., training_loop=CorruptionLossTrainingLoop, loss="nssa", training_loop_kwargs={"num_negatives": 64})`.
    Half of a batch is corrupted in its heads, half in its tails, as PyKEEN's basic sampler does. Regularisers see the
    rows of positives, PyKEEN's those of corruptions too.

    Args:
        num_negatives: N, corruptions a triple.
        filtered: leave out true answers of the training triples, exactly, without rejection.
        options: of PyKEEN's `TrainingLoop` (model, triples_factory, optimizer, ...). The model's loss must be
            `NSSALoss`: its margin and temperature are taken. Models with batch norm (TuckER), a power of a norm, or
            terms beside the reduction are refused.
    """

    def __init__(self, *, num_negatives: int = 64, filtered: bool = True, **options: Any) -> None:
        super().__init__(**options)
        whole("num_negatives", num_negatives, 1)
        self.num_negatives, self.filtered = num_negatives, filtered
        self.adapted = PyKEENModel(self.model)
        if type(self.model.loss) is not NSSALoss:
            raise InputError(
                "model.loss",
                Shown(type(self.model.loss).__name__),
                "NSSALoss, the self-adversarial loss that is computed here",
            )
        if self.model.loss.reduction != "mean":
            raise InputError("model.loss.reduction", self.model.loss.reduction, "'mean'")
        name = type(self.adapted.interaction).__name__
        if self.adapted.form.constant is not None or (
            getattr(self.adapted.interaction, "power_norm", False) and "RotatE" not in name
        ):
            raise InputError("model", Shown(name), "interactions that are a dot product or a plain norm")
        self._sampler: NegativeSampler | None = None

    def _create_training_data_loader(
        self,
        triples_factory: Any,
        *,
        batch_size: int,
        drop_last: bool,
        sampler: Any = None,
        shuffle: bool = True,
        **options: Any,
    ) -> Any:
        if sampler is not None:
            raise InputError("sampler", sampler, "None: triples are drawn uniformly")
        model = self.adapted
        triples = model.triples(triples_factory)
        known = CSRFilter.from_triples(triples, model.num_entities, model.num_relations)
        self._sampler = NegativeSampler(known, model.num_entities, self.num_negatives, filtered=self.filtered)
        rows: Any = triples  # a tensor has the length and the items of a dataset
        return torch.utils.data.DataLoader(rows, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, **options)

    @staticmethod
    def _get_batch_size(batch: Tensor) -> int:
        return len(batch)

    def _process_batch(
        self, batch: Tensor, start: int, stop: int, label_smoothing: float = 0.0, slice_size: int | None = None
    ) -> Tensor:
        if label_smoothing:
            raise InputError("label_smoothing", label_smoothing, "0")
        if slice_size is not None:
            raise InputError("slice_size", slice_size, "None: a batch is not sliced")
        assert self._sampler is not None
        batch = batch[start:stop]
        model, loss = self.adapted, self.model.loss
        self._load(batch)
        total = batch.new_zeros((), dtype=torch.float32, device=self.model.device)
        middle = (len(batch) + 1) // 2
        for side, part in (("head", batch[:middle]), ("tail", batch[middle:])):
            if not len(part):
                continue
            corrupt = self._sampler.corrupt(part, "head" if side == "head" else "tail").to(self.model.device)
            h, r, t = part.to(self.model.device).unbind(1)
            entity, answer = (h, t) if side == "tail" else (t, h)
            query, scale = model.query(entity, r, side)
            found = corruption_loss(
                query,
                model.entities(side),
                answer,
                corrupt,
                model.reduction,
                loss.margin,
                loss.inverse_softmax_temperature,
                scale=scale,
            )
            total = total + found * (len(part) / len(batch))
        return total + self.model.collect_regularization_term()

    def _load(self, batch: Tensor) -> None:
        """All representations, of which regularisers see the rows of the batch."""
        regularizers = [
            (i, kind, x.regularizer)
            for kind, found in (
                ("entity", self.model.entity_representations),
                ("relation", self.model.relation_representations),
            )
            for i, x in enumerate(found)
            if x.regularizer is not None
        ]
        for _, _, regularizer in regularizers:
            regularizer.eval()  # it then lets tables pass
        self.adapted.load()
        h, r, t = batch.to(self.model.device).unbind(1)
        for i, kind, regularizer in regularizers:
            regularizer.train(self.model.training)
            rows = (
                (self.adapted.tables[i][h], self.adapted.tables[i][t])
                if kind == "entity"
                else (self.adapted.relations[i][r],)
            )
            regularizer.update(*rows)

    def _slice_size_search(
        self, *, triples_factory: Any, batch_size: int, sub_batch_size: int, supports_sub_batching: bool
    ) -> int:
        raise MemoryError("a batch of one triple does not fit into memory")


class DHNSNegativeSampler(PyKEENSampler):
    """PyKEEN's negative sampler made of DHNS: a diffusion generates embeddings of heads and tails, hard to easy, and
    the negatives are the real entities nearest to them, true answers of the training triples left out.

    The generator learns beside the model, a step on its diffusion loss in every batch. `pipeline(...,
    negative_sampler=DHNSNegativeSampler, negative_sampler_kwargs={"model": model, "num_negs_per_pos": 10})`, of a
    PyKEEN TransE, DistMult, ComplEx or RotatE.

    Args:
        model: the model in training, whose embeddings are generated and searched.
        generator: a :class:`dhns_fast.sampler.DiffHEG` of the width of its (real) embeddings; None: a new one of 50
            steps, corrected behaviour.
        learning_rate: of the generator's Adam; 0 leaves it as it is.
        options: of PyKEEN's sampler. Of `num_negs_per_pos` negatives half (rounded down) replace heads, the rest tails;
            they come from the levels by turns, hardest first.
    """

    CONDITIONS: Mapping[str, str] = {
        "TransEInteraction": "transe",
        "DistMultInteraction": "distmult",
        "ComplExInteraction": "complex",
        "RotatEInteraction": "rotate",
    }

    def __init__(
        self, *, model: Any, generator: DiffHEG | None = None, learning_rate: float = 0.002, **options: Any
    ) -> None:
        from dhns_fast.sampler import DiffHEG

        mapped = options["mapped_triples"]
        super().__init__(**options)
        adapted = PyKEENModel(model)
        condition = self.CONDITIONS.get(type(adapted.interaction).__name__)
        if condition is None or model.use_inverse_triples:
            found = adapted.name + (" with inverse relations" if model.use_inverse_triples else "")
            raise InputError(
                "model", Shown(found), "PyKEEN's TransE, DistMult, ComplEx and RotatE without inverse relations"
            )
        table = adapted.entities("tail")
        dim = table.shape[1]
        if generator is None:
            dim_r = dim // 2 if condition == "rotate" else dim
            generator = DiffHEG(dim, 50, dim_r, margin=6.0, eps=2.0, condition=condition, behaviour="corrected").to(
                table.device
            )
        elif (generator.condition, generator.embedding_dim) != (condition, dim):
            raise InputError(
                "generator",
                Shown(f"condition {generator.condition!r}, width {generator.embedding_dim}"),
                f"{condition!r} and {dim}",
            )
        # Not submodules: the loop's optimiser, device and state are those of the model alone.
        self.__dict__["_parts"] = (model, generator)
        self._optimizer = torch.optim.Adam(generator.parameters(), lr=learning_rate) if learning_rate else None
        self._known = CSRFilter.from_triples(mapped, adapted.num_entities, adapted.num_relations)

    def corrupt_batch(self, positive_batch: Tensor) -> Tensor:
        """`[..., 3]` positives -> `[..., K, 3]`."""
        model, generator = self.__dict__["_parts"]
        triples = positive_batch.reshape(-1, 3)
        adapted = PyKEENModel(model)
        table = _split_halves(adapted.parts["tail"][0])
        h, r, t = triples.to(table.device).unbind(1)
        if (dtype := next(generator.parameters()).dtype) != table.dtype:
            raise InputError("model", Shown(f"parameters of {table.dtype}"), f"{dtype}, as the generator's")
        relation = adapted.relations[0][r]
        if generator.condition == "rotate":
            relation = relation.angle() * (generator.denoiser.scoring_module.rel_embedding_range / math.pi)
        x_h, x_r, x_t = table[h], _split_halves(relation), table[t]
        if self._optimizer is not None:
            with torch.enable_grad():
                self._optimizer.zero_grad()
                generator(x_h, x_r, x_t).backward()
                self._optimizer.step()
        heads, tails = generator.sample(x_h, x_r, x_t)
        count = self.num_negs_per_pos // 2
        negatives = triples[:, None].repeat(1, self.num_negs_per_pos, 1)
        near = adapted.reduction if adapted.reduction != "dot" else "l2"
        wishes: tuple[tuple[Side, int, int, list[Tensor], slice], ...] = (
            ("head", 2, 0, heads, slice(0, count)),
            ("tail", 0, 2, tails, slice(count, self.num_negs_per_pos)),
        )
        for side, kept, column, generated, at in wishes:
            wanted = at.stop - at.start
            if not wanted:
                continue
            answers = self._known.answers(side, triples[:, kept], triples[:, 1]).to(table.device)
            k = min(-(-wanted // len(generated)), len(table))
            ids = [generator.nearest(x, table, k, near, answers)[1] for x in generated]
            chosen = torch.stack(ids, -1).flatten(1)[:, :wanted].to(triples.device)
            # Where everything is known there is no negative to be had, and one of any kind is taken.
            negatives[:, at, column] = torch.where(chosen < 0, torch.randint_like(chosen, len(table)), chosen)
        return negatives.view(*positive_batch.shape[:-1], self.num_negs_per_pos, 3)


def _split_halves(x: Tensor) -> Tensor:
    """Complex `[..., D]` as the generator stores it, [re, im]."""
    return torch.cat([x.real, x.imag], -1) if x.is_complex() else x
