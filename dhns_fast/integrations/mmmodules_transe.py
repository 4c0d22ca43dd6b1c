"""Stands in for the release's `mmkgc.adv.mmmodules_transe`: a script changes this one import (docs/drop-in.md)."""

from dhns_fast.sampler import DiffHEGTransE as DiffHEG

__all__ = ["DiffHEG"]
