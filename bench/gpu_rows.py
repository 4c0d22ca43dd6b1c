"""The figures that the GPU half is measured by, one JSON line each as soon as it is known: `python bench/gpu_rows.py
OUT.jsonl`.

Each row: ours, plain torch beside it, and the floor: the larger of bytes over the rate of a copy and operations over
the rate of a library product, both measured here first. Rows are in the order of their worth, as time may run out.
`--small --device cpu` tries the script out.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dhns_fast.data.filter import Ragged
from dhns_fast.loss import corruption_loss, hal_from_embeddings
from dhns_fast.ops.score_eager import pair_scores
from dhns_fast.sampler import DiffHEG
from dhns_fast.scoring import one_vs_all_loss, rank_all, topk_all

Row = dict[str, Any]
Call = Callable[[], Any]


class Bench:
    """Times calls on a device and knows its ceilings."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small
        self.rates = self._rates()

    def ms(self, call: Call, rounds: int = 7, warm_up: int = 2) -> float:
        """Median of so many calls, of fewer where they take long: a second is enough for one figure."""
        for _ in range(warm_up):
            call()
        found: list[float] = []
        while len(found) < (1 if self.small else rounds) and (len(found) < 3 or sum(found) < 1e3):
            if self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                found.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(found)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def sized(self, value: int) -> int:
        """A size of the job, or what is left of it where the script is only tried out."""
        return max(2, value // 64) if self.small else value

    def _rates(self) -> dict[str, float]:
        n = self.sized(8192)
        a = self.draw(n, n)
        found = {}
        for name, dtype, tf32 in (
            ("ieee", torch.float32, False),
            ("tf32", torch.float32, True),
            ("bf16", torch.bfloat16, False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            x = a.to(dtype)
            found[name] = 2.0 * n**3 / self.ms(functools.partial(torch.mm, x, x), 5) * 1e3
        torch.backends.cuda.matmul.allow_tf32 = False
        x = self.draw(self.sized(1 << 28))
        y = torch.empty_like(x)
        found["byte"] = 8.0 * x.numel() / self.ms(lambda: y.copy_(x), 5) * 1e3
        return found

    def row(
        self,
        what: str,
        ours: Call,
        asked: float | None,
        floor: dict[str, float],
        plain: Call | None = None,
        warm_up: int = 2,
        **more: Any,
    ) -> Row:
        """A line: what was asked, ours, plain torch where there is one, and the floor where one is known."""
        floor_ms = max((amount / self.rates[name] * 1e3 for name, amount in floor.items()), default=None)
        found: Row = {"what": what, "asked_ms": asked and float(asked), "floor_ms": floor_ms, **more}
        try:
            found["ms"] = self.ms(ours, warm_up=warm_up)
            found["of_floor"] = None if floor_ms is None else floor_ms / found["ms"]
            found["plain_ms"] = None if plain is None else self.ms(plain, 3, warm_up)
        except Exception as error:  # one row's failure is no other's
            found["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        return found


def chains(b: Bench) -> Iterator[Row]:
    asked = {
        (3, 2000, 1024): (13, 22, 85), (3, 2000, 256): (2.2, 3.0, 9), (1, 64, 1024): (2, 3, 8), (3, 500, 64): (1.2, 1.2, 1.2),
    }  # fmt: skip
    for (M, B, D), limits in asked.items():
        B, D = b.sized(B), max(8, b.sized(D))
        for precision, limit in zip(("bf16", "tf32", "ieee"), limits, strict=True):
            if precision == "tf32" and b.device.type != "cuda":
                continue
            for behaviour in ("release", "corrected") if (D == 1024 and B == 2000) else ("release",):
                made = DiffHEG(D, 50, D, 6.0, 2.0, precision=precision, behaviour=behaviour).to(b.device)
                inputs = b.draw(M, B, D), b.draw(B, D), b.draw(M, B, D)
                steps = 55 if behaviour == "release" else 100
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                x, w, h = (
                    b.draw(M * B, D, dtype=dtype),
                    # The largest eigenvalue of wᵀw is 1: of unit variance, 12 of 55 pairs would come to infinity.
                    b.draw(4 * D, D, dtype=dtype).mul_((9 * D) ** -0.5),
                    b.draw(M * B, 4 * D, dtype=dtype),
                )

                def products(
                    x: Tensor = x, w: Tensor = w, h: Tensor = h, steps: int = steps, tf32: bool = precision == "tf32"
                ) -> None:
                    torch.backends.cuda.matmul.allow_tf32 = tf32
                    for _ in range(steps):
                        torch.mm(x, w.T, out=h)
                        torch.mm(h, w, out=x)
                    torch.backends.cuda.matmul.allow_tf32 = False

                call = functools.partial(made.sample, *inputs)
                yield b.row(
                    f"chain M {M} B {B} D {D} {behaviour} {precision}", call, limit if behaviour == "release" else limit * 100 / 55,
                    {precision: 16.0 * D * D * steps * M * B}, products, beside="its products by torch.mm",
                )  # fmt: skip


def ranks(b: Bench) -> Iterator[Row]:
    for B, E, D, limits in (
        (2663, 15_000, 256, (0.8, 0.15, 0.12, 1.0, 1.5)),
        (1000, 1_000_000, 256, (10, 2.2, 1.3, 33, 60)),
    ):
        B, E = b.sized(B), b.sized(E)
        table = b.draw(E, D)
        query, target = table[:B].clone(), torch.arange(B, device=b.device)
        if B > E // 2:
            continue

        def by_torch(query: Tensor = query, table: Tensor = table, target: Tensor = target) -> Tensor:
            scores = query @ table.T
            return (scores > scores.gather(1, target[:, None])).sum(1)

        plain = by_torch if B * E <= 1 << 28 else None
        for precision, limit in zip(("ieee", "tf32", "bf16"), limits, strict=False):
            if precision != "ieee" and b.device.type != "cuda":
                continue
            call = functools.partial(rank_all, query, table, target, precision=precision)
            yield b.row(f"rank_all dot {B} x {E} x {D} {precision}", call, limit, {precision: 2.0 * B * E * D}, plain)
        narrow = table.bfloat16()
        if b.device.type == "cuda":
            call = functools.partial(rank_all, narrow[:B].clone(), narrow, target)
            yield b.row(f"rank_all dot {B} x {E} x {D} ieee, bf16 table", call, limits[2], {"bf16": 2.0 * B * E * D})
        asked: tuple[tuple[str, float | None, float], ...] = (
            ("l2", 12 if E > 100_000 else None, 4.0), ("l1", limits[3], 4.0), ("complex_l1", limits[4], 7.0),
        )  # fmt: skip
        for reduction, most, flops in asked:
            distance = functools.partial(torch.cdist, query, table, p=1.0) if reduction == "l1" and plain else None
            call = functools.partial(rank_all, query, table, target, reduction)
            yield b.row(f"rank_all {reduction} {B} x {E} x {D}", call, most, {"ieee": flops * B * E * D}, distance)

        def best_by_torch(query: Tensor = query, table: Tensor = table) -> Any:
            return (query @ table.T).topk(10)

        known = Ragged(torch.arange(B + 1, device=b.device), target)
        yield b.row(
            f"topk_all k 10 {B} x {E} x {D}", functools.partial(topk_all, query, table, 10, known=known), 1.2 if E < 100_000 else 12,
            {"ieee": 2.0 * B * E * D}, best_by_torch if plain else None,
        )  # fmt: skip
        if plain:
            q, e = query.clone().requires_grad_(), table.clone().requires_grad_()
            ours = lambda q=q, e=e, t=target: torch.autograd.grad(one_vs_all_loss(q, e, t), (q, e))  # noqa: E731
            theirs = lambda q=q, e=e, t=target: torch.autograd.grad(F.cross_entropy(q @ e.T, t), (q, e))  # noqa: E731
            yield b.row(f"one_vs_all_loss with gradients {B} x {E} x {D}", ours, 2.0, {"ieee": 6.0 * B * E * D}, theirs)


def losses(b: Bench) -> Iterator[Row]:
    from dhns_fast.reference import loss as reference

    B, D, M, L = b.sized(2000), max(8, b.sized(1024)), 3, 5
    levels = [0.6, 1.8, 3.0, 4.2, 5.4], [0.0, 0.5, 1.0, 1.0, 0.5]
    # On the device, as training has them: a list would be sent in every call, and waited for.
    on_device = [torch.tensor(x, device=b.device) for x in levels]
    for kind, fused in (("distmult", False), ("distmult", True), ("transe", True), ("complex", True), ("rotate", True)):
        head, tail = (b.draw(*((M,) if fused else ()), B, D).mul_(0.3).requires_grad_() for _ in range(2))
        relation = b.draw(B, D // 2 if kind == "rotate" else D).requires_grad_()
        attention = b.draw(D).requires_grad_() if fused else None
        learned = [x for x in (head, relation, tail, attention) if x is not None]
        made = b.draw(2, L, M, B, D).mul_(0.3)

        def gradients(
            function: Any,
            of_levels: Any,
            a: tuple[Any, ...] = (kind, head, relation, tail, *made),
            w: Any = attention,
            x: Any = learned,
        ) -> Any:
            return torch.autograd.grad(function(*a, *of_levels, gamma=6.0, attention=w), x)

        name = f"hal_embeddings {kind}{' fused' * fused} B {B} D {D} M {M} with gradients"
        plain = functools.partial(gradients, reference.hal_from_embeddings, levels)
        yield b.row(
            name,
            functools.partial(gradients, hal_from_embeddings, on_device),
            0.3,
            {"byte": 4.0 * 2 * 4 * M * B * D},
            plain,
        )
    N, E = b.sized(64), b.sized(15_000)
    for name, reduction in (("DistMult", "dot"), ("RotatE", "complex_l1"), ("TransE", "l1")):
        query, table = b.draw(B, D).mul_(0.3).requires_grad_(), b.draw(E, D).mul_(0.3).requires_grad_()
        ids = torch.randint(E, (B, 1 + N), device=b.device)

        def fused_loss(q: Tensor = query, e: Tensor = table, i: Tensor = ids, r: str = reduction) -> Any:
            return torch.autograd.grad(corruption_loss(q, e, i[:, 0], i[:, 1:], r), (q, e))

        def gathered(q: Tensor = query, e: Tensor = table, i: Tensor = ids, r: str = reduction) -> Any:
            scores = pair_scores(q[:, None], e[i], r)
            positive, negative = scores[:, 0], scores[:, 1:]
            share = (0.5 * negative).softmax(1).detach()
            loss = -F.logsigmoid(positive).mean() - (share * F.logsigmoid(-negative)).sum(1).mean()
            return torch.autograd.grad(loss / 2, (q, e))

        yield b.row(
            f"corruption_loss {name} B {B} N {N} D {D} E {E} with gradients",
            fused_loss,
            0.77,
            {"byte": 12.0 * B * (1 + N) * D},
            gathered,
        )


def steps(b: Bench) -> Iterator[Row]:
    """Whole steps on a graph of MKG-Y's size, as one CUDA graph and, beside it, launched kernel by kernel; an
    evaluation of its test set.
    """
    from dhns_fast.data import synthetic
    from dhns_fast.train import TrainConfig, Trainer

    E, B = b.sized(15_000), b.sized(2000)
    kg = synthetic(E, 28, 26_638 if not b.small else 800, {"text": 384, "image": 383}, seed=1)
    cases: tuple[tuple[str, str, int, str, float], ...] = (
        ("rotate", "dhns", 1024, "tf32", 40), ("rotate", "dhns", 256, "tf32", 10),
        ("rotate", "self-adversarial", 256, "ieee", 1.8), ("distmult", "self-adversarial", 1024, "ieee", 4.5),
    )  # fmt: skip
    for model, method, D, precision, asked in cases:
        options: dict[str, Any] = {
            "model": model, "method": method, "dim": max(8, b.sized(D)), "batch_size": B, "num_negatives": b.sized(64),
            "device": b.device.type, "precision": precision if b.device.type == "cuda" else None,
        }  # fmt: skip
        graphs, plain = (Trainer(TrainConfig(**options, cuda_graph=cuda_graph), kg) for cuda_graph in (None, False))
        # Two steps of each side run as they are, the next two are recorded.
        row = b.row(
            f"step {model} {method} B {B} D {D} {precision}", graphs.step, asked, {}, plain.step, warm_up=6,
            beside="the step kernel by kernel",
        )  # fmt: skip
        # Known when it has been recorded: one that could not be is launched kernel by kernel from then on.
        yield {**row, "cuda_graph": graphs.cuda_graph}
        if D == 1024 and method == "dhns":
            what = f"evaluation {model} D {D}, {len(kg.test)} triples"
            yield b.row(what, functools.partial(graphs.validate, "test"), None, {})


def headline(b: Bench) -> Iterator[Row]:
    """86 M entities of a narrow table, 20 000 queries from a thousand or fewer."""
    E, D = b.sized(b.sized(86_000_000)), 256
    table = torch.empty(E, D, device=b.device, dtype=torch.bfloat16)
    for start in range(0, E, 1 << 22):
        table[start : start + (1 << 22)] = b.draw(min(1 << 22, E - start), D, dtype=torch.bfloat16)
    for reduction, B, asked in (("dot", 4000, 2.5), ("l1", 500, 50), ("complex_l1", 500, 95)):
        B = b.sized(B)
        query, target = table[:B].clone(), torch.arange(B, device=b.device)
        call = functools.partial(
            rank_all, query, table, target, reduction, backend=None if b.device.type == "cuda" else "eager"
        )
        begin = time.perf_counter()
        call()
        if b.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if b.device.type == "cuda":
            torch.cuda.synchronize()
        ms = (time.perf_counter() - begin) * 1e3
        yield {
            "what": f"rank_all {reduction} {B} x {E} x {D}, bf16 table",
            "ms": ms,
            "s_for_20000": ms / B * 20,
            "asked_s": asked,
        }


SECTIONS = {"chains": chains, "ranks": ranks, "losses": losses, "steps": steps, "headline": headline}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON lines")
    parser.add_argument(
        "--sections", nargs="+", choices=tuple(SECTIONS), default=("chains", "losses", "ranks", "steps")
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="after which no further row is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a sixty-fourth of every size")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    bench = Bench(options.device, options.small)
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    with options.output.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            file.flush()

        write({"what": "ceilings", "device": device, "torch": torch.__version__, **bench.rates})
        failed = 0
        for place, section in enumerate(options.sections, 1):
            # Each section may take its share of the time, and what those before it have left.
            end = begin + options.seconds * place / len(options.sections)
            rows = SECTIONS[section](bench)
            while True:
                if time.monotonic() > end:
                    print(f"{section}: out of time", flush=True)
                    break
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except Exception as error:  # a section ends with it, and no other does
                    row = {"what": section, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
                failed += "failed" in row
                write(row)
                figures = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
                print(f"{row['what']:64s} {row.get('failed', figures)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
