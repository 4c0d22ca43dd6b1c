"""Writes the API reference from the docstrings: `python docs/api.py [FOLDER]`, needs the extra `docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc
import pdoc.render

import dhns_fast.train

# Names that a package imports on first use are made attributes of it: pdoc looks no further.
for package in (dhns_fast, dhns_fast.train):
    vars(package).update({name: getattr(package, name) for name in package.__all__})
pdoc.render.configure(docformat="google", math=False)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
pdoc.pdoc(
    "dhns_fast",
    *sorted({getattr(dhns_fast, name).__module__ for name in dhns_fast.__all__ if name != "__version__"}),
    "dhns_fast.negatives",
    "dhns_fast.integrations.pykeen",
    "dhns_fast.integrations.torch_geometric",
    output_directory=folder,
)
print(f"Written to {folder}")
