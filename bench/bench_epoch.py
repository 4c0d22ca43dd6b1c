"""An epoch of DHNS training against an epoch of the plain oracle: the release's algorithm as it reads, step by step,
from the same weights.

Both sides draw the same batches, corruptions, timesteps and noise, so that their losses must agree; what is compared
before any time is taken are all loss terms of the first two steps (a tail batch, then a head batch after one update of
model and generator). An epoch is ⌊n/B⌋ steps of which a few are timed. Validation is no part of it on either side.
"""

from __future__ import annotations

import copy

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.catalogue import SIDES
from dhns_fast.ops.noise import HEAD, TAIL, X_T, X_T_HEAD, philox_normal
from dhns_fast.reference import diffusion, loss
from dhns_fast.train import TrainConfig, Trainer

# D and B.
SIZES = {"small": (64, 500), "reference": (256, 2000), "large": (1024, 2000)}


@pytest.mark.parametrize(
    ("model", "behaviour"), [(m, b) for m in ("rotate", "distmult") for b in ("release", "corrected")]
)
def test_epoch(race: harness.Race, model: str, behaviour: str) -> None:
    kg = harness.mkg_y()
    D, B = SIZES[race.size]
    config = TrainConfig(
        model=model, behaviour=behaviour, dim=D, batch_size=B, num_negatives=64, device=race.device.type
    )
    trainer = Trainer(config, kg)
    oracle = Oracle(trainer)
    seen: dict[str, list[Tensor]] = {"ours": [], "oracle": []}

    def ours_step() -> Tensor:
        terms = trainer.step()
        seen["ours"].append(torch.stack([terms[name] for name in sorted(terms)]))
        return torch.stack(seen["ours"][:2])

    def oracle_step() -> Tensor:
        seen["oracle"].append(oracle.step())
        return torch.stack(seen["oracle"][:2])

    M, T = 1 + len(kg.features), config.diffusion_steps
    assert trainer.generator is not None
    levels = trainer.generator.levels
    calls = T - min(levels) + (len(levels) if behaviour == "release" else T - min(levels))
    rows = race(
        f"epoch {kg.name} {model} {behaviour} B{B} D{D} M{M}",
        {"ours": ours_step, "oracle": oracle_step},
        tolerance=1e-4,
        error=term_error,
        # Products that any rewriting needs: of the chains, and of the diffusion loss of both sides, forward and twice
        # backward.
        work={"flop": 16.0 * D * D * B * M * (calls + 2 * 3)},
        demands=[harness.times_as_fast("oracle", 4)] if race.size == "reference" else (),
    )
    for row in rows.values():
        if row.p50 is not None:
            row.extra["epoch s"] = row.p50 / 1e3 * trainer.steps_per_epoch


def term_error(result: Tensor, truth: Tensor) -> float:
    """Largest relative error of a loss term."""
    return ((result.double() - truth.double()).abs() / truth.double().abs()).max().item()


class Oracle:
    """Plain DHNS training: 2T calls of the noise predictor per modality, every corruption gathered and projected, no
    sharing of work.

    Starts from copies of a trainer's weights and of its random state, and draws in the trainer's order.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.config, self.negatives, self.triples, self.device = (
            trainer.config,
            trainer.negatives,
            trainer.train,
            trainer.device,
        )
        self.n3, self.temperature = trainer.config.n3_weight, trainer.temperature
        self.model = copy.deepcopy(trainer.model)
        generator = copy.deepcopy(trainer.generator)
        assert generator is not None
        self.weights = dict(generator.named_parameters())
        self.rng = torch.Generator(self.device).set_state(trainer.rng.get_state())
        self.optimizer = torch.optim.Adam(
            [p for p in self.model.parameters() if p.requires_grad], lr=self.config.learning_rate
        )
        self.generator_optimizer = torch.optim.Adam(
            [p for p in generator.parameters() if p.requires_grad], lr=self.config.generator_learning_rate
        )
        self.number = 0

    def embed(self, ids: Tensor) -> Tensor:
        """[M, n, D]: the structural embedding and every projected feature row."""
        fusion = self.model.fusion
        assert fusion is not None
        views = [
            feature[ids] @ p.weight.T + p.bias for feature, p in zip(fusion.features, fusion.projections, strict=True)
        ]
        return torch.stack([self.model.entity.weight[ids], *views])

    def joint(self, ids: Tensor) -> Tensor:
        """[n, D]: what is scored."""
        assert self.model.fusion is not None
        attention = self.model.fusion.attention
        return self.model.entity.weight[ids] if attention is None else loss.fuse(self.embed(ids), attention)

    def normals(self, seed: int, stream: int, modality: int, step: int, B: int) -> Tensor:
        return philox_normal(seed, stream, modality, 0, step, B, self.config.dim, device=self.device)

    def step(self) -> Tensor:
        """Losses of one step: diffusion, hal, kgc, n3 (product models only)."""
        config, model, kind = self.config, self.model, self.model.condition
        B, T, behaviour = config.batch_size, config.diffusion_steps, config.behaviour
        index = torch.randint(len(self.triples), (B,), generator=self.rng, device=self.device)
        batch = self.triples[index]
        h, r, t = batch.unbind(1)
        side = SIDES[self.number % 2]
        self.number += 1
        corrupt = self.negatives.corrupt(batch, side, self.rng)
        self.optimizer.zero_grad(set_to_none=True)

        relation, offset = model.relation.weight[r], model.offset
        phase_or_relation, options = model.hal_relation(relation), model.hal_options()
        head, tail, wrong = self.joint(h), self.joint(t), self.joint(corrupt.flatten()).view(*corrupt.shape, -1)
        positive = offset + loss.triple_score(kind, head, phase_or_relation, tail, **options)
        pair = (wrong, tail[:, None]) if side == "head" else (head[:, None], wrong)
        negative = offset + loss.triple_score(kind, pair[0], phase_or_relation[:, None], pair[1], **options)
        terms = {"kgc": loss.self_adversarial_loss(positive, negative, self.temperature)}
        if self.n3:
            terms["n3"] = self.n3 * (model.entity.weight.abs().pow(3).sum() + model.relation.weight.abs().pow(3).sum())

        heads, tails = self.embed(h), self.embed(t)
        M = len(heads)
        timesteps = torch.randint(1, T + 1, (M, B), generator=self.rng, device=self.device)
        noise = torch.randn(heads.shape, generator=self.rng, device=self.device)
        range_ = model.relation_range
        terms["diffusion"] = torch.stack(
            [
                diffusion.diffusion_loss(
                    self.weights, heads[m], relation, tails[m], timesteps[m], noise[m], T, kind, behaviour, range_
                )
                for m in range(M)
            ]
        ).sum()
        self.generator_optimizer.zero_grad(set_to_none=True)
        terms["diffusion"].backward(retain_graph=behaviour == "release")
        self.generator_optimizer.step()

        seed = int(torch.randint(0, 2**63 - 1, (1,), generator=self.rng, device=self.device))
        made = []
        with torch.no_grad():
            for m in range(M):
                x_T, x_T_head = (self.normals(seed, stream, m, 0, B) for stream in (X_T, X_T_HEAD))
                z_tail, z_head = (
                    torch.stack([self.normals(seed, stream, m, step, B) for step in range(T, 1, -1)])
                    for stream in (TAIL, HEAD)
                )
                made.append(
                    diffusion.sample(
                        self.weights,
                        heads[m],
                        relation,
                        tails[m],
                        x_T,
                        z_tail,
                        z_head,
                        T,
                        kind,
                        behaviour,
                        range_,
                        x_T_head=x_T_head,
                    )
                )
        # [L, M, B, D]
        made_heads, made_tails = (torch.stack([torch.stack(made[m][i]) for m in range(M)], 1) for i in (0, 1))
        assert model.fusion is not None
        attention = model.fusion.attention
        terms["hal"] = loss.hal_from_embeddings(
            kind,
            heads if attention is not None else heads[0],
            phase_or_relation,
            tails if attention is not None else tails[0],
            made_heads,
            made_tails,
            [m * offset for m in config.level_margins],
            config.level_weights,
            config.mu,
            offset,
            attention,
            **options,
        )
        torch.stack([value for name, value in terms.items() if name != "diffusion"]).sum().backward()
        self.optimizer.step()
        return torch.stack([terms[name].detach() for name in sorted(terms)])
