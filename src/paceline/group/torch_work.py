"""Waiting for c10d without trusting it to wake up.

[Note: gloo loses operations] gloo tells a broken connection only to operations that have not begun to transfer. One that
is in the middle of its bytes when the peer dies, or when we cut the connection, waits for its timeout, and so does the
destructor of the process group. So nothing here waits for gloo alone: waits are cut into slices, after each of which the
:class:`Guard` looks at the board, at the wire's failure and at the connections; and a group that is stuck is never
destroyed (it is gone with its process, which has failed anyway).

A collective's ``wait`` may be repeated after its timeout. A message's may not: its timeout breaks all connections. So
messages are waited for by threads, which is also how it is known that one is done (c10d says so only to a waiter).
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from paceline.group.torch_sockets import Connections
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import Aborted, PeerLost, WireError

T = TypeVar("T")
SLICE = timedelta(milliseconds=20)
_NAP_S = 1e-4  # between two looks at a CUDA event
_GRACE_S = 5.0  # a rank may leave while others still pass on its part of a collective; on slow links that takes a while
_MASK_BITS = 62
_PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "Connection refused")


class Guard:
    """Decides, while this rank waits, whether that is still of use. The first failure is final.

    Args:
        board, activity: Where an abort is read, and where it is said who is waited for.
        connections: Of the group.
        names: The rank on the board of each rank of the group.
        cut: Ends all connections, so that others notice.
    """

    def __init__(
        self,
        board: Board,
        activity: Activity,
        connections: Connections,
        names: Sequence[int],
        cut: Callable[[], None],
    ) -> None:
        self.failure: WireError | None = None
        self._board, self._activity, self._connections = board, activity, connections
        self._names, self._cut = names, cut

    def announce(self, peers: Collection[int]) -> None:
        """Say on the board who is waited for."""
        names = (self._names[peer] for peer in peers)
        self._activity.waits_for(sum(1 << name for name in names if name < _MASK_BITS and name != self._activity.rank))

    def check(self) -> None:
        """Raise the failure that there is."""
        if self.failure is None and self._board.aborted:
            self.fail(self._abort())
        if self.failure is not None:
            raise self.failure

    def look(self, peers: Collection[int], since: float, grace: float) -> None:
        """Raise when the run is over, or when one of `peers` is gone and nothing has come for `grace` seconds since."""
        self.check()
        lost = self._connections.lost(peers) if time.monotonic() - since > grace else []
        if lost:
            raise self.fail(PeerLost("PL403", f"rank {self._names[lost[0]]} closed its connection"))

    def failed(self, error: RuntimeError) -> WireError:
        """Our error for one of c10d's."""
        if self._board.aborted:
            return self.fail(self._abort())
        if any(sign in str(error) for sign in _PEER_GONE):
            return self.fail(PeerLost("PL403", f"a peer closed its connection: {short(error)}"))
        return self.fail(WireError("PL406", short(error)))

    def fail(self, error: WireError) -> WireError:
        """Make `error` the failure, unless there is one, and cut the connections. The failure is returned."""
        self.failure = self.failure or error
        self._cut()
        return self.failure

    def _abort(self) -> WireError:
        lost = self._board.lost
        if lost not in (-1, self._activity.rank):
            return PeerLost("PL403", f"rank {lost} was lost")
        return Aborted("PL404", "the run was ended")


class CollectiveWork(Generic[T]):
    """A collective under way.

    Args:
        work: c10d's. It keeps its tensors alive, also when we have given it up.
        finish: Gives the result, when it is done.
        peers: Who takes part.
    """

    def __init__(self, work: Any, finish: Callable[[], T], guard: Guard, peers: Collection[int], on_cuda: bool) -> None:
        self._work, self._finish, self._guard, self._peers, self._on_cuda = work, finish, guard, peers, on_cuda
        self._value: list[T] = []

    def poll(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> T:
        if self._work is not None:
            self._guard.announce(self._peers)
            self._wait(self._work)
            self._work = None
            self._value.append(self._finish())
        return self._value[0]

    def _wait(self, work: Any) -> None:
        since = time.monotonic()
        while not work.is_completed():
            if self._slice(work):
                return
            if not work.is_completed():
                self._guard.look(self._peers, since, _GRACE_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._guard.failed(error) from error.with_traceback(None)  # frames would keep the group alive

    def _slice(self, work: Any) -> bool:
        """Wait for a short time; True when the work has succeeded. Why it has not is asked elsewhere."""
        if self._on_cuda:
            time.sleep(_NAP_S)
            return False
        try:
            work.wait(SLICE)
        except RuntimeError:
            return False
        return True


class MessageWork(Generic[T]):
    """A message under way, with a thread that waits for it."""

    def __init__(self, work: Any, finish: Callable[[], T], guard: Guard, peer: int, errands: Errands) -> None:
        self._work, self._finish, self._guard, self._peers = work, finish, guard, (peer,)
        self._done = threading.Event()
        self._error: RuntimeError | None = None
        errands.run(self._errand)

    def poll(self) -> bool:
        return self._done.is_set()

    def wait(self) -> T:
        if not self._done.is_set():
            self._guard.announce(self._peers)
            since = time.monotonic()
            while not self._done.wait(SLICE.total_seconds()):
                self._guard.look(self._peers, since, 0.0)
        if self._error is not None:
            raise self._guard.failed(self._error) from self._error
        return self._finish()

    def _errand(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error.with_traceback(None)
        self._work = None
        self._done.set()


class Errands:
    """Threads that block in our place. There are as many as have ever blocked at once; they are used again."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def run(self, task: Callable[[], None]) -> None:
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._threads.append(threading.Thread(target=self._live, name="paceline-message", daemon=True))
                self._threads[-1].start()
        self._tasks.put(task)

    def close(self, deadline: float) -> None:
        """End the threads; those that still block at `deadline` end when they can."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _live(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            with self._lock:
                self._idle += 1


def settled(work: Any, deadline: float) -> bool:
    """Whether a c10d work ends, well or badly, until `deadline`."""
    while not work.is_completed() and time.monotonic() < deadline:
        with suppress(RuntimeError):
            work.wait(timedelta(milliseconds=1))
    return bool(work.is_completed())


def keep_for_good(group: Any) -> None:
    """Never destroy a group: its destructor would wait for the operation that is stuck."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def short(error: BaseException) -> str:
    """The first sentence of a library's message, without the place in its source."""
    first = str(error).strip().split("\n")[0].split(". ")[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first)[:200] or type(error).__name__
