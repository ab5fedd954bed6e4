"""Small kinds of :class:`~paceline.group.wire.Work`, for wires to build theirs from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from paceline.group.wire import Work

S = TypeVar("S")
T = TypeVar("T")


class Done(Generic[T]):
    """Nothing to wait for."""

    def __init__(self, value: T) -> None:
        self._value = value

    def poll(self) -> bool:
        return True

    def wait(self) -> T:
        return self._value


class Then(Generic[S, T]):
    """`work`, and when it is done, once, `finish` of its result."""

    def __init__(self, work: Work[S], finish: Callable[[S], T]) -> None:
        self._work, self._finish = work, finish
        self._value: list[T] = []

    def poll(self) -> bool:
        return bool(self._value) or self._work.poll()

    def wait(self) -> T:
        if not self._value:
            self._value.append(self._finish(self._work.wait()))
        return self._value[0]


class All:
    """Several works, done when all are. The result is the list of theirs."""

    def __init__(self, works: Sequence[Work[Any]]) -> None:
        self._works = works

    def poll(self) -> bool:
        polled = [work.poll() for work in self._works]  # every one: polling may be what moves it
        return all(polled)

    def wait(self) -> list[Any]:
        return [work.wait() for work in self._works]
