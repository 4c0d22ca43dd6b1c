"""The contract of every operator: called by itself and with anything, it answers, or raises InputError or
BackendUnavailableError.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.operators import CHANGED, B, operators
from torch.autograd import forward_ad

from dhns_fast.errors import BackendUnavailableError, InputError
from dhns_fast.ops import backend as backends

HERE = Path(__file__).parent
CASES = operators()
NAMES = (*backends.NAMES, "", "nonsense")
# Enough to be out of every buffer, and not so much that making it takes long.
FAR = 1 << 22


def call(name: str, backend: str, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs, and what became of the arguments that the operator changes."""
    changed = {f: arguments[f].clone() for f in CHANGED.get(name, ()) if isinstance(arguments[f], torch.Tensor)}
    out = getattr(torch.ops.dhns_fast, name)(**arguments | changed, backend=backend)
    outputs = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    return [*outputs, *changed.values()]


def outcome(name: str, backend: str, arguments: dict[str, Any]) -> str:
    try:
        call(name, backend, arguments)
    except InputError:
        return "InputError"
    except BackendUnavailableError:
        return "BackendUnavailableError"
    return "result"


def wrong(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's place taken by others: of other shapes, dtypes, devices and, where it holds ids, with ids that are
    none.
    """
    yield x[None]
    yield x.flatten()[:1].expand(FAR)
    if x.ndim:
        yield x[0]
        yield x.repeat_interleave(3, -1)
        yield x[..., :0]
        yield x[:0]
        yield torch.cat([x, x])
    yield x.to("meta")
    if x.dtype == torch.int64:
        yield x.int()
        yield x.float()
        yield x + FAR
        yield x - FAR
        yield x.flip(0) if x.ndim else x
    elif x.is_floating_point():
        yield x.long()
        yield x.double()
        yield x.half()
        yield x.bfloat16()
        yield x.to(torch.complex64)
        yield x.to(torch.float8_e4m3fn)
        yield torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    yield torch.empty(0, dtype=x.dtype)


def without(x: Any, size: int) -> Any:
    """A tensor, or a list of tensors, with nothing along the dimensions of a size; anything else as it is."""
    if isinstance(x, list):
        return [without(y, size) for y in x]
    return x.new_zeros([0 if n == size else n for n in x.shape]) if isinstance(x, torch.Tensor) else x


def attempts() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, (_, arguments) in CASES.items():
        for backend in ("", "cpu", "eager"):
            for size in {n for x in arguments.values() if isinstance(x, torch.Tensor) for n in x.shape}:
                yield name, backend, {field: without(x, size) for field, x in arguments.items()}
            for field, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    yield name, backend, {**arguments, field: None}
                    for other in wrong(value):
                        yield name, backend, {**arguments, field: other}
                elif value is None:
                    for other in (torch.tensor(1.0), torch.ones(3), torch.ones(B, 8), torch.ones(0)):
                        yield name, backend, {**arguments, field: other}
                elif isinstance(value, str):
                    yield name, backend, {**arguments, field: "nonsense"}
                elif isinstance(value, int) and not isinstance(value, bool):
                    for number in (-1, FAR, -(1 << 40)):
                        if not (field in ("rows", "row_offset") and number > 0):
                            yield name, backend, {**arguments, field: number}
                elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
                    for other in wrong(value[0]):
                        yield name, backend, {**arguments, field: [other, *value[1:]]}
                    yield name, backend, {**arguments, field: value[1:]}
                elif isinstance(value, list):
                    for numbers in ([], [FAR], [-1]):
                        yield name, backend, {**arguments, field: numbers}


def sweep(backend: str) -> None:
    """What a fresh process does: every operator with every argument spoilt in every way; anything but the two errors
    ends it.
    """
    seen: dict[str, int] = {}
    for name, asked, arguments in attempts():
        if asked == backend:
            kind = outcome(name, asked, arguments)
            seen[kind] = seen.get(kind, 0) + 1
    print(seen)


@pytest.mark.parametrize("backend", ["", "cpu", "eager"])
def test_spoilt_arguments_end_no_process(backend: str) -> None:
    code = f"import sys; sys.path[:0] = [{str(HERE.parent)!r}]\nfrom ops.test_contract import sweep\nsweep({backend!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = eval(done.stdout)
    assert seen["InputError"] > 500


@pytest.mark.parametrize("name", CASES)
def test_every_backend_by_name(name: str) -> None:
    operator, arguments = CASES[name]
    has = {entry.backend.name: entry for entry in operator.implementations}
    expected = call(name, "eager", arguments)
    for backend in NAMES:
        if backend == "nonsense":
            with pytest.raises(InputError, match="backend: got 'nonsense'; accepted: auto"):
                call(name, backend, arguments)
        elif backend in ("", "auto") or (backend in has and has[backend].backend.why_not(torch.device("cpu")) is None):
            for got, want in zip(call(name, backend, arguments), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(BackendUnavailableError, match=f"backend '{backend}': "):
                call(name, backend, arguments)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_tensor_to_compute_with_is_refused_by_name(name: str) -> None:
    operator, arguments = CASES[name]
    for field, value in arguments.items():
        if isinstance(value, torch.Tensor):
            spoilt = [value.to(torch.float8_e4m3fn)] if value.is_floating_point() else [value.float()]
            if operator._hints[field] is torch.Tensor:
                spoilt.append(None)
            for other in spoilt:
                with pytest.raises(InputError) as refused:
                    call(name, "eager", {**arguments, field: other})
                # Where it is what the others are measured by, and fits as such, one of them is at fault.
                assert refused.value.argument == field or f"as {field}" in refused.value.accepted


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_in_place_of_a_number_has_one_and_no_gradient(name: str) -> None:
    operator, arguments = CASES[name]
    for field, value in arguments.items():
        if isinstance(value, (bool, int, float)):
            for other in (torch.nn.Parameter(torch.tensor(float(value))), torch.full((B,), float(value))):
                with pytest.raises(InputError, match=f"^{field}: "):
                    operator(**{**arguments, field: other})


@pytest.mark.parametrize("name", CHANGED)
def test_numbers_that_would_stay_in_a_table_are_finite(name: str) -> None:
    _, arguments = CASES[name]
    for field, value in arguments.items():
        for other in (math.nan, math.inf) if isinstance(value, float) else ():
            with pytest.raises(InputError, match=f"^{field}: got {other}; accepted: finite"):
                call(name, "", {**arguments, field: other})


def floats(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The floating-point tensors among them, the first of a list for all of it."""
    found = {f: x[0] if isinstance(x, list) and x else x for f, x in arguments.items()}
    return {f: x for f, x in found.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


@pytest.mark.parametrize("name", CHANGED)
def test_no_argument_lies_in_memory_that_is_changed(name: str) -> None:
    operator, arguments = CASES[name]
    given = floats(arguments)

    def put(field: str, x: torch.Tensor) -> Any:
        return [x, *arguments[field][1:]] if isinstance(arguments[field], list) else x

    for changed in given.keys() & set(CHANGED[name]):
        for field, x in given.items():
            if field != changed:
                # From the last number of one on, the other: the least that two can share.
                memory, at = torch.ones(given[changed].numel() + x.numel()), given[changed].numel() - 1
                views = {changed: memory[: at + 1].view(given[changed].shape), field: memory[at:-1].view(x.shape)}
                with pytest.raises(InputError, match="updated in place"):
                    operator(**{**arguments, **{f: put(f, y) for f, y in views.items()}})
    # Side by side in one piece of memory they are as good as apart.
    expected = call(name, "eager", arguments)
    memory, whole = torch.cat([x.flatten() for x in given.values()]), {}
    for (field, x), part in zip(given.items(), memory.split([x.numel() for x in given.values()]), strict=True):
        whole[field] = put(field, part.view(x.shape))
    out = operator(**{**arguments, **whole}, backend="eager")
    got = [*(() if out is None else out), *(whole[f] for f in CHANGED[name] if f in whole)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# A process that has imported the package and called nothing, and a child of it for each first call.
FRESH = """
import os, sys, traceback, torch
sys.path[:0] = [{tests!r}]
import dhns_fast
from ops.operators import CHANGED, operators
for name, backend in {calls!r}:
    if not (child := os.fork()):
        try:
            getattr(torch.ops.dhns_fast, name)(**operators()[name][1], backend=backend)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name + " on " + backend)
"""


def test_the_first_call_of_a_process_loads_what_it_needs() -> None:
    backends = {
        name: {entry.backend.name for entry in operator.implementations} for name, (operator, _) in CASES.items()
    }
    calls = [(name, backend) for name in CASES for backend in ("cpu", "eager") if backend in backends[name]]
    code = FRESH.format(tests=str(HERE.parent), calls=calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def variants(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same values, strided otherwise."""
    if x.ndim < 1:
        return
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_strides_change_nothing(name: str, backend: str) -> None:
    operator, arguments = CASES[name]
    if backend not in {entry.backend.name for entry in operator.implementations}:
        pytest.skip("this operator has no such backend")
    expected = call(name, backend, arguments)
    for field, value in arguments.items():
        if isinstance(value, torch.Tensor) and field not in CHANGED.get(name, ()):
            for other in variants(value):
                for got, want in zip(call(name, backend, {**arguments, field: other}), expected, strict=True):
                    # A library's products have other bits where memory is aligned otherwise.
                    torch.testing.assert_close(
                        got, want, rtol=1e-6 if backend == "eager" else 0, atol=1e-6 if backend == "eager" else 0
                    )


DIFFERENTIABLE = {
    "score_all": ("query", "entity", "scale"),
    "logsumexp_all": ("query", "entity", "scale"),
    "one_vs_all": ("query", "entity", "scale"),
    "hal_embeddings": ("head", "relation", "tail", "margin"),
    "hal_scores": ("positive", "negative", "margin"),
    "self_adversarial": ("positive", "negative"),
    "corruption_loss": ("query", "table"),
    "fuse": ("structure", "attention"),
    "power_sum": ("x",),
    "project": ("features", "weight", "bias"),
    "diffusion_loss": ("noisy", "condition", "state", "time", "bias1", "output"),
}


@pytest.mark.parametrize("reduction", ["dot", "l2", "l1", "complex_l1"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_tensors_in_columns(name: str, reduction: str) -> None:
    """`zeros_like` of a transposed table is transposed, and a kernel that writes rows into it writes another's."""
    (operator, given), fields = CASES[name], DIFFERENTIABLE[name]
    if "reduction" in given:
        given = {**given, "reduction": reduction}
    elif reduction != "dot":
        pytest.skip("it has no reduction")
    if "scale" in fields:
        given = {**given, "scale": given["query"].abs() + 0.5}

    def gradients(backend: str, columns: bool) -> list[torch.Tensor]:
        leaves = {f: given[f].detach().clone().requires_grad_() for f in fields}
        taken = {f: x.movedim(0, -1).contiguous().movedim(-1, 0) if columns else x for f, x in leaves.items()}
        out = call(name, backend, {**given, **taken})[0]
        return list(
            torch.autograd.grad((out * torch.arange(1, out.numel() + 1).view(out.shape)).sum(), list(leaves.values()))
        )

    want = gradients("eager", False)
    for entry in operator.implementations:
        if entry.backend.why_not(torch.device("cpu")) is None and entry.backend.name != "triton":
            for f, got, expected in zip(fields, gradients(entry.backend.name, True), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda text, f=f: f"{f}: {text}")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(name: str) -> None:
    """A gradient is no function that autograd knows: taken for a constant it would be wrong without a word."""
    _, given = CASES[name]
    leaves = {f: given[f].detach().clone().requires_grad_() for f in DIFFERENTIABLE[name] if given[f] is not None}
    # What is no leaf is reached through its own graph.
    taken = {f: x * 1 if i % 2 else x for i, (f, x) in enumerate(leaves.items())}
    out = call(name, "", {**given, **taken})[0]
    learned = list(leaves.values())
    for gradient in torch.autograd.grad(out.square().sum(), learned, create_graph=True):
        for x in learned:
            with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
                torch.autograd.grad(gradient.sum() + x.sum(), x, retain_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_refused(name: str) -> None:
    """Torch drops a tangent in front of an operator: its derivative would come out as 0."""
    arguments = {f: x.detach() if isinstance(x, torch.Tensor) else x for f, x in CASES[name][1].items()}
    field = next((f for f, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    if field is None:
        pytest.skip("it reads whole numbers alone")

    def function(x: torch.Tensor) -> torch.Tensor:
        call(name, "", {**arguments, field: x})
        return x

    value = arguments[field]
    with pytest.raises(RuntimeError, match="has no derivative in forward mode"):
        torch.func.jvp(function, (value,), (torch.ones_like(value),))
    with forward_ad.dual_level():
        function(value)  # what has no tangent is answered
        with pytest.raises(RuntimeError, match="has no derivative in forward mode"):
            function(forward_ad.make_dual(value, torch.ones_like(value)))


@pytest.mark.parametrize(
    ("name", "flag", "field"),
    [
        ("diffusion_loss", "with_inputs", "condition"),
        ("diffusion_loss", "with_weights", "bias1"),
        ("hal_embeddings", "gradients", "tail"),
    ],
)
def test_a_gradient_that_nobody_asked_for_is_refused(name: str, flag: str, field: str) -> None:
    operator, given = CASES[name]
    arguments = {f: x.detach() if isinstance(x, torch.Tensor) else x for f, x in given.items()}
    learned = arguments[field].clone().requires_grad_()
    loss = operator(**{**arguments, field: learned, flag: False})[0]
    with pytest.raises(RuntimeError, match=f"{name} was called with {flag}=False and has no gradient of {field}"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("topk_all", "k"),
        ("corrupt", "num_entities"),
        ("find_ranges", "width"),
        ("hal_scores", "mu"),
        ("corruption_loss", "temperature"),
        ("denoise_chain", "row_offset"),
    ],
)
def test_numbers_may_change_under_compile(name: str, field: str) -> None:
    """Torch puts a symbol into the place of a number once it has seen a second value of it."""

    def function(number: float) -> Any:
        return getattr(torch.ops.dhns_fast, name)(**{**CASES[name][1], field: number})

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first = CASES[name][1][field]
    for number in (first, first + 1, first + 2):
        torch.testing.assert_close(compiled(number), function(number), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["", "cpu", "eager"])
def test_no_query_has_an_empty_answer(backend: str) -> None:
    for name in (
        "target_scores",
        "rank_counts",
        "topk_all",
        "score_all",
        "logsumexp_all",
        "one_vs_all",
        "score_backward",
    ):
        _, arguments = CASES[name]
        none = {
            f: x[:0] if isinstance(x, torch.Tensor) and f not in ("entity", "offsets") else x
            for f, x in arguments.items()
        }
        if "offsets" in none:
            none["offsets"] = torch.zeros(1, dtype=torch.int64)
        for got, want in zip(call(name, backend, none), call(name, backend, arguments), strict=True):
            assert got.numel() == 0 or (got.shape == want.shape and not got.any())
    _, arguments = CASES["denoise_chain"]
    no_rows = {f: x[:, :0] if f.startswith("condition") else x for f, x in arguments.items()}
    assert all(x.shape == (2, 0, 8) for x in call("denoise_chain", backend, no_rows))
    _, arguments = CASES["philox_normal"]
    assert call("philox_normal", backend, {**arguments, "rows": 0})[0].shape == (0, 8)


def test_a_loss_of_nothing_is_refused() -> None:
    for name, fields in (("self_adversarial", ("positive", "negative")), ("corruption_loss", ("query", "ids"))):
        _, arguments = CASES[name]
        with pytest.raises(InputError, match="no empty dimension"):
            call(name, "", {**arguments, **{f: arguments[f][:0] for f in fields}})
    _, arguments = CASES["hal_scores"]
    with pytest.raises(InputError, match="no empty dimension"):
        call("hal_scores", "", {**arguments, "positive": torch.zeros(0), "negative": torch.zeros(2, 3, 0)})


@pytest.mark.parametrize("backend", ["", "cpu", "eager"])
@pytest.mark.parametrize("name", ["hal_embeddings", "hal_scores"])
@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_weights_of_levels_are_numbers(name: str, backend: str, weight: float) -> None:
    with pytest.raises(InputError, match=r"^weight: got \[.*; accepted: values >= 0 and finite"):
        call(name, backend, {**CASES[name][1], "weight": torch.tensor([weight, 1.0])})


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_have_the_shapes_of_results(name: str) -> None:
    _, arguments = CASES[name]
    expected = call(name, "", arguments)

    def moved(x: Any) -> Any:
        return [moved(y) for y in x] if isinstance(x, list) else x.to("meta") if isinstance(x, torch.Tensor) else x

    on_meta = {f: moved(x) for f, x in arguments.items()}
    for got, want in zip(call(name, "", on_meta), expected, strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_autocast_does_not_reach_inside() -> None:
    for name, (_, arguments) in CASES.items():
        expected = call(name, "eager", arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = call(name, "eager", arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


@pytest.mark.parametrize(
    ("name", "field"), [("target_scores", "target"), ("topk_all", "ids"), ("corruption_loss", "ids")]
)
def test_ids_are_refused_under_autocast_too(name: str, field: str) -> None:
    _, arguments = CASES[name]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError):
        call(name, "", {**arguments, field: arguments[field].flip(0) - FAR})


def test_one_import_registers_all_and_loads_no_kernel() -> None:
    """Nor does the package by itself: torch knows none of its operators until one is asked for."""
    code = """
import sys, torch, dhns_fast
registered = lambda: [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("dhns_fast::")]
assert not registered()
import dhns_fast.ops.all
print(len(registered()), [m for m in ("triton", "torch._dynamo", "dhns_fast.ops.build") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(CASES)} []\n"


def test_every_operator_is_in_the_list() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dhns_fast::")
    }
    assert registered == CASES.keys()
