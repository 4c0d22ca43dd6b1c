"""Building and loading the compiled operators: the cache, two builders at once, and machines that lack something."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import backend, build, noise

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include "answer_cpu.h"
int64_t answer(const torch::stable::Tensor) { return DHNS_BEST(answer)(); }
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
    shutil.copy(build.source_folder() / "levels.h", folder)
    (folder / "answer_cpu.h").write_text('#include <cstdint>\n#include "levels.h"\nDHNS_DECLARE(int64_t answer();)\n')
    (folder / "answer_cpu.cpp").write_text('#include "answer_cpu.h"\nnamespace dhns::DHNS_LEVEL { int64_t answer() { return 42; } }\n')
    (folder / "answer_binding.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("DHNS_FAST_CACHE", str(tmp_path / "cache"))
    return folder


@needs_compiler
def test_two_builders_leave_one_library(small: Path, tmp_path: Path) -> None:
    assert build.status().library is None
    program = f"from pathlib import Path; from dhns_fast.ops import build; build.source_folder = lambda: Path({str(small)!r}); print(build.build())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = lambda: subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)  # noqa: E731
    both = [start(), start()]
    outputs = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    status = build.status()
    library = status.library
    assert outputs == [str(library)] * 2
    # With nvcc and a torch for CUDA there is one of CUDA operators too, here of none.
    libraries = {path.parent.name for path in (library, status.cuda_library) if path is not None}
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()} == libraries
    assert [path.name for path in library.parent.iterdir()] == [build.LIBRARY]
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


def test_without_tools_it_falls_back_with_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for tool in ("_compiler", "_ninja", "_nvcc"):
        monkeypatch.setattr(build, tool, lambda: None)
    monkeypatch.setattr(build, "_load_once", build._load_once.__wrapped__)
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


def test_import_compiles_and_loads_nothing() -> None:
    program = (
        "import sys, dhns_fast.loss, dhns_fast.ops.noise, torch; from dhns_fast.ops import build;"
        "assert not build._load_once.cache_info().currsize"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


CPU, GPU = torch.device("cpu"), torch.device("cuda")
BROKEN = backend.Backend("cpu", "cpu", lambda device: "it is broken")
LIST = (BROKEN, backend.TRITON, backend.EAGER)


def test_resolve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.log_once.cache_clear()
    assert backend.resolve(None, CPU, LIST) == "eager"
    assert "it is broken" in caplog.text
    assert backend.resolve("auto", CPU, LIST) == "eager"
    with pytest.raises(BackendUnavailableError, match="backend 'cpu': it is broken"):
        backend.resolve("cpu", CPU, LIST)
    with pytest.raises(BackendUnavailableError, match="backend 'triton': it runs on cuda tensors, these are on cpu"):
        backend.resolve("triton", CPU, LIST)
    with pytest.raises(BackendUnavailableError, match="backend 'cuda': this operator has cpu, triton, eager"):
        backend.resolve("cuda", CPU, LIST)
    with pytest.raises(InputError, match="backend: got 'metal'; accepted are auto, triton, cuda, cpu, eager"):
        backend.resolve("metal", CPU, LIST)
    monkeypatch.setenv(backend.ENVIRONMENT, "cpu")
    with pytest.raises(BackendUnavailableError, match="it is broken"):
        backend.resolve(None, CPU, LIST)
    assert backend.resolve("eager", CPU, LIST) == "eager"
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    assert backend.resolve(None, CPU, LIST) == "eager"
    monkeypatch.setenv(backend.ENVIRONMENT, "metal")
    with pytest.raises(InputError, match="DHNS_FAST_BACKEND: got 'metal'"):
        backend.resolve(None, CPU, LIST)
