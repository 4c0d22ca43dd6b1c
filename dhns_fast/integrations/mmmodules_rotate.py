"""Stands in for the release's `mmkgc.adv.mmmodules_rotate`: a script changes this one import (docs/drop-in.md)."""

from dhns_fast.sampler import DiffHEGRotatE as DiffHEG

__all__ = ["DiffHEG"]
