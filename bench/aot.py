"""Compiles every kernel ahead of time, no GPU needed, and says what each takes: `python bench/aot.py`, into
bench/results/aot.json.

Triton: a kernel module joins by a function `compile_cases()` that returns `dhns_fast.kernels.CompileCase`s. CUDA C++:
every .cu file of csrc/ with all its instances, where nvcc is. Of the machine code it reads the loops: products must get
their operands by bulk copies on sm_90 and load nothing else there, the hot loops of distances may issue so many
instructions for each dimension of a pair, and the threads of hal_embeddings may meet so often a row. Exit code 1 if a
kernel spills, asks for more shared memory than the chip has, or does otherwise than it should. Kernels whose sources
have not changed since the last report are taken from it; --all compiles them again. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
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
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dhns_fast.kernels
import torch
import triton
from dhns_fast.kernels import CompileCase
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from dhns_fast.catalogue import REDUCTIONS
from dhns_fast.ops import build

RESULT = Path(__file__).resolve().parent / "results" / "aot.json"
MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")
# Instructions that the hot loop of a distance may issue for one dimension of a query and an entity: DESIGN's floors are
# 2, 2 and 3.
MOST = {"l1": 2.6, "l2": 2.6, "complex_l1": 4.6}
# Barriers that a block of hal_embeddings may meet at for one row.
MOST_BARRIERS = 8
INSTANCE = re.compile(r"distance_sweep_kernel<(\w+), (\d)L?l?, \dL?l?, (true|false)>")
_REDUCTIONS = {str(code): name for code, name in enumerate(REDUCTIONS) if name != "dot"}


@dataclass(frozen=True)
class Chip:
    """The matrix instruction that a product should become, and bytes of shared memory that a block may have (CUDA C++
    Programming Guide).
    """

    matrix: str
    shared: int


CHIPS = {80: Chip("mma.sync", 163 << 10), 90: Chip("wgmma.mma_async", 227 << 10), 100: Chip("tcgen05.mma", 227 << 10)}


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one architecture (compute capability times ten); spills in bytes, shared memory in bytes
    a block (of CUDA C++ kernels only what is declared with a size, not what the launch adds); issued: instructions of
    the hot loop for each dimension of a pair, where the kernel has such a loop; barriers: at most, of a row of
    hal_embeddings."""

    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]
    problem: str
    source: str = ""
    issued: float | None = None
    barriers: int | None = None


def loops(sass: str) -> list[Counter[str]]:
    """The innermost loops of a kernel's machine code: how often each instruction is in it, without its suffixes."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", sass)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (_, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and at.get(int(target[1], 16), len(code)) <= i:
            found.append((at[int(target[1], 16)], i))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [Counter(name.split(".")[0] for _, name, _ in code[first : last + 1]) for first, last in inner]


def _disassembled(binary: Path) -> dict[str, str]:
    """Machine code by kernel and architecture, "name sm_90"."""
    tool = Path(get_ptxas(90).path).with_name("cuobjdump")
    text = subprocess.run([str(tool), "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    found, arch = {}, ""
    for part in re.split(r"(?=arch = sm_|Function : )", text):
        if part.startswith("arch"):
            arch = part.split()[2]
        elif part.startswith("Function"):
            found[f"{part.split()[2]} {arch}"] = part
    return found


def of_products(sass: str) -> str:
    """What is wrong with the loops of a Hopper kernel that have matrix instructions."""
    products = [loop for loop in loops(sass) if loop["HGMMA"]]
    if not products:
        return "no loop with matrix instructions"
    if not all(loop["UTMALDG"] for loop in products):
        return "operands without bulk copies"
    return "ordinary loads beside a product" if any(loop["LDG"] or loop["LD"] for loop in products) else ""


def issued(name: str, sass: str) -> tuple[str, float] | None:
    """(reduction, instructions of the hot loop for each dimension of a pair) of an instance of
    distance_sweep_kernel.
    """
    instance = INSTANCE.search(name)
    if instance is None:
        return None
    reduction, scaled = _REDUCTIONS[instance[2]], instance[3] == "true"
    hot = max(loops(sass), key=lambda loop: loop["FADD"] + loop["FFMA"] + loop["MUFU"])
    # Eight queries and entities a thread; two dimensions at a time of reals, both parts of one of complex numbers.
    dimensions = 1 if scaled and reduction != "complex_l1" else 2
    return reduction, hot.total() / (64 * dimensions)


def barriers(name: str, sass: str) -> tuple[int, str] | None:
    """(barriers in the code, what is wrong with them) of an instance of hal_embeddings_kernel: outside of the innermost
    loops, and so met at once a row.
    """
    if not name.startswith("hal_embeddings_kernel"):
        return None
    count = len(re.findall(r"\bBAR\.SYNC", sass))
    if any(loop["BAR"] for loop in loops(sass)):
        return count, "a barrier in an innermost loop"
    return count, "" if count <= MOST_BARRIERS else f"{count} barriers a row, at most {MOST_BARRIERS}"


@functools.cache
def digest(source: Path) -> str:
    """Of what a kernel's source is made of; of Python the syntax: a comment or a line break changes no kernel."""
    beside = [*source.parent.glob("*.cuh")] if source.suffix == ".cu" else [source.with_name("noise.py")]
    paths = sorted({source, *beside})
    text = b"".join(path.read_bytes() if path.suffix != ".py" else _syntax(path).encode() for path in paths)
    return f"{source.name} {hashlib.sha256(text).hexdigest()[:16]}"


def _syntax(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return repr(_parts(tree))


def _parts(node: Any) -> Any:
    """A tree as tuples, without what is empty: Python's own text of it differs from one version to the next."""
    if isinstance(node, list):
        return [_parts(x) for x in node]
    if not isinstance(node, ast.AST):
        return node
    return type(node).__name__, [(name, _parts(x)) for name, x in ast.iter_fields(node) if x is not None and x != []]


def cases() -> Iterator[CompileCase]:
    """The cases of all kernel modules."""
    for module in pkgutil.iter_modules(dhns_fast.kernels.__path__):
        collect = getattr(importlib.import_module(f"dhns_fast.kernels.{module.name}"), "compile_cases", None)
        yield from collect() if collect else ()


def _source(case: CompileCase) -> str:
    # Interpreted or compiled, a kernel is a function of its module.
    return digest(Path(sys.modules[case.kernel.fn.__module__].__file__ or ""))


def compile_case(case: CompileCase, arch: int) -> Report:
    """Compiles as a launch with aligned pointers and dimensions does, and reads ptxas's account."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants: dict[Any, Any] = {(names.index(name),): value for name, value in case.constants.items()}
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )
    ptx = compiled.asm["ptx"]
    matrix = tuple(sorted(set(MATRIX.findall(ptx))))
    wanted = case.matrix if isinstance(case.matrix, str) else CHIPS[arch].matrix if case.matrix else None
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        account = _ptxas(ptx, arch, binary, case.options.get("enable_fp_fusion", True))
        more = ""
        if arch == 90 and any(kind.startswith("tensordesc") for kind in case.types.values()):
            more = "; ".join(filter(None, map(of_products, _disassembled(binary).values())))
    return replace(
        _report(case.name, arch, account, compiled.metadata.shared, matrix, wanted, more), source=_source(case)
    )


def _report(
    kernel: str, arch: int, account: str, shared: int, matrix: tuple[str, ...], wanted: str | None, more: str = ""
) -> Report:
    """What ptxas says of a kernel (`-v`), and what is wrong with it; `more` is wrong too."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", account)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", account)))
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    if shared > CHIPS[arch].shared:
        problems.append(f"shared memory {shared} of {CHIPS[arch].shared} bytes")
    if matrix != (() if wanted is None else (wanted,)):
        problems.append(f"matrix instructions {', '.join(matrix) or 'none'}, expected {wanted or 'none'}")
    if more:
        problems.append(more)
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
        code = _disassembled(Path(folder) / "out.fatbin")
    _, *parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", account)
    reports = []
    for name, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", text)))
        readable = _readable(name)
        count = issued(readable, code.get(f"{name} sm_{arch}", ""))
        more = (
            f"{count[1]:.2f} instructions a dimension, at most {MOST[count[0]]}"
            if count and count[1] > MOST[count[0]]
            else ""
        )
        meetings = barriers(readable, code.get(f"{name} sm_{arch}", ""))
        # No CUDA C++ kernel here has a product.
        report = _report(readable, int(arch), text, shared, (), None, more or (meetings[1] if meetings else ""))
        instructions, times = round(count[1], 2) if count else None, meetings[0] if meetings else None
        reports.append(replace(report, source=digest(source), issued=instructions, barriers=times))
    return sorted(reports, key=lambda report: (report.arch, report.kernel))


def _readable(symbol: str) -> str:
    """hal_embeddings_kernel<RotatE, float, float> for the mangled name, where binutils are at hand."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    return re.sub(r"\b\w+::", "", name)


def _ptxas(ptx: str, arch: int, binary: Path, fused: bool) -> str:
    """The assembler's account; the machine code goes to `binary`."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    source = binary.with_suffix(".ptx")
    source.write_text(ptx)
    fusion = [] if fused else ["--fmad=false"]
    command = [get_ptxas(arch).path, "-v", *fusion, f"--gpu-name={target[1]}", str(source), "-o", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def reports(
    archs: Sequence[int], sources: Sequence[Path], processes: int | None = None, known: Sequence[Report] = ()
) -> list[Report]:
    """All Triton kernels, and the CUDA kernels of `sources`; by default a process a core. What is in `known` of the
    same source is not compiled.
    """
    by_key = {(report.kernel, report.arch, report.source): report for report in known}
    jobs, found = [], []
    for number, case in enumerate(cases()):
        for arch in archs:
            if arch in (case.archs or archs):
                have = by_key.get((case.name, arch, _source(case)))
                found.append(have) if have else jobs.append((number, arch))
    compiled = []
    for source in sources:
        for arch in archs:
            have_all = [report for report in known if report.source == digest(source) and report.arch == arch]
            found.extend(have_all) if have_all else compiled.append((source, arch))
    # Not forked: threads of torch do not survive that.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        of_cuda = [pool.submit(compile_cuda, source, [arch]) for source, arch in compiled]
        if jobs:
            found.extend(pool.map(_compile_numbered, *zip(*jobs, strict=True), chunksize=4))
        for future in of_cuda:
            found.extend(future.result())
    return sorted(found, key=lambda report: (report.source.split()[0], report.kernel, report.arch))


def _compile_numbered(number: int, arch: int) -> Report:
    return compile_case(next(itertools.islice(cases(), number, None)), arch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=tuple(CHIPS), choices=tuple(CHIPS), help="compute capabilities times ten"
    )
    parser.add_argument(
        "--cuda", type=Path, nargs="*", default=None, help=".cu files; by default all of csrc/ where nvcc is"
    )
    parser.add_argument("--jobs", type=int, default=None, help="processes; by default one a core")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--all", action="store_true", help="compile kernels again whose sources have not changed")
    options = parser.parse_args(arguments)
    nvcc = build._nvcc()
    sources = (sorted(build.source_folder().glob("*.cu")) if nvcc else []) if options.cuda is None else options.cuda
    release = re.search(r"release (\S+),", build._version(nvcc)) if nvcc and sources else None
    tools = {"triton": triton.__version__, "nvcc": release and release[1]}
    known = []
    if not options.all and options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if all(before.get(name) == version for name, version in tools.items()):
            known = [Report(**{**entry, "matrix": tuple(entry["matrix"])}) for entry in before["kernels"]]
    found = reports(options.arch, sources, options.jobs, known)
    options.output.write_text(
        json.dumps({**tools, "kernels": [asdict(report) for report in found]}, indent=1) + "\n", encoding="utf-8"
    )
    for r in found:
        count = "" if r.issued is None else f"{r.issued:.2f} a dimension"
        count = count if r.barriers is None else f"{r.barriers} barriers"
        print(
            f"{r.kernel:64s} sm_{r.arch:<4d} {r.registers:4d} registers {r.shared:7d} B shared  {', '.join(r.matrix):16s} {count} {r.problem}"
        )
    return int(any(report.problem for report in found))


if __name__ == "__main__":
    sys.exit(main())
