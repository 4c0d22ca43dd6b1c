"""DiffHEG, the diffusion-based hierarchical embedding generator: a drop-in for the release's class, any device, any
modality count.

Niu & Zhang, "Diffusion-based Hierarchical Negative Sampling for Multimodal Knowledge Graph Completion", DASFAA 2025,
arXiv 2501.15393, §3.2-3.3.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dhns_fast import checks
from dhns_fast.catalogue import BEHAVIOURS, PRECISIONS, SIDES, default_levels, default_schedule
from dhns_fast.diffusion.conditions import CONDITIONS
from dhns_fast.diffusion.denoiser import Denoiser
from dhns_fast.diffusion.folding import Factors, factors, fold
from dhns_fast.diffusion.release import ReleaseMembers, draw
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.errors import InputError, Shown
from dhns_fast.ops import backend as backends
from dhns_fast.ops import denoise
from dhns_fast.ops.denoise_eager import predict
from dhns_fast.ops.diffusion_loss import diffusion_loss
from dhns_fast.ops.noise import Noise
from dhns_fast.ops.precision import matmul_precision
from dhns_fast.scoring import topk_all

if TYPE_CHECKING:
    from dhns_fast.data.filter import Ragged

__all__ = ["DiffHEG", "DiffHEGComplEx", "DiffHEGRotatE", "DiffHEGTransE", "SampleNoise"]

DRAWS = ("philox", "release")
MOMENTUM = 0.1  # of the scales that a generator of behaviour "normalised" keeps, as in batch normalisation
CLIP = 3.0  # of behaviour "normalised", in units of the embeddings' root mean square
KEPT_KEY = "mean_squares"
RANGE_KEY = "denoiser.scoring_module.rel_embedding_range"


@dataclass(frozen=True)
class SampleNoise:
    """Fixed noise of one :meth:`DiffHEG.sample` call, in place of the counter-based generator.

    Args:
        x_T: start of the chain, `[B, D]` (or `[M, B, D]` for M modalities at once).
        tail: noise added to the tail, `[T − 1, B, D]` (or `[T − 1, M, B, D]`), row 0 for t = T, last row for t = 2.
        head: noise added to the head, shaped as `tail`.
        x_T_head: start of the head's own chain under the behaviours but "release", shaped as `x_T`; None: the same as
            `x_T`.
    """

    x_T: Tensor
    tail: Tensor
    head: Tensor
    x_T_head: Tensor | None = None


class DiffHEG(ReleaseMembers):
    """Generates heads and tails from hard to easy by reading a denoising chain at several depths.

    Weights have the release's names, so its checkpoints load strictly; everything else is derived. One generator serves
    all modalities.

    Args:
        embedding_dim: D, width of entity embeddings; even, at least 4.
        T: diffusion steps, at least 1 (the paper: 50).
        dim_r: RotatE's phase range is (γ + ε) / dim_r; the other conditions do not read it. Relation embeddings are as
            wide as the condition takes them, D, and D / 2 for RotatE, whatever it is.
        margin: γ of the KGE model, read by RotatE alone.
        eps: ε of the same formula (the release: 2.0).
        condition: "distmult", "transe", "rotate" or "complex": the KGE model whose query conditions the chain.
        behaviour: "release" reproduces the authors' code (heads taken from the tail's state, TransE's swapped signs,
            gradients of the diffusion loss into the embeddings); "corrected" gives heads their own chain, TransE's
            condition its sign, and trains the generator only; "normalised" does that on entities and conditions of unit
            root mean square, with a schedule that ends in noise and predicted embeddings clipped, and scales the
            results back (docs/behaviours.md has its formula).
        levels: states to return, each in 0..T − 1; level s is the state at time s, what the step at t = s + 1 produced,
            so small is hard; a number between 0 and 1 that is no integer is the share 1 − √ᾱ_s of the clean embedding
            that noise has replaced, and means the level nearest to it. None: the paper's five, {0, T//10, T//8, T//4,
            T//2}.
        precision: "ieee" float32 operands, "tf32" (CUDA) or "bf16"; accumulation and statistics are float32. None:
            "tf32" on CUDA, "ieee" elsewhere. float64 modules compute in float64.
        backend: which implementation runs; None or "auto": the best one available on the device (see
            `DHNS_FAST_BACKEND`).
        draws: where `sample` has its noise from. "philox": one number of torch's generator seeds a counter, so that
            rows get the same noise on every device and in any split of the batch, and none of it is held. "release":
            drawn from torch's generators in the release's order and held, 2·(T − 1)·B·D numbers; on a CPU a seed then
            gives what it gives the release. With behaviour "release" only.
        schedule: "linear", "scaled" or "cosine" (:class:`dhns_fast.diffusion.schedule.Schedule`). None: "scaled" under
            "normalised", else the release's "linear".
        sampling_steps: steps of a deterministic DDIM chain that lands on the levels, in place of the T of the ancestral
            one; None: all T.
        clip: bound of the components of the clean embedding that a step predicts, in the units of what is diffused.
            None: 3 under "normalised", where an untrained generator's chain would end hundreds of times too far out,
            else no bound.
        modalities: M of the calls whose scales a generator of behaviour "normalised" is to keep, in its buffer
            `mean_squares`; the other behaviours do not read it. None: no scales are kept.
        validate: check every input for NaN and infinity before a chain or a loss; on CUDA this waits for the device.

    Raises:
        InputError: an argument is out of range; the message names it.
        BackendUnavailableError: `backend` was named and cannot run here.
    """

    mean_squares: Tensor | None

    def __init__(
        self,
        embedding_dim: int,
        T: int,
        dim_r: int,
        margin: float | None,
        eps: float | None,
        condition: str = "distmult",
        behaviour: str = "release",
        levels: Sequence[int | float] | None = None,
        precision: str | None = None,
        backend: str | None = None,
        validate: bool = False,
        draws: str = "philox",
        schedule: str | None = None,
        sampling_steps: int | None = None,
        clip: float | None = None,
        modalities: int | None = None,
    ) -> None:
        super().__init__()
        width = getattr(embedding_dim, "__index__", lambda: 0)()
        if isinstance(embedding_dim, bool) or width < 4 or width % 2:
            why = "of a timestep D/2 sines and D/2 cosines are taken, at frequencies spaced by 1/(D/2 − 1)"
            raise InputError("embedding_dim", embedding_dim, f"an even integer of at least 4: {why}")
        embedding_dim, T = width, checks.count("T", T)
        checks.flag(validate=validate)
        checks.one_of("condition", condition, CONDITIONS)
        checks.one_of("behaviour", behaviour, BEHAVIOURS)
        if precision is not None:
            checks.one_of("precision", precision, PRECISIONS)
        checks.one_of("draws", draws, DRAWS)
        if draws == "release" and behaviour != "release":
            raise InputError(
                "draws", draws, f"'philox' for behaviour {behaviour!r}: the release has no such chain to draw for"
            )
        self._condition = CONDITIONS[condition]
        normalised = behaviour == "normalised"
        self.schedule = default_schedule(behaviour) if schedule is None else schedule
        self._schedule = Schedule.of(self.schedule, T)
        if levels is not None:
            accepted = f"one or more integers in 0..{T - 1} (T - 1)"
            if isinstance(levels, str) or not isinstance(levels, Iterable):
                raise InputError("levels", levels, accepted)
            levels = list(levels)
            if not all(hasattr(level, "__float__") for level in levels):
                raise InputError("levels", levels, accepted)
        wanted = self._schedule.levels(default_levels(T) if levels is None else levels)
        if not wanted or any(s not in range(T) for s in wanted):
            raise InputError("levels", wanted, f"one or more integers in 0..{T - 1} (T - 1)")
        relation_range = None
        if self._condition.has_relation_range:
            dim_r = checks.count("dim_r", dim_r)
            numbers = all(hasattr(x, "__float__") for x in (margin, eps))
            if margin is None or eps is None or not numbers or not 0 < margin + eps < float("inf"):
                raise InputError(
                    "margin + eps",
                    Shown(f"{margin!r} + {eps!r}"),
                    f"a positive, finite sum: phases of {condition!r} are r·π·dim_r/(γ + ε)",
                )
            relation_range = (float(margin) + float(eps)) / dim_r
        self.embedding_dim, self.T, self.dim_r = embedding_dim, T, dim_r
        self.condition, self.behaviour, self.levels = condition, behaviour, tuple(int(s) for s in wanted)
        self.precision, self.backend, self.validate, self.draws = precision, backend, validate, draws
        self.relation_dim = embedding_dim // self._condition.relation_divisor
        if backend is not None:
            backends.check(backend, denoise.BACKENDS)
        self.denoiser = Denoiser(embedding_dim, relation_range, self._condition, behaviour == "release")
        self.sampling_steps, self.clip = sampling_steps, CLIP if clip is None and normalised else clip
        self._steps = self._schedule.steps(sampling_steps, self.levels, self.clip)
        self.register_buffer("_forward_coefficients", self._schedule.forward_coefficients().float(), persistent=False)
        if modalities is not None:
            modalities = checks.count("modalities", modalities)
        # Of each modality's entities, then of the relations: zeros until the first update of the generator.
        kept = torch.zeros(modalities + 1) if normalised and modalities is not None else None
        self.register_buffer(KEPT_KEY, kept)
        self.register_buffer("_rows", torch.tensor(self._steps.times) - 1, persistent=False)
        self._frozen: Factors | None = None

    def extra_repr(self) -> str:
        return (
            f"embedding_dim={self.embedding_dim}, T={self.T}, dim_r={self.dim_r}, condition={self.condition!r}, "
            f"behaviour={self.behaviour!r}, schedule={self.schedule!r}, levels={self.levels}, sampling_steps={self.sampling_steps}, "
            f"clip={self.clip}, precision={self.precision!r}, backend={self.backend!r}, draws={self.draws!r}"
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of this class or of the release.

        Raises:
            InputError: it belongs to another condition or another width.
            RuntimeError: names are missing or unexpected and `strict` is set (torch's own report).
        """
        if strict and (RANGE_KEY in state_dict) != self._condition.has_relation_range:
            kind = "RotatE" if RANGE_KEY in state_dict else "a model other than RotatE"
            found = Shown(f"a checkpoint of {kind} (by {RANGE_KEY})")
            raise InputError("state_dict", found, f"one of this generator's condition {self.condition!r}")
        width = state_dict.get("denoiser.output_layer.bias")
        if isinstance(width, Tensor) and width.shape != (self.embedding_dim,):
            found = Shown(f"embedding_dim {width.numel()} (denoiser.output_layer.bias)")
            raise InputError("state_dict", found, f"embedding_dim {self.embedding_dim}, as this generator's")
        # Scales belong to the behaviour and not to the weights: a checkpoint with them loads without, and the reverse.
        tensors = {name: x for name, x in state_dict.items() if name != KEPT_KEY or self.mean_squares is not None}
        if self.mean_squares is not None:
            tensors.setdefault(KEPT_KEY, torch.zeros_like(self.mean_squares))
        return super().load_state_dict(tensors, strict=strict, assign=assign)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[DiffHEG]:
        """Fold the weights once for all calls in the block, for whoever samples many times; changes to the weights
        inside it are not seen.
        """
        with torch.no_grad(), matmul_precision("ieee", self._device):
            self._frozen = factors(self.denoiser, self.T).owned()
        try:
            yield self
        finally:
            self._frozen = None

    def sample(
        self,
        x_h: Tensor,
        x_r: Tensor,
        x_t: Tensor,
        noise: SampleNoise | None = None,
        generator: torch.Generator | None = None,
        row_offset: int = 0,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Generate heads and tails at every level.

        Args:
            x_h: head embeddings `[B, D]`, or `[M, B, D]` for M modalities in one call.
            x_r: relation embeddings `[B, D]`, of RotatE `[B, D/2]` (the raw parameter, not phases), shared by the
                modalities.
            x_t: tail embeddings, shaped as `x_h`.
            noise: fixed noise; None: what `draws` says.
            generator: seeds the call (one draw a call, with `draws="release"` all of them); None: torch's default CPU
                generator.
            row_offset: number of this call's first row, for batches sampled in parts: with equal generators, rows get
                the noise that the undivided batch would give them. 0 with `draws="release"`.
            scales: under "normalised", :meth:`scales` of the undivided batch; None: of this call's inputs, or, after
                `eval()`, those that training has kept (`modalities`), so that a triple's results do not depend on the
                others of its batch.

        Returns:
            (heads, tails): two lists with a fresh tensor, shaped as `x_h`, for each of `levels`; no gradient flows into
            or out of them.

        Raises:
            InputError: a shape, dtype or device does not fit, or `validate` is set and an input is not finite.
        """
        self._check(x_h=x_h, x_r=x_r, x_t=x_t)
        _refuse_foreign(generator, noise=(noise, SampleNoise))
        precision = self._precision(x_h.device)
        shape = x_h.shape
        # Outside inference mode even for a caller inside it: scripts use the results in autograd later.
        with torch.inference_mode(False), torch.no_grad(), matmul_precision(precision, x_h.device):
            x_h, x_t = (x if x.ndim == 3 else x[None] for x in (x_h, x_t))
            if scales is None and not self.training and self.mean_squares is not None:
                scales = self._kept(self.mean_squares, *self.scales(x_h, x_r, x_t))
            x_h, x_r, x_t, scale = self._normalised(x_h, x_r, x_t, scales)
            weights = self._frozen if self._frozen is not None else factors(self.denoiser, self.T)
            heads, tails = denoise.chain(
                self._conditions(x_t, x_r, "head"),
                self._conditions(x_h, x_r, "tail"),
                weights.at(self.get_buffer("_rows")),
                self._steps,
                self._steps.place(self.levels),
                self.behaviour == "release",
                precision,
                self._noise(noise, generator, row_offset, x_h),
                self.backend,
            )
            if scale is not None:
                for made in (*heads, *tails):
                    made.mul_(scale)
        return [h.view(shape) for h in heads], [t.view(shape) for t in tails]

    def forward(
        self,
        x_h: Tensor,
        x_r: Tensor,
        x_t: Tensor,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        present: Tensor | None = None,
        count: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Diffusion loss: mean |ε − ε_θ| of the tail side plus that of the head side, summed over modalities.

        Args:
            x_h, x_r, x_t: as in :meth:`sample`.
            timesteps: int64 `[B]` (or `[M, B]`) in 1..T, one for both sides; None: uniform.
            noise: `[B, D]` (or `[M, B, D]`), one for both sides; None: standard normal.
            generator: source of what is drawn here; None: the device's default.
            present: bool `[M, B]`: rows of a modality that count (both entities have it); None: all.
            count: what the sum over rows is divided by, `[M]` or `[1]`, for a batch whose other rows are elsewhere;
                None: the rows that count.
            scales: under "normalised", :meth:`scales` of that whole batch; None: of these inputs. A generator in
                training mode that keeps scales moves them a tenth of the way to these.

        Returns:
            A fresh scalar. Under "release" its gradient reaches the embeddings too, under the others the generator
            alone.
        """
        self._check(x_h=x_h, x_r=x_r, x_t=x_t)
        _refuse_foreign(generator, noise=(noise, Tensor), timesteps=(timesteps, Tensor), present=(present, Tensor))
        if not x_h.numel() and count is None:
            raise InputError("x_h", x_h, "at least one row: a loss of nothing has no value")
        precision = self._precision(x_h.device)
        if self.behaviour != "release":
            x_h, x_r, x_t = x_h.detach(), x_r.detach(), x_t.detach()
        if self.behaviour == "normalised":
            scales = self.scales(x_h, x_r, x_t) if scales is None else scales
            self._keep(scales)
        x_h, x_r, x_t, _ = self._normalised(x_h, x_r, x_t, scales)
        rows = x_h.shape[:-1]
        if timesteps is None:
            of_release = self.draws == "release" and generator is None
            device = torch.device("cpu") if of_release else _device_of(generator, x_h)
            timesteps = torch.randint(1, self.T + 1, rows, generator=generator, device=device).to(
                x_h.device, non_blocking=True
            )
        else:
            self._check_timesteps(timesteps, rows)
        if noise is None:
            noise = torch.randn(x_h.shape, generator=generator, device=_device_of(generator, x_h), dtype=x_h.dtype).to(
                x_h.device, non_blocking=True
            )
        else:
            if noise.shape != x_h.shape or noise.dtype != x_h.dtype:
                raise InputError("noise", noise, f"{x_h.dtype} {list(x_h.shape)} as x_h")
            checks.on_device("x_h", x_h, noise=noise)
        if present is not None and present.shape != rows:
            raise InputError("present", present, f"shape {list(rows)}")
        if present is not None and present.dtype != torch.bool:
            raise InputError("present", present, "torch.bool")
        weight = torch.ones(rows, dtype=x_h.dtype, device=x_h.device) if present is None else present.to(x_h.dtype)
        total = weight.sum(-1, keepdim=True) if count is None else count.to(weight.dtype).view(*rows[:-1], 1)
        weight = weight / total.clamp_min(1)
        with matmul_precision(precision, x_h.device):
            signal, spread = self._coefficients(x_h.dtype)[timesteps - 1].unsqueeze(-1).unbind(-2)
            noisy = torch.stack([x_t, x_h]) * signal + spread * noise
            conditions = torch.stack([self._conditions(x_h, x_r, "tail"), self._conditions(x_t, x_r, "head")])
            return diffusion_loss(noisy, conditions, noise, timesteps, weight, fold(self.denoiser, self.T), precision)

    def denoise(self, x: Tensor, timesteps: Tensor, x_entity: Tensor, x_r: Tensor, mode: str) -> Tensor:
        """Predicted noise ε_θ(x_t, t, c), shaped as `x`.

        Args:
            x: noisy states `[B, D]` or `[M, B, D]`; under "normalised" of unit root mean square, as the chain has them.
            timesteps: int64 `[B]` or `[M, B]` in 1..T.
            x_entity: the entity that stays, shaped as `x`: the head for mode "tail", the tail for mode "head".
            x_r: relation embeddings `[B, dim_r]`.
            mode: the side that is generated, "tail" or "head".
        """
        checks.one_of("mode", mode, SIDES)
        checks.tensor(timesteps=timesteps)
        self._check(x=x, x_entity=x_entity, x_r=x_r)
        self._check_timesteps(timesteps, x.shape[:-1])
        x_entity, x_r, _, _ = self._normalised(x_entity, x_r, x_entity)
        precision = self._precision(x.device)
        with matmul_precision(precision, x.device):
            return predict(fold(self.denoiser, self.T), x, timesteps, self._conditions(x_entity, x_r, mode), precision)

    @staticmethod
    def nearest(
        generated: Tensor,
        entity: Tensor,
        k: int = 10,
        reduction: str = "l2",
        known: Ragged | None = None,
        *,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the diffusion imagined: the real entities nearest to generated embeddings, exactly.

        Args:
            generated: `[..., D]`, one of the tensors that :meth:`sample` returns.
            entity: the table of the same embeddings `[E, D]`.
            k: 1 to min(E, 1024).
            reduction: how near is measured: "l2", "l1", "complex_l1" (distances, negated) or "dot".
            known: entities to leave out, one row for each of `generated` in order.

        Returns:
            scores `[..., k]`, the nearest first, and entity ids int64 `[..., k]`, as :func:`dhns_fast.scoring.topk_all`
            gives them.
        """
        scores, ids = topk_all(
            generated.reshape(-1, generated.shape[-1]), entity.detach(), k, reduction, known, backend=backend
        )
        return scores.view(*generated.shape[:-1], k), ids.view(*generated.shape[:-1], k)

    @torch.no_grad()
    def scales(
        self, x_h: Tensor, x_r: Tensor, x_t: Tensor, whole: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[Tensor, Tensor]:
        """What "normalised" divides by: root mean squares of each modality's heads and tails together, `[M, 1, 1]`
        (`[1, 1]` for inputs `[B, D]`), and of the relations, a scalar, which is 1 where they are phases.

        Args:
            whole: from the mean squares of these rows `[M + 1]`, the relations' last, to those of the batch that they
                are a part of.
        """
        entity = (x_h.square().mean((-2, -1)) + x_t.square().mean((-2, -1))) / 2
        relation = x_r.new_ones(()) if self._condition.has_relation_range else x_r.square().mean()
        squares = whole(torch.cat([entity.view(-1), relation.view(1)]))
        # An embedding of zeros has no scale.
        roots = torch.where(squares > 0, squares.sqrt(), 1)
        return roots[:-1].view(*entity.shape, 1, 1), roots[-1]

    @torch.no_grad()
    def _keep(self, scales: tuple[Tensor, Tensor]) -> None:
        if self.mean_squares is None or not self.training:
            return
        squares = torch.cat([scales[0].view(-1), scales[1].view(1)]).square()
        if squares.shape != self.mean_squares.shape:
            raise self._other_modalities(len(squares) - 1)
        kept = self.mean_squares
        kept.copy_(torch.where(kept > 0, torch.lerp(kept, squares.to(kept), MOMENTUM), squares.to(kept)))

    def _kept(self, squares: Tensor, entity: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """The scales that training has kept, in place of those of a call; those where it has kept none yet."""
        if len(entity) + 1 != len(squares):
            raise self._other_modalities(len(entity))
        kept = squares.sqrt().to(entity.dtype)
        first = kept[:-1].view_as(entity)
        return torch.where(first > 0, first, entity), torch.where(kept[-1] > 0, kept[-1], relation)

    def _other_modalities(self, found: int) -> InputError:
        assert self.mean_squares is not None
        M = len(self.mean_squares) - 1
        return InputError("x_h", Shown(f"{found} modalities"), f"{M}, as `modalities` says, or `scales` of its own")

    def _normalised(
        self, x_h: Tensor, x_r: Tensor, x_t: Tensor, scales: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Heads, relations and tails as the diffusion sees them, and what its results are multiplied by, if
        anything.
        """
        if self.behaviour != "normalised":
            return x_h, x_r, x_t, None
        entity, relation = self.scales(x_h, x_r, x_t) if scales is None else scales
        return x_h / entity, x_r / relation, x_t / entity, entity

    @property
    def _device(self) -> torch.device:
        return self.denoiser.output_layer.weight.device

    def _coefficients(self, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64:  # a buffer that .double() has widened keeps float32's rounding
            return self._schedule.forward_coefficients().to(self._device)
        return self.get_buffer("_forward_coefficients").to(dtype)

    def _conditions(self, entity: Tensor, relation: Tensor, mode: str) -> Tensor:
        return self.denoiser.scoring_module(entity, relation, mode)

    def _precision(self, device: torch.device) -> str:
        if self.precision is None:
            return "tf32" if device.type == "cuda" else "ieee"
        if self.precision == "tf32" and device.type != "cuda":
            raise InputError(
                "precision", Shown(f"'tf32' for inputs on {device}"), "'ieee' or 'bf16'; 'tf32' needs a CUDA device"
            )
        return self.precision

    def _noise(self, noise: SampleNoise | None, generator: torch.Generator | None, row_offset: int, x: Tensor) -> Noise:
        """What the chain of inputs `x` `[M, B, D]` reads its noise from."""
        device = torch.device("cpu") if generator is None else generator.device
        if noise is None and self.draws == "release":
            if row_offset:
                raise InputError(
                    "row_offset", row_offset, "0 with draws 'release', whose noise depends on the rows before"
                )
            noise = SampleNoise(*draw(x, len(self._steps.times), generator))
        if noise is None:
            # A copy that blocks would wait for all work that is queued on the device.
            seed = torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device).to(x.device, non_blocking=True)
            return Noise(seed, row_offset, None, None, None, None)
        M, B, D = x.shape
        steps = len(self._steps.times)
        shapes = {"x_T": (B, D), "x_T_head": (B, D), "tail": (steps - 1, B, D), "head": (steps - 1, B, D)}
        given: dict[str, Tensor] = {}
        for name, short in shapes.items():
            value = getattr(noise, name)
            if value is None:
                continue
            full = (*short[:-2], M, *short[-2:])
            if value.shape != full and not (M == 1 and value.shape == short):
                raise InputError(f"noise.{name}", value, f"shape {list(short if M == 1 else full)}")
            checks.alike("x_h", x, **{f"noise.{name}": value})
            given[name] = value.reshape(full)
        seed = torch.zeros(1, dtype=torch.long, device=x.device)
        return Noise(seed, row_offset, given["x_T"], given.get("x_T_head", given["x_T"]), given["tail"], given["head"])

    def _check_timesteps(self, timesteps: Tensor, rows: torch.Size) -> None:
        if timesteps.shape != rows or timesteps.dtype != torch.long:
            raise InputError("timesteps", timesteps, f"torch.int64 {list(rows)}")
        checks.real("the generator's weights", self.denoiser.output_layer.weight, timesteps=timesteps)
        # Values are looked at where that waits for nothing: timestep 0 would read the last row of a table, without an
        # error.
        look = self.validate or (timesteps.device.type == "cpu" and not torch.compiler.is_compiling())
        if look and not bool(((timesteps >= 1) & (timesteps <= self.T)).all()):
            raise InputError(
                "timesteps", Shown(f"values from {timesteps.min().item()} to {timesteps.max().item()}"), f"1..{self.T}"
            )

    def _check(self, **inputs: Tensor) -> None:
        """Shapes, dtypes and devices of entity-wide tensors and the relation `x_r`; values too under `validate`."""
        weight = self.denoiser.output_layer.weight
        checks.tensor(**inputs)
        checks.alike("the generator's weights", weight, **inputs)
        first = next(iter(inputs.values()))
        for name, x in inputs.items():
            if name == "x_r":
                if x.shape[-1:] != (self.relation_dim,) or x.shape[:-1] not in (first.shape[-2:-1], first.shape[:-1]):
                    raise InputError("x_r", x, f"shape [{first.shape[-2]}, {self.relation_dim}]")
            elif x.ndim not in (2, 3) or x.shape[-1] != self.embedding_dim or x.shape != first.shape:
                known = "" if x is first else f" like {next(iter(inputs))} {list(first.shape)}"
                raise InputError(name, x, f"shape [B, {self.embedding_dim}] or [M, B, {self.embedding_dim}]{known}")
        if self.validate:
            finite = torch.stack([x.isfinite().all() for x in inputs.values()])
            if not finite.all():
                bad = [name for name, ok in zip(inputs, finite.tolist(), strict=True) if not ok]
                raise InputError(", ".join(bad), Shown("NaN or infinity"), "finite values")


def _refuse_foreign(generator: Any, **given: tuple[Any, type]) -> None:
    """InputError where an argument is not of its kind; None passes."""
    checks.instance(torch.Generator, "a torch.Generator, or None", generator=generator)
    for name, (value, kind) in given.items():
        checks.instance(kind, f"a {kind.__name__}, or None", **{name: value})


def _device_of(generator: torch.Generator | None, x: Tensor) -> torch.device:
    return x.device if generator is None else generator.device


class _Fixed(DiffHEG):
    """DiffHEG whose condition is part of the class, so that a script of the release changes one import."""

    kind: str

    def __init__(
        self,
        embedding_dim: int,
        T: int,
        dim_r: int,
        margin: float | None,
        eps: float | None,
        *more: Any,
        **options: Any,
    ) -> None:
        if "condition" in options:
            raise InputError(
                "condition", options["condition"], f"{self.kind!r} in {type(self).__name__}; DiffHEG lets you choose it"
            )
        super().__init__(embedding_dim, T, dim_r, margin, eps, self.kind, *more, **options)


def _without_condition() -> inspect.Signature:
    """DiffHEG's arguments but the condition, in their order."""
    whole = inspect.signature(DiffHEG.__init__)
    return whole.replace(parameters=[x for name, x in whole.parameters.items() if name != "condition"])


_Fixed.__init__.__signature__ = _without_condition()  # type: ignore[attr-defined]


class DiffHEGTransE(_Fixed):
    """:class:`DiffHEG` with condition "transe"."""

    kind = "transe"


class DiffHEGRotatE(_Fixed):
    """:class:`DiffHEG` with condition "rotate"."""

    kind = "rotate"


class DiffHEGComplEx(_Fixed):
    """:class:`DiffHEG` with condition "complex"."""

    kind = "complex"
