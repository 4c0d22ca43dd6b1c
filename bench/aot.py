"""Compiles every kernel ahead of time, no GPU needed, and says what each takes: `python bench/aot.py`, into bench/results/aot.json.

Triton: a kernel module joins by a function `compile_cases()` that returns `dhns_fast.kernels.CompileCase`s. CUDA C++: every .cu file of csrc/ with
all its instances, where nvcc is. Exit code 1 if a kernel spills, asks for more shared memory than the chip has, or uses other matrix
instructions than it should. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dhns_fast.kernels
import torch
import triton
from dhns_fast.kernels import CompileCase
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from dhns_fast.ops import build

RESULT = Path(__file__).resolve().parent / "results" / "aot.json"
MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")


@dataclass(frozen=True)
class Chip:
    """The matrix instruction that a product should become, and bytes of shared memory that a block may have (CUDA C++ Programming Guide)."""

    matrix: str
    shared: int


CHIPS = {80: Chip("mma.sync", 163 << 10), 90: Chip("wgmma.mma_async", 227 << 10), 100: Chip("tcgen05.mma", 227 << 10)}


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one architecture (compute capability times ten); spills in bytes, shared memory in bytes a block (of CUDA C++
    kernels only what is declared with a size, not what the launch adds)."""

    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]
    problem: str


def cases() -> Iterator[CompileCase]:
    """The cases of all kernel modules."""
    for module in pkgutil.iter_modules(dhns_fast.kernels.__path__):
        collect = getattr(importlib.import_module(f"dhns_fast.kernels.{module.name}"), "compile_cases", None)
        yield from collect() if collect else ()


def compile_case(case: CompileCase, arch: int) -> Report:
    """Compiles as a launch with aligned pointers and dimensions does, and reads ptxas's account."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants: dict[Any, Any] = {(names.index(name),): value for name, value in case.constants.items()}
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*") or name in case.aligned
    }
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(ASTSource(case.kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    matrix = tuple(sorted(set(MATRIX.findall(ptx))))
    wanted = CHIPS[arch].matrix if case.matrix else None
    return _report(case.name, arch, _ptxas(ptx, arch), compiled.metadata.shared, matrix, wanted)


def _report(kernel: str, arch: int, account: str, shared: int, matrix: tuple[str, ...], wanted: str | None) -> Report:
    """What ptxas says of a kernel (`-v`), and what is wrong with it."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", account)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", account)))
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    if shared > CHIPS[arch].shared:
        problems.append(f"shared memory {shared} of {CHIPS[arch].shared} bytes")
    if matrix != (() if wanted is None else (wanted,)):
        problems.append(f"matrix instructions {', '.join(matrix) or 'none'}, expected {wanted or 'none'}")
    return Report(kernel, arch, registers, spills, shared, matrix, "; ".join(problems))


def compile_cuda(source: Path, archs: Sequence[int]) -> list[Report]:
    """Every kernel of a .cu file, compiled with the flags of the extension.

    Raises:
        subprocess.CalledProcessError: it does not compile; stderr says why.
    """
    nvcc = build._nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        include = ["-isystem", str(Path(torch.__file__).parent / "include"), f"-I{build.source_folder()}"]
        target = [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs), "-Xptxas", "-v"]
        flags = [*build.NVCC_FLAGS, "-DUSE_CUDA", *build.STABLE_ABI, *include, *target]
        command = [nvcc, *flags, "-fatbin", "-o", str(Path(folder) / "out.fatbin"), str(source)]
        account = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    _, *parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", account)
    reports = []
    for name, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", text)))
        # No CUDA C++ kernel here has a product.
        reports.append(_report(_readable(name), int(arch), text, shared, (), None))
    return sorted(reports, key=lambda report: (report.arch, report.kernel))


def _readable(symbol: str) -> str:
    """hal_embeddings_kernel<RotatE, float, float> for the mangled name, where binutils are at hand."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    return re.sub(r"\b\w+::", "", name)


def _ptxas(ptx: str, arch: int) -> str:
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def reports(archs: Sequence[int], sources: Sequence[Path], processes: int | None = None) -> list[Report]:
    """All Triton kernels, and the CUDA kernels of `sources`; by default a process a core."""
    jobs = [(number, arch) for number in range(sum(1 for _ in cases())) for arch in archs]
    # Not forked: threads of torch do not survive that.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        of_cuda = [pool.submit(compile_cuda, source, [arch]) for source in sources for arch in archs]
        of_triton = list(pool.map(_compile_numbered, *zip(*jobs, strict=True), chunksize=4))
        return of_triton + [report for future in of_cuda for report in future.result()]


def _compile_numbered(number: int, arch: int) -> Report:
    return compile_case(next(itertools.islice(cases(), number, None)), arch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=tuple(CHIPS), choices=tuple(CHIPS), help="compute capabilities times ten")
    parser.add_argument("--cuda", type=Path, nargs="*", default=None, help=".cu files; by default all of csrc/ where nvcc is")
    parser.add_argument("--jobs", type=int, default=None, help="processes; by default one a core")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args(arguments)
    nvcc = build._nvcc()
    sources = (sorted(build.source_folder().glob("*.cu")) if nvcc else []) if options.cuda is None else options.cuda
    found = reports(options.arch, sources, options.jobs)
    release = re.search(r"release (\S+),", build._version(nvcc)) if nvcc and sources else None
    content = {"triton": triton.__version__, "nvcc": release and release[1], "kernels": [asdict(report) for report in found]}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for r in found:
        print(f"{r.kernel:56s} sm_{r.arch:<4d} {r.registers:4d} registers {r.shared:7d} B shared  {', '.join(r.matrix):16s} {r.problem}")
    return int(any(report.problem for report in found))


if __name__ == "__main__":
    sys.exit(main())
