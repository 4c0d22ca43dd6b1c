"""The registered operators: schema, autograd, compilation; what the C++ implementation promises beyond agreeing with
the oracle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dhns_fast.data import Ragged
from dhns_fast.ops import build, score
from dhns_fast.reference import scoring as reference
from dhns_fast.scoring import logsumexp_all, one_vs_all_loss, rank_all, score_all, topk_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (reason := build.why_not("cpu")):
        pytest.skip(reason)
    return request.param


def test_operators_pass_opcheck(backend: str) -> None:
    query, entity, scale = torch.randn(3, 8), torch.randn(70, 8), torch.rand(3, 8) + 0.5
    target, offsets, ids = torch.tensor([0, 69, 5]), torch.tensor([0, 2, 2, 3]), torch.tensor([0, 64, 5])
    at_target = score.target_scores(query, entity, target, None, "l1", backend)
    check, operators = torch.library.opcheck, torch.ops.dhns_fast
    check(operators.target_scores.default, (query, entity, target, scale, "l2", backend))
    check(operators.rank_counts.default, (query, entity, target, at_target, offsets, ids, None, "l1", backend))
    check(operators.topk_all.default, (query, entity, 4, offsets, ids, scale, "dot", backend))
    tables = [table.requires_grad_() for table in (query, entity, scale)]
    check(operators.score_all.default, (*tables, "l1", backend))
    check(operators.logsumexp_all.default, (*tables, "complex_l1", backend))
    for keep in (False, True):
        check(operators.one_vs_all.default, (*tables[:2], target, tables[2], "l2", keep, backend))


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_losses_compile_without_a_break(backend: str, reduction: str) -> None:
    entity, target = torch.randn(70, 8), torch.tensor([0, 69, 5])

    def loss(query: torch.Tensor, entity: torch.Tensor) -> torch.Tensor:
        return one_vs_all_loss(2 * query, entity, target, reduction, backend=backend)

    eager = torch.randn(3, 8).requires_grad_()
    compiled = eager.detach().clone().requires_grad_()
    expected = loss(eager, entity)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, entity)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=0, atol=0)


def test_rank_counts_compile_without_a_break(backend: str) -> None:
    query, entity, target = torch.randn(3, 8), torch.randn(70, 8), torch.tensor([0, 69, 5])
    offsets, ids = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)

    def counts(query: torch.Tensor) -> torch.Tensor:
        at_target = torch.ops.dhns_fast.target_scores(query, entity, target, None, "l2", backend)
        return torch.ops.dhns_fast.rank_counts(query, entity, target, at_target, offsets, ids, None, "l2", backend)

    # Operators alone: arithmetic of torch's own beside them would be compiled as C++, and be most of this test's time.
    above = torch.compile(counts, fullgraph=True)(query)[0]
    assert torch.equal(1 + above, rank_all(query, entity, target, "l2").optimistic)


def test_ranks_compile_without_a_break() -> None:
    query, entity, target = torch.randn(3, 8), torch.randn(70, 8), torch.tensor([0, 69, 5])
    known = Ragged(torch.tensor([0, 2, 2, 3]), torch.tensor([0, 7, 5]))
    compiled = torch.compile(rank_all, fullgraph=True, backend="aot_eager")
    for answers in (None, known):
        found, expected = (f(query, entity, target, "l1", answers) for f in (compiled, rank_all))
        assert torch.equal(found.greater, expected.greater)
        assert torch.equal(found.equal, expected.equal)


def test_the_best_have_the_scores_of_all(backend: str) -> None:
    """Bit by bit, through the root of squared distances."""
    query, entity = torch.randn(5, 34), torch.randn(300, 34)
    scores, ids = topk_all(query, entity, 200, "l2", backend=backend)
    assert torch.equal(scores, score_all(query, entity, "l2", backend=backend).gather(1, ids))


def test_moduli_keep_their_stated_error() -> None:
    """The root by an estimate and one Newton step: relative error below 4e-7, and 1.1e-19 for what is added under the
    root.
    """
    if reason := build.why_not("cpu"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (torch.rand(200, 1, generator=generator) * 34 - 17)
    entity = torch.randn(200, 2, generator=generator) * size
    found = score_all(torch.zeros(1, 2), entity, "complex_l1", backend="cpu")[0].double()
    expected = reference.score_all(torch.zeros(1, 2).double(), entity.double(), "complex_l1")[0]
    torch.testing.assert_close(found, expected, rtol=4e-7, atol=1.1e-19)
    assert score_all(torch.zeros(1, 2), torch.zeros(1, 2), "complex_l1", backend="cpu").abs().item() < 2e-19


def test_logsumexp_keeps_its_accuracy_over_a_wide_spread(backend: str) -> None:
    scores = torch.linspace(-300, 88, 5000)
    scores[7] = -torch.inf
    found = logsumexp_all(torch.ones(1, 1), scores[:, None], backend=backend)
    torch.testing.assert_close(found.double(), scores.double().logsumexp(0, keepdim=True), rtol=3e-7, atol=0)
    scores[9] = torch.nan
    assert logsumexp_all(torch.ones(1, 1), scores[:, None], backend=backend).isnan().all()


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_results_do_not_depend_on_the_number_of_threads(backend: str, reduction: str) -> None:
    # Where bits must agree, more than one block of every kind.
    rows, entities = (300, 3000) if backend == "cpu" else (70, 900)
    query, scale = torch.randn(rows, 34).requires_grad_(), torch.randn(rows, 34).requires_grad_()
    entity = torch.randn(entities, 34).requires_grad_()
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 3, 4) if backend == "cpu" else (1, 2):
            torch.set_num_threads(number)
            out = logsumexp_all(query, entity, reduction, scale=scale, backend=backend)
            runs.append((out, *torch.autograd.grad(out.sum(), (query, entity, scale))))
            out = logsumexp_all(query, entity, reduction, backend=backend)
            runs[-1] += (out, *torch.autograd.grad(out.sum(), (query, entity)))
    finally:
        torch.set_num_threads(threads)
    # Library GEMMs and reductions share their sums out among the threads; the C++ kernels do not.
    bound = 0 if backend == "cpu" else 1e-5
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=bound, atol=bound)


MEMORY = """
import resource, torch
from dhns_fast.scoring import logsumexp_all, one_vs_all_loss, rank_all, topk_all
torch.set_num_threads(1)
query, entity, target = torch.randn(1000, 32), torch.randn(40000, 32), torch.arange(1000)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
rank_all(query[:2], entity[:100], target[:2], "{reduction}")
before = peak()
rank_all(query, entity, target, "{reduction}")
logsumexp_all(query[:100], entity, "{reduction}")
topk_all(query[:200], entity, 1024, "{reduction}")
one_vs_all_loss(query[:250].requires_grad_(), entity.requires_grad_(), target[:250], "{reduction}").backward()
print(peak() - before)
"""


@pytest.mark.parametrize(("backend", "reduction"), [("cpu", "complex_l1"), ("eager", "dot")])
def test_a_call_takes_less_than_64_mb(backend: str, reduction: str) -> None:
    """The matrix of these ranks would take 160 MB."""
    if backend == "cpu" and (reason := build.why_not("cpu")):
        pytest.skip(reason)
    environment = {**os.environ, "DHNS_FAST_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    code = MEMORY.format(reduction=reduction)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64
