"""The diffusion side of DHNS as the paper states it: noise predictor, conditions, schedule, loss, sampling. Plain and
slow on purpose.

Everything is a function of a mapping of weights under the release's state-dict names and works in the dtype of its
inputs, so that float64 gives the truth that every faster path is compared with. Source: Niu & Zhang, DASFAA 2025 (arXiv
2501.15393), §3.2-3.3, and the authors' release where the two differ ("release" against "corrected").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = "denoiser.denoiser_block."


def schedule(T: int, dtype: torch.dtype = torch.float64, kind: str = "linear") -> tuple[Tensor, Tensor, Tensor]:
    """β, α = 1 − β and ᾱ = ∏α, each `[T]`; entry i belongs to timestep i + 1. `kind`: "linear", the release's;
    "scaled", 1000/T times that; "cosine", Nichol and Dhariwal's (ICML 2021). β is at most .999."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    if kind == "scaled":
        beta = beta * 1000 / T
    elif kind == "cosine":
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        beta = torch.tensor([1 - f[t] / f[t - 1] for t in range(1, T + 1)], dtype=torch.float64)
    beta = beta.clamp(max=0.999)
    alpha = 1 - beta
    return beta.to(dtype), alpha.to(dtype), alpha.cumprod(0).to(dtype)


def default_levels(T: int) -> tuple[int, ...]:
    """The release's five hardness levels, hardest first: level s is the state that the step at t = s + 1 produced."""
    return (0, T // 10, T // 8, T // 4, T // 2)


def positional_encoding(timesteps: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """`[sin(t·f), cos(t·f)]`, shape `[B, D]`, of timesteps `[B]` with f_k = exp(−ln(10000)·k/(D/2 − 1))."""
    half = D // 2
    f = torch.exp(torch.arange(half, dtype=dtype, device=timesteps.device) * (-math.log(10000.0) / (half - 1)))
    angle = timesteps.to(dtype)[:, None] * f
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def time_embedding(weights: Mapping[str, Tensor], timesteps: Tensor) -> Tensor:
    """τ(t), shape `[B, D]`, of timesteps `[B]`."""
    w1, w3 = weights[BLOCK + "time_mlp.1.weight"], weights[BLOCK + "time_mlp.3.weight"]
    pe = positional_encoding(timesteps, w1.shape[1], w1.dtype)
    return F.linear(
        F.gelu(F.linear(pe, w1, weights[BLOCK + "time_mlp.1.bias"])), w3, weights[BLOCK + "time_mlp.3.bias"]
    )


def predict_noise(weights: Mapping[str, Tensor], x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
    """ε_θ(x_t, t, c), shape `[B, D]`, of x `[B, D]`, timesteps `[B]` in 1..T and condition `[B, D]`."""

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            y, y.shape[-1:], weights[BLOCK + name + ".weight"], weights[BLOCK + name + ".bias"], eps=1e-5
        )

    y = norm(torch.cat([x, time_embedding(weights, timesteps), condition], dim=-1), "layer_norm1")
    h = norm(F.linear(y, weights[BLOCK + "mlp1.weight"], weights[BLOCK + "mlp1.bias"]).relu(), "layer_norm2")
    h = F.linear(h, weights[BLOCK + "mlp2.weight"], weights[BLOCK + "mlp2.bias"])
    return F.linear(h, weights["denoiser.output_layer.weight"], weights["denoiser.output_layer.bias"])


def rotate(entity: Tensor, phase: Tensor) -> Tensor:
    """entity ∘ e^{i·phase}: entity `[..., D]` stored [re, im], phase `[..., D/2]` in radians."""
    re, im = entity.chunk(2, dim=-1)
    cos, sin = phase.cos(), phase.sin()
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """a ∘ b of complex vectors `[..., D]` stored [re, im]."""
    (ar, ai), (br, bi) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    return torch.cat([ar * br - ai * bi, ar * bi + ai * br], dim=-1)


def conjugate(a: Tensor) -> Tensor:
    """Complex conjugate of vectors `[..., D]` stored [re, im]."""
    re, im = a.chunk(2, dim=-1)
    return torch.cat([re, -im], dim=-1)


def condition(
    kind: str, behaviour: str, entity: Tensor, relation: Tensor, mode: str, relation_range: float = 1.0
) -> Tensor:
    """c, shape `[..., D]`: where the entity that stays and the relation point to.

    Args:
        kind: "distmult", "complex", "rotate" or "transe".
        behaviour: "release" or "corrected"; they differ for TransE alone, where the release's signs are swapped.
        entity: the entity that stays, `[..., D]`: the head when `mode` is "tail", the tail when it is "head".
        relation: `[..., dim_r]`; for RotatE the raw parameter, turned into phases by π / relation_range.
        mode: the side to be generated.
        relation_range: RotatE's (γ + ε) / dim_r.
    """
    tail = mode == "tail"
    if kind == "distmult":
        return entity * relation
    if kind == "complex":
        return complex_product(entity, relation if tail else conjugate(relation))
    if kind == "rotate":
        phase = relation * (math.pi / relation_range)
        return rotate(entity, phase if tail else -phase)
    plus = tail == (behaviour != "release")
    return entity + relation if plus else entity - relation


def diffusion_loss(
    weights: Mapping[str, Tensor],
    x_h: Tensor,
    x_r: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    T: int,
    kind: str,
    behaviour: str = "release",
    relation_range: float = 1.0,
    schedule_kind: str = "linear",
) -> Tensor:
    """L_diff of one modality, a scalar: the mean absolute error of the predicted noise, tail side plus head side.

    Entities `[B, D]`, relation `[B, dim_r]`, one timestep `[B]` in 1..T and one noise `[B, D]` a row for both sides.
    Under "corrected" the loss trains the generator only: nothing flows into the embeddings.
    """
    if behaviour != "release":
        x_h, x_r, x_t = x_h.detach(), x_r.detach(), x_t.detach()
    if behaviour == "normalised":
        x_h, x_r, x_t, _ = normalise(kind, x_h, x_r, x_t)
    bar = schedule(T, x_h.dtype, schedule_kind)[2].to(x_h.device)[timesteps - 1][:, None]

    def side(clean: Tensor, kept: Tensor, mode: str) -> Tensor:
        noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        predicted = predict_noise(
            weights, noisy, timesteps, condition(kind, behaviour, kept, x_r, mode, relation_range)
        )
        return (noise - predicted).abs().mean()

    return side(x_t, x_h, "tail") + side(x_h, x_t, "head")


def normalise(kind: str, x_h: Tensor, x_r: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads, relations and tails of one modality at unit root mean square, heads and tails together (RotatE's phases as
    they are), and the root mean square that heads and tails had."""
    scale = torch.cat([x_h, x_t]).square().mean().sqrt()
    return x_h / scale, x_r if kind == "rotate" else x_r / x_r.square().mean().sqrt(), x_t / scale, scale


def sample(
    weights: Mapping[str, Tensor],
    x_h: Tensor,
    x_r: Tensor,
    x_t: Tensor,
    x_T: Tensor,
    noise_tail: Tensor,
    noise_head: Tensor,
    T: int,
    kind: str,
    behaviour: str = "release",
    relation_range: float = 1.0,
    levels: Sequence[int] | None = None,
    x_T_head: Tensor | None = None,
    schedule_kind: str = "linear",
    clip: float | None = None,
    times: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Generated heads and tails of one modality: two lists with one `[B, D]` a level.

    Entities, x_T and x_T_head `[B, D]`; noise `[T − 1, B, D]`, row 0 for t = T. Under "release" only the tail is a
    chain and the head of a step is one more step taken from the tail state that the step has just produced; else the
    head has its own chain, started from `x_T_head`. `clip` bounds the clean embedding that a step predicts. With
    `times`, rising and ending with T, the chain is the deterministic one of Song et al. (ICLR 2021) from each time to
    the one before, and adds no noise.
    """
    beta, alpha, bar = schedule(T, x_h.dtype, schedule_kind)
    scale = x_h.new_ones(())
    if behaviour == "normalised":
        x_h, x_r, x_t, scale = normalise(kind, x_h, x_r, x_t)

    def step(x: Tensor, t: int, c: Tensor, z: Tensor | None) -> Tensor:
        i = t - 1
        noise = predict_noise(weights, x, torch.full((len(x),), t, device=x.device), c)
        clean = (x - (1 - bar[i]).sqrt() * noise) / bar[i].sqrt()
        if clip is not None:
            clean = clean.clamp(-clip, clip)
            noise = (x - bar[i].sqrt() * clean) / (1 - bar[i]).sqrt()
        if times is not None:
            after = bar[before[t] - 1] if before[t] else bar.new_ones(())
            return after.sqrt() * clean + (1 - after).sqrt() * noise
        x = (x - beta[i] / (1 - bar[i]).sqrt() * noise) / alpha[i].sqrt()
        return x if z is None else x + beta[i].sqrt() * z

    c_tail = condition(kind, behaviour, x_h, x_r, "tail", relation_range)
    c_head = condition(kind, behaviour, x_t, x_r, "head", relation_range)
    tail, head = x_T, x_T_head if behaviour != "release" and x_T_head is not None else x_T
    heads, tails = {}, {}
    path = list(times) if times is not None else list(range(1, T + 1))
    before = dict(zip(path, (0, *path), strict=False))
    for t in reversed(path):
        z_tail, z_head = (noise_tail[T - t], noise_head[T - t]) if t > 1 and times is None else (None, None)
        tail = step(tail, t, c_tail, z_tail)
        head = step(tail if behaviour == "release" else head, t, c_head, z_head)
        heads[before[t]], tails[before[t]] = head * scale, tail * scale
    wanted = default_levels(T) if levels is None else levels
    return [heads[s] for s in wanted], [tails[s] for s in wanted]
