"""Compiles every source that includes torch's headers against each supported torch, no GPU needed: `python
tools/supported_torches.py`.

A wheel is fetched by pip, its headers are kept and the rest of it is deleted before the next: 1 GB of disk at a time.
The result goes to bench/results/torches.json. Exit code 1 if a source does not compile.

    --headers VERSION=FOLDER   use the headers of an unpacked torch (the folder that holds torch/) instead of fetching
    that version
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dhns_fast.ops import build

RESULT = Path(__file__).resolve().parents[1] / "bench" / "results" / "torches.json"
VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "2.13.0")


def headers(version: str, folder: Path) -> None:
    """torch/include of a version's wheel, unpacked into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            f"torch=={version}",
        ]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])


def compile_all(include: Path, arch: int) -> dict[str, str]:
    """Each source's first complaint against the headers in `include`, "" where there is none; CUDA sources where nvcc
    is.
    """
    compiler, nvcc = build._compiler(), build._nvcc()
    # Headers are a matter of the compiler's front; machine code is bench/aot.py's, and takes five times as long.
    known = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    front = ["-fdevice-syntax-only"] if "-fdevice-syntax-only" in known else []
    stable = [*build.STABLE_ABI, "-isystem", str(include), f"-I{build.source_folder()}"]
    found = {}
    for source in sorted(build.source_folder().iterdir()):
        with tempfile.TemporaryDirectory() as scratch:
            if source.name.endswith("_binding.cpp") and compiler:
                command = [compiler, *build.CXX_FLAGS, *stable, "-fsyntax-only", str(source)]
            elif source.suffix == ".cu" and nvcc:
                target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
                command = [
                    nvcc,
                    *build.NVCC_FLAGS,
                    *front,
                    "-DUSE_CUDA",
                    *stable,
                    target,
                    "-c",
                    "-o",
                    f"{scratch}/out.o",
                    str(source),
                ]
            else:
                continue
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        found[source.name] = complaint.replace(f"{source.parent}/", "") if done.returncode else ""
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="torch versions")
    parser.add_argument("--headers", nargs="*", default=[], metavar="VERSION=FOLDER", help="unpacked torches")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten for CUDA sources")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args(arguments)
    given = dict(entry.split("=", 1) for entry in options.headers)
    results = {}
    for version in options.versions:
        folder = Path(given[version]) if version in given else Path(tempfile.mkdtemp(prefix=f"torch-{version}-"))
        try:
            if version not in given:
                headers(version, folder)
            results[version] = compile_all(folder / "torch" / "include", options.arch)
        finally:
            if version not in given:
                shutil.rmtree(folder)
        for source, complaint in results[version].items():
            print(f"torch {version:8s} {source:28s} {complaint or 'compiles'}", flush=True)
    options.output.write_text(json.dumps({"arch": options.arch, "torches": results}, indent=1) + "\n", encoding="utf-8")
    return int(any(complaint for sources in results.values() for complaint in sources.values()))


if __name__ == "__main__":
    sys.exit(main())
