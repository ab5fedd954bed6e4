"""The private parts of torch that placement leans on, in one place, so that a change of torch breaks one file loudly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running now has ended. Only valid inside a gradient hook.

    An exception of the callback leaves ``loss.backward()``. DDP and FSDP of torch use the same queue.
    """
    Variable._execution_engine.queue_callback(callback)


def step_without_hooks(optimizer: Optimizer) -> None:
    """``optimizer.step()`` on what its groups hold now, without the hooks of the user's own call around it.

    torch wraps the method of each class with what runs the hooks; ``__wrapped__`` is the method itself.
    """
    type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]


def become(p: Tensor, other: Tensor) -> None:
    """Let the object `p` be what `other` is, for everybody who refers to it; `other` is what `p` was.

    As ``torch.utils.swap_tensors``, but weak references may exist, as ``nn.LSTM`` keeps them. Raises RuntimeError where a graph
    has saved the tensor itself.
    """
    count: int = p._use_count()  # type: ignore[attr-defined]
    if count > 2:  # the object, and perhaps the node that accumulates its gradient
        raise RuntimeError(f"{count - 1} places of a graph refer to it")
    p.__class__, other.__class__ = other.__class__, p.__class__
    p.__dict__, other.__dict__ = other.__dict__, p.__dict__
    torch._C._swap_tensor_impl(p, other)
