"""The optimizer's step divided between the ranks of a host, each stepping its own stretch of the parameters.

All ranks hold the same gradient, so they would all do the same work. Instead the elements of all parameters of an optimizer, put
in one row, are divided evenly; each rank lets *the user's own optimizer* step on its stretch, in place, and gets the rest from
the others through shared memory. That is bit for bit the whole step when the optimizer works element by element, so only such
optimizers are divided (PL205), and only where there is enough to divide.

Private parameters (the default): every rank has its own copy. 1. swap the optimizer's parameters and state for this rank's pieces;
2. the optimizer steps; 3. swap back, put the new pieces where the others can read them; 4. wait for all; 5. copy what they have.

Shared parameters (``ddp(params=shared)``): parameters lie once in memory that all ranks have mapped, so 3 and 5 fall away, and a
wait before 2 makes sure that nobody still reads. The price: a script that changes parameters itself (clipping weights by hand,
noise) changes them once per rank.

Optimizer state lies once a host in either case. Between steps ``optimizer.state`` holds whole tensors, so
``optimizer.state_dict()`` works on any rank and is no collective.
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
from paceline.place.replicate import dense
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
WORTHWHILE = 1 << 20  # elements below which waiting for the others costs more than the whole step
_ALIGN = 16


def worthwhile(optimizer: Optimizer, wire: Wire) -> bool:
    """True when dividing the step of `optimizer` changes nothing but its time."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    alike = type(optimizer) in ELEMENTWISE and all(p.device.type == "cpu" and dense(p) for p in params)
    return wire.name == "shm" and alike and sum(p.numel() for p in params) >= WORTHWHILE


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


class DividedStep:
    """Divides the step of one optimizer.

    Args:
        optimizer: The user's.
        wire: Must offer ``allocate_shared``.
        activity: Where waiting is shown.
        part, parts: This rank's place among the ranks of its host.
        shared: Parameters too lie once per host.

    Raises:
        UsageError: PL205, the optimizer does not work element by element.
        WireError: PL206, the wire has no shared memory; PL405, there is not enough.
    """

    def __init__(
        self, optimizer: Optimizer, wire: Wire, activity: Activity, *, part: int, parts: int, shared: bool
    ) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise UsageError("PL205", f"{type(optimizer).__qualname__} may not work element by element")
        self._optimizer, self._wire, self._activity = optimizer, wire, activity
        self._part, self._parts, self._shared = part, parts, shared
        self._whole: Any = optimizer.state
        self._groups: list[list[nn.Parameter]] = []
        self._piece_state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._begin()

    def _begin(self) -> None:
        """Divide the parameters that the optimizer has now."""
        self._params = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._number = {p: i for i, p in enumerate(self._params)}
        self._common = {p: self._into_shared(p.data) for p in self._params}
        if self._shared:
            for p in self._params:
                p.data = self._common[p]
        self._pieces = {piece.owner: piece for piece in self._cut()}
        self._import()
        self._wire.barrier("divided step")

    # ---- memory ---------------------------------------------------------------------------------------------------
    def _into_shared(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in shared memory, in its own memory layout where that is dense."""
        region = self._wire.allocate_shared(max(1, tensor.numel()), tensor.dtype)
        strides = tensor.stride() if dense(tensor) else tensor.contiguous().stride()
        return region.tensor.as_strided(tensor.shape, strides, region.tensor.storage_offset()).copy_(tensor)

    def _cut(self) -> Iterator[Piece]:
        """This rank's stretch of the row of all parameters, parameter by parameter."""
        total = sum(p.numel() for p in self._params)
        begin, end = (self._mark(total, self._part + i) for i in (0, 1))
        at = 0
        for p in self._params:
            start, stop = max(begin - at, 0), min(end - at, p.numel())
            if start < stop:
                yield Piece(p, start, stop, nn.Parameter(_flat(p.data, start, stop), requires_grad=True))
            at += p.numel()

    def _mark(self, total: int, part: int) -> int:
        return total if part == self._parts else total * part // self._parts // _ALIGN * _ALIGN

    # ---- the step -------------------------------------------------------------------------------------------------
    def before_step(self) -> None:
        """Swap in this rank's pieces."""
        optimizer = self._optimizer
        if sum(len(group["params"]) for group in optimizer.param_groups) != len(self._params):
            self._begin()
        elif optimizer.state is not self._whole or len(optimizer.state) != self._num_states:
            self._import()  # load_state_dict has put another one there, or the script has reset it
        self._follow()
        if self._shared:
            self._wait("step begins")
        self._groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [s for p in group["params"] if (s := self._with_gradient(p)) is not None]
        optimizer.state = self._piece_state

    def _follow(self) -> None:
        """A script may have given a parameter other memory since (``p.data = ...``): pieces follow it there."""
        for p in self._params:
            if self._shared and p.data_ptr() != self._common[p].data_ptr():
                p.data = self._common[p].copy_(p.data)
        for p, piece in self._pieces.items():
            here = _flat(p.data, piece.start, piece.stop)
            if here.data_ptr() != piece.slice.data_ptr():
                piece.slice.data = here

    def _with_gradient(self, p: nn.Parameter) -> nn.Parameter | None:
        piece = self._pieces.get(p)
        if piece is None or p.grad is None:
            return None
        grad = p.grad if p.grad.stride() == p.stride() else p.grad.clone(memory_format=torch.preserve_format)
        piece.slice.grad = _flat(grad, piece.start, piece.stop)
        return piece.slice

    def after_step(self) -> None:
        """Swap the whole parameters and state back in; get what the others have stepped."""
        optimizer = self._optimizer
        for group, params in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = params
        optimizer.state = self._whole
        stepped = [p for p in self._params if p.grad is not None]
        for p in stepped:
            if (piece := self._pieces.get(p)) is not None:
                piece.slice.grad = None
                if not self._shared:
                    _flat(self._common[p], piece.start, piece.stop).copy_(piece.slice.detach())
        self._publish_new_state()
        self._wait("step ends")
        if not self._shared:
            for p in stepped:
                self._take(p)

    def _take(self, p: nn.Parameter) -> None:
        """Copy those elements of `p` that other ranks have stepped."""
        piece, n = self._pieces.get(p), p.numel()
        for start, stop in ((0, piece.start), (piece.stop, n)) if piece is not None else ((0, n),):
            if start < stop:
                _flat(p.data, start, stop).copy_(_flat(self._common[p], start, stop))

    def _wait(self, moment: str) -> None:
        with self._activity.during(Phase.WAIT, f"optimizer, {moment}"):
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
        self._num_states = len(self._whole)

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
        """Take over the whole state that the optimizer holds: made with it, or loaded since. The same on all ranks."""
        whole = self._whole = self._optimizer.state
        self._piece_state.clear()
        self._asked = {i for p, i in self._number.items() if p in whole}
        self._num_states = len(whole)
        for p in self._params:
            for key, value in sorted(whole.get(p, {}).items()):
                if isinstance(value, Tensor):
                    value = whole[p][key] = self._into_shared(value)
                if (piece := self._pieces.get(p)) is not None:
                    self._piece_state[piece.slice][key] = _part(value, piece)


def _part(value: Any, piece: Piece) -> Any:
    """What a piece keeps of one entry of its parameter's state."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == piece.owner.shape and value.dim():
        return _flat(value, piece.start, piece.stop)
    return value if piece.leads else value.clone()


def _flat(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start .. stop`` of a dense tensor, in memory order, as a view."""
    return tensor.detach().as_strided((stop - start,), (1,), tensor.storage_offset() + start)
