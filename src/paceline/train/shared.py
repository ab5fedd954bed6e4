"""One copy of parameters and optimizer state per host: ``ddp(params=shared)``.

Parameters lie once in memory that all ranks of the host have mapped. The elements of all parameters of an optimizer, put in one
row, are divided evenly; each rank lets *the user's own optimizer* step on its stretch of them, in place. That is the same as the
whole step exactly when the optimizer works element by element, so only such optimizers are taken (PL205).

In a step: wait until nobody reads parameters any more → swap the optimizer's parameters and state for this rank's pieces →
the optimizer steps → swap back → wait until all have stepped. Between steps ``optimizer.state`` holds whole tensors, so
``optimizer.state_dict()`` works on any rank and is no collective.

The price: a script that changes parameters itself (weight clipping by hand, noise) changes them once per rank.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import UsageError

ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
)
_ALIGN = 16


@dataclass(eq=False)
class Piece:
    """This rank's stretch of one parameter: elements ``start .. stop`` in memory order."""

    owner: nn.Parameter
    start: int
    stop: int
    slice: nn.Parameter

    @property
    def leads(self) -> bool:
        """The piece that speaks for the parameter's scalars: exactly one of all ranks' pieces begins at 0."""
        return self.start == 0


class SharedParameters:
    """Moves an optimizer's parameters into shared memory and divides its step.

    Args:
        optimizer: The user's.
        wire: Must offer ``allocate_shared``.
        activity: Where waiting is shown.

    Raises:
        UsageError: PL205, the optimizer does not work element by element.
        WireError: PL206, the wire has no shared memory; PL405, there is not enough.
    """

    def __init__(self, optimizer: Optimizer, wire: Wire, activity: Activity) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise UsageError("PL205", f"{type(optimizer).__qualname__} may not work element by element")
        self._optimizer, self._wire, self._activity = optimizer, wire, activity
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._number = {p: i for i, p in enumerate(self._params)}
        for p in self._params:
            p.data = self._into_shared(p.data)
        self._pieces = {piece.owner: piece for piece in self._cut()}
        self._piece_state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._whole: Any = optimizer.state
        self._groups: list[list[nn.Parameter]] = []
        self._asked: set[int] = set()
        if optimizer.state:
            self._import()
        wire.barrier("shared parameters")

    # ---- memory ---------------------------------------------------------------------------------------------------
    def _into_shared(self, tensor: Tensor) -> Tensor:
        """A shared copy of `tensor`, in its own memory layout where that is dense."""
        region = self._wire.allocate_shared(max(1, tensor.numel()), tensor.dtype)
        dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        strides = tensor.stride() if dense else torch.empty_like(tensor, memory_format=torch.contiguous_format).stride()
        return region.tensor.as_strided(tensor.shape, strides, region.tensor.storage_offset()).copy_(tensor)

    def _cut(self) -> Iterator[Piece]:
        """This rank's stretch of the row of all parameters, parameter by parameter."""
        total = sum(p.numel() for p in self._params)
        begin, end = (self._mark(total, self._wire.rank + i) for i in (0, 1))
        at = 0
        for p in self._params:
            start, stop = max(begin - at, 0), min(end - at, p.numel())
            if start < stop:
                yield Piece(p, start, stop, nn.Parameter(_flat(p.data, start, stop), requires_grad=True))
            at += p.numel()

    def _mark(self, total: int, part: int) -> int:
        return total if part == self._wire.size else total * part // self._wire.size // _ALIGN * _ALIGN

    # ---- the step -------------------------------------------------------------------------------------------------
    def before_step(self) -> None:
        """Swap in this rank's pieces."""
        optimizer = self._optimizer
        if optimizer.state is not self._whole:  # load_state_dict has put another one there
            self._import()
        self._wait("step begins")
        self._groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [s for p in group["params"] if (s := self._with_gradient(p)) is not None]
        optimizer.state = self._piece_state

    def _with_gradient(self, p: nn.Parameter) -> nn.Parameter | None:
        piece = self._pieces.get(p)
        if piece is None or p.grad is None:
            return None
        grad = p.grad if p.grad.stride() == p.stride() else p.grad.clone(memory_format=torch.preserve_format)
        piece.slice.grad = _flat(grad, piece.start, piece.stop)
        return piece.slice

    def after_step(self) -> None:
        """Swap the whole parameters and state back in; wait for the others."""
        optimizer = self._optimizer
        for group, params in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = params
        optimizer.state = self._whole
        for piece in self._pieces.values():
            piece.slice.grad = None
        self._publish_new_state()
        self._wait("step ends")

    def _wait(self, moment: str) -> None:
        with self._activity.during(Phase.WAIT, f"shared parameters, {moment}"):
            self._wire.barrier(moment)

    # ---- state ----------------------------------------------------------------------------------------------------
    def _publish_new_state(self) -> None:
        """State that appeared in this step moves to shared memory; after the first steps there is none."""
        new = [i for p, i in self._number.items() if p.grad is not None and i not in self._asked]
        if not new:
            return
        self._asked.update(new)
        mine = json.dumps([kind for i in new for kind in self._kinds(i)]).encode()
        said = [json.loads(raw) for raw in self._wire.gather_bytes("optimizer state", mine)]
        union = {(number, key): (dtype, scalar) for rank in said for number, key, dtype, scalar in rank}
        for (number, key), (dtype, scalar) in sorted(union.items()):
            self._share(self._params[number], key, getattr(torch, dtype), scalar)

    def _kinds(self, number: int) -> Iterator[tuple[int, str, str, bool]]:
        """What this rank's piece of one parameter keeps: name, type, whether it is one number."""
        piece = self._pieces.get(self._params[number])
        for key, value in self._piece_state.get(piece.slice, {}).items() if piece is not None else ():
            if isinstance(value, Tensor):
                yield number, key, str(value.dtype).removeprefix("torch."), value.dim() == 0

    def _share(self, p: nn.Parameter, key: str, dtype: torch.dtype, scalar: bool) -> None:
        """One tensor of state in shared memory, which is zero at first; each rank puts its stretch there."""
        region = self._wire.allocate_shared(1 if scalar else p.numel(), dtype)
        shape, strides = ((), ()) if scalar else (p.shape, p.stride())
        whole = self._whole[p][key] = region.tensor.as_strided(shape, strides, region.tensor.storage_offset())
        piece = self._pieces.get(p)
        if piece is None or (scalar and not piece.leads):
            return
        part = whole if scalar else _flat(whole, piece.start, piece.stop)
        state = self._piece_state[piece.slice]
        state[key] = part.copy_(state[key])

    def _import(self) -> None:
        """Take over whole state that the optimizer holds: made with it, or loaded since."""
        whole = self._optimizer.state
        self._piece_state.clear()
        self._asked = {i for p, i in self._number.items() if p in whole}
        self._whole = whole
        for p in self._params:
            piece = self._pieces.get(p)
            for key, value in sorted(whole.get(p, {}).items()):
                if not isinstance(value, Tensor):
                    if piece is not None:
                        self._piece_state[piece.slice][key] = value
                    continue
                shared = whole[p][key] = self._into_shared(value)
                if piece is not None:
                    alike = value.shape == p.shape
                    part = _flat(shared, piece.start, piece.stop) if alike else shared if piece.leads else value.clone()
                    self._piece_state[piece.slice][key] = part

    def close(self) -> None:
        """Nothing to give back: the memory lives as long as the parameters that lie in it."""


def _flat(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start .. stop`` of a dense tensor, in memory order, as a view."""
    return tensor.detach().as_strided((stop - start,), (1,), tensor.storage_offset() + start)
