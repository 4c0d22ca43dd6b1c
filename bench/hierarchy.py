"""Are the levels a hierarchy? Scores of what a generator makes at each level, beside positives, uniform corruptions and
noise of the same norm.

A model is trained with self-adversarial corruptions, then a generator of each behaviour on its embeddings, which stay
as they are: what differs is the behaviour alone. Its learning rate falls linearly to nothing. Medians are of ten
batches of 1000 train triples with a seed each. Levels are given, or the four of "normalised" whose medians are furthest
apart in ten other batches, for all behaviours.

    python bench/hierarchy.py --data atlas,path/to/MKG-Y --models rotate,transe --steps 4000

writes bench/results/hierarchy.json and docs/img/hierarchy-DATA-MODEL.png; with `--features none`, where the structure
is the only modality, names that end in "-structure"; with another T than 50, in "-T100".
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dhns_fast import files, plots
from dhns_fast.catalogue import BEHAVIOURS
from dhns_fast.models import KGEModel
from dhns_fast.sampler import DiffHEG
from dhns_fast.train import Trainer, prepare_graph
from dhns_fast.train.config import TrainConfig
from dhns_fast.train.run import versions

ROOT = Path(__file__).parents[1]


def generator_of(model: KGEModel, behaviour: str, levels: Sequence[int], T: int) -> DiffHEG:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiffHEG(
            model.dim,
            T,
            model.relation_dim,
            model.margin,
            model.epsilon,
            condition=model.condition,
            behaviour=behaviour,
            levels=levels,
            modalities=1 if model.fusion is None else len(model.fusion.names),
        )


def trained_generator(trainer: Trainer, behaviour: str, levels: Sequence[int], T: int, steps: int) -> DiffHEG:
    model, kg = trainer.model, trainer.kg
    made = generator_of(model, behaviour, levels, T)
    optimizer, rng = torch.optim.Adam(made.parameters(), lr=0.002), torch.Generator().manual_seed(0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        h, r, t = kg.train[torch.randint(len(kg.train), (1000,), generator=rng)].unbind(1)
        with torch.no_grad():
            inputs = model.modalities(h), model.relation(r), model.modalities(t)
        optimizer.zero_grad()
        made(*inputs, generator=rng).backward()
        optimizer.step()
        decay.step()
    return made.eval()


def furthest_apart(rows: Sequence[dict[str, float]], count: int = 4) -> list[int]:
    """The levels, hardest first, whose least distance is largest as a share of that between positives and uniform
    corruptions, in the batch where it is smallest.
    """
    names = [name for name in rows[0] if name.startswith("level")]
    times = [int(name.split()[1]) for name in names]
    medians = torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)
    medians /= torch.tensor([[row["positives"] - row["uniform corruptions"]] for row in rows], dtype=torch.float64)
    chosen = torch.combinations(torch.arange(len(times))[torch.tensor(times).argsort()], count)
    least = (medians[:, chosen[:, :-1]] - medians[:, chosen[:, 1:]]).amin(-1).amin(0)
    return [times[i] for i in chosen[least.argmax()]]


def medians(trainer: Trainer, generator: DiffHEG, seeds: range) -> list[dict[str, float]]:
    out = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        batch = trainer.kg.train[torch.randperm(len(trainer.kg.train), generator=rng)[:1000]]
        scores = plots.scores_by_hardness(trainer.model, generator, batch, trainer.negatives, rng)
        out.append({name: x.median().item() for name, x in scores.items()})
    return out


def least_step(row: dict[str, float]) -> float:
    """The smallest distance between neighbouring levels, as a share of that between positives and uniform corruptions;
    negative: no order.
    """
    levels = [value for name, value in row.items() if name.startswith("level")]
    return min(a - b for a, b in itertools.pairwise(levels)) / (row["positives"] - row["uniform corruptions"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="atlas")
    parser.add_argument("--models", default="rotate,transe")
    parser.add_argument("--behaviours", default=",".join(BEHAVIOURS))
    parser.add_argument("--levels", help="by default the four that are furthest apart")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--diffusion-steps", type=int, default=50)
    parser.add_argument("--features", choices=("all", "none"), default="all")
    options = parser.parse_args()
    T = options.diffusion_steps
    suffix = ("" if options.features == "all" else "-structure") + ("" if T == 50 else f"-T{T}")
    rows = []
    for data in options.data.split(","):
        for name in options.models.split(","):
            config = TrainConfig(
                data=data, model=name, dim=64, method="self-adversarial", learning_rate=0.006, batch_size=1000, epochs=options.epochs,
                validate_every=options.epochs, features=options.features,
            )  # fmt: skip
            trainer = Trainer(config, prepare_graph(config)[0])
            trainer.fit()
            drawn, first = {}, None
            if options.levels:
                levels = [int(x) for x in options.levels.split(",")]
            else:
                first = made = trained_generator(trainer, "normalised", range(T), T, options.steps)
                levels = furthest_apart(medians(trainer, made, range(options.seeds, 2 * options.seeds)))
            for behaviour in options.behaviours.split(","):
                begin = time.process_time()
                if behaviour == "normalised" and first is not None:
                    made = generator_of(trainer.model, behaviour, levels, T).eval()
                    made.load_state_dict(first.state_dict())
                else:
                    made = trained_generator(trainer, behaviour, levels, T, options.steps)
                each = medians(trainer, made, range(options.seeds))
                middle = {key: statistics.median(row[key] for row in each) for key in each[0]}
                steps = [least_step(row) for row in each]
                rows.append({
                    "data": Path(data).name, "model": name, "behaviour": behaviour, "levels": levels, "medians": middle, "least_step": min(steps),
                    "seeds_with_a_sixth": sum(x > 1 / 6 for x in steps), "seeds": len(steps), "cpu_seconds": time.process_time() - begin,
                })  # fmt: skip
                print(rows[-1], flush=True)
                rng = torch.Generator().manual_seed(0)
                batch = trainer.kg.train[torch.randperm(len(trainer.kg.train), generator=rng)[:1000]]
                drawn[behaviour] = plots.scores_by_hardness(trainer.model, made, batch, trainer.negatives, rng)
            if plots.available():
                plots.draw_hierarchies(drawn, ROOT / "docs" / "img" / f"hierarchy-{Path(data).name}-{name}{suffix}.png")
            settings = {"epochs": options.epochs, "generator_steps": options.steps, "dim": 64, "T": T, "batch": 1000}
            settings |= {"features": options.features}
            files.write_json(
                ROOT / "bench" / "results" / f"hierarchy{suffix}.json",
                {"settings": settings, "provenance": versions(), "rows": rows},
            )


if __name__ == "__main__":
    main()
