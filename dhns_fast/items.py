"""Evaluation of items for users over *all* items: recall, NDCG, precision, hit rate, MAP, MRR and AUC, exact, with
memory that does not grow with the number of items.

A user's items are ranked by `reduce(user, item)`, train items left out; each metric is computed for a user and averaged
over the users that have a relevant item. With hits at positions p₁ < p₂ < … (from 1) of n relevant items:

    hit@k        1 if p₁ ≤ k                            recall@k     #{p_j ≤ k} / n
    precision@k  #{p_j ≤ k} / k                         mrr@k        1/p₁ if p₁ ≤ k, else 0
    ndcg@k       Σ_{p_j ≤ k} 1/log₂(1 + p_j) / Σ_{i ≤ min(n, k)} 1/log₂(1 + i)
    map@k        Σ_{p_j ≤ k} j/p_j / min(n, k)          auc          share of pairs (relevant, other) in the right order

`mrr`, `map` and `ndcg` without a k count every position. These are RecBole's definitions. Variants of other code, by
name:

    ndcg@k:kgat  the ideal list is of the hits among the first K, the largest k in the call, and not of the relevant
                 items: larger than ndcg@k, and 1 for a lone early hit. Knowledge Graph Attention Network (Wang et al.
                 2019) and code derived from it have it, with K = 100
    recall@k:gde divided by min(n, k), as in GDE (Peng et al. 2022)

Equal scores stand in the order of their ids, as :func:`dhns_fast.scoring.topk_all` has them; where all positions are
counted a tie with an item that is not relevant counts half.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dhns_fast.checks import alike, instance, shapes, tensor
from dhns_fast.data import KnowledgeGraph, Ragged
from dhns_fast.data.filter import as_ids
from dhns_fast.data.lookup import lookup
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops.ambient import plain
from dhns_fast.ops.score import MAX_K
from dhns_fast.scoring import rank_all, topk_all

if TYPE_CHECKING:
    from dhns_fast.ranking import Rankable

__all__ = ["evaluate_items", "evaluate_relation"]

WITH_K = ("hit", "recall", "precision", "ndcg", "map", "mrr")
WITHOUT_K = ("mrr", "map", "ndcg", "auc")
VARIANTS = {"ndcg:kgat", "recall:gde"}
_NAME = re.compile(r"([a-z]+)(?:@([1-9][0-9]{0,17}))?(?::([a-z]+))?")
# Users, or pairs of user and relevant item, at once.
BATCH = 4096


class Metric(NamedTuple):
    kind: str
    k: int | None
    variant: str | None


class Found(NamedTuple):
    """Relevant items that a list has, of some users.

    Attributes:
        row: the user of each, int64 `[h]`.
        position: in the user's list, from 1, float64 `[h]`.
        nth: how many relevant items of the user stand up to here, float64 `[h]`.
    """

    row: Tensor
    position: Tensor
    nth: Tensor


def evaluate_items(
    users: Tensor,
    items: Tensor,
    relevant: Ragged,
    exclude: Ragged | None = None,
    metrics: Sequence[str] = ("recall@20", "ndcg@20"),
    reduction: str = "dot",
    *,
    scale: Tensor | None = None,
    per_user: bool = False,
    backend: str | None = None,
) -> dict[str, float] | dict[str, Tensor]:
    """Metrics of every user's ranking of all items.

    Args:
        users: `[U, D]`.
        items: `[I, D]`, of the same dtype and device.
        relevant: each user's relevant items (the test set), U rows of ids; users without any are left out of the means.
        exclude: each user's items that are not recommended (the training set); one that is relevant too is not left
            out.
        metrics: names from the list above. With cut-offs up to 1024 alone the best k of each user are found and nothing
            else; `mrr`, `map`, `ndcg` and `auc` over all positions, and larger k, rank every relevant item, which takes
            as many queries as there are such items.
        reduction: "dot", or a distance: "l2", "l1", "complex_l1".
        scale: what items are multiplied by for each user, `[U, D]`, or None.
        per_user: give each metric as float64 `[U]` in place of its mean; NaN for users without relevant items.
        backend: see :mod:`dhns_fast.scoring`.

    Returns:
        metric -> mean over users, in the order asked for.

    Raises:
        InputError: a metric is unknown, shapes do not fit, an id is out of range, or no user has a relevant item.
    """
    if not isinstance(metrics, Iterable):
        raise InputError("metrics", metrics, "names of metrics")
    # A single name would be read letter by letter.
    wanted = {name: _parse(name) for name in ([metrics] if isinstance(metrics, str) else metrics)}
    tensor(users=users, items=items, **({} if scale is None else {"scale": scale}))
    alike("items", items, users=users, scale=scale)
    accepted = "a Ragged of ids, a row a user"
    if relevant is None:
        raise InputError("relevant", None, accepted)
    instance(Ragged, accepted, relevant=relevant, exclude=exclude)
    sizes = shapes(users=(users, "U D"), items=(items, "I D"), scale=(scale, "U D"))
    U, num_items = sizes["U"], sizes["I"]
    relevant = relevant.check(U, num_items).to(users.device)
    left_out = None if exclude is None else exclude.check(U, num_items).to(users.device)
    if not len(relevant.ids):
        raise InputError("relevant", Shown("no relevant item of any user"), "one or more")
    depth = max((metric.k for metric in wanted.values() if metric.k is not None), default=0)
    k = min(depth, num_items)
    listed = {name for name, metric in wanted.items() if metric.k is not None and k <= MAX_K}
    options: dict[str, object] = {"reduction": reduction, "backend": backend}
    values = {name: torch.zeros(U, dtype=torch.float64, device=users.device) for name in wanted}
    for search, names in ((_listed, listed), (_ranked, wanted.keys() - listed)):
        for first, last, found, n, others in (
            search(users, items, scale, relevant, left_out, k, options) if names else ()
        ):
            for name in names:
                value = _value(wanted[name], found, n, depth, others)
                values[name][first:last] = value.masked_fill(n == 0, torch.nan)
    return values if per_user else {name: value.nanmean().item() for name, value in values.items()}


@plain()
def evaluate_relation(
    model: Rankable,
    kg: KnowledgeGraph,
    relation: int | str,
    split: str = "test",
    metrics: Sequence[str] = ("recall@20", "ndcg@20"),
    items: Tensor | None = None,
    *,
    per_user: bool = False,
) -> dict[str, float] | dict[str, Tensor]:
    """:func:`evaluate_items` of a relation that is an interaction: its heads are the users, its tails the items.

    Args:
        model: a KGE model over the graph, see :func:`dhns_fast.ranking.evaluate`.
        kg: the graph. What a user has in the other splits is not recommended.
        relation: id or name.
        split: whose tails are relevant.
        metrics, per_user: as in :func:`evaluate_items`; per user values are in the order of the users' ids among the
            split's heads.
        items: ids of the entities that are items, `[I]`; None: every tail of the relation in any split.
    """
    r = lookup(relation, kg.relation_names, "relation") if isinstance(relation, str) else relation
    if not isinstance(r, int) or not 0 <= r < kg.num_relations:
        raise InputError("relation", relation, f"a name, or an id from 0 to {kg.num_relations - 1}")
    parts = kg.splits
    if split not in parts:
        raise InputError("split", split, ", ".join(parts))
    pairs = {name: part[part[:, 1] == r][:, [0, 2]] for name, part in parts.items()}
    if items is None:
        items = torch.cat(list(pairs.values()))[:, 1].unique()
    else:
        items = as_ids("items", items, "integers of shape [I]", kg.num_entities)
    users = pairs[split][:, 0].unique()
    if not len(users):
        raise InputError(
            "split", Shown(f"{split}, without a triple of relation {relation}"), "a split with one or more"
        )
    place = torch.full((kg.num_entities,), -1)
    place[items] = torch.arange(len(items))

    def of(chosen: Tensor) -> Ragged:
        rows, found = (
            torch.searchsorted(users, chosen[:, 0].contiguous()).clamp(max=len(users) - 1),
            place[chosen[:, 1]],
        )
        kept = (users[rows] == chosen[:, 0]) & (found >= 0)
        keys = (rows[kept] * len(items) + found[kept]).unique()
        return Ragged.of_keys(keys, len(users), len(items))

    others = torch.cat([part for name, part in pairs.items() if name != split])
    with torch.no_grad():
        table = model.entities("tail")
        query, scale = model.query(users.to(table.device), torch.full_like(users, r).to(table.device), "tail")
        table = table[items.to(table.device)]
    return evaluate_items(
        query, table, of(pairs[split]), of(others), metrics, model.reduction, scale=scale, per_user=per_user
    )


def _parse(name: str) -> Metric:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is not None:
        kind, k, variant = match[1], int(match[2]) if match[2] else None, match[3]
        fits = kind in (WITH_K if k else WITHOUT_K) and (variant is None or (k and f"{kind}:{variant}" in VARIANTS))
        if fits:
            return Metric(kind, k, variant)
    accepted = [f"{kind}@k" for kind in WITH_K] + list(WITHOUT_K) + [x.replace(":", "@k:") for x in sorted(VARIANTS)]
    # Of hits@7 hit@k.
    near = difflib.get_close_matches(re.sub(r"\d+", "k", str(name)), accepted, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError("metrics", name, ", ".join(accepted) + hint)


def _of_users(
    relevant: Ragged, exclude: Ragged | None, first: int, last: int, num_items: int
) -> tuple[Ragged, Ragged | None]:
    """Relevant and left out items of the users of a batch: ids rising and distinct in each row, none in both."""
    mine = _rows(relevant, first, last, num_items)
    if exclude is None:
        return mine, None
    known = _rows(exclude, first, last, num_items)
    keys, others = known.keys(num_items), mine.keys(num_items)
    if not len(others):
        return mine, known
    both = others[torch.searchsorted(others, keys).clamp(max=len(others) - 1)] == keys
    return mine, Ragged.of_keys(keys[~both], last - first, num_items) if bool(both.any()) else known


def _rows(rows: Ragged, first: int, last: int, num_items: int) -> Ragged:
    """Rows first..last - 1, sorted and without repetitions where they are not so already."""
    offsets = rows.offsets[first : last + 1]
    part = Ragged(offsets - offsets[0], rows.ids[int(offsets[0]) : int(offsets[-1])])
    keys = part.keys(num_items)
    return part if bool((keys.diff() > 0).all()) else Ragged.of_keys(keys.unique(), last - first, num_items)


def _take(rows: Ragged, index: Tensor) -> Ragged:
    """Rows by number, any of them any number of times."""
    start, count = rows.offsets[:-1][index], rows.counts()[index]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    total = int(offsets[-1])
    place = (start - offsets[:-1]).repeat_interleave(count, output_size=total) + torch.arange(
        total, device=count.device
    )
    return Ragged(offsets, rows.ids[place])


Part = tuple[int, int, Found, Tensor, Tensor]


def _listed(
    users: Tensor,
    items: Tensor,
    scale: Tensor | None,
    relevant: Ragged,
    exclude: Ragged | None,
    k: int,
    options: dict[str, object],
) -> Iterator[Part]:
    """What the k best of each user have, by batches of users: their numbers, the hits, how many relevant items there
    are, and how many others.
    """
    num_items = len(items)
    for first in range(0, len(users), BATCH):
        last = min(first + BATCH, len(users))
        mine, known = _of_users(relevant, exclude, first, last, num_items)
        part = None if scale is None else scale[first:last]
        _, ids = topk_all(users[first:last], items, k, known=known, scale=part, **options)  # type: ignore[arg-type]
        # A last key beyond every other; an id below 0, a place without an item, is a key of the row before.
        keys = torch.cat([mine.keys(num_items), mine.ids.new_full((1,), torch.iinfo(torch.int64).max)])
        asked = torch.arange(last - first, device=users.device)[:, None] * num_items + ids
        hits = (keys[torch.searchsorted(keys, asked)] == asked) & (ids >= 0)
        row, column = hits.nonzero(as_tuple=True)
        found = Found(row, column.double() + 1, hits.cumsum(1)[row, column].double())
        yield first, last, found, mine.counts(), num_items - mine.counts()


def _ranked(
    users: Tensor,
    items: Tensor,
    scale: Tensor | None,
    relevant: Ragged,
    exclude: Ragged | None,
    k: int,
    options: dict[str, object],
) -> Iterator[Part]:
    """Every relevant item, by batches of users: a rank each among the items that are not relevant; otherwise as
    :func:`_listed`.
    """
    num_items = len(items)
    first = 0
    while first < len(users):
        # Whole users, of about as many pairs with relevant items.
        last = int(torch.searchsorted(relevant.offsets, relevant.offsets[first] + BATCH, right=True)) - 1
        last = min(max(last, first + 1), len(users))
        mine, left_out = _of_users(relevant, exclude, first, last, num_items)
        known = mine
        if left_out is not None:
            both = torch.cat([mine.keys(num_items), left_out.keys(num_items)]).sort().values
            known = Ragged.of_keys(both, len(mine), num_items)
        row = mine.rows()
        ranks = [users.new_zeros(0, dtype=torch.float64)]
        for pairs in torch.arange(len(row), device=users.device).split(BATCH):
            user = row[pairs]
            part = None if scale is None else scale[first + user]
            target = mine.ids[pairs]
            ranked = rank_all(users[first + user], items, target, known=_take(known, user), scale=part, **options)  # type: ignore[arg-type]
            ranks.append(ranked.realistic)
        rank = torch.cat(ranks)
        # By user, then by rank: two stable sorts.
        order = rank.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        row, rank = row[order], rank[order]
        nth = (torch.arange(len(row), device=row.device) - mine.offsets[:-1][row] + 1).double()
        yield first, last, Found(row, rank + nth - 1, nth), mine.counts(), num_items - known.counts()
        first = last


def _value(metric: Metric, found: Found, n: Tensor, depth: int, others: Tensor) -> Tensor:
    """The metric of each user, float64 `[u]`; `n` relevant items each, and for AUC `others` that are neither relevant
    nor left out.
    """
    kind, k, variant = metric
    row, position, nth = found
    inside = position <= k if k is not None else torch.ones_like(position, dtype=torch.bool)

    def total(amount: Tensor) -> Tensor:
        return torch.zeros(len(n), dtype=torch.float64, device=n.device).index_add_(0, row[inside], amount[inside])

    hits = total(torch.ones_like(position))
    ideal = n if k is None else n.clamp(max=k)
    if kind == "hit":
        return (hits > 0).double()
    if kind == "precision" and k is not None:
        return hits / k
    if kind == "recall":
        return hits / (ideal if variant == "gde" else n)
    if kind == "mrr":
        return total((nth == 1).double() / position)
    if kind == "map":
        return total(nth / position) / ideal
    if kind == "auc":
        return 1 - total(position - nth) / (n * others)
    if variant == "kgat":
        retrieved = torch.zeros(len(n), dtype=torch.float64, device=n.device).index_add_(
            0, row, (position <= depth).double()
        )
        ideal = retrieved.long().clamp(max=k)
    gains = 1 / torch.log2(torch.arange(2, int(ideal.max()) + 2, dtype=torch.float64, device=n.device))
    best = torch.cat([gains.new_zeros(1), gains.cumsum(0)])[ideal]
    # 0 is the ideal of those who have no hit, and gain nothing
    return total(1 / torch.log2(1 + position)) / best.clamp(min=1)
