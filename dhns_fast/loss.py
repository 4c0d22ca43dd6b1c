"""The losses of DHNS training: hardness-adaptive over generated negatives, self-adversarial over uniform corruptions.

Source: Niu & Zhang, "Diffusion-based Hierarchical Negative Sampling for Multimodal Knowledge Graph Completion", DASFAA
2025 (arXiv 2501.15393); Sun et al., "RotatE", ICLR 2019 (arXiv 1902.10197).

Scores are "higher is better" throughout. Sizes: B triples, D embedding dimension, L hardness levels, M modalities, N
corruptions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

from dhns_fast import checks
from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.errors import InputError, NotFiniteError, Shown, shown
from dhns_fast.ops import corruption, hal
from dhns_fast.ops.precision import accumulator
from dhns_fast.ops.score import check_parts, look_inside
from dhns_fast.ops.score_eager import pair_scores
from dhns_fast.optim import RowEmbedding
from dhns_fast.scoring import score_all

# Arguments with a level in the first dimension: only the levels that count are looked at.
PER_LEVEL = ("negative", "neg_head", "neg_tail", "margin")
# A score of which no weight and no loss is left.
_LEFT_OUT = -1e30
_NOT_EACH = Shown("a mask with corruptions of each query"), "one with corruptions of all, int64 [N], only"


def hardness_adaptive_loss(
    positive: Tensor,
    negative: Tensor,
    margin: Tensor | Sequence[float],
    weight: Tensor | Sequence[float],
    mu: float = 0.01,
    *,
    backend: str | None = None,
) -> Tensor:
    """μ / (K·#{w > 0}) · Σ_i w_i Σ_k ½·[−mean_b logσ(p_b) − mean_b logσ(−(m_i + n_ik,b))], a scalar.

    Args:
        positive: scores p of the positive triples with the model's margin γ included, [B].
        negative: scores n of the corruptions (head, tail, both) before the margin, [L, K, B].
        margin: m, what each level adds to its scores, [L]: the paper's factors times γ for distances, zeros for
            products; may need a gradient.
        weight: w ≥ 0, [L]. Levels of weight 0 are neither read nor counted.
        mu: factor μ of the whole loss.
        backend: "cpu" (compiled, one pass), "eager", or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 scores; differentiable in `positive`, `negative` and `margin`.

    Raises:
        InputError: a shape, dtype or device does not fit, or a score that counts is not finite (found on CPU tensors
            only: looking would stall a GPU).
    """
    checks.tensor(positive=positive, negative=negative)
    checks.floating(positive=positive, negative=negative)
    margins, weights = _level_values(margin, weight, accumulator(positive.dtype, negative.dtype), positive)
    loss = hal.hal_scores(positive, negative, margins, weights, mu, backend or "")[0]
    _refuse_unless_finite(loss, weights, {"mu": mu}, positive=positive, negative=negative, margin=margins)
    return loss


def self_adversarial_loss(
    positive: Tensor, negative: Tensor, temperature: float = 0.5, *, backend: str | None = None
) -> Tensor:
    """½·[−mean_b logσ(p_b) − mean_b Σ_j softmax_j(a·n_bj)·logσ(−n_bj)], a scalar; no gradient flows through the
    softmax.

    Args:
        positive: scores p of the positive triples, γ included, [B].
        negative: scores n of N corruptions of each, γ included, [B, N].
        temperature: a; 0 weighs every corruption alike.
        backend: "cpu" (compiled, one pass), "eager", or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 scores.

    Raises:
        InputError: a shape, dtype or device does not fit, or (CPU tensors only) a score is not finite.
    """
    checks.tensor(positive=positive, negative=negative)
    loss = hal.self_adversarial(positive, negative, temperature, backend or "")[0]
    _refuse_unless_finite(loss, None, {"temperature": temperature}, positive=positive, negative=negative)
    return loss


def corruption_loss(
    query: Tensor,
    table: Tensor | RowEmbedding,
    answer: Tensor,
    corrupt: Tensor,
    reduction: str = "dot",
    offset: float = 0.0,
    temperature: float = 0.5,
    *,
    scale: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`self_adversarial_loss` of queries against candidates given by index, as `offset + reduce(query, table[index])`.
    A model's query and reduction are those of `dhns_fast.models`.

    Corruptions of each query go through one operator that never writes the gathered [B, N, D]. Corruptions that all
    queries share are scored as :func:`dhns_fast.scoring.score_all` does: for "dot" a matrix product, and for all a
    table of N rows that stays in the cache.

    Args:
        query: [B, D].
        table: candidates [E, D], as queries meet them (joint, or normalised, where the model says so). A
            :class:`dhns_fast.optim.RowEmbedding` keeps its own gradient, of the rows that occur, for its optimiser.
        answer: the true candidates, int64 [B].
        corrupt: N corruptions of each, int64 [B, N], or of all, int64 [N].
        reduction: "dot", "l1", "l2" or "complex_l1".
        offset: γ for distances.
        temperature: a of the self-adversarial weights.
        scale: what candidates are multiplied by, [B, D], or None; corruptions of each are then gathered.
        exclude: bool [B, N], pairs without weight or loss, such as known answers among shared corruptions (at
            temperature 0, where each corruption weighs 1/N, they keep theirs); only with corruptions of all.
        backend: "triton", "cpu" (compiled), "eager" (gathers), or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 tables; differentiable in query, table (a dense gradient, each row
        written once) and scale.

    Raises:
        InputError: an argument does not fit, or (CPU tensors only) an index is out of range or the loss is not finite.
        BackendUnavailableError: `backend` cannot be had; with a scale and corruptions of each there is only "eager".
    """
    checks.instance(Tensor, "a torch.Tensor, or None", scale=scale, exclude=exclude)
    constants = {"offset": offset, "temperature": temperature}
    # A number that torch.compile traces is a float, and has no attributes.
    if not (isinstance(offset, (int, float)) or hasattr(offset, "__float__")) or (
        isinstance(offset, Tensor) and offset.numel() != 1
    ):
        raise InputError("offset", offset, "numbers")
    if isinstance(table, RowEmbedding):
        checks.tensor(query=query, answer=answer, corrupt=corrupt)
        if table.direct and corrupt.ndim == 2 and scale is None and query.dtype == table.weight.dtype:
            checks.shapes(answer=(answer, "B"), corrupt=(corrupt, "B N"))
            if exclude is not None:
                raise InputError("exclude", *_NOT_EACH)
            ids = torch.cat((answer[:, None], corrupt), 1)
            loss = table.against(query, ids, reduction, offset, temperature, backend)
            _refuse_unless_finite(loss, None, constants, query=query, table=table.weight)
            return loss
        # Distinct rows, so that each is looked up, and its gradient handed over, once.
        rows, place = torch.cat([answer, corrupt.flatten()]).unique(return_inverse=True)
        candidates, answer, corrupt = table(rows), place[: len(answer)], place[len(answer) :].view_as(corrupt)
    else:
        candidates = table
    checks.tensor(query=query, table=candidates, answer=answer, corrupt=corrupt)
    checks.floating(query=query, table=candidates, scale=scale)
    checks.one_of("reduction", reduction, REDUCTIONS)
    shared = corrupt.ndim == 1
    checks.shapes(
        query=(query, "B D"), table=(candidates, "E D"), answer=(answer, "B"), corrupt=(corrupt, "N" if shared else "B N"), scale=(scale, "B D"),
        exclude=(exclude, "B N"),
    )  # fmt: skip
    hal.refuse_empty(query=query, table=candidates, corrupt=corrupt)
    check_parts(reduction, query.shape[1])
    checks.dtype(torch.int64, answer=answer, corrupt=corrupt)
    checks.on_device("query", query, table=candidates, answer=answer, corrupt=corrupt, scale=scale, exclude=exclude)
    if exclude is not None and not shared:
        raise InputError("exclude", *_NOT_EACH)
    checks.dtype(torch.bool, exclude=exclude)
    wide = accumulator(*(x.dtype for x in (query, candidates, scale) if x is not None))
    query, candidates, scale = query.to(wide), candidates.to(wide), None if scale is None else scale.to(wide)
    if shared:
        if _looks_are_free(answer):
            look_inside("answer", answer, len(candidates))
            look_inside("corrupt", corrupt, len(candidates))
        positive = offset + pair_scores(query, candidates[answer], reduction, scale)
        negative = offset + score_all(query, candidates[corrupt], reduction, scale=scale, backend=backend)
        if exclude is not None:
            negative = negative.masked_fill(exclude, _LEFT_OUT)
        # Scores have backends of their own: Triton's are for those alone.
        loss = hal.self_adversarial(positive, negative, temperature, "" if backend in (None, "triton") else backend)[0]
    else:
        ids = torch.cat((answer[:, None], corrupt), 1)
        loss = corruption.corruption_loss(query, candidates, ids, reduction, offset, temperature, backend or "", scale)[
            0
        ]
    _refuse_unless_finite(loss, None, constants, query=query, table=candidates)
    return loss


def hal_from_embeddings(
    interaction: str,
    head: Tensor,
    relation: Tensor,
    tail: Tensor,
    neg_head: Tensor,
    neg_tail: Tensor,
    margin: Tensor | Sequence[float],
    weight: Tensor | Sequence[float],
    mu: float = 0.01,
    gamma: float = 0.0,
    attention: Tensor | None = None,
    normalize: bool = False,
    p: int = 1,
    present: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The hardness-adaptive loss from embeddings: scores head-, tail- and both-side corruptions of every level, then
    `hardness_adaptive_loss`. Nothing flows into the generated embeddings.

    Two ways to use several modalities. Without `attention` the generated embeddings of each modality are scored against
    the one real embedding given and the scores averaged over the modalities ("both" pairs the same modality). With it
    real and generated embeddings alike are fused first, Σ_m softmax_m(attention·tanh(e_m))·e_m, and the attention
    learns through both.

    Args:
        interaction: "transe" (−‖h + r − t‖_p), "distmult", "complex" or "rotate" (−Σ|h∘e^{ir} − t|).
        head, tail: [B, D], or [M, B, D] when `attention` is given. ComplEx and RotatE store entities [re, im].
        relation: [B, D]; for "rotate" phases in radians, [B, D/2].
        neg_head, neg_tail: generated embeddings, [L, M, B, D].
        margin: m, [L], added to the scores of each level; may need a gradient.
        weight: w ≥ 0, [L]. Levels of weight 0 are neither read nor scored.
        mu: factor μ of the whole loss.
        gamma: γ, added to the positive's score.
        attention: w, [D], or None.
        normalize: TransE only: h, r and t are first brought to unit L2 norm.
        p: TransE only: the norm, 1 or 2.
        present: with `attention`: bool masks [M, B] of the modalities that the head and the tail entity have; the
            others take no part in the fusion, of the entity and of what was generated in its place.
        backend: "cuda" or "cpu" (compiled, one pass), "eager", or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 embeddings; differentiable in head, relation, tail, attention and
        margin.

    Raises:
        InputError: an argument does not fit, or (CPU tensors only) the loss is not finite.
    """
    given = {"head": head, "relation": relation, "tail": tail, "neg_head": neg_head, "neg_tail": neg_tail}
    checks.tensor(**given)
    checks.flag(normalize=normalize)
    if attention is not None:
        checks.tensor(attention=attention)
        given["attention"] = attention
    checks.floating(**given)
    wide = accumulator(*(x.dtype for x in given.values()))
    margins, weights = _level_values(margin, weight, wide, head)
    # The CUDA kernel reads bfloat16 as it is, where all is of it.
    if not (
        head.is_cuda and backend in (None, "auto", "cuda") and all(x.dtype == torch.bfloat16 for x in given.values())
    ):
        given = {name: x.to(wide) for name, x in given.items()}
    learned = (*given.values(), margins)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    masks = (None, None) if present is None else present
    if not (isinstance(masks, (tuple, list)) and len(masks) == 2):
        found = Shown(f"{shown(present)} ({type(present).__name__})")
        raise InputError("present", found, "two bool masks [M, B], of the head and of the tail")
    loss = hal.hal_embeddings(
        interaction, given["head"], given["relation"], given["tail"], given["neg_head"], given["neg_tail"], margins, weights, mu, gamma,
        given.get("attention"), normalize, p, *masks, gradients, backend or "",
    )[0]  # fmt: skip
    _refuse_unless_finite(loss, weights, {"mu": mu, "gamma": gamma}, **given, margin=margins)
    return loss


def _level_values(
    margin: Tensor | Sequence[float], weight: Tensor | Sequence[float], wide: torch.dtype, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Margin and weight as tensors of the loss's dtype; each stays on the device it is on."""
    margins, weights = _numbers("margin", margin), _numbers("weight", weight)
    checks.real("the scores", like, margin=margins, weight=weights)
    margins, weights = margins.to(wide), weights.to(wide)
    if weights.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "weight", Shown("a tensor that requires a gradient"), "one that requires none; it would get none"
        )
    if _looks_are_free(weights):
        hal.look_at_weights(weights)
        if weights.numel() and not (weights > 0).any():
            raise InputError("weight", weights.tolist(), "at least one level with a weight > 0")
    return margins, weights


def _numbers(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """One real number a level, as a tensor."""
    if not isinstance(values, Tensor):
        try:
            items: Any = list(values) if isinstance(values, (nn.ParameterList, ValuesView)) else values
            learned = [x for x in items if isinstance(x, Tensor) and x.requires_grad]
            if learned:  # one number after the other, so that a level's own parameter gets its gradient
                numbers = [torch.as_tensor(x, device=learned[0].device).reshape(()) for x in items]
                values = torch.stack([x if x.is_complex() else x.double() for x in numbers])
            else:
                values = torch.tensor(items, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise InputError(name, values, "a number for each level, [L]") from None
    if values.layout != torch.strided or values.is_nested:
        kind = "nested" if values.is_nested else str(values.layout).removeprefix("torch.")
        raise InputError(name, Shown(f"a tensor of layout {kind}"), "a dense one")
    if values.ndim != 1 or values.is_complex() or values.dtype == torch.bool:
        raise InputError(name, values, "a number for each level, [L]")
    return values


def _looks_are_free(x: Tensor) -> bool:
    """Whether values may be looked at: on a GPU it would stall the stream, in a traced graph it would break the
    graph.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _refuse_unless_finite(loss: Tensor, weight: Tensor | None, constants: dict[str, Any], **tensors: Tensor) -> None:
    """The loss is NaN as soon as one score that counts, or a constant, is not finite: then say which argument is at
    fault, and where.
    """
    if not _looks_are_free(loss) or loss.isfinite():
        return
    for name, value in constants.items():
        if not math.isfinite(value):
            raise NotFiniteError(name, value, "finite numbers")
    for name, x in tensors.items():
        parts: list[tuple[str, Any]] = [(name, x)]
        if weight is not None and name in PER_LEVEL:
            parts = [(f"{name}[{i}]", x[i]) for i, value in enumerate(weight.tolist()) if value > 0]
        for part_name, part in parts:
            wrong = (~part.isfinite()).nonzero()
            if len(wrong):
                position = wrong[0].tolist()
                first = part[tuple(position)].item()
                raise NotFiniteError(
                    part_name,
                    Shown(f"{len(wrong)} values that are not finite, the first {first} at {position}"),
                    "finite values",
                )
    raise NotFiniteError(
        "loss", Shown(f"{loss.item()}, although every input is finite: the scores overflow"), "scores within the dtype"
    )
