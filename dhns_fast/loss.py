"""The losses of DHNS training: hardness-adaptive over generated negatives, self-adversarial over uniform corruptions.

Source: Niu & Zhang, "Diffusion-based Hierarchical Negative Sampling for Multimodal Knowledge Graph Completion", DASFAA 2025
(arXiv 2501.15393); Sun et al., "RotatE", ICLR 2019 (arXiv 1902.10197).

Scores are "higher is better" throughout. Sizes: B triples, D embedding dimension, L hardness levels, M modalities, N corruptions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dhns_fast.errors import BackendUnavailableError, InputError, NotFiniteError
from dhns_fast.ops import corruption, hal
from dhns_fast.reference import loss as reference
from dhns_fast.reference.scoring import pair_scores
from dhns_fast.scoring import score_all

INTERACTIONS = ("transe", "distmult", "complex", "rotate")
REDUCTIONS = ("dot", "l1", "l2", "complex_l1")
# Arguments with a level in the first dimension: only the levels that count are looked at.
PER_LEVEL = ("negative", "neg_head", "neg_tail", "margin")


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
        margin: m, what each level adds to its scores, [L]: the paper's factors times γ for distances, zeros for products; may need
            a gradient.
        weight: w ≥ 0, [L]. Levels of weight 0 are neither read nor counted.
        mu: factor μ of the whole loss.
        backend: "cpu" (compiled, one pass), "eager", or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 scores; differentiable in `positive`, `negative` and `margin`.

    Raises:
        InputError: a shape, dtype or device does not fit, or a score that counts is not finite (found on CPU tensors only: looking
            would stall a GPU).
    """
    _check_floating(positive=positive, negative=negative)
    _check_shape("positive", positive, "[B]", (None,))
    batch = positive.shape[0]
    _check_shape("negative", negative, f"[L, K, {batch}]", (None, None, batch))
    _check_device(positive, "positive", negative=negative)
    positive, negative = _wide(positive, negative)
    margins, weights = _level_values(margin, weight, negative.shape[0], positive.dtype)
    if hal.choose_for_scores(backend, positive.device.type) == "eager":
        loss = reference.hardness_adaptive_loss(positive, negative, margin, weight, mu)
    else:
        loss = torch.ops.dhns_fast.hal_scores(positive, negative, margins, weights, mu)[0]
    _refuse_unless_finite(loss, weights, positive=positive, negative=negative, margin=margins)
    return loss


def self_adversarial_loss(positive: Tensor, negative: Tensor, temperature: float = 0.5, *, backend: str | None = None) -> Tensor:
    """½·[−mean_b logσ(p_b) − mean_b Σ_j softmax_j(a·n_bj)·logσ(−n_bj)], a scalar; no gradient flows through the softmax.

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
    _check_floating(positive=positive, negative=negative)
    _check_shape("positive", positive, "[B]", (None,))
    _check_shape("negative", negative, f"[{positive.shape[0]}, N]", (positive.shape[0], None))
    _check_device(positive, "positive", negative=negative)
    positive, negative = _wide(positive, negative)
    if hal.choose_for_scores(backend, positive.device.type) == "eager":
        loss = reference.self_adversarial_loss(positive, negative, temperature)
    else:
        loss = torch.ops.dhns_fast.self_adversarial(positive, negative, temperature)[0]
    _refuse_unless_finite(loss, None, positive=positive, negative=negative)
    return loss


def corruption_loss(
    query: Tensor,
    table: Tensor,
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
    """`self_adversarial_loss` of queries against candidates given by index, as `offset + reduce(query, table[index])`. A model's query and
    reduction are those of `dhns_fast.models`.

    Corruptions of each query go through one operator that never writes the gathered [B, N, D]. Corruptions that all queries share are scored
    as :func:`dhns_fast.scoring.score_all` does: for "dot" a matrix product, and for all a table of N rows that stays in the cache.

    Args:
        query: [B, D].
        table: candidates [E, D], as queries meet them (joint, or normalised, where the model says so).
        answer: the true candidates, int64 [B].
        corrupt: N corruptions of each, int64 [B, N], or of all, int64 [N].
        reduction: "dot", "l1", "l2" or "complex_l1".
        offset: γ for distances.
        temperature: a of the self-adversarial weights.
        scale: what candidates are multiplied by, [B, D], or None; corruptions of each are then gathered.
        exclude: bool [B, N], pairs without weight or loss, such as known answers among shared corruptions (at temperature 0, where each
            corruption weighs 1/N, they keep theirs); only with corruptions of all.
        backend: "triton", "cpu" (compiled), "eager" (gathers), or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 tables; differentiable in query, table (a dense gradient, each row written once) and scale.

    Raises:
        InputError: an argument does not fit, or (CPU tensors only) an index is out of range or the loss is not finite.
        BackendUnavailableError: `backend` cannot be had; with a scale and corruptions of each there is only "eager".
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: got {reduction!r}; accepted are {', '.join(REDUCTIONS)}")
    _check_floating(query=query, table=table)
    _check_shape("query", query, "[B, D]", (None, None))
    batch, dim = query.shape
    _check_shape("table", table, f"[E, {dim}]", (None, dim))
    if reduction == "complex_l1" and dim % 2:
        raise InputError(f"query: {reduction!r} needs an even last dimension, got {dim}")
    _check_shape("answer", answer, f"[{batch}]", (batch,))
    shared = corrupt.ndim == 1
    if not shared:
        _check_shape("corrupt", corrupt, f"[{batch}, N] or [N]", (batch, None))
    for name, ids in (("answer", answer), ("corrupt", corrupt)):
        if ids.dtype != torch.int64:
            raise InputError(f"{name}: got dtype {ids.dtype}; accepted is torch.int64")
    _check_device(query, "query", table=table, answer=answer, corrupt=corrupt)
    if scale is not None:
        _check_floating(scale=scale)
        _check_shape("scale", scale, f"[{batch}, {dim}]", (batch, dim))
        _check_device(query, "query", scale=scale)
    if exclude is not None:
        if not shared:
            raise InputError("exclude: accepted with corruptions of all queries, int64 [N], only")
        _check_shape("exclude", exclude, f"[{batch}, {len(corrupt)}]", (batch, len(corrupt)))
        if exclude.dtype != torch.bool:
            raise InputError(f"exclude: got dtype {exclude.dtype}; accepted is torch.bool")
        _check_device(query, "query", exclude=exclude)
    if not shared and scale is not None:
        if backend not in (None, "eager"):
            raise BackendUnavailableError(f"backend {backend!r}: with a scale, corruptions of each query are scored by 'eager' alone")
        chosen = "eager"
    else:
        chosen = corruption.choose(backend, query.device.type)
    query, table, *scales = _wide(query, table, *(() if scale is None else (scale,)))
    scale = scales[0] if scales else None
    if chosen == "eager" or shared:
        _check_indices(len(table), answer=answer, corrupt=corrupt)
    if chosen == "eager":
        loss = reference.corruption_loss(query, table, answer, corrupt, reduction, offset, temperature, scale, exclude)
    elif shared:
        loss = _shared(query, table, scale, answer, corrupt, reduction, offset, temperature, exclude, backend)
    else:
        ids = torch.cat((answer[:, None], corrupt), 1)
        loss = torch.ops.dhns_fast.corruption_loss(query, table, ids, reduction, offset, temperature, chosen)[0]
    _refuse_unless_finite(loss, None, query=query, table=table)
    return loss


def _shared(
    query: Tensor,
    table: Tensor,
    scale: Tensor | None,
    answer: Tensor,
    corrupt: Tensor,
    reduction: str,
    offset: float,
    temperature: float,
    exclude: Tensor | None,
    backend: str | None,
) -> Tensor:
    positive = offset + pair_scores(query, table[answer], reduction, scale)
    # The choice as it was given: these scores have backends of their own, and an explicit one that cannot run raises.
    negative = reference.left_out(offset + score_all(query, table[corrupt], reduction, scale=scale, backend=backend), exclude)
    if hal.choose_for_scores(None, query.device.type) == "eager":
        return reference.self_adversarial_loss(positive, negative, temperature)
    return torch.ops.dhns_fast.self_adversarial(positive, negative, temperature)[0]


def _check_indices(rows: int, **indices: Tensor) -> None:
    """Entry by entry on the CPU, where looking costs nothing; under torch.compile and on a GPU indexing itself complains."""
    for name, ids in indices.items():
        if ids.is_cuda or torch.compiler.is_compiling() or not ids.numel():
            continue
        lowest, highest = (int(x) for x in ids.aminmax())
        if lowest < 0 or highest >= rows:
            raise InputError(f"{name}: got indices from {lowest} to {highest}; accepted are 0 to {rows - 1}")


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

    Two ways to use several modalities. Without `attention` the generated embeddings of each modality are scored against the one real
    embedding given and the scores averaged over the modalities ("both" pairs the same modality). With it real and generated
    embeddings alike are fused first, Σ_m softmax_m(attention·tanh(e_m))·e_m, and the attention learns through both.

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
        present: with `attention`: bool masks [M, B] of the modalities that the head and the tail entity have; the others take no part
            in the fusion, of the entity and of what was generated in its place.
        backend: "cuda" or "cpu" (compiled, one pass), "eager", or None for the best there is.

    Returns:
        a scalar in float32, or float64 for float64 embeddings; differentiable in head, relation, tail, attention and margin.

    Raises:
        InputError: an argument does not fit, or (CPU tensors only) the loss is not finite.
    """
    if interaction not in INTERACTIONS:
        raise InputError(f"interaction: got {interaction!r}; accepted are {', '.join(INTERACTIONS)}")
    _check_floating(head=head, relation=relation, tail=tail, neg_head=neg_head, neg_tail=neg_tail)
    fused = attention is not None
    layout = "[M, B, D], as attention is given" if fused else "[B, D], as attention is not given"
    _check_shape("head", head, layout, (None,) * (3 if fused else 2))
    batch, dim = head.shape[-2:]
    _check_shape("tail", tail, f"{list(head.shape)} like head", tuple(head.shape))
    if interaction in ("complex", "rotate") and dim % 2:
        raise InputError(f"head: {interaction!r} needs an even last dimension, got {dim}")
    width = dim // 2 if interaction == "rotate" else dim
    _check_shape("relation", relation, f"[{batch}, {width}]", (batch, width))
    modalities = head.shape[0] if fused else None
    _check_shape("neg_head", neg_head, f"[L, {modalities or 'M'}, {batch}, {dim}]", (None, modalities, batch, dim))
    _check_shape("neg_tail", neg_tail, f"{list(neg_head.shape)} like neg_head", tuple(neg_head.shape))
    _check_device(head, "head", relation=relation, tail=tail, neg_head=neg_head, neg_tail=neg_tail)
    if attention is not None:
        _check_floating(attention=attention)
        _check_shape("attention", attention, f"[{dim}]", (dim,))
        _check_device(head, "head", attention=attention)
    if interaction != "transe" and (normalize or p != 1):
        raise InputError(f"normalize, p: they belong to 'transe', got normalize={normalize}, p={p} with {interaction!r}")
    if p not in (1, 2):
        raise InputError(f"p: got {p}; accepted are 1 and 2")
    if present is not None:
        if not fused:
            raise InputError("present: masks need attention, which is None")
        for name, mask in zip(("present[0]", "present[1]"), present, strict=True):
            if mask.dtype != torch.bool:
                raise InputError(f"{name}: got dtype {mask.dtype}; accepted is torch.bool")
            _check_shape(name, mask, f"[{modalities}, {batch}]", (modalities, batch))
            _check_device(head, "head", **{name: mask})
    given = (head, relation, tail, neg_head, neg_tail, *(() if attention is None else (attention,)))
    wide = _common(*given)
    margins, weights = _level_values(margin, weight, neg_head.shape[0], wide)
    chosen = hal.choose_for_embeddings(backend, head.device.type, dim, wide.itemsize)
    # The CUDA kernel reads bfloat16 as it is, where all is of it.
    if chosen != "cuda" or any(x.dtype != torch.bfloat16 for x in given):
        head, relation, tail, neg_head, neg_tail, *rest = _wide(*given)
        attention = rest[0] if rest else None
    inputs = (head, relation, tail, neg_head, neg_tail)
    if chosen == "eager":
        loss = reference.hal_from_embeddings(
            interaction, *inputs, margin, weight, mu=mu, gamma=gamma, attention=attention, normalize=normalize, p=p, present=present
        )
    else:
        learns = (head, relation, tail, attention, margins)
        gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learns)
        masks = (None, None) if present is None else present
        loss = torch.ops.dhns_fast.hal_embeddings(
            interaction, *inputs, margins, weights, mu, gamma, attention, normalize, p, *masks, gradients
        )[0]
    _refuse_unless_finite(
        loss, weights, head=head, relation=relation, tail=tail, attention=attention, neg_head=neg_head, neg_tail=neg_tail, margin=margins
    )
    return loss


def _common(*tensors: Tensor) -> torch.dtype:
    """What a loss is computed in: float64 as soon as one argument has it, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments in one type, as the operators read them."""
    dtype = _common(*tensors)
    return tuple(x.to(dtype) for x in tensors)


def _level_values(
    margin: Tensor | Sequence[float], weight: Tensor | Sequence[float], levels: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Margin and weight as tensors of the loss's dtype; each stays on the device it is on."""
    values = []
    for name, given in (("margin", margin), ("weight", weight)):
        value = given.to(wide) if isinstance(given, Tensor) else torch.tensor(given, dtype=wide)
        _check_shape(name, value, f"[{levels}], one value a level", (levels,))
        values.append(value)
    if _looks_are_free(values[1]):
        if not (values[1] >= 0).all():
            raise InputError(f"weight: got {values[1].tolist()}; accepted are values >= 0")
        if not (values[1] > 0).any():
            raise InputError(f"weight: got {values[1].tolist()}; at least one level needs a weight > 0")
    return values[0], values[1]


def _looks_are_free(x: Tensor) -> bool:
    """Whether values may be looked at: on a GPU it would stall the stream, in a traced graph it would break the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_floating(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise InputError(f"{name}: got dtype {x.dtype}; accepted are floating-point dtypes")


def _check_shape(name: str, x: Tensor, accepted: str, shape: tuple[int | None, ...]) -> None:
    if x.dim() != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape, strict=True)):
        raise InputError(f"{name}: got shape {list(x.shape)}; accepted is {accepted}")
    if 0 in x.shape:
        raise InputError(f"{name}: got shape {list(x.shape)}; no dimension may be empty")


def _check_device(anchor: Tensor, anchor_name: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != anchor.device:
            raise InputError(f"{name}: is on {x.device}, {anchor_name} on {anchor.device}; accepted is one device")


def _refuse_unless_finite(loss: Tensor, weight: Tensor | None, **tensors: Tensor | None) -> None:
    """The loss is NaN as soon as one score that counts is not finite: then say which argument is at fault, and where."""
    if not _looks_are_free(loss) or loss.isfinite():
        return
    for name, x in tensors.items():
        if x is None:
            continue
        counts = (
            [(f"{name}[{i}]", x[i]) for i in reference.active_levels(weight)] if weight is not None and name in PER_LEVEL else [(name, x)]
        )
        for part_name, part in counts:
            wrong = (~part.isfinite()).nonzero()
            if len(wrong):
                position = wrong[0].tolist()
                first = part[tuple(position)].item()
                raise NotFiniteError(f"{part_name}: {len(wrong)} values are not finite, the first is {first} at {position}")
    raise NotFiniteError("the loss is not finite although every input is: the scores overflow")
