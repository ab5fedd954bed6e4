"""Virtual time: events, coroutines that wait for them, and transfers that share ways. Pure.

Events are handled in the order of their time, and of their making where times are equal; nothing else decides, so what
happens is a function of what was asked.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar

from paceline.group.wire import Request
from paceline.terms.errors import StepError

T = TypeVar("T")


class Timeline:
    """A clock that jumps from event to event, and the coroutines that live by it.

    Attributes:
        now: Virtual seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._running: dict[Promise[Any], str] = {}

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Let `event` happen at `time`."""
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def advance(self) -> bool:
        """Handle the next event. False when there is none."""
        if not self._events:
            return False
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True

    def run(self) -> None:
        """Let everything happen. Raises StepError PL402 when coroutines wait for what never will."""
        while self.advance():
            pass
        if self._running:
            stuck = ", ".join(f"{name} for {task.label}" for task, name in self._running.items())
            raise StepError("PL402", f"nothing is left to happen, and these wait: {stuck}")

    def spawn(self, name: str, coroutine: Coroutine[Request[Any], Any, T], start: Start) -> Promise[T]:
        """Run a coroutine: now up to its first request, then as time allows. `start` starts its requests."""
        task: Promise[T] = Promise(self, "")
        self._running[task] = name
        self._resume(task, coroutine, start, None)
        return task

    def _resume(self, task: Promise[T], coroutine: Coroutine[Request[Any], Any, T], start: Start, value: Any) -> None:
        try:
            request = coroutine.send(value)
        except StopIteration as end:
            del self._running[task]
            task.keep(end.value)
            return
        work = start(request)
        task.label = work.label
        work.then(lambda result: self._resume(task, coroutine, start, result))


class Promise(Generic[T]):
    """A work whose result comes at a point of virtual time.

    Args:
        time: Whose time.
        label: What is waited for, for people.
    """

    def __init__(self, time: Timeline, label: str) -> None:
        self.time, self.label = time, label
        self._values: list[T] = []
        self._listeners: list[Callable[[T], None]] = []

    def poll(self) -> bool:
        """True when the result is there. Time does not pass."""
        return bool(self._values)

    def wait(self) -> T:
        """Let everything happen until the result is there. Raises StepError PL402 when it never will be."""
        while not self._values:
            if not self.time.advance():
                raise StepError("PL402", f"nothing is left to happen, and this is not done: {self.label}")
        return self._values[0]

    def then(self, listener: Callable[[T], None]) -> None:
        """Call `listener` with the result, as an event of its own."""
        if self._values:
            self.time.at(self.time.now, lambda: listener(self._values[0]))
        else:
            self._listeners.append(listener)

    def keep(self, value: T) -> None:
        """The result is there, now."""
        self._values.append(value)
        for listener in self._listeners:
            self.then(listener)


Start = Callable[[Request[Any]], Promise[Any]]


@dataclass(frozen=True, eq=False)
class Transfer:
    """Something that takes `seconds` of all its ways.

    Attributes:
        ways: What it occupies, by any name: nothing else can in that time.
        begins: Called with begin and end when it begins.
        ends: Called when it has ended.
    """

    ways: frozenset[object]
    seconds: float
    begins: Callable[[float, float], None]
    ends: Callable[[], None]


class Traffic:
    """Begins each transfer as soon as all its ways are free; earlier asked goes first where two could."""

    def __init__(self, time: Timeline) -> None:
        self._time = time
        self._busy: set[object] = set()
        self._waiting: list[Transfer] = []

    def ask(self, transfer: Transfer) -> None:
        """Let `transfer` happen."""
        self._waiting.append(transfer)
        self._begin()

    def _begin(self) -> None:
        for transfer in list(self._waiting):
            if self._busy.isdisjoint(transfer.ways):
                self._waiting.remove(transfer)
                self._busy |= transfer.ways
                end = self._time.now + transfer.seconds
                transfer.begins(self._time.now, end)
                self._time.at(end, partial(self._end, transfer))

    def _end(self, transfer: Transfer) -> None:
        self._busy -= transfer.ways
        transfer.ends()
        self._begin()


@dataclass(frozen=True, eq=False)
class Elapse(Request[None]):
    """Be busy for `seconds`, as a peer of speed 1 counts them."""

    seconds: float


@dataclass(frozen=True, eq=False)
class Until(Request[list[Any]]):
    """Wait until all works are done; the result is the list of their results."""

    works: Sequence[Promise[Any]]


def all_of(time: Timeline, works: Sequence[Promise[Any]]) -> Promise[list[Any]]:
    """Done when all are; the result is the list of theirs."""
    promise: Promise[list[Any]] = Promise(time, " and ".join(sorted({w.label for w in works})))

    def look(_: object = None) -> None:
        if not promise.poll() and all(work.poll() for work in works):
            promise.keep([work.wait() for work in works])

    for work in works:
        work.then(look)
    look()
    return promise
