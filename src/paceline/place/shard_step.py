"""The step of an optimizer on split parameters: where it is element by element, it works on the plain memory of this rank.

An optimizer that treats every element for itself computes on a part what it computes on the whole. So inside its step the groups hold
plain parameters that share the memory of the shards, and each operation costs what it costs in one process; with DTensors AdamW
spends about 0.16 ms more on each parameter. Before and after the step everything is a DTensor: what the script clips, hooks or saves
sees whole parameters, norms over all ranks and state that knows its shape.

Other optimizers step on DTensors, which compute across ranks what needs to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from paceline.place.shard_torch import first_after_step, last_before_step, local
from paceline.terms.errors import AdoptError

ELEMENTWISE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
"""Exactly these classes: a subclass may do anything."""


def check(optimizer: Optimizer) -> None:
    """Raise AdoptError PL555 for an optimizer of torch that needs whole parameters (Adafactor, Muon).

    The step of any other class runs on DTensors, which compute across ranks what needs to be, or say that they cannot.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") and kind not in ELEMENTWISE:
        raise AdoptError("PL555", f"{kind.__name__} does not work on parameters that are split over ranks")


class LocalStep:
    """Swaps the split parameters of an optimizer for plain ones while it steps.

    Args:
        optimizer: The script's; holds DTensors, of this model or of others.
        params: The split parameters of this model.
        after: Called after each step.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[nn.Parameter], after: Callable[[], None]) -> None:
        self.optimizer, self._after = optimizer, after
        self._mine = set(params)
        self._plain: dict[nn.Parameter, nn.Parameter] = {}
        self._wrapped: dict[nn.Parameter, dict[str, DTensor]] = {}
        self._groups: list[list[nn.Parameter]] | None = None
        self._elementwise = type(optimizer) in ELEMENTWISE
        self._before = optimizer.register_step_pre_hook(self._before_step)
        self._behind = optimizer.register_step_post_hook(self._after_step)
        first_after_step(optimizer, self._behind)

    def be_last(self) -> None:
        """Hooks that the script has registered since must see whole parameters: they run before the swap."""
        if not last_before_step(self.optimizer, self._before, move=False):
            last_before_step(self.optimizer, self._before, move=True)

    def remove(self) -> None:
        """Take the hooks away."""
        self._before.remove()
        self._behind.remove()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside the block the optimizer holds plain memory, if it is one that works element by element."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._leave()  # a step before has failed
        closure = len(args) > 1 or kwargs.get("closure") is not None  # computes gradients inside the step
        if not closure and last_before_step(self.optimizer, self._before, move=False):
            self._enter()

    def _after_step(self, *_: Any) -> None:
        self._leave()
        self._after()

    def _enter(self) -> None:
        if not self._elementwise or self._groups is not None:
            return
        self._groups = [group["params"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["params"] = [self._as_plain(p) if p in self._mine else p for p in group["params"]]

    def _as_plain(self, p: nn.Parameter) -> nn.Parameter:
        assert isinstance(p, DTensor)
        memory, plain = local(p), self._plain.get(p)
        if plain is None or plain.data_ptr() != memory.data_ptr() or plain.shape != memory.shape:
            plain = self._plain[p] = nn.Parameter(memory.detach(), requires_grad=p.requires_grad)
        grad = p.grad
        assert grad is None or isinstance(grad, DTensor)
        plain.grad = None if grad is None else local(grad)
        state = self.optimizer.state.pop(p, None)
        if state is not None:
            self._wrapped[p] = {key: value for key, value in state.items() if isinstance(value, DTensor)}
            self.optimizer.state[plain] = {k: local(v) if isinstance(v, DTensor) else v for k, v in state.items()}
        return plain

    def _leave(self) -> None:
        if self._groups is None:
            return
        for group, params in zip(self.optimizer.param_groups, self._groups, strict=False):
            group["params"] = params
        self._groups = None
        for p, plain in self._plain.items():
            plain.grad = None
            if (state := self.optimizer.state.pop(plain, None)) is not None:
                self.optimizer.state[p] = {key: self._as_split(p, key, value) for key, value in state.items()}
        self._wrapped.clear()

    def _as_split(self, p: nn.Parameter, key: str, value: Any) -> Any:
        assert isinstance(p, DTensor)
        if not isinstance(value, Tensor) or not value.dim() or value.shape != local(p).shape:
            return value
        known = self._wrapped.get(p, {}).get(key)
        return known if known is not None and local(known) is value else split_like(p, value)


def split_like(p: DTensor, memory: Tensor) -> DTensor:
    """This rank's part of a tensor that is split as `p` is."""
    with torch.no_grad():
        made: DTensor = DTensor.from_local(
            memory, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    return made
