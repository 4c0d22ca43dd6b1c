"""Files appear whole or not at all: killed and failing writers, leftovers, modes, full disks, locks."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dhns_fast import files
from dhns_fast.errors import InputError

WRITERS: dict[str, Callable[[Path, int], None]] = {
    "text": lambda path, n: files.write_text(path, "x" * n),
    "json": lambda path, n: files.write_json(path, ["x" * n]),
    "rows": lambda path, n: files.write_rows(path, [{"x": "x" * n}]),
    "tensors": lambda path, n: files.write_tensors(path, {"x": torch.zeros(n, dtype=torch.uint8)}, {"a": "b"}),
}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs locks")


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(writer: Callable[[Path, int], None], umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        writer(tmp_path / "file", 10)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_full_disk_leaves_what_was(writer: Callable[[Path, int], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer(path, 1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            files.WriteError, match=r"file could not be written: File too large \(what it held before is unchanged\)"
        ):
            writer(path, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folder_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "no" / "file", tmp_path / "taken"):
        with pytest.raises(files.WriteError, match=f"{path} could not be written"):
            files.write_text(path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_paths_that_are_no_text_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^folder: got '.*\\udcff'; accepted: a path in UTF-8"):
        files.make_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    assert not list(tmp_path.iterdir())


def test_an_error_or_an_interruption_leaves_what_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "before")

    def half(error: type[BaseException]) -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            half(error)
    assert path.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    def write(content: str, error: type[BaseException] | None = None) -> None:
        with files.together():
            files.write_text(tmp_path / "a", content)
            files.write_tensors(tmp_path / "b", {"x": torch.zeros(len(content))})
            with files.together():
                files.write_text(tmp_path / "c", content)
            # As if another process looked for leftovers.
            files._swept.clear()
            files.sweep(tmp_path)
            if error is not None:
                raise error

    write("before")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["a", "b", "c"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write("else", error)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write("else")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b", "c"]
    assert {(tmp_path / name).read_text() for name in "ac"} == {"else"}
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(files.WriteError, match="a could not be written"):
        write("third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_new_folder_goes_again_after_an_error(tmp_path: Path) -> None:
    def write(folder: Path, error: type[BaseException] | None = None) -> None:
        with files.together(folder):
            files.write_text(folder / "a", "content")
            if error is not None:
                raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write(tmp_path / "new", error)
    assert not list(tmp_path.iterdir())
    old = tmp_path / "old"
    old.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write(old, KeyboardInterrupt)
    assert old.is_dir()
    write(tmp_path / "new")
    assert (tmp_path / "new" / "a").read_text() == "content"


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "same")
    inode = path.stat().st_ino
    files.write_text(path, "same")
    assert path.stat().st_ino == inode
    files.write_text(path, "else")
    assert path.read_text() == "else"


def test_killed_writers_lose_nothing_and_their_leftovers_go(tmp_path: Path) -> None:
    program = (
        "import sys, itertools; from pathlib import Path; from dhns_fast import files\n"
        "for i in itertools.count():\n"
        "    files.write_text(Path(sys.argv[1]), f'{i % 10}' * 300_000); print(flush=True)"
    )
    path = tmp_path / "file"
    for i in range(12):
        writer = start(program, str(path))
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.001 * i)
        writer.kill()
        writer.communicate()
        text = path.read_text()
        assert len(text) == 300_000
        assert len(set(text)) == 1
    # A killed writer's file, and one that is being written at this moment.
    leftover = tmp_path / f"{files.PREFIX}0123456789abcdef{files.SUFFIX}"
    with files.replacing(tmp_path / "other") as file:
        leftover.write_text("half")
        start(
            "import sys; from pathlib import Path; from dhns_fast import files; files.sweep(Path(sys.argv[1]))",
            str(tmp_path),
        ).communicate()
        file.write(b"whole")
    assert (tmp_path / "other").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_tensors_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.tensor([True, False, True]),
        "h": torch.randn(3, 5).bfloat16().T,
        "d": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 7),
        "name with \"quotes\" and ü": torch.arange(5)[::2],
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    files.write_tensors(path, tensors, {"meta": "1"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert torch.equal(read[name], x)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["meta"] == "1"
    assert metadata[files.CHECKSUM] == files.checksum(read, {"meta": "1"})
    files.write_tensors(path, {}, None)
    assert load_file(path) == {}


def test_a_folder_has_one_owner_and_a_dead_one_is_none(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dhns_fast import files\n"
        "with files.owned(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = start(program, str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(
            InputError, match=rf"folder: got '.*', which process {holder.pid} on \S+ is writing to; accepted: "
        ),
        files.owned(tmp_path),
    ):
        pass
    holder.kill()
    holder.communicate()

    def want() -> None:
        with pytest.raises(InputError, match=f"process {os.getpid()}"), files.owned(tmp_path):
            pass
        refused.append(True)

    refused: list[bool] = []
    with files.owned(tmp_path), files.owned(tmp_path):
        thread = threading.Thread(target=want)
        thread.start()
        thread.join()
    assert refused
    assert not list(tmp_path.iterdir())


def test_many_processes_want_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys, json; from pathlib import Path; from dhns_fast import files; from dhns_fast.errors import InputError\n"
        "folder, done = Path(sys.argv[1]), 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        with files.owned(folder):\n"
        "            count = json.loads((folder / 'count').read_text())\n"
        "            files.write_json(folder / 'count', count + 1)\n"
        "            done += 1\n"
        "    except InputError: pass"
    )
    files.write_json(tmp_path / "count", 0)
    both = [start(program, str(tmp_path)) for _ in range(3)]
    assert [process.wait(60) for process in both] == [0, 0, 0]
    assert json.loads((tmp_path / "count").read_text()) == 60
