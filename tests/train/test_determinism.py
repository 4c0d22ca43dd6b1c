"""What docs/determinism.md promises: processes with 1, 2 and 4 threads that run at the same time, and threads that draw
random numbers meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from fixtures.training import config, graph

from dhns_fast.train import build

# More rows than one thread takes of an elementwise operation, of models of every kind that docs/determinism.md names.
PROGRAM = """
import hashlib, json, sys, threading
import torch
sys.path.insert(0, {tests!r})
from dhns_fast.data import synthetic
from dhns_fast.train import TrainConfig, Trainer

stop = threading.Event()
def draw():
    while not stop.is_set():
        torch.rand(1000)
threading.Thread(target=draw, daemon=True).start()
kg = synthetic(1500, 5, 4000, {{"text": 24}}, seed=1, valid_fraction=0.05, test_fraction=0.05)
out = {{}}
for model, options in (
    ("transe", {{"fusion": False}}), ("complex", {{"fusion": False, "loss": "one-vs-all", "method": "uniform"}}),
    ("rotate", {{"fusion": False}}), ("rotate", {{}}), ("distmult", {{}}), ("transe", {{"train_features": True}}), ("complex", {{"method": "dhns"}}),
):
    options = {{"method": "self-adversarial"}} | options
    trainer = Trainer(TrainConfig(model=model, dim=32, batch_size=256, num_negatives=16, diffusion_steps=6, device="cpu", seed=3, **options), kg)
    for _ in range(2):
        trainer.step()
    digest = hashlib.sha256()
    for name, x in sorted(trainer.built.state().items()):
        digest.update(name.encode() + x.numpy().tobytes())
    out[f"{{model}} {{options}}"] = digest.hexdigest()
stop.set()
print(json.dumps(out))
"""


def test_bits_of_processes_that_run_side_by_side() -> None:
    tests = str(Path(__file__).parents[1])
    processes = []
    for threads in (1, 1, 2, 4):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", PROGRAM.format(tests=tests)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    one, again, *more = (json.loads(process.communicate()[0].splitlines()[-1]) for process in processes)
    assert one == again
    promised = [name for name in one if "dhns" not in name]
    assert len(promised) == 6
    for other in more:
        assert {name: other[name] for name in promised} == {name: one[name] for name in promised}


def test_the_seed_decides_initial_weights_whatever_other_threads_draw() -> None:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    def weights() -> list[torch.Tensor]:
        run = build(config(seed=5), graph())
        return [x.clone() for x in run.state().values()]

    expected = weights()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(30):
            assert all(torch.equal(x, y) for x, y in zip(weights(), expected, strict=True))
    finally:
        stop.set()
        thread.join()


def test_initial_weights_leave_the_process_wide_generator_alone() -> None:
    before = torch.get_rng_state()
    build(config(), graph())
    assert torch.equal(torch.get_rng_state(), before)
