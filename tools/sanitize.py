"""Runs tests with the C++ operators built for AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [--keep FOLDER] [pytest arguments]

A fault ends the process with the sanitizer's report and exit code 1. Needs gcc with libasan and libubsan. Leaks are not
looked for: Python and torch keep memory on purpose. Without arguments: the tests of the operators, the scores, the
losses and what fuzzes them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/ops",
    "tests/scoring",
    "tests/loss",
    "tests/fuzz/test_fuzz_operators.py",
    "tests/test_sampler.py",
    "tests/test_golden.py",
)
# These start processes of their own, compile again, or measure memory, which a sanitizer multiplies.
LEFT_OUT = "not aot and not build and not instruction_sets and not takes_less_than and not parts_has and not threads"
# The standard library's own checks of indices, too.
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1 -D_GLIBCXX_ASSERTIONS"
)


def library(name: str, compiler: str) -> str:
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder of the build, to be used again")
    options, arguments = parser.parse_known_args()
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        wrapper = folder / "sanitized-c++"
        # After the build's own flags: the last level of optimisation counts.
        wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" {FLAGS}\n')
        wrapper.chmod(0o700)
        environment = {
            **os.environ,
            "CXX": str(wrapper),
            "DHNS_FAST_CACHE": str(folder / "cache"),
            "DHNS_FAST_BUILD_TIMEOUT": "3600",
            "OMP_NUM_THREADS": "2",
            # Into files: pytest keeps what is written to stderr until a test ends, and this one never does.
            "ASAN_OPTIONS": f"detect_leaks=0:detect_odr_violation=0:log_path={folder}/report",
            "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={folder}/report",
        }
        build = "from dhns_fast.ops import build; build.build()"
        subprocess.run([sys.executable, "-c", build], env=environment, cwd=ROOT, check=True)
        preload = " ".join(library(name, compiler) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
        tests = arguments or [*(name for name in TESTS if (ROOT / name).exists()), "-k", LEFT_OUT]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        for old in folder.glob("report.*"):
            old.unlink()
        code = subprocess.run(command, env={**environment, "LD_PRELOAD": preload}, cwd=ROOT, check=False).returncode
        for report in sorted(folder.glob("report.*")):
            print(report.read_text(errors="replace"))
        return code


if __name__ == "__main__":
    sys.exit(main())
