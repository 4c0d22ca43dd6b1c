"""Finds the tiles of kernels with products for the GPU at hand: `python bench/tune.py`, into kernels/tuned/sm_*.json,
which launchers read.

The candidates are data beside the kernels (`CANDIDATES` of a module of kernels/). All are compiled ahead of time in
parallel; those that spill are left out; the others run once, in parallel too, so that Triton's cache has every variant
that a launch needs; then each is checked against float64 and timed, in turns; of each kernel, precision and width the
fastest is written down. Interrupted or out of time it keeps what it has.

    --dry        compile for sm_90, time nothing and write nothing: needs no GPU
    --widths     of embeddings; all by default
    --first      candidates of each kernel, precision and width; all by default
    --seconds    after which nothing more is timed
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import aot
import dhns_fast.kernels as kernels
import torch
import triton
from dhns_fast.kernels import denoise, score

WIDTHS = (256, 512, 1024)
ROUNDS, CALLS = 5, 3
# Of chains: one on the way as well as the last, as steps that end at a level are a variant of the kernel.
LEVELS = 0, 3


@dataclass(frozen=True)
class Subject:
    """What is chosen for: a kernel, a precision and a bucket of widths. Of an index in `jobs`, as processes are handed
    numbers.
    """

    kernel: str
    precision: str
    width: int

    @property
    def candidates(self) -> list[Any]:
        module, name = self.kernel.split(".")
        if module == "score":
            return score.CANDIDATES[self.precision]
        return (denoise.FEW_CANDIDATES if self.few else denoise.CANDIDATES)[name, self.precision]

    @property
    def few(self) -> bool:
        """Whether it is chosen for few rows."""
        return self.kernel.startswith("denoise_few.")

    def case(self, candidate: Any) -> kernels.CompileCase:
        """As it is compiled ahead of time."""
        if self.kernel == "score.dot":
            return score.compile_dot("rank", self.precision, self.width, candidate)
        return denoise.compile_case(self.kernel.split(".")[1], self.precision, self.width, candidate)

    def prepare(self) -> tuple[Callable[[], Any], Callable[[Any], float]]:
        """A call that the kernel dominates, and the error of its result."""
        return _rank(self) if self.kernel == "score.dot" else _chain(self)


def subjects() -> list[Subject]:
    """The widest first: they are what most time goes into."""
    found = []
    for width in sorted(WIDTHS, reverse=True):
        found += [Subject(f"denoise.{name}", precision, width) for name, precision in denoise.CANDIDATES]
        found += [Subject(f"denoise_few.{name}", precision, width) for name, precision in denoise.FEW_CANDIDATES]
        found += [Subject("score.dot", kind, width) for kind in score.CANDIDATES]
    return found


def _chain(subject: Subject) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """Eight steps of a chain of 6000 rows, or of 64, which draw their noise."""
    from dhns_fast.ops import denoise as ops_denoise
    from dhns_fast.sampler import DiffHEG

    D, T = subject.width, 8
    M, B = (1, 64) if subject.few else (3, 2000)
    made = DiffHEG(D, T, D, 6.0, 2.0, levels=LEVELS, precision=subject.precision, backend="triton").cuda()
    draw = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    inputs = draw(M, B, D), draw(B, D), draw(M, B, D)
    exact = DiffHEG(D, T, D, 6.0, 2.0, levels=LEVELS, precision="ieee", backend="eager").cuda().double()
    exact.load_state_dict(made.state_dict())

    def sample(generator: DiffHEG, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        heads, tails = generator.sample(h, r, t, generator=torch.Generator().manual_seed(3))
        return [*heads, *tails]

    # The counter gives both the same normals.
    truth = sample(exact, *(x.double() for x in inputs))

    def error(_: Any) -> float:
        pairs = zip(sample(made, *inputs), truth, strict=True)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)

    # A graph holds the launches of the candidate it was made with.
    graphs: dict[Any, torch.cuda.CUDAGraph] = {}
    on_device = torch.cuda.default_generators[inputs[0].device.index]

    def call() -> None:
        key = repr(
            denoise.tile(subject.kernel.split(".")[1], subject.precision, D, M * B, kernels.chip(inputs[0].device))
        )
        if key not in graphs:
            # or the graph of another candidate would be replayed, and nothing compiled for this one
            ops_denoise.forget_graphs()
            made.sample(*inputs, generator=on_device)
            graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[key]):
                made.sample(*inputs, generator=on_device)
        graphs[key].replay()

    return call, error


def _rank(subject: Subject) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    from dhns_fast.scoring import rank_all, score_all

    narrow = subject.precision == "narrow"
    table = torch.randn(100_000, subject.width, device="cuda").to(torch.bfloat16 if narrow else torch.float32)
    query, target = table[:2048].clone(), torch.arange(2048, device="cuda")
    options: dict[str, Any] = {"backend": "triton", "precision": "tf32" if subject.precision == "tf32" else "ieee"}
    truth = query[:256].double() @ table[:1024].double().T

    def error(_: Any) -> float:
        return ((score_all(query[:256], table[:1024], **options).double() - truth).norm() / truth.norm()).item()

    return lambda: rank_all(query, table, target, **options), error


BOUNDS = {"ieee": 2e-6, "tf32": 2e-3, "bf16": 2e-2, "narrow": 2e-6}


def compile_all(
    arch: int, processes: int | None, widths: Sequence[int] = WIDTHS, first: int | None = None
) -> dict[tuple[Subject, int], aot.Report | str]:
    """A report of every candidate, or why there is none."""
    jobs = [
        (number, place)
        for number, subject in enumerate(subjects())
        if subject.width in widths
        for place in range(len(subject.candidates[:first]))
    ]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_compile, *zip(*jobs, strict=True), itertools.repeat(arch), chunksize=2)
        reports = {}
        for (number, place), report in zip(jobs, found, strict=True):
            subject = subjects()[number]
            reports[subject, place] = report
            account = (
                report
                if isinstance(report, str)
                else f"{report.registers} registers, {report.spills} bytes of spills {report.problem}"
            )
            print(
                f"{subject.kernel} {subject.precision} {subject.width} {subject.candidates[place]}: {account}",
                flush=True,
            )
        return reports


def _compile(number: int, place: int, arch: int) -> aot.Report | str:
    subject = subjects()[number]
    try:
        return aot.compile_case(subject.case(subject.candidates[place]), arch)
    except Exception as error:  # a compiler's failure is a candidate less
        return f"{type(error).__name__}: {str(error)[-200:]}"


def run_all(reports: dict[tuple[Subject, int], Any], processes: int | None, seconds: float) -> None:
    """Run what has been compiled without spills once, for Triton's cache on disk: a launch has variants (with noise, at
    a level, ...) of which the ahead-of-time compilation knows one. What is not begun by then compiles when it is timed.
    """
    places = [(subjects().index(subject), place) for subject, place in fit(reports)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_run, *place): f"{subjects()[place[0]]}: candidate {place[1]}" for place in places}
        # Nothing is chosen for it, but it is measured next.
        jobs |= {
            pool.submit(_run_narrow, precision): f"a chain of width 64, {precision}"
            for precision in ("bf16", "tf32", "ieee")
        }
        done, late = wait(jobs, seconds)
        for job in late:
            job.cancel()
        for job in done:
            if failure := job.exception() or job.result():
                print(f"{jobs[job]} fails: {failure}", flush=True)
        if late:
            print(f"{len(late)} of {len(jobs)} have not run in {seconds:.0f} s", flush=True)


def fit(reports: dict[tuple[Subject, int], Any]) -> list[tuple[Subject, int]]:
    """What compiles and does not spill."""
    return [key for key, report in reports.items() if not isinstance(report, str) and not report.spills]


def _run(number: int, place: int) -> str:
    subject = subjects()[number]

    def once() -> None:
        kernels._table = lambda _: _chosen
        _use(subject, subject.candidates[place])
        call, error = subject.prepare()
        call()
        error(None)

    return _failure(once)


def _run_narrow(precision: str) -> str:
    """A chain that one kernel takes whole."""
    from dhns_fast.sampler import DiffHEG

    def once() -> None:
        made = DiffHEG(64, 8, 64, 6.0, 2.0, levels=LEVELS, precision=precision, backend="triton").cuda()
        h, r, t = (torch.randn(*shape, device="cuda") for shape in ((3, 500, 64), (500, 64), (3, 500, 64)))
        made.sample(h, r, t)

    return _failure(once)


def _failure(run: Callable[[], None]) -> str:
    """Why it fails, or nothing: a failure is a candidate less."""
    try:
        run()
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:120]}"
    return ""


def times(calls: dict[int, Callable[[], Any]]) -> dict[int, float]:
    """Median microseconds of each call, the calls taking turns."""
    found: dict[int, list[float]] = {place: [] for place in calls}
    for turn in range(ROUNDS + 1):
        for place, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            if turn:
                found[place].append(start.elapsed_time(end) * 1e3 / CALLS)
    return {place: statistics.median(values) for place, values in found.items()}


def tune(reports: dict[tuple[Subject, int], Any], end: float) -> Iterator[dict[str, Any]]:
    """An entry of the table for each subject, as long as there is time."""
    kept = set(fit(reports))
    for subject in (subject for subject in subjects() if (subject, 0) in reports):
        if time.monotonic() > end:
            print(f"out of time before {subject}")
            return
        call, error = subject.prepare()
        calls: dict[int, Callable[[], Any]] = {}
        for place, candidate in enumerate(subject.candidates):
            if (subject, place) not in kept:
                continue

            def run(candidate: Any = candidate, subject: Subject = subject, call: Callable[[], Any] = call) -> Any:
                _use(subject, candidate)
                return call()

            try:
                run()
                found = error(None)
            except Exception as failure:
                print(f"{subject}: {candidate} fails: {type(failure).__name__}: {str(failure)[:120]}")
                continue
            if not found <= BOUNDS[subject.precision]:
                print(f"{subject}: {candidate} is wrong by {found:.1e}")
                continue
            calls[place] = run
        if not calls:
            continue
        timed = times(calls)
        best = min(timed, key=timed.__getitem__)
        print(
            f"{subject.kernel} {subject.precision} {subject.width}: "
            + ", ".join(f"{place}: {us:.0f}" for place, us in timed.items())
        )
        _use(subject, subject.candidates[best])
        yield {
            **dataclasses.asdict(subject),
            "configuration": dataclasses.asdict(subject.candidates[best]),
            "us": round(timed[best], 1),
        }


_chosen: dict[tuple[str, str, int], dict[str, Any]] = {}


def _use(subject: Subject, candidate: Any) -> None:
    _chosen[subject.kernel, subject.precision, kernels.bucket(subject.width)] = dataclasses.asdict(candidate)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS, help="of embeddings")
    parser.add_argument("--first", type=int, default=None, help="candidates of each kernel, precision and width")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--jobs", type=int, default=None, help="processes that compile; by default one a core")
    parser.add_argument("--output", type=Path, default=None, help="the table; by default kernels/tuned/sm_*.json")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    arch = 90 if options.dry else kernels.chip(torch.device("cuda"))
    reports = compile_all(arch, options.jobs, options.widths, options.first)
    failed = [key for key, report in reports.items() if isinstance(report, str)]
    spilling = [key for key, report in reports.items() if not isinstance(report, str) and report.spills]
    print(
        f"{len(reports)} candidates for sm_{arch} in {time.monotonic() - start:.0f} s: {len(failed)} do not compile, {len(spilling)} spill"
    )
    first = [subject for subject, place in failed + spilling if place == 0]
    for subject in first:
        print(f"the rule for {subject} does not compile without spills")
    if options.dry:
        return int(bool(first))
    kernels._table = lambda _: _chosen  # what is tried is what launchers find
    # Half of what is left, so that the other half is there to time.
    run_all(reports, options.jobs, (start + options.seconds - time.monotonic()) / 2)
    print(f"compiled and run once after {time.monotonic() - start:.0f} s")
    output = options.output or kernels.TUNED / f"sm_{arch}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "chip": f"sm_{arch}",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    choices = []
    for entry in tune(reports, start + options.seconds):
        choices.append(entry)
        output.write_text(json.dumps({**about, "choices": choices}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
