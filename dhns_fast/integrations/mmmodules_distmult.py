"""Stands in for the release's `mmkgc.adv.mmmodules_distmult`: a script changes this one import (docs/drop-in.md)."""

from dhns_fast.sampler import DiffHEG

__all__ = ["DiffHEG"]
