"""Registration of the operators of `torch.ops.dhns_fast`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A functional operator from a typed function: its schema is read off the annotations, and it serves every device.

    What `torch.library.custom_op` makes, but for one thing: that imports torch._dynamo on an operator's first call, which takes longer than
    torch itself and only tracing needs. Here the tracer is asked to stay out of the function where it has been imported already.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"dhns_fast::{name}"
        functools.update_wrapper(self, function)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            return (opaque() if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

        @functools.cache
        def opaque() -> Callable[..., Any]:
            return torch.compiler.disable(function)

        torch.library.define(self.name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(self.name, "default", kernel)
        self._overload = getattr(torch.ops.dhns_fast, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._overload(*args, **kwargs)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that makes outputs of the right shape and type without computing."""
        return torch.library.register_fake(self.name)(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradient, and what to keep for it. Of several outputs the first one is differentiable; the others serve its gradient."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # Or autograd would hand backward a tensor of zeros for each of the others, as large as all gradients together.
            ctx.set_materialize_grads(False)
            if not isinstance(output, torch.Tensor):
                ctx.mark_non_differentiable(*output[1:])
            ctx.number_of_inputs = len(inputs)
            setup_context(ctx, inputs, output)

        def unless_undefined(ctx: Any, *grads: Any) -> Any:
            first = grads[0][0] if isinstance(grads[0], (list, tuple)) else grads[0]
            return (None,) * ctx.number_of_inputs if first is None else backward(ctx, *grads)

        torch.library.register_autograd(self.name, unless_undefined, setup_context=setup)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Registers the decorated function as `torch.ops.dhns_fast.name`."""
    return functools.partial(Operator, name)
