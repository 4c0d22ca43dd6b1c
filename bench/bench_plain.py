"""An epoch of training without DHNS on MKG-Y (DistMult, self-adversarial loss, uniform corruptions, Adam) against
PyKEEN's sLCWA loop.

Each side runs in processes of its own (this file as a program), once as it is and once with glibc's allocator told to
keep memory instead of mapping it anew, which is a large part of PyKEEN's time and of nobody's work. Sizes, number of
negatives, temperature, learning rate and optimiser are the same; neither side validates. Corruptions are unfiltered on
both. What is learnt is compared in agreement_pykeen.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.train import TrainConfig, Trainer

TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# D and B.
SIZES = {"small": (64, 2000), "reference": (1024, 2000), "large": (2048, 2000)}
NEGATIVES, TEMPERATURE, LEARNING_RATE = 64, 0.5, 0.002


class Side:
    """A process that trains an epoch a call and gives the number of its steps; started when it is first asked."""

    def __init__(self, name: str, environment: dict[str, str], dim: int, batch: int, device: str) -> None:
        self.name, self.environment = name, environment
        self.arguments = [name, str(dim), str(batch), device, str(torch.get_num_threads())]
        self.process: subprocess.Popen[str] | None = None

    def __call__(self) -> Tensor:
        if self.name == "pykeen" and importlib.util.find_spec("pykeen") is None:
            raise ImportError("the package pykeen is not installed (pip install 'dhns-fast[rivals]')")
        if self.process is None:
            environment = os.environ | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, __file__, *self.arguments]
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("epoch", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert math.isfinite(answer["loss"]), f"{self.name} diverges"
        return torch.tensor(answer["steps"])

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture
def sides(race: harness.Race) -> Iterator[dict[str, Side]]:
    D, B = SIZES[race.size]
    rest = (D, B, race.device.type)
    found = {
        "ours": Side("ours", {}, *rest),
        "PyKEEN": Side("pykeen", {}, *rest),
        "ours, tuned allocator": Side("ours", TUNED, *rest),
        "PyKEEN, tuned allocator": Side("pykeen", TUNED, *rest),
    }
    yield found
    for side in found.values():
        side.close()


def test_epoch(race: harness.Race, sides: dict[str, Side]) -> None:
    D, B = SIZES[race.size]
    kg = harness.mkg_y()
    steps, elements = len(kg.train) // B, kg.num_entities * D
    wanted = [
        harness.times_as_fast("PyKEEN", 8),
        harness.times_as_fast("PyKEEN, tuned allocator", 2.5, "ours, tuned allocator"),
    ]
    rows = race(
        f"epoch without DHNS {kg.name} distmult B{B} N{NEGATIVES} D{D}", sides, truth="ours", seconds=None if race.size == "small" else 60.0,
        demands=wanted if race.size == "reference" and race.device.type == "cpu" else [],
        # Rows of pairs for the score and either gradient; the table's gradient; Adam reads four tables and writes
        # three.
        work={"byte": 4.0 * steps * (3 * B * (NEGATIVES + 1) * D + 8 * elements)},
    )  # fmt: skip
    for row in rows.values():
        row.peak_mb = None  # of this process, which does not train


def our_epochs(dim: int, batch: int, device: str) -> Callable[[], tuple[int, float]]:
    kg = dataclasses.replace(harness.mkg_y(), features={}, present={})
    config = TrainConfig(
        model="distmult", method="self-adversarial", dim=dim, batch_size=batch, num_negatives=NEGATIVES, temperature=TEMPERATURE, n3=0.0,
        filtered=False, learning_rate=LEARNING_RATE, device=device,
    )  # fmt: skip
    trainer = Trainer(config, kg)

    def epoch() -> tuple[int, float]:
        loss = 0.0
        for _ in range(trainer.steps_per_epoch):
            loss = trainer.step()["kgc"].item()
        return trainer.steps_per_epoch, loss

    return epoch


def pykeen_epochs(dim: int, batch: int, device: str) -> Callable[[], tuple[int, float]]:
    from pykeen.losses import NSSALoss
    from pykeen.models import DistMult
    from pykeen.sampling import BasicNegativeSampler
    from pykeen.training import SLCWATrainingLoop
    from pykeen.triples import CoreTriplesFactory

    kg = harness.mkg_y()
    factory = CoreTriplesFactory(kg.train, num_entities=kg.num_entities, num_relations=kg.num_relations)
    # Without the constraint and the regulariser that PyKEEN's DistMult has by default, and which ours has not.
    model = DistMult(
        triples_factory=factory, embedding_dim=dim, random_seed=0, loss=NSSALoss(margin=0.0, adversarial_temperature=TEMPERATURE),
        entity_constrainer=None, regularizer=None,
    ).to(device)  # fmt: skip
    loop = SLCWATrainingLoop(
        model=model, triples_factory=factory, optimizer=torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        negative_sampler=BasicNegativeSampler, negative_sampler_kwargs={"num_negs_per_pos": NEGATIVES},
    )  # fmt: skip
    done = 0

    def epoch() -> tuple[int, float]:
        nonlocal done
        done += 1
        losses = loop.train(
            factory,
            num_epochs=done,
            batch_size=batch,
            drop_last=True,
            use_tqdm=False,
            use_tqdm_batch=False,
            continue_training=done > 1,
        )
        return len(kg.train) // batch, losses[-1]

    return epoch


def serve(side: str, dim: int, batch: int, device: str, threads: int) -> None:
    """A process of :class:`Side`: an epoch for every line on stdin, its steps and loss as JSON on stdout."""
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    epoch = {"ours": our_epochs, "pykeen": pykeen_epochs}[side](dim, batch, device)
    for _ in sys.stdin:
        steps, loss = epoch()
        print(json.dumps({"steps": steps, "loss": loss}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
