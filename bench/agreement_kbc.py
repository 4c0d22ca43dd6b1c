"""Does the trainer learn what the code of Lacroix et al. (ICML 2018) learns with the same settings?

git clone https://github.com/facebookresearch/kbc && python bench/agreement_kbc.py --kbc kbc

Their model, penalty and optimiser run as they are, on the same graph, with the settings of
configs/wn18rr-kbc-rank16.yaml; the weights of both sides are ranked by this package. Initial weights and the order of
triples are each side's own: what agrees is what is learned. `--corruption both` trains ours on both sides of half as
many triples a step instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import torch
from torch import Tensor, nn

from dhns_fast.data import KnowledgeGraph
from dhns_fast.files import write_json
from dhns_fast.ranking import evaluate
from dhns_fast.train import TrainConfig, Trainer, prepare_graph

METRICS = ("mrr", "hits@1", "hits@10")
CONFIG = Path(__file__).parents[1] / "configs" / "wn18rr-kbc-rank16.yaml"
# Standard deviation of their initial values.
SCALE = 1e-3


def ours(config: TrainConfig, kg: KnowledgeGraph) -> tuple[Trainer, dict[str, Any]]:
    """A trainer after its last epoch, and what is reported of it."""
    trainer, losses = Trainer(config, kg), []
    begin = time.process_time()
    trainer.fit(on_epoch=lambda epoch: losses.append(epoch.losses["kgc"]))
    return trainer, {"cpu_s": time.process_time() - begin, "losses": losses}


def theirs(trainer: Trainer) -> dict[str, Any]:
    """Their training with the trainer's settings; the trainer's model has the weights afterwards."""
    from kbc import models, optimizers, regularizers

    config, kg = trainer.config, trainer.kg
    losses: list[float] = []

    class Recording(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            loss = super().forward(input, target)
            losses.append(loss.item())
            return loss

    optimizers.nn = SimpleNamespace(CrossEntropyLoss=Recording)
    torch.manual_seed(config.seed)
    R = kg.num_relations
    model = models.ComplEx((kg.num_entities, 2 * R, kg.num_entities), config.dim // 2, SCALE)
    h, r, t = kg.train.unbind(1)
    examples = torch.cat([kg.train, torch.stack([t, r + R, h], 1)])
    adagrad = torch.optim.Adagrad(model.parameters(), lr=config.learning_rate)
    n3 = regularizers.N3(config.n3_weight)
    training = optimizers.KBCOptimizer(model, n3, adagrad, config.batch_size, verbose=False)
    begin, means = time.process_time(), []
    # An epoch of theirs has a query for each side of each triple.
    for _ in range(config.epochs // 2):
        losses.clear()
        training.epoch(examples)
        means.append(statistics.mean(losses))
    seconds = time.process_time() - begin
    with torch.no_grad():
        for own, given in zip((trainer.model.entity, trainer.model.relation), model.embeddings, strict=True):
            own.weight.copy_(given.weight)
    return {"cpu_s": seconds, "losses": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kbc", required=True, help="folder of a clone of github.com/facebookresearch/kbc")
    parser.add_argument("--data", default="atlas")
    parser.add_argument("--epochs", type=int, default=20, help="of ours; one of theirs is two")
    parser.add_argument("--corruption", choices=("mixed", "both"), default="mixed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=("ours", "kbc"), default=["ours", "kbc"])
    options = parser.parse_args()
    sys.path.insert(0, options.kbc)
    if not torch.cuda.is_available():
        setattr(torch.Tensor, "cuda", lambda self: self)  # noqa: B010  # their batches go to a GPU unasked
    changes: dict[str, Any] = {
        "data": options.data, "epochs": options.epochs, "validate_every": options.epochs, "patience": 0, "order": "shuffled", "device": "cpu",
    }  # fmt: skip
    content: dict[str, Any] = harness.provenance(
        torch.device("cpu"), " ".join(["python", "bench/agreement_kbc.py", *sys.argv[1:]])
    )
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for seed in range(options.seeds):
        config = TrainConfig.load(CONFIG, **changes, seed=seed)
        if options.corruption == "both":
            half: dict[str, Any] = {
                name: getattr(config, name) // 2 for name in ("epochs", "validate_every", "batch_size")
            }
            config = dataclasses.replace(config, corruption="both", **half)
        kg, _ = prepare_graph(config)
        for side, rows in sides.items():
            if side == "ours":
                trainer, about = ours(config, kg)
            else:
                trainer = Trainer(config, kg)
                about = theirs(trainer)
            result = evaluate(trainer.model, kg)
            rows.append({name: result[name] for name in METRICS} | about)
            print(
                f"seed {seed}, {side}:",
                {name: x for name, x in rows[-1].items() if name != "losses"},
                about["losses"][-1],
                flush=True,
            )
    content |= {"graph": kg.name, "settings": config.to_dict(), "sides": sides}
    write_json(harness.RESULTS / f"agreement-kbc-{options.corruption}.json", content)
    for side, rows in sides.items():
        for name in METRICS:
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{side:5} {name:8} {statistics.mean(values):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
