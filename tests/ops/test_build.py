"""Building and loading the compiled operators: the cache, two builders at once, and machines that lack something."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import backend, build, noise

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include "answer_cpu.h"
int64_t answer(const torch::stable::Tensor) { return dhns::kernels::answer(); }
STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_test, m) { m.def("answer(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(dhns_fast_test, CPU, m) { m.impl("answer", TORCH_BOX(&answer)); }
"""
HAS_TOOLS = build.status().reason is None
needs_compiler = pytest.mark.skipif(not HAS_TOOLS, reason=f"cannot compile here: {build.status().reason}")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of one tiny operator, and an empty cache."""
    folder = tmp_path / "with space" / "csrc"
    folder.mkdir(parents=True)
    (folder / "answer_cpu.h").write_text("#include <cstdint>\nnamespace dhns::kernels { int64_t answer(); }\n")
    (folder / "answer_cpu.cpp").write_text(
        '#include "answer_cpu.h"\nnamespace dhns::kernels { int64_t answer() { return 42; } }\n'
    )
    (folder / "answer_binding.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("DHNS_FAST_CACHE", str(tmp_path / "cache"))
    return folder


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="looks for an instruction of x86")
def test_what_is_asked_for_ahead_is_compiled() -> None:
    """A compiler may take a function that only prefetches for one without effect; results tell nothing of that."""
    library = build.build()
    shown = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)], check=True, text=True, capture_output=True
    ).stdout
    kernels = {
        name: body
        for name, body in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", shown, re.MULTILINE)
        if re.search(r"row_update\(dhns::RowUpdate|loss_rows<.*dhns::Corruptions", name) and ".cold" not in name
    }
    assert len(kernels) >= 11  # 3 and 8
    assert not [name for name, body in kernels.items() if "prefetch" not in body]


@needs_compiler
def test_two_builders_leave_one_library(small: Path, tmp_path: Path) -> None:
    assert build.status().library is None
    program = f"from pathlib import Path; from dhns_fast.ops import build; build.source_folder = lambda: Path({str(small)!r}); print(build.build())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", program], **options)
    both = [start(), start()]
    outputs = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    status = build.status()
    library = status.library
    assert outputs == [str(library)] * 2
    # With nvcc and a torch for CUDA there is one of CUDA operators too, here of none.
    libraries = {path.parent.name for path in (library, status.cuda_library) if path is not None}
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()} == libraries
    assert {path.name for path in library.parent.iterdir()} == {
        build.LIBRARY,
        Path(build.LIBRARY).with_suffix(".sha256").name,
    }
    torch.ops.load_library(str(library))
    assert torch.ops.dhns_fast_test.answer(torch.zeros(1)) == 42
    before = library.stat().st_mtime_ns
    assert build.build() == library
    assert library.stat().st_mtime_ns == before
    (small / "answer_cpu.h").write_text((small / "answer_cpu.h").read_text() + "// changed\n")
    assert build.status().library is None


@needs_compiler
def test_failed_compilation_says_what_the_compiler_said(small: Path, tmp_path: Path) -> None:
    (small / "answer_cpu.cpp").write_text("#error these words\n")
    with pytest.raises(BackendUnavailableError, match=r"(?s)compiling the operators failed:.*these words"):
        build.build()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@needs_compiler
def test_cache_that_cannot_be_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DHNS_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendUnavailableError, match="the compiled operators cannot be cached in"):
        build.build()


def test_without_tools_it_falls_back_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for tool in ("_compiler", "_ninja", "_nvcc"):
        monkeypatch.setattr(build, tool, lambda: None)
    monkeypatch.setattr(build, "_load_once", build._load_once.__wrapped__)
    monkeypatch.setattr(backend, "_loaded", set())
    backend.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "dhns_fast"):
        for _ in range(2):
            assert noise.philox_normal(1, 0, 0, 0, 0, 2, 2).shape == (2, 2)
    assert len(caplog.records) == 1
    assert "not found: a C++ compiler (c++, g++, clang++ or CXX), ninja" in caplog.text
    assert build.status().reason is not None
    with pytest.raises(BackendUnavailableError, match="backend 'cpu': not found: a C\\+\\+ compiler"):
        noise.philox_normal(1, 0, 0, 0, 0, 2, 2, backend="cpu")
    backend.log_once.cache_clear()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("DHNS_FAST_CACHE", raising=False)
    assert build.cache_folder() == Path("/x/dhns_fast")
    monkeypatch.setenv("DHNS_FAST_CACHE", "~/y")
    assert build.cache_folder() == Path.home() / "y"


# Answers --version, notes its process, waits for as long as the file "hang" is there, and writes what was asked for.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo fake; exit; fi
echo $$ >> "{folder}/pids"
while [ -e "{folder}/hang" ]; do sleep 0.02; done
while [ "$1" != -o ]; do shift; done
echo "$2" > "$2"
"""


@pytest.fixture
def fake(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes no time, and its folder."""
    script = tmp_path / "fake-c++"
    script.write_text(COMPILER.format(folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    return tmp_path


def start_builder(small: Path) -> subprocess.Popen[str]:
    # Where the tests run as a background job, SIGINT is ignored.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path\n"
        "from dhns_fast.ops import build; build.source_folder = lambda: Path(sys.argv[1])\n"
        "build._nvcc = lambda: None; print('begin', flush=True); print(build.build())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-c", program, str(small)], **pipes)


def compilers(folder: Path) -> list[int]:
    """Processes of the fake compiler that are still there."""
    pids = map(int, (folder / "pids").read_text().split()) if (folder / "pids").exists() else ()
    return [pid for pid in pids if Path("/proc", str(pid)).exists()]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def scratch_folders(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if "-" in path.name]


def cut(folder: Path) -> None:
    library = folder / build.LIBRARY
    library.write_bytes(library.read_bytes()[:3])


def flip(folder: Path) -> None:
    library = folder / build.LIBRARY
    content = bytearray(library.read_bytes())
    content[1] ^= 4
    library.write_bytes(content)


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "empty": lambda folder: (folder / build.LIBRARY).write_text(""),
    "one bit": flip,
    "no library": lambda folder: (folder / build.LIBRARY).unlink(),
    "a folder": lambda folder: ((folder / build.LIBRARY).unlink(), (folder / build.LIBRARY).mkdir()),
    "no checksum": lambda folder: (folder / build.LIBRARY).with_suffix(".sha256").unlink(),
    "another checksum": lambda folder: (folder / build.LIBRARY).with_suffix(".sha256").write_bytes(b"\xff\x00"),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": as_file,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_library_is_built_again_once(
    damage: Callable[[Path], object], fake: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.build()
    whole = library.read_bytes()
    damage(library.parent)
    assert build.status().library is None
    caplog.clear()
    assert build.build() == library
    assert library.read_bytes() == whole
    assert [r.getMessage().split()[0] for r in caplog.records] == ["the", "compiling"]
    assert f"{library.parent} are damaged or half made, and are built again" in caplog.text
    caplog.clear()
    before = len((fake / "pids").read_text())
    assert build.build() == library
    assert len((fake / "pids").read_text()) == before
    assert not caplog.records
    assert not scratch_folders(fake / "cache")


def test_library_that_does_not_stay_whole_is_named(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_intact", lambda library: False)
    with pytest.raises(
        BackendUnavailableError,
        match=r"^.*dhns_fast_native.so was damaged as soon as it was built \(a failing or full disk\?\)$",
    ):
        build.build()


def test_library_that_does_not_load_is_named_in_one_line(fake: Path, caplog: pytest.LogCaptureFixture) -> None:
    reason = build._load_once.__wrapped__("cpu")
    assert re.fullmatch(r".*dhns_fast_native.so does not load: .*", str(reason))


def test_progress_says_what_and_how_long(
    fake: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    build.build()
    (line,) = caplog.records
    expected = r"compiling 2 C\+\+ files of operators into .*, once; this usually takes about 20 s on 2 idle cores"
    assert re.fullmatch(expected, line.getMessage())
    assert line.levelno == logging.WARNING


def test_hanging_compiler_is_stopped(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "hang").touch()
    monkeypatch.setenv(build.LIMIT, "0.5")
    with pytest.raises(
        BackendUnavailableError,
        match=r"did not end in 0\.5 s, the limit that DHNS_FAST_BUILD_TIMEOUT sets, and was stopped",
    ):
        build.build()
    wait_for(lambda: not compilers(fake))
    assert not scratch_folders(fake / "cache")
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv(build.LIMIT, wrong)
        with pytest.raises(
            InputError, match=f"DHNS_FAST_BUILD_TIMEOUT: got '{wrong}'; accepted: a number of seconds above 0"
        ):
            build.build()


def test_compiler_that_hangs_when_asked_for_its_version(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fake / "silent"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    with pytest.raises(BackendUnavailableError, match="silent --version fails"):
        build.build()


def test_ctrl_c_ends_the_compilers_and_says_so(small: Path, fake: Path) -> None:
    (fake / "hang").touch()
    builder = start_builder(small)
    wait_for(lambda: compilers(fake))
    builder.send_signal(signal.SIGINT)
    _, errors = builder.communicate(timeout=30)
    assert (
        errors.splitlines()[-1]
        == "KeyboardInterrupt: interrupted while compiling the operators; the next start begins that anew"
    )
    wait_for(lambda: not compilers(fake))
    assert not scratch_folders(fake / "cache")


def test_what_killed_builders_leave_is_swept(small: Path, fake: Path) -> None:
    (fake / "hang").touch()
    builder = start_builder(small)
    wait_for(lambda: compilers(fake))
    builder.kill()
    builder.communicate()
    cache = fake / "cache"
    assert scratch_folders(cache)
    # Of another library: one that nobody builds now, and one whose builder lives.
    for key in ("0" * 16, "1" * 16):
        (cache / f"{key}-abc").mkdir()
    (cache / "a-friend's").mkdir()
    with build._lock(cache / f"{'1' * 16}.lock", cache):
        (fake / "hang").unlink()
        build.build()
        assert sorted(scratch_folders(cache)) == [f"{'1' * 16}-abc", "a-friend's"]


def test_cache_is_private_whatever_the_umask(fake: Path) -> None:
    before = os.umask(0)
    try:
        library = build.build()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (library.parent.parent, library.parent)]
    assert modes == [0o700, 0o700]
    assert not any(path.stat().st_mode & 0o022 for path in library.parent.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.parametrize("level", [0, 1, 2], ids=["cache", "key", "library"])
def test_what_others_can_write_is_not_loaded(fake: Path, mode: int, level: int) -> None:
    library = build.build()
    (library.parents[1], library.parent, library)[level].chmod(mode)
    with pytest.raises(
        BackendUnavailableError,
        match=rf"can be written to by others \(mode {mode:o}\); chmod go-w .* or name another in DHNS_FAST_CACHE",
    ):
        build.build()
    assert "can be written to by others" in str(build.status().reason)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root to give a folder away")
@pytest.mark.parametrize("level", [0, 1, 2], ids=["cache", "key", "library"])
def test_what_belongs_to_others_is_not_loaded(fake: Path, level: int) -> None:
    library = build.build()
    os.chown((library.parents[1], library.parent, library)[level], 12345, -1)
    with pytest.raises(BackendUnavailableError, match="belongs to user 12345; accepted: a folder of your own"):
        build.build()


def test_cache_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", homeless)
    for name in ("XDG_CACHE_HOME", "DHNS_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert build.cache_folder() == Path(tempfile.gettempdir(), f"dhns_fast-{os.getuid()}")
    monkeypatch.setenv("DHNS_FAST_CACHE", "~/x")
    with pytest.raises(BackendUnavailableError, match="DHNS_FAST_CACHE '~/x' names no folder"):
        build.build()
    assert "names no folder" in str(build.status().reason)


def test_import_compiles_and_loads_nothing() -> None:
    program = (
        "import sys, dhns_fast.loss, dhns_fast.ops.noise, torch; from dhns_fast.ops import build;"
        "assert not build._load_once.cache_info().currsize"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


CPU, GPU = torch.device("cpu"), torch.device("cuda")
BROKEN = backend.Backend("cpu", "cpu", lambda device: "it is broken")
LIST = [backend.Implementation(entry, print) for entry in (BROKEN, backend.TRITON, backend.EAGER)]


def test_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.log_once.cache_clear()

    def chosen(asked: str) -> str:
        return backend.choose(asked, CPU, LIST, None).backend.name

    assert chosen("") == "eager"
    assert "it is broken" in caplog.text
    assert chosen("auto") == "eager"
    with pytest.raises(BackendUnavailableError, match="backend 'cpu': it is broken"):
        chosen("cpu")
    with pytest.raises(BackendUnavailableError, match="backend 'triton': it runs on cuda tensors, these are on cpu"):
        chosen("triton")
    with pytest.raises(BackendUnavailableError, match="backend 'cuda': this operator has cpu, triton, eager"):
        chosen("cuda")
    with pytest.raises(InputError, match="backend: got 'metal'; accepted: auto, triton, cuda, cpu, eager"):
        chosen("metal")
    monkeypatch.setenv(backend.ENVIRONMENT, "cpu")
    with pytest.raises(BackendUnavailableError, match="it is broken"):
        chosen("")
    assert chosen("eager") == "eager"
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    assert chosen("") == "eager"
    monkeypatch.setenv(backend.ENVIRONMENT, "metal")
    with pytest.raises(InputError, match="DHNS_FAST_BACKEND: got 'metal'"):
        chosen("")
