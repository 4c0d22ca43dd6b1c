"""The consumers of scores against all entities in plain torch: any device, any floating dtype.

A *raw* score orders like the score and needs no square root: for `l2` it is −Σ(q − s·e)², for the other reductions the
score itself. Every raw score of a call comes out of a tile of one fixed shape, the last ones padded with zeros: library
GEMMs give different bits for different shapes, and a target compared with bits of another shape gains and loses ties.
They give different bits at the edges of a matrix, too: tiles are whole multiples of what a library computes at a time
(COLUMNS), and where that does not help (`_alike`) products are summed without one. Tables narrower than float32 are
widened tile by tile.

Shapes: query and scale [B, D], entity [E, D], target int64 [B], known answers as (offsets int64 [B + 1], ids int64
[n]).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dhns_fast.ops.precision import accumulator

# A tile of differences [TB, TE, D] or of scores [TB, TE] has at most this many elements (4 MB of float32). Each has a
# handful of temporaries of its size, so that a call stays below 64 MB whatever B and E.
TILE_ELEMENTS = 1 << 20
# Columns of a product's tile come in multiples of this, which all of 4, 6, 8, 12, 16, 24, 32, 48 and 64 divide: the
# widths of the blocks that MKL and OpenBLAS work in. With 64 and float64 on Zen 3, equal entities had different scores
# in 40 of 40 tries; with 192 in none.
COLUMNS = 192
# Entities of a tile whose scores are compared with those of another: as many, whatever E is, so that the shards of a
# table agree.
TILE_ENTITIES = 6 * COLUMNS


def finish(raw: Tensor, reduction: str) -> Tensor:
    """Raw scores to scores. A root is that of C++, the nearest number: torch's on a CPU may be the second nearest."""
    return -(-raw).double().sqrt().to(raw.dtype) if reduction == "l2" else raw


def tile_shape(queries: int, entities: int, dim: int, reduction: str) -> tuple[int, int]:
    """(TB, TE), of which TE is a multiple of COLUMNS for products, of 64 otherwise."""
    rows = min(256, 1 << max(queries - 1, 0).bit_length())
    unit = COLUMNS if reduction == "dot" else 64
    if reduction != "dot":
        rows = min(rows, max(1, TILE_ELEMENTS // (unit * dim)))
    columns = TILE_ELEMENTS // rows if reduction == "dot" else TILE_ELEMENTS // (rows * dim)
    return rows, min(max(unit, columns // unit * unit), -(-entities // unit) * unit)


def _rows(table: Tensor, start: int, size: int) -> Tensor:
    """`size` rows from `start`, padded with zeros, in the dtype of the accumulator."""
    rows = table[start : start + size]
    return F.pad(rows, (0, 0, 0, size - len(rows))).to(accumulator(table.dtype))


def moduli(difference: Tensor) -> Tensor:
    """Of complex vectors [..., D] stored [re, im]: [..., D/2]; gradient 0 at 0, where √(re² + im²) has NaN."""
    real, imaginary = difference.chunk(2, dim=-1)
    return torch.complex(real, imaginary).abs()


def pair_scores(query: Tensor, entity: Tensor, reduction: str, scale: Tensor | None = None) -> Tensor:
    """Scores of `query` against `entity`, both broadcastable to [..., D], reduced over the last dimension: [...].
    Differentiable by autograd.

    Distances have gradient 0 at distance 0.
    """
    if scale is not None:
        entity = entity * scale
    if reduction == "dot":
        return (query * entity).sum(-1)
    difference = query - entity
    if reduction == "l2":
        return -torch.linalg.vector_norm(difference, dim=-1)
    return -(difference.abs() if reduction == "l1" else moduli(difference)).sum(-1)


def raw_tile(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    """Raw scores [TB, TE] of query [TB, D], entity [TE, D], scale [TB, D]."""
    if reduction == "dot":
        query = query if scale is None else query * scale
        if query.device.type != "cpu" or _alike(query.dtype, len(query), len(entity), torch.get_num_threads()):
            return query @ entity.T
        rows = max(1, TILE_ELEMENTS // query.shape[1])
        return torch.cat(
            [(query[:, None] * part).sum(-1) for part in entity.split(max(1, rows // max(1, len(query))))], 1
        )
    difference = query[:, None] - (entity if scale is None else entity * scale[:, None])
    if reduction == "l2":
        return -difference.square_().sum(-1)
    return -(difference.abs_() if reduction == "l1" else moduli(difference)).sum(-1)


@functools.cache
def _alike(dtype: torch.dtype, rows: int, columns: int, threads: int) -> bool:
    """Whether this machine's library gives equal columns equal bits in a product of [rows, D] and [D, columns]; tried
    out, once a shape.
    """
    generator = torch.Generator().manual_seed(0)
    for dim in (3, 33, 200):
        query, entity = (torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, 1))
        product = query @ entity.expand(columns, dim).contiguous().T
        if not torch.equal(product, product[:, :1].expand(rows, columns)):
            return False
    return True


class _Tiles:
    """Raw scores of all entities, a tile at a time, queries outermost."""

    def __init__(self, query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> None:
        self.query, self.entity, self.scale, self.reduction = query, entity, scale, reduction
        self.rows, self.columns = tile_shape(len(query), TILE_ENTITIES, query.shape[1], reduction)
        self.row_starts, self.column_starts = range(0, len(query), self.rows), range(0, len(entity), self.columns)

    def _query_tile(self, start: int) -> tuple[Tensor, Tensor | None]:
        return _rows(self.query, start, self.rows), None if self.scale is None else _rows(self.scale, start, self.rows)

    def at(self, target: Tensor) -> Tensor:
        """The raw score of each query's own target [B], read from tiles whose columns are the targets."""
        out = []
        for start in self.row_starts:
            query, scale = self._query_tile(start)
            own = target[start : start + self.rows]
            pieces = []
            for first in range(0, len(own), self.columns):
                piece = own[first : first + self.columns]
                tile = raw_tile(query, _rows(self.entity[piece], 0, self.columns), scale, self.reduction)
                pieces.append(tile[first : first + len(piece), : len(piece)].diagonal())
            out.append(torch.cat(pieces))
        return torch.cat(out)

    def over(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(first column, raw scores without the padding) of the query tile at `start`."""
        query, scale = self._query_tile(start)
        for column in self.column_starts:
            tile = raw_tile(query, _rows(self.entity, column, self.columns), scale, self.reduction)
            yield column, tile[: len(self.query) - start, : len(self.entity) - column]

    def group(self, rows: Tensor, ids: Tensor) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Pairs (row, id) by the tile they fall into, as positions within it; ids outside the table are dropped. One
        host sync.
        """
        inside = (ids >= 0) & (ids < len(self.entity))
        rows, ids = rows[inside], ids[inside]
        tile, order = (rows // self.rows * len(self.column_starts) + ids // self.columns).sort()
        found, counts = torch.unique_consecutive(tile, return_counts=True)
        rows, ids = rows[order] % self.rows, ids[order] % self.columns
        groups, end = {}, 0
        for key, count in torch.stack([found, counts], 1).tolist():
            row, column = divmod(key, len(self.column_starts))
            groups[row * self.rows, column * self.columns] = rows[end : end + count], ids[end : end + count]
            end += count
        return groups


def _pairs(offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(offsets) - 1, device=ids.device).repeat_interleave(offsets.diff(), output_size=len(ids))
    return rows, ids


def target_scores(query: Tensor, entity: Tensor, target: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    """Raw scores of the targets [B]."""
    return _Tiles(query, entity, scale, reduction).at(target)


def rank_counts(
    query: Tensor,
    entity: Tensor,
    target: Tensor,
    at_target: Tensor,
    offsets: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    reduction: str,
) -> Tensor:
    """(greater, equal, undefined) as int64 [3, B]: rivals with a raw score above `at_target`, equal to it, and NaN.

    The target and the known answers are no rivals; those outside the table (of another shard) are ignored.
    A NaN in `at_target` has every rival above it.
    """
    tiles = _Tiles(query, entity, scale, reduction)
    rows, others = _pairs(offsets, ids)
    other = others != target[rows]
    rows = torch.cat([rows[other], torch.arange(len(query), device=query.device)])
    others = torch.cat([others[other], target])
    excluded = tiles.group(rows, others)
    counts = torch.zeros(3, len(query), dtype=torch.int64, device=query.device)
    for start in tiles.row_starts:
        goal = at_target[start : start + tiles.rows, None]
        count = counts[:, start : start + tiles.rows]

        def compare(raw: Tensor, goal: Tensor) -> Tensor:
            return torch.stack([(raw > goal) | goal.isnan(), raw == goal, raw.isnan()])

        for column, raw in tiles.over(start):
            count += compare(raw, goal).sum(-1)
            if (start, column) in excluded:
                row, position = excluded[start, column]
                count.index_add_(1, row, compare(raw[row, position], goal[row, 0]).long(), alpha=-1)
    return counts


def topk_all(
    query: Tensor, entity: Tensor, k: int, offsets: Tensor, ids: Tensor, scale: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """The k best (raw scores [B, k], ids int64 [B, k]) by score, then id, without known answers and NaN; the rest is
    −inf, −1.

    Known answers outside the table (of another shard) are ignored.
    """
    tiles = _Tiles(query, entity, scale, reduction)
    excluded = tiles.group(*_pairs(offsets, ids))
    scores = query.new_empty((len(query), k), dtype=accumulator(query.dtype))
    found = torch.empty((len(query), k), dtype=torch.int64, device=query.device)
    for start in tiles.row_starts:
        rows = len(query[start : start + tiles.rows])
        best = scores.new_full((rows, k), -torch.inf)
        best_ids = found.new_full((rows, k), -1)
        for column, raw in tiles.over(start):
            raw = raw.masked_fill(raw.isnan(), -torch.inf)
            if (start, column) in excluded:
                raw[excluded[start, column]] = -torch.inf
            # What was kept comes first and has the smaller ids: a stable sort leaves equal scores in the order of their
            # ids.
            best, order = torch.cat([best, raw], 1).sort(dim=1, descending=True, stable=True)
            best, order = best[:, :k], order[:, :k]
            best_ids = torch.where(order < k, best_ids.gather(1, order.clamp(max=k - 1)), order - k + column)
            best_ids.masked_fill_(best == -torch.inf, -1)
        scores[start : start + rows] = best
        found[start : start + rows] = best_ids
    return scores, found


def logsumexp_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    """log Σ_e exp(score) [B]."""
    tiles = _Tiles(query, entity, scale, reduction)
    out = query.new_full((len(query),), -torch.inf, dtype=accumulator(query.dtype))
    for start in tiles.row_starts:
        rows = out[start : start + tiles.rows]
        for _, raw in tiles.over(start):
            torch.logaddexp(rows, finish(raw, reduction).logsumexp(1), out=rows)
    return out


def score_all(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    """Scores [B, E]."""
    tiles = _Tiles(query, entity, scale, reduction)
    out = query.new_empty((len(query), len(entity)), dtype=accumulator(query.dtype))
    for start in tiles.row_starts:
        for column, raw in tiles.over(start):
            out[start : start + tiles.rows, column : column + tiles.columns] = finish(raw, reduction)
    return out


def scores_and_logsumexp(query: Tensor, entity: Tensor, scale: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Scores [B, E] and the log Σ_e exp(score) [B]."""
    scores = score_all(query, entity, scale, reduction)
    return scores, scores.logsumexp(1)


def softmax(scores: Tensor, logsumexp: Tensor, grad: Tensor) -> Tensor:
    """grad·exp(score − logsumexp) of scores [TB, TE], logsumexp and grad [TB]: the exponential is at most 1, whatever
    the scores.
    """
    return (scores - logsumexp[:, None]).exp_().mul_(grad[:, None])


Gradients = tuple[Tensor, Tensor, Tensor | None]


def add_gradients(
    query: Tensor,
    entity: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    scores: Tensor | None,
    reduction: str,
    out: Gradients,
) -> None:
    """Adds the gradients of Σ weight·score over a tile, weight [TB, TE], to out: query [TB, D], entity [TE, D], scale
    [TB, D].

    Args:
        scores: of the tile [TB, TE]; needed for `l2` alone.
    """
    by_query, by_entity, by_scale = out
    if reduction == "dot":
        if scale is None:
            by_query.addmm_(weight, entity)
            by_entity.addmm_(weight.T, query)
            return
        by_entity.addmm_(weight.T, query * scale)
        scaled = weight @ entity
        by_query += scaled * scale
        if by_scale is not None:
            by_scale += scaled * query
        return
    difference = query[:, None] - (entity if scale is None else entity * scale[:, None])
    if reduction == "l2" and scores is not None:
        weight = over_distance(weight, scores)
    # The direction in which the score falls; 0 where the difference is 0, as the gradient of a norm.
    elif reduction == "l1":
        difference = difference.sign()
    else:
        length = moduli(difference).clamp_min_(torch.finfo(difference.dtype).tiny)
        difference = difference / torch.cat([length, length], -1)
    direction = difference * weight[..., None]
    by_query -= direction.sum(1)
    by_entity += (direction if scale is None else direction * scale[:, None]).sum(0)
    if by_scale is not None:
        by_scale += (direction * entity).sum(1)


def over_distance(weight: Tensor, scores: Tensor) -> Tensor:
    """weight / distance, the factor of a Euclidean difference in its gradient; 0 at distance 0."""
    return torch.where(scores == 0, 0, weight / -scores)
