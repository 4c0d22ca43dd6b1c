"""What every suite of bench/ shares: the race of providers, ceilings of the run, provenance, and the table that comes
of them.

A suite is a file `bench_<suite>.py`; each of its tests (`test_...`) takes the fixture `race` and calls it with
providers that do the same job. A provider is first checked against the oracle: one that disagrees is reported as wrong
and is not timed. The others take turns, so that a busy machine is busy for all of them alike; of a rival that takes a
minute and more, the call that was checked is the one that counts.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dhns_fast
from dhns_fast.data import KnowledgeGraph, load
from dhns_fast.data.planted import synthetic
from dhns_fast.errors import BackendUnavailableError
from dhns_fast.ops import memory
from dhns_fast.ops.backend import cpu_bf16

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Of a reduction, an element: l2 as a product, a square root counted as one.
FLOPS = {"dot": 2, "l2": 2, "l1": 3, "complex_l1": 3.5}
SLOW = 60.0  # seconds of a call that is not made again
MKG_Y = ROOT.parent / "shared" / "data" / "MKG-Y"


@dataclass
class Row:
    """One provider in one race.

    Attributes:
        case: operator and shape.
        status: "ok", or why there are no times: "wrong: ..." or "unavailable: ...".
        p20, p50, p80: milliseconds a call.
        bound: the ceiling that the stated work takes longest at; `rate` what it counts, a second; `percent` of it that
            p50 reaches.
        peak_mb: memory a call takes beyond what is held before it (CUDA: allocated; CPU: resident), MB.
        ratio: p50 over the p50 of the first provider.
        error: how far the result is from the truth.
        work: ceiling → amount that the job needs at least.
        demands: what the case must reach and what was measured, see :class:`Demand`.
        curve: where the row lies on a chart: {"of": "rank_all dot", "against": "E", "at": 15000}.
        extra: further figures, which a test adds to the rows that `race` returns.
    """

    case: str
    provider: str
    status: str = "ok"
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 0
    bound: str | None = None
    rate: float | None = None
    percent: float | None = None
    peak_mb: float | None = None
    ratio: float | None = None
    error: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    demands: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, str | float] | None = None
    extra: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """A figure that a case must reach: the report shows it as met or not, and no benchmark fails for it.

    Attributes:
        what: the figure in words, "times as fast as oracle".
        limit: the figure must be at least this, or at most where `most`.
        of: rows of the race by provider, and ours → the figure; None where it was not measured.
        provider: which of our providers it is about; None for the first.
    """

    what: str
    limit: float
    of: Callable[[Mapping[str, Row], Row], float | None]
    most: bool = False
    provider: str | None = None


def times_as_fast(rival: str, limit: float, provider: str | None = None) -> Demand:
    """Ours is at least `limit` times as fast as a rival of the same race, by medians."""
    return Demand(
        f"times as fast as {rival}", limit, lambda rows, ours: _over(rows[rival].p50, ours.p50), provider=provider
    )


def percent_of_ceiling(limit: float, provider: str | None = None) -> Demand:
    """Ours reaches at least `limit` percent of the ceiling that binds."""
    return Demand("% of the binding ceiling", limit, lambda rows, ours: ours.percent, provider=provider)


def peak_mb(limit: float, provider: str | None = None) -> Demand:
    """A call of ours takes at most `limit` MB beyond what is held before it."""
    return Demand("MB of peak memory", limit, lambda rows, ours: ours.peak_mb, most=True, provider=provider)


def memory_share(rival: str, limit: float, provider: str | None = None) -> Demand:
    """The peak memory of ours is at most `limit` times a rival's."""
    return Demand(
        f"of the peak memory of {rival}",
        limit,
        lambda rows, ours: _over(ours.peak_mb, rows[rival].peak_mb),
        True,
        provider,
    )


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


@dataclass
class Race:
    """Runs the providers of a case and keeps their rows.

    Attributes:
        device, size: where to measure, and "small", "reference" or "large".
        benchmark: pytest-benchmark's fixture; it times the first provider.
        clock: seconds, of the wall or of this process alone; CUDA has its own.
        without: rivals with this in their names are left out, unless they are the truth.
    """

    benchmark: Any
    device: torch.device
    size: str
    ceilings: Callable[[], dict[str, float]]
    rows: list[Row]
    clock: Callable[[], float] = time.perf_counter
    without: str | None = None

    def __call__(
        self,
        case: str,
        providers: Mapping[str, Callable[..., Any]],
        make: Callable[[int], tuple[Any, ...]] = lambda seed: (),
        truth: Callable[..., Any] | str = "oracle",
        tolerance: float = 1e-4,
        error: Callable[[Any, Any], float] | None = None,
        work: Mapping[str, float] | None = None,
        seconds: float | None = None,
        min_rounds: int = 3,
        demands: Sequence[Demand] = (),
        curve: tuple[str, str, float] | None = None,
    ) -> dict[str, Row]:
        """Check every provider, time the right ones in turns, and return the rows by provider.

        Args:
            case: operator and shape, e.g. "rank_all dot B512 E15000 D256".
            providers: name → function of what `make` returns. The first is ours and the one ratios refer to. A provider
                of ours (its name starts with "ours") that is wrong fails the test; a rival that is wrong is a row that
                says so.
            make: seed → input set. On CUDA as many sets as exceed the cache twice take turns; never zeros.
            truth: what results must agree with: a function of the first input set (in float64, say), or the name of a
                provider.
            tolerance: largest acceptable `error(result, truth)`; by default :func:`relative_error`.
            work: ceiling ("byte", "flop", "tf32", "bf16", "sqrt") → amount that the job needs at least; the one that
                takes longest binds.
            seconds: to spend on all providers together, but `min_rounds` in any case; by default 5, at size small 2, of
                which 5 minutes hold many.
            demands: what ours must reach in this case (:func:`times_as_fast` and its like), given where the shape is
                the demanded one.
            curve: (what, "B" | "D" | "E", value) for a chart of time and memory against that size.
        """
        seconds = seconds or (2.0 if self.size == "small" else 5.0)
        sets = [make(0)]
        if self.device.type == "cuda" and (size := sum(x.nbytes for x in flatten(sets[0]))):
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            sets += [make(seed) for seed in range(1, min(64, math.ceil(2 * cache / size)))]
        place: dict[str, str | float] | None = (
            None if curve is None else {"of": curve[0], "against": curve[1], "at": curve[2]}
        )
        rows = {name: Row(case, name, work=dict(work or {}), curve=place) for name in providers}
        self.rows.extend(rows.values())
        for name in providers:
            if self.without and self.without in name and not name.startswith("ours") and name != truth:
                rows[name].status = f"unavailable: left out (--benchmark-without {self.without!r})"
        providers = {name: call for name, call in providers.items() if rows[name].status == "ok"}
        expected = self._first(rows[truth], providers[truth], sets[0]) if isinstance(truth, str) else truth(*sets[0])
        for name, call in providers.items():
            row = rows[name]
            result = expected if name == truth else self._first(row, call, sets[0])
            if row.status == "ok":
                row.error = (error or relative_error)(result, expected)
                if not row.error <= tolerance:
                    row.p50 = None
                    row.status = f"wrong: error {row.error:.1e}, at most {tolerance:.0e} is right"
            del result
        del expected
        first = next(iter(providers))
        once = {name: [row.p50] for name, row in rows.items() if row.status == "ok" and row.p50 and name != first}
        racing = {name: call for name, call in providers.items() if rows[name].status == "ok" and name not in once}
        times = self._time(racing, sets, seconds, min_rounds) | once
        for name, values in times.items():
            row = rows[name]
            row.rounds = len(values)
            row.p20, _, _, row.p80 = statistics.quantiles(
                values * 2 if len(values) == 1 else values, n=5, method="inclusive"
            )
            row.p50 = statistics.median(values)
            base = rows[first].p50
            row.ratio = row.p50 / base if base else None
            floors = {ceiling: amount / self.ceilings()[ceiling] * 1e3 for ceiling, amount in (work or {}).items()}
            if floors and work:
                row.bound = max(floors, key=lambda ceiling: floors[ceiling])
                row.rate, row.percent = work[row.bound] / row.p50 * 1e3, 100 * floors[row.bound] / row.p50
        for demand in demands:
            row = rows[demand.provider or first]
            row.demands.append(
                {"what": demand.what, "limit": demand.limit, "most": demand.most, "got": demand.of(rows, row)}
            )
        bad = [
            f"{name}: {row.status}"
            for name, row in rows.items()
            if name.startswith("ours") and row.status.startswith("wrong")
        ]
        assert not bad, f"{case}: {'; '.join(bad)}"
        return rows

    def _first(self, row: Row, call: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """Result of the second call, after one that compiles and builds what is made on first use; and its time, where
        it was a long one.
        """
        try:
            call(*inputs)
            begin = self.clock()
            result, row.peak_mb = peak_memory(lambda: call(*inputs), self.device)
            seconds = self.clock() - begin
            row.p50 = seconds * 1e3 if seconds >= SLOW else None
            return result
        except (BackendUnavailableError, ChildProcessError, ImportError) as reason:
            row.status = f"unavailable: {reason}"

    def _time(
        self, providers: Mapping[str, Callable[..., Any]], sets: list[tuple[Any, ...]], seconds: float, min_rounds: int
    ) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in providers}
        if not providers:
            return times

        def turn(name: str) -> None:
            inputs = sets[len(times[name]) % len(sets)]
            times[name].append(time_call(lambda: providers[name](*inputs), self.device, self.clock))

        def turn_of_others() -> None:
            for name in others:
                turn(name)

        first, *others = providers
        begin = self.clock()
        turn_of_others()
        turn(first)
        rounds = max(2, min_rounds, min(200, int(seconds / (self.clock() - begin))))
        self.benchmark.pedantic(turn, args=(first,), setup=turn_of_others, rounds=rounds - 1)
        return times


def relative_error(result: Any, truth: Any) -> float:
    """Largest max|a − b| / max|b| over the tensors of two nested results; integers must be equal (else infinity)."""
    a, b = flatten(result), flatten(truth)
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    errors = [0.0]
    for x, y in zip(a, b, strict=True):
        if not y.is_floating_point():
            errors.append(0.0 if torch.equal(x.cpu(), y.cpu()) else math.inf)
        elif y.numel():
            x, y = x.detach().double().cpu(), y.detach().double().cpu()
            errors.append(((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item())
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def flatten(nested: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(nested, Tensor):
        return [nested]
    parts = nested.values() if isinstance(nested, Mapping) else nested if isinstance(nested, (tuple, list)) else ()
    return [x for part in parts for x in flatten(part)]


def time_call(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one call, by events on CUDA, by a clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = clock()
    call()
    return (clock() - begin) * 1e3


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """Result of a call and the memory in MB that it takes at its peak beyond what is held before; None where the system
    does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - held) / 1e6
    try:
        memory.release()
        # Freed memory that the allocator keeps would hide what a call takes; 5 sets the high-water mark back.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _resident("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, (_resident("VmHWM") - held) / 1e6


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure_ceilings(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Rates a second of the best library here: "byte" (read and written by a copy in memory), "flop" (float32 product),
    "sqrt" (the processor's square roots; a reciprocal root and a Newton step can be faster), on CUDA "tf32", and "bf16"
    on CUDA and where the CPU has it.
    """
    cuda = device.type == "cuda"
    # Beyond what caches hold: on a server whose third level has hundreds of megabytes a copy of 64 runs at 43 GB/s and
    # one of 256 at 27.
    source = torch.randn(1 << (28 if cuda else 26), device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 1536
    a, b = torch.randn(2, n, n, device=device)

    def rate(amount: float, call: Callable[[], Any]) -> float:
        call()
        return amount / min(time_call(call, device, clock) for _ in range(10)) * 1e3

    ceilings = {"byte": rate(2 * source.nbytes, lambda: target.copy_(source)), "flop": rate(2 * n**3, lambda: a @ b)}
    # Many roots for every element that is read, so that memory is not what is measured.
    if cuda:
        import roots

        ceilings["sqrt"] = rate(roots.ROOTS * source.numel(), lambda: roots.take(source, target))
    else:
        block, root = source[: 1 << 17].abs(), torch.empty(1 << 17)
        ceilings["sqrt"] = rate(64 * block.numel(), lambda: [torch.sqrt(block, out=root) for _ in range(64)])
    if cuda:
        allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        ceilings["tf32"] = rate(2 * n**3, lambda: a @ b)
        torch.backends.cuda.matmul.allow_tf32 = allowed
    if cuda or cpu_bf16():
        c, d = a.bfloat16(), b.bfloat16()
        ceilings["bf16"] = rate(2 * n**3, lambda: c @ d)
    return ceilings


# Of `--benchmark-clock`: "cpu" counts what this process has computed, for a machine that others use, too.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Where, when and of what the numbers are."""
    driver, cpu = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")
    model = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    changed = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else (model or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "driver": driver.read_text().splitlines()[0] if device.type == "cuda" and driver.exists() else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "dhns_fast": dhns_fast.__version__,
        # Where a copy without its history is measured, whoever copied it knows.
        "commit": os.environ.get("DHNS_FAST_COMMIT") or _git("rev-parse", "--short=12", "HEAD") + changed,
        "sources": sources(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def sources() -> str:
    """Digest of everything that is measured or measures: the same before and after a result is committed, and where git
    is missing.
    """
    digest = hashlib.sha256()
    for folder in ("bench", "csrc", "dhns_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def mkg_y() -> KnowledgeGraph:
    """MKG-Y with its two text modalities where it is at hand, a synthetic graph of its size elsewhere."""
    if MKG_Y.is_dir():
        return load(MKG_Y)
    widths = {"text_name": 384, "text_context": 384}
    return synthetic(15_000, 28, 26_638, widths, valid_fraction=0.1, test_fraction=0.1, coverage=1.0)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a readable table."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.3g}" if abs(x) < 100 else f"{x:,.0f}"

    lines = [["case", "provider", "ms p20", "p50", "p80", "G/s", "of ceiling", "peak MB", "ratio", "error", ""]]
    for r in rows:
        rate, share = (
            (None, "") if r.rate is None or r.percent is None else (r.rate / 1e9, f"{r.percent:.0f} % {r.bound}")
        )
        extra = (
            r.status
            if r.status != "ok"
            else ", ".join(f"{k} {v if isinstance(v, str) else number(v)}" for k, v in r.extra.items())
        )
        error = "" if r.error is None else f"{r.error:.0e}"
        lines.append(
            [
                r.case,
                r.provider,
                *map(number, (r.p20, r.p50, r.p80, rate)),
                share,
                *map(number, (r.peak_mb, r.ratio)),
                error,
                extra,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
