"""Controls: what a gain must be measured against before it is the generator's.

"gaussian" puts noise of the same norm in the place of what was generated; "shuffled" what was generated for another
triple of the batch; "positive-only" no negatives at all, but the positive term of the hardness-adaptive loss, which
alone speeds training up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian(made: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Directions drawn uniformly from the sphere, each with the norm of the embedding in whose place it stands: [...,
    D] -> [..., D].
    """
    noise = torch.randn(made.shape, generator=generator, device=made.device, dtype=made.dtype)
    return F.normalize(noise, dim=-1) * torch.linalg.vector_norm(made, dim=-1, keepdim=True)


def shuffled(made: Tensor, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Every row along `dim` becomes that of another row, at one random distance for all; a single row stays."""
    rows = made.shape[dim]
    if rows < 2:
        return made
    shift = torch.randint(1, rows, (1,), generator=generator, device=made.device)
    return made.index_select(dim, (torch.arange(rows, device=made.device) + shift) % rows)


def positive_only(positive: Tensor, weight: Tensor, mu: float) -> Tensor:
    """The hardness-adaptive loss without its negatives: μ·mean_i(w_i)·½·(−mean_b log σ(p_b)) over the levels of weight
    > 0.

    Args:
        positive: scores of the true triples, γ included, [B].
        weight: w, [L].
    """
    # Not weight[weight > 0].mean(): a GPU would be waited for.
    share = (weight.clamp(min=0).sum() / (weight > 0).sum()).to(positive)
    return mu * share * 0.5 * -F.logsigmoid(positive).mean()
