"""PNG plots of a run: loss and MRR curves, the hierarchy of generated negatives, the attention over modalities. Needs
matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhns_fast import files
from dhns_fast.data import NegativeSampler
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.models import KGEModel
from dhns_fast.negatives.controls import gaussian
from dhns_fast.ops.fusion_eager import fuse
from dhns_fast.ops.hal_eager import triple_score
from dhns_fast.sampler import DiffHEG
from dhns_fast.train.assemble import build_generator
from dhns_fast.train.trainer import Trainer

SAMPLE = 1024
TERMS = {
    "loss_kgc": "KGC loss",
    "loss_hal": "hardness-adaptive loss",
    "loss_diffusion": "diffusion loss",
    "loss_n3": "N3 penalty",
}


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw_all(trainer: Trainer, folder: Path) -> list[Path]:
    """Every plot that the run has data for, into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = level_scores(trainer)
    knees = margin_knees(trainer) if trainer.generator is not None else {}
    made = [
        save(folder / "training.png", lambda axes: _curves(axes, trainer.progress.history), 2),
        save(folder / "hierarchy.png", lambda axes: _hierarchy(axes, scores, knees), 1),
    ]
    if trainer.model.fusion is not None and trainer.model.fusion.attention is not None:
        shares = attention_shares(trainer)
        made.append(save(folder / "attention.png", lambda axes: _attention(axes, shares), 1))
    return made


def level_scores(trainer: Trainer) -> dict[str, Tensor]:
    """:func:`scores_by_hardness` of a sample of validation (or train) triples, at every level of the configuration."""
    model, kg, config = trainer.model, trainer.kg, trainer.config
    source = (kg.valid if len(kg.valid) else kg.train).to(trainer.device)
    rng = torch.Generator(trainer.device).manual_seed(config.seed)
    batch = source[torch.randperm(len(source), generator=rng, device=trainer.device)[:SAMPLE]]
    generator = None
    if trainer.generator is not None:
        generator = build_generator(config, model, config.level_list).to(trainer.device).eval()
        generator.load_state_dict(trainer.generator.state_dict())
    return scores_by_hardness(model, generator, batch, trainer.negatives, rng)


@torch.no_grad()
def scores_by_hardness(
    model: KGEModel, generator: DiffHEG | None, batch: Tensor, negatives: NegativeSampler, rng: torch.Generator
) -> dict[str, Tensor]:
    """Scores of triples [B, 3] and of what may stand in the place of their tails: what is generated at each level from
    hard to easy, uniform corruptions, and Gaussian noise with the norm of the true tail; each on the CPU, [B]."""
    h, r, t = batch.unbind(1)
    head, tail, relation = model.modalities(h), model.modalities(t), model.relation(r)
    attention = None if model.fusion is None else model.fusion.attention

    def fused(x: Tensor, ids: Tensor) -> Tensor:
        return x if attention is None else fuse(x, attention, model.fusion.mask(ids))  # type: ignore[union-attr]

    def score(x: Tensor) -> Tensor:
        made = triple_score(model.condition, real, model.hal_relation(relation), x, **model.hal_options())
        return (made if made.ndim == 1 else made.mean(0)) + model.offset

    real = head[0] if attention is None else fused(head, h)
    out = {"positives": model.score_hrt(batch)}
    if generator is not None:
        _, tails = generator.sample(head, relation, tail, generator=rng)
        out |= {f"level {level}": score(fused(made, t)) for level, made in zip(generator.levels, tails, strict=True)}
    corrupt = negatives.corrupt(batch, "tail", rng)[:, 0]
    out["uniform corruptions"] = model.score_hrt(torch.stack([h, r, corrupt], 1))
    if model.condition:
        out["Gaussian"] = score(gaussian(model.embed(t), rng))
    return {name: x.float().cpu() for name, x in out.items()}


def draw_hierarchies(scores: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """One panel for each name of `scores`, as :func:`scores_by_hardness` gives them."""

    def draw(axes: Any) -> None:
        for axis, (name, values) in zip(axes if len(scores) > 1 else [axes], scores.items(), strict=True):
            _hierarchy(axis, values, {})
            axis.set_title(name)

    save(path, draw, len(scores))


@torch.no_grad()
def margin_knees(trainer: Trainer) -> dict[str, float]:
    """The score, as :func:`level_scores` gives it, above which a level's negatives are pushed down with more than half
    the force: γ − m_i.
    """
    config, offset = trainer.config, trainer.model.offset
    times = Schedule.of(config.noise_schedule, config.diffusion_steps).levels(config.active_levels)
    return {
        f"level {level}": offset - factor * offset
        for level, factor in zip(times, trainer.margins().tolist(), strict=True)
    }


@torch.no_grad()
def attention_shares(trainer: Trainer) -> dict[str, Tensor]:
    """Attention of every entity that has the modality, by modality name."""
    model, fusion = trainer.model, trainer.model.fusion
    assert fusion is not None
    mask = fusion.mask()
    weights = fusion.weights(fusion.modalities(model.structure_table()), mask)
    return {name: weights[m][mask[m]].cpu() for m, name in enumerate(fusion.names)}


def save(path: Path, draw: Callable[[Any], None], columns: int) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(6.4 * columns, 4.2), layout="constrained")
    try:
        draw(axes)
        with files.replacing(path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        plt.close(figure)
    return path


def _curves(axes: Any, history: Sequence[Mapping[str, float]]) -> None:
    left, right = axes
    epochs = [row["epoch"] for row in history]
    for key, label in TERMS.items():
        values = [row[key] for row in history]
        if any(values):
            left.plot(epochs, values, label=label)
    left.set(xlabel="epoch", ylabel="mean loss", yscale="log", title="Training loss")
    left.legend()
    validated = [row for row in history if "valid_mrr" in row]
    for key, label in (("valid_mrr", "MRR"), ("valid_hits@1", "Hits@1"), ("valid_hits@10", "Hits@10")):
        right.plot([row["epoch"] for row in validated], [row[key] for row in validated], marker=".", label=label)
    right.set(xlabel="epoch", ylabel="filtered, realistic", title="Validation", ylim=(0, None))
    if validated:
        right.legend()
    for axis in axes:
        axis.grid(alpha=0.3)


def _hierarchy(axis: Any, scores: Mapping[str, Tensor], knees: Mapping[str, float]) -> None:
    finite = {name: x[x.isfinite()].numpy() for name, x in scores.items() if x.isfinite().any()}
    if not finite:
        axis.set(title="No score of positives or negatives is finite")
        return
    parts = axis.violinplot(
        [finite[name] for name in finite], showmedians=True, quantiles=[[0.25, 0.75]] * len(finite), widths=0.85
    )
    parts["cquantiles"].set_linewidth(0.8)
    for name, body in zip(finite, parts["bodies"], strict=True):
        body.set_facecolor(
            "tab:green"
            if name == "positives"
            else "tab:gray"
            if name in ("uniform corruptions", "Gaussian")
            else "tab:red"
        )
        body.set_alpha(0.5)
    drawn = [(place, knees[name]) for place, name in enumerate(finite, 1) if name in knees]
    for i, (place, knee) in enumerate(drawn):
        label = None if i else "margin: above it the loss pushes"
        axis.hlines(knee, place - 0.45, place + 0.45, color="black", linestyles="dashed", label=label)
    if drawn:
        axis.legend()
    axis.set_xticks(range(1, len(finite) + 1), finite, rotation=20)
    axis.set(ylabel="score", title="Scores of positives and negatives, hard to easy, with medians and quartiles")
    axis.grid(axis="y", alpha=0.3)


def _attention(axis: Any, shares: Mapping[str, Tensor]) -> None:
    axis.boxplot([x.numpy() for x in shares.values()], showfliers=False)
    axis.set_xticks(range(1, len(shares) + 1), [f"{name}\n{len(x)} entities" for name, x in shares.items()])
    axis.set(ylabel="attention", title="Attention over modalities, entities that have them", ylim=(0, 1))
    axis.grid(axis="y", alpha=0.3)
