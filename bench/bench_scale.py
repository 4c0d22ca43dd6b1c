"""A step of training against the number of entities: row-wise optimisers, dense Adam, and what torch and PyKEEN users
have.

DistMult, D 128, 64 corruptions of each triple, self-adversarial, on a synthetic graph of five triples an entity. All
start from the same tables; batches and corruptions are drawn from one distribution. A row's `extra` has microseconds a
triple. `python bench/scale.py` trains and evaluates whole graphs, with the memory that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import harness
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast.data import KnowledgeGraph, synthetic
from dhns_fast.train import TrainConfig, Trainer
from dhns_fast.train.memory import keep_freed_memory

D, N, R, RATE, TEMPERATURE = 128, 64, 100, 0.05, 0.5
# Entities and triples a batch.
SIZES = {
    "small": ((100_000, 1024),),
    "reference": ((100_000, 1024), (1_000_000, 1024), (1_000_000, 4096)),
    "large": ((5_000_000, 1024),),
}
# A race holds all its providers. Dense Adam moves the whole table in every step: at a million entities two of it with
# all others took 14.6 GB. At five million PyKEEN alone takes some 17 GB, all that it can have on a machine of 24.
DENSE, TOGETHER = 100_000, 1_000_000
# Loss of the second step: optimisers differ in what the first did.
TOLERANCE = 1e-3


def config(E: int, B: int, optimiser: str, device: torch.device) -> TrainConfig:
    return TrainConfig(
        features="none", model="distmult", method="self-adversarial", dim=D, batch_size=B, num_negatives=N, temperature=TEMPERATURE,
        optimiser=optimiser, learning_rate=RATE, n3=0.0, device=device.type,
    )  # fmt: skip


def ours(kg: KnowledgeGraph, B: int, optimiser: str, device: torch.device) -> Callable[[], Tensor]:
    trainer = Trainer(config(kg.num_entities, B, optimiser, device), kg)
    # All from one start, which is DistMult's of the others below.
    start(trainer.model.entity.weight, trainer.model.relation.weight)
    return lambda: trainer.step()["kgc"]


def start(*tables: Tensor) -> None:
    generator = torch.Generator(tables[0].device).manual_seed(0)
    with torch.no_grad():
        for table in tables:
            table.uniform_(-0.2, 0.2, generator=generator)


def plain(
    kg: KnowledgeGraph,
    B: int,
    make: Callable[[list[Tensor]], Sequence[torch.optim.Optimizer | RowwiseByHand]],
    sparse: bool,
    device: torch.device,
) -> Callable[[], Tensor]:
    """What one writes in torch: nn.Embedding, gathered corruptions, an optimiser."""
    entity, relation = (nn.Embedding(n, D, sparse=sparse, device=device) for n in (kg.num_entities, R))
    start(entity.weight, relation.weight)
    optimizers = make([entity.weight, relation.weight])
    train, generator = kg.train.to(device), torch.Generator(device).manual_seed(0)
    number = 0

    def step() -> Tensor:
        nonlocal number
        h, r, t = train[torch.randint(len(train), (B,), generator=generator, device=device)].unbind(1)
        known, answer = (t, h) if number % 2 else (h, t)
        number += 1
        corrupt = torch.randint(kg.num_entities, (B, N), generator=generator, device=device)
        query = entity(known) * relation(r)
        positive = (query * entity(answer)).sum(-1)
        negative = torch.einsum("bd,bnd->bn", query, entity(corrupt))
        weight = (TEMPERATURE * negative).softmax(1).detach()
        loss = -0.5 * (F.logsigmoid(positive).mean() + (weight * F.logsigmoid(-negative)).sum(1).mean())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return step


class RowwiseByHand:
    """Row-wise Adagrad as one writes it in torch: coalesce, then index."""

    def __init__(self, tables: list[Tensor]) -> None:
        self.tables = tables
        self.sums = [torch.zeros(len(table), device=table.device) for table in tables]

    def zero_grad(self) -> None:
        for table in self.tables:
            table.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for table, total in zip(self.tables, self.sums, strict=True):
            assert table.grad is not None
            gradient = table.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            total.index_add_(0, rows, values.pow(2).mean(1))
            table.index_add_(0, rows, values * (-RATE / (total[rows].sqrt() + 1e-10))[:, None])


def pykeen(kg: KnowledgeGraph, B: int, device: torch.device) -> Callable[[], Tensor]:
    """PyKEEN's own model, sampler and loss; its embeddings have dense gradients."""
    from pykeen.losses import NSSALoss
    from pykeen.models import DistMult
    from pykeen.sampling import BasicNegativeSampler
    from pykeen.triples import CoreTriplesFactory

    factory = CoreTriplesFactory(kg.train, num_entities=kg.num_entities, num_relations=R)
    model = DistMult(
        triples_factory=factory,
        embedding_dim=D,
        random_seed=0,
        loss=NSSALoss(margin=0.0, adversarial_temperature=TEMPERATURE),
    ).to(device)
    sampler = BasicNegativeSampler(
        mapped_triples=kg.train, num_entities=kg.num_entities, num_relations=R, num_negs_per_pos=N
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step() -> Tensor:
        positive = kg.train[torch.randint(len(kg.train), (B,))]
        negative = sampler.corrupt_batch(positive).view(-1, 3)
        optimizer.zero_grad()
        scores = model.score_hrt(negative.to(device)).view(B, N)
        loss = model.loss.process_slcwa_scores(model.score_hrt(positive.to(device)), scores)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("number", range(3))
def test_step(race: harness.Race, number: int) -> None:
    if number >= len(SIZES[race.size]):
        pytest.skip(f"size {race.size} has {len(SIZES[race.size])} points")
    keep_freed_memory()
    E, B = SIZES[race.size][number]
    kg, device = synthetic(E, R, 5 * E, {}), race.device
    providers: dict[str, Callable[[], Tensor]] = {}

    def offer(name: str, make: Callable[[], Callable[[], Tensor]]) -> None:
        """A provider that is built when it is first called: what it holds counts as its memory."""
        built: list[Callable[[], Tensor]] = []

        def call() -> Tensor:
            if not built:
                built.append(make())
            return built[0]()

        providers[name] = call

    offer("ours rowwise-adagrad", lambda: ours(kg, B, "rowwise-adagrad", device))
    offer("PyKEEN", lambda: pykeen(kg, B, device))
    if E <= TOGETHER:
        offer("ours adagrad", lambda: ours(kg, B, "adagrad", device))
        offer("ours lazy-adam", lambda: ours(kg, B, "lazy-adam", device))
        offer("torch row-wise Adagrad by hand", lambda: plain(kg, B, lambda p: [RowwiseByHand(p)], True, device))
        offer("torch sparse Adagrad", lambda: plain(kg, B, lambda p: [torch.optim.Adagrad(p, lr=RATE)], True, device))
        offer("torch SparseAdam", lambda: plain(kg, B, lambda p: [torch.optim.SparseAdam(p, lr=RATE)], True, device))
    if E <= DENSE:
        offer("ours dense adam", lambda: ours(kg, B, "adam", device))
        offer(
            "torch dense Adam",
            lambda: plain(kg, B, lambda p: [torch.optim.Adam(p, lr=RATE, fused=True)], False, device),
        )
    touched = min(E, B * (N + 2))
    rows = race(
        f"step DistMult E{E} B{B} N{N} D{D}",
        providers,
        truth="ours rowwise-adagrad",
        # Losses of different draws of one distribution, but for the loss of other optimisers' second step: the size of
        # a loss is what is compared.
        error=lambda result, truth: abs(result.item() - truth.item()) / truth.item(),
        tolerance=0.5,
        seconds=4.0 if race.size == "small" else 20.0,
        # What a step moves at least: touched rows, read once and written once.
        work={"byte": 2.0 * 4 * touched * D},
        demands=[
            harness.times_as_fast(name, 5.0)
            for name in providers
            if name.startswith(("torch row", "torch SparseAdam", "PyKEEN"))
        ],
        curve=("training step", "E", E) if B == 1024 else None,
    )
    for row in rows.values():
        if row.p50 is not None:
            row.extra["us_a_triple"] = round(1e3 * row.p50 / B, 2)
