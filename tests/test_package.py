"""What an installed package is: light to import, complete, and what pyproject.toml says of it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dhns_fast

ROOT = Path(__file__).resolve().parents[1]
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib (Python 3.11)")


def python(code: str) -> str:
    """What a fresh interpreter prints, at the root of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FIRST_CALLS = """
import torch
from dhns_fast.loss import self_adversarial_loss
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import rank_all
x = torch.ones(3, 8)
rank_all(x, x, torch.arange(3))
generator = DiffHEG(8, 2, 8, 6.0, 2.0)
generator(x, x, x).backward()
generator.sample(x, x, x)
self_adversarial_loss(x[0].requires_grad_(), torch.ones(8, 2)).backward()
"""


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (FIRST_CALLS, ("torch._dynamo",)),
        (
            "import dhns_fast; dhns_fast.__version__; dir(dhns_fast)",
            ("torch", "triton", "numpy", "matplotlib", "jsonargparse"),
        ),
        ("from dhns_fast.train import TrainConfig; TrainConfig()", ("torch", "triton", "matplotlib")),
        ("from dhns_fast.cli import main; main(['train', '--dim', '7'])", ("torch", "triton", "matplotlib")),
        ("from dhns_fast.cli import main; main(['--version'])", ("torch", "triton", "rich")),
        (
            "from dhns_fast.train import Trainer; from dhns_fast import cli, predict, ranking",
            ("matplotlib", "pykeen", "torch._dynamo"),
        ),
    ],
)
def test_imports_are_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, os; sys.stderr = open(os.devnull, 'w')\n{statement}\nprint([m for m in {absent!r} if m in sys.modules])"
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_training_commands_keep_freed_memory() -> None:
    faults = python(
        """
import os, resource
for name in [name for name in os.environ if name.startswith("MALLOC_")]: del os.environ[name]
from dhns_fast.train.memory import keep_freed_memory
import torch
keep_freed_memory()
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(page_faults() for _ in range(12)))
"""
    )
    # 16384 pages otherwise, each time; blocks may take turns between two places at first.
    assert int(faults) < 1000


def test_public_names_resolve() -> None:
    assert len(set(dhns_fast.__all__)) == len(dhns_fast.__all__)
    assert dir(dhns_fast) == sorted(dhns_fast.__all__)
    for name in dhns_fast.__all__:
        found = getattr(dhns_fast, name)
        if name != "__version__":
            assert found.__name__ == name
            assert found.__doc__, name
    with pytest.raises(AttributeError, match="module 'dhns_fast' has no attribute 'DHNS'"):
        dhns_fast.DHNS  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'dhns_fast\.train' has no attribute 'trainers'"):
        dhns_fast.train.trainers  # noqa: B018


def test_every_module_imports() -> None:
    # What needs the sources of the data set, Triton, or a rival installed.
    optional = re.compile(r"dhns_fast\.(__main__|kernels.*|ops\..*_triton|integrations\..*)")
    names = [module.name for module in pkgutil.walk_packages(dhns_fast.__path__, "dhns_fast.")]
    assert "dhns_fast.train.grid" in names
    for name in names:
        if not optional.fullmatch(name):
            importlib.import_module(name)


@needs_tomllib
def test_version_is_pyprojects() -> None:
    assert dhns_fast.__version__ == PROJECT["project"]["version"]


@needs_tomllib
def test_the_wheel_lists_every_package_and_every_file() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    places = {
        name: ROOT / setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]
    }
    # Listed and on disk are the same packages, wherever the mapping puts them.
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "dhns_fast").rglob("__init__.py")}
    mapped = {
        name for name in places if setuptools["package-dir"].get(name, name.replace(".", "/")) != name.replace(".", "/")
    }
    assert mapped == {"dhns_fast.kernels", "dhns_fast.csrc"}
    assert set(places) - mapped == on_disk
    assert all((folder / "__init__.py").is_file() for folder in places.values())
    # Every file that is no module of Python matches a pattern of package-data.
    for name, folder in places.items():
        data = {p for pattern in setuptools["package-data"].get(name, []) for p in folder.glob(pattern)}
        left = {p for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")} - data
        assert left == set(), f"not in the wheel: {left}"


@needs_tomllib
def test_the_script_and_the_licences_are_there() -> None:
    project = PROJECT["project"]
    module, _, function = project["scripts"]["dhns-fast"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for name in (*project["license-files"], project["readme"]):
        assert (ROOT / name).is_file(), name


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    sources = [
        path for folder in ("bench", "dhns_fast", "kernels", "tests/fuzz") for path in (ROOT / folder).rglob("*.py")
    ]
    used = {
        name for path in sources for name in re.findall(r"\"(DHNS_FAST_[A-Z]+)\"", path.read_text(encoding="utf-8"))
    }
    assert "DHNS_FAST_BACKEND" in used
    assert used == set(re.findall(r"`(DHNS_FAST_[A-Z]+)`", page))
