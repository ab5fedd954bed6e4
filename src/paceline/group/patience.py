"""Waiting: for whom, how long at a time, and when to give up.

A rank that waits never blocks for good. It sleeps in slices; after each it looks whether the launcher ends the run, and
whether those that it waits for are still there: a process that has died shows on its pidfd at once, also before anybody
has reaped it.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from paceline.group.arena import PAGE, Span
from paceline.group.bell import ANYBODY, RANK, SLICE_S, Bell
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import Aborted, PeerLost, WireError

PID, LEFT = 1, 2  # words of a control page: process id, and whether the rank has closed its wire
QUICK_NS = 50_000  # how long a rank looks before it sleeps: about what a sleep and a wake cost
CROWDED_NS = 500_000  # a yield that lasts longer went to somebody who computes
_SHY = 64  # waits without quick looks after one of these; see Note [quick looks] in kernel.c
_MASK = (1 << 62) - 1


class Pending(Protocol):
    """Something under way."""

    def advance(self) -> bool:
        """Do what can be done without waiting; True when it is done."""

    def missing(self) -> int:
        """Bit mask of the ranks that it waits for."""


class Patience:
    """What a rank needs while it waits.

    Args:
        control: The control pages of all ranks.
        bell: To sleep on.
        board, activity: Where an abort is read, and where it is said who is waited for.
        names: The page on the board of each rank of the wire.
        evicted: Gives the ranks that are no longer members.
    """

    def __init__(
        self,
        control: Span,
        bell: Bell,
        board: Board,
        activity: Activity,
        names: Sequence[int],
        evicted: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._evicted = evicted
        self._control, self._bell, self._board, self._activity = control, bell, board, activity
        self._names = names
        self._shy = 0
        self._watched: dict[int, int] = {}  # rank -> pidfd
        self._poll = select.poll()

    def wait(self, pending: Pending, others: Sequence[Pending]) -> None:
        """Advance `pending`, and all `others` too, until it is done. Raises like :meth:`look`."""
        if self._look_quickly(pending, others):
            return
        try:
            while not self._slice(pending, others):
                self.look(pending)
        finally:
            self._activity.waits_for(0)

    def _look_quickly(self, pending: Pending, others: Sequence[Pending]) -> bool:
        """See Note [quick looks] in kernel.c. True when `pending` is done."""
        if self._shy:
            self._shy -= 1
            return False
        begin = now = time.monotonic_ns()
        while now - begin < QUICK_NS and not self._shy:
            if pending.advance():
                return True
            _advance(others)
            before = time.monotonic_ns()
            os.sched_yield()
            now = time.monotonic_ns()
            if now - before > CROWDED_NS:
                self._shy = _SHY
        return False

    def _slice(self, pending: Pending, others: Sequence[Pending]) -> bool:
        """Advance and sleep for one slice; True when `pending` is done."""
        end = time.monotonic() + SLICE_S
        while not pending.advance() and (left := end - time.monotonic()) > 0:
            missing = pending.missing()
            for_whom = ANYBODY if others or not missing else RANK + _lowest(missing)
            self._bell.arm(for_whom)
            _advance(others)
            if pending.advance() or (for_whom != ANYBODY and not pending.missing() >> _lowest(missing) & 1):
                self._bell.arm(0)
            else:
                self._bell.doze(for_whom, left)
        return pending.advance()

    def look(self, pending: Pending) -> None:
        """Say who is waited for, and give up where that is hopeless.

        Raises:
            PeerLost: One of them is gone (PL403).
            Aborted: The launcher ends the run (PL404).
        """
        missing = pending.missing()
        self._activity.waits_for(self._mask(missing))
        if self._board.aborted:
            lost = self._board.lost
            if lost >= 0 and lost != self._activity.rank:
                raise PeerLost("PL403", f"rank {lost} was lost while rank {self._activity.rank} waited")
            raise Aborted("PL404", f"the run was ended while rank {self._activity.rank} waited")
        for rank in self._gone(missing):
            if not pending.advance() and pending.missing() >> rank & 1:  # it may have done its part before it went
                raise self._lost(rank)

    def leave(self) -> None:
        """Say that this rank is gone for the others, and stop watching them."""
        self._bell.publish(self._control, self._word(self._bell.rank, LEFT), 1)
        for fd in self._watched.values():
            os.close(fd)
        self._watched.clear()

    def _lost(self, rank: int) -> WireError:
        left = self._control.words[self._word(rank, LEFT)]
        how = "closed its wire" if left else "is no longer a member" if rank in self._evicted() else "died"
        return PeerLost("PL403", f"rank {self._names[rank]} {how} while rank {self._activity.rank} waited for it")

    def _mask(self, missing: int) -> int:
        return sum(1 << name for rank, name in enumerate(self._names) if missing >> rank & 1) & _MASK

    def _word(self, rank: int, word: int) -> int:
        return rank * PAGE // 8 + word

    def _gone(self, missing: int) -> list[int]:
        """Those of `missing` that have died or left."""
        ranks = [r for r in range(len(self._names)) if missing >> r & 1]
        gone = {r for r in ranks if self._control.words[self._word(r, LEFT)] or not self._watch(r)}
        gone.update(set(ranks).intersection(self._evicted()))
        if self._watched:
            ended = {fd for fd, _ in self._poll.poll(0)}
            gone |= {r for r in ranks if self._watched.get(r) in ended}
        return sorted(gone)

    def _watch(self, rank: int) -> bool:
        """Open a rank's pidfd if that has not been done; False when its process does not exist."""
        if rank in self._watched:
            return True
        pid = self._control.words[self._word(rank, PID)] or self._board.read(self._names[rank]).pid
        if pid == 0:
            return True  # not started yet: the launcher watches it
        try:
            if hasattr(os, "pidfd_open"):
                self._watched[rank] = os.pidfd_open(pid)
                self._poll.register(self._watched[rank], select.POLLIN)
            else:
                os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # no descriptor to be had, or not allowed to look: the launcher's abort remains
            return True
        return True


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _advance(others: Sequence[Pending]) -> None:
    for other in others:
        other.advance()
