"""What is trained in a run with parameter servers, seen alike by workers and servers: names, layouts, settings of optimizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.terms.errors import AdoptError
from paceline.train.adopt import describe
from paceline.train.divided import ELEMENTWISE
from paceline.train.memory import Memory, items
from paceline.train.rows import Rows, put_rows, sparse_parameters
from paceline.train.shards import Layout, lay_out
from paceline.train.state import neutral
from paceline.train.tree import names_of


@dataclass(frozen=True, slots=True)
class Filled:
    """What was put into memory for a push.

    Attributes:
        absent: Numbers of parameters without a gradient.
        wrong: Name of the first one that is not finite, or nothing.
        sparse: For each sparse gradient the numbers of its rows.
    """

    absent: list[int]
    wrong: str
    sparse: Rows


class Kept:
    """The parameters and buffers of all adopted models.

    Args:
        models: By label.
        optimizers, schedulers: Adopted.
        servers: How many there are.
        description: See :func:`described`.

    Attributes:
        params: In the order of the layout; `number` is the inverse.
        names: Of all parameters, frozen ones too.

    Raises:
        AdoptError: PL304, an optimizer has a parameter of no adopted model; PL463, a parameter is not on the processor.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[LRScheduler],
        servers: int,
        description: str,
    ) -> None:
        self.description = description
        named = _trained(models)
        self.optimizers, self.schedulers = list(optimizers), list(schedulers)
        self.params = [p for _, p in named]
        self.number = {p: i for i, p in enumerate(self.params)}
        self.names = names_of(models)
        self._check(named)
        self.buffers = _buffers(models)
        split = all(type(o) in ELEMENTWISE for o in optimizers)
        self.layout: Layout = lay_out(items(named, sparse_parameters(models)), servers, split=split)
        self.buffer_layout: Layout = lay_out(items(self.buffers), 1, split=False)

    def _check(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        for name, p in named:
            if p.device.type != "cpu":
                raise AdoptError(
                    "PL463", f"{name} is on {p.device}, and servers keep parameters in the memory of processors"
                )
        for optimizer in self.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                for position, p in enumerate(group["params"]):
                    if p not in self.names:
                        message = f"{type(optimizer).__name__}: parameter {position} of group {number} belongs to no adopted model"
                        raise AdoptError("PL304", message)

    # ---- the worker's side ----------------------------------------------------------------------------------------
    def move_into(self, memory: Memory) -> None:
        """Let the model's parameters live in this memory, with the values that they have there."""
        with torch.no_grad():
            for p, flat in zip(self.params, memory.params, strict=True):
                p.data = flat.view(p.shape)

    def fill(self, memory: Memory, optimizer: Optimizer) -> Filled:
        """Put the gradients of an optimizer there, and the buffers."""
        absent, wrong = [], ""
        sparse: dict[int, Tensor] = {}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    number = self.number.get(p)
                    if number is None:
                        continue
                    if p.grad is None:
                        absent.append(number)
                        continue
                    flat, finite = memory.grads[number], True
                    if p.grad.is_sparse and self.layout.items[number].rows:
                        sparse[number], finite = put_rows(p.grad, flat)
                    else:
                        flat.view(p.shape).copy_(p.grad.to_dense() if p.grad.is_sparse else p.grad)
                        finite = bool(torch.isfinite(flat.sum()))
                    if not wrong and not finite:
                        wrong = self.layout.items[number].name
        self.fill_buffers(memory)
        return Filled(absent, wrong, sparse)

    def fill_buffers(self, memory: Memory) -> None:
        """Put the buffers there."""
        with torch.no_grad():
            for (_, buffer), flat in zip(self.buffers, memory.buffers, strict=True):
                flat.copy_(buffer.reshape(-1))

    def read_buffers(self, memory: Memory) -> None:
        """Take the buffers that are there."""
        with torch.no_grad():
            for (_, buffer), flat in zip(self.buffers, memory.buffers, strict=True):
                buffer.copy_(flat.view(buffer.shape))

    # ---- what travels where memory is not shared ---------------------------------------------------------------------
    def pushed(self, memory: Memory, server: int) -> list[memoryview]:
        """The bytes that a server needs of a push; none where it sees them."""
        if memory.handle:
            return []
        parts = [memory.raw_grads[a:b] for a, b in self.layout.runs(server)]
        return _views([*parts, *([memory.raw_buffers] if server == 0 else [])])

    def answered(self, memory: Memory, server: int) -> list[memoryview]:
        """The bytes that a server answers with."""
        parts = [memory.raw_params[a:b] for a, b in self.layout.runs(server)]
        return _views([*parts, *([memory.raw_buffers] if server == 0 else [])])

    def place_for(self, memory: Memory, server: int) -> Callable[[int, Any, Sequence[int]], list[memoryview]] | None:
        """Where the answer of a server goes, for ``Connection.recv``; None where it comes by itself."""
        if memory.handle:
            return None
        return lambda kind, meta, lengths: self.answered(memory, server)


def described(
    models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], servers: int
) -> str:
    """A text that is the same for processes that hold the same, when their scripts have adopted it and nothing was trained."""
    told = [*describe(models, optimizers), *(type(s).__qualname__ for s in schedulers), f"{servers} servers"]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _views(tensors: Sequence[Tensor]) -> list[memoryview]:
    arrays: list[Any] = [t.numpy() for t in tensors if t.numel()]
    return [memoryview(array) for array in arrays]


def _trained(models: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Parameters that get gradients, each once."""
    found: dict[nn.Parameter, str] = {}
    for label, model in models.items():
        for name, p in model.named_parameters():
            if p.requires_grad:
                found.setdefault(p, f"{label}.{neutral(name)}")
    return [(name, p) for p, name in found.items()]


def _buffers(models: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    found: dict[int, tuple[str, Tensor]] = {}
    for label, model in models.items():
        for name, buffer in model.named_buffers():
            found.setdefault(id(buffer), (f"{label}.{neutral(name)}", buffer))
    return list(found.values())


# ---- settings of optimizers -------------------------------------------------------------------------------------------
def hypers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group, as JSON: learning rate, momentum and so on."""
    return [{k: v for k, v in map(_plain, group.items()) if k} for group in optimizer.param_groups]


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    key, value = item
    if key == "params":
        return "", None
    if isinstance(value, Tensor) and value.numel() == 1:
        return key, float(value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, (int, float)) for v in value):
        return key, list(value)
    return (key, value) if isinstance(value, (bool, int, float, str)) else ("", None)


def set_hypers(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give each group these settings; a setting keeps its type."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key, value in values.items():
            now = group.get(key)
            if isinstance(now, Tensor):
                now.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(now, tuple) else value
