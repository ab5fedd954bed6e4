"""Two copies of one server, so that what was acknowledged outlives either of them: events in, instructions out. Pure.

Chain replication with two links (van Renesse and Schneider, OSDI 2004), of a state machine (Schneider 1990): what a server does
follows from what it hears, in which order. The *first* copy decides the order. It numbers what it hears, tells the *second* copy
before it does anything, and both carry it out. What the first one has to say to others is held back until the second one has
carried out all that it follows from. Hence

* what anybody was told is known to both copies, and the second one could have said it;
* what a worker pushed lies in memory that the worker writes to only when it was told to go on: then both have read it.

When the first copy is gone the second one answers in its place. It says again what may not have been heard (``server_numbered``).
A copy that is left alone makes do, and gives its state to the next second one, between two records; all that follows from later
ones is held back until the new copy is there, so that from its first moment on it may take over. A copy that loses the other one before it has
the state ends: nobody has it then.

That the other copy is gone must be certain (``Lost``): not that it is silent, or a connection has ended, but that its process has.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias


# ---- events ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Heard:
    """Something came from outside: who said it, and what."""

    source: str
    message: Any


@dataclass(frozen=True, slots=True)
class Asked:
    """A new copy asks for the state."""


@dataclass(frozen=True, slots=True)
class Given:
    """The state has come, and is in place: as of after this record."""

    number: int


@dataclass(frozen=True, slots=True)
class Record:
    """The first copy tells the second one what it has heard.

    Attributes:
        number: Counts from 1.
        released: What follows from records up to this one was said.
    """

    number: int
    source: str
    message: Any
    released: int


@dataclass(frozen=True, slots=True)
class Acked:
    """The second copy has carried out all records up to this one."""

    number: int


@dataclass(frozen=True, slots=True)
class Lost:
    """The other copy's process has ended."""


Event: TypeAlias = Heard | Asked | Given | Record | Acked | Lost


# ---- instructions ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Forward:
    """Send this to the second copy, and make sure that it would arrive though this process died now."""

    record: Record


@dataclass(frozen=True, slots=True)
class Carry:
    """Do what is to be done about it. What is to be said thereupon bears this number, and waits."""

    number: int
    source: str
    message: Any


@dataclass(frozen=True, slots=True)
class Release:
    """Say what bears a number up to this one."""

    number: int


@dataclass(frozen=True, slots=True)
class Forget:
    """What bears a number up to this one was said by the first copy."""

    number: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Tell the first copy that this is carried out."""

    number: int


@dataclass(frozen=True, slots=True)
class Give:
    """Send the state as it is now, after this record."""

    number: int


@dataclass(frozen=True, slots=True)
class Begin:
    """From now on this copy answers."""


@dataclass(frozen=True, slots=True)
class End:
    """This copy can do nothing: nobody has the state."""


Instruction: TypeAlias = Forward | Carry | Release | Forget | Ack | Give | Begin | End


class Role(Enum):
    """What a copy is."""

    ALONE = "alone"
    FIRST = "first"
    SECOND = "second"
    JOINING = "joining"


class Copy:
    """One of the two.

    Args:
        joins: Another one has the state.

    Attributes:
        role: What it is now.
        number: Of the last record.
        released: What follows from records up to this one was said, as far as this copy knows.

    >>> first, second = Copy(), Copy(joins=True)
    >>> first.handle(Asked()), second.handle(Given(0))
    ([Give(number=0)], [Ack(number=0)])
    >>> first.handle(Heard("worker-0", "push"))[-1], first.handle(Acked(1))
    (Carry(number=1, source='worker-0', message='push'), [Release(number=1)])
    """

    def __init__(self, *, joins: bool = False) -> None:
        self.role = Role.JOINING if joins else Role.ALONE
        self.number = self.released = 0

    @property
    def answers(self) -> bool:
        """It hears what comes from outside; the other one, if there is one, hears of it."""
        return self.role in (Role.ALONE, Role.FIRST)

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event; what is to be done now, in this order."""
        match event:
            case Heard():
                assert self.answers, "the second copy hears nothing by itself"
                return self._heard(event)
            case Asked():
                assert self.role is Role.ALONE, "there are two copies"
                self.role = Role.FIRST
                return [Give(self.number)]
            case Given(number):
                self.role, self.number, self.released = Role.SECOND, number, number
                return [Ack(number)]
            case Record():
                return self._carry(event)
            case Acked(number):
                return self._release(number) if self.role is Role.FIRST and number > self.released else []
            case Lost():
                return self._alone()

    def _heard(self, heard: Heard) -> list[Instruction]:
        self.number += 1
        carry = Carry(self.number, heard.source, heard.message)
        if self.role is Role.FIRST:
            return [Forward(Record(self.number, heard.source, heard.message, self.released)), carry]
        return [carry, *self._release(self.number)]

    def _carry(self, record: Record) -> list[Instruction]:
        assert self.role is Role.SECOND, "records are for the second copy"
        assert record.number == self.number + 1, "records come in order"
        self.number, self.released = record.number, record.released
        carry = Carry(record.number, record.source, record.message)
        return [carry, Ack(record.number), Forget(record.released)]

    def _release(self, number: int) -> list[Instruction]:
        self.released = number
        return [Release(number)]

    def _alone(self) -> list[Instruction]:
        before, self.role = self.role, Role.ALONE
        match before:
            case Role.JOINING:
                return [End()]
            case Role.SECOND:
                return [Begin(), *self._release(self.number)]
            case Role.FIRST:
                return self._release(self.number)
        return []
