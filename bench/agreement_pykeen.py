"""Does the plain trainer (self-adversarial loss, no DHNS, no features) learn what PyKEEN's learns?

    python bench/agreement_pykeen.py        (needs the extra `rivals`; 20 minutes on one core)

Model, loss, number of negatives, batch size, optimiser, learning rate, steps and initial ranges are the same on both
sides. Each side has its own way of drawing: PyKEEN goes through the shuffled positives once an epoch, and corrupts
heads in one half of a batch and tails in the other; ours draws positives independently and corrupts one side a batch,
as the release does. So ours is trained twice, "ours" as it is and "shuffled" with PyKEEN's way of drawing, which alone
should agree within the spread of the seeds. (PyKEEN's unfiltered corruptions leave out the true entity itself, one of
E.) First the parts are compared on equal inputs (scores, loss, ranks of equal weights), then the test metrics after
training from several seeds, all ranked by our evaluator.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from typing import Any

import harness
import torch
from pykeen import models as pykeen_models
from pykeen.evaluation import RankBasedEvaluator
from pykeen.losses import NSSALoss
from pykeen.sampling import BasicNegativeSampler
from pykeen.training import SLCWATrainingLoop
from pykeen.triples import CoreTriplesFactory
from torch import Tensor

from dhns_fast.catalogue import Side
from dhns_fast.data import KnowledgeGraph
from dhns_fast.files import write_json
from dhns_fast.loss import self_adversarial_loss
from dhns_fast.models import KGEModel
from dhns_fast.ranking import evaluate
from dhns_fast.train import TrainConfig, Trainer

METRICS = ("mrr", "hits@1", "hits@10")
SIDES = ("ours", "shuffled", "pykeen")
REALISTIC_MRR = "both.realistic.inverse_harmonic_mean_rank"


class Shuffled(Trainer):
    """The trainer with PyKEEN's way of drawing."""

    def _positives(self, number: int) -> Tensor:
        begin = number % self.steps_per_epoch * self.batch_size
        if not begin:
            self.order = torch.randperm(len(self.train), generator=self.rng)
        return self.train[self.order[begin : begin + self.batch_size]]

    def _asked(self, batch: Tensor, number: int) -> list[tuple[Tensor, Side]]:
        half = len(batch) // 2
        return [(batch[:half], "head"), (batch[half:], "tail")]


def our_trainer(
    model: str, kg: KnowledgeGraph, options: argparse.Namespace, seed: int, kind: type[Trainer] = Trainer
) -> Trainer:
    """The plain trainer; TransE without the normalisation of the release, which PyKEEN does not have."""
    config = TrainConfig(
        features="none", model=model, dim=options.dim, method="self-adversarial", filtered=False, n3=0.0, epochs=options.epochs,
        batch_size=options.batch_size, validate_every=options.epochs, patience=0, seed=seed, device="cpu",
    )  # fmt: skip
    trainer = kind(config, kg)
    setattr(trainer.model, "normalize", False)  # noqa: B010  # TransE alone has it
    return trainer


def pykeen_model(model: KGEModel, factory: CoreTriplesFactory, seed: int) -> Any:
    """PyKEEN's model of the same kind, width and initial range, without constraint and regulariser."""
    reach = (model.margin + model.epsilon) / model.dim
    uniform = functools.partial(torch.nn.init.uniform_, a=-reach, b=reach)
    options: dict[str, Any] = {"triples_factory": factory, "embedding_dim": model.dim, "random_seed": seed}
    options |= {
        "entity_initializer": uniform,
        "relation_initializer": uniform,
        "entity_constrainer": None,
        "regularizer": None,
    }
    options["loss"] = NSSALoss(margin=model.offset, adversarial_temperature=0.5)
    if model.condition == "transe":
        return pykeen_models.TransE(scoring_fct_norm=1, **options)
    return pykeen_models.DistMult(**options)


def tables(rival: Any) -> tuple[Tensor, Tensor]:
    """PyKEEN's entity and relation embeddings, which are looked at and written in place."""
    return tuple(x[0]._embeddings.weight.data for x in (rival.entity_representations, rival.relation_representations))


def copy_weights(model: KGEModel, rival: Any, to_rival: bool) -> None:
    for ours, theirs in zip((model.entity.weight.data, model.relation.weight.data), tables(rival), strict=True):
        theirs.copy_(ours) if to_rival else ours.copy_(theirs)


def rival_mrr(rival: Any, kg: KnowledgeGraph, split: Tensor) -> float:
    """Realistic MRR by PyKEEN's evaluator, filtered by all three splits as ours is."""
    known = [part for part in (kg.train, kg.valid, kg.test) if part is not split]
    result = RankBasedEvaluator().evaluate(
        model=rival, mapped_triples=split, additional_filter_triples=known, batch_size=128, use_tqdm=False
    )
    return result.get_metric(REALISTIC_MRR)


def compare_parts(model: KGEModel, rival: Any, kg: KnowledgeGraph) -> dict[str, float]:
    """Largest differences on equal weights: scores (relative), loss, realistic test MRR."""
    copy_weights(model, rival, to_rival=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ours, theirs = model.score_hrt(kg.test) - model.offset, rival.score_hrt(kg.test).squeeze(-1)
    positive, negative = torch.randn(500, generator=generator) * 4, torch.randn(500, 64, generator=generator) * 4
    rival_loss = rival.loss.process_slcwa_scores(positive[:, None], negative)
    our_loss = self_adversarial_loss(model.offset + positive, model.offset + negative, 0.5)
    return {
        "scores": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
        "loss": abs(our_loss.item() - rival_loss.item()) / rival_loss.item(),
        "mrr": abs(evaluate(model, kg)["mrr"] - rival_mrr(rival, kg, kg.test)),
    }


def train_both(
    name: str, kg: KnowledgeGraph, factory: CoreTriplesFactory, options: argparse.Namespace
) -> dict[str, Any]:
    results: dict[str, Any] = {side: [] for side in SIDES}
    for seed in range(options.seeds):
        for side, kind in (("ours", Trainer), ("shuffled", Shuffled)):
            trainer = our_trainer(name, kg, options, seed, kind)
            begin = time.process_time()
            trainer.fit()
            seconds = time.process_time() - begin
            metrics = evaluate(trainer.model, kg)
            results[side].append({m: metrics[m] for m in METRICS} | {"cpu_s": seconds})
        rival = pykeen_model(trainer.model, factory, seed)
        loop = SLCWATrainingLoop(
            model=rival,
            triples_factory=factory,
            optimizer=torch.optim.Adam(rival.parameters(), lr=trainer.config.learning_rate),
            negative_sampler=BasicNegativeSampler,
            negative_sampler_kwargs={"num_negs_per_pos": trainer.config.num_negatives},
        )
        begin = time.process_time()
        loop.train(factory, num_epochs=options.epochs, batch_size=options.batch_size, drop_last=True, use_tqdm=False)
        rival_seconds = time.process_time() - begin
        if seed == 0:
            # After training on either side: weights that mean something, ranks that differ.
            kept = [x.clone() for x in tables(rival)]
            results["parts_on_our_weights"] = compare_parts(trainer.model, rival, kg)
            for x, value in zip(tables(rival), kept, strict=True):
                x.copy_(value)
            copy_weights(trainer.model, rival, to_rival=False)
            results["parts_on_pykeen_weights"] = compare_parts(trainer.model, rival, kg)
        copy_weights(trainer.model, rival, to_rival=False)
        metrics = evaluate(trainer.model, kg)
        results["pykeen"].append({m: metrics[m] for m in METRICS} | {"cpu_s": rival_seconds})
        print(f"{name} seed {seed}:", *(f"{side} {results[side][-1]}" for side in SIDES), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("dim", 64), ("epochs", 40), ("batch-size", 2000), ("seeds", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--models", nargs="+", choices=("distmult", "transe"), default=["distmult", "transe"])
    options = parser.parse_args()
    kg = dataclasses.replace(harness.mkg_y(), features={}, present={})
    factory = CoreTriplesFactory.create(kg.train, num_entities=kg.num_entities, num_relations=kg.num_relations)
    content: dict[str, Any] = harness.provenance(
        torch.device("cpu"), " ".join(["python", "bench/agreement_pykeen.py", *sys.argv[1:]])
    )
    content |= {"graph": kg.name, "options": vars(options), "models": {}}
    for name in options.models:
        results = content["models"][name] = train_both(name, kg, factory, options)
        for weights in ("our", "pykeen"):
            print(f"{name}, differences on {weights} weights:", results[f"parts_on_{weights}_weights"])
        for side in SIDES:
            columns = {key: [row[key] for row in results[side]] for key in results[side][0]}
            spread = {key: statistics.stdev(values) if len(values) > 1 else 0.0 for key, values in columns.items()}
            print(
                f"{name:9} {side:7}",
                *(f"{key} {statistics.mean(v):.4f} ± {spread[key]:.4f}" for key, v in columns.items()),
            )
    write_json(harness.RESULTS / "agreement-pykeen.json", content)


if __name__ == "__main__":
    main()
