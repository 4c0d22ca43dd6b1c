"""ε_θ and its chain of T steps on folded weights, in plain torch: `predict` for training, `Chain` for sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dhns_fast.diffusion.denoiser import LAYER_NORM_EPS
from dhns_fast.diffusion.folding import Folded, Moments
from dhns_fast.diffusion.schedule import Schedule

# Rows a CPU core's cache should hold at once: activations of 4D floats in about 1 MB, but enough rows that a GEMM streams its weights seldom.
# Measured at D 128 on 2 cores: 512 rows 20 % faster than all 6000 at once.
CPU_BLOCK_ELEMENTS = 1 << 18
CPU_BLOCK_ROWS_MIN = 256


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Run library matmuls on `device` at `precision`, whatever autocast and the process-wide TF32 switch say."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def linear(x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """x·weightᵀ in the dtype of x, operands rounded to bf16 where `precision` is "bf16"."""
    if precision == "bf16":
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return F.linear(x, weight)


def predict(folded: Folded, x: Tensor, timesteps: Tensor, condition: Tensor, precision: str) -> Tensor:
    """ε_θ, `[..., D]`, of states and conditions `[..., D]` at timesteps `[...]` in 1..T; differentiable in everything."""
    i = timesteps - 1
    time_moments = Moments(folded.time_moments.mean[i], folded.time_moments.var[i])
    rstd = Moments.of(x).merged_rstd(time_moments, Moments.of(condition))
    pre = linear(x, folded.state, precision) + linear(condition, folded.condition, precision) + folded.time[i]
    h = (pre * rstd + folded.bias1).relu()
    return linear(h, folded.output, precision) * torch.rsqrt(Moments.of(h).var + LAYER_NORM_EPS) + folded.bias2


# (timestep or 0 for x_T, "tail" | "head", modality, first row, last row) -> [rows, D] normal noise
NoiseFn = Callable[[int, str, int, int, int], Tensor]


class Chain:
    """Sampling loop over blocks of rows: every buffer is made once a call and every operation writes into one.

    Args:
        folded: weights, see :func:`dhns_fast.diffusion.folding.fold`.
        schedule: the diffusion schedule of T steps.
        behaviour: "release" (the head is one more step from the tail's new state) or "corrected" (a chain of its own).
        levels: states to return; level s is what the step at t = s + 1 produced.
        precision: "ieee", "tf32" or "bf16" operands.
    """

    def __init__(self, folded: Folded, schedule: Schedule, behaviour: str, levels: Sequence[int], precision: str) -> None:
        self.folded, self.schedule, self.precision = folded, schedule, precision
        self.release = behaviour == "release"
        self.levels = tuple(levels)

    def run(self, condition_tail: Tensor, condition_head: Tensor, noise: NoiseFn) -> tuple[list[Tensor], list[Tensor]]:
        """Conditions `[M, B, D]` -> (heads, tails): two lists of fresh `[M, B, D]`, one a level."""
        M, B, D = condition_tail.shape
        heads = [torch.empty_like(condition_tail) for _ in self.levels]
        tails = [torch.empty_like(condition_tail) for _ in self.levels]
        rows = B if condition_tail.device.type != "cpu" else min(B, max(CPU_BLOCK_ROWS_MIN, CPU_BLOCK_ELEMENTS // (4 * D)))
        for m in range(M):
            for first in range(0, B, max(rows, 1)):
                last = min(first + rows, B)
                self._block(
                    condition_tail[m, first:last],
                    condition_head[m, first:last],
                    lambda t, side, m=m, a=first, b=last: noise(t, side, m, a, b),
                    [h[m, first:last] for h in heads],
                    [t[m, first:last] for t in tails],
                )
        return heads, tails

    def _block(
        self, condition_tail: Tensor, condition_head: Tensor, noise: Callable[[int, str], Tensor], heads: list[Tensor], tails: list[Tensor]
    ) -> None:
        tail_step, head_step = self._stepper(condition_tail), self._stepper(condition_head)
        # A copy, since the state is overwritten and the noise may be the caller's.
        tail = noise(0, "tail").clone()
        head = torch.empty_like(tail) if self.release else noise(0, "head").clone()
        for t in range(self.schedule.T, min(self.levels), -1):
            wanted = [k for k, s in enumerate(self.levels) if s == t - 1]
            tail_step(tail, tail, t, noise(t, "tail") if t > 1 else None)
            if wanted or not self.release:
                head_step(tail if self.release else head, head, t, noise(t, "head") if t > 1 else None)
            for k in wanted:
                heads[k].copy_(head)
                tails[k].copy_(tail)

    def _stepper(self, condition: Tensor) -> Callable[[Tensor, Tensor, int, Tensor | None], None]:
        """step(x, out, t, z): one step of a block whose condition is fixed; `out` may be `x`."""
        f, s, precision = self.folded, self.schedule, self.precision
        D = condition.shape[-1]
        fixed = linear(condition, f.condition, precision)
        moments = Moments.of(condition)
        time_moments = [Moments(mean, var) for mean, var in zip(f.time_moments.mean.unbind(), f.time_moments.var.unbind(), strict=True)]
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
            # G's rows are centred, so centring h changes no product: it is for the variance, and spares the product a large common part.
            a.sub_(a.mean(-1, keepdim=True))
            rstd2 = torch.linalg.vector_norm(a, dim=-1, keepdim=True).square_().div_(4 * D).add_(LAYER_NORM_EPS).rsqrt_()
            if precision == "bf16":
                e.copy_(linear(a, f.output, precision))
            else:
                torch.mm(a, output_t, out=e)
            torch.addcmul(f.bias2, e, rstd2, out=e)
            torch.mul(x, s.mean_scale[i], out=out)
            out.add_(e, alpha=-s.noise_scale[i])
            if z is not None:
                out.add_(z, alpha=s.sigma[i])

        return step
