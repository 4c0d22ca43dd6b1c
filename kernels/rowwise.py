"""Row-wise optimisers over the rows of a table that a step touches.

    lazy Adam         m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  x ← x − rate·m / (√v·correction + ε)
    Adagrad           s ← s + g²,           x ← x − rate·g / (√s + ε)
    row-wise Adagrad  s ← s + mean g²,      x ← x − rate·g / (√s + ε), one s a row

g is the sum of a row's gradients in the order in which they were given, plus 3·n3·x·|x|. Shapes: table and moments [E,
D], rows int64 [n], sorted, place int64 [n] (where each one's gradient lies), gradient [n, D]. A bfloat16 table is
computed in float32 and rounded stochastically, by 16 bits of Philox a number: column c of a row has those of the
counter (c // 8, row, number), word c % 8 // 2, the lower half first. One program a sorted place; those that do not
begin a row's run leave at once, so that nobody has to count the distinct rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dhns_fast.kernels import CompileCase
from torch import Tensor

# Columns that one program holds: 8 192 float32 of four arrays are 128 KB of registers in 16 warps.
MAX_DIM = 8192


@triton.jit
def _noise(seed, row, number, QUADS: tl.constexpr):
    """int32 [8·QUADS]: 16 random bits for each column of a row."""
    counter = tl.arange(0, QUADS)
    zero = tl.zeros([QUADS], tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), zero + low, zero + high, zero + number.to(tl.uint32))
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(QUADS * 4)
    return tl.join(word & 0xFFFF, word >> 16).reshape(QUADS * 8).to(tl.int32)


@triton.jit(do_not_specialize=["number"])
def _row_update(
    table_ptr, first_ptr, second_ptr, rows_ptr, place_ptr, gradient_ptr, n, D, rate, beta1, beta2, correction, epsilon, n3,
    seed, number, row_offset, METHOD: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sorted place; BLOCK >= D columns."""
    i_n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i_n)
    before = tl.load(rows_ptr + i_n - 1, mask=i_n > 0, other=-1)
    if row != before:
        k = tl.arange(0, BLOCK)
        m_k = k < D
        b_g = tl.load(gradient_ptr + tl.load(place_ptr + i_n) * D + k, mask=m_k, other=0.0)
        j = i_n + 1
        same = tl.load(rows_ptr + j, mask=j < n, other=-1) == row
        while same:
            b_g += tl.load(gradient_ptr + tl.load(place_ptr + j) * D + k, mask=m_k, other=0.0)
            j += 1
            same = tl.load(rows_ptr + j, mask=j < n, other=-1) == row
        p_x = table_ptr + row * D + k
        b_x = tl.load(p_x, mask=m_k, other=0.0).to(b_g.dtype)
        b_g += 3 * n3 * b_x * tl.abs(b_x)
        if METHOD == "lazy-adam":
            b_m = beta1 * tl.load(first_ptr + row * D + k, mask=m_k, other=0.0) + (1 - beta1) * b_g
            b_v = beta2 * tl.load(second_ptr + row * D + k, mask=m_k, other=0.0) + (1 - beta2) * b_g * b_g
            tl.store(first_ptr + row * D + k, b_m, mask=m_k)
            tl.store(second_ptr + row * D + k, b_v, mask=m_k)
            b_x -= rate * b_m / (tl.sqrt(b_v) * correction + epsilon)
        elif METHOD == "adagrad":
            b_s = tl.load(first_ptr + row * D + k, mask=m_k, other=0.0) + b_g * b_g
            tl.store(first_ptr + row * D + k, b_s, mask=m_k)
            b_x -= rate * b_g / (tl.sqrt(b_s) + epsilon)
        else:
            s = tl.load(first_ptr + row) + tl.sum(b_g * b_g, axis=0) / D
            tl.store(first_ptr + row, s)
            b_x -= rate / (tl.sqrt(s) + epsilon) * b_g
        if NARROW:
            word = b_x.to(tl.int32, bitcast=True)
            carried = word + _noise(seed, row + row_offset, number, BLOCK // 8)
            word = tl.where(b_x == b_x, carried, word | 0x400000)
            tl.store(p_x, (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=m_k)
        else:
            tl.store(p_x, b_x, mask=m_k)


def _launch(D: int) -> tuple[int, int]:
    """(BLOCK, warps): 8 columns a thread, 128 bytes of each array in flight a quarter warp."""
    block = max(128, triton.next_power_of_2(D))
    return block, min(16, max(1, block // 256))


def row_update(
    table: Tensor, first: Tensor, second: Tensor | None, rows: Tensor, gradient: Tensor, method: str, rate: float, beta1: float,
    beta2: float, correction: float, epsilon: float, n3: float, seed: int, number: int, row_offset: int,
) -> None:  # fmt: skip
    """Updates table, first and second in place; rows int64 [n] in any order, with repetitions, gradient [n, D]."""
    n, D = gradient.shape
    if not n:
        return
    rows, place = rows.sort(stable=True)
    block, warps = _launch(D)
    # Numbers that a double table is updated with must not pass through float32, which is what Triton makes of a Python
    # float.
    wide = [torch.tensor(x, dtype=gradient.dtype).item() for x in (rate, beta1, beta2, correction, epsilon, n3)]
    _row_update[(n,)](
        table, first, first if second is None else second, rows, place, gradient, n, D, *wide, seed, number, row_offset,
        METHOD=method, NARROW=table.dtype == torch.bfloat16, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The kernel as it is launched, for D = 512."""
    cases = []
    for method, narrow in (
        ("lazy-adam", False),
        ("adagrad", False),
        ("rowwise-adagrad", False),
        ("rowwise-adagrad", True),
    ):
        block, warps = _launch(512)
        types = {
            "table_ptr": "*bf16" if narrow else "*fp32",
            "first_ptr": "*fp32",
            "second_ptr": "*fp32",
            "rows_ptr": "*i64",
        }
        types |= {"place_ptr": "*i64", "gradient_ptr": "*fp32", "n": "i32", "D": "i32"}
        types |= dict.fromkeys(("rate", "beta1", "beta2", "correction", "epsilon", "n3"), "fp32")
        types |= {"seed": "i64", "number": "i32", "row_offset": "i64"}
        name = f"rowwise.{method}{'.narrow' if narrow else ''}"
        constants = {"METHOD": method, "NARROW": narrow, "BLOCK": block}
        cases.append(CompileCase(name, _row_update, types, constants, warps, 3, False, ("D",)))
    return cases
