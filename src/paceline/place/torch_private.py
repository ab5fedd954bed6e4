"""The private parts of torch that placement leans on, in one place, so that a change of torch breaks one file loudly."""

from __future__ import annotations

from collections.abc import Callable

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
