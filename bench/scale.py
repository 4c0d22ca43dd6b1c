"""One large graph, trained and evaluated, in a process of its own: seconds of each part, resident memory against what
is planned, ranks against the relation-frequency baseline.

    python bench/scale.py --entities 1e6 --triples 5e6 --method dhns --optimiser rowwise-adagrad --epochs 2 --evaluate
    1000
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from dhns_fast.data import KnowledgeGraph, load, synthetic
from dhns_fast.files import write_json
from dhns_fast.ranking import RankingResult, SideRanks, evaluate
from dhns_fast.train import TrainConfig, Trainer, plan
from dhns_fast.train.memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("entities", 1e6), ("relations", 100), ("triples", 5e6)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--model", default="distmult")
    parser.add_argument("--method", default="self-adversarial")
    parser.add_argument("--optimiser", default="rowwise-adagrad")
    parser.add_argument("--table-dtype", default="float32")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--negatives", type=int, default=64, help="corruptions of each triple")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the self-adversarial weights")
    parser.add_argument("--epochs", type=float, default=0.05, help="a share of an epoch is enough for times")
    parser.add_argument("--steps", type=int, help="in place of a number of epochs")
    parser.add_argument("--data", help="a graph to load in place of a planted one, such as a converted folder")
    parser.add_argument("--features", type=int, default=0, help="columns of one modality, 0 for none")
    parser.add_argument(
        "--evaluate", type=int, default=1000, help="test triples that are ranked exactly, on both sides"
    )
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    keep_freed_memory()
    report: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        **harness.provenance(torch.device("cpu"), "python bench/scale.py"),
    }
    E, R = int(options.entities), int(options.relations)

    def timed(name: str, call: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        result = call()
        report[name] = {
            "seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "resident_mb": plan.resident() >> 20,
        }  # fmt: skip
        print(name, report[name], flush=True)
        return result

    modalities = {"text": options.features} if options.features else {}
    make = (lambda: load(options.data)) if options.data else (lambda: synthetic(E, R, int(options.triples), modalities))
    kg: KnowledgeGraph = timed("graph", make)
    E, R = kg.num_entities, kg.num_relations
    config = TrainConfig(
        model=options.model, method=options.method, dim=options.dim, batch_size=options.batch_size, num_negatives=options.negatives, patience=0,
        optimiser=options.optimiser, table_dtype=options.table_dtype, learning_rate=options.rate, n3=0.0,
        temperature=options.temperature, device="cpu",
    )  # fmt: skip
    trainer: Trainer = timed("build", lambda: Trainer(config, kg))
    steps = options.steps or max(3, int(options.epochs * trainer.steps_per_epoch))

    each: list[float] = []

    def fit() -> float:
        loss = 0.0
        for i in range(steps):
            begin = time.process_time()
            loss = float(trainer.step()["kgc"])
            each.append(time.process_time() - begin)
            if i % max(1, steps // 20) == 0:
                print(f"step {i} of {steps}, loss {loss:.4f}", flush=True)
        return loss

    report["loss"] = timed("training", fit)
    report["training"] |= {
        "steps": steps,
        "us_a_triple": round(1e6 * report["training"]["seconds"] / steps / config.batch_size, 2),
    }
    report["training"]["cpu_us_a_triple"] = round(
        1e6 * report["training"]["cpu_seconds"] / steps / config.batch_size, 2
    )
    # The first step takes all of the optimiser's state from the system.
    report["training"]["median_cpu_us_a_triple"] = round(1e6 * statistics.median(each) / config.batch_size, 2)
    sizes = plan.Sizes(E, R, len(kg.train), (options.features,) if options.features else ())
    made = plan.plan(config, sizes, device="cpu")
    report["planned_mb"] = {part.name: part.bytes >> 20 for part in made.parts} | {"total": made.total("host") >> 20}
    if options.evaluate:
        chosen = kg.test[: options.evaluate]
        trainer.model.eval()
        result = timed("evaluation", lambda: evaluate(trainer.model, kg, triples=chosen))
        frequency = timed("relation frequency", lambda: relation_frequency(kg, chosen, result))
        report["metrics"] = {
            name: {m: round(r[m], 5) for m in ("mrr", "hits@1", "hits@10")}
            for name, r in (("exact", result), ("among 1000", result.sampled(1000)), ("relation frequency", frequency))
        }
        print(json.dumps(report["metrics"]))
    print(json.dumps(report["training"]), json.dumps(report["planned_mb"]))
    if options.output:
        write_json(Path(options.output), report)


def relation_frequency(kg: KnowledgeGraph, triples: Tensor, exact: RankingResult) -> RankingResult:
    """The baseline of a graph whose [E, R] counts do not fit: entities by how often they answer the relation's side, a
    relation at a time.

    Known answers stay in, which is a hair to its disadvantage at this size.
    """
    sides = {}
    for side, own in (("head", 0), ("tail", 2)):
        greater, equal = (torch.zeros(len(triples), dtype=torch.int64) for _ in range(2))
        for relation in triples[:, 1].unique().tolist():
            counts = kg.train[kg.train[:, 1] == relation][:, own].bincount(minlength=kg.num_entities)
            found = counts.sort().values
            for row in (triples[:, 1] == relation).nonzero()[:, 0].tolist():
                mine = counts[triples[row, own]]
                low, high = (int(torch.searchsorted(found, mine, right=right)) for right in (False, True))
                greater[row], equal[row] = len(found) - high, high - low - 1
        sides[side] = SideRanks(greater, equal, torch.full((len(triples),), kg.num_entities))
    return RankingResult(triples, sides["head"], sides["tail"], exact.categories, exact.unseen, exact.relation_names)


if __name__ == "__main__":
    main()
