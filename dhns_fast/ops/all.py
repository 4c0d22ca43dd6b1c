"""Importing it registers every operator of `torch.ops.dhns_fast`. Nothing is built, and no kernel loaded, before the
first call.
"""

# ruff: noqa: F401
from __future__ import annotations

from dhns_fast.ops import (
    corruption,
    corruption_step,
    denoise,
    diffusion_loss,
    fusion,
    hal,
    noise,
    power,
    project,
    rowwise,
    sampling,
    score,
)
