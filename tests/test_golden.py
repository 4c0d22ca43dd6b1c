"""What the authors' release computed, where its recorded cases lie beside the checkout: the oracle, the models and the
whole contract.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.cases import relative
from torch import Tensor

from dhns_fast.fusion import Fusion
from dhns_fast.models import MODELS
from dhns_fast.reference import diffusion as reference

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "../shared/golden"
CHECK = ROOT / "../shared/tools/golden_check.py"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recorded cases of the release are not beside the checkout"
)

FORWARD, LONG = 2e-6, 1e-5


class Recorded:
    """The arrays of one file as tensors, and a group of them by prefix."""

    def __init__(self, path: Path) -> None:
        self.arrays, self.kind = np.load(path), path.stem.split("_")[1]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: self[name] for name in self.arrays.files if name.startswith(prefix)}


@pytest.mark.skipif(not CHECK.is_file(), reason="golden_check.py is not beside the checkout")
def test_contract() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, CHECK, GOLDEN], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "0 failed"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("diffheg_*.npz")), ids=lambda p: getattr(p, "stem", "none"))
def test_diffusion_oracle(path: Path) -> None:
    case = Recorded(path)
    weights, T = case.group("state/"), int(case["T"])
    h, r, t = case["x_h"], case["x_r"], case["x_t"]
    options = {
        "kind": case.kind,
        "behaviour": "release",
        "relation_range": (case["margin"] + case["eps"]).item() / int(case["dim_r"]),
    }

    beta, _, bar = reference.schedule(T, torch.float32)
    assert relative(beta, case["betas"]) < FORWARD
    assert relative(bar, case["alpha_bars"]) < FORWARD
    assert relative(reference.time_embedding(weights, torch.arange(1, T + 1)), case["time_emb"]) < FORWARD
    for mode, entity in (("tail", h), ("head", t)):
        c = reference.condition(entity=entity, relation=r, mode=mode, **options)
        assert relative(c, case[f"cond/{mode}"]) < FORWARD
        predicted = case.group(f"eps/{mode}/")
        assert len(predicted) == 3
        for step, expected in predicted.items():
            steps = torch.full((len(h),), int(step))
            assert relative(reference.predict_noise(weights, h + 0.1, steps, c), expected) < FORWARD, (mode, step)

    assert list(reference.default_levels(T)) == case["levels"].tolist()
    heads, tails = reference.sample(
        weights, h, r, t, case["noise/x_T"], case["noise/tail"], case["noise/head"], T, **options
    )
    for found, expected in ((heads, case["out_h"]), (tails, case["out_t"])):
        for one, other in zip(found, expected, strict=True):
            assert relative(one, other) < LONG

    leaves = {"x_h": h, "x_r": r, "x_t": t, **weights}
    for x in leaves.values():
        x.requires_grad_()
    loss = reference.diffusion_loss(weights, h, r, t, case["loss_t"], case["loss_eps"], T, **options)
    assert relative(loss, case["loss"]) < FORWARD
    loss.backward()
    gradients = case.group("grad/")
    assert len(gradients) == 3 + 14
    for name, expected in gradients.items():
        assert relative(leaves[name].grad, expected) < LONG, name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("hal_*.npz")), ids=lambda p: getattr(p, "stem", "none"))
def test_models(path: Path) -> None:
    """Scores of the release's models (fused, but for DistMult), positives and corruptions, and its attention
    weights.
    """
    case = Recorded(path)
    state = case.group("state/")
    E, R, D = int(case["entities"]), int(case["relations"]), int(case["dim"])
    modalities = ("img", "text")
    fusion = Fusion(
        {name: state[f"{name}_embeddings.weight"] for name in modalities}, D, attend=case.kind != "distmult"
    )
    for name, projection in zip(modalities, fusion.projections, strict=True):
        projection.load_state_dict({"weight": state[f"{name}_proj.weight"], "bias": state[f"{name}_proj.bias"]})
    model = MODELS[case.kind](E, R, D, margin=case["margin"].item(), epsilon=case["epsilon"].item(), fusion=fusion)
    model.entity.weight.data, model.relation.weight.data = (
        state["ent_embeddings.weight"],
        state["rel_embeddings.weight"],
    )
    B = len(case["batch_t"])
    heads = case["batch_h"].view(-1, B)  # positives first, then one corrupted head a row
    triples = [torch.stack([h, case["batch_r"], case["batch_t"]], 1) for h in heads]
    with torch.no_grad():
        if fusion.attention is not None:
            fusion.attention.copy_(state["ent_attn.weight"].flatten())
            ids = heads[0]
            attention = fusion.weights(model.modalities(ids), fusion.mask(ids))
            assert relative(attention.T, case["attention_h"]) < FORWARD
            assert relative(model.embed(ids), case["joint_h"]) < FORWARD
        assert relative(model.score_hrt(triples[0]), case["p_score"].flatten()) < FORWARD
        assert relative(torch.stack([model.score_hrt(x) for x in triples[1:]], 1), case["n_score"]) < FORWARD
        # The same corruptions as the model's own query meets them.
        query = model.query(case["batch_t"], case["batch_r"], "head")
        assert relative(model.match(query, model.view(model.embed(heads[1:].T), "head")), case["n_score"]) < FORWARD
    if case.kind == "rotate":
        assert model.relation_range == pytest.approx(state["rel_embedding_range"].item())
        assert (
            relative(
                model.hal_relation(model.relation.weight),
                state["rel_embeddings.weight"] * math.pi / model.relation_range,
            )
            < FORWARD
        )
