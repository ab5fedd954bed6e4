"""Lanes: messages that are matched by tag and not by order, so that several can be under way, started in any order.

A lane is one line of a table in the arena that its owner alone writes: whose lane it is (a hash of the tag), how many
messages it has carried, and where in the owner's heap the last two lie. Others find it by its hash.

* Gather: every rank has a lane for the tag. Message k of a lane may overwrite message k - 2, because a rank publishes
  k - 1 only when it is done with k - 2.
* Send and receive: the sender has a lane for (source, to, tag), the receiver one in which it counts what it has taken;
  the sender is at most two messages ahead.

Sending copies the tensor into the heap by a system call, receiving copies it out: no mapping, and memory that cannot be had
is an error and no signal.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.group.arena import LINE, PAGE, Arena, Span
from paceline.group.bell import Bell
from paceline.terms.errors import StepError, WireError

NUM_LANES = 512
TABLE_NBYTES = NUM_LANES * LINE
_KEY, _COUNT, _FIRST = 0, 1, 2  # words of a lane; from _FIRST on two letters: offset, bytes, kind of tensor
_LETTER = 3


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. The caller keeps the tensor."""
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def _number(text: str) -> int:
    """A positive 63-bit hash, the same in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1 or 1


def _kind(tensor: Tensor) -> int:
    return _number(f"{tensor.dtype} {tuple(tensor.shape)}")


@dataclass(eq=False)
class Lane:
    """One of this rank's own lanes."""

    index: int
    count: int = 0
    slots: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0), (0, 0)])  # offset and room of each
    line: list[object] = field(default_factory=list)  # who uses it now, and who comes next


class Lanes:
    """The table: this rank's lines of it, and a way to find those of others.

    Args:
        table: `TABLE_NBYTES` a rank.
    """

    def __init__(self, arena: Arena, table: Span, bell: Bell) -> None:
        self.arena, self.table, self.bell = arena, table, bell
        self._own: dict[str, Lane] = {}
        self._found: dict[tuple[int, str], int] = {}

    def own(self, name: str) -> Lane:
        """This rank's lane of this name, opened at its first use."""
        lane = self._own.get(name)
        if lane is None:
            if len(self._own) == NUM_LANES:
                raise WireError(
                    "PL206",
                    f"more than {NUM_LANES} different tags are in use; the last is {name!r}",
                    help="reuse tags.",
                )
            lane = self._own[name] = Lane(len(self._own))
            self.table.words[self._word(self.bell.rank, lane.index, _KEY)] = _number(name)
        return lane

    def count(self, rank: int, name: str) -> int:
        """How many messages `rank` has put on its lane of this name."""
        index = self._find(rank, name)
        return 0 if index is None else self.bell.load(self.table, self._word(rank, index, _COUNT))

    def put(self, name: str, tensor: Tensor) -> None:
        """The next message of a lane of this rank."""
        lane = self.own(name)
        turn, data = (lane.count + 1) & 1, bytes_of(tensor)
        offset, room = lane.slots[turn]
        if room < data.nbytes:
            room = max(PAGE, 1 << (data.nbytes - 1).bit_length())
            offset = self.arena.take_heap(room)
            lane.slots[turn] = (offset, room)
        self.arena.write(data, offset)
        at = self._word(self.bell.rank, lane.index, _FIRST + turn * _LETTER)
        self.table.words[at], self.table.words[at + 1], self.table.words[at + 2] = offset, data.nbytes, _kind(tensor)
        self.advance_count(name)

    def advance_count(self, name: str) -> None:
        """One more message, without looking at what it says."""
        lane = self.own(name)
        lane.count += 1
        self.bell.publish(self.table, self._word(self.bell.rank, lane.index, _COUNT), lane.count)

    def get(self, rank: int, name: str, number: int, into: Tensor) -> None:
        """Message `number` of a lane of `rank`. Raises StepError PL402 when it is of another shape or dtype."""
        index = self._find(rank, name)
        assert index is not None
        at = self._word(rank, index, _FIRST + (number & 1) * _LETTER)
        offset, nbytes, kind = self.table.words[at : at + _LETTER]
        if kind != _kind(into):
            raise StepError(
                "PL402",
                f"under the tag {name!r} rank {rank} gives {nbytes} bytes, which is no {into.dtype} of shape {tuple(into.shape)}",
            )
        self.arena.read(bytes_of(into), offset)

    def _find(self, rank: int, name: str) -> int | None:
        """Line of a rank's table, once its owner has opened the lane."""
        index = self._found.get((rank, name))
        if index is None:
            number = _number(name)
            for line in range(NUM_LANES):
                key = self.bell.load(self.table, self._word(rank, line, _KEY))
                if key == number:
                    self._found[rank, name] = index = line
                if key in (number, 0):
                    break
        return index

    def _word(self, rank: int, line: int, word: int) -> int:
        return (rank * TABLE_NBYTES + line * LINE) // 8 + word


class Gather:
    """One rank's part in gathering a tensor from all."""

    def __init__(self, lanes: Lanes, tensor: Tensor, tag: str) -> None:
        self._lanes, self._tensor, self._name = lanes, tensor.detach().contiguous(), f"gather {tag}"
        self._lane = lanes.own(self._name)
        self._lane.line.append(self)
        self._number = 0  # of its message; 0 before it is published
        self._outcome: list[Tensor] | StepError | None = None
        self.advance()

    def advance(self) -> bool:
        if self._outcome is None and self._lane.line[0] is self:  # earlier gathers of this tag come first
            if not self._number:
                self._lanes.put(self._name, self._tensor)
                self._number = self._lane.count
            if not self.missing():
                self._outcome = self._take()
                self._lane.line.pop(0)
        return self._outcome is not None

    def missing(self) -> int:
        if self._outcome is not None:
            return 0
        wanted = self._number or self._lane.count
        return sum(1 << r for r in range(self._lanes.bell.size) if self._lanes.count(r, self._name) < wanted)

    def result(self) -> list[Tensor]:
        assert self._outcome is not None
        if isinstance(self._outcome, StepError):
            raise self._outcome
        return self._outcome

    def _take(self) -> list[Tensor] | StepError:
        """Everybody's tensor, or that they are not alike: an end like any other, which whoever waits is told."""
        gathered = [torch.empty_like(self._tensor) for _ in range(self._lanes.bell.size)]
        try:
            for rank, into in enumerate(gathered):
                self._lanes.get(rank, self._name, self._number, into)
        except StepError as error:
            return error
        return gathered


class Sending:
    """Giving a tensor to one rank: done when it lies in this rank's heap."""

    def __init__(self, lanes: Lanes, to: int, tensor: Tensor, tag: int) -> None:
        self._lanes, self._to, self._tensor = lanes, to, tensor.detach().contiguous()
        self._name = f"send {lanes.bell.rank} to {to} tag {tag}"
        self._lane = lanes.own(self._name)
        self._lane.line.append(self)
        self._sent = False
        self.advance()

    def advance(self) -> bool:
        if not self._sent and self._lane.line[0] is self and not self.missing():
            self._lanes.put(self._name, self._tensor)
            self._lane.line.pop(0)
            self._sent = True
        return self._sent

    def missing(self) -> int:
        """The receiver, while it has not yet read what lies in the slot that comes next."""
        free = self._sent or self._lane.count - self._lanes.count(self._to, f"taken: {self._name}") < 2
        return 0 if free else 1 << self._to

    def result(self) -> None:
        return None


class Receiving:
    """Taking the next message of one rank."""

    def __init__(self, lanes: Lanes, source: int, into: Tensor, tag: int) -> None:
        if not into.is_contiguous():
            raise ValueError("a message is received into contiguous memory")
        self._lanes, self._source, self._into = lanes, source, into
        self._name = f"send {source} to {lanes.bell.rank} tag {tag}"
        self._lane = lanes.own(f"taken: {self._name}")
        self._lane.line.append(self)
        self._taken = False
        self._error: StepError | None = None

    def advance(self) -> bool:
        if not self._taken and self._lane.line[0] is self and not self.missing():
            try:
                self._lanes.get(self._source, self._name, self._lane.count + 1, self._into)
            except StepError as error:
                self._error = error
            self._lanes.advance_count(f"taken: {self._name}")
            self._lane.line.pop(0)
            self._taken = True
        return self._taken

    def missing(self) -> int:
        there = self._taken or self._lanes.count(self._source, self._name) > self._lane.count
        return 0 if there else 1 << self._source

    def result(self) -> Tensor:
        if self._error is not None:
            raise self._error
        return self._into
