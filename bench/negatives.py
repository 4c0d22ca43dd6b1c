"""What each sampler of negatives costs: CPU time of one call for a batch, all threads together, on a graph of MKG-Y's
size.

python bench/negatives.py            # prints the table and writes bench/results/negatives.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from dhns_fast import files
from dhns_fast.data import CSRFilter, synthetic
from dhns_fast.fusion import Fusion
from dhns_fast.models import RotatE
from dhns_fast.negatives import (
    GAN,
    Bernoulli,
    Constrained,
    Diffusion,
    Grounded,
    ModalitySwap,
    Nearest,
    NSCaching,
    Uniform,
)
from dhns_fast.sampler import DiffHEG
from dhns_fast.train.run import versions

E, R, D, B, N = 15_000, 28, 64, 2000, 64
CALLS = 3


def main() -> None:
    torch.manual_seed(0)
    kg = synthetic(E, R, 21_310, {}, seed=0)
    known = CSRFilter.from_triples(kg.train, E, R)
    model = RotatE(E, R, D, fusion=Fusion({"name": torch.randn(E, 384), "context": torch.randn(E, 384)}, D))

    def diffusion(steps: int | None) -> DiffHEG:
        levels = [5, 6, 12, 25]
        return DiffHEG(
            D, 50, D // 2, 6.0, 2.0, condition="rotate", behaviour="normalised", levels=levels, sampling_steps=steps
        )

    samplers = {
        "uniform": Uniform(known, N), "bernoulli": Bernoulli(known, N), "relation-constrained": Constrained(known, N),
        "nscaching": NSCaching(known, model, N), "near-misses": Nearest(known, model),
        "near-misses, to the query": Nearest(known, model, to="query"), "kbgan": GAN(known, dim=D), "modality-swap": ModalitySwap(known, model),
        "dhns-normalised, 50 steps": Diffusion(known, model, diffusion(None)),
        "dhns-normalised, 10 steps": Diffusion(known, model, diffusion(10)), "grounded, 10 steps": Grounded(known, model, diffusion(10)),
    }  # fmt: skip
    rows = []
    h, r, t = kg.train[torch.randint(len(kg.train), (B,), generator=torch.Generator().manual_seed(0))].unbind(1)
    for name, sampler in samplers.items():

        def call(sampler: object = sampler) -> None:
            if sampler.by_id:  # type: ignore[attr-defined]
                ids = sampler.sample(h, r, t)  # type: ignore[attr-defined]
                if sampler.learns:  # type: ignore[attr-defined]
                    sampler.update(ids, torch.zeros(ids.shape))  # type: ignore[attr-defined]
            else:
                sampler.generate(h, r, t)  # type: ignore[attr-defined]

        rows.append({"sampler": name, "cpu_ms": 1000 * least(call)})
        print(f"| {name} | {rows[-1]['cpu_ms']:.0f} |", flush=True)
    settings = {
        "entities": E,
        "dim": D,
        "batch": B,
        "corruptions": N,
        "modalities": 3,
        "threads": torch.get_num_threads(),
    }
    output = Path(__file__).parent / "results" / "negatives.json"
    files.write_json(output, {"settings": settings, "provenance": versions(), "rows": rows})


def least(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(CALLS):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


if __name__ == "__main__":
    main()
