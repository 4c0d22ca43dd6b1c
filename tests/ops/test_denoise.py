"""The sampler's chain, every backend against the oracle in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dhns_fast.diffusion.folding import Moments, factors
from dhns_fast.diffusion.schedule import Schedule
from dhns_fast.errors import BackendUnavailableError
from dhns_fast.ops import denoise
from dhns_fast.ops.noise import HEAD, TAIL, X_T, X_T_HEAD, Noise, philox_normal
from dhns_fast.reference import diffusion as reference
from dhns_fast.sampler import DiffHEG, SampleNoise

BACKENDS = ("eager", "cpu", "triton")
T = 6
LEVELS = (0, 2, 3)
LINEAR = Schedule.linear(T).steps()


def generator(D: int, **options: object) -> DiffHEG:
    torch.manual_seed(D)
    made = DiffHEG(D, T, D, 6.0, 2.0, levels=LEVELS, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # Initial LayerNorms are the identity: folding them would be tested by nothing.
            weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.05))
    return made


def inputs(M: int, B: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(M, B, D), torch.randn(B, D), torch.randn(M, B, D)


def fixed_noise(M: int, B: int, D: int) -> SampleNoise:
    return SampleNoise(
        torch.randn(M, B, D), torch.randn(T - 1, M, B, D), torch.randn(T - 1, M, B, D), torch.randn(M, B, D)
    )


def truth(made: DiffHEG, h: Tensor, r: Tensor, t: Tensor, noise: SampleNoise) -> list[Tensor]:
    weights = {name: value.double() for name, value in made.state_dict().items()}
    each = [
        reference.sample(
            weights,
            *(x.double() for x in (h[m], r, t[m], noise.x_T[m], noise.tail[:, m], noise.head[:, m])),
            T,
            "distmult",
            made.behaviour,
            levels=LEVELS,
            x_T_head=noise.x_T_head[m].double() if noise.x_T_head is not None else None,
        )
        for m in range(len(h))
    ]
    return [torch.stack([each[m][side][k] for m in range(len(h))]) for side in (0, 1) for k in range(len(LEVELS))]


def worst(found: tuple[list[Tensor], list[Tensor]], expected: list[Tensor]) -> float:
    return max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip([*found[0], *found[1]], expected, strict=True)
    )


# Widths around one and two vectors of columns of every instruction set, rows around a tile and a block.
COMPILED = [(1, 1, 4), (2, 7, 6), (3, 13, 34), (1, 300, 16), (2, 25, 72)]
# Triton's interpreter takes a second or so each: all ragged, two blocks of rows; the last has two tiles of the state.
INTERPRETED = [(2, 7, 6), (1, 67, 18), (1, 2, 70)]


@pytest.mark.parametrize("behaviour", ["release", "corrected"])
@pytest.mark.parametrize(
    ("backend", "M", "B", "D"),
    [(backend, *shape) for backend in BACKENDS for shape in (INTERPRETED if backend == "triton" else COMPILED)],
)
def test_chain_agrees_with_the_oracle(backend: str, M: int, B: int, D: int, behaviour: str) -> None:
    made = generator(D, backend=backend, behaviour=behaviour)
    h, r, t = inputs(M, B, D)
    noise = fixed_noise(M, B, D)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 2e-6


@pytest.mark.parametrize(("behaviour", "few"), [("release", 0), ("corrected", 256)])
def test_steps_of_narrow_states(behaviour: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of wide states where one kernel would take the whole chain, of many rows and of few."""
    kernels = pytest.importorskip("dhns_fast.kernels.denoise")
    monkeypatch.setattr(kernels, "WHOLE_WIDTH", dict.fromkeys(kernels.WHOLE_WIDTH, 0))
    monkeypatch.setattr(kernels, "FEW_ROWS", few)
    made = generator(18, backend="triton", behaviour=behaviour)
    h, r, t = inputs(1, 67, 18)
    noise = fixed_noise(1, 67, 18)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 2e-6


@pytest.mark.parametrize(("D", "rows", "precision"), [(72, 256, "ieee"), (72, 0, "bf16")])
def test_steps_by_bulk_copies(D: int, rows: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as Hopper gets them: descriptors, tiles in pieces, and the small tiles of few rows."""
    kernels = pytest.importorskip("dhns_fast.kernels.denoise")
    monkeypatch.setattr(kernels, "WHOLE_WIDTH", dict.fromkeys(kernels.WHOLE_WIDTH, 0))
    monkeypatch.setattr(kernels, "FEW_ROWS", rows)
    monkeypatch.setattr(kernels, "chip", lambda device: 90)
    made = generator(D, backend="triton", precision=precision)
    h, r, t = inputs(1, 19, D)
    noise = fixed_noise(1, 19, D)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < (
        1e-2 if precision == "bf16" else 2e-6
    )


@pytest.mark.parametrize(("precision", "chip", "D"), [("ieee", 0, 70), ("tf32", 90, 36), ("bf16", 90, 72)])
def test_few_rows_are_the_same_bits_whether_their_depth_is_divided_or_not(
    precision: str, chip: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups are programs', or sums of one program. Ragged rows and columns, and a last group that is shorter."""
    kernels = pytest.importorskip("dhns_fast.kernels.denoise")
    monkeypatch.setattr(kernels, "WHOLE_WIDTH", dict.fromkeys(kernels.WHOLE_WIDTH, 0))
    monkeypatch.setattr(kernels, "chip", lambda device: chip)
    chosen = kernels.tile
    assert chosen("update", precision, D, 6, chip).divided
    assert 4 * D % kernels.group_depth(D, chosen("update", precision, D, 6, chip))
    with torch.no_grad():
        weights = factors(generator(D).denoiser, T)
    c_head, c_tail = torch.randn(2, 2, 3, D)
    noise = Noise(torch.tensor([5]), 0, None, None, None, None)

    def states(divided: bool) -> list[Tensor]:
        # Of one size: in the interpreter a product's bits depend on it.
        def tile(kernel: str, *arguments: object) -> object:
            return dataclasses.replace(chosen(kernel, *arguments), divided=divided and kernel == "update")

        monkeypatch.setattr(kernels, "tile", tile)
        heads, tails = denoise.chain(c_head, c_tail, weights, LINEAR, (T - 2,), True, precision, noise, "triton")
        return heads + tails

    for a, b in zip(states(True), states(False), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "D"), [("eager", 520), ("cpu", 520), ("cpu", 1030)])
def test_products_deeper_than_a_panel_agree_with_the_oracle(backend: str, D: int) -> None:
    made = generator(D, backend=backend)
    h, r, t = inputs(1, 14, D)
    noise = fixed_noise(1, 14, D)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 2e-6


@pytest.mark.parametrize("release", [True, False])
def test_products_keep_the_bits_of_floats_between_two_bfloat16(release: bool) -> None:
    """Where a processor multiplies floats in pieces, what one piece rounds away has to be in the next one."""

    def tie(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) & -0x10000) | 0x8000).view(torch.float32)

    B, D = 45, 100
    with torch.no_grad():
        weights = factors(generator(D).denoiser, T)
        # Scaled by 1 and shifted by 0, weights are multiplied as they are.
        ones = {name: torch.ones_like(x) for name, x in weights._asdict().items() if name.startswith("scale")}
        zeros = {name: torch.zeros_like(x) for name, x in weights._asdict().items() if name.startswith("shift")}
        weights = weights._replace(weight1=tie(weights.weight1), weight2=tie(weights.weight2), **ones, **zeros)
        weights.weight2[:, 1::2] = -weights.weight2[:, ::2]  # rows are centred, which the chain relies on
    wide = weights._replace(**{name: x.double() for name, x in weights._asdict().items() if isinstance(x, Tensor)})
    wide = wide._replace(time_moments=Moments(*(x.double() for x in weights.time_moments)))
    c_head, c_tail = tie(torch.randn(2, 1, B, D))
    drawn = fixed_noise(1, B, D)
    given = [drawn.x_T, drawn.x_T_head, drawn.tail, drawn.head]
    found = denoise.chain(
        c_head, c_tail, weights, LINEAR, LEVELS, release, "ieee", Noise(torch.tensor([5]), 0, *given), "cpu"
    )
    given = [x.double() for x in given if x is not None]
    noise = Noise(torch.tensor([5]), 0, *given)
    heads, tails = denoise.chain(
        c_head.double(), c_tail.double(), wide, LINEAR, LEVELS, release, "ieee", noise, "eager"
    )
    assert worst(found, heads + tails) < 1e-6


@pytest.mark.parametrize(
    ("backend", "M", "B", "D"),
    [(backend, 2, 19, 34) for backend in BACKENDS]
    + [("cpu", 1, 1, 4), ("cpu", 3, 37, 64), ("cpu", 1, 33, 98), ("cpu", 1, 14, 520), ("triton", 1, 35, 98)],
)
def test_bf16_operands_stay_within_a_hundredth(backend: str, M: int, B: int, D: int) -> None:
    made = generator(D, backend=backend, precision="bf16")
    h, r, t = inputs(M, B, D)
    noise = fixed_noise(M, B, D)
    error = worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise))
    assert 1e-5 < error < 1e-2  # the lower bound: operands were rounded


def spread(x: Tensor) -> Tensor:
    """Numbers of six orders of magnitude."""
    return x * torch.exp(2 * torch.randn_like(x))


@pytest.mark.parametrize(
    "what", ["weights", "a column of the second layer", "an input column of the first layer", "a hidden unit", "inputs"]
)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_numbers_of_all_orders_keep_their_bits(backend: str, what: str) -> None:
    """Numbers that share a scale lose what is far below the largest: they may only where that is lost in the result
    too.
    """
    M, B, D = 1, 21, 130
    made = generator(D, backend=backend)
    layers = made.denoiser.denoiser_block
    h, r, t = inputs(M, B, D)
    noise = fixed_noise(M, B, D)
    with torch.no_grad():
        if what == "weights":
            for weight in made.parameters():
                if weight.dim() == 2:
                    weight.copy_(spread(weight))
        elif what == "a column of the second layer":
            layers.mlp2.weight[:, 9] *= 1000
        elif what == "an input column of the first layer":
            layers.mlp1.weight[:, 3] *= 1000
        elif what == "a hidden unit":
            layers.mlp1.bias[40] = 1000
        else:
            h, r, t = spread(h), spread(r), spread(t)
            noise = SampleNoise(*(spread(x) for x in (noise.x_T, noise.tail, noise.head)))
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 2e-6


@pytest.mark.parametrize("size", [1e-33, 1e-12, 1e12])
def test_rows_of_any_size(size: float) -> None:
    made = generator(34, backend="cpu")
    h, r, t = inputs(1, 5, 34)
    h[0, 1] *= size
    t[0, 2] *= size
    t[0, 3] = 0
    noise = fixed_noise(1, 5, 34)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 2e-6


@pytest.mark.parametrize(
    ("backend", "D", "precision"), [("cpu", 34, "ieee"), ("cpu", 34, "bf16"), ("triton", 70, "ieee")]
)
def test_operands_may_not_be_numbers(backend: str, D: int, precision: str) -> None:
    made = generator(D, backend=backend, precision=precision)
    h, r, t = inputs(1, 5, D)
    h[0, 3, 7], h[0, 1, 20] = torch.nan, torch.inf
    for state in made.sample(h, r, t)[1]:
        assert state[0, [1, 3]].isnan().all()
        assert state[0, [0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("first", [0, 32], ids=["of all", "of all but the columns that sums are taken around"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_bias_does_not_cancel(backend: str, first: int) -> None:
    made = generator(34, backend=backend)
    made.denoiser.denoiser_block.mlp1.bias.data[first:] += 100
    h, r, t = inputs(1, 9, 34)
    noise = fixed_noise(1, 9, 34)
    assert worst(made.sample(h, r, t, noise=noise), truth(made, h, r, t, noise)) < 1e-4


@pytest.mark.parametrize("behaviour", ["release", "corrected"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_noise_is_the_noise_operators(backend: str, behaviour: str) -> None:
    M, B, D = 2, 5, 10
    made = generator(D, backend=backend, behaviour=behaviour)
    h, r, t = inputs(M, B, D)
    seed = torch.randint(0, 2**63 - 1, (), generator=torch.Generator().manual_seed(3))

    def draw(stream: int, step: int) -> Tensor:
        return torch.stack([philox_normal(seed, stream, m, 11, step, B, D) for m in range(M)])

    steps = range(T, 1, -1)
    noise = SampleNoise(
        draw(X_T, 0),
        torch.stack([draw(TAIL, s) for s in steps]),
        torch.stack([draw(HEAD, s) for s in steps]),
        draw(X_T_HEAD, 0),
    )
    found = made.sample(h, r, t, generator=torch.Generator().manual_seed(3), row_offset=11)
    assert worst(found, truth(made, h, r, t, noise)) < 2e-6


# In Triton's interpreter a product is the host library's, whose bits depend on a row's place in its tile: cut between
# tiles.
@pytest.mark.parametrize(
    ("backend", "precision", "cuts"),
    [("cpu", "ieee", (1, 6, 29)), ("cpu", "bf16", (1, 6, 29)), ("triton", "ieee", (64,))],
)
@pytest.mark.parametrize("behaviour", ["release", "corrected"])
def test_rows_are_the_same_bits_in_every_split(
    behaviour: str, backend: str, precision: str, cuts: tuple[int, ...]
) -> None:
    M, B, D = (2, 53, 34) if backend == "cpu" else (1, 70, 6)
    made = generator(D, backend=backend, behaviour=behaviour, precision=precision)
    h, r, t = inputs(M, B, D)

    def part(first: int, last: int) -> list[Tensor]:
        seeded = torch.Generator().manual_seed(1)
        heads, tails = made.sample(
            h[:, first:last], r[first:last], t[:, first:last], generator=seeded, row_offset=first
        )
        return heads + tails

    whole = part(0, B)
    for cut in cuts:
        for a, b, expected in zip(part(0, cut), part(cut, B), whole, strict=True):
            assert torch.equal(torch.cat([a, b], 1), expected)


def arguments(backend: str, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    made = generator(8).to(dtype)
    with torch.no_grad():
        weights = factors(made.denoiser, T)
    c_head, c_tail = torch.randn(2, 2, 3, 8, dtype=dtype)
    flat = [w.detach() for w in (*weights[:4], *weights.time_moments, *weights[5:])]
    return (c_head, c_tail, *flat, list(LEVELS), True, "ieee", torch.tensor([5]), 0, None, None, None, None, backend)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_operator_is_registered_soundly(backend: str) -> None:
    torch.library.opcheck(torch.ops.dhns_fast.denoise_chain.default, arguments(backend))


def test_operator_compiles_into_one_graph() -> None:
    given = arguments("eager")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(c_head: Tensor) -> Tensor:
        return torch.ops.dhns_fast.denoise_chain(c_head, *given[1:])[0] * 2

    assert torch.equal(doubled(given[0]), torch.ops.dhns_fast.denoise_chain(*given)[0] * 2)


def test_float64_is_plain_torchs() -> None:
    automatic, eager = (
        torch.ops.dhns_fast.denoise_chain(*arguments(backend, torch.float64)) for backend in ("", "eager")
    )
    for a, b in zip(automatic, eager, strict=True):  # but for normals that C++ draws
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(BackendUnavailableError, match=r"backend 'cpu': it reads torch.float32, not torch.float64"):
        torch.ops.dhns_fast.denoise_chain(*arguments("cpu", torch.float64))


def test_inputs_need_not_be_contiguous() -> None:
    made = generator(12, backend="cpu")
    with torch.no_grad():
        weights = factors(made.denoiser, T)
    c = torch.randn(2, 12, 5).mT
    noise = Noise(torch.tensor([5]), 0, None, None, None, None)
    found = denoise.chain(c, c, weights, LINEAR, LEVELS, True, "ieee", noise, "cpu")
    expected = denoise.chain(c.contiguous(), c.contiguous(), weights, LINEAR, LEVELS, True, "ieee", noise, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_rows_on_a_gpu_are_the_same_bits_in_batches_of_any_size(precision: str) -> None:
    """Few rows have tiles of their own: sums and moments in the order of the others'."""
    made = generator(256, backend="triton", precision=precision).cuda()
    h, r, t = (x.cuda() for x in inputs(1, 700, 256))

    def part(first: int, last: int) -> list[Tensor]:
        seeded = torch.Generator("cuda").manual_seed(1)
        heads, tails = made.sample(
            h[:, first:last], r[first:last], t[:, first:last], generator=seeded, row_offset=first
        )
        return heads + tails

    whole = part(0, 700)
    pieces = [part(0, 100), part(100, 700)]
    for a, b, expected in zip(*pieces, whole, strict=True):
        assert torch.equal(torch.cat([a, b], 1), expected)
