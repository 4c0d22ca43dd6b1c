"""The CUDA kernels of the losses where there is no GPU: they give the oracle's values on ordinary threads."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hal import MODELS, assert_agrees, case, run
from torch import Tensor

from dhns_fast import loss
from dhns_fast.ops import build, hal
from dhns_fast.reference import loss as reference


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    source = Path(__file__).with_name("emulated_block.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{build.source_folder()}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def addresses(*tensors: Tensor | None) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def emulate(
    library: ctypes.CDLL, kept: int, interaction: str, p: int, normalize: bool, **given: Any
) -> dict[str, Tensor]:
    """Loss and gradients of three times it, and "barriers": how often the threads of a block met for one row."""
    barriers = torch.tensor(0.0)

    def compiled(a: hal.EmbeddingInputs) -> tuple[Tensor, ...]:
        levels, modalities, batch, dim = a.neg_head.shape
        grads = [torch.full_like(x, torch.nan) if a.gradients else None for x in (a.head, a.relation, a.tail)]
        inputs = (a.head, a.relation, a.tail, a.neg_head, a.neg_tail, a.margin, a.weight, a.attention)
        blocks, columns = -(-batch // 3), 1 + levels + (0 if a.attention is None else dim)
        partial = torch.full((blocks, columns), torch.nan, dtype=torch.float64)
        sizes = (ctypes.c_long * 8)(
            hal.CODES[interaction, p], batch, dim, a.relation.shape[1], levels, modalities, normalize, columns
        )
        kernel = library.hal_embeddings_double if a.head.dtype == torch.float64 else library.hal_embeddings_float
        kernel.restype = ctypes.c_long
        pointers = addresses(*inputs, a.head_present, a.tail_present, *grads)
        address, count = ctypes.c_void_p(partial.data_ptr()), ctypes.c_long(blocks)
        scalars = (ctypes.c_double * 2)(a.mu, a.gamma)
        barriers.fill_(kernel(sizes, scalars, pointers, address, count, ctypes.c_long(kept)) / batch)
        total = partial.sum(0)
        return total[0], *grads, total[1 + levels :], total[1 : 1 + levels]  # type: ignore[return-value]

    arguments = {
        name: x.detach().contiguous() if isinstance(x, Tensor) else x for name, x in given.items() if name != "present"
    }
    masks = given.get("present", (None, None))
    arguments = {"gamma": 0.0, "attention": None, "gradients": True, **arguments}
    found = hal.in_units(hal.EmbeddingInputs(
        interaction=interaction, p=p, normalize=normalize, head_present=masks[0], tail_present=masks[1], **arguments
    ), compiled)  # fmt: skip
    names = ("loss", "head", "relation", "tail", "attention", "margin")
    result = {name: x if name == "loss" else 3 * x for name, x in zip(names, found, strict=True) if x is not None}
    if arguments["attention"] is None:
        del result["attention"]
    return {**result, "barriers": barriers}


@pytest.mark.parametrize("variant", ["mean", "fused", "masked"])
@pytest.mark.parametrize(("interaction", "p", "normalize"), MODELS, ids=[f"{i}{p}{'n' * n}" for i, p, n in MODELS])
def test_embeddings_agree_with_the_oracle(
    library: ctypes.CDLL, interaction: str, p: int, normalize: bool, variant: str
) -> None:
    # Ragged and whole units of 16 bytes; all vectors in shared memory, some, none; one warp and several.
    for B, D, M, kept in ((1, 2, 1, 99), (7, 38, 3, 0), (5, 16, 2, 7), (4, 40, 3, 99)):
        arguments = case(interaction, B, D, M, variant != "mean", torch.float64, masked=variant == "masked")
        options = {"p": p, "normalize": normalize}
        want = run(reference.hal_from_embeddings, {**arguments, **options})
        got = emulate(library, kept, **{**arguments, **options})
        # Scores; with attention logits and slopes; with a norm one round each way.
        assert got.pop("barriers") == 1 + 2 * (variant != "mean") + 2 * normalize <= 8
        assert_agrees(got, want, 1e-12)
        alone = emulate(library, kept, **{**arguments, **options, "gradients": False})
        assert torch.equal(alone["loss"], got["loss"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_is_as_on_the_cpu(library: ctypes.CDLL, fused: bool, bad: float) -> None:
    for interaction, p, normalize in MODELS:
        for name in ("head", "relation", "tail", "neg_head", "neg_tail"):
            a = case(interaction, 3, 16, 2, fused, torch.float32)
            with torch.no_grad():
                a[name].view(-1)[-7] = bad
            got = emulate(library, 99, **{**a, "p": p, "normalize": normalize})
            values = {key: x.detach() if isinstance(x, Tensor) else x for key, x in a.items()}
            options = {"attention": None, **values, "p": p, "normalize": normalize, "gradients": True}
            want = hal.hal_embeddings(
                *hal.EmbeddingInputs(head_present=None, tail_present=None, backend="cpu", **options)
            )
            for key, x in zip(("loss", "head", "relation", "tail", "attention", "margin"), want, strict=True):
                if key in got:
                    assert_same_kind(
                        got[key].float() / (1 if key == "loss" else 3), x, f"{interaction}{p} {name} {key}"
                    )


def assert_same_kind(got: Tensor, want: Tensor, where: str) -> None:
    """NaN and infinities in the same places, and what is of usual size the same."""
    kinds = [torch.where(x.isfinite() & (x.abs() > 1e4), 1e4, x) for x in (got, want)]
    torch.testing.assert_close(*kinds, rtol=2e-4, atol=1e-6, equal_nan=True, msg=lambda m: f"{where}: {m}")


def test_python_knows_the_size_of_the_tables(library: ctypes.CDLL) -> None:
    for sizes in itertools.product((1, 5), (1, 3), (False, True), (False, True), (1, 8)):
        assert hal.table_numbers(*sizes) == library.hal_table_numbers(*sizes)


@pytest.mark.parametrize(("B", "L", "K", "rows", "warps"), [(1, 1, 1, 4, 1), (5, 3, 3, 2, 2), (23, 5, 3, 8, 1)])
def test_scores_agree_with_the_oracle(library: ctypes.CDLL, B: int, L: int, K: int, rows: int, warps: int) -> None:
    g = torch.Generator().manual_seed(B)
    positive, negative = (
        torch.randn(*shape, generator=g, dtype=torch.float64).mul_(5).requires_grad_() for shape in ((B,), (L, K, B))
    )
    margin = torch.randn(L, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.rand(L, generator=g, dtype=torch.float64) * (torch.arange(L) != 1)
    loss = reference.hardness_adaptive_loss(positive, negative, margin, weight, 0.3)
    want = torch.autograd.grad(loss, (positive, negative, margin))
    inputs = [x.detach() for x in (positive, negative, margin, weight)]
    grads = [torch.full_like(x, torch.nan) for x in inputs[:2]]
    partial = torch.full((-(-B // rows), 1 + L), torch.nan, dtype=torch.float64)
    sizes = (ctypes.c_long * 3)(B, L, K)
    library.hal_scores(
        sizes, ctypes.c_double(0.3), addresses(*inputs, *grads, partial), ctypes.c_long(len(partial)), warps
    )
    total = partial.sum(0)
    for a, b in zip((total[0], *grads, total[1:]), (loss.detach(), *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("B", "N", "temperature"), [(1, 1, 0.5), (5, 7, 0.0), (9, 130, 2.0)])
def test_self_adversarial_agrees_with_the_oracle(library: ctypes.CDLL, B: int, N: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(N)
    positive, negative = (
        torch.randn(*shape, generator=g, dtype=torch.float64).mul_(5).requires_grad_() for shape in ((B,), (B, N))
    )
    loss = reference.self_adversarial_loss(positive, negative, temperature)
    want = torch.autograd.grad(loss, (positive, negative))
    inputs = [x.detach() for x in (positive, negative)]
    grads, partial = [torch.full_like(x, torch.nan) for x in inputs], torch.full((B,), torch.nan, dtype=torch.float64)
    library.self_adversarial(
        (ctypes.c_long * 2)(B, N), ctypes.c_double(temperature), addresses(*inputs, *grads, partial)
    )
    for a, b in zip((partial.sum(), *grads), (loss.detach(), *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def to_gpu(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(move(y) for y in x)
        return x.to("cuda", dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x

    return {name: move(x) for name, x in arguments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["mean", "fused", "masked"])
@pytest.mark.parametrize(("interaction", "p", "normalize"), MODELS, ids=[f"{i}{p}{'n' * n}" for i, p, n in MODELS])
def test_embeddings_on_a_gpu(interaction: str, p: int, normalize: bool, variant: str) -> None:
    options = {"p": p, "normalize": normalize}
    # Gradients go back in the type of their argument: 8 bits of bfloat16.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 4e-3)):
        # A difference within rounding of 0 has either sign, and its slope by L1 with it: among a million of them some
        # are, among 20 000 hardly one.
        many = 2 if interaction == "transe" and p == 1 else 50
        for B, D, M in ((1, 2, 1), (17, 38, 3), (many, 1024, 2)):
            arguments = to_gpu(case(interaction, B, D, M, variant != "mean", dtype, masked=variant == "masked"), dtype)
            # The truth is made on the GPU too: on the host it took the minute that all of these tests may take.
            exact = to_gpu(arguments, torch.float64)
            got = run(loss.hal_from_embeddings, {**arguments, **options, "backend": "cuda"})
            assert_agrees(got, run(reference.hal_from_embeddings, {**exact, **options}), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_on_a_gpu(dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, device="cuda").mul_(5)  # noqa: E731
    weight = torch.tensor([0.5, 0.0, 1.0, 0.2], dtype=torch.float64, device="cuda")
    margin = torch.tensor([0.1, 9.0, -0.3, 0.0], dtype=torch.float64, device="cuda")
    for function, reference_function, inputs, rest in (
        (
            loss.hardness_adaptive_loss,
            reference.hardness_adaptive_loss,
            (draw(3001), draw(4, 3, 3001), margin),
            (weight, 0.3),
        ),
        (loss.self_adversarial_loss, reference.self_adversarial_loss, (draw(3001), draw(3001, 130)), (0.7,)),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        value, want = function(*leaves, *rest, backend="cuda"), reference_function(*exact, *rest)  # type: ignore[operator]
        results = zip(
            (value, *torch.autograd.grad(value, leaves)), (want, *torch.autograd.grad(want, exact)), strict=True
        )
        for a, b in results:
            assert (a.detach().double() - b.detach()).abs().max() <= (
                1e-12 if dtype == torch.float64 else 1e-5
            ) * b.abs().max()


@pytest.mark.gpu
def test_a_graph_and_another_stream_give_the_same_bits() -> None:
    arguments = to_gpu({**case("rotate", 33, 64, 3, True, torch.float32), "backend": "cuda"}, torch.float32)
    want = loss.hal_from_embeddings(**arguments)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = loss.hal_from_embeddings(**arguments)
    torch.cuda.synchronize()
    assert torch.equal(other, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss.hal_from_embeddings(**arguments)
    graph.replay()
    assert torch.equal(captured, want)
    compiled = torch.compile(loss.hal_from_embeddings, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(compiled(**arguments), want)


def test_the_operator_takes_no_more_than_the_launch_bound() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "hal.cu").read_text()
    assert f"kRowThreads = {hal.MOST_THREADS} / I::kParts" in source
    for interaction in ("distmult", "complex"):
        for dim, fits in ((2048, True), (2050, False)):
            x = torch.empty(1, dim, device="meta")
            generated = torch.empty(1, 1, 1, dim, device="meta")
            inputs = hal.EmbeddingInputs(**dict.fromkeys(hal.EmbeddingInputs._fields))._replace(
                interaction=interaction, head=x, neg_head=generated, normalize=False
            )
            assert (not list(hal._not_cuda(inputs))) == fits
