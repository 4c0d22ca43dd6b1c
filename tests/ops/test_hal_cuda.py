"""The CUDA kernel of the losses where there is no GPU: it gives the oracle's values on ordinary threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hal import MODELS, assert_agrees, case, run
from torch import Tensor

from dhns_fast.ops import build, hal
from dhns_fast.reference import loss as reference

Native = Callable[..., None]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Native:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    source = Path(__file__).with_name("emulated_block.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f"-I{build.source_folder()}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).hal_embeddings


def emulate(kernel: Native, threads: int, interaction: str, p: int, normalize: bool, **a: Any) -> dict[str, Tensor]:
    levels, modalities, batch, dim = a["neg_head"].shape
    inputs = [a[k] for k in ("head", "relation", "tail", "neg_head", "neg_tail", "margin", "weight")]
    masks = a.get("present", (None, None))
    grads = [torch.full_like(x, torch.nan) for x in inputs[:3]]
    tensors = [*inputs, a.get("attention"), *masks, *grads]
    tensors = [None if x is None else x.detach().contiguous() for x in tensors]
    pointers = (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])
    blocks = -(-batch // 3)
    partial = torch.full((blocks, 1 + levels + dim), torch.nan, dtype=torch.float64)
    sizes = (ctypes.c_long * 6)(batch, dim, inputs[1].shape[1], levels, modalities, normalize)
    scalars = (ctypes.c_double * 2)(a["mu"], a["gamma"])
    address = ctypes.c_void_p(partial.data_ptr())
    kernel(hal._CODES[interaction, p], sizes, scalars, pointers, address, ctypes.c_long(blocks), threads)
    total = partial.sum(0)
    result = {"loss": total[0], "head": 3 * grads[0], "relation": 3 * grads[1], "tail": 3 * grads[2], "margin": 3 * total[1 : 1 + levels]}
    return {**result, **({"attention": 3 * total[1 + levels :]} if "attention" in a else {})}


@pytest.mark.parametrize("variant", ["mean", "fused", "masked"])
@pytest.mark.parametrize(("interaction", "p", "normalize"), MODELS, ids=[f"{i}{p}{'n' * n}" for i, p, n in MODELS])
def test_agrees_with_the_oracle(kernel: Native, interaction: str, p: int, normalize: bool, variant: str) -> None:
    for B, D, M, threads in ((1, 2, 1, 1), (5, 6, 2, 4), (7, 38, 3, 3)):
        arguments = case(interaction, B, D, M, variant != "mean", torch.float64, masked=variant == "masked")
        options = {"p": p, "normalize": normalize}
        want = run(reference.hal_from_embeddings, {**arguments, **options})
        assert_agrees(emulate(kernel, threads, **{**arguments, **options}), want, 1e-12)
