"""Samplers of negatives behind one protocol (:class:`Sampler`): `sample` gives ids, `generate` embeddings, `update`
learns from scores.
"""

from dhns_fast.negatives.base import Sampler
from dhns_fast.negatives.constrained import Constrained
from dhns_fast.negatives.diffusion import Diffusion, Grounded
from dhns_fast.negatives.gan import GAN
from dhns_fast.negatives.modality import ModalitySwap
from dhns_fast.negatives.nearest import Nearest
from dhns_fast.negatives.nscaching import NSCaching
from dhns_fast.negatives.uniform import Bernoulli, Uniform

__all__ = [
    "GAN",
    "Bernoulli",
    "Constrained",
    "Diffusion",
    "Grounded",
    "ModalitySwap",
    "NSCaching",
    "Nearest",
    "Sampler",
    "Uniform",
]
