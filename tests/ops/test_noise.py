"""The noise operator: the published known answers, the oracle in float64, and what an address may and may not
change.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from dhns_fast.errors import InputError
from dhns_fast.ops import noise
from dhns_fast.reference import noise as reference

KERNELS = importlib.util.find_spec("dhns_fast.kernels") is not None and importlib.util.find_spec("triton") is not None
BACKENDS = [
    "eager",
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not KERNELS, reason="needs dhns_fast installed, and triton")),
]


def draw(
    backend: str,
    seed: int | Tensor = 7,
    stream: int = 2,
    modality: int = 1,
    offset: int = 0,
    step: int = 50,
    rows: int = 5,
    columns: int = 9,
) -> Tensor:
    return noise.philox_normal(seed, stream, modality, offset, step, rows, columns, backend=backend)


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, ...]) -> None:
    a, b, c, d = (torch.tensor(word) for word in counter)
    assert tuple(int(word) for word in reference.philox((a, b, c, d), key)) == want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seed", "stream", "modality", "offset", "step", "rows", "columns"),
    [
        (0, 0, 0, 0, 0, 1, 1),
        (7, 3, 2, 5, 50, 33, 70),
        (-1, 1, noise.MAX_MODALITIES - 1, 2**32 - 2, noise.MAX_STEPS - 1, 4, 7),
        (2**64 - 12345, 2, 1, 2**40, 1, 3, 512),
        (2**63 - 1, 2, 1, 2**63 - 4, 1, 3, 64),
        (11, 0, 0, 0, 3, 100, 260),
        (11, 0, 0, 0, 3, 0, 4),
        (11, 0, 0, 0, 3, 4, 0),
    ],
)
def test_agrees_with_the_oracle(
    backend: str, seed: int, stream: int, modality: int, offset: int, step: int, rows: int, columns: int
) -> None:
    got = noise.philox_normal(seed, stream, modality, offset, step, rows, columns, backend=backend)
    want = reference.philox_normal(seed, stream, modality, offset, step, rows, columns)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_million_of_them(backend: str) -> None:
    """Normals are finite and correct to 1e-6 over many addresses, tails included."""
    got = draw(backend, rows=512, columns=2048)
    want = reference.philox_normal(7, 2, 1, 0, 50, 512, 2048)
    assert (got.double() - want).abs().max() < 1e-6
    assert want.abs().max() > 4.8  # the tail of a million normals was reached
    assert abs(got.double().mean()) < 4e-3
    assert abs(got.double().var() - 1) < 6e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_split(backend: str) -> None:
    whole = draw(backend, rows=10, columns=13)
    assert torch.equal(
        whole, torch.cat([draw(backend, rows=4, columns=13), draw(backend, offset=4, rows=6, columns=13)])
    )
    assert torch.equal(whole[:, :6], draw(backend, rows=10, columns=6))


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"seed": 7 + 2**32}, {"stream": 3}, {"modality": 2}, {"step": 49}, {"offset": 2**32}]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_address_counts(backend: str, change: dict[str, int]) -> None:
    a, b = draw(backend), draw(backend, **change)
    assert not (a == b).any()


def test_operator_contract() -> None:
    seed = torch.tensor(3)
    torch.library.opcheck(torch.ops.dhns_fast.philox_normal.default, (seed, 0, 0, 0, 5, 3, 6))

    def f(seed: Tensor) -> Tensor:
        return noise.philox_normal(seed, noise.TAIL, 0, 0, 5, 3, 6) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(seed), f(seed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": 4}, "stream: got 4; accepted: 0 to 3"),
        ({"modality": -1}, "modality: got -1; accepted: 0 to 16383"),
        ({"step": 65536}, "step: got 65536; accepted: 0 to 65535"),
        ({"offset": -1}, "row_offset: got -1"),
        (
            {"seed": torch.zeros(2)},
            r"seed: got torch.float32 \[2\]; accepted: an int64 tensor with one element, or a number",
        ),
    ],
)
def test_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw("eager", **change)
