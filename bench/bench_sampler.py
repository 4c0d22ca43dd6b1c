"""The sampler's chain and the diffusion loss against the oracle in eager torch and under torch.compile, and against
their matrix products alone.

Every provider of a chain draws its noise by the counter-based operator from one seed, so that all return the same
embeddings; the oracle makes one call a modality, as scripts of the release do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from unittest import mock

import harness
import pytest
import torch
from torch import Tensor

from dhns_fast.ops import backend as backends
from dhns_fast.ops.backend import cpu_bf16
from dhns_fast.ops.noise import HEAD, TAIL, X_T, X_T_HEAD, philox_normal
from dhns_fast.reference import diffusion
from dhns_fast.sampler import DiffHEG

T, SEED = 50, 11
# M, B, D of a chain: what training and the demands ask for. On a CPU the oracle takes seconds at D 512 and minutes at D
# 1024.
CHAINS = {
    ("cpu", "small"): [(1, 128, 64), (1, 64, 256)],
    ("cpu", "reference"): [(1, 512, 512), (3, 500, 64), (3, 500, 256)],
    ("cpu", "large"): [(3, 2000, 1024)],
    ("cuda", "small"): [(1, 64, 256)],
    ("cuda", "reference"): [(3, 2000, 1024), (3, 2000, 256), (1, 64, 1024), (3, 500, 64)],
    ("cuda", "large"): [(3, 8000, 1024)],
}
LOSSES = {"small": (1, 256, 64), "reference": (3, 500, 256), "large": (3, 2000, 1024)}
TOLERANCE = {"ieee": 1e-4, "tf32": 2e-3, "bf16": 1e-2}


def precisions() -> list[str]:
    """Those that this machine has instructions for, the default of its device first."""
    if torch.cuda.is_available():
        return ["tf32", "bf16", "ieee"]
    return ["ieee", "bf16"] if cpu_bf16() else ["ieee"]


def demands(
    device: str, shape: tuple[int, int, int], precision: str, behaviour: str, products: float
) -> list[harness.Demand]:
    """What is asked of release-mode chains. `products`: milliseconds that their products alone take."""
    M, B, D = shape
    if behaviour != "release":
        return []
    if device == "cpu" and shape == (1, 512, 512):
        speed, share = (10, 80) if precision == "ieee" else (15, 65)
        alone = harness.Demand(
            "% of the products alone", share, lambda rows, ours: 100 * products / ours.p50 if ours.p50 else None
        )
        return [
            harness.times_as_fast("oracle", speed),
            alone,
            harness.peak_mb(4 * M * B * 4 * D * 4 / 1e6 + results_mb(shape)),
        ]
    if device == "cuda" and precision == "bf16":
        if shape == (3, 2000, 1024):
            return [harness.times_as_fast("oracle", 40), harness.percent_of_ceiling(55)]
        return [harness.times_as_fast("oracle", {1: 20, 3: 25}[M])]
    return []


def results_mb(shape: tuple[int, int, int], levels: int = 5) -> float:
    """Generated embeddings and folded weights, which a call returns or needs whatever it does."""
    M, B, D = shape
    return (2 * levels * M * B * D + 12 * D * D + T * 4 * D) * 4 / 1e6


@pytest.mark.parametrize("behaviour", ["release", "corrected"])
@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize("number", range(4))
def test_sample(race: harness.Race, number: int, precision: str, behaviour: str) -> None:
    shapes = CHAINS[race.device.type, race.size]
    if number >= len(shapes):
        pytest.skip(f"size {race.size} has {len(shapes)} shapes on this device")
    M, B, D = shape = shapes[number]
    torch.manual_seed(0)
    generators = {
        backend: DiffHEG(D, T, D, 12.0, 2.0, behaviour=behaviour, precision=precision, backend=backend).to(race.device)
        for backend in (None, "eager")
    }
    generators["eager"].load_state_dict(generators[None].state_dict())
    weights = {name: p.detach() for name, p in generators[None].named_parameters()}

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator(race.device).manual_seed(seed)
        h, t = torch.randn(2, M, B, D, generator=source, device=race.device)
        return h, torch.randn(B, D, generator=source, device=race.device), t

    def ours(backend: str | None, h: Tensor, r: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return generators[backend].sample(h, r, t, generator=torch.Generator().manual_seed(SEED))

    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=torch.Generator().manual_seed(SEED)))

    def oracle(h: Tensor, r: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        made = []
        with torch.no_grad():
            for m in range(M):
                x_T, x_T_head = (
                    philox_normal(seed, stream, m, 0, 0, B, D, device=race.device) for stream in (X_T, X_T_HEAD)
                )
                z_tail, z_head = (
                    torch.stack(
                        [philox_normal(seed, stream, m, 0, step, B, D, device=race.device) for step in range(T, 1, -1)]
                    )
                    for stream in (TAIL, HEAD)
                )
                made.append(
                    diffusion.sample(
                        weights, h[m], r, t[m], x_T, z_tail, z_head, T, "distmult", behaviour, 1.0, None, x_T_head
                    )
                )
        heads, tails = ([torch.stack([part[i][k] for part in made]) for k in range(5)] for i in (0, 1))
        return heads, tails

    compiled = torch.compile(diffusion.predict_noise)

    def compiled_oracle(h: Tensor, r: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with mock.patch.object(diffusion, "predict_noise", compiled):
            return oracle(h, r, t)

    calls = T + 5 if behaviour == "release" else 2 * T
    products = products_ms(race.device, precision, M * B, D) * calls

    rows = race(
        f"sample {behaviour} {precision} M{M} B{B} D{D} T{T}",
        {
            "ours": functools.partial(ours, None),
            "ours eager": functools.partial(ours, "eager"),
            "oracle": oracle,
            "compiled oracle": compiled_oracle,
        },
        make=inputs,
        tolerance=TOLERANCE[precision],
        work={{"ieee": "flop"}.get(precision, precision): 16.0 * D * D * M * B * calls},
        demands=demands(race.device.type, shape, precision, behaviour, products),
        min_rounds=2,
    )
    for row in rows.values():
        if row.p50:
            row.extra["% of products alone"] = 100 * products / row.p50


def products_ms(device: torch.device, precision: str, N: int, D: int) -> float:
    """Milliseconds of a step's two products on folded weights through the better of torch's libraries, nothing else:
    D→4D and 4D→D.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, state, output = (torch.randn(shape, device=device).to(dtype) for shape in ((N, D), (4 * D, D), (D, 4 * D)))
    h, e = x.new_empty(N, 4 * D), x.new_empty(N, D)

    def library() -> None:
        torch.mm(x, state.T, out=h)
        torch.mm(h, output.T, out=e)

    ways = [library]
    if device.type == "cpu":
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, N) for w in (state, output)]

        def prepacked() -> None:
            torch.ops.mkldnn._linear_pointwise(x, packed[0], None, "none", [], "")
            torch.ops.mkldnn._linear_pointwise(h, packed[1], None, "none", [], "")

        ways.append(prepacked)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, precision == "tf32"
    rounds = max(5, min(100, math.ceil(2e10 / (16 * N * D * D))))
    best = min(harness.time_call(way, device) for way in ways for _ in range(rounds))
    torch.backends.cuda.matmul.allow_tf32 = before
    return best


@pytest.mark.parametrize("behaviour", ["release", "corrected"])
def test_diffusion_loss(race: harness.Race, behaviour: str) -> None:
    """Forward and backward: the loss and the gradient of every weight, and under "release" of the embeddings."""
    M, B, D = LOSSES[race.size]
    torch.manual_seed(0)
    generator = DiffHEG(D, T, D, 12.0, 2.0, behaviour=behaviour, precision="ieee").to(race.device)
    weights = dict(generator.named_parameters())

    def inputs(seed: int) -> tuple[Tensor, ...]:
        source = torch.Generator(race.device).manual_seed(seed)
        h, t, noise = torch.randn(3, M, B, D, generator=source, device=race.device)
        r = torch.randn(B, D, generator=source, device=race.device)
        return h, r, t, torch.randint(1, T + 1, (M, B), generator=source, device=race.device), noise

    def with_gradients(loss: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
        h, r, t, *rest = arguments
        embeddings = [x.detach().requires_grad_(behaviour == "release") for x in (h, r, t)]
        value = loss(*embeddings, *rest)
        wanted = [*weights.values(), *(x for x in embeddings if x.requires_grad)]
        return [value.detach(), *torch.autograd.grad(value, wanted)]

    def oracle(h: Tensor, r: Tensor, t: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        parts = [
            diffusion.diffusion_loss(weights, h[m], r, t[m], timesteps[m], noise[m], T, "distmult", behaviour)
            for m in range(M)
        ]
        return torch.stack(parts).sum()

    def by_torch(*arguments: Tensor) -> list[Tensor]:
        with backends.preferring("eager"):
            return with_gradients(generator, *arguments)

    race(
        f"diffusion loss {behaviour} M{M} B{B} D{D}",
        {
            "ours": functools.partial(with_gradients, generator),
            "ours, torch's products": by_torch,
            "oracle": functools.partial(with_gradients, oracle),
            "compiled oracle": functools.partial(with_gradients, torch.compile(oracle)),
        },
        make=inputs,
        # Three products of 4D·D a row and side forward; backward one for each operand that takes a gradient.
        work={"flop": 8.0 * D * D * (9 if behaviour == "release" else 7) * 2 * M * B},
    )
