"""What a program has set for all of torch: the default dtype, the default device, modes without gradients.

A run is decided by its options and its graph, and neither by a `torch.set_default_dtype` nor by a
`torch.set_default_device` that other parts of a program need. It learns inside `torch.no_grad()` too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, torch makes float32 tensors on the CPU unless told otherwise, and records gradients; a decorator too.

    The default dtype is one of the process: where it is another one, it is float32 for other threads meanwhile.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as held:
        if torch.is_inference_mode_enabled():
            held.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            held.enter_context(torch.enable_grad())
        # Only where it is another one: its mode looks at every call of torch.
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            held.callback(torch.set_default_dtype, dtype)
        yield
