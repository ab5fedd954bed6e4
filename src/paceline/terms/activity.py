"""What every rank is doing right now, on a board of shared memory that the launcher reads without asking.

The board is an array of pages, one for control and one for each rank. A rank writes its own page: a phase, since when,
in which operation, waiting for whom, at which line of the user's script. A store costs well under a microsecond, so it
stands in the hot path; a rank that is frozen, or stuck in C code, can still be read. The control page is written by the
launcher: `stop` (end at a step boundary), `abort` (stop waiting now), `lost` (which rank died).

In an elastic run a page belongs to one process after another: the launcher clears it in between.

All words are 64-bit, aligned, written by exactly one process; a torn text is possible and harmless.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

PAGE = 4096
_WHAT, _WHERE, _TEXT = 512, 1536, 1000  # byte offsets of the two texts, and the room each has


REGROUP = "regroup"
"""The operation of a rank that agrees with the others on who takes part from here on. It may last, and is no hang."""


class Phase(IntEnum):
    """The four things a rank's time goes to, and the ends of its life."""

    STARTING = 0
    COMPUTE = 1
    EXCHANGE = 2
    WAIT = 3
    INPUT = 4
    FINISHED = 5
    FAILED = 6


TIMED = (Phase.COMPUTE, Phase.EXCHANGE, Phase.WAIT, Phase.INPUT)

# Words of a rank's page.
_PID, _PHASE, _SINCE, _STEP, _BEAT, _MASK, _EPOCH, _ROWS, _ADOPTED, _OPERATION, _SPENT = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    16,
)
# Words of the control page.
_STOP, _ABORT, _LOST = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the board said of one rank at one moment. Durations in seconds, `since` and `beat` on the monotonic clock."""

    rank: int
    pid: int
    phase: Phase
    since: float
    step: int
    epoch: int
    rows: int
    beat: float
    adopted: bool
    operation: int
    what: str
    where: str
    waits_for: tuple[int, ...]
    spent: dict[Phase, float]


class Board:
    """The pages of all ranks over one buffer (an mmap, or a bytearray when nobody reads it).

    Args:
        buffer: Writable memory of at least :meth:`nbytes` bytes.
        size: Number of ranks.
    """

    def __init__(self, buffer: memoryview, size: int) -> None:
        self.size = size
        self._bytes = buffer.cast("B") if buffer.format != "B" else buffer
        self._words = self._bytes[: self.nbytes(size)].cast("q")

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes that a board for `size` ranks needs."""
        return PAGE * (size + 1)

    @classmethod
    def private(cls, size: int) -> Board:
        """A board that only this process sees."""
        return cls(memoryview(bytearray(cls.nbytes(size))), size)

    # -- control, written by the launcher
    def request_stop(self) -> None:
        """Ask every rank to stop at its next step boundary."""
        self._words[_STOP] = 1

    def abort(self, lost: int = -1) -> None:
        """Tell every rank to stop waiting; `lost` names the rank that died, if one did."""
        self._words[_LOST] = lost + 1
        self._words[_ABORT] = 1

    @property
    def stop_requested(self) -> bool:
        return self._words[_STOP] != 0

    @property
    def aborted(self) -> bool:
        return self._words[_ABORT] != 0

    @property
    def lost(self) -> int:
        """The rank that died, or -1."""
        return int(self._words[_LOST]) - 1

    def clear(self, rank: int) -> None:
        """Make the page of `rank` what it was at the start, for another process."""
        start = (rank + 1) * PAGE
        self._bytes[start : start + PAGE] = bytes(PAGE)

    def activity(self, rank: int) -> Activity:
        """The writer of one rank's page."""
        return Activity(self, rank)

    def read(self, rank: int) -> Snapshot:
        """What `rank` is doing now."""
        base = (rank + 1) * PAGE // 8
        w = self._words
        mask = int(w[base + _MASK])
        return Snapshot(
            rank=rank,
            pid=int(w[base + _PID]),
            phase=Phase(int(w[base + _PHASE])),
            since=w[base + _SINCE] / 1e9,
            step=int(w[base + _STEP]),
            epoch=int(w[base + _EPOCH]),
            rows=int(w[base + _ROWS]),
            beat=w[base + _BEAT] / 1e9,
            adopted=w[base + _ADOPTED] != 0,
            operation=int(w[base + _OPERATION]),
            what=self._text(rank, _WHAT),
            where=self._text(rank, _WHERE),
            waits_for=tuple(r for r in range(min(self.size, 62)) if mask >> r & 1),
            spent={p: w[base + _SPENT + p] / 1e9 for p in TIMED},
        )

    def _text(self, rank: int, offset: int) -> str:
        start = (rank + 1) * PAGE + offset
        raw = bytes(self._bytes[start : start + _TEXT])
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    def _write_text(self, rank: int, offset: int, text: str) -> None:
        raw = text.encode("utf-8", "replace")[: _TEXT - 1] + b"\0"
        start = (rank + 1) * PAGE + offset
        self._bytes[start : start + len(raw)] = raw


class Activity:
    """One rank's page of the board, seen by its writer.

    Exactly one phase is current; entering another books the time of the one left. Phases nest through
    :meth:`during`, which restores the phase it found.
    """

    def __init__(self, board: Board, rank: int) -> None:
        self.board = board
        self.rank = rank
        self._base = (rank + 1) * PAGE // 8
        self._phase = Phase.STARTING
        self._since = time.monotonic_ns()
        self._what = ""

    def enter(self, phase: Phase, what: str = "", waits_for: int = 0) -> None:
        """Say that `phase` begins now, in operation `what`, waiting for the ranks in the bit mask `waits_for`."""
        now = time.monotonic_ns()
        w, b = self.board._words, self._base
        if Phase.COMPUTE <= self._phase <= Phase.INPUT:
            w[b + _SPENT + self._phase] += now - self._since
        self._phase, self._since = phase, now
        if what != self._what:
            self._what = what
            self.board._write_text(self.rank, _WHAT, what)
        w[b + _MASK] = waits_for
        w[b + _SINCE] = now
        w[b + _PHASE] = phase

    @contextmanager
    def during(self, phase: Phase, what: str = "") -> Iterator[None]:
        """Be in `phase` inside the block, then in the phase found."""
        before, before_what = self._phase, self._what
        self.enter(phase, what)
        try:
            yield
        finally:
            self.enter(before, before_what)

    @property
    def phase(self) -> Phase:
        return self._phase

    def waits_for(self, mask: int) -> None:
        """Name the ranks waited for, as a bit mask, without changing the phase."""
        self.board._words[self._base + _MASK] = mask

    def operation(self, number: int) -> None:
        """Number of the coordination operation that this rank entered last; equal numbers are the same call."""
        self.board._words[self._base + _OPERATION] = number

    def progress(self, step: int, epoch: int, rows: int) -> None:
        """Publish how far this rank is: optimizer steps applied, epoch, rows it has trained on."""
        w, b = self.board._words, self._base
        w[b + _STEP], w[b + _EPOCH], w[b + _ROWS] = step, epoch, rows

    def register(self, pid: int) -> None:
        self.board._words[self._base + _PID] = pid

    def adopted(self) -> None:
        self.board._words[self._base + _ADOPTED] = 1

    def beat(self, where: str, seen: int) -> None:
        """Heartbeat, with the line of the user's script that the main thread was in when the monotonic clock read `seen` ns."""
        self.board._write_text(self.rank, _WHERE, where)
        self.board._words[self._base + _BEAT] = seen
