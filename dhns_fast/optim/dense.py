"""Torch's optimisers as a run uses them: without their guards against the tracing of torch.compile, the first of which
imports all of torch._dynamo, 1.9 s of processor time and 144 MB in every process that trains.

Names differ from torch's: PyKEEN finds optimisers by the names of all subclasses, and takes no two of one name.
"""

from __future__ import annotations

import inspect

import torch


class Unguarded(torch.optim.Optimizer):
    """Base of an optimiser whose methods do what torch's do, and import nothing."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class LightAdam(Unguarded, torch.optim.Adam):
    """`torch.optim.Adam`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class LightAdagrad(Unguarded, torch.optim.Adagrad):
    """`torch.optim.Adagrad`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adagrad.step))
