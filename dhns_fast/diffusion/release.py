"""What scripts of the release use of its generator beside the class itself: its schedule, its steps one at a time, and
the order of its draws.

Nothing here is on the way of :meth:`dhns_fast.sampler.DiffHEG.sample`, which takes all steps in one operator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhns_fast import checks
from dhns_fast.diffusion.denoiser import Denoiser
from dhns_fast.diffusion.schedule import Schedule


class ReleaseMembers(nn.Module):
    """Members of the release's `DiffHEG`, computed as it does; timesteps are int64 `[B]` or `[B, 1]` in 1..T, states
    `[B, D]`.
    """

    T: int
    denoiser: Denoiser
    schedule: str
    _schedule: Schedule

    @property
    def betas(self) -> Tensor:
        """β of steps 1..T, float32 `[T]`."""
        # The linear schedule rounds as the release does.
        if self.schedule == "linear":
            betas = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float32, device="cpu")
        else:
            betas = torch.tensor(self._schedule.beta, dtype=torch.float32, device="cpu")
        return betas.to(next(self.parameters()).device)

    @property
    def alphas(self) -> Tensor:
        """α = 1 − β, float32 `[T]`."""
        return 1 - self.betas

    @property
    def alpha_bars(self) -> Tensor:
        """ᾱ, the running product of α, float32 `[T]`."""
        return torch.cumprod(self.alphas, dim=0)

    def q_sample(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Noisy states √ᾱ·x + √(1 − ᾱ)·ε."""
        checks.real("x_t", x_t, t=t)
        bar = self.alpha_bars[t.view(-1, 1) - 1]
        return torch.sqrt(bar) * x_t + torch.sqrt(1 - bar) * epsilon

    def p_sample(self, x_noisy: Tensor, t: Tensor, x_ht: Tensor, x_r: Tensor, mode: str) -> Tensor:
        """One step back, with noise from torch's generator unless the first row's t is 1."""
        checks.real("x_noisy", x_noisy, t=t)
        t = t.view(-1, 1)
        beta, alpha, bar = (values[t - 1] for values in (self.betas, self.alphas, self.alpha_bars))
        predicted = self.denoiser(x_noisy, t, x_ht, x_r, mode)
        mean = 1 / torch.sqrt(alpha) * (x_noisy - beta / torch.sqrt(1 - bar) * predicted)
        return mean + torch.sqrt(beta) * torch.randn_like(x_noisy) if t[0] > 1 else mean

    def denoiser_loss(self, noise: Tensor, noise_pred: Tensor) -> Tensor:
        """mean |ε − ε_θ|, a scalar."""
        return F.l1_loss(noise, noise_pred)


def draw(like: Tensor, T: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """The noise of one `sample` in the order and from the generators that the release draws it with: x_T on the CPU,
    then for t = T..2 on the device of `like` (`[M, B, D]`) the tail's and the head's; one modality after the other, as
    its scripts call it.

    Args:
        generator: in place of torch's default ones; all is drawn on its device.

    Returns:
        x_T `[M, B, D]`, and the noise of tails and heads `[T − 1, M, B, D]`.
    """
    M, B, D = like.shape
    first, later = (torch.device("cpu"), like.device) if generator is None else (generator.device, generator.device)
    start, tail, head = like.new_empty(M, B, D), like.new_empty(T - 1, M, B, D), like.new_empty(T - 1, M, B, D)
    for m in range(M):
        start[m] = torch.randn(B, D, generator=generator, device=first, dtype=like.dtype)
        for step in range(T - 1):
            for noise in (tail, head):
                noise[step, m] = torch.randn(B, D, generator=generator, device=later, dtype=like.dtype)
    return start, tail, head
