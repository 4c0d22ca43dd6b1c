"""Compiles every kernel ahead of time, no GPU needed, and says what each takes: `python bench/aot.py [--arch 80 90 100] [--json]`.

A kernel module joins by a function `compile_cases()` that returns `dhns_fast.kernels.CompileCase`s. Exit code 1 if a kernel spills registers
or uses matrix units where it should not (or does not where it should). Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dhns_fast.kernels
import triton
from dhns_fast.kernels import CompileCase
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one architecture (compute capability times ten); spills in bytes, shared memory in bytes."""

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
    account = _ptxas(ptx, arch)
    registers = max(map(int, re.findall(r"Used (\d+) registers", account)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", account)))
    matrix = tuple(sorted(set(MATRIX.findall(ptx))))
    problem = f"spills {spills} bytes" if spills else ""
    if bool(matrix) != case.matrix:
        problem = f"{'no' if case.matrix else 'unexpected'} matrix instructions"
    return Report(case.name, arch, registers, spills, compiled.metadata.shared, matrix, problem)


def _ptxas(ptx: str, arch: int) -> str:
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities times ten")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args(arguments)
    reports = [compile_case(case, arch) for case in cases() for arch in options.arch]
    if options.json:
        print(json.dumps([asdict(report) for report in reports]))
    else:
        for r in reports:
            print(
                f"{r.kernel:44s} sm_{r.arch:<4d} {r.registers:4d} registers {r.shared:7d} B shared  {', '.join(r.matrix):16s} {r.problem}"
            )
    return int(any(report.problem for report in reports))


if __name__ == "__main__":
    sys.exit(main())
