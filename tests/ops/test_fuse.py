"""Fusion of modalities by attention against the oracle in float64: value, every gradient, what is absent, and what must
be refused.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.ops import backend as backends
from dhns_fast.ops import fusion, memory
from dhns_fast.ops.fusion import fuse
from dhns_fast.reference import loss as reference

REASON = backends.CPU.why_not(torch.device("cpu"))
BACKENDS = ["eager", *([] if REASON else ["cpu"])]
# The last but one are gradients of more than 4 MB, which go past the caches: where rows begin with a vector, and not.
SHAPES = [(1, 1, 1), (2, 5, 3), (3, 70, 38), (4, 129, 130), (3, 3000, 128), (3, 3000, 130), (2, 0, 4)]


def case(M: int, n: int, D: int, dtype: torch.dtype = torch.float64, lacking: bool = True) -> tuple[Any, ...]:
    """Embeddings, attention and a mask; in float64 the numbers that float32 has, rounded."""
    g = torch.Generator().manual_seed(M + n + D)
    embeddings, attention = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((M, n, D), (D,)))
    present = torch.rand(M, n, generator=g) < 0.7 if lacking else None
    return *(x.float().to(dtype).requires_grad_() for x in (embeddings, attention)), present


def joined(embeddings: Tensor, attention: Tensor, present: Tensor | None, backend: str = "") -> Tensor:
    """The operator, of what the oracle takes."""
    structure, *views = embeddings.unbind()
    return fuse(structure, views, attention, present, backend)


def run(function: Any, embeddings: Tensor, attention: Tensor, present: Tensor | None, *more: Any) -> list[Tensor]:
    joint = function(embeddings, attention, present, *more)
    cotangent = torch.randn(joint.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [joint.detach(), *torch.autograd.grad(joint, (embeddings, attention), cotangent.to(joint.dtype))]


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "n", "D"), SHAPES)
def test_agrees_with_the_oracle(
    M: int, n: int, D: int, backend: str, lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(reference.fuse, *case(M, n, D, lacking=lacking))
    empty, new_empty = memory.empty, Tensor.new_empty
    monkeypatch.setattr(memory, "empty", lambda *a: empty(*a).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(math.nan))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = run(joined, *case(M, n, D, dtype, lacking), backend)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            assert a.dtype == dtype
            assert not a.numel() or (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_absent_takes_no_part(backend: str) -> None:
    embeddings, attention, _ = case(3, 6, 20, torch.float32)
    present = torch.ones(3, 6, dtype=torch.bool)
    present[1:, 2], present[:, 4] = False, False
    spoilt = embeddings.detach().masked_fill(~present[..., None], math.nan).requires_grad_()
    joint, by_embeddings, by_attention = run(joined, spoilt, attention, present, backend)
    torch.testing.assert_close(joint[2], embeddings[0, 2], rtol=1e-6, atol=0)
    assert joint[4].eq(0).all()
    assert by_embeddings[~present].eq(0).all()
    assert all(x.isfinite().all() for x in (joint, by_embeddings, by_attention))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e20, 1e-40, -0.0])
def test_special_values_are_the_oracles(value: float, backend: str) -> None:
    embeddings, attention, present = case(3, 5, 18, torch.float32, lacking=False)
    with torch.no_grad():
        embeddings[1, 3, -1] = value
    want = reference.fuse(embeddings.double(), attention.double(), present).detach().float()
    joint = joined(embeddings, attention, present, backend).detach()
    torch.testing.assert_close(joint, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    embeddings, attention, present = case(3, 4, 5)
    assert torch.autograd.gradcheck(lambda e, w: joined(e, w, present, backend), (embeddings, attention))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_eager(dtype: torch.dtype) -> None:
    embeddings, attention, present = case(2, 5, 8, dtype)
    want = reference.fuse(embeddings.double(), attention.double(), present)
    assert (joined(embeddings, attention, present).double() - want).abs().max() < 0.05


@pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
def test_threads_do_not_change_the_result() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(joined, *case(3, 777, 64, torch.float32), "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(REASON is not None, reason=f"no compiled operators: {REASON}")
def test_equal_rows_are_fused_alike_on_cpu() -> None:
    embeddings, attention, present = case(3, 200, 37, torch.float32, lacking=False)
    alike = embeddings[:, :1].expand(3, 200, 37).contiguous()
    joint = joined(alike, attention, present, "cpu")
    assert torch.equal(joint, joint[:1].expand(200, 37))


def test_operator_contract() -> None:
    embeddings, attention, present = case(3, 5, 7, torch.float32)
    structure, *views = (x.detach().requires_grad_() for x in embeddings)
    torch.library.opcheck(torch.ops.dhns_fast.fuse.default, (structure, views, attention, present))
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    found, wanted = (run(f, embeddings, attention, present) for f in (compiled, joined))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_structure_without_views_is_itself() -> None:
    structure, attention = torch.randn(4, 3), torch.randn(3)
    for backend in BACKENDS:
        torch.testing.assert_close(fuse(structure, [], attention, None, backend), structure)


GIVEN: dict[str, Any] = {
    "structure": torch.zeros(5, 3),
    "views": [torch.zeros(5, 3)],
    "attention": torch.zeros(3),
    "present": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": torch.zeros(3)}, r"structure: got shape \[3\]; accepted: \[n, D\]"),
        ({"structure": torch.zeros(5, 3).long()}, "structure: got torch.int64"),
        ({"views": [torch.zeros(4, 3)]}, r"views\[0\]: got shape \[4, 3\]; accepted: \[n = 5, D = 3\]"),
        (
            {"views": [torch.zeros(5, 3).double()]},
            r"views\[0\]: got torch.float64 on cpu; accepted: torch.float32 on cpu",
        ),
        ({"attention": torch.zeros(4)}, r"attention: got shape \[4\]; accepted: \[D = 3\]"),
        ({"attention": torch.zeros(3).double()}, "attention: got torch.float64 on cpu; accepted: torch.float32 on cpu"),
        ({"present": torch.ones(2, 4).bool()}, r"present: got shape \[2, 4\]; accepted: \[2, n = 5\]"),
        ({"present": torch.ones(2, 5)}, r"present: got torch.float32 \[2, 5\]; accepted: torch.bool"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fuse(**GIVEN | change)
    with pytest.raises(InputError, match=message):
        fusion.fuse_gradient(**{"grad": torch.zeros(5, 3)} | GIVEN | change)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"grad: got shape \[4, 3\]; accepted: \[n = 5, D = 3\]"):
        fusion.fuse_gradient(torch.zeros(4, 3), **GIVEN)
