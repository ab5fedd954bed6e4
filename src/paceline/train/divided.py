"""The optimizer's step divided between the ranks of a host, each stepping its own stretch of the parameters.

All ranks hold the same gradient, so they would all do the same work. Instead the elements of all parameters of an optimizer, put
in one row, are divided evenly; each rank lets *the user's own optimizer* step on its stretch, in place, and gets the rest from
the others through shared memory. That is bit for bit the whole step when the optimizer works element by element, so only such
optimizers are divided (PL205), and only where there is enough to divide.

Private parameters (the default): every rank has its own copy. 1. swap the optimizer's parameters and state for this rank's pieces;
2. the optimizer steps; 3. put the new pieces where the others can read them, swap back; 4. wait for all; 5. copy what they have.

Shared parameters (``ddp(params=shared)``): parameters lie once in memory that all ranks have mapped, so 3 and 5 fall away, and a
wait before 2 makes sure that nobody still reads. The price: a script that changes parameters itself (clipping weights by hand,
noise) changes them once per rank.

The stretch is stepped in *bites* that fit the second cache: an optimizer that makes many passes over memory (Adam without
``fused=True`` makes some ten) then makes them in the cache, which is much faster.

Optimizer state lies once a host in either case. Between steps ``optimizer.state`` holds whole tensors, so
``optimizer.state_dict()`` works on any rank and is no collective. Single numbers (step counts) are private; the rank that has the
first piece of a parameter tells them to the others.

**A rank may die in the middle** (private parameters only). Before a bite its state is copied aside, where the others can see it, and
a mark says which bite is under way; bite and copy are in the cache, so this costs little. Those who are left put the state of that
bite back and step what the dead has not stepped: they have its old parameters, and the same gradient.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from paceline.group.wire import Wire
from paceline.place.replicate import dense
from paceline.place.torch_private import step_without_hooks
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import PeerLost, UsageError

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
_MOST_SCALARS = 4  # single numbers of state that a parameter may have
_MOST_TENSORS = 4  # tensors of state, each as large as the parameter
_BITE = 1 << 17  # elements: with gradient and state they fit the second cache
_BITE_FUSED = 1 << 20  # one pass over memory: the bite need not fit, only the calls should be few


def worthwhile(optimizer: Optimizer, wire: Wire, elastic: bool = False) -> bool:
    """True when dividing the step of `optimizer` changes nothing but its time. `elastic`: there may be more ranks one day."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    alike = type(optimizer) in ELEMENTWISE and all(p.device.type == "cpu" and dense(p) for p in params)
    return (wire.name == "shm" or elastic) and alike and sum(p.numel() for p in params) >= WORTHWHILE


@dataclass(eq=False)
class Piece:
    """A part of a rank's stretch, all of one parameter: elements ``start .. stop`` in memory order."""

    owner: nn.Parameter
    start: int
    stop: int
    slice: nn.Parameter

    @property
    def leads(self) -> bool:
        """The piece that speaks for the parameter's single numbers: exactly one of all ranks' pieces begins at 0."""
        return self.start == 0


Bite = list[Piece]


class DividedStep:
    """Divides the step of one optimizer.

    Args:
        optimizer: The user's.
        wire: Must offer ``allocate_shared``.
        activity: Where waiting is shown.
        names: Of the ranks of this host, in order.
        part: This rank's place among them.
        shared: Parameters too lie once per host.
        on_lost: Called when a rank was lost in the step: to meet those who are left, and :meth:`rewire`. None: the run ends.

    Raises:
        UsageError: PL205, the optimizer does not work element by element.
        WireError: PL206, the wire has no shared memory; PL405, there is not enough.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        wire: Wire,
        activity: Activity,
        *,
        names: Sequence[str],
        part: int,
        shared: bool,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise UsageError("PL205", f"{type(optimizer).__qualname__} may not work element by element")
        self._optimizer, self._wire, self._activity = optimizer, wire, activity
        self._names, self._part, self._shared, self._on_lost = tuple(names), part, shared, on_lost
        self._whole: Any = optimizer.state
        self._groups: list[list[nn.Parameter]] = []
        self._piece_state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._in_step = self._moved = False
        self._begin()

    def _begin(self) -> None:
        """Divide the parameters that the optimizer has now."""
        self._sequence, self._dividing = 0, self._names
        self._parts = len(self._names)
        self._params = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._number = {p: i for i, p in enumerate(self._params)}
        self._common = {p: self._into_shared(p.data) for p in self._params}
        if self._shared:
            for p in self._params:
                p.data = self._common[p]
        self._cuts = [list(_packed(self._cut(part), _bite_of(self._optimizer))) for part in range(self._parts)]
        self._bites = self._cuts[self._part]
        self._pieces: dict[nn.Parameter, list[Piece]] = {p: [] for p in self._params}
        for bite in self._bites:
            self._own(bite)
        self._scalars = Scalars(self._wire, len(self._params))
        if self._on_lost is not None:
            self._undo = Undo(self._wire, self._cuts)
        self._import()
        self._wire.barrier("divided step")

    def _own(self, bite: Bite) -> None:
        for piece in bite:
            piece.slice.data = _flat(piece.owner.data, piece.start, piece.stop)
            self._pieces[piece.owner].append(piece)

    # ---- memory ---------------------------------------------------------------------------------------------------
    def _into_shared(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in shared memory, in its own memory layout where that is dense."""
        region = self._wire.allocate_shared(max(1, tensor.numel()), tensor.dtype)
        strides = tensor.stride() if dense(tensor) else tensor.contiguous().stride()
        return region.tensor.as_strided(tensor.shape, strides, region.tensor.storage_offset()).copy_(tensor)

    def _cut(self, part: int) -> Iterator[Piece]:
        """The stretch of `part` of the row of all parameters, parameter by parameter, in pieces of at most a bite."""
        total = sum(p.numel() for p in self._params)
        begin, end = (self._mark(total, part + i) for i in (0, 1))
        bite = _bite_of(self._optimizer)
        at = 0
        for p in self._params:
            first, last = max(begin - at, 0), min(end - at, p.numel())
            for start in range(first, last, bite):
                yield Piece(p, start, min(start + bite, last), nn.Parameter(torch.empty(0, dtype=p.dtype)))
            at += p.numel()

    def _mark(self, total: int, part: int) -> int:
        return total if part == self._parts else total * part // self._parts // _ALIGN * _ALIGN

    # ---- the step -------------------------------------------------------------------------------------------------
    def before_step(self) -> None:
        """Step this rank's bites, all but the last, which is swapped in for the optimizer's own call."""
        optimizer = self._optimizer
        if sum(len(group["params"]) for group in optimizer.param_groups) != len(self._params):
            self._begin()
        elif optimizer.state is not self._whole or len(optimizer.state) != self._num_states:
            self._import()  # load_state_dict has put another one there, or the script has reset it
        self._follow()
        if self._shared:
            self._wait("step begins")
        self._sequence += 1
        self._groups = [group["params"] for group in optimizer.param_groups]
        optimizer.state = self._piece_state
        for number in range(len(self._bites) - 1):
            self._swap_in(self._part, number)
            step_without_hooks(optimizer)
            self._publish(self._part, number)
        self._swap_in(self._part, len(self._bites) - 1)

    def _follow(self) -> None:
        """A script may have given a parameter other memory since (``p.data = ...``): pieces follow it there."""
        for p in self._params:
            if self._shared and p.data_ptr() != self._common[p].data_ptr():
                p.data = self._common[p].copy_(p.data)
        for p, pieces in self._pieces.items():
            if pieces and _flat(p.data, pieces[0].start, pieces[0].stop).data_ptr() != pieces[0].slice.data_ptr():
                for piece in pieces:
                    piece.slice.data = _flat(p.data, piece.start, piece.stop)

    def _swap_in(self, part: int, number: int) -> None:
        """Let the optimizer have the pieces of one bite, with their gradients."""
        bite = self._cuts[part][number] if self._cuts[part] else []
        if self._on_lost is not None:
            self._undo.save(part, number, self._sequence, self._states_of(bite))
        given = {id(piece.owner) for piece in bite if piece.owner.grad is not None}
        for piece in bite:
            if (grad := piece.owner.grad) is not None:
                if grad.stride() != piece.owner.stride():
                    grad = grad.clone(memory_format=torch.preserve_format)
                piece.slice.grad = _flat(grad, piece.start, piece.stop)
        for group, params in zip(self._optimizer.param_groups, self._groups, strict=True):
            mine = {id(p) for p in params} & given
            group["params"] = [piece.slice for piece in bite if id(piece.owner) in mine]

    def _states_of(self, bite: Bite) -> list[Tensor]:
        """What the optimizer keeps for a bite in shared memory, in a fixed order; nothing before that exists."""
        found = []
        for piece in bite:
            if self._number[piece.owner] in self._asked:
                state = self._whole.get(piece.owner, {})
                found += [
                    _flat(v, piece.start, piece.stop) for _, v in sorted(state.items()) if _is_whole(v, piece.owner)
                ]
        return found

    def _publish(self, part: int, number: int) -> None:
        """A bite is stepped: the others may see it."""
        for piece in self._cuts[part][number] if self._cuts[part] else []:
            piece.slice.grad = None
            if not self._shared and piece.owner.grad is not None:
                _flat(self._common[piece.owner], piece.start, piece.stop).copy_(piece.slice.detach())
        if self._on_lost is not None:
            self._undo.done(part, number)

    def after_step(self) -> None:
        """Swap the whole parameters and state back in; get what the others have stepped."""
        self._publish(self._part, len(self._bites) - 1)
        self._swap_back()
        self._in_step = True
        while True:
            try:
                self._publish_new_state()
                self._tell_scalars()
                self._wait("step ends")
                break
            except PeerLost:
                if self._on_lost is None:
                    raise
                self._on_lost()
        self._in_step = False
        stepped = [p for p in self._params if p.grad is not None]
        self._scalars.take()
        if not self._shared:
            for p in stepped:
                self._take(p)
        if self._moved:
            self._moved = False
            self._begin()

    def _swap_back(self) -> None:
        for group, params in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = params
        self._optimizer.state = self._whole

    def _take(self, p: nn.Parameter) -> None:
        """Copy those elements of `p` that other ranks have stepped."""
        at = 0
        for piece in sorted(self._pieces[p], key=lambda piece: piece.start):
            self._copy(p, at, piece.start)
            at = piece.stop
        self._copy(p, at, p.numel())

    def _copy(self, p: nn.Parameter, start: int, stop: int) -> None:
        if start < stop:
            _flat(p.data, start, stop).copy_(_flat(self._common[p], start, stop))

    def _wait(self, moment: str) -> None:
        with self._activity.during(Phase.WAIT, f"optimizer, {moment}"):
            self._wire.barrier(moment)

    # ---- ranks that are lost ----------------------------------------------------------------------------------------
    def rewire(self, wire: Wire, names: Sequence[str], part: int) -> None:
        """The ranks have changed; shared memory is that of `wire` from now on.

        In the middle of a step the first of those who are left finishes what the others have left undone; all of them go on in
        :meth:`after_step`.
        """
        self._wire, self._names, self._part = wire, tuple(names), part
        self._moved = self._in_step
        if not self._in_step:
            self._begin()
        elif part == 0:
            for former, name in enumerate(self._dividing):
                if name not in names:
                    self._finish(former)

    def _finish(self, part: int) -> None:
        """Step those bites of `part` that are not published yet, as its rank would have done."""
        optimizer = self._optimizer
        begun, done = self._undo.progress(part, self._sequence)
        self._groups = [group["params"] for group in optimizer.param_groups]
        for number, bite in enumerate(self._cuts[part]):
            fresh = any(self._number[piece.owner] not in self._asked for piece in bite)  # its new state is lost with it
            if number < done and (not fresh or bite[0] in self._pieces[bite[0].owner]):
                continue
            if begun and number == done:
                self._undo.restore(part, self._states_of(bite))
            self._own(bite)
            for piece in bite:
                self._adopt_state(piece)
            optimizer.state = self._piece_state
            self._swap_in(part, number)
            step_without_hooks(optimizer)
            self._publish(part, number)
            self._swap_back()

    def _adopt_state(self, piece: Piece) -> None:
        for key, value in sorted(self._whole.get(piece.owner, {}).items()):
            self._piece_state[piece.slice][key] = _part(value, piece)

    # ---- state ----------------------------------------------------------------------------------------------------
    def _publish_new_state(self) -> None:
        """State that appeared in this step moves to shared memory; after the first steps there is none."""
        new = [i for p, i in self._number.items() if p.grad is not None and i not in self._asked]
        if not new:
            return
        mine = json.dumps([kind for i in new for kind in self._kinds(i)]).encode()
        said = [json.loads(raw) for raw in self._wire.gather_bytes("optimizer state", mine)]
        self._asked.update(new)
        union = {(number, key): (dtype, scalar) for rank in said for number, key, dtype, scalar in rank}
        for (number, key), (dtype, scalar) in sorted(union.items()):
            self._share(self._params[number], key, getattr(torch, dtype), scalar)
        self._num_states = len(self._whole)

    def _kinds(self, number: int) -> Iterator[tuple[int, str, str, bool]]:
        """What this rank's pieces of one parameter keep: name, type, whether it is one number."""
        for piece in self._pieces[self._params[number]][:1]:
            for key, value in self._piece_state.get(piece.slice, {}).items():
                if isinstance(value, Tensor):
                    yield number, key, str(value.dtype).removeprefix("torch."), value.dim() == 0

    def _share(self, p: nn.Parameter, key: str, dtype: torch.dtype, scalar: bool) -> None:
        """One tensor of state in shared memory, which is zero at first; each rank puts its stretch there."""
        if scalar:
            self._whole[p][key] = self._scalars.add(self._number[p], key, dtype)
            return
        region = self._wire.allocate_shared(p.numel(), dtype)
        whole = self._whole[p][key] = region.tensor.as_strided(p.shape, p.stride(), region.tensor.storage_offset())
        for piece in self._pieces[p]:
            state = self._piece_state[piece.slice]
            state[key] = _flat(whole, piece.start, piece.stop).copy_(state[key])

    def _tell_scalars(self) -> None:
        for number, key in self._scalars.known():
            for piece in self._pieces[self._params[number]]:
                if piece.leads:
                    self._scalars.tell(number, key, self._piece_state[piece.slice][key])

    def _import(self) -> None:
        """Take over the whole state that the optimizer holds: made with it, or loaded since. The same on all ranks."""
        whole = self._whole = self._optimizer.state
        self._piece_state.clear()
        self._asked = {i for p, i in self._number.items() if p in whole}
        self._num_states = len(whole)
        for p in self._params:
            for key, value in sorted(whole.get(p, {}).items()):
                if isinstance(value, Tensor) and _is_whole(value, p):
                    whole[p][key] = self._into_shared(value)
                elif isinstance(value, Tensor) and not value.dim():
                    whole[p][key] = self._scalars.add(self._number[p], key, value.dtype).copy_(value)
            for piece in self._pieces[p]:
                self._adopt_state(piece)


class Scalars:
    """The single numbers of an optimizer's state: private on every rank, told by one of them after each step.

    Args:
        wire: For a shared row of numbers.
        num_params: Of the optimizer; each has at most :data:`_MOST_SCALARS`.
    """

    def __init__(self, wire: Wire, num_params: int) -> None:
        self._row = wire.allocate_shared(max(1, num_params * _MOST_SCALARS), torch.float64).tensor
        self._mine: dict[tuple[int, str], tuple[int, Tensor]] = {}

    def add(self, number: int, key: str, dtype: torch.dtype) -> Tensor:
        """This rank's tensor for one number of parameter `number`."""
        found = self._mine.get((number, key))
        if found is None:
            at = number * _MOST_SCALARS + sum(n == number for n, _ in self._mine)
            found = self._mine[number, key] = (at, torch.zeros((), dtype=dtype))
        return found[1]

    def known(self) -> list[tuple[int, str]]:
        """Parameter and name of each."""
        return list(self._mine)

    def tell(self, number: int, key: str, value: Tensor) -> None:
        """What it is after this step."""
        self._row[self._mine[number, key][0]] = value

    def take(self) -> None:
        """What all of them are after this step."""
        for at, tensor in self._mine.values():
            tensor.copy_(self._row[at])


class Undo:
    """For each part: the bite that is under way, and its state from before.

    Args:
        wire: For shared memory.
        cuts: The bites of every part.
    """

    def __init__(self, wire: Wire, cuts: Sequence[Sequence[Bite]]) -> None:
        room = max((sum(map(_state_nbytes, bite)) for bites in cuts for bite in bites), default=0)
        self._room = -(-max(room, 64) // 64) * 64
        self._memory = wire.allocate_shared(self._room * len(cuts), torch.uint8).tensor
        self._marks = wire.allocate_shared(8 * len(cuts), torch.int64).tensor.numpy()

    def save(self, part: int, number: int, sequence: int, states: Sequence[Tensor]) -> None:
        """Bite `number` of `part` begins."""
        mark = 8 * part
        self._marks[mark + 2] = 0
        for kept, state in zip(self._kept(part, states), states, strict=True):
            kept.copy_(state)
        self._marks[mark], self._marks[mark + 1] = sequence, number
        self._marks[mark + 2] = 1

    def done(self, part: int, number: int) -> None:
        """It is published."""
        mark = 8 * part
        self._marks[mark + 2] = 0
        self._marks[mark + 1] = number + 1

    def progress(self, part: int, sequence: int) -> tuple[bool, int]:
        """Whether a bite of this step is under way, and how many are published."""
        mark = 8 * part
        if self._marks[mark] != sequence:
            return False, 0
        return bool(self._marks[mark + 2]), int(self._marks[mark + 1])

    def restore(self, part: int, states: Sequence[Tensor]) -> None:
        """Put the state of the bite under way back."""
        for kept, state in zip(self._kept(part, states), states, strict=True):
            state.copy_(kept)

    def _kept(self, part: int, states: Sequence[Tensor]) -> Iterator[Tensor]:
        at = part * self._room
        for state in states:
            nbytes = state.numel() * state.element_size()
            yield self._memory[at : at + nbytes].view(state.dtype)
            at += -(-nbytes // 64) * 64


def _state_nbytes(piece: Piece) -> int:
    """Bytes that the state of a piece may have."""
    return _MOST_TENSORS * ((piece.stop - piece.start) * piece.owner.element_size() + 64)


def _bite_of(optimizer: Optimizer) -> int:
    return _BITE_FUSED if optimizer.defaults.get("fused") else _BITE


def _packed(pieces: Iterator[Piece], size: int) -> Iterator[Bite]:
    """Small pieces that follow each other share a bite."""
    bite: Bite = []
    used = 0
    for piece in pieces:
        if bite and used + piece.stop - piece.start > size:
            yield bite
            bite, used = [], 0
        bite.append(piece)
        used += piece.stop - piece.start
    if bite:
        yield bite


def _is_whole(value: Any, p: Tensor) -> bool:
    """A tensor of state with an entry for each element of the parameter."""
    return isinstance(value, Tensor) and value.shape == p.shape and bool(value.dim() or not p.dim())


def _part(value: Any, piece: Piece) -> Any:
    """What a piece keeps of one entry of its parameter's state."""
    if not isinstance(value, Tensor):
        return value
    return _flat(value, piece.start, piece.stop) if _is_whole(value, piece.owner) else value.clone()


def _flat(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start .. stop`` of a dense tensor, in memory order, as a view."""
    return tensor.detach().as_strided((stop - start,), (1,), tensor.storage_offset() + start)
