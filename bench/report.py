"""What the results of bench/ say: tables between markers of README and docs, charts, and whether a later run is slower.

Works on the JSON files alone (bench/results/SUITE-DEVICE-SIZE.json, written by `pytest --benchmark`;
bench/results/aot.json) and needs no torch. A document asks for a table with a pair of markers:
    <!-- bench:NAME -->
    <!-- /bench:NAME -->
where NAME is `demands-DEVICE` (every figure demanded and whether it is met), `all-DEVICE` (every suite at the
sizes reference and large, or at small where there is nothing larger), `SUITE-DEVICE-SIZE` (one of them), `aot` (what
kernels take) or `does-it-help` (what bench/does_it_help.py has found; `does-it-help-NAME` what it was told to keep
apart).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhns_fast import plots
from dhns_fast.cli import tables
from dhns_fast.errors import DataError, InputError, Shown

DEVICES = ("cpu", "cuda")
SIZES = ("small", "reference", "large")
NOT_MEASURED = "not yet measured"
NAME = re.compile(rf"(?P<suite>\w+)-(?P<device>{'|'.join(DEVICES)})(-(?P<size>{'|'.join(SIZES)}))?")
# A line of its own: prose that mentions a marker is no marker.
MARKER = re.compile(r"^<!-- (/?)bench:(\S+) -->$", re.MULTILINE)
# Medians closer than this are the same whatever their spread: clocks and neighbours move more from one run to the next.
SAME = 0.05
MEMORY = 0.1


@dataclass(frozen=True)
class Results:
    """One results file: a suite on a device at a size."""

    suite: str
    device: str
    size: str
    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def machine(self) -> str:
        """The device and what ran on it, in a few words."""
        about = self.about
        threads = "" if self.device == "cuda" else f", {about['threads']} threads"
        driver = re.search(r"\d+\.\d+[.\d]*", about["driver"] or "")
        clock = ", CPU seconds" if about.get("clock") == "cpu" else ""
        return f"{about['device']}{threads}{clock}, torch {about['torch']}{f', driver {driver[0]}' if driver else ''}"


def load_results(path: Path) -> list[Results]:
    """The results in a folder, or in one file; `aot.json` and files of other tools are passed over.

    Raises:
        DataError: the path does not exist, or a file is no results file.
    """
    if not path.exists():
        raise DataError(path, "does not exist; pytest --benchmark writes results into bench/results")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [_results(file) for file in files if not path.is_dir() or NAME.fullmatch(file.stem)]


def _results(file: Path) -> Results:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [{"work": {}, "demands": [], "curve": None, **row} for row in content.pop("rows")]
        # The name of a CPU says nothing of CUDA; the file's name does, and the version of CUDA that torch was built
        # with does not.
        match = NAME.fullmatch(file.stem)
        device = match["device"] if match else "cuda" if content["driver"] else "cpu"
        return Results(content["suite"], device, content["size"], content, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(file, f"not a results file of pytest --benchmark ({type(error).__name__}: {error})") from None


def update(documents: Sequence[Path], folder: Path, check: bool = False) -> list[Path]:
    """Write the tables that documents ask for.

    Args:
        documents: Markdown files; those without markers are left alone.
        folder: of the results.
        check: change nothing.

    Returns:
        the documents whose tables were out of date.

    Raises:
        DataError: a marker has no end or an unknown name, or a results file is damaged.
    """
    results = load_results(folder)
    stale = []
    for document in documents:
        text = document.read_text(encoding="utf-8")
        fresh = _filled(document, text, results, folder)
        if fresh != text:
            stale.append(document)
            if not check:
                document.write_text(fresh, encoding="utf-8")
    return stale


def _filled(document: Path, text: str, results: Sequence[Results], folder: Path) -> str:
    parts, position = [], 0
    markers = iter(MARKER.finditer(text))
    for begin in markers:
        name, end = begin[2], next(markers, None)
        line = text.count("\n", 0, begin.start()) + 1
        if begin[1] or end is None or end[0] != f"<!-- /bench:{name} -->":
            raise DataError(document, f"marker {begin[0]} is not followed by <!-- /bench:{name} -->", line)
        try:
            table = render(name, results, folder)
        except InputError as error:
            raise DataError(document, str(error), line) from None
        parts += [text[position : begin.end()], "\n", table, "\n"]
        position = end.start()
    return "".join([*parts, text[position:]])


def render(name: str, results: Sequence[Results], folder: Path) -> str:
    """The Markdown that stands between the markers of a name; "not yet measured" where there are no results.

    Raises:
        InputError: no table has this name.
    """
    if name == "aot":
        return _aot(folder / "aot.json")
    if name.startswith("does-it-help"):
        return _grid(folder / f"{name}.json")
    match = NAME.fullmatch(name)
    if match is None:
        raise InputError("bench", name, "aot, does-it-help, demands-DEVICE, all-DEVICE and SUITE-DEVICE-SIZE")
    here = [r for r in results if r.device == match["device"]]
    if match["suite"] == "demands":
        return _demands(here)
    if match["suite"] == "all":
        larger = {r.suite for r in here if r.size != "small"}
        shown = [r for r in here if r.size != "small" or r.suite not in larger]
        shown.sort(key=lambda r: (r.suite, SIZES.index(r.size)))
        return "\n\n".join(f"### {r.suite}, {r.size}\n\n{_suite(r)}" for r in shown) or NOT_MEASURED
    found = [r for r in here if (r.suite, r.size) == (match["suite"], match["size"])]
    return _suite(found[0]) if found else NOT_MEASURED


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], right: str = "") -> str:
    """Markdown; `right` names the columns of numbers."""
    rule = ["--:" if name in right.split("|") else "---" for name in header]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (header, rule, *lines))


def number(x: float | None) -> str:
    """Three digits, or the whole part where it has more; nothing for None."""
    return "" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"


def _source(results: Sequence[Results]) -> str:
    """Where the numbers are from, one line a machine and state of the tree."""
    groups: dict[str, list[str]] = {}
    for r in results:
        line = f"{r.machine}; commit {r.about['commit']}, {r.about['date'][:10]}; `{r.about['command']}`"
        # A run that was stopped: cases are missing.
        line += "" if r.about.get("complete", True) else "; stopped before its end"
        groups.setdefault(line, []).append(r.suite)
    return "\n".join(f"<sub>{', '.join(suites)}: {line}</sub><br>" for line, suites in groups.items()).removesuffix(
        "<br>"
    )


def met(demand: Mapping[str, Any]) -> bool:
    """Whether what was measured is what was demanded."""
    got = demand["got"]
    return got is not None and (got <= demand["limit"] if demand["most"] else got >= demand["limit"])


def _demands(results: Sequence[Results]) -> str:
    lines = []
    with_demands = [r for r in results if any(row["demands"] for row in r.rows)]
    for r in with_demands:
        for row in r.rows:
            for demand in row["demands"]:
                asked = f"{'at most' if demand['most'] else 'at least'} {number(demand['limit'])} {demand['what']}"
                verdict = "met" if met(demand) else "**not met**"
                lines.append(
                    (f"{row['case']}, {row['provider']}", asked, number(demand["got"]) or row["status"], verdict)
                )
    if not lines:
        return NOT_MEASURED
    return f"{_table(('case', 'demanded', 'measured', ''), lines, 'measured')}\n\n{_source(with_demands)}"


def _suite(results: Results) -> str:
    header = ("case", "provider", "ms (p20–p80)", "G/s", "of ceiling", "peak MB", "ratio", "")
    lines, case = [], ""
    for row in results.rows:
        times = f"{number(row['p50'])} ({number(row['p20'])}–{number(row['p80'])})" if row["p50"] is not None else ""
        rate = number(row["rate"] / 1e9) if row["rate"] else ""
        share = f"{row['percent']:.0f} % {row['bound']}" if row["percent"] else ""
        notes = ", ".join(f"{k} {x if isinstance(x, str) else number(x)}" for k, x in row["extra"].items())
        note = notes if row["status"] == "ok" else row["status"]
        shown = "" if row["case"] == case else row["case"]
        case = row["case"]
        lines.append((shown, row["provider"], times, rate, share, number(row["peak_mb"]), number(row["ratio"]), note))
    ceilings = ", ".join(f"{name} {number(rate / 1e9)}" for name, rate in results.about["ceilings"].items())
    table = _table(header, lines, "ms (p20–p80)|G/s|of ceiling|peak MB|ratio")
    return f"{table}\n\n{_source([results])}<br>\n<sub>ceilings measured in this run, G/s: {ceilings}</sub>"


def _aot(file: Path) -> str:
    if not file.exists():
        return NOT_MEASURED
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kernels: dict[str, dict[int, str]] = {}
        for r in content["kernels"]:
            problem = f" **{r['problem']}**" if r["problem"] else ""
            cell = f"{r['registers']}, {r['shared'] / 1024:.0f} kB, {', '.join(r['matrix']) or '–'}{problem}"
            if r.get("issued"):
                cell += f", {r['issued']:.2f} instructions a dimension"
            if r.get("barriers") is not None:
                cell += f", {r['barriers']} barriers a row"
            kernels.setdefault(r["kernel"], {})[r["arch"]] = cell
        tools = f"Triton {content['triton']}, nvcc {content['nvcc'] or 'not at hand'}"
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(file, f"not a report of bench/aot.py ({type(error).__name__}: {error})") from None
    archs = sorted({arch for cells in kernels.values() for arch in cells})
    lines = [(f"`{name}`", *(cells.get(arch, "") for arch in archs)) for name, cells in kernels.items()]
    head = "Registers, shared memory a block (CUDA C++ kernels: beside what the launch asks for), matrix instruction; no kernel spills."
    spilling = [f"`{name}`" for name, cells in kernels.items() if any("spills" in cell for cell in cells.values())]
    if spilling:
        head = head.replace("no kernel spills", f"spilling: {', '.join(spilling)}")
    return f"{head}\n\n{_table(('kernel', *(f'sm_{arch}' for arch in archs)), lines)}\n\n<sub>{tools}; `python bench/aot.py`</sub>"


def _grid(file: Path) -> str:
    if not file.exists():
        return NOT_MEASURED
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        used = [
            (cell["provenance"]["torch"], cell["provenance"]["device"], cell["provenance"]["threads"])
            for cell in content["cells"]
        ]
        source = "; ".join(
            f"torch {torch}, {device}, {threads} threads" for torch, device, threads in sorted(set(used))
        )
        command = "python bench/does_it_help.py" + (f" --name {file.stem}" if file.stem != "does-it-help" else "")
        return "\n".join([*content["table"], "", f"<sub>{len(used)} runs; {source}; `{command}`</sub>"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(file, f"not results of bench/does_it_help.py ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class Change:
    """One provider of one case in two runs.

    Attributes:
        case: suite, case and provider.
        before, after: median milliseconds, None where it was not timed.
        drift: what the rivals' medians changed by (the middle one), which ours must exceed to count.
        verdict: "same", "faster", "slower", "more memory", "lost: ..." or "new".
    """

    case: str
    before: float | None
    after: float | None
    drift: float
    verdict: str

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "more memory") or self.verdict.startswith("lost")


def compare(before: Sequence[Results], after: Sequence[Results]) -> list[Change]:
    """Our providers of two runs, case by case.

    A provider is slower when its medians are 5 % or more apart and the ranges p20 to p80 do not touch, as measured and
    also with the later run scaled by what the rivals of the same race changed by: a machine that is slower for
    everybody is no regression. It is lost when it was right and timed before and is wrong, unavailable or absent now.
    It takes more memory when its peak grew by a tenth and a megabyte.

    Raises:
        InputError: the runs have no case in common, or are of different machines.
    """
    olds, news = _by_suite(before), _by_suite(after)
    if not (common := [key for key in olds if key in news]):
        raise InputError(
            "after",
            Shown("a run that shares no suite, device and size with the other"),
            "two runs of one suite, device and size",
        )
    changes = []
    for key in common:
        old, new = olds[key], news[key]
        if (was := old.about["device"]) != (now := new.about["device"]):
            raise InputError("-".join(key), Shown(f"measured on {was} and on {now}"), "runs of one machine")
        old_rows, new_rows = ({(row["case"], row["provider"]): row for row in r.rows} for r in (old, new))
        for case, provider in old_rows | new_rows:
            if not provider.startswith("ours"):
                continue
            shifts = [
                new_rows[c, p]["p50"] / row["p50"]
                for (c, p), row in old_rows.items()
                if c == case
                and not p.startswith("ours")
                and row["p50"]
                and (c, p) in new_rows
                and new_rows[c, p]["p50"]
            ]
            drift = statistics.median(shifts) if shifts else 1.0
            a, b = old_rows.get((case, provider)), new_rows.get((case, provider))
            name = f"{key[0]}: {case}, {provider}"
            was_ms, now_ms = (None if row is None else row["p50"] for row in (a, b))
            changes.append(Change(name, was_ms, now_ms, drift, _verdict(a, b, drift)))
    return changes


def _by_suite(results: Sequence[Results]) -> dict[tuple[str, str, str], Results]:
    return {(r.suite, r.device, r.size): r for r in results}


def _verdict(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, drift: float) -> str:
    if a is None or a["p50"] is None:
        return "new" if b is not None and b["p50"] is not None else "same"
    if b is None or b["p50"] is None:
        return f"lost: {'absent' if b is None else b['status']}"
    scales = (1.0, drift)
    if all(b["p20"] / s > a["p80"] and b["p50"] / s > (1 + SAME) * a["p50"] for s in scales):
        return "slower"
    if a["peak_mb"] is not None and b["peak_mb"] is not None and b["peak_mb"] > (1 + MEMORY) * a["peak_mb"] + 1:
        return "more memory"
    if all(b["p80"] / s < a["p20"] and (1 + SAME) * b["p50"] / s < a["p50"] for s in scales):
        return "faster"
    return "same"


def draw(results: Sequence[Results], folder: Path) -> list[Path]:
    """Charts as PNG, by device: a roofline, time against B, D and E, memory against E; those that there are data for.
    Needs matplotlib.

    Returns:
        the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for device in DEVICES:
        here = [r for r in results if r.device == device]
        for name, panels in _charts(here):
            columns = min(3, len(panels))
            height = math.ceil(len(panels) / columns)
            figure, axes = plt.subplots(
                height, columns, figsize=(5.2 * columns, 3.9 * height), layout="constrained", squeeze=False
            )
            for axis in axes.flat[len(panels) :]:
                axis.set_visible(False)
            for axis, (title, fill) in zip(axes.flat, panels.items(), strict=False):
                fill(axis)
                axis.set(title=title, xscale="log", yscale="log")
                axis.grid(alpha=0.3, which="both")
                axis.legend(fontsize="x-small")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{device}.png"
            temporary = path.with_suffix(".tmp.png")
            # No version of matplotlib inside: the same figures give the same file.
            figure.savefig(temporary, dpi=110, metadata={"Software": None})
            os.replace(temporary, path)
            plt.close(figure)
            made.append(path)
    return made


def _charts(results: Sequence[Results]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name → panels by title, each a function that fills its axis."""
    placed = [r for r in results if any(_intensity(row) for row in r.rows)]
    if placed:
        yield "roofline", {placed[0].machine: lambda axis: _roofline(axis, placed)}
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in (row for r in results for row in r.rows if row["curve"] and row["p50"] is not None):
        curves.setdefault((row["curve"]["against"], row["curve"]["of"]), []).append(row)
    for against in ("B", "D", "E"):
        for name, key, label in (("time", "p50", "ms"), ("memory", "peak_mb", "peak MB")):
            if name == "memory" and against != "E":
                continue
            panels = {
                of: lambda axis, rows=rows, key=key, label=label, against=against: _curve(
                    axis, rows, key, label, against
                )
                for (a, of), rows in curves.items()
                if a == against
            }
            if panels:
                yield f"{name}-{against}", panels


def _curve(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, against: str) -> None:
    for provider in dict.fromkeys(row["provider"] for row in rows):
        # Sub-megabyte peaks are the allocator's, and zero has no place on a logarithmic axis.
        points = sorted(
            (row["curve"]["at"], max(row[key], 0.1))
            for row in rows
            if row["provider"] == provider and row[key] is not None
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=provider)
    axis.set(xlabel=against, ylabel=label)


def _intensity(row: Mapping[str, Any]) -> float | None:
    """Operations a byte."""
    work = row["work"]
    operations = next((work[name] for name in ("bf16", "tf32", "flop") if name in work), None)
    return operations / work["byte"] if operations and work.get("byte") and row["p50"] else None


def _roofline(axis: Any, results: Sequence[Results]) -> None:
    ceilings = {
        name: max(r.about["ceilings"].get(name, 0) for r in results) for name in ("byte", "flop", "tf32", "bf16")
    }
    rows = [
        (r.suite, row, x)
        for r in results
        for row in r.rows
        if row["provider"].startswith("ours") and (x := _intensity(row))
    ]
    reach = [min(x for *_, x in rows) / 4, max(x for *_, x in rows) * 4]
    for name in ("flop", "tf32", "bf16"):
        if ceilings[name]:
            ridge = ceilings[name] / ceilings["byte"]
            xs = sorted({reach[0], min(max(ridge, reach[0]), reach[1]), reach[1]})
            axis.plot(xs, [min(x * ceilings["byte"], ceilings[name]) / 1e9 for x in xs], color="gray", linewidth=1)
            axis.annotate(f"{'float32' if name == 'flop' else name} {ceilings[name] / 1e9:,.0f} G/s", (reach[1], ceilings[name] / 1e9),
                          ha="right", va="bottom", fontsize="x-small")  # fmt: skip
    for suite in dict.fromkeys(suite for suite, *_ in rows):
        points = [(x, x * row["work"]["byte"] / row["p50"] / 1e6) for s, row, x in rows if s == suite]
        axis.scatter(*zip(*points, strict=True), s=18, label=suite)
    axis.set(xlabel=f"operations a byte (copies: {ceilings['byte'] / 1e9:,.0f} GB/s)", ylabel="G operations/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where something is out of date or became worse, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    text = "fill the tables that documents ask for with <!-- bench:NAME --> markers, and draw the charts"
    sub = actions.add_parser("report", help=text, description=text)
    sub.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of the results")
    sub.add_argument(
        "--documents",
        type=Path,
        nargs="+",
        default=[Path("README.md"), Path("docs")],
        help="Markdown files and folders of such",
    )
    sub.add_argument("--charts", default="docs/img", help="folder for PNG charts; empty draws none")
    sub.add_argument("--check", action="store_true", help="write nothing, and exit with 1 when a table is out of date")
    text = "compare two runs of one machine; exit with 1 when something of ours became slower, larger or wrong"
    sub = actions.add_parser("compare", help=text, description=text)
    sub.add_argument("before", type=Path, help="results folder or file of the earlier run")
    sub.add_argument("after", type=Path, help="of the later run")
    options = parser.parse_args(argv)
    try:
        return _report(options) if options.action == "report" else _compare(options.before, options.after)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _report(options: argparse.Namespace) -> int:
    documents: list[Path] = []
    for path in options.documents:
        if not path.exists():
            raise InputError("--documents", str(path), "Markdown files and folders that exist")
        documents += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    stale = update(documents, options.results, options.check)
    if options.check:
        for path in stale:
            print(f"{path} is out of date; python -m bench report writes it", file=sys.stderr)
        return int(bool(stale))
    charts: list[Path] = []
    if options.charts and plots.available():
        charts = draw(load_results(options.results), Path(options.charts))
    elif options.charts:
        print("no charts: matplotlib cannot be imported (pip install 'dhns-fast[plot]')", file=sys.stderr)
    for path in [*stale, *charts]:
        print(f"Written: {path}")
    return 0


def _compare(before: Path, after: Path) -> int:
    changes = compare(load_results(before), load_results(after))
    columns = ("case", "ms before", "after", "after/before", "rivals", "verdict")
    table = tables.table(
        f"{before} and {after}: medians of ours; rivals: what theirs changed by", columns, text=("verdict",)
    )
    for c in changes:
        ratio = f"{c.after / c.before:.2f}" if c.after and c.before else ""
        table.add_row(c.case, *map(number, (c.before, c.after)), ratio, f"{c.drift:.2f}", c.verdict)
    tables.stdout().print(table)
    return int(any(c.regression for c in changes))
