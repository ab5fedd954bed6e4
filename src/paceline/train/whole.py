"""The state of a job whose replicas are split, put together: original names, full tensors.

Every rank of a replica takes part, in the same order; what was put together is kept on rank 0 only, one tensor after the other, so
that no other rank ever holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from paceline.terms.errors import AdoptError
from paceline.train.placing import Placed
from paceline.train.state import named_state
from paceline.train.tree import Tree


def gather(tree: Tree, placed: Sequence[Placed], keep: bool) -> Tree:
    """`tree` without pieces.

    Args:
        tree: Of this rank, as ``tree.capture`` gives it.
        keep: This rank is to have the result; the others get empty tensors in its place.
    """
    whole: Tree = _each(tree, keep)
    return whole


def _each(value: Any, keep: bool) -> Any:
    if isinstance(value, DTensor):
        full: Tensor = value.full_tensor().detach()
        return full if keep else full.new_empty(0)
    if isinstance(value, Mapping):
        return {key: _each(each, keep) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(each, keep) for each in value)
    return value


def named(models: Mapping[str, nn.Module], placed: Sequence[Placed], keep: bool) -> dict[str, Tensor]:
    """Parameters and persistent buffers of all models, whole, by neutral name; nothing where they are not kept."""
    with torch.no_grad():
        state: dict[str, Tensor] = _each(named_state(models), keep)
    return state if keep else {}


# ---- what the script asks for ---------------------------------------------------------------------------------------
class States:
    """``state_dict`` and ``load_state_dict`` of models and optimizers that are split: whole tensors, as if they were not.

    Putting parts together takes all ranks of a replica, so all of them make these calls, at the same place of the script.
    """

    def __init__(self) -> None:
        self._parts = False

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Inside, states are given as they are held."""
        self._parts = True
        try:
            yield
        finally:
            self._parts = False

    def of_model(self, model: nn.Module) -> None:
        """Give whole states of this model."""
        after: Any = partial(self._after_model)  # torch marks it, which a method does not allow
        hooked: Any = model
        hooked.register_state_dict_post_hook(after)
        hooked.register_load_state_dict_pre_hook(partial(self._before_load))

    def of_optimizer(self, optimizer: Optimizer) -> None:
        """Give whole states of this optimizer."""
        optimizer.register_state_dict_post_hook(self._after_optimizer)
        optimizer.register_load_state_dict_pre_hook(self._before_load_optimizer)

    def _after_model(self, module: nn.Module, state: dict[str, Any], prefix: str, about: dict[str, Any]) -> None:
        if not self._parts:
            for key in list(state):
                state[key] = _each(state[key], True)

    def _after_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        if self._parts:
            return None
        whole: dict[str, Any] = _each(state, True)
        return whole

    def _before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            given = state.get(prefix + name)
            if isinstance(p, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
                state[prefix + name] = cut_like(p, given, name)

    def _before_load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        cut = dict(state["state"])
        for number, p in zip(numbers, params, strict=False):
            if isinstance(p, DTensor) and number in cut:
                kept = cut[number].items()
                cut[number] = {key: cut_like(p, v, key) if _like(p, v) else v for key, v in kept}
        return {**state, "state": cut}


def _like(p: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim() > 0 and value.shape == p.shape


def cut_like(p: DTensor, whole: Tensor, name: str) -> DTensor:
    """`whole` in pieces, as `p` is. Raises AdoptError PL610 where it has another shape."""
    if whole.shape != p.shape:
        raise AdoptError("PL610", f"{name!r} has the shape {tuple(whole.shape)}, and {tuple(p.shape)} is held")
    return distribute_tensor(whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)
