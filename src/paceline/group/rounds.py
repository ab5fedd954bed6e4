"""Rounds: the calls that all ranks make together, in the same order, and wait in.

One round: every rank writes a letter into its own control page (the number of the operation, its tag, how long the whole
message is, how much of the arena it has taken) and at most a piece of the message into its heap, publishes the number of
the round, and waits until all have published it. Then everybody has all letters. Ranks that came with different letters see
that at the same time, and all of them say so; so a program that has parted ends with an error and not with silence.

A message longer than a piece takes several rounds; the first letters tell everybody how many.

Letters and pieces lie in two slots, used in turn: who writes round k + 2 has seen everybody publish k + 1, and who has
published k + 1 is done with k.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.group.arena import PAGE, Arena, Span
from paceline.group.bell import Bell
from paceline.group.patience import Patience, Pending
from paceline.terms.errors import StepError

_PIECE = 1 << 20
_POSTED = 16  # word of a control page: the last round that this rank has published
_LETTER, _LETTER_NBYTES = 512, 1536  # byte offset of the first slot, and the length of each
_HEAD = struct.Struct("4q")  # operation, bytes of the whole message, bytes of the common arena taken, bytes of the tag
_TAG_NBYTES = _LETTER_NBYTES - _HEAD.size


@dataclass(frozen=True, slots=True)
class Letter:
    """What a rank says when it enters an operation."""

    operation: int
    nbytes: int
    used: int
    tag: str


class Rounds:
    """This rank's part in the rounds.

    Args:
        arena: Its heap takes the pieces.
        control: The control pages of all ranks.
        names: The rank on the board of each rank of the wire, for messages.
    """

    def __init__(self, arena: Arena, control: Span, bell: Bell, patience: Patience, names: Sequence[int]) -> None:
        self._arena, self._control, self._bell, self._patience = arena, control, bell, patience
        self._names = names
        self._round = 0
        self.operation = 0
        self._piece = max(PAGE, min(_PIECE, arena.heap_nbytes // 4 // PAGE * PAGE))
        self._slots = arena.take_heap(2 * self._piece) - arena.heap_of(bell.rank)

    def gather(self, tag: str, payload: memoryview, others: Sequence[Pending]) -> list[bytes]:
        """Everybody's payload, in rank order.

        Raises:
            StepError: Ranks came with different tags, or have taken different amounts of the arena (PL402).
        """
        self.operation += 1
        letters = self._exchange(tag, payload.nbytes, payload[: self._piece], others)
        results = [bytearray(letter.nbytes) for letter in letters]
        longest = max(letter.nbytes for letter in letters)
        for start in range(0, max(longest, 1), self._piece):
            if start:
                self._exchange(tag, payload.nbytes, payload[start : start + self._piece], others)
            for rank, result in enumerate(results):
                self._read(rank, memoryview(result)[start : start + self._piece])
        return [bytes(result) for result in results]

    def broadcast(self, tag: str, data: memoryview, root: int, others: Sequence[Pending]) -> None:
        """Overwrite `data`, of equal length everywhere, with that of `root`. Raises like :meth:`gather`."""
        self.operation += 1
        for start in range(0, max(data.nbytes, 1), self._piece):
            piece = data[start : start + self._piece]
            mine = self._bell.rank == root
            self._exchange(tag, data.nbytes, piece if mine else piece[:0], others)
            if not mine:
                self._read(root, piece)

    def advance(self) -> bool:
        """Whether everybody has published this round."""
        return not self.missing()

    def missing(self) -> int:
        """Bit mask of the ranks that have not published this round."""
        load, control = self._bell.load, self._control
        return sum(1 << r for r in range(self._bell.size) if load(control, r * PAGE // 8 + _POSTED) < self._round)

    def _exchange(self, tag: str, nbytes: int, piece: memoryview, others: Sequence[Pending]) -> list[Letter]:
        """One round."""
        rank, turn = self._bell.rank, (self._round + 1) & 1
        if piece.nbytes:
            self._arena.write(piece, self._slot(rank, turn))
        text = tag.encode("utf-8", "replace")[:_TAG_NBYTES]
        at = rank * PAGE + _LETTER + turn * _LETTER_NBYTES
        _HEAD.pack_into(self._control.memory, at, self.operation, nbytes, self._arena.used, len(text))
        self._control.memory[at + _HEAD.size : at + _HEAD.size + len(text)] = text
        self._round += 1
        self._bell.publish(self._control, rank * PAGE // 8 + _POSTED, self._round)
        self._patience.wait(self, others)
        letters = [self._letter(r, turn) for r in range(self._bell.size)]
        self._compare(letters)
        return letters

    def _slot(self, rank: int, turn: int) -> int:
        return self._arena.heap_of(rank) + self._slots + turn * self._piece

    def _read(self, rank: int, into: memoryview) -> None:
        """Fill `into` with the piece that `rank` wrote in this round."""
        if into.nbytes:
            self._arena.read(into, self._slot(rank, self._round & 1))

    def _letter(self, rank: int, turn: int) -> Letter:
        at = rank * PAGE + _LETTER + turn * _LETTER_NBYTES
        operation, nbytes, used, length = _HEAD.unpack_from(self._control.memory, at)
        text = bytes(self._control.memory[at + _HEAD.size : at + _HEAD.size + length])
        return Letter(operation, nbytes, used, text.decode("utf-8", "replace"))

    def _compare(self, letters: list[Letter]) -> None:
        """Raises StepError PL402 unless all ranks are in the same operation and see the same arena."""
        if len({(letter.operation, letter.tag) for letter in letters}) > 1:
            where = self._by_rank([f"{letter.tag!r} (operation {letter.operation})" for letter in letters])
            raise StepError("PL402", f"ranks met in different operations: {where}")
        if len({letter.used for letter in letters}) > 1:
            where = self._by_rank([f"{letter.used} bytes" for letter in letters])
            raise StepError("PL402", f"ranks have allocated different buffers before {letters[0].tag!r}: {where}")

    def _by_rank(self, values: list[str]) -> str:
        """``ranks 0, 1 in a, rank 2 in b``: equal values named once."""
        holders: dict[str, list[str]] = {}
        for name, value in zip(self._names, values, strict=True):
            holders.setdefault(value, []).append(str(name))
        return "; ".join(f"rank{'s' * (len(n) > 1)} {', '.join(n)} in {value}" for value, n in holders.items())
