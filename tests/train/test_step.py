"""One training step against the oracle in float64: the same random draws through the plain formulas, every loss term
and every gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fixtures.cases import relative
from fixtures.training import config, graph
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast.models import TransE
from dhns_fast.ops.noise import HEAD, TAIL, X_T, X_T_HEAD
from dhns_fast.reference import diffusion, loss, noise
from dhns_fast.reference import models as reference_models
from dhns_fast.train import Trainer

UNFUSED = {"fusion": False}
RELEASE = {"behaviour": "release"}
# Batches of 8 with 3 corruptions mention fewer rows than there are entities, those of 40 with 4 more: two ways to the
# same scores.
FEW, MANY = {"batch_size": 8, "num_negatives": 3}, {"batch_size": 40, "num_negatives": 4}
PENALISED = {"n3": 0.03, "l2": 0.2, "weighted_penalty": True}
CASES: list[dict[str, Any]] = [
    *(
        {"model": model, **size} | kind
        for model, size in zip(("transe", "distmult", "complex", "rotate"), (FEW, MANY, FEW, MANY), strict=True)
        for kind in ({}, UNFUSED, RELEASE)
    ),
    *(
        {"model": model, "method": "self-adversarial", **size}
        for model, size in zip(("simple", "quate", "rescal", "cp", "pairre"), (FEW, MANY, FEW, MANY, FEW), strict=True)
    ),
    {"model": "complex", "loss": "one-vs-all", **FEW},
    {"model": "pairre", "loss": "one-vs-all", "method": "uniform", "corruption": "bernoulli", **FEW},
    {"model": "transe", "norm": 2, **MANY},
    {"model": "complex", "shared_negatives": 40, "method": "self-adversarial", **MANY},
    {"model": "pairre", "shared_negatives": 3, "method": "self-adversarial", **FEW},
    {"model": "rotate", "shared_negatives": 7, "filtered": False, "corruption": "bernoulli", **FEW},
    {"model": "distmult", "behaviour": "release", "fusion": True, **FEW},
    {"model": "rotate", "corruption": "bernoulli", "filtered": False, "method": "self-adversarial", **MANY},
    {"model": "complex", "features": "none", "corruption": "bernoulli", **FEW},
    {"model": "rotate", "margin_schedule": "learned", **FEW},
    {"model": "transe", "method": "uniform", "n3": 0.01, "features": "none", **MANY},
    *(
        {"model": model, "method": "self-adversarial", "reciprocal": True, **more}
        for model, more in (
            ("cp", {"corruption": "both", **FEW}),
            ("pairre", {"corruption": "bernoulli", "l2": 0.02, **MANY}),
            ("rotate", {"weighted_penalty": True, "n3": 0.1, **FEW}),
        )
    ),
    *(
        {"model": model, "method": "uniform", "loss": "one-vs-all", "corruption": "both", **PENALISED, **FEW} | more
        for model, more in (
            ("complex", {"reciprocal": True}),
            ("pairre", {"corruption": "bernoulli", "reciprocal": True}),
            ("distmult", {"weighted_penalty": False}),
            ("complex", {"corruption": "mixed", "reciprocal": True}),
            ("complex", {}),
            ("cp", {"features": "none"}),
        )
    ),
]


class Oracle:
    """A trainer's next step, computed from its state before the step and its generator's weights after it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.rng = torch.Generator()
        self.rng.set_state(trainer.rng.get_state())
        self.model, self.margins = (copy.deepcopy(module).double() for module in (trainer.model, trainer.margins))
        for p in (*self.model.parameters(), *self.margins.parameters()):
            p.grad = None
        self.weights = {
            name: p.detach().double().requires_grad_()
            for name, p in (trainer.generator.named_parameters() if trainer.generator else ())
        }
        self.number = trainer.progress.step
        self.asked: list[tuple[str, Tensor]] = []

    def modalities(self, ids: Tensor) -> Tensor:
        model, rows = self.model, [self.model.entity.weight[ids]]
        if model.fusion is not None:
            for matrix, p in zip(model.fusion.features, model.fusion.projections, strict=True):
                assert isinstance(p, nn.Linear)
                rows.append(F.linear(matrix[ids], p.weight, p.bias))
        return torch.stack(rows)

    def present(self, ids: Tensor) -> Tensor:
        kg = self.trainer.kg
        return torch.stack([torch.ones(len(ids), dtype=torch.bool), *(kg.present[name][ids] for name in kg.features)])

    def joint(self, ids: Tensor) -> Tensor:
        attention = None if self.model.fusion is None else self.model.fusion.attention
        return (
            self.modalities(ids)[0]
            if attention is None
            else loss.fuse(self.modalities(ids), attention, self.present(ids))
        )

    def relation(self, ids: Tensor) -> Tensor:
        rows, model = self.model.relation.weight[ids], self.model
        return (
            rows * (math.pi * model.relation_dim / (model.margin + model.epsilon))
            if self.config.model == "rotate"
            else rows
        )

    def row(self, relation: Tensor, side: str) -> Tensor:
        return relation + self.model.num_relations * (self.config.reciprocal and side == "head")

    def penalty(self, exponent: int) -> Tensor:
        """Of the tables, or the mean over the queries of the three rows of each."""
        tables = (self.model.entity.weight, self.model.relation.weight)
        if not self.config.weighted_penalty:
            return torch.stack([x.abs().pow(exponent).sum() for x in tables]).sum()
        sums = []
        for side, triples in self.asked:
            for h, r, t in triples.tolist():
                row = self.row(torch.tensor(r), side)
                for x in (tables[0][h], tables[1][row], tables[0][t]):
                    size = torch.complex(*x.chunk(2)).abs() if self.config.model == "complex" else x.abs()
                    sums.append(size.pow(exponent).sum())
        return torch.stack(sums).sum() / sum(len(triples) for _, triples in self.asked)

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Of embeddings; γ included."""
        options: dict[str, Any] = {"p": self.config.norm, "normalize": True} if isinstance(self.model, TransE) else {}
        name = self.config.model
        gamma = self.model.margin if name in ("transe", "rotate", "pairre") else 0.0
        if hasattr(reference_models, name):
            return gamma + getattr(reference_models, name)(h, r, t)
        return gamma + loss.triple_score(name, h, r, t, **options)

    def kgc(self, batch: Tensor) -> Tensor:
        if self.config.corruption == "both":
            self.asked = [("tail", batch), ("head", batch)]
        elif self.config.corruption == "uniform":
            self.asked = [(("tail", "head")[self.number % 2], batch)]
        else:
            heads = self.trainer.negatives.sides(batch, self.rng)
            self.asked = [(side, rows) for side, rows in (("head", batch[heads]), ("tail", batch[~heads])) if len(rows)]
        positive, negative, cross_entropy = [], [], []
        for asked, rows in self.asked:
            h, r, t = self.joint(rows[:, 0]), self.relation(self.row(rows[:, 1], asked)), self.joint(rows[:, 2])
            side = asked
            if self.config.reciprocal and side == "head":
                h, t, side = t, h, "tail"
            if self.config.loss == "one-vs-all":
                everyone = self.joint(torch.arange(self.model.num_entities))
                all_scores = (
                    self.score(everyone, r[:, None], t[:, None])
                    if side == "head"
                    else self.score(h[:, None], r[:, None], everyone)
                )
                cross_entropy.append(
                    F.cross_entropy(all_scores, rows[:, 0 if asked == "head" else 2], reduction="none")
                )
                continue
            chunk = self.config.shared_negatives
            if chunk:
                sets = [self.trainer.negatives.shared(part, asked, self.rng) for part in rows.split(chunk)]  # type: ignore[arg-type]
                corrupt = torch.cat(
                    [ids.expand(len(part), -1) for (ids, _), part in zip(sets, rows.split(chunk), strict=True)]
                )
            else:
                corrupt = self.trainer.negatives.corrupt(rows, asked, self.rng)  # type: ignore[arg-type]
            fake = torch.stack([self.joint(c) for c in corrupt.unbind(1)], 1)
            positive.append(self.score(h, r, t))
            false = (
                self.score(fake, r[:, None], t[:, None]) if side == "head" else self.score(h[:, None], r[:, None], fake)
            )
            if chunk and self.config.filtered:
                false = torch.where(torch.cat([known for _, known in sets]), -1e30, false)  # type: ignore[arg-type]
            negative.append(false)
        if cross_entropy:
            return torch.cat(cross_entropy).mean()
        temperature = 0.0 if self.config.method == "uniform" else self.config.temperature
        return loss.self_adversarial_loss(torch.cat(positive), torch.cat(negative), temperature)

    def draw(self, stream: int, m: int, t: int, like: Tensor, seed: int) -> Tensor:
        return noise.philox_normal(seed, stream, m, 0, t, *like.shape)

    def dhns(self, batch: Tensor, updated: dict[str, Tensor]) -> dict[str, Tensor]:
        config, model, T = self.config, self.model, self.config.diffusion_steps
        h, r, t = batch.unbind(1)
        head, relation, tail = self.modalities(h), model.relation.weight[r], self.modalities(t)
        M = len(head)
        times = torch.randint(1, T + 1, (M, len(batch)), generator=self.rng)
        eps = torch.randn(head.shape, generator=self.rng).double()
        kind: dict[str, Any] = {
            "T": T,
            "kind": config.model,
            "behaviour": config.behaviour,
            "relation_range": model.relation_range,
        }
        both = self.present(h) & self.present(t)
        terms = {
            "diffusion": sum(
                diffusion.diffusion_loss(
                    self.weights, head[m][rows], relation[rows], tail[m][rows], times[m][rows], eps[m][rows], **kind
                )
                for m, rows in enumerate(both)
                if rows.any()
            )
        }
        seed = int(torch.randint(0, 2**63 - 1, (1,), generator=self.rng))
        levels = [s for s, w in zip(config.level_list, config.level_weights, strict=True) if w > 0]
        made = []
        with torch.no_grad():
            for m in range(M):
                steps = range(T, 1, -1)
                x_T, x_T_head = (self.draw(stream, m, 0, head[m], seed) for stream in (X_T, X_T_HEAD))
                z_tail, z_head = (
                    torch.stack([self.draw(stream, m, s, head[m], seed) for s in steps]) for stream in (TAIL, HEAD)
                )
                made.append(
                    diffusion.sample(
                        updated,
                        head[m],
                        relation,
                        tail[m],
                        x_T,
                        z_tail,
                        z_head,
                        levels=levels,
                        x_T_head=x_T_head,
                        **kind,
                    )
                )
        heads, tails = (
            torch.stack([torch.stack(level) for level in zip(*side, strict=True)]) for side in zip(*made, strict=True)
        )
        fused = model.fusion is not None and model.fusion.attention is not None
        distance = config.model in ("transe", "rotate")
        terms["hal"] = loss.hal_from_embeddings(
            config.model,
            head if fused else head[0],
            self.relation(r),
            tail if fused else tail[0],
            heads,
            tails,
            margin=self.margins() * model.margin * distance,
            weight=[w for w in config.level_weights if w > 0],
            mu=config.mu,
            gamma=model.margin * distance,
            attention=model.fusion.attention if fused and model.fusion is not None else None,
            normalize=config.model == "transe",
            p=config.norm,
            present=(self.present(h), self.present(t)) if fused else None,
        )
        return terms

    def step(self) -> dict[str, Tensor]:
        """Loss terms; the gradients are in `model` and `weights` afterwards."""
        generator = self.trainer.generator
        batch = self.trainer.kg.train[
            torch.randint(len(self.trainer.kg.train), (self.trainer.batch_size,), generator=self.rng)
        ]
        terms = {"kgc": self.kgc(batch)}
        n3 = (
            self.config.n3
            if self.config.n3 is not None
            else 0.0
            if self.config.model in ("transe", "rotate", "pairre")
            else 5e-6
        )
        if n3:
            terms["n3"] = n3 * self.penalty(3)
        if self.config.l2:
            terms["l2"] = self.config.l2 * self.penalty(2)
        if generator is not None:
            terms |= self.dhns(batch, {name: p.detach().double() for name, p in generator.named_parameters()})
        torch.stack(list(terms.values())).sum().backward()
        return terms


def learned(x: Trainer | Oracle) -> dict[str, nn.Parameter]:
    """What the model's optimiser changes."""
    return dict(x.model.named_parameters()) | dict(x.margins.named_parameters(prefix="margins"))


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(str(v) for k, v in o.items() if k not in FEW))
def test_two_steps_are_the_formulas(options: dict[str, Any]) -> None:
    kg = graph()
    if options.get("features") == "none":
        kg = graph(features={}, present={})
    # A large μ, so that what the generated negatives add to a gradient is no rounding error of the rest.
    trainer = Trainer(config(mu=1.0, seed=3, **options), kg)
    for number in range(2):
        oracle = Oracle(trainer)
        before = {name: p.detach().clone() for name, p in learned(trainer).items()}
        found = trainer.step()
        expected = oracle.step()
        assert found.keys() == expected.keys()
        for name, term in expected.items():
            assert relative(found[name], term) < 2e-6, (number, name)
        for name, p in learned(trainer).items():
            truth = learned(oracle)[name].grad
            assert (p.grad is None) == (truth is None), name
            if truth is not None and p.grad is not None:
                assert relative(p.grad, truth) < 5e-5, (number, name)
            assert torch.equal(p, before[name]) == (truth is None or not truth.any()), name
        if trainer.generator is not None:
            for name, p in trainer.generator.named_parameters():
                truth = oracle.weights[name].grad
                assert (p.grad is None) == (truth is None) == (not p.requires_grad), name
                assert p.grad is None or truth is None or relative(p.grad, truth) < 5e-5, (number, name)
        assert torch.equal(oracle.rng.get_state(), trainer.rng.get_state())


@pytest.mark.parametrize("behaviour", ["release", "corrected"])
def test_the_diffusion_loss_enters_the_models_step_under_release_only(behaviour: str) -> None:
    trainer = Trainer(config(model="distmult", behaviour=behaviour, fusion=False, n3=0.0), graph())
    trainer.step()
    fusion = trainer.model.fusion
    assert fusion is not None
    # Unfused, nothing but the diffusion loss reads features and projections.
    learns = [*fusion.features, *fusion.projections.parameters()]
    assert all((p.grad is not None and bool(p.grad.any())) == (behaviour == "release") for p in learns)
    assert trainer.model.entity.weight.grad is not None


def test_a_step_is_adam_on_those_gradients() -> None:
    trainer = Trainer(config(model="rotate"), graph())
    modules = [module for module in (trainer.model, trainer.generator) if module is not None]
    copies = [copy.deepcopy(module) for module in modules]
    optimizers = [
        torch.optim.Adam(c.parameters(), lr=lr, fused=True) for c, lr in zip(copies, (0.01, 0.002), strict=True)
    ]
    for _ in range(3):
        trainer.step()
        for module, twin, optimizer in zip(modules, copies, optimizers, strict=True):
            for p, q in zip(module.parameters(), twin.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
    for module, twin in zip(modules, copies, strict=True):
        for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_generator_steps_counts_the_generators_updates() -> None:
    trainer = Trainer(config(generator_steps=3), graph())
    trainer.step()
    assert trainer.generator_optimizer is not None
    assert {int(state["step"]) for state in trainer.generator_optimizer.state.values()} == {3}
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def test_dropout_leaves_numbers_out_of_queries_and_candidates() -> None:
    kg = graph(features={}, present={})
    options = {"loss": "one-vs-all", "corruption": "both", "reciprocal": True, "n3": 0.0, "method": "uniform"}
    trainer = Trainer(config(model="complex", dropout=0.4, relation_dropout=0.2, **options), kg)
    rng = torch.Generator()
    rng.set_state(trainer.rng.get_state())
    h, r, t = kg.train[torch.randint(len(kg.train), (trainer.batch_size,), generator=rng)].unbind(1)
    entity, relation = (x.weight.detach().double() for x in (trainer.model.entity, trainer.model.relation))

    def dropped(x: Tensor, share: float) -> Tensor:
        return x * (torch.rand(x.shape, generator=rng) >= share) / (1 - share)

    candidates, losses = dropped(entity, 0.4), []
    for known, rows, answer in ((h, r, t), (t, r + kg.num_relations, h)):
        query = dropped(entity[known], 0.4), dropped(relation[rows], 0.2)
        scores = loss.triple_score("complex", query[0][:, None], query[1][:, None], candidates)
        losses.append(F.cross_entropy(scores, answer))
    found = trainer.step()["kgc"]
    assert relative(found, torch.stack(losses).mean()) < 2e-6
    assert torch.equal(rng.get_state(), trainer.rng.get_state())
    assert trainer.model.dropout is None
    assert dict(trainer.validate()) == dict(trainer.validate())


@pytest.mark.parametrize("model", ["transe", "rotate", "rescal", "quate", "cp", "pairre", "hole"])
def test_dropout_goes_with_every_model(model: str) -> None:
    trainer = Trainer(config(model=model, dropout=0.5, relation_dropout=0.5, method="near-misses", mu=1.0), graph())
    losses = [{name: float(x) for name, x in trainer.step().items()} for _ in range(2)]
    again = Trainer(config(model=model, dropout=0.5, relation_dropout=0.5, method="near-misses", mu=1.0), graph())
    assert losses == [{name: float(x) for name, x in again.step().items()} for _ in range(2)]
