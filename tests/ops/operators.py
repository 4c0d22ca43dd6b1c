"""Arguments that each operator of `torch.ops.dhns_fast` takes, small and right; what the tests of the contract change
one at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from dhns_fast.diffusion.folding import factors
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
from dhns_fast.ops.operator import Operator
from dhns_fast.sampler import DiffHEG

B, E, D, N, L, M, T = 5, 7, 8, 3, 2, 2, 6
# Tensors that an operator changes: row-major or refused.
CHANGED = dict.fromkeys(("row_update", "pair_update", "corruption_step"), ("table", "first", "second"))


def operators() -> dict[str, tuple[Operator[Any], dict[str, Any]]]:
    """By name: the operator and its arguments, `backend` left out."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    query, entity = draw(B, D), draw(E, D)
    target = torch.tensor([0, 6, 2, 2, 5])
    known = {"offsets": torch.tensor([0, 2, 2, 3, 3, 5]), "ids": torch.tensor([0, 4, 6, 1, 2])}
    tables = {"query": query, "entity": entity}
    plain: dict[str, Any] = {"scale": None, "reduction": "l2", "precision": "ieee"}
    ids = torch.randint(0, E, (B, 1 + N), generator=g)
    with torch.no_grad():
        f = factors(DiffHEG(D, T, D, 6.0, 2.0).denoiser, T)
    folded = f.folded()
    weights = dict(zip(denoise.ChainInputs._fields[2:13], (*f[:4], *f.time_moments, *f[5:]), strict=True))
    flat = (*folded[:3], *folded.time_moments, *folded[4:])
    embeddings = {
        "head": draw(B, D),
        "relation": draw(B, D),
        "tail": draw(B, D),
        "neg_head": draw(L, M, B, D),
        "neg_tail": draw(L, M, B, D),
    }
    levels = {"margin": torch.tensor([0.3, 0.5]), "weight": torch.tensor([0.5, 1.0])}
    arguments: list[tuple[Operator[Any], dict[str, Any]]] = [
        (score.target_scores, {**tables, "target": target, **plain}),
        (score.rank_counts, {**tables, "target": target, "at_target": draw(B), **known, **plain}),
        (
            score.rank_groups,
            {
                **tables, "goals": torch.tensor([0, 2, 2, 3, 3, 4]), "at_target": draw(4), **known, "scale": None, "reduction": "l2",
                "precision": "ieee",
            },
        ),
        (score.topk_all, {**tables, "k": 3, **known, **plain}),
        (score.score_all, {**tables, **plain}),
        (score.logsumexp_all, {**tables, **plain}),
        (score.one_vs_all, {**tables, "target": target, **plain}),
        (score.score_backward, {**tables, **plain, "grad": draw(B), "logsumexp": draw(B), "target": target, "kept": None}),
        (
            hal.hal_embeddings,
            {
                "interaction": "distmult", **embeddings, **levels, "mu": 0.1, "gamma": 1.0, "attention": None, "normalize": False, "p": 1,
                "head_present": None, "tail_present": None, "gradients": True,
            },
        ),
        (hal.hal_scores, {"positive": draw(B), "negative": draw(L, 3, B), **levels, "mu": 0.1}),
        (hal.self_adversarial, {"positive": draw(B), "negative": draw(B, N), "temperature": 0.5}),
        (
            corruption.corruption_loss,
            {"query": query, "table": entity, "ids": ids, "reduction": "l1", "offset": 1.0, "temperature": 0.5, "scale": None},
        ),
        (
            corruption.corruption_table_gradient,
            {"grad": torch.tensor(2.0), "query": query, "table": entity, "ids": ids, "slope": draw(B, 1 + N), "reduction": "l1", "scale": None},
        ),
        (
            denoise.denoise_chain,
            {
                "condition_head": draw(M, B, D), "condition_tail": draw(M, B, D), **weights, "levels": [0, 2], "release": True,
                "precision": "ieee", "seed": torch.tensor([3]), "row_offset": 0, "x_T": None, "x_T_head": None, "noise_tail": None,
                "noise_head": None,
            },
        ),
        (
            diffusion_loss.OPERATOR,
            {
                "noisy": draw(B, D), "condition": draw(B, D), "noise": draw(B, D), "timesteps": torch.tensor([1, 6, 2, 3, 1]),
                "weight": draw(B).abs(), **dict(zip(diffusion_loss.LossInputs._fields[5:13], flat, strict=True)), "precision": "ieee",
                "with_weights": True, "with_inputs": True,
            },
        ),
        (
            rowwise.row_update,
            {
                "table": entity, "first": draw(E, D), "second": draw(E, D).abs(), "rows": [torch.tensor([6, 0, 6]), torch.tensor([2])],
                "gradients": [draw(3, D), draw(1, D)], "method": "lazy-adam", "rate": 0.1, "beta1": 0.9, "beta2": 0.99, "correction": 1.0,
                "epsilon": 1e-8, "n3": 0.1, "seed": 3, "number": 1, "row_offset": 0,
            },
        ),
        (
            rowwise.pair_update,
            {
                "table": entity, "first": draw(E), "second": None, "queries": [query], "ids": [ids], "slopes": [draw(B, 1 + N)],
                "reduction": "l1", "rows": [torch.tensor([2])], "gradients": [draw(1, D)], "method": "rowwise-adagrad", "rate": 0.1,
                "beta1": 0.0, "beta2": 0.0, "correction": 1.0, "epsilon": 1e-8, "n3": 0.1, "seed": 3, "number": 1, "row_offset": 0,
            },
        ),
        (
            corruption_step.corruption_step,
            {
                "table": entity, "first": draw(E, D), "second": draw(E, D).abs(), "query": query, "ids": ids, "others": torch.tensor([1, 6]),
                "reduction": "l1", "offset": 1.0, "temperature": 0.5, "method": "lazy-adam", "rate": 0.1, "beta1": 0.9, "beta2": 0.99,
                "correction": 1.0, "epsilon": 1e-8, "n3": 0.1,
            },
        ),
        (
            sampling.corrupt,
            {
                "draw": torch.rand(B, N, generator=g, dtype=torch.float64), "answers": torch.tensor([0, 1, 4, 9, 20]),
                "start": torch.tensor([0, 3, 3, 4, 5]), "number": torch.tensor([3, 0, 1, 1, 0]), "base": torch.tensor([0, 7, 7, 14, 28]),
                "num_entities": E,
            },
        ),
        (sampling.find_ranges, {"values": torch.tensor([0, 1, 4, 9, 20]), "lows": torch.tensor([0, 7, 14, 21]), "width": E}),
        (fusion.fuse, {"structure": draw(B, D), "views": [draw(B, D)], "attention": draw(D), "present": torch.rand(M, B, generator=g) < 0.7}),
        (
            fusion.fuse_gradient,
            {
                "grad": draw(B, D), "structure": draw(B, D), "views": [draw(B, D)], "attention": draw(D),
                "present": torch.rand(M, B, generator=g) < 0.7,
            },
        ),
        (project.project, {"features": draw(E, N), "ids": torch.tensor([6, 0, 6, 2]), "weight": draw(D, N), "bias": draw(D)}),
        (
            project.project_gradient,
            {
                "grad": draw(4, D), "features": draw(E, N), "ids": torch.tensor([6, 0, 6, 2]), "weight": draw(D, N), "with_features": True,
            },
        ),
        (power.power_sum, {"x": draw(B, D), "exponent": 3}),
        (power.power_gradient, {"grad": torch.tensor(2.0), "x": draw(B, D), "exponent": 3}),
        (rowwise.row_gather, {"table": entity, "rows": torch.tensor([6, 0, 6])}),
        (noise.NORMAL, {"seed": torch.tensor([3]), "stream": 1, "modality": 0, "row_offset": 0, "step": 2, "rows": B, "columns": D}),
    ]  # fmt: skip
    return {operator.name.removeprefix("dhns_fast::"): (operator, given) for operator, given in arguments}
