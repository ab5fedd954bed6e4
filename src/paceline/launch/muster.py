"""Who takes part in an elastic run, and what follows from a loss. Pure: events go in with their time, instructions come out.

A worker is *starting* until it takes part in a step for the first time; from then on it is a *member*. In the end it has
*finished*, has *left* because it was asked to, or is *lost*. When one is lost

1. it is said, in one line, what has happened and what is done;
2. a replacement is started, with a number that was never used before: at most :data:`BURST` at once, and one every
   :data:`REFILL` seconds after that, so that workers which die as they are started do not keep the machine busy;
3. after :data:`UNBORN` replacements in a row that were lost before they took part no more are started.

Where a replica is split over several workers they come and go together: numbers 0 to `unit` - 1 are one replica, the next `unit` another.
When one of them is lost the rest of its replica is ended, and a whole one takes its place.

(That it is dead the coordinator is told before all this: the others wait.) The run is given up when nobody is left who knows its state, or when there are too few and no more are started.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from paceline.observe.words import duration

MOST_WORKERS = 62
"""Bits of a mask on the board, in which each worker has a page."""

BLOCK = 100_000
"""Numbers that a launcher has: more than it will ever start."""

BURST = 5
REFILL = 6.0
UNBORN = 5
DISMISS_GRACE = 0.5


class Standing(Enum):
    STARTING = "is starting"
    MEMBER = "takes part"
    FINISHED = "has finished"
    LEFT = "has left"
    LOST = "was lost"


@dataclass(frozen=True, slots=True)
class Start:
    """Start the worker of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """End these workers, who are of no use any more: politely, or (`now`) with SIGKILL."""

    numbers: frozenset[int]
    now: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run cannot go on, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the person at the terminal."""

    text: str


Step = Start | Dismiss | GiveUp | Tell


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of a loss.

    Attributes:
        what: ``was killed by SIGKILL``.
        rank: The last rank of the worker.
        step: Optimizer steps that the run has applied.
    """

    what: str
    rank: int
    step: int


class Muster:
    """Keeps the list. Every method returns what is to be done now, in order.

    Args:
        members: Numbers of the workers that the run begins with, one after another.
        minimum, maximum: How many there must and may be.
        joins: The run was begun elsewhere, so those here are still starting.
        unit: How many workers hold one replica of the model.

    Attributes:
        elsewhere: Members that other launchers have started.
        room: How many more may be started.
    """

    def __init__(
        self, members: Iterable[int], minimum: int, maximum: int, *, joins: bool = False, unit: int = 1
    ) -> None:
        self._unit = unit
        self._standing = dict.fromkeys(members, Standing.STARTING if joins else Standing.MEMBER)
        self._next = max(self._standing, default=-1) + 1
        self._minimum, self._maximum = minimum, maximum
        self._block = 0
        self._owed = 0  # replacements that are to be started
        self._tokens, self._refilled = float(BURST), 0.0
        self._unborn = 0
        self._kill_at: float | None = None
        self.elsewhere = int(joins)

    def standing(self, number: int) -> Standing:
        return self._standing[number]

    def _all(self, standing: Standing) -> list[int]:
        return [number for number, s in self._standing.items() if s is standing]

    @property
    def room(self) -> int:
        living = len(self._all(Standing.MEMBER)) + len(self._all(Standing.STARTING)) + self.elsewhere
        return max(0, self._maximum - living - self._owed)

    # -- what happens
    def joined(self, number: int) -> list[Step]:
        """A worker takes part."""
        if self._standing[number] is not Standing.STARTING:
            return []
        self._standing[number] = Standing.MEMBER
        self._unborn = 0
        return [Tell(f"worker-{number} takes part; {_workers(len(self._all(Standing.MEMBER)) + self.elsewhere)}")]

    def left(self, number: int, now: float) -> list[Step]:
        """A worker was asked to leave, and does; the others have agreed to go on without it."""
        self._standing[number] = Standing.LEFT
        mates = self._break_up(number)
        ended = [Dismiss(frozenset(mates), now=True)] if mates else []
        return [*ended, Tell(f"worker-{number} leaves the run"), *self._dismiss(now)]

    def finished(self, number: int, now: float) -> list[Step]:
        """A worker has ended its script well. Who never took part is not needed when the last member has."""
        if self._standing[number] is not Standing.LEFT:
            self._standing[number] = Standing.FINISHED
            self._owed = 0
        return self._dismiss(now)

    def lend(self) -> int:
        """The first of :data:`BLOCK` numbers for another launcher; none of them is used here."""
        first = self._block = self._block + BLOCK
        return first

    def add(self, count: int) -> list[Start]:
        """Start so many more. `count` is not above :attr:`room`."""
        return [self._start() for _ in range(count)]

    def lost(self, number: int, loss: Loss, now: float, *, replace: bool = True) -> list[Step]:
        """A worker was lost; `replace` it unless the run is being stopped."""
        before, self._standing[number] = self._standing[number], Standing.LOST
        starting = before is Standing.STARTING
        if before is Standing.LOST or (starting and self._kill_at is not None):
            return []  # it was dismissed
        self._unborn += starting
        mates = self._break_up(number)
        who = f"worker-{number}" + ("" if starting else f" (rank {loss.rank})")
        said = [f"{who} {loss.what}" + (" before it took part" if starting else "")]
        if mates:
            names = ", ".join(f"worker-{mate}" for mate in mates)
            said += [f"{names} of the same replica {'is' if len(mates) == 1 else 'are'} ended"]
        members = len(self._all(Standing.MEMBER)) + self.elsewhere
        ending = bool(self._all(Standing.FINISHED))
        if not starting:
            said += [self._what_is_left(members, loss.step, ending)]
        given_up: list[Step] = []
        starts: list[Start] = []
        if not members and not ending:
            given_up = [GiveUp("no worker is left that has the state of the run")]
        elif replace and not ending and before is not Standing.LEFT:
            self._owed += self._unit
            starts, text = self._replace(now)
            said += [text]
            if self._unborn >= UNBORN and members < self._minimum:
                given_up = [GiveUp(f"{_workers(members)} of at least {self._minimum}, and no more can be started")]
        ended = [Dismiss(frozenset(mates), now=True)] if mates else []
        return [*ended, *starts, Tell("; ".join(said)), *given_up, *self._dismiss(now)]

    def _break_up(self, number: int) -> list[int]:
        """The others of its replica, which are of no use without it."""
        first = number - number % self._unit
        living = (Standing.STARTING, Standing.MEMBER)
        mates = [n for n in range(first, first + self._unit) if self._standing.get(n) in living]
        self._standing.update(dict.fromkeys(mates, Standing.LOST))
        return mates

    def mates(self, number: int) -> list[int]:
        """The others of its replica, in whatever standing."""
        first = number - number % self._unit
        return [n for n in range(first, first + self._unit) if n != number and n in self._standing]

    def tick(self, now: float) -> list[Step]:
        """Time has passed."""
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = float("inf")
            return [Dismiss(frozenset(self._all(Standing.STARTING)), now=True)]
        if not self._owed:
            return []
        starts, text = self._replace(now)
        return [*starts, Tell(text)] if starts else []

    # -- what is done
    def _start(self) -> Start:
        number, self._next = self._next, self._next + 1
        self._standing[number] = Standing.STARTING
        return Start(number)

    def _replace(self, now: float) -> tuple[list[Start], str]:
        """As many replacements as the budget allows, and half a sentence about it."""
        if self._unborn >= UNBORN:
            self._owed = 0
            return [], f"no more are started, because {UNBORN} in a row were lost before they took part"
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) / REFILL)
        self._refilled = now
        starts = []
        while self._owed and self._tokens >= 1.0:
            self._owed, self._tokens = self._owed - self._unit, self._tokens - 1.0
            starts += [self._start() for _ in range(self._unit)]
        if starts:
            names = ", ".join(f"worker-{start.number}" for start in starts)
            return starts, f"{names} {'is' if len(starts) == 1 else 'are'} being started"
        return [], f"another is started in {duration((1.0 - self._tokens) * REFILL)}"

    def _what_is_left(self, members: int, step: int, ending: bool) -> str:
        if ending:
            return "the run is at its end"
        if not members:
            return "no worker is left"
        if members < self._minimum:
            return f"{_workers(members)} of at least {self._minimum} {_verb(members)} left, so the run waits"
        return f"{_workers(members)} {'goes' if members == 1 else 'go'} on from step {step}"

    def _dismiss(self, now: float) -> list[Step]:
        """When the members have come to their end, those who are still starting are not needed any more."""
        starting = frozenset(self._all(Standing.STARTING))
        if not starting or self._kill_at is not None or not self._over:
            return []
        self._kill_at = now + DISMISS_GRACE
        return [Dismiss(starting)]

    @property
    def _over(self) -> bool:
        return bool(self._all(Standing.FINISHED)) and not self._all(Standing.MEMBER)


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _verb(count: int) -> str:
    return "is" if count == 1 else "are"
