"""What one server keeps: its stretch of the parameters, the optimizer's state for it, and what is done to them.

The optimizer is the user's own object, made by the same script: its groups are given this server's pieces instead of the whole
parameters. Everything is done in the order in which the lead says so, which makes all servers pass through the same versions.

DC-ASGD (Zheng et al., ICML 2017, arXiv 1609.08326): a gradient g that was computed at w_read and is applied at w becomes
``g + lambda * g * g * (w - w_read)``; what was read lies still in the worker's memory. Its norm is kept at most that of g.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paceline.exchange.outer_step import DelayedNesterov, Elastic, Pairwise
from paceline.exchange.server_numbered import Numbered
from paceline.exchange.service import Service
from paceline.train.keeping import Kept, hypers, set_hypers
from paceline.train.memory import Memory, views
from paceline.train.rows import Touched, dense_rows, sparse_sum
from paceline.train.served_state import PieceState, cut_state, pieces_of

MARKED = 256
"""Updates from one comparison of two copies to the next."""

_OCCASIONS = 256  # of a schedule that are remembered
_SQUARE = "delay_square"
_EPSILON = 1e-7  # of the paper


@dataclass(eq=False)
class Guest:
    """A worker, as a server sees it.

    Attributes:
        memory: Its memory, or what has come of it.
        handle: What it calls that.
        id: Told by the worker: who has the same name and another id is another one.
        line: What is said between it and this server.
        read: The parameters that it computes with, where the correction of delays needs them kept here.
        pushes: Messages of pushes that were not dealt with, by sequence number.
        told: The settings of optimizers that it knows, see ``Shard.stamp``.
        seen: Version of the rows that it was given last.
        gone: Its connection has ended.
    """

    name: str
    memory: Memory
    handle: str = ""
    id: str = ""
    line: Numbered[Any] = field(default_factory=Numbered)
    read: Tensor | None = None
    pushes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    told: int = 0
    seen: int = -1
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One push in an update: whose, how much it counts, and the gradients, one flat tensor an item."""

    name: str
    message: Mapping[str, Any]
    scale: float
    grads: Sequence[Tensor]
    read: Sequence[Tensor]
    buffers: Sequence[Tensor]


@dataclass(eq=False)
class _Piece:
    """Elements of one parameter that this server keeps, as the optimizer sees them."""

    item: int
    start: int
    stop: int
    param: nn.Parameter
    square: Tensor | None = None  # running mean of g*g, for the adaptive correction

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.param.shape)


class Shard:
    """This server's part of the job.

    Args:
        kept: What all have.
        index: Which server this is.
        service: What the strategy asks of servers.
        workers: How many the run begins with.

    Attributes:
        version: Updates applied so far.
        stamp: Counts changes of the settings of optimizers.
        scheduled: For each schedule the occasions at which it has stepped.
        groups: For each optimizer and group the names of its parameters.
    """

    def __init__(self, kept: Kept, index: int, service: Service, workers: int) -> None:
        self.kept, self.index, self.version, self.stamp = kept, index, 0, 0
        self._service, self._delay, self._workers = service, service.delay, workers
        self.memory = Memory(kept.layout, kept.buffer_layout, shared=service.one_copy)
        with torch.no_grad():
            for p, flat in zip(kept.params, self.memory.params, strict=True):
                flat.view(p.shape).copy_(p)
        kept.move_into(self.memory)
        kept.fill_buffers(self.memory)
        self._touched = Touched(
            {s.item: kept.layout.items[s.item].rows for s in kept.layout.of(index) if kept.layout.items[s.item].rows}
        )
        self._runs = kept.layout.runs(index, without=self._touched.versions)
        self._apart: dict[str, list[Tensor]] = {}
        self._mean_at = -1  # version of the mean that the memory holds
        self._aside: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.scheduled: dict[str, list[str]] = {}
        self.groups = [
            [[kept.names[p] for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in kept.optimizers
        ]
        self._pieces = [self._own(optimizer) for optimizer in kept.optimizers]
        self.mark = [0, 0]

    def _own(self, optimizer: torch.optim.Optimizer) -> list[_Piece]:
        """Give the optimizer this server's pieces. Whole parameters stay the objects that they are."""
        mine: dict[int, list[tuple[int, int]]] = {}
        for stretch in self.kept.layout.of(self.index):
            mine.setdefault(stretch.item, []).append((stretch.start, stretch.stop))
        found = []
        for group in optimizer.param_groups:
            pieces = []
            for p in group["params"]:
                item = self.kept.number.get(p)
                for start, stop in mine.get(item, []) if item is not None else []:
                    whole = stop - start == p.numel()
                    part = p if whole else nn.Parameter(p.data.view(-1)[start:stop])
                    if p in optimizer.state and not whole:  # of a checkpoint
                        optimizer.state[part] = cut_state(optimizer.state[p], start, stop, p.numel())
                    pieces.append(_Piece(item if item is not None else -1, start, stop, part))
                    pieces[-1].square = _taken(optimizer.state, part)
            group["params"] = [piece.param for piece in pieces]
            found += pieces
        mine_now = {piece.param for piece in found}
        for p in [p for p in optimizer.state if p not in mine_now]:
            del optimizer.state[p]
        return found

    def pieces(self) -> list[PieceState]:
        """The state of all optimizers for what this server keeps, as references."""
        self._gather_mean()
        return [
            state
            for number, optimizer in enumerate(self.kept.optimizers)
            for state in pieces_of(
                number, optimizer, [(p.item, p.start, p.stop, p.param, _own(p)) for p in self._pieces[number]]
            )
        ]

    def read_buffers(self) -> None:
        """Put the buffers where the models have them."""
        self.kept.read_buffers(self.memory)

    def told(self) -> list[memoryview]:
        """The bytes of this server's parameters, for the lead."""
        self._gather_mean()
        return self.kept.answered(self.memory, self.index)

    # ---- what is done, in order -------------------------------------------------------------------------------------
    def keep(self, guest: Guest, seq: int) -> None:
        """Copy a push aside: its memory will be written to."""
        self._aside[guest.name, seq] = guest.memory.raw_grads.clone(), guest.memory.raw_buffers.clone()

    def part(self, guest: Guest, seq: int, message: Mapping[str, Any], scale: float) -> Part:
        """A push that is to be applied, from where it lies."""
        aside = self._aside.pop((guest.name, seq), None)
        if aside is not None:
            grads, buffers = views(aside[0], self.kept.layout), views(aside[1], self.kept.buffer_layout)
            return Part(guest.name, message, scale, grads, (), buffers)
        read = guest.memory.params if guest.read is None else guest.memory.like_params(guest.read)
        return Part(guest.name, message, scale, guest.memory.grads, read, guest.memory.buffers)

    def drop(self, name: str, seq: int) -> None:
        """Forget a push."""
        self._aside.pop((name, seq), None)

    def apply(self, version: int, parts: Sequence[Part], *, skip: bool, partner: str | None = None) -> None:
        """One update: the weighted mean of the parts, and a step of the optimizer that they are for.

        Args:
            partner: With whom the worker that has pushed is averaged, where workers are averaged in pairs.
        """
        assert version == self.version + 1, "updates are applied in order"
        self.version = version
        for part in parts:
            self._heed(part.message)
        counted = [part for part in parts if part.scale]
        if not skip and counted:
            with torch.no_grad():
                if not self._service.own_steps:
                    self._step(counted)
                elif isinstance(self._service.outer, Pairwise):
                    self._gossip(counted[0], partner)
                elif self._service.outer is not None:
                    self._outer_step(counted)
                self._mix_buffers(counted)
        if self._service.copies > 1 and version % MARKED == 0:
            self.mark = [version, self._checksum()]

    def _checksum(self) -> int:
        """Of this server's parameters: two copies have come to the same bits."""
        found = 0
        for begin, end in self.kept.layout.runs(self.index):
            array: Any = self.memory.raw_params[begin:end].numpy()
            found = zlib.crc32(array, found)
        return found

    def _heed(self, message: Mapping[str, Any]) -> None:
        """A worker's script has changed settings of an optimizer: they are settings of this one from now on."""
        if "hypers" in message:
            optimizer = self.kept.optimizers[message["optimizer"]]
            set_hypers(optimizer, message["hypers"])
            self.stamp += 1

    def _step(self, parts: Sequence[Part]) -> None:
        number = parts[0].message["optimizer"]
        scales = self._scales(parts)
        absent = [set(part.message["absent"]) for part in parts]
        for piece in self._pieces[number]:
            there = [i for i in range(len(parts)) if piece.item not in absent[i]]
            piece.param.grad = self._gradient(piece, [(parts[i], scales[i]) for i in there]) if there else None
            self._touched.note(piece.item, piece.param.grad, self.version)
        self.kept.optimizers[number].step()
        for piece in self._pieces[number]:
            piece.param.grad = None

    def _outer_step(self, parts: Sequence[Part]) -> None:
        """What workers push that step by themselves, each by itself."""
        outer = self._service.outer
        number = parts[0].message["optimizer"]
        optimizer = self.kept.optimizers[number]
        for part in parts:
            for piece in self._pieces[number]:
                pushed = piece.of(part.grads[piece.item])
                if isinstance(outer, Elastic):
                    outer.pull(piece.param.detach(), pushed, piece.of(part.read[piece.item]), self._workers)
                elif isinstance(outer, DelayedNesterov):
                    state = optimizer.state[piece.param]
                    outer.step(piece.param.detach(), pushed * part.scale, state, self._workers)

    def _gossip(self, part: Part, partner: str | None) -> None:
        """Average two workers, and let the one that has pushed move on from there."""
        outer = self._service.outer
        assert isinstance(outer, Pairwise)
        mine = self._apart[part.name]
        theirs = self._apart.get(partner) if partner is not None else None
        for piece in self._pieces[part.message["optimizer"]]:
            own = piece.of(mine[piece.item])
            if theirs is not None:
                outer.average(own, piece.of(theirs[piece.item]))
            own.sub_(piece.of(part.grads[piece.item]))
            piece.of(part.read[piece.item]).copy_(own)

    def enter(self, name: str) -> None:
        """A worker begins, with the mean of those that have parameters of their own."""
        if isinstance(self._service.outer, Pairwise):
            self._gather_mean()
            self._apart[name] = self.memory.like_params(self.memory.raw_params.clone())

    def _gather_mean(self) -> None:
        """What is evaluated, exported and saved is the mean of all workers that have parameters of their own.

        One mean for each version: all who come to a point read the same, though the first of them leaves before the last one reads.
        """
        if self._mean_at == self.version:
            return
        self._mean_at = self.version
        with torch.no_grad():
            for item, mean in enumerate(self.memory.params if self._apart else ()):
                mean.zero_()
                for own in self._apart.values():
                    mean.add_(own[item])
                mean.div_(len(self._apart))

    def forget(self, name: str) -> None:
        """A worker is gone, with its parameters."""
        self._gather_mean()
        self._apart.pop(name, None)

    def _scales(self, parts: Sequence[Part]) -> list[float]:
        """What each part is multiplied by: its share of the weights, unless it is a sum already."""
        total = sum(part.message["weight"] for part in parts)
        return [
            part.scale if part.message["sum"] or len(parts) == 1 else part.scale * part.message["weight"] / total
            for part in parts
        ]

    def _gradient(self, piece: _Piece, parts: Sequence[tuple[Part, float]]) -> Tensor:
        """The weighted sum, in the order given; one part that counts whole is used where it lies."""
        rows = [part.message["sparse"].get(piece.item) for part, _ in parts]
        if self._delay is None and all(r is not None for r in rows):
            found = [(r, piece.of(p.grads[piece.item]), scale) for r, (p, scale) in zip(rows, parts, strict=True)]
            return sparse_sum(piece.param.shape, found)
        (first, scale), *others = parts
        total = self._corrected(piece, first)
        if scale != 1.0 or others:
            total = total * scale
        for part, scale in others:
            total.add_(self._corrected(piece, part), alpha=scale)
        return total

    def _corrected(self, piece: _Piece, part: Part) -> Tensor:
        gradient = piece.of(part.grads[piece.item])
        if piece.item in part.message["sparse"]:
            gradient = dense_rows(gradient.shape, part.message["sparse"][piece.item], gradient)
        if self._delay is None or not part.read:
            return gradient
        moved = piece.param.detach() - piece.of(part.read[piece.item])
        factor: Tensor | float = self._delay.strength
        if self._delay.memory is not None:
            if piece.square is None:
                piece.square = torch.zeros_like(gradient)
            piece.square.mul_(self._delay.memory).addcmul_(gradient, gradient, value=1 - self._delay.memory)
            factor = self._delay.strength / (piece.square + _EPSILON).sqrt()
        extra = gradient * gradient * moved * factor
        norm, limit = float(extra.norm()), float(gradient.norm())
        if norm > limit:
            extra.mul_(limit / norm)
        return gradient + extra

    def _mix_buffers(self, parts: Sequence[Part]) -> None:
        """Running statistics: the mean over the parts, in the order given. Whole numbers: those of the first."""
        if self.index:
            return
        total = sum(part.message["weight"] for part in parts) or 1.0
        for number, own in enumerate(self.memory.buffers):
            if not own.is_floating_point() or len(parts) == 1:
                own.copy_(parts[0].buffers[number])
                continue
            own.zero_()
            for part in parts:
                own.add_(part.buffers[number], alpha=part.message["weight"] / total)

    # ---- another copy of this server ----------------------------------------------------------------------------------
    def whole(self) -> dict[str, Any]:
        """All that another copy must know, as references."""
        return {
            "version": self.version,
            "stamp": self.stamp,
            "mark": self.mark,
            "scheduled": self.scheduled,
            "params": self.memory.raw_params,
            "buffers": self.memory.raw_buffers,
            "aside": self._aside,
            "touched": self._touched.versions,
            "groups": [
                [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                for optimizer in self.kept.optimizers
            ],
            "state": [
                [(dict(optimizer.state.get(piece.param, {})), piece.square) for piece in pieces]
                for optimizer, pieces in zip(self.kept.optimizers, self._pieces, strict=True)
            ],
        }

    def take_over(self, whole: Mapping[str, Any]) -> None:
        """Be as the copy that has told this."""
        self.version, self.stamp, self.scheduled = whole["version"], whole["stamp"], whole["scheduled"]
        self._aside, self.mark = whole["aside"], whole["mark"]
        self._touched.versions.update(whole["touched"])
        with torch.no_grad():
            self.memory.raw_params.copy_(whole["params"])
            self.memory.raw_buffers.copy_(whole["buffers"])
        optimizers = zip(self.kept.optimizers, self._pieces, whole["groups"], whole["state"], strict=True)
        for optimizer, pieces, groups, states in optimizers:
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
            for piece, (state, square) in zip(pieces, states, strict=True):
                piece.square = square
                optimizer.state.pop(piece.param, None)
                if state:
                    optimizer.state[piece.param] = state

    # ---- schedules ------------------------------------------------------------------------------------------------
    def schedule(self, number: int, which: str, args: Sequence[float]) -> None:
        """A worker's script has stepped a schedule; every occasion counts once, whoever tells of it."""
        done = self.scheduled.setdefault(str(number), [])
        if which not in done:
            done.append(which)
            del done[:-_OCCASIONS]
            step: Any = self.kept.schedulers[number].step
            step(*args)
            self.stamp += 1

    def settings(self) -> list[list[dict[str, Any]]]:
        """Of all optimizers."""
        return [hypers(optimizer) for optimizer in self.kept.optimizers]

    # ---- answers --------------------------------------------------------------------------------------------------
    def put(self, guest: Guest, *, center: bool = True) -> list[memoryview]:
        """Put this server's parameters where the worker reads them; or the bytes that must travel there.

        Args:
            center: Else a worker that is pulled elastically keeps its own.
        """
        if self._service.one_copy:
            guest.memory.raw_buffers.copy_(self.memory.raw_buffers)
            return []
        if center:
            self._gather_mean()
        if not center and self._service.apart:
            if guest.memory.shared:
                self._put_buffers(guest)
                return []
            return self.kept.answered(guest.memory, self.index)
        if guest.memory.shared:
            self._note_read(guest)
            for begin, end in self._runs:
                guest.memory.raw_params[begin:end].copy_(self.memory.raw_params[begin:end])
            self._put_rows(guest)
            self._put_buffers(guest)
            return []
        for begin, end in self.kept.layout.runs(self.index):  # what was read, for the correction
            guest.memory.raw_params[begin:end].copy_(self.memory.raw_params[begin:end])
        guest.memory.raw_buffers.copy_(self.memory.raw_buffers)
        return self.kept.answered(guest.memory, self.index)

    def _put_buffers(self, guest: Guest) -> None:
        """They lie where the worker has pushed its own: another copy of this server must have read those (``serve.Answer``)."""
        if self.index == 0 and self._service.copies == 1:
            guest.memory.raw_buffers.copy_(self.memory.raw_buffers)

    def _note_read(self, guest: Guest) -> None:
        """Two copies of a server write what a worker reads next; what it has read, for the correction, must outlast the first."""
        if self._delay is None or self._service.copies == 1:
            return
        if guest.read is None:
            guest.read = torch.zeros_like(guest.memory.raw_params)
        for begin, end in self.kept.layout.runs(self.index):
            guest.read[begin:end].copy_(self.memory.raw_params[begin:end])

    def _put_rows(self, guest: Guest) -> None:
        """Of parameters whose gradients are sparse, the rows that have changed since this worker was answered last."""
        for item in self._touched.versions:
            shape = self.kept.params[item].shape
            own, theirs = self.memory.params[item].view(shape), guest.memory.params[item].view(shape)
            if guest.seen < 0:
                theirs.copy_(own)
                continue
            rows = self._touched.since(item, guest.seen)
            theirs.index_copy_(0, rows, own[rows])
        guest.seen = self.version


def _own(piece: _Piece) -> dict[str, Tensor]:
    """What is remembered of a piece beside the optimizer's state."""
    return {} if piece.square is None else {_SQUARE: piece.square}


def _taken(state: Any, param: Tensor) -> Tensor | None:
    """The same out of a checkpoint, where it is among the optimizer's state; an optimizer must not see it."""
    square: Tensor | None = state.get(param, {}).pop(_SQUARE, None)
    if param in state and not state[param]:
        del state[param]
    return square
