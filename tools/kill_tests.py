"""Kills what the package writes, fills the disk under it and lets two processes race for it, and counts what was lost:
nothing may be.

    python tools/kill_tests.py                      # everything, about a quarter of an hour on one core
    python tools/kill_tests.py train disk --times 20

Commands run in forks of one process that has imported torch, so that a kill costs no start. Linux only; the tests of a
full disk mount a small tmpfs where that is allowed (root), and otherwise fail writes one by one alone. Exits with 1
when anything was lost, torn or answered with another exit code than the documented one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dhns_fast import cli, files
from dhns_fast.data import synthetic, write
from dhns_fast.ops import build
from dhns_fast.train import checkpoint, distributed
from dhns_fast.train.config import TrainConfig

SMALL = ["--dim", "16", "--batch-size", "60", "--num-negatives", "8", "--diffusion-steps", "6", "--device", "cpu"]
TRAIN = [
    "--model",
    "complex",
    "--method",
    "dhns",
    "--epochs",
    "12",
    "--validate-every",
    "2",
    "--checkpoint-every",
    "0.001",
    *SMALL,
]
COMPARE = [
    "--models",
    "distmult",
    "--methods",
    "uniform,self-adversarial",
    "--seeds",
    "2",
    "--epochs",
    "1",
    "--validate-every",
    "1",
    *SMALL,
]
# Of commands whose every file is tried in turn.
SHORT = ["--model", "complex", "--method", "dhns", "--epochs", "2", "--validate-every", "1", *SMALL]
CHANGES_BY_THE_CLOCK = ("seconds", "epoch_seconds", "training_seconds")
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo fake; exit; fi
sleep 0.0$(($$ % 10))
while [ "$1" != -o ]; do shift; done
echo "$2" > "$2"
"""


class Lost(Exception):
    """Something that was written is gone, torn, or different."""


class Child:
    """A fork that runs a function and exits with what it returns."""

    def __init__(self, function: Callable[[], int], log: Path) -> None:
        self.log = log
        self.begin = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = function()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.monotonic() - self.begin
        return os.waitstatus_to_exitcode(status)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Workshop:
    """A graph, folders, and what runs give that nobody disturbs."""

    def __init__(self, folder: Path, seed: int, only: tuple[str, ...]) -> None:
        self.folder, self.rng, self.only = folder, random.Random(seed), only
        self.graph = folder / "graph"
        write(synthetic(60, 4, 500, {"text": 8}, seed=0, valid_fraction=0.08, test_fraction=0.08), self.graph)
        self.numbers = iter(range(10**9))
        # How long a run takes decides when it is killed: the first one may compile operators, and has no say in it.
        self.expected = self.digest(self.train(self.fresh()))
        begin = time.monotonic()
        self.train(self.fresh())
        self.seconds = time.monotonic() - begin

    def fresh(self, parent: Path | None = None) -> Path:
        return (parent or self.folder) / f"run{next(self.numbers)}"

    def start(self, words: Sequence[object], before: Callable[[], object] = lambda: None) -> Child:
        def run() -> int:
            before()
            return cli.main([str(word) for word in words])

        return Child(run, self.folder / f"log{next(self.numbers)}")

    def start_training(self, output: Path, before: Callable[[], object] = lambda: None) -> Child:
        return self.start(["train", "--data", self.graph, *TRAIN, "--output", output], before)

    def resume(self, folder: Path) -> Child:
        return self.start(["train", "--resume", folder])

    def train(self, output: Path) -> Path:
        expect(self.start_training(output), 0)
        return output

    def digest(self, folder: Path) -> str:
        """Of everything that a finished run says, but for times."""
        whole(folder)
        digest = hashlib.sha256()
        for name in ("best", "last"):
            with (folder / f"{name}.safetensors").open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                del header["__metadata__"]
                digest.update(json.dumps(header, sort_keys=True).encode() + file.read())
        metrics = json.loads((folder / "metrics.json").read_text())
        # A loss that is reported may differ in its last digit: sums in torch depend on where memory happens to begin.
        history = [
            {name: f"{float(x or 0):.5g}" for name, x in row.items()}
            for row in csv.DictReader((folder / "history.csv").open())
        ]
        digest.update(json.dumps([timeless(metrics), timeless(history)]).encode())
        return digest.hexdigest()

    def settle(self, folder: Path) -> str:
        """Continue a disturbed run to its end, or begin it again where it had not saved anything; its result must be
        the undisturbed one.
        """
        whole(folder)
        saved = (folder / "last.safetensors").exists()
        if not saved:
            shutil.rmtree(folder, ignore_errors=True)
            self.train(folder)
        else:
            expect(self.resume(folder), 0)
        if self.digest(folder) != self.expected:
            raise Lost(f"{folder}: another result than undisturbed")
        tidy(folder)
        return "continued" if saved else "begun again"


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in CHANGES_BY_THE_CLOCK}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def expect(child: Child, *codes: int) -> str:
    code = child.wait()
    if code not in codes:
        raise Lost(f"exit code {code}, expected {codes}: {child.text()[-500:]}")
    if "Traceback" in child.text():
        raise Lost(f"a traceback: {child.text()[-2000:]}")
    return child.text()


def whole(folder: Path) -> None:
    """Every file under its final name is complete."""
    for path in folder.rglob("*") if folder.exists() else ():
        if path.name.startswith(files.PREFIX) or path.name == files.LOCK or path.is_dir():
            continue
        try:
            if path.suffix == ".safetensors" and path.stem not in ("best", "last"):
                load_file(path)  # embeddings or features: plain, for other programs
            elif path.suffix == ".safetensors" and path.parent == folder:
                header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
                graph = json.loads(header["__metadata__"]["dhns_fast"])["graph"]
                checkpoint.load(path, graph)
            elif path.name == "config.yaml":
                TrainConfig.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv" and not path.read_text().endswith("\n"):
                raise ValueError("the last line has no end")
            elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                raise ValueError("the image has no end")
        except Exception as error:
            raise Lost(f"{path} is torn: {error}") from error


def tidy(folder: Path) -> None:
    left = [path.name for path in folder.rglob("*") if path.name.startswith(files.PREFIX) or path.name == files.LOCK]
    if left:
        raise Lost(f"{folder} holds leftovers {left}")


def kill_training(shop: Workshop) -> str:
    folder = shop.fresh()
    child = shop.start_training(folder)
    time.sleep(shop.rng.uniform(0, shop.seconds))
    child.send(signal.SIGKILL)
    finished = child.wait() == 0
    if finished and (folder / "metrics.json").exists():
        return "had finished"
    outcome = shop.settle(folder)
    shutil.rmtree(folder)
    return outcome


def kill_saving(shop: Workshop) -> str:
    """A checkpoint that is saved again and again, each time with other content."""
    path = shop.fresh() / "last.safetensors"
    path.parent.mkdir()

    def save() -> int:
        for i in range(10**9):
            checkpoint.save(path, {"x": torch.full((300_000,), float(i))}, {"graph": {}, "i": i})
        return 0

    child = Child(save, shop.folder / f"log{next(shop.numbers)}")
    time.sleep(shop.rng.uniform(0, 0.1))
    child.send(signal.SIGKILL)
    child.wait()
    existed = path.exists()
    if existed:
        tensors, meta = checkpoint.load(path, {})
        if not bool((tensors["x"] == meta["i"]).all()):
            raise Lost(f"{path}: tensors of another save than its header")
    checkpoint.save(path, {}, {"graph": {}})
    tidy_in_new_process(shop, path.parent)
    shutil.rmtree(path.parent)
    return "whole" if existed else "not yet there"


def tidy_in_new_process(shop: Workshop, folder: Path) -> None:
    """A process sweeps a folder once; this one may have done so before."""

    def sweep() -> int:
        files.sweep(folder)
        return 0

    expect(Child(sweep, shop.folder / f"log{next(shop.numbers)}"), 0)
    tidy(folder)


def kill_comparing(shop: Workshop) -> str:
    folder, words = shop.fresh(), ["compare", "--data", shop.graph, *COMPARE, "--output"]
    if not hasattr(shop, "compared_seconds"):
        begin, undisturbed = time.monotonic(), shop.fresh()
        expect(shop.start([*words, undisturbed]), 0)
        shop.compared_seconds = time.monotonic() - begin  # type: ignore[attr-defined]
        shop.compared = timeless(list(csv.DictReader((undisturbed / "compare.csv").open())))  # type: ignore[attr-defined]
    child = shop.start([*words, folder])
    time.sleep(shop.rng.uniform(0, shop.compared_seconds))  # type: ignore[attr-defined]
    child.send(signal.SIGKILL)
    child.wait()
    whole(folder)
    kept = {path: path.stat().st_ino for path in folder.glob("*.json")}
    text = expect(shop.start([*words, folder]), 0)
    if text.count("(kept)") != len(kept) or any(path.stat().st_ino != inode for path, inode in kept.items()):
        raise Lost(f"{folder}: a finished run was trained again")
    if timeless(list(csv.DictReader((folder / "compare.csv").open()))) != shop.compared:  # type: ignore[attr-defined]
        raise Lost(f"{folder}: another table than undisturbed")
    tidy(folder)
    shutil.rmtree(folder)
    return f"{len(kept)} of 4 kept"


def kill_building(shop: Workshop) -> str:
    """With a compiler that takes some hundredths of a second a file."""
    cache, source, script = shop.fresh(), shop.folder / "csrc", shop.folder / "compiler"
    if not source.exists():
        source.mkdir()
        for name in ("a_cpu.cpp", "b_cpu.cpp", "a_binding.cpp"):
            (source / name).write_text("")
        script.write_text(COMPILER)
        script.chmod(0o755)

    def make() -> int:
        os.environ |= {"CXX": str(script), "DHNS_FAST_CACHE": str(cache)}
        build.source_folder = lambda: source
        build._nvcc = lambda: None
        print(build.build())
        return 0

    child = Child(make, shop.folder / f"log{next(shop.numbers)}")
    time.sleep(shop.rng.uniform(0, 0.5))
    child.send(signal.SIGKILL)
    child.wait()
    before = sorted(path.name for path in cache.glob("*/*.so"))
    library = Path(expect(Child(make, shop.folder / f"log{next(shop.numbers)}"), 0).splitlines()[-1])
    if not build._intact(library):
        raise Lost(f"{library} is damaged")
    left = [
        path.name for path in cache.iterdir() if path.name not in (library.parent.name, f"{library.parent.name}.lock")
    ]
    if left:
        raise Lost(f"{cache} holds leftovers {left}")
    shutil.rmtree(cache)
    return "had finished" if before == [library.name] else "built again"


def terminate(shop: Workshop, number: int = signal.SIGTERM, presses: int = 1) -> str:
    folder = shop.fresh()
    child = shop.start_training(folder)
    # Before this a fork has no handler yet; starts are tested by `early`.
    time.sleep(shop.rng.uniform(0.05, shop.seconds))
    with contextlib.suppress(ProcessLookupError):
        for _ in range(presses):
            child.send(number)
            time.sleep(0.02)
    text = expect(child, 0, 128 + number)
    if "Written to" in text:
        return "had finished"
    saved = (folder / "last.safetensors").exists()
    if saved and f"continue with: dhns-fast train --resume {folder}" not in text:
        raise Lost(f"{folder}: the message does not say how to continue: {text[-300:]}")
    tidy(folder)
    outcome = shop.settle(folder)
    shutil.rmtree(folder)
    return outcome


def early(shop: Workshop) -> str:
    """Ctrl-C while a real process starts."""
    command = [
        sys.executable,
        "-m",
        "dhns_fast",
        "train",
        "--data",
        str(shop.graph),
        *TRAIN,
        "--output",
        str(shop.fresh()),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(shop.rng.uniform(0.06, 3))
    for _ in range(3):
        child.send_signal(signal.SIGINT)
        time.sleep(0.03)
    text, _ = child.communicate()
    if child.returncode != 130 or "Traceback" in text:
        raise Lost(f"exit code {child.returncode}: {text[-1500:]}")
    return "interrupted"


@contextlib.contextmanager
def small_disk(shop: Workshop, size: int) -> Iterator[Path]:
    folder = shop.fresh()
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_disk(shop: Workshop) -> str:
    """A disk that is full at a random moment: exit code 1 with one line, nothing torn, and with more room the run goes
    on.
    """
    with small_disk(shop, shop.rng.randrange(1 << 12, 1 << 20, 1 << 12)) as disk:
        folder = disk / "run"
        text = expect(shop.start_training(folder), 0, 1, 2)
        if "Written to" in text:
            return "fitted"
        if "No space left on device" not in text:
            raise Lost(f"the message does not say that the disk is full: {text[-500:]}")
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        return shop.settle(folder)


def break_nth(n: int) -> None:
    """From now on the n-th file that this process writes fails half way."""
    made, real = iter(range(10**6)), files._temporary

    def temporary(parent: Path) -> Any:
        path, file = real(parent)
        if next(made) == n:

            def full(data: Any) -> int:
                os.write(file.fileno(), bytes(data[: len(data) // 2]))
                raise OSError(28, "No space left on device")

            return path, Proxy(file, full)
        return path, file

    files._temporary = temporary  # type: ignore[assignment]


def fail_writes(shop: Workshop) -> Counter[str]:
    """Every file that a run writes, in turn: half of it is written, then the disk is full."""
    outcomes: Counter[str] = Counter()
    for n in range(10**6):
        folder = shop.fresh()
        text = expect(shop.start_training(folder, lambda n=n: break_nth(n)), 0, 1)  # type: ignore[misc]
        if "Written to" in text:
            return outcomes
        line = next(line for line in text.splitlines() if "could not be written" in line)
        name = line.split(" could not")[0].rpartition("/")[2]
        outcomes[f"{name}, {shop.settle(folder)}"] += 1
        shutil.rmtree(folder)
    return outcomes


def writing_commands(shop: Workshop) -> dict[str, tuple[Callable[[Path], Sequence[object]], Callable[[Path], object]]]:
    """Every other command that writes: its words for an output, and what there must be before it."""
    if not hasattr(shop, "finished"):
        shop.finished = shop.train(shop.fresh())  # type: ignore[attr-defined]
        shop.begun = shop.fresh()  # type: ignore[attr-defined]
        child = shop.start(["train", "--data", shop.graph, *SHORT, "--epochs=3", "--output", shop.begun])  # type: ignore[attr-defined]
        while not (shop.begun / "last.safetensors").exists():  # type: ignore[attr-defined]
            time.sleep(0.005)
        child.send(signal.SIGKILL)
        child.wait()
        (shop.folder / "features.pkl").write_bytes(pickle.dumps({f"e{i}": [float(i), 1.0] for i in range(60)}))
    run, nothing = shop.finished, lambda output: None  # type: ignore[attr-defined]
    exported = {
        f"export --to {to}": (functools.partial(_export, run, to), nothing)
        for to in ("npy", "safetensors", "word2vec", "projector")
    }
    commands: dict[str, tuple[Callable[[Path], Sequence[object]], Callable[[Path], object]]] = {
        "train --resume": (lambda o: ["train", "--resume", o], lambda o: shutil.copytree(shop.begun, o)),  # type: ignore[attr-defined]
        "train --log": (lambda o: ["train", "--data", shop.graph, *SHORT, "--log", "csv", "--output", o], nothing),
        "compare": (lambda o: ["compare", "--data", shop.graph, *COMPARE, "--output", o], nothing),
        **exported,
        "pack": (lambda o: ["pack", "--run", run, "--output", o / "packed"], Path.mkdir),
        "data --export": (lambda o: ["data", "--data", shop.graph, "--export", o], nothing),
        "data --convert": (lambda o: ["data", "--data", shop.graph, "--convert", o], nothing),
        "convert": (
            lambda o: ["convert", shop.folder / "features.pkl", o / "m.safetensors", "--allow-pickle"],
            nothing,
        ),
    }
    return {name: what for name, what in commands.items() if name.startswith(shop.only)}


def _export(run: Path, to: str, output: Path) -> Sequence[object]:
    return ["export", "--run", run, "--to", to, "--output", output]


def content_of(folder: Path) -> dict[str, str]:
    """Digests of the files of an output, without what tells the time."""
    whole(folder)
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(folder)), path.read_bytes()
            if path.suffix == ".safetensors" and path.stem in ("best", "last"):
                data = data[8 + int.from_bytes(data[:8], "little") :]
            elif path.name == "metrics.json" or (path.suffix == ".json" and b'"result"' in data):
                content = timeless(json.loads(data))
                content.pop(files.CHECKSUM, None)
                content.get("result", {}).pop("step_cpu_ms", None)
                data = json.dumps(content).encode()
            elif path.name in ("history.csv", "report.html") or path.suffix in (".csv", ".md", ".png", ".yaml"):
                data = b"read by `whole` alone"
            out[name] = hashlib.sha256(data).hexdigest()
    return out


def fail_commands(shop: Workshop) -> Counter[str]:
    """Every file of every other command, in turn: exit code 1, nothing torn, and the command is done when it is given
    again.
    """
    outcomes: Counter[str] = Counter()
    for name, (words, prepare) in writing_commands(shop).items():
        undisturbed = done(shop, words, prepare)
        expected = content_of(undisturbed)
        for n in range(10**6):
            output = shop.fresh()
            prepare(output)
            before = sorted(output.rglob("*")) if output.exists() else []
            child = shop.start(words(output), lambda n=n: break_nth(n))  # type: ignore[misc]
            text = expect(child, 0, 1)
            if "could not be written" not in text:
                break
            settle_command(name, shop, words(output), output, before, expected)
            outcomes[name] += 1
            shutil.rmtree(output)
        print(f"  {name}: {outcomes[name]} files", flush=True)
    return outcomes


def done(shop: Workshop, words: Callable[[Path], Sequence[object]], prepare: Callable[[Path], object]) -> Path:
    """The folder in which a command has run undisturbed."""
    folder = shop.fresh()
    prepare(folder)
    expect(shop.start(words(folder)), 0)
    return folder


# Commands whose files are nothing by themselves.
TOGETHER = ("export", "data", "convert", "pack")


def settle_command(
    name: str, shop: Workshop, words: Sequence[object], output: Path, before: list[Path], expected: dict[str, str]
) -> None:
    """After a failure: no half of it, and done by the same command."""
    whole(output) if output.exists() else None
    tidy(output)
    left = sorted(path for path in output.rglob("*") if path.is_file()) if output.exists() else []
    if name.startswith(TOGETHER) and left != [path for path in before if path.is_file()]:
        raise Lost(f"{name}: {[path.name for path in left]} are a half of what belongs together")
    if name == "train --log" and output.exists():
        words = ["train", "--resume", output, "--log", "csv"]
        if not (output / "last.safetensors").exists():
            return
    expect(shop.start(words), 0)
    found = content_of(output)
    if found != expected:
        raise Lost(f"{name}: other files than undisturbed: {sorted(found.items() ^ expected.items())[:3]}")


def fill_commands(shop: Workshop) -> Counter[str]:
    """The same commands on disks of several sizes, from nothing to nearly enough."""
    outcomes: Counter[str] = Counter()
    for name, (words, prepare) in writing_commands(shop).items():
        undisturbed = done(shop, words, prepare)
        expected = content_of(undisturbed)
        needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in undisturbed.rglob("*") if path.is_file())
        for share in (0.02, 0.3, 0.6, 0.95):
            with small_disk(shop, max(8192, int(needed * share) // 4096 * 4096)) as disk:
                output = disk / "output"
                try:
                    prepare(output)
                except OSError:
                    continue
                before = sorted(output.rglob("*")) if output.exists() else []
                text = expect(shop.start(words(output)), 0, 1, 2)
                if "No space left on device" not in text:
                    outcomes[f"{name}, fitted"] += 1
                    continue
                subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
                settle_command(name, shop, words(output), output, before, expected)
                outcomes[name] += 1
    return outcomes


class Proxy:
    """A file whose writes fail."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def race(shop: Workshop) -> str:
    """Two starts into one folder, or two continuations of one run."""
    folder, again = shop.fresh(), shop.rng.random() < 0.5
    if again:
        child = shop.start_training(folder)
        while not (folder / "last.safetensors").exists():
            time.sleep(0.005)
        child.send(signal.SIGKILL)
        child.wait()
    both = [shop.resume(folder) if again else shop.start_training(folder) for _ in range(2)]
    codes, texts = [child.wait() for child in both], [child.text() for child in both]
    if sorted(codes) not in ([0, 2], [0, 0] if again else [0, 2]) or any("Traceback" in text for text in texts):
        raise Lost(f"exit codes {codes}: {texts[0][-300:]} {texts[1][-300:]}")
    if 2 in codes and (loser := texts[codes.index(2)]) and "is writing to" not in loser and "holds a run" not in loser:
        raise Lost(f"the loser does not say why: {loser[-300:]}")
    if shop.digest(folder) != shop.expected:
        raise Lost(f"{folder}: another result than undisturbed")
    tidy(folder)
    shutil.rmtree(folder)
    return ("continuations" if again else "starts") + (", one refused" if 2 in codes else ", one after the other")


class Pair:
    """Two processes that train together, as a launcher starts them."""

    options = ("--optimiser", "lazy-adam")

    def __init__(
        self, shop: Workshop, words: Sequence[object], before: Callable[[int], object] = lambda rank: None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def enter(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            before(rank)

        self.both = [shop.start(words, functools.partial(enter, rank)) for rank in range(2)]

    @classmethod
    def training(cls, shop: Workshop, folder: Path, before: Callable[[int], object] = lambda rank: None) -> Pair:
        return cls(shop, ["train", "--data", shop.graph, *TRAIN, *cls.options, "--output", folder], before)

    def codes(self) -> list[int]:
        return [child.wait() for child in self.both]

    def end(self, victim: int) -> None:
        """One has died or will by itself; the other is ended as the launcher does it, which does not wait for it."""
        self.both[victim].wait()
        other = self.both[1 - victim]
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                if os.waitpid(other.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.02)
            other.send(number)
        other.wait()

    def expect(self, *codes: int) -> list[str]:
        found = self.codes()
        texts = [child.text() for child in self.both]
        if any(code not in codes for code in found) or any("Traceback" in text for text in texts):
            raise Lost(f"exit codes {found}, expected {codes}: {texts[0][-1000:]} | {texts[1][-1000:]}")
        return texts


def weights(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the meta of what several processes have saved, as one reads them."""
    from torch.distributed.checkpoint import filesystem, state_dict_loader

    found = json.loads((folder / f"{name}.json").read_text())
    where = folder / found["folder"]
    stored = filesystem.FileSystemReader(where).read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(tuple(value.size), 7).to(value.properties.dtype)  # type: ignore[union-attr]
        for key, value in stored.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process is what is meant
        state_dict_loader.load(tensors, checkpoint_id=where, no_dist=True)
    return tensors, found["meta"]


def together(shop: Workshop, folder: Path) -> str:
    """What a finished run of two processes says, but for times."""
    digest = hashlib.sha256()
    for name in ("best", "last"):
        for key, x in sorted(weights(folder, name)[0].items()):
            digest.update(key.encode() + x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    metrics = timeless(json.loads((folder / "metrics.json").read_text()))
    digest.update(json.dumps(metrics).encode())
    return digest.hexdigest()


def undisturbed(shop: Workshop) -> tuple[str, int]:
    """Of two processes: their result, and how often they save."""
    if not hasattr(shop, "together"):
        folder, saves = shop.fresh(), shop.folder / "saves"

        def count(rank: int) -> None:
            if rank == 0:
                around_saves(lambda n: saves.write_text(str(n + 1)))

        Pair.training(shop, folder, count).expect(0)
        shop.together = together(shop, folder), int(saves.read_text())  # type: ignore[attr-defined]
    return shop.together  # type: ignore[attr-defined]


def around_saves(before: Callable[[int], object]) -> None:
    """`before` is called with the number of each save, from 0, before it begins."""
    real, numbers = distributed.save, iter(range(10**9))

    def save(*arguments: Any) -> Path:
        before(next(numbers))
        return real(*arguments)

    distributed.save = save  # type: ignore[assignment]


def go_on(shop: Workshop, folder: Path) -> str:
    """Continue a disturbed run of two processes; what it had saved is whole, and its end is the undisturbed one."""
    whole(folder)
    step = -1
    for name in ("last", "best"):
        if (folder / f"{name}.json").exists():
            meta = weights(folder, name)[1]
            step = max(step, meta.get("progress", {}).get("step", -1))
    if step < 0:
        shutil.rmtree(folder, ignore_errors=True)
        Pair.training(shop, folder).expect(0)
    else:
        Pair(shop, ["train", "--resume", folder]).expect(0)
    if together(shop, folder) != undisturbed(shop)[0]:
        raise Lost(f"{folder}: another result than undisturbed")
    tidy(folder)
    shutil.rmtree(folder)
    return "begun again" if step < 0 else "continued"


def kill_worker(shop: Workshop, saving: bool = True) -> str:
    """One of two processes is killed, in a save or at any moment."""
    _, saves = undisturbed(shop)
    folder, victim = shop.fresh(), shop.rng.randrange(2)
    which, delay = shop.rng.randrange(saves), shop.rng.uniform(0, 0.08)

    def die_in_a_save(rank: int) -> None:
        def soon(n: int) -> None:
            if n == which:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

        if rank == victim and saving:
            around_saves(soon)

    pair = Pair.training(shop, folder, die_in_a_save)
    if not saving:
        time.sleep(shop.rng.uniform(0, 3 * shop.seconds))
        pair.both[victim].send(signal.SIGKILL)
    pair.end(victim)
    if (folder / "metrics.json").exists():
        return "had finished"
    return go_on(shop, folder)


def fill_disk_of_two(shop: Workshop) -> str:
    """The disk is full at a random moment: both say so and end with exit code 1."""
    undisturbed(shop)
    with small_disk(shop, shop.rng.randrange(1 << 14, 1 << 19, 1 << 12)) as disk:
        folder = disk / "run"
        texts = Pair.training(shop, folder).expect(0, 1, 2)
        if "Written to" in texts[0]:
            return "fitted"
        if not any("No space left on device" in text for text in texts):
            raise Lost(f"no message says that the disk is full: {texts[0][-500:]} | {texts[1][-500:]}")
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        return go_on(shop, folder)


def forbid_two(shop: Workshop) -> str:
    """The folder turns read-only as a save begins or a little later: all say so and end with exit code 1 or 2."""
    _, saves = undisturbed(shop)
    folder, which, delay = shop.fresh(), shop.rng.randrange(saves), shop.rng.uniform(0, 0.05)
    # Permissions do not stop root; a mount does, and open files do not stop a mount.
    folder.mkdir()

    def forbid() -> None:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    def forbid_in_a_save(rank: int) -> None:
        def soon(n: int) -> None:
            if n == which:
                threading.Timer(delay, forbid).start()

        if rank == 0:
            around_saves(soon)

    try:
        texts = Pair.training(shop, folder / "run", forbid_in_a_save).expect(0, 1, 2)
    finally:
        # Where nothing was mounted, it says so.
        subprocess.run(["umount", folder], check=False, capture_output=True)
    if "Written to" in texts[0]:
        return "had finished"
    if not any("Read-only file system" in text for text in texts):
        raise Lost(f"no message says that nothing can be written: {texts[0][-500:]} | {texts[1][-500:]}")
    return go_on(shop, folder / "run")


PARTS: dict[str, tuple[int, str, Callable[[Workshop], str | Counter[str]]]] = {
    "train": (100, "SIGKILL while training", kill_training),
    "save": (100, "SIGKILL while saving", kill_saving),
    "compare": (100, "SIGKILL while comparing", kill_comparing),
    "build": (100, "SIGKILL while building", kill_building),
    "term": (20, "SIGTERM while training", terminate),
    "hup": (20, "SIGHUP while training", lambda shop: terminate(shop, signal.SIGHUP)),
    "int": (10, "Ctrl-C three times while training", lambda shop: terminate(shop, signal.SIGINT, 3)),
    "early": (10, "Ctrl-C three times while starting", early),
    "writes": (1, "every file of a run fails half way", fail_writes),
    "commands": (1, "every file of every other command fails half way", fail_commands),
    "disks": (1, "every other command on disks that are too small", fill_commands),
    "disk": (20, "a disk that is full at a random moment", fill_disk),
    "race": (20, "two processes on one folder", race),
    "two-save": (20, "SIGKILL of one of two processes while saving", kill_worker),
    "two-train": (10, "SIGKILL of one of two processes at any moment", lambda shop: kill_worker(shop, False)),
    "two-disk": (10, "a disk that is full under two processes", fill_disk_of_two),
    "two-forbidden": (10, "a folder that turns read-only under two processes", forbid_two),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--times", type=int, help="of each part, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="of the parts commands and disks: commands that begin so, by commas")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), options.seed, tuple(options.only.split(",")))
        for name in options.parts or PARTS:
            times, title, part = PARTS[name]
            outcomes: Counter[str] = Counter()
            lost = 0
            begin = time.monotonic()
            for _ in range(times if times == 1 else options.times or times):
                try:
                    outcome = part(shop)
                    outcomes.update(outcome if isinstance(outcome, Counter) else [outcome])
                except Lost as error:
                    lost += 1
                    print(f"{name}: {error}", flush=True)
                except (subprocess.CalledProcessError, FileNotFoundError) as error:
                    outcomes[f"not possible here ({error})"] += 1
                    break
            shown = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
            print(
                f"{title}: {sum(outcomes.values()) + lost} tries, {lost} lost; {shown} ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            failures += lost
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
