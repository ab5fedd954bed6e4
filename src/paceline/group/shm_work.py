"""Requests under way in shared memory: thin faces of the states that do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

from paceline.group.lanes import Gather, Receiving, Sending
from paceline.group.patience import Pending
from paceline.group.sums import Sum
from paceline.group.wire import Work

T = TypeVar("T")
Wait = Callable[[Pending], None]


class SumWork:
    """An all-reduce under way.

    Attributes:
        nonfinite: At the end: whether the payload's result has a value that is not finite. The same on all ranks.
    """

    __slots__ = ("_result", "_sum", "_wait", "nonfinite")

    def __init__(self, sum: Sum, wait: Wait) -> None:
        self._sum, self._wait = sum, wait
        self._result: list[float] | None = None
        self.nonfinite = False

    def poll(self) -> bool:
        if self._result is None and self._sum.advance():
            self._result, self.nonfinite = self._sum.result()
        return self._result is not None

    def wait(self) -> list[float]:
        if self._result is None:
            self._wait(self._sum)
            self._result, self.nonfinite = self._sum.result()
        return self._result


class LaneWork(Generic[T]):
    """A gather, a send or a receive under way."""

    def __init__(self, message: Gather | Sending | Receiving, wait: Wait) -> None:
        self._message, self._wait = message, wait

    def poll(self) -> bool:
        return self._message.advance()

    def wait(self) -> T:
        self._wait(self._message)
        return cast(T, self._message.result())


class TogetherWork:
    """Several works; the result is the list of their results."""

    def __init__(self, works: Sequence[Work[Any]]) -> None:
        self._works = works

    def poll(self) -> bool:
        done = [work.poll() for work in self._works]  # all of them: each poll may let a peer go on
        return all(done)

    def wait(self) -> list[Any]:
        return [work.wait() for work in self._works]
