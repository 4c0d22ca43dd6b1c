"""dhns_fast: diffusion-based hierarchical negative sampling (DHNS) for multimodal knowledge-graph completion.

Niu & Zhang, DASFAA 2025, arXiv 2501.15393. Names below are imported on first use, so that `import dhns_fast` is instant
and loads no kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dhns_fast.catalogue import MODELS as _MODELS

__version__ = "0.1.0"

_HOME = {
    "dhns_fast.sampler": ("DiffHEG", "DiffHEGComplEx", "DiffHEGRotatE", "DiffHEGTransE", "SampleNoise"),
    "dhns_fast.scoring": (
        "Ranks",
        "hard_negatives",
        "logsumexp_all",
        "one_vs_all_loss",
        "rank_all",
        "score_all",
        "topk_all",
    ),
    "dhns_fast.loss": ("hal_from_embeddings", "hardness_adaptive_loss", "self_adversarial_loss"),
    "dhns_fast.margins": ("LearnedMargins", "LinearMargins", "SignalMargins", "TableMargins"),
    "dhns_fast.models": tuple(model.title for model in _MODELS.values()),
    "dhns_fast.fusion": ("Fusion",),
    "dhns_fast.data": ("CSRFilter", "KnowledgeGraph", "NegativeSampler", "Ragged", "load", "synthetic"),
    "dhns_fast.ranking": ("evaluate", "evaluate_items"),
    "dhns_fast.train": ("TrainConfig", "Trainer", "load_run"),
    "dhns_fast.errors": ("BackendUnavailableError", "DataError", "DhnsError", "InputError"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
