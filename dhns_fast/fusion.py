"""Fusion of modalities: the structural embedding of an entity and linear views of its features, weighted by attention.

    e_structure, e_m = W_m·v_m + b_m;    a = softmax_m(w·tanh(e_m));    joint = Σ_m a_m·e_m

A modality that an entity lacks is masked out of its softmax. Source: Niu & Zhang, DASFAA 2025 (arXiv 2501.15393), §3.4;
the mask is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops.fusion import fuse
from dhns_fast.ops.fusion_eager import shares
from dhns_fast.ops.project import project
from dhns_fast.ops.project_eager import PROJECTED_ROWS
from dhns_fast.ops.score import look_inside

STRUCTURE = "structure"
# Bytes that features take as float32, above which those that do not learn are not copied.
HELD = 1 << 30


class Fusion(nn.Module):
    """Any number of named modalities beside the structural embedding: a new one is a name and a matrix.

    Args:
        features: modality name -> float matrix `[E, D_m]`.
        dim: D, width of entity embeddings.
        present: modality name -> bool `[E]`, which entities have it; a name left out means all.
        train_features: let the optimiser change the feature matrices themselves, as the release does. Where it does
            not, matrices of more than 1 GiB (as float32) are not copied and stay in the host's memory, float16 as they
            are: the rows of a step go to the device.
        attend: score and evaluate on joint embeddings. False: only the structural embedding is scored, and modalities
            serve the generated negatives alone (the release's DistMult).

    Raises:
        InputError: names or shapes do not fit.
    """

    attention: nn.Parameter | None

    def __init__(
        self,
        features: Mapping[str, Tensor],
        dim: int,
        present: Mapping[str, Tensor] | None = None,
        train_features: bool = False,
        attend: bool = True,
    ) -> None:
        super().__init__()
        dim = checks.count("dim", dim)
        checks.flag(train_features=train_features, attend=attend)
        checks.instance(Mapping, "a dict of matrices by modality name", features=features)
        checks.instance(Mapping, "a dict of bool tensors by modality name, or None", present=present)
        if not features:
            raise InputError("features", {}, "one modality or more; fusion=None for a model without any")
        if STRUCTURE in features:
            raise InputError(
                "features", Shown(f"one named {STRUCTURE!r}"), "other names; that is the entity embedding itself"
            )
        for name, x in features.items():
            what = f"features[{name!r}]"
            checks.tensor(**{what: x})
            if x.layout != torch.strided or x.is_nested or x.is_complex() or x.is_quantized:
                raise InputError(what, Shown(f"{x.dtype}, of layout {x.layout}"), "a dense matrix of real numbers")
        sizes = {name: tuple(x.shape) for name, x in features.items()}
        if any(x.ndim != 2 for x in features.values()) or len({s[0] for s in sizes.values()}) != 1:
            raise InputError("features", sizes, "matrices with one row an entity")
        if any(0 in size for size in sizes.values()):
            raise InputError("features", sizes, "matrices with at least one entity and one column")
        present = dict(present or {})
        if unknown := set(present) - set(features):
            raise InputError("present", sorted(unknown), f"modalities of features, {sorted(features)}")
        num_entities = next(iter(sizes.values()))[0]
        everyone = torch.ones(num_entities, dtype=torch.bool)
        masks = {name: present.get(name, everyone) for name in features}
        for name, mask in masks.items():
            checks.tensor(**{f"present[{name!r}]": mask})
            masks[name] = mask = mask.cpu()
            if mask.shape != (num_entities,) or mask.dtype != torch.bool:
                raise InputError(f"present[{name!r}]", mask, f"torch.bool [{num_entities}]")
        self.names = (STRUCTURE, *features)
        self.dim, self.attend = dim, attend
        self.num_entities = num_entities
        # Large features that do not learn stay where they are, mapped from a file or in memory, and as narrow; rows are
        # taken as needed.
        self._held = {
            m: x.detach()
            for m, x in enumerate(features.values())
            if not train_features and x.device.type == "cpu" and 4 * x.numel() > HELD
        }
        # What stands in the place of an absent modality must not take part: a weight of 0 does not stop a NaN.
        matrices = [
            x.new_zeros(0, x.shape[1], dtype=torch.get_default_dtype())
            if m in self._held
            else x.detach().to(torch.get_default_dtype()).masked_fill(~masks[name].to(x.device)[:, None], 0)
            for m, (name, x) in enumerate(features.items())
        ]
        # Keyed by position: a modality's name may hold characters that a module's name may not.
        self.features = nn.ParameterList([nn.Parameter(x, requires_grad=train_features) for x in matrices])
        projections = [nn.Linear(x.shape[1], dim) for x in features.values()]
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
        self.projections = nn.ModuleList(projections)
        self.attention = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)).flatten()) if attend else None
        self.register_buffer("present", torch.stack([everyone, *masks.values()]), persistent=False)

    @property
    def on_host(self) -> list[str]:
        """Names of the modalities whose features stay in the host's memory."""
        return [self.names[m + 1] for m in self._held]

    def modalities(self, structure: Tensor, ids: Tensor | None = None) -> Tensor:
        """`[M, n, D]`: the structural embeddings `[n, D]` of entities `ids` (None: of all) followed by each projected
        modality.

        Raises:
            InputError: shapes do not fit, or an id is out of range.
        """
        self._check(structure, ids)
        return torch.stack([structure, *self._views(ids)])

    def _check(self, structure: Tensor, ids: Tensor | None) -> None:
        checks.tensor(structure=structure)
        if ids is not None:
            checks.tensor(ids=ids)
            if ids.dtype not in (torch.int64, torch.int32):
                raise InputError("ids", ids, "torch.int64 or torch.int32")
        rows = self.num_entities if ids is None else "n"
        checks.shapes(ids=(ids, "n"), structure=(structure, f"{rows} {self.dim}"))

    def _views(self, ids: Tensor | None) -> list[Tensor]:
        """Each projected modality `[n, D]` of entities `ids` (None: of all)."""
        ids = None if ids is None else ids.long()
        projections = cast(Iterable[nn.Linear], self.projections)
        return [
            self._held_view(m, ids) if m in self._held else project(f, ids, projection.weight, projection.bias)
            for m, (f, projection) in enumerate(zip(self.features, projections, strict=True))
        ]

    def _held_view(self, m: int, ids: Tensor | None) -> Tensor:
        projection = cast(nn.Linear, self.projections[m])
        if ids is not None:
            return project(self._rows(m, ids), None, projection.weight, projection.bias)
        parts = []
        for first in range(0, self.num_entities, PROJECTED_ROWS):
            # As many rows as of every other part, which a library gives other bits for: the last begins sooner.
            begin = max(0, min(first, self.num_entities - PROJECTED_ROWS))
            end = min(begin + PROJECTED_ROWS, self.num_entities)
            rows = self._rows(m, torch.arange(begin, end, device=projection.weight.device))
            parts.append(project(rows, None, projection.weight, projection.bias)[first - begin :])
        return torch.cat(parts)

    def _rows(self, m: int, ids: Tensor) -> Tensor:
        """Rows `ids` of modality m that is held in its own memory, on the device and in the dtype of its projection."""
        weight, where = cast(nn.Linear, self.projections[m]).weight, ids.cpu()
        look_inside("ids", where, self.num_entities)
        rows = nn.functional.embedding(where, self._held[m]).to(weight.device, weight.dtype)
        return rows.masked_fill(~self.get_buffer("present")[m + 1, ids].unsqueeze(-1), 0)

    def mask(self, ids: Tensor | None = None) -> Tensor:
        """bool `[M, n]`: which modalities entities `ids` (None: all) have; the structural one always."""
        mask = self.get_buffer("present")
        return mask if ids is None else mask[:, ids]

    def weights(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Attention a over the modalities, `[M, n]`, of embeddings `[M, n, D]`; 0 where the mask `[M, n]` is False."""
        if self.attention is None:
            return torch.zeros_like(embeddings[..., 0]).index_fill(0, torch.tensor([0], device=embeddings.device), 1.0)
        return shares(embeddings, self.attention, mask)

    def forward(self, structure: Tensor, ids: Tensor | None = None) -> Tensor:
        """Joint embeddings `[n, D]` of entities `ids` (None: of all) whose structural embeddings are `[n, D]`.

        Raises:
            InputError: shapes do not fit, or an id is out of range.
        """
        self._check(structure, ids)
        if self.attention is None:
            return structure
        joint: Tensor = fuse(structure, self._views(ids), self.attention, self.mask(ids))
        return joint
