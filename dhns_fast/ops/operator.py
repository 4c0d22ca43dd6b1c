"""The contract of every operator of `torch.ops.dhns_fast`.

An operator is declared once: its arguments as a NamedTuple, which is also its schema; a check of shapes, dtypes and
devices, which the kernel and the fake share; a look at values, where looking costs nothing; and its implementations,
best first, of which one is chosen inside the kernel. So it may be called by itself, in a fresh process and with
anything: it answers, or raises InputError or BackendUnavailableError.
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dhns_fast import checks
from dhns_fast.errors import InputError, Shown, shown
from dhns_fast.ops.backend import Implementation, Unfit, choose

Inputs = TypeVar("Inputs", bound=tuple)
# What an argument that is no tensor must have, so as to be one of its type, and what that is in words.
KINDS = {str: ("isprintable", "text"), bool: ("__bool__", "True or False"), int: ("__index__", "integers"),
         float: ("__float__", "numbers")}  # fmt: skip
_NUMBER = "a number, or a tensor of one number that requires no gradient"


class Operator(Generic[Inputs]):
    """An operator `torch.ops.dhns_fast.<name>` that serves every device.

    What `torch.library.custom_op` makes, but for one thing: that imports torch._dynamo on an operator's first call,
    which takes longer than torch itself and only tracing needs. Here the tracer is asked to stay out of the kernel
    where it has been imported already.

    Args:
        name: in `torch.ops.dhns_fast`.
        inputs: a NamedTuple class whose fields, types and defaults are the operator's arguments; `backend: str = ""` is
            one of them.
        returns: the annotation of what it returns. A differentiable operator returns a tuple: of one that returns a
            list torch wants a gradient for just the arguments that the caller wrote down, and does not say which these
            are.
        check: refuses arguments by shape, dtype and device; it must not look at values, since fakes have none.
        fake: outputs of the right shape and dtype, without computing.
        implementations: best first. They get dense tensors, on the current device, with autocast off.
        look: refuses arguments by value; called for CPU tensors alone, as looking would stall a GPU.
        mutates: tensors that it changes; `check` must have seen that they are row-major. No other argument may share
            memory with them, and what is not finite among its numbers is refused, as it would stay in them.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        returns: Any,
        *,
        check: Callable[[Inputs], Any],
        fake: Callable[[Inputs], Any],
        implementations: Sequence[Implementation],
        look: Callable[[Inputs], None] | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        self.name, self.inputs = f"dhns_fast::{name}", inputs
        self.implementations = tuple(implementations)
        self._check, self._fake, self._look = check, fake, look
        self._differentiable = False
        self._hints = hints = typing.get_type_hints(inputs)
        fields = tuple(enumerate(inputs._fields))  # type: ignore[attr-defined]
        self._tensors = tuple(i for i, field in fields if _holds_tensors(hints[field]))
        self._required = tuple((i, field) for i, field in fields if hints[field] is Tensor)
        self._numbers = tuple((i, field) for i, field in fields if hints[field] in (bool, int, float))
        self._rule = tuple((i, field) for i, field in fields if mutates and hints[field] is float)
        self._mutated = tuple(i for i, field in fields if field in mutates)
        self._none = inputs(*([None] * len(hints)))  # type: ignore[arg-type]

        def prototype() -> None: ...

        prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_parameter(field, hints[field], inputs._field_defaults) for field in inputs._fields],  # type: ignore[attr-defined]
            return_annotation=returns,
        )

        def kernel(*args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0:
                self._refuse_tangents(inputs(*args, **kwargs))
            call = opaque() if "torch._dynamo" in sys.modules else self._run
            if self._differentiable or not torch.is_grad_enabled():
                return call(inputs(*args, **kwargs))
            # Torch runs an operator without a gradient of its own within autograd, which would follow an eager form and
            # not a compiled one.
            with torch.no_grad():
                return call(inputs(*args, **kwargs))

        @functools.cache
        def opaque() -> Callable[..., Any]:
            return torch.compiler.disable(self._run)

        torch.library.define(self.name, torch.library.infer_schema(prototype, mutates_args=mutates))
        torch.library.impl(self.name, "default", kernel)
        torch.library.register_fake(self.name)(self._pretend)
        self._overload = getattr(torch.ops.dhns_fast, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, field in self._numbers:
            value = args[i] if i < len(args) else kwargs.get(field)
            # Torch would take the number and drop its gradient.
            if isinstance(value, Tensor) and value.requires_grad:
                raise InputError(field, Shown("a tensor that requires a gradient"), _NUMBER)
        try:
            return self._overload(*args, **kwargs)
        except RuntimeError:  # of torch's dispatcher, which knows no names of ours
            self._refuse_kinds(self.inputs(*args, **kwargs))
            raise

    def _pretend(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.inputs(*args, **kwargs)
        self._refuse_none(inputs)
        self._check(inputs)
        return self._fake(inputs)

    def _run(self, inputs: Inputs) -> Any:
        try:
            return self._answer(inputs)
        except RuntimeError:  # a layout that is not looked for where all is well
            self._refuse_kinds(inputs)
            raise

    def _refuse_none(self, inputs: Inputs) -> None:
        """InputError for None, which torch's dispatcher passes on as a tensor."""
        for i, field in self._required:
            if inputs[i] is None:
                checks.tensor(**{field: None})

    def _refuse_tangents(self, inputs: Inputs) -> None:
        """RuntimeError where a derivative in forward mode is asked for: torch drops a tangent in front of an operator,
        and the answer would be 0.
        """
        # Within torch.func.jvp tensors have lost theirs here, so that nothing is answered there.
        functional = getattr(sys.modules.get("torch._functorch.eager_transforms"), "JVP_NESTING", 0)
        tensors = [y for i in self._tensors for y in (inputs[i] if isinstance(inputs[i], list) else (inputs[i],))]
        if functional or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                f"{self.name} has no derivative in forward mode (torch.func.jvp, jacfwd); reverse mode has the first one"
            )

    def _refuse_shared(self, inputs: Inputs) -> None:
        """InputError where an argument lies in the memory of one that is changed: what is read would depend on the
        order of the writes, and so on the backend.
        """
        changed = {i: inputs[i].untyped_storage().data_ptr() for i in self._mutated if inputs[i] is not None}
        for j in self._tensors:
            several = isinstance(inputs[j], list)
            for k, x in enumerate(inputs[j] if several else (inputs[j],)):
                if x is None:
                    continue
                storage = x.untyped_storage().data_ptr()
                for i, other in changed.items():
                    if i != j and storage == other and _overlap(x, inputs[i]):
                        names = self.inputs._fields  # type: ignore[attr-defined]
                        name, of = f"{names[j]}[{k}]" if several else names[j], names[i]
                        raise InputError(
                            name, Shown(f"memory of {of}"), f"memory of its own, as {of} is updated in place"
                        )

    def _refuse_kinds(self, inputs: Inputs) -> None:
        """InputError where an argument is of a kind that no operator takes: another type, or a tensor that is not
        dense.
        """
        for field, value in zip(self.inputs._fields, inputs, strict=True):  # type: ignore[attr-defined]
            kinds = typing.get_args(self._hints[field]) or (self._hints[field],)
            if value is None and type(None) in kinds:
                continue
            listed = list in (typing.get_origin(self._hints[field]), typing.get_origin(kinds[0]))
            if listed and not isinstance(value, (list, tuple)):
                raise InputError(field, Shown(f"{shown(value)} ({type(value).__name__})"), "a list")
            if Tensor in kinds:
                for x in value if listed else [value]:
                    checks.tensor(**{field: x})
                    if x.layout != torch.strided or x.is_nested:
                        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
                        raise InputError(field, Shown(f"a tensor of layout {kind}"), "a dense one")
            elif kinds[0] in KINDS and not listed:
                needed, words = KINDS[kinds[0]]
                if not hasattr(value, needed):
                    raise InputError(field, Shown(f"{shown(value)} ({type(value).__name__})"), words)
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise InputError(field, value, _NUMBER)

    def _answer(self, inputs: Inputs) -> Any:
        self._refuse_none(inputs)
        self._check(inputs)
        device = inputs[self._tensors[0]].device
        if device.type == "meta":
            return self._fake(inputs)
        if self._mutated:
            self._refuse_shared(inputs)
            checks.finite(**{field: inputs[i] for i, field in self._rule})
        chosen = choose(inputs.backend, device, self.implementations, inputs)  # type: ignore[attr-defined]
        if self._look is not None and device.type == "cpu" and not chosen.looks:
            self._look(inputs)
        run, inputs = chosen.run, self._dense(inputs)
        if device.type == "cuda":
            with torch.cuda.device(device), torch.autocast("cuda", enabled=False):
                return run(inputs)
        try:
            if autocast(device):
                # A product inside an operator would be narrowed by the caller's autocast, and ranks with it.
                with torch.autocast(device.type, enabled=False):
                    return run(inputs)
            return run(inputs)
        except Unfit:
            if self._look is not None:
                self._look(inputs)
            raise

    def _dense(self, inputs: Inputs) -> Inputs:
        """`inputs` with row-major tensors."""
        values = list(inputs)
        for i in self._tensors:
            if isinstance(values[i], list):
                values[i] = [x.contiguous() for x in values[i]]
            elif values[i] is not None:
                values[i] = values[i].contiguous()
        return self.inputs(*values)

    def differentiate(self, save: Callable[[Any, Inputs, Any], None], backward: Callable[..., Inputs]) -> None:
        """Registers the gradient. Of several outputs the first one is differentiable, once; the others serve its
        gradient.

        Args:
            save: (ctx, inputs, output) keeps what backward needs.
            backward: (ctx, gradient of the first output) -> `self.gradients(...)`.
        """

        self._differentiable = True

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # Or autograd would hand backward a tensor of zeros for each of the others, as large as all gradients
            # together.
            ctx.set_materialize_grads(False)
            if not isinstance(output, Tensor):
                ctx.mark_non_differentiable(*output[1:])
            save(ctx, self.inputs(*inputs), output)

        def unless_undefined(ctx: Any, *grads: Any) -> Any:
            first = grads[0][0] if isinstance(grads[0], (list, tuple)) else grads[0]
            found = self._none if first is None else self._once(ctx, functools.partial(backward, ctx, first))
            # The dispatcher leaves out what has its default at the end, and of a list torch wants as many gradients.
            asked = zip(ctx.needs_input_grad, found, strict=False)
            return tuple([None] * len(wanted) if x is None and isinstance(wanted, list) else x for wanted, x in asked)

        torch.library.register_autograd(self.name, unless_undefined, setup_context=setup)

    def _once(self, ctx: Any, backward: Callable[[], Inputs]) -> Inputs:
        """The gradients, which raise where they are differentiated in turn: without a graph of their own they would
        count as constants, and a second derivative would be wrong without a word.
        """
        if not torch.is_grad_enabled():
            return backward()
        with torch.no_grad():
            found = backward()
        # Autograd passes over what does not lead to a tensor it is asked about, and with it over the refusal.
        sources = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
        ahead, seen = [node for node, _ in ctx.next_functions], set()
        while ahead:
            node = ahead.pop()
            if node is not None and node not in seen:
                seen.add(node)
                ahead += [further for further, _ in node.next_functions]
                if hasattr(node, "variable"):
                    sources.append(node.variable)

        def stopped(x: Any) -> Any:
            if isinstance(x, list):
                return [stopped(y) for y in x]
            return _Once.apply(self.name, x, *sources) if isinstance(x, Tensor) else x

        return self.inputs(*map(stopped, found))

    def refuse_unasked(self, ctx: Any, flag: str, asked: bool, *fields: str) -> None:
        """RuntimeError where backward is to give what the call has not computed, as its argument `flag` was False."""
        missing = [] if asked else [field for field in fields if field in self.wanted(ctx)]
        if missing:
            raise RuntimeError(f"{self.name} was called with {flag}=False and has no gradient of {missing[0]}")

    def wanted(self, ctx: Any) -> set[str]:
        """The arguments whose gradients backward is to give."""
        # The dispatcher leaves out what has its default at the end.
        every = zip(self.inputs._fields, ctx.needs_input_grad, strict=False)  # type: ignore[attr-defined]
        return {field for field, needed in every if needed}

    def gradients(self, **named: Tensor | list[Tensor] | None) -> Inputs:
        """What backward returns: the named gradients, None for every other argument."""
        return self._none._replace(**named)  # type: ignore[attr-defined]


class _Once(torch.autograd.Function):
    """A gradient, as a function of `sources` that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.name} is differentiable once, and this is its second derivative")


def autocast(device: torch.device) -> bool:
    """Whether products on a device are narrowed now; torch does not know the word for every device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _holds_tensors(annotation: Any) -> bool:
    return annotation is Tensor or Tensor in typing.get_args(annotation)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one storage have bytes between their first and last in common."""
    (first, end), (other, others_end) = (
        (z.data_ptr(), z.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(z.shape, z.stride(), strict=True))) * z.itemsize)
        for z in (x, y)
    )  # fmt: skip
    return bool(x.numel() and y.numel() and first < others_end and other < end)


def _parameter(name: str, annotation: Any, defaults: dict[str, Any]) -> inspect.Parameter:
    default = defaults.get(name, inspect.Parameter.empty)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)
