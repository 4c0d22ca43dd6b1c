"""Compiling csrc/ on first use into shared libraries in the user's cache, and loading them.

They hold `torch.ops.dhns_fast_native.*`: one library for CPU tensors, and one with the CUDA kernels, built only where
they are used. They use LibTorch's stable ABI and are found by a key over sources, flags, compilers and torch, so that
nothing is ever stale and several environments share a cache. A library is loaded only if nobody but this user or root
can have written it, and if it still has the checksum noted when it was built: one that was cut short would kill the
process with SIGBUS. Sources by name:
    *_cpu.cpp       kernels without torch, compiled for this processor's best instruction set or for the one that
                    DHNS_FAST_ISA names. The set is part of the key: another processor that shares the cache finds no
                    library of more than it has, and builds its own
    *_binding.cpp   registration of CPU operators
    *.cu            CUDA kernels and their registration, where nvcc is and torch has CUDA
Floating point: `-O3` with the compiler's default contraction (a·b + c may be one fused operation), no -ffast-math: NaN
and infinities keep their meaning, sums are reordered only in loops marked `omp simd`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dhns_fast.errors import BackendUnavailableError, InputError

logger = logging.getLogger("dhns_fast")

LIBRARY = "dhns_fast_native.so"
CACHE = "DHNS_FAST_CACHE"
# Seconds that a compilation may take.
LIMIT, DEFAULT_LIMIT = "DHNS_FAST_BUILD_TIMEOUT", 1800.0
# Seconds of one core a source file of the CPU library, and the longest: 57 and 12 s for 22 files on an AMD EPYC with
# AVX-512, g++ 12; older processors take up to twice as long.
SECONDS_A_FILE, LONGEST_FILE = 4, 20
# Seconds for a compiler to say its version.
PATIENCE = 30
# What a library is made of. The CUDA kernels include headers of the others.
SUFFIXES = {"cpu": (".h", ".cpp"), "cuda": (".h", ".cu", ".cuh")}
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# The most that operators may use of an x86 processor.
ISA = "DHNS_FAST_ISA"
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
# The last is the set before it, whose code asks the processor for more of bfloat16 (csrc/bf16_cpu.h).
ISAS = (*INSTRUCTION_SETS, "avx512_bf16")


def check_instructions() -> None:
    """Refuse a DHNS_FAST_ISA that names no instruction set."""
    if (isa := os.environ.get(ISA)) and isa not in ISAS:
        raise InputError(ISA, isa, ", ".join(ISAS))


def best_instructions() -> str:
    """The instruction set that operators are compiled for unless DHNS_FAST_ISA names a lesser one."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "baseline"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def _instruction_flags() -> tuple[str, ...]:
    sets, best = list(INSTRUCTION_SETS), best_instructions()
    most = os.environ.get(ISA)
    return INSTRUCTION_SETS[min(best, most, key=sets.index) if most in sets else best]


# The oldest torch whose stable ABI has what csrc/ uses; a library built for it serves every later one.
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000ULL",)
NVCC_FLAGS = ("-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr")
CUDA_ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class BuildStatus:
    """What `dhns-fast doctor` shows.

    Args:
        compiler, ninja, nvcc: paths of the tools, None where one is missing.
        cache: the folder for compiled libraries.
        library: the library for the present sources, None while it is not built.
        cuda: whether CUDA kernels can be built here.
        reason: why nothing can be built here, None if it can.
        cuda_library: the library of the CUDA kernels, None while it is not built.
    """

    compiler: str | None
    ninja: str | None
    nvcc: str | None
    cache: Path
    library: Path | None
    cuda: bool
    reason: str | None
    cuda_library: Path | None


def status() -> BuildStatus:
    """Looks, and neither builds nor loads."""
    reason, built, cache = None, {}, Path(os.environ.get(CACHE, ""))
    try:
        cache = cache_folder()
        built = {part: library for part in _parts() if _intact(library := _library_path(part))}
    except (BackendUnavailableError, OSError) as error:
        reason = str(error)
    return BuildStatus(_compiler(), _ninja(), _nvcc(), cache, built.get("cpu"), _with_cuda(), reason, built.get("cuda"))


def cache_folder() -> Path:
    """DHNS_FAST_CACHE, or dhns_fast/ in the user's cache folder; of a user without a home dhns_fast-UID/ in the folder
    for temporary files.
    """
    if folder := os.environ.get(CACHE):
        try:
            return Path(folder).expanduser()
        except RuntimeError as error:
            raise BackendUnavailableError(f"{CACHE} {folder!r} names no folder: {error}") from None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dhns_fast"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"dhns_fast-{os.getuid()}"


def source_folder() -> Path:
    """csrc/: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def build(verbose: bool = False) -> Path:
    """Compiles what is not in the cache yet. Two processes at once are safe: one builds, the other waits and finds the
    library.

    Args:
        verbose: show the commands and the compilers' output.

    Returns:
        the shared library with the CPU operators.

    Raises:
        InputError: DHNS_FAST_ISA names no instruction set.
        BackendUnavailableError: a tool is missing or a compilation failed; the message says which.
    """
    check_instructions()
    libraries = [_build(part, verbose) for part in _parts()]
    return libraries[0]


def why_not(device_type: str) -> str | None:
    """None when the compiled operators for "cpu" or "cuda" tensors are loaded (built and loaded by this call),
    otherwise the reason.

    Raises:
        InputError: DHNS_FAST_ISA names no instruction set.
    """
    check_instructions()
    if device_type == "cuda" and not _with_cuda():
        return "compiled CUDA operators need a torch with CUDA and nvcc (CUDA_HOME or PATH)"
    # The CPU library declares the operators that the other one implements.
    return _load_once("cpu") or (_load_once("cuda") if device_type == "cuda" else None)


@functools.cache
def _load_once(part: str) -> str | None:
    """The reason why it failed, remembered: a process tries once."""
    try:
        library = _build(part)
        torch.ops.load_library(str(library))
    except BackendUnavailableError as error:
        return str(error)
    except OSError as error:
        return f"{library} does not load: {error}"
    return None


def _parts() -> list[str]:
    return ["cpu", "cuda"] if _with_cuda() else ["cpu"]


def _build(part: str, verbose: bool = False) -> Path:
    library = _library_path(part)
    folder = library.parent
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.parent.mkdir(mode=0o700)
        _refuse_foreign(folder.parent)
        if _intact(library):
            return library
        with _lock(folder.with_suffix(".lock"), folder):
            if not _intact(library):
                if folder.exists():
                    logger.warning("the compiled operators in %s are damaged or half made, and are built again", folder)
                _sweep(folder)
                _compile_into(part, folder, verbose)
    except OSError as error:
        reason = f"the compiled operators cannot be cached in {folder.parent}: {error.strerror or error}; {CACHE} names another folder"
        raise BackendUnavailableError(reason) from error
    if not _intact(library):
        raise BackendUnavailableError(f"{library} was damaged as soon as it was built (a failing or full disk?)")
    return library


def _intact(library: Path) -> bool:
    """Whether a library is there, whole, and has the checksum noted beside it.

    Raises:
        BackendUnavailableError: somebody else can have written it.
    """
    try:
        noted = _checksum_file(library).read_bytes()
        for path in (library.parent.parent, library.parent, library):
            _refuse_foreign(path)
        return noted == _digest(library)
    except OSError:
        return False


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def _refuse_foreign(path: Path) -> None:
    """What others can write must not be loaded: it runs with this user's rights."""
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        raise BackendUnavailableError(
            f"{path} belongs to user {found.st_uid}; accepted: a folder of your own ({CACHE} names one)"
        )
    if found.st_mode & 0o022:
        mode = f"{found.st_mode & 0o7777:o}"
        raise BackendUnavailableError(
            f"{path} can be written to by others (mode {mode}); chmod go-w {path}, or name another in {CACHE}"
        )


def _compiler() -> str | None:
    asked = os.environ.get("CXX")
    return next(
        (path for name in ([asked] if asked else ["c++", "g++", "clang++"]) if (path := shutil.which(name))), None
    )


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def _ninja() -> str | None:
    if found := shutil.which("ninja"):
        return found
    # The package's script need not be on PATH: an environment can be used without being activated.
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else None


def _with_cuda() -> bool:
    return torch.version.cuda is not None and _nvcc() is not None


@functools.cache
def _version(tool: str) -> str:
    try:
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "errors": "replace",
        }
        return subprocess.run([tool, "--version"], check=False, timeout=PATIENCE, **options).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"{tool} --version fails: {error}") from None


def _library_path(part: str) -> Path:
    """Where the library for the present sources, flags, compilers and torch is, or will be."""
    if os.name != "posix":
        raise BackendUnavailableError("operators are compiled on Linux and macOS only")
    missing = [
        name
        for name, path in (("a C++ compiler (c++, g++, clang++ or CXX)", _compiler()), ("ninja", _ninja()))
        if path is None
    ]
    if missing:
        raise BackendUnavailableError(f"not found: {', '.join(missing)}")
    digest = hashlib.sha256()
    for source in sorted(p for p in source_folder().iterdir() if p.suffix in SUFFIXES[part]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    # Where csrc/ and torch happen to lie makes no difference to the binary.
    recipe = _ninja_file(part).replace(str(source_folder()), "").replace(str(Path(torch.__file__).parent), "")
    tools = [_version(tool) for tool in (_compiler(), _nvcc() if part == "cuda" else None) if tool]
    digest.update(repr((recipe, tools, torch.__version__, platform.machine())).encode())
    return cache_folder() / digest.hexdigest()[:16] / LIBRARY


def _ninja_file(part: str) -> str:
    """How to build a library in the folder where ninja runs."""
    csrc, torch_folder = source_folder(), Path(torch.__file__).parent
    quote = shlex.quote
    include = f"-I{quote(str(csrc))}"
    stable = [*STABLE_ABI, f"-isystem {quote(str(torch_folder / 'include'))}"]
    link = [f"-L{quote(str(torch_folder / 'lib'))}", "-ltorch_cpu"]
    compiler, nvcc = _compiler() or "c++", _nvcc() or "nvcc"
    flags = {"cpu": (compiler, *CXX_FLAGS), "cuda": (nvcc, *NVCC_FLAGS, "-DUSE_CUDA")}[part]
    lines = [
        "ninja_required_version = 1.3",
        f"rule one\n  command = {quote(flags[0])} {' '.join(flags[1:])} {include} $flags -c $in -o $out",
    ]
    objects: list[str] = []

    def compile_one(source: Path, flags: Sequence[str]) -> None:
        objects.append(f"{source.stem}.o")
        escaped = str(source).replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {source.stem}.o: one {escaped}\n  flags = {' '.join(flags)}")

    sources = sorted(csrc.iterdir())
    if part == "cpu":
        for ending, chosen in (("_cpu.cpp", _instruction_flags()), ("_binding.cpp", stable)):
            for source in sources:
                if source.name.endswith(ending):
                    compile_one(source, chosen)
    else:
        for source in sources:
            if source.suffix == ".cu":
                compile_one(source, [*stable, *_architecture_flags()])
        # The CUDA runtime is the one that torch brings and has loaded: wheels of it have no name that -lcudart would
        # find, and two would be one too many. Its symbols are looked up through torch_cuda, which must stay a
        # dependency although none of its own are used.
        link += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    shared = "-dynamiclib" if sys.platform == "darwin" else "-shared"
    lines.append(f"rule link\n  command = {quote(compiler)} {shared} $in -o $out {' '.join(link)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _architecture_flags() -> list[str]:
    """Machine code for the devices at hand, or for all that are supported when none is; PTX for later ones."""
    found = sorted(
        {major * 10 + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}
    )
    wanted = found or list(CUDA_ARCHITECTURES)
    last = wanted[-1]
    return [
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted),
        f"-gencode=arch=compute_{last},code=compute_{last}",
    ]


def _compile_into(part: str, folder: Path, verbose: bool) -> None:
    """Builds in a folder of its own, which takes its final name when it is complete. The caller holds the lock of
    `folder`.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        recipe = _ninja_file(part)
        (scratch / "build.ninja").write_text(recipe)
        _run_ninja(scratch, *_announce(part, recipe.count(": one "), folder), verbose=verbose)
        for leftover in scratch.iterdir():
            if leftover.name != LIBRARY:
                _remove(leftover)
        library = scratch / LIBRARY
        _checksum_file(library).write_bytes(_digest(library))
        for path in scratch.iterdir():
            path.chmod(0o644)
        if folder.exists():
            folder.rename(scratch.with_name(f"{scratch.name}-old"))
        scratch.rename(folder)
    finally:
        for leftover in folder.parent.glob(f"{scratch.name}*"):
            _remove(leftover)


def _announce(part: str, count: int, folder: Path) -> tuple[str, float]:
    """Says what is compiled and how long that usually takes; returns the words for it, and the seconds it may take."""
    given = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise InputError(LIMIT, given, "a number of seconds above 0")
    what = f"{count} {'CUDA' if part == 'cuda' else 'C++'} files of operators"
    cores = max(1, min(count, os.cpu_count() or 1))
    usual = (
        "minutes"
        if part == "cuda"
        else f"about {math.ceil(max(SECONDS_A_FILE * count / cores, LONGEST_FILE) / 10) * 10} s on {cores} idle cores"
    )
    logger.warning("compiling %s into %s, once; this usually takes %s", what, folder, usual)
    return what, limit


def _run_ninja(folder: Path, what: str, limit: float, verbose: bool) -> None:
    """Runs ninja in a session of its own: Ctrl-C reaches Python alone, which ends the compilers and says what became of
    them.
    """
    command = [_ninja() or "ninja", "-C", str(folder), *(["-v"] if verbose else [])]
    output = None if verbose else subprocess.PIPE
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    shown = ""
    try:
        while True:
            try:
                printed, _ = process.communicate(timeout=min(1.0, max(0.0, begin + limit - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                spent = time.monotonic() - begin
                if spent >= limit:
                    reason = f"compiling the operators did not end in {limit:g} s, the limit that {LIMIT} sets, and was stopped"
                    raise BackendUnavailableError(reason) from None
                if not verbose and sys.stderr.isatty():
                    shown = f"\rcompiling {what}: {len(list(folder.glob('*.o')))} done, {spent:.0f} s"
                    print(shown, end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            str(stop) or "interrupted while compiling the operators; the next start begins that anew"
        ) from None
    finally:
        if shown:
            print(file=sys.stderr)
        if process.poll() is None:
            _end(process)
    if process.returncode:
        last = "" if verbose else "\n".join(printed.splitlines()[-20:])
        raise BackendUnavailableError(f"compiling the operators failed:\n{last}".rstrip())


def _end(ninja: subprocess.Popen[str]) -> None:
    """Ends ninja, which ends its compilers; those that do not listen are killed. (Each is a process group of its own,
    but of ninja's session.)
    """
    ninja.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        ninja.wait(2)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == ninja.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    ninja.kill()
    ninja.wait()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Removes what killed builders have left in the cache: of this library, whose lock the caller holds, and of those
    nobody builds now.
    """
    import fcntl

    for leftover in folder.parent.iterdir():
        key, dash, _ = leftover.name.partition("-")
        if not dash or not leftover.is_dir() or re.fullmatch("[0-9a-f]{16}", key) is None:
            continue
        if key == folder.name:
            _remove(leftover)
            continue
        with contextlib.suppress(OSError), (folder.parent / f"{key}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(leftover)


@contextlib.contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """Waits for whoever builds the same library, and says so."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            logger.warning(
                "waiting for process %s, which compiles the operators into %s", file.read(20).strip() or "?", folder
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
