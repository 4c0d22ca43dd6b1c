"""All-item evaluation of a recommender, recall@20 and NDCG@20, train items left out, against plain torch and RecBole's
own code.

"torch, full sort" sorts the scores of all items of a batch of users, "torch, top-k" takes the k best of them as RecBole
does, both at the batch that runs fastest here; "RecBole" is the loop of its trainer with its own collector and metrics,
at the batch of users that its data loader makes of `eval_batch_size` 4096 (one user, from 4096 items on), "RecBole,
1024 users" at one that it can be told. Embeddings are the same, and so must be the results. Rivals are timed on the
first users only, and their times multiplied: their rows say by what.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import harness
import torch
from torch import Tensor

from dhns_fast.data import Ragged
from dhns_fast.items import evaluate_items

# Users, items, D, train items and test items a user, and the users that rivals are given.
SIZES = {
    "small": (2_000, 5_000, 64, 20, 5, 200),
    "reference": (100_000, 50_000, 64, 30, 10, 1024),
    "large": (1_000_000, 1_000_000, 64, 30, 10, 1024),
}
K = 20
METRICS = (f"recall@{K}", f"ndcg@{K}")


def interactions(users: int, items: int, each: int, generator: torch.Generator) -> Ragged:
    """Distinct items of each user, rising."""
    step = items // each
    first = torch.arange(each) * step
    ids = first + torch.randint(step, (users, each), generator=generator)
    return Ragged(torch.arange(users + 1) * each, ids.flatten())


def split(rows: Ragged, each: int) -> tuple[Ragged, Ragged]:
    """The rows as two: `each` of every row, chosen at random, and the rest."""
    table = rows.ids.view(len(rows), -1)
    order = torch.rand(table.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    parts = table.gather(1, order).split([each, table.shape[1] - each], 1)
    first, second = (
        Ragged(torch.arange(len(rows) + 1) * part.shape[1], part.sort(1).values.flatten()) for part in parts
    )
    return first, second


def batches(users: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, users)) for first in range(0, users, size))


class Task:
    """Embeddings, relevant and excluded items of the first `users` users."""

    def __init__(self, vectors: Tensor, items: Tensor, test: Ragged, train: Ragged, users: int) -> None:
        self.users, self.items = vectors[:users], items
        self.test, self.train = (Ragged(x.offsets[: users + 1], x.ids[: int(x.offsets[users])]) for x in (test, train))

    def ours(self) -> Tensor:
        """Both metrics of every user."""
        found = evaluate_items(self.users, self.items, self.test, self.train, METRICS, per_user=True)
        return torch.stack([torch.as_tensor(x) for x in found.values()])

    def scores(self, first: int, last: int) -> Tensor:
        """RecBole's: a row of scores for each user, history at −inf."""
        scores = self.users[first:last] @ self.items.T
        rows, ids = self._rows(self.train, first, last)
        scores[rows, ids] = -torch.inf
        return scores

    def torch(self, sort: bool, size: int) -> Tensor:
        gains = 1 / torch.log2(torch.arange(2, K + 2))
        totals = torch.zeros(2, dtype=torch.float64)
        for first, last in batches(len(self.users), size):
            scores = self.scores(first, last)
            best = scores.argsort(1, descending=True)[:, :K] if sort else scores.topk(K).indices
            rows, ids = self._rows(self.test, first, last)
            mine = torch.zeros(last - first, len(self.items), dtype=torch.bool)
            mine[rows, ids] = True
            hits, n = mine.gather(1, best), mine.sum(1)
            ideal = gains.cumsum(0)[n.clamp(max=K) - 1]
            totals += torch.stack([(hits.sum(1) / n).sum(), ((hits * gains).sum(1) / ideal).sum()])
        return totals / len(self.users)

    def recbole(self, size: int) -> Tensor:
        """What `Trainer.evaluate` does of RecBole 1.2.1, batch by batch, with its own collector and evaluator."""
        if importlib.util.find_spec("recbole") is None:
            raise ImportError("the package recbole is not installed")
        import numpy as np

        vars(np).setdefault("float", float)  # what RecBole still names
        from recbole.evaluator import Collector, Evaluator

        config: dict[str, Any] = {
            "metrics": ["Recall", "NDCG"], "topk": [K], "device": "cpu", "eval_args": {"mode": "full"}, "metric_decimal_place": 9,
        }  # fmt: skip
        collector = Collector(config)
        for first, last in batches(len(self.users), size):
            collector.eval_batch_collect(self.scores(first, last), None, *self._rows(self.test, first, last))
        found = Evaluator(config).evaluate(collector.get_data_struct())
        return torch.tensor([float(found[name]) for name in METRICS])

    @staticmethod
    def _rows(rows: Ragged, first: int, last: int) -> tuple[Tensor, Tensor]:
        offsets = rows.offsets[first : last + 1]
        return torch.arange(last - first).repeat_interleave(offsets.diff()), rows.ids[offsets[0] : offsets[-1]]


def test_items(race: harness.Race) -> None:
    U, I, D, train, test, few = SIZES[race.size]
    generator = torch.Generator().manual_seed(0)
    vectors, items = torch.randn(U, D, generator=generator), torch.randn(I, D, generator=generator)
    relevant, history = split(interactions(U, I, train + test, generator), test)
    # Half of a user's relevant items are near to the user, so that the figures say something.
    vectors += items[relevant.ids.view(U, -1)[:, : test // 2]].sum(1)
    whole, part = Task(vectors, items, relevant, history, U), Task(vectors, items, relevant, history, few)
    rows = race(
        f"evaluate items U{U} I{I} D{D}",
        {
            "ours": lambda: whole.ours()[:, :few].mean(1),
            "torch, full sort": lambda: part.torch(True, 128),
            "torch, top-k": lambda: part.torch(False, 256),
            "RecBole": lambda: part.recbole(max(4096 // I, 1)),
            "RecBole, 1024 users": lambda: part.recbole(1024),
        },
        truth="ours", tolerance=1e-5, work={"flop": 2.0 * U * I * D}, min_rounds=2,
    )  # fmt: skip
    ours = rows["ours"]
    for name, row in rows.items():
        if name != "ours" and row.p50 is not None:
            row.p20, row.p50, row.p80 = (x and x * U / few for x in (row.p20, row.p50, row.p80))
            row.bound = row.rate = row.percent = None
            row.ratio = row.p50 / ours.p50 if row.p50 and ours.p50 else None
            row.extra[f"of {few} users, times"] = U / few
    for demand in (
        [harness.times_as_fast("torch, full sort", 20), harness.peak_mb(100)] if race.size == "reference" else []
    ):
        ours.demands.append(
            {"what": demand.what, "limit": demand.limit, "most": demand.most, "got": demand.of(rows, ours)}
        )
    ours.extra |= {name: value.mean().item() for name, value in zip(METRICS, whole.ours(), strict=True)}
