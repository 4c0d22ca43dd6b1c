"""ε_θ and its chain of T steps on folded weights in plain torch, any device and dtype: `predict` for training, `chain`
for sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS
from dhns_fast.diffusion.folding import Factors, Folded, Moments
from dhns_fast.ops.noise import Noise

# Rows a CPU core's cache should hold at once: activations of 4D floats in about 1 MB, but enough rows that a GEMM
# streams its weights seldom. Measured at D 128 on 2 cores: 512 rows 20 % faster than all 6000 at once.
CPU_BLOCK_ELEMENTS = 1 << 18
CPU_BLOCK_ROWS_MIN = 256


def linear(x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """x·weightᵀ in the dtype of x, operands rounded to bf16 where `precision` is "bf16"."""
    if precision == "bf16":
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return F.linear(x, weight)


def predict(folded: Folded, x: Tensor, timesteps: Tensor, condition: Tensor, precision: str) -> Tensor:
    """ε_θ, `[..., D]`, of states and conditions `[..., D]` at timesteps `[...]` in 1..T; differentiable in
    everything.
    """
    i = timesteps - 1
    time_moments = Moments(folded.time_moments.mean[i], folded.time_moments.var[i])
    rstd = Moments.of(x).merged_rstd(time_moments, Moments.of(condition))
    pre = linear(x, folded.state, precision) + linear(condition, folded.condition, precision) + folded.time[i]
    h = (pre * rstd + folded.bias1).relu()
    return linear(h, folded.output, precision) * torch.rsqrt(Moments.of(h).var + LAYER_NORM_EPS) + folded.bias2


def chain(
    heads: Sequence[Tensor],
    tails: Sequence[Tensor],
    condition_head: Tensor,
    condition_tail: Tensor,
    factors: Factors,
    columns: Sequence[Sequence[float]],
    levels: Sequence[int],
    release: bool,
    precision: str,
    noise: Noise,
) -> None:
    """Fill `heads` and `tails`, a tensor `[M, B, D]` for each of `levels`, from conditions `[M, B, D]`.

    `columns`: those of `dhns_fast.diffusion.schedule.Steps` after its times.
    Rows go through all steps in blocks: every buffer is made once a block and every operation writes into one.
    """
    folded = factors.folded()
    M, B, D = condition_tail.shape
    rows = B if condition_tail.device.type != "cpu" else min(B, max(CPU_BLOCK_ROWS_MIN, CPU_BLOCK_ELEMENTS // (4 * D)))
    if precision == "bf16":
        folded = folded._replace(
            state=folded.state.bfloat16(), condition=folded.condition.bfloat16(), output=folded.output.bfloat16()
        )
    for m in range(M):
        for first in range(0, B, max(rows, 1)):
            part = slice(first, first + rows)
            c_tail = condition_tail[m, part]
            tail_step = _stepper(folded, columns, c_tail, precision)
            head_step = _stepper(folded, columns, condition_head[m, part], precision)
            tail = noise.start(True, m, first, c_tail)
            head = torch.empty_like(tail) if release else noise.start(False, m, first, c_tail)
            T = len(folded.time)
            for t in range(T, min(levels), -1):
                wanted = [k for k, s in enumerate(levels) if s == t - 1]
                noisy = t > 1 and columns[2][t - 1] > 0
                tail_step(tail, tail, t, noise.at(t, T, True, m, first, tail) if noisy else None)
                # "release": the head is one more step from the tail's new state. "corrected": it has a chain of its
                # own.
                if wanted or not release:
                    head_step(
                        tail if release else head, head, t, noise.at(t, T, False, m, first, head) if noisy else None
                    )
                for k in wanted:
                    heads[k][m, part] = head
                    tails[k][m, part] = tail


def _stepper(
    folded: Folded, columns: Sequence[Sequence[float]], condition: Tensor, precision: str
) -> Callable[[Tensor, Tensor, int, Tensor | None], None]:
    """step(x, out, t, z): one step of a block whose condition is fixed; `out` may be `x`."""
    f, (mean_scale, noise_scale, sigma, slope, width) = folded, columns
    D = condition.shape[-1]
    fixed = linear(condition, f.condition, precision)
    moments = Moments.of(condition)
    time_moments = [
        Moments(mean, var) for mean, var in zip(f.time_moments.mean.unbind(), f.time_moments.var.unbind(), strict=True)
    ]
    times = f.time.unbind()
    state_t, output_t = f.state.T, f.output.T
    a, e = torch.empty_like(fixed), torch.empty_like(condition)

    def step(x: Tensor, out: Tensor, t: int, z: Tensor | None) -> None:
        i = t - 1
        mean = x.mean(-1, keepdim=True)
        torch.sub(x, mean, out=e)
        var = torch.linalg.vector_norm(e, dim=-1, keepdim=True).square_().div_(D)
        rstd = Moments(mean, var).merged_rstd(time_moments[i], moments)
        if precision == "bf16":
            torch.add(fixed, linear(x, f.state, precision), out=a)
        else:
            torch.addmm(fixed, x, state_t, out=a)
        a.add_(times[i])
        torch.addcmul(f.bias1, a, rstd, out=a).relu_()
        # G's rows are centred, so centring h changes no product: it is for the variance, and spares the product a large
        # common part.
        a.sub_(a.mean(-1, keepdim=True))
        rstd2 = torch.linalg.vector_norm(a, dim=-1, keepdim=True).square_().div_(4 * D).add_(LAYER_NORM_EPS).rsqrt_()
        if precision == "bf16":
            e.copy_(linear(a, f.output, precision))
        else:
            torch.mm(a, output_t, out=e)
        torch.addcmul(f.bias2, e, rstd2, out=e)
        if slope:
            centre = x * slope[i]
            torch.clamp(e, centre - width[i], centre + width[i], out=e)
        torch.mul(x, mean_scale[i], out=out)
        out.add_(e, alpha=-noise_scale[i])
        if z is not None:
            out.add_(z, alpha=sigma[i])

    return step
