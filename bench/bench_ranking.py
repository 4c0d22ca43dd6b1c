"""Filtered evaluation of MKG-Y's test set, both sides, against PyKEEN's RankBasedEvaluator at its own choice of batch;
raw ranks of tails against PyTorch Geometric; and the filter's index.

PyKEEN runs in a process of its own (this file as a program), as a part of its time on the CPU is memory mapping that
glibc's allocator can be told to leave out when a process starts: it races as it is and tuned so. Weights are the same
on both sides. PyKEEN's RotatE takes the Euclidean norm where the paper and ours sum the moduli: it is raced with ours
ranked by the Euclidean norm too, which must give its result, and beside that by the moduli, of which the time alone is
compared. Our own rows are whole evaluations, the filter and the metrics included; PyKEEN is handed the filter triples
in each call likewise. "ours, PyKEEN's model" is :mod:`dhns_fast.integrations.pykeen` on the rival's own model.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast import models
from dhns_fast.data import CSRFilter, KnowledgeGraph
from dhns_fast.ranking import evaluate
from dhns_fast.scoring import rank_all

MRR = "both.realistic.inverse_harmonic_mean_rank"
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# Test triples (None: all) and D.
SIZES = {"small": (16, 256), "reference": (None, 256), "large": (None, 1024)}
# Model, reduction, and how many times PyKEEN's speed is demanded.
CASES = {
    "TransE L1": ("TransE", "l1", 50),
    "TransE L2": ("TransE", "l2", 60),
    "DistMult": ("DistMult", "dot", 100),
    "ComplEx": ("ComplEx", "dot", 50),
    "RotatE, Euclidean": ("RotatE", "l2", 200),
    "RotatE": ("RotatE", "complex_l1", 200),
}
WARM_UP = 8  # triples of a rival's first evaluation, whose time nobody takes


class Worker:
    """A process that evaluates with PyKEEN, started when it is first asked."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def ask(self, path: Path, triples: int) -> dict[str, float]:
        if importlib.util.find_spec("pykeen") is None:
            raise ImportError("the package pykeen is not installed (pip install 'dhns-fast[rivals]')")
        if self.process is None:
            environment = os.environ | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(path), triples]), file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        ended, self.process = self.process.wait(), None
        raise ChildProcessError(
            f"its process ended with status {ended}" + " (killed, as where memory runs out)" * (ended == -9)
        )

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


class PyKEEN:
    """Evaluates a job in a worker and gives the MRR."""

    def __init__(self, worker: Worker, path: Path, triples: int) -> None:
        self.worker, self.path, self.triples = worker, path, triples
        self.calls = 0
        self.peak_mb: float | None = None

    def __call__(self) -> Tensor:
        answer = self.worker.ask(self.path, self.triples if self.calls else WARM_UP)
        self.calls += 1
        self.peak_mb = answer["peak_mb"]
        return torch.tensor(answer["mrr"])


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    found = {"PyKEEN": Worker({}), "PyKEEN, tuned allocator": Worker(TUNED)}
    yield found
    for worker in found.values():
        worker.close()


def rival_model(job: dict[str, Any]) -> Any:
    """PyKEEN's model of the kind, width and weights of ours."""
    from pykeen import models as pykeen_models
    from pykeen.triples import CoreTriplesFactory

    entity, relation = job["entity"], job["relation"]
    paired = job["kind"] in ("ComplEx", "RotatE")
    factory = CoreTriplesFactory(job["known"][0], num_entities=len(entity), num_relations=len(relation))
    options: dict[str, Any] = {
        "triples_factory": factory,
        "embedding_dim": entity.shape[1] // (2 if paired else 1),
        "random_seed": 0,
    }
    if job["kind"] == "TransE":
        options["scoring_fct_norm"] = int(job["reduction"][1])
    rival = getattr(pykeen_models, job["kind"])(**options).to(job["device"])
    if job["kind"] == "RotatE":
        relation = torch.cat([relation.cos(), relation.sin()], 1)
    for representations, weight in ((rival.entity_representations, entity), (rival.relation_representations, relation)):
        # PyKEEN interleaves real and imaginary parts.
        ours = torch.stack(weight.chunk(2, 1), -1).flatten(1) if paired else weight
        theirs = representations[0]._embeddings.weight.data
        theirs.copy_(ours.view_as(theirs))
    return rival


def serve() -> None:
    """A worker: for each [file of a job, number of triples] on stdin evaluates as many and prints MRR and peak memory,
    all as JSON.
    """
    from pykeen.evaluation import RankBasedEvaluator

    answers, sys.stdout = sys.stdout, sys.stderr
    rivals: dict[str, tuple[Any, dict[str, Any]]] = {}
    for line in sys.stdin:
        path, number = json.loads(line)
        if path not in rivals:
            rivals.clear()
            job = torch.load(path)
            rivals[path] = rival_model(job), job
        rival, job = rivals[path]
        torch.set_num_threads(job["threads"])
        options = {
            "mapped_triples": job["triples"][:number],
            "additional_filter_triples": job["known"],
            "use_tqdm": False,
        }
        evaluated = functools.partial(RankBasedEvaluator().evaluate, rival, **options)
        result, peak = harness.peak_memory(evaluated, torch.device(job["device"]))
        print(json.dumps({"mrr": result.get_metric(MRR), "peak_mb": peak}), file=answers, flush=True)
        # Freed memory goes back before the other worker takes its turn: PyKEEN chooses batches that fill what is there.
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


def job_of(
    model: models.KGEModel, kind: str, reduction: str, kg: KnowledgeGraph, triples: Tensor, device: torch.device
) -> dict[str, Any]:
    relation = model.hal_relation(model.relation.weight)
    known = [part for part in (kg.train, kg.valid, kg.test) if len(part)]
    job = {
        "kind": kind,
        "reduction": reduction,
        "entity": model.entity.weight,
        "relation": relation,
        "triples": triples,
        "known": known,
    }
    held = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in job.items()}
    return held | {"device": device.type, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("name", CASES)
def test_evaluation(race: harness.Race, name: str, workers: dict[str, Worker], tmp_path: Path) -> None:
    kg = harness.mkg_y()
    number, D = SIZES[race.size]
    triples = kg.test[:number]
    kind, reduction, demanded = CASES[name]
    model = getattr(models, kind)(kg.num_entities, kg.num_relations, D).to(race.device)
    model.reduction = reduction
    if kind == "TransE":
        model.normalize = False  # as PyKEEN's
    path = tmp_path / "job.pt"
    torch.save(job_of(model, kind, reduction, kg, triples, race.device), path)
    rivals = {provider: PyKEEN(worker, path, len(triples)) for provider, worker in workers.items()}
    if race.device.type == "cuda":
        rivals.popitem()
    adapted: list[Any] = []

    def adapter() -> Tensor:
        from dhns_fast.integrations.pykeen import evaluate as evaluate_pykeen

        if not adapted:
            adapted.append(rival_model(job_of(model, kind, reduction, kg, triples, race.device)))
        return torch.tensor(evaluate_pykeen(adapted[0], triples, known=(kg.train, kg.valid, kg.test))[MRR])

    equal = name != "RotatE"
    providers = {"ours": lambda: torch.tensor(evaluate(model, kg, triples=triples)[MRR])}
    if equal:
        providers["ours, PyKEEN's model"] = adapter
    rows = race(
        f"evaluate {kg.name} {name} {len(triples)} triples D{D}",
        providers | rivals,
        truth="ours",
        # Sums of another order break near ties another way: one of the first ranks that does moves the mean of few
        # triples by percents.
        tolerance=0.05 if equal else float("inf"),
        error=lambda result, truth: abs(result.item() - truth.item()) / truth.item(),
        work={"flop": 2 * harness.FLOPS[reduction] * len(triples) * kg.num_entities * D},
        min_rounds=2,
        demands=[harness.times_as_fast("PyKEEN", demanded), harness.peak_mb(64)]
        if (race.device.type, number) == ("cpu", None)
        else (),
    )
    for provider, row in rows.items():
        if row.p50 is not None:
            row.extra["triples/s"] = len(triples) / row.p50 * 1e3
            if provider in rivals:
                row.peak_mb = rivals[provider].peak_mb


@pytest.mark.parametrize("kind", ["DistMult", "ComplEx"])
def test_raw_tails(race: harness.Race, kind: str) -> None:
    """What PyTorch Geometric's `KGEModel.test` does: the ranks of tails among all entities, known answers left in, one
    query at a time.
    """
    kg = harness.mkg_y()
    D, triples = SIZES[race.size][1], kg.test[: 16 if race.size == "small" else 256].to(race.device)
    model = getattr(models, kind)(kg.num_entities, kg.num_relations, D).to(race.device)
    h, r, t = triples.unbind(1)

    def ours() -> Tensor:
        with torch.no_grad():
            query, scale = model.query(h, r, "tail")
            return (
                rank_all(query, model.entities("tail"), t, model.reduction, scale=scale)
                .realistic.double()
                .reciprocal()
                .mean()
            )

    def geometric() -> Tensor:
        from torch_geometric.nn import kge

        with contextlib.redirect_stdout(None):
            rival = getattr(kge, kind)(kg.num_entities, kg.num_relations, D // (1 if kind == "DistMult" else 2)).to(
                race.device
            )
        tables = ("node_emb", "rel_emb") if kind == "DistMult" else ("node_emb", "node_emb_im", "rel_emb", "rel_emb_im")
        weights = [
            part.detach()
            for table in (model.entity, model.relation)
            for part in table.weight.chunk(len(tables) // 2, 1)
        ]
        for name, weight in zip(tables, weights, strict=True):
            getattr(rival, name).weight.data.copy_(weight)
        return torch.tensor(rival.test(h, r, t, batch_size=kg.num_entities, log=False)[1])

    race(
        f"raw tail ranks {kg.name} {kind} {len(triples)} triples D{D}", {"ours": ours, "PyTorch Geometric": geometric}, truth="ours", min_rounds=2,
        # Its ties fall as argsort leaves them.
        tolerance=0.05, error=lambda result, truth: abs(result.item() - truth.item()) / truth.item(),
        work={"flop": 2.0 * len(triples) * kg.num_entities * D},
    )  # fmt: skip


def test_filter_index(race: harness.Race) -> None:
    """Known answers of both sides from triples in any order: time, and what the index holds."""
    n, E, R = {
        "small": (50_000, 15_000, 28),
        "reference": (10_000_000, 1_000_000, 500),
        "large": (50_000_000, 5_000_000, 500),
    }[race.size]
    h, t = torch.randint(E, (2, n), device=race.device)
    triples = torch.stack([h, torch.randint(R, (n,), device=race.device), t], 1)
    held: dict[str, CSRFilter] = {}

    def ours() -> tuple[Tensor, Tensor]:
        held["index"] = known = CSRFilter.from_triples(triples, E, R)
        return known.tail.groups()[1], known.head.groups()[1]

    def dictionaries() -> tuple[Tensor, Tensor]:
        tails: dict[tuple[int, int], set[int]] = {}
        heads: dict[tuple[int, int], set[int]] = {}
        for h, r, t in triples.tolist():
            tails.setdefault((h, r), set()).add(t)
            heads.setdefault((t, r), set()).add(h)
        counts = [torch.tensor([len(side[key]) for key in sorted(side)]) for side in (tails, heads)]
        return counts[0], counts[1]

    def unique_keys() -> tuple[Tensor, Tensor]:
        h, r, t = triples.unbind(1)
        known = ((h * R + r) * E + t).unique()
        tails, heads = (key.unique(return_counts=True)[1] for key in (known // E, known % E * R + known // E % R))
        return tails, heads

    providers = {"ours": ours, "torch.unique of keys": unique_keys}
    if race.size == "small":
        providers["dictionaries of sets"] = dictionaries
    rows = race(
        f"CSRFilter {n} triples E{E} R{R}",
        providers,
        truth="torch.unique of keys",
        tolerance=0.0,
        work={"byte": 24.0 * n},
        min_rounds=2,
    )
    index = held["index"]
    state = index.tail.packed.nbytes + index.head.packed.nbytes
    rows["ours"].extra |= {"state bytes/triple": state / n, "M triples/s": n / (rows["ours"].p50 or 1) / 1e3}


if __name__ == "__main__":
    serve()
