"""The private parts of torch's ``fully_shard`` that :mod:`paceline.place.shard` leans on, in one place. Written for torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._common_utils import collect_grad_tensors, replace_grad_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from paceline.place.torch_private import after_backward


def gathered(module: nn.Module) -> Iterator[Any]:
    """What ``fully_shard`` keeps for each parameter of a unit that is gathered now."""
    for group in groups(module):
        if group.is_unsharded:
            yield from group.fsdp_params


def groups(module: nn.Module) -> list[Any]:
    """The groups of parameters of a unit: one, or none where it has no parameters of its own."""
    assert isinstance(module, FSDPModule)
    return list(module._get_fsdp_state()._fsdp_param_groups)


def show_whole(module: nn.Module) -> None:
    """Where a unit is gathered, its modules hold the whole parameters."""
    for each in gathered(module):
        each._setattr_on_modules(each._unsharded_param)


def show_shards(module: nn.Module) -> None:
    """The modules of a unit hold the shards, and what is gathered stays in memory."""
    for each in gathered(module):
        each._setattr_on_modules(each.sharded_param)


def parts(module: nn.Module) -> list[nn.Parameter]:
    """This rank's part of each parameter of a unit."""
    return [p.sharded_param for group in groups(module) for p in group.fsdp_params]


def leaves(module: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """For each parameter of a unit that was gathered once: its shard, and the leaf of autograd's graphs."""
    return [(p.sharded_param, p._unsharded_param) for group in groups(module) for p in group.fsdp_params]


def initialise(root: nn.Module) -> None:
    """Say which module is the root. Torch would take whichever is called first, and refuse the true one later."""
    assert isinstance(root, FSDPModule)
    root._get_fsdp_state()._lazy_init()


def broken(root: nn.Module) -> bool:
    """Whether a forward of this model has begun and not ended, seen from outside of it: it has failed."""
    assert isinstance(root, FSDPModule)
    return root._get_fsdp_state()._state_ctx.iter_forward_root is not None


def own_views(output: Any) -> Any:
    """The same output, with copies in the place of views.

    An operation in place on a view takes its hooks away, and with them the gathering in backward.
    """
    tensors = collect_grad_tensors(output)
    if not any(t._base is not None for t in tensors):
        return output
    return replace_grad_tensors(output, iter([t.clone() if t._base is not None else t for t in tensors]))


def grad_tensors(output: Any) -> Sequence[Tensor]:
    """Tensors in an output, whatever holds them, that gradients flow through."""
    found: Sequence[Tensor] = collect_grad_tensors(output)
    return found


def graph() -> int:
    """Number of the backward pass that runs in this thread now, or -1."""
    return torch._C._current_graph_task_id()


def after_sharded_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward that is running now has ended, after all that sharded models do at its end.

    ``fully_shard`` reduces at the end what was not reduced before, in a callback of the engine that is queued during backward, and
    :class:`paceline.place.shard.Sharded` closes the backward in one that is queued by such a callback. The engine runs callbacks in
    the order in which they were queued, those queued by callbacks too: so one that is queued four deep runs after them. Only valid
    inside a backward.
    """
    _later(callback, 3)


def closing(callback: Callable[[], None]) -> None:
    """Call `callback` when this backward has ended and ``fully_shard`` has reduced everything."""
    _later(callback, 1)


def _later(callback: Callable[[], None], depth: int) -> None:
    after_backward(callback if depth == 0 else lambda: _later(callback, depth - 1))


def aliased(tensor: Tensor) -> bool:
    """Whether another tensor uses the same memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2  # the tensor, and what is asked here


def local(tensor: DTensor) -> Tensor:
    """The memory that this rank holds of a tensor, without a step in autograd's graph."""
    return tensor._local_tensor


def first_after_step(optimizer: Optimizer, handle: RemovableHandle) -> None:
    """Let this hook after the step run before the others."""
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)


def last_before_step(optimizer: Optimizer, handle: RemovableHandle, *, move: bool) -> bool:
    """Whether this hook before the step runs after the others; with `move` it does from now on. Not while hooks run."""
    hooks: Any = optimizer._optimizer_step_pre_hooks
    if move:
        hooks.move_to_end(handle.id)
    return bool(next(reversed(hooks)) == handle.id)


__all__ = [
    "after_sharded_backward",
    "aliased",
    "broken",
    "closing",
    "first_after_step",
    "gathered",
    "grad_tensors",
    "graph",
    "groups",
    "initialise",
    "last_before_step",
    "leaves",
    "local",
    "own_views",
    "parts",
    "show_shards",
    "show_whole",
]
