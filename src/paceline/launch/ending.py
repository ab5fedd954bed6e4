"""How a run ends. Pure: exits, signals and findings go in with their time, instructions come out.

A run ends by itself, because a rank failed, because a mistake was recognised, or because somebody asked for it. However it
ends, it does so in bounded steps, each harsher than the last:

1. *stopping*: asked to end at the next step boundary; no deadline for Ctrl-C, :data:`TERM_DEADLINE` for SIGTERM;
2. *aborting*: whoever waits stops waiting, and has :data:`WITNESS_GRACE` to say what it saw;
3. *terminating*: SIGTERM to the process groups of those who have not reacted, and :data:`TERM_GRACE` later
4. *killing*: SIGKILL. Ranks that have left their script are on their way out; their exit handlers, which may upload the last
   numbers, have :data:`FAREWELL_GRACE` since the abort, then they come to 3 as well.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from paceline.observe.failure import Record, code
from paceline.observe.hang import Finding
from paceline.observe.words import RANK, ranks, verb

WITNESS_GRACE = 1.0
FAREWELL_GRACE = 5.0
TERM_GRACE = 0.5
KEYBOARD_GRACE = 3.0  # for a KeyboardInterrupt to unwind a script that has no step boundary
TERM_DEADLINE = 10.0

OK, FAILED, REFUSED, LOST, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
"""Exit codes of ``paceline run``."""


class Stage(IntEnum):
    RUNNING = 0
    STOPPING = 1
    ABORTING = 2
    TERMINATING = 3
    KILLING = 4


@dataclass(frozen=True, slots=True)
class RequestStop:
    """Ask the ranks to end at their next step boundary."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Make whoever waits stop waiting; `lost` names the rank that ended, if one did."""

    lost: int = -1


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to every rank that lives: to its whole process group, or (`alone`) to the rank itself; not to those to `spare`."""

    number: int
    alone: bool = False
    spare: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the person at the terminal."""

    text: str


Action = RequestStop | Abort | Signal | Say


class Ending:
    """Decides what happens next. Every method returns what is to be done now, in order.

    Args:
        joined: The run was begun by another launcher, and goes on when this one ends.

    Attributes:
        stage: How far the end has come.
        asked: The signal that asked for it, or 0.
        interrupted: Scripts were interrupted before their loops. Whatever they fail with then is a consequence: code that is
            interrupted, an import above all, may raise anything.
    """

    def __init__(self, *, joined: bool = False) -> None:
        self._joined = joined
        self.stage = Stage.RUNNING
        self.asked = 0
        self.interrupted = False
        self.deadline: float | None = None
        self._last_farewell = 0.0
        self._spared: frozenset[int] = frozenset()

    @property
    def ours(self) -> bool:
        """What ends from now on ends because of us, so it is a witness and not a cause."""
        return self.interrupted or self.stage >= Stage.ABORTING

    def exited(self, rank: int, now: float, *, well: bool) -> list[Action]:
        """A rank has ended; `well`: with status 0, and its script had come to its end."""
        return [] if well or self.ours else self._abort(now, rank)

    def failed(self, rank: int, now: float) -> list[Action]:
        """A rank reports the exception that ended its script."""
        return [] if self.ours else self._abort(now, rank)

    def mistake(self, now: float) -> list[Action]:
        """Something was recognised that the run will never get out of."""
        return [] if self.ours else self._abort(now)

    def signalled(self, number: int, now: float, in_loop: bool) -> list[Action]:
        """The launcher got SIGINT, SIGTERM or SIGHUP. `in_loop`: some rank has adopted, so step boundaries will come."""
        self.asked = self.asked or number
        if self.stage == Stage.KILLING:
            return []
        if self.stage == Stage.TERMINATING:
            self._spared = frozenset()
            return self._kill()
        if self.stage == Stage.STOPPING:
            return [Say("stopping now; press again to kill"), Abort(), *self._terminate(now)]
        if self.stage == Stage.ABORTING:
            return self._terminate(now)
        return self._stop(now, number, in_loop)

    def tick(self, now: float, leaving: Collection[int] = ()) -> list[Action]:
        """Time has passed; the ranks `leaving` have ended their script, well or not, and are on their way out."""
        if self.deadline is None or now < self.deadline:
            return []
        if self.stage == Stage.STOPPING:
            return self._abort(now)
        if self.stage == Stage.ABORTING:
            return self._terminate(now, frozenset(leaving) if now < self._last_farewell else frozenset())
        return self._kill()

    def _stop(self, now: float, number: int, in_loop: bool) -> list[Action]:
        if self._joined:
            return [Say("leaving the run; the others go on"), *self._terminate(now)]
        if not in_loop:
            self.stage, self.deadline, self.interrupted = Stage.STOPPING, now + KEYBOARD_GRACE, True
            return [Say("stopping: no rank is in its loop yet"), RequestStop(), Signal(signal.SIGINT, alone=True)]
        self.stage = Stage.STOPPING
        if number == signal.SIGINT:
            return [Say("stopping at the next step; press again to stop now"), RequestStop()]
        self.deadline = now + TERM_DEADLINE
        return [Say(f"stopping at the next step, within {TERM_DEADLINE:.0f} s"), RequestStop()]

    def _abort(self, now: float, lost: int = -1) -> list[Action]:
        self.stage, self.deadline = Stage.ABORTING, now + WITNESS_GRACE
        self._last_farewell = now + FAREWELL_GRACE
        return [Abort(lost)]

    def _terminate(self, now: float, spare: frozenset[int] = frozenset()) -> list[Action]:
        self.stage, self.deadline, self._spared = Stage.TERMINATING, now + TERM_GRACE, spare
        return [Signal(signal.SIGTERM, spare=spare)]

    def _kill(self) -> list[Action]:
        """SIGKILL, but for those who were spared: they are waited for a little longer."""
        spare, self._spared = self._spared, frozenset()
        if spare:
            self.stage, self.deadline = Stage.ABORTING, self._last_farewell
        else:
            self.stage, self.deadline = Stage.KILLING, None
        return [Signal(signal.SIGKILL, spare=spare)]


# ---- what it was ----------------------------------------------------------------------------------------------------
_WITNESSES = ("PL403", "PL404")
_ECHOES = ("PL406",)  # a collective library that complains as it does when a peer dies


def cause(failures: Sequence[Record]) -> Record | None:
    """The earliest failure that is not the consequence of another."""
    ordered = sorted(failures, key=lambda f: float(f.get("mono", 0.0)))
    own = [f for f in ordered if not f.get("witness") and code(f) not in _WITNESSES]
    real = [f for f in own if code(f) not in _ECHOES] or own
    return next(iter(real or ordered), None)


def exit_code(asked: int, mistake: Finding | None, failures: Sequence[Record]) -> int:
    """What ``paceline run`` returns: who asked for the end, or else what the cause was."""
    if asked:
        return INTERRUPTED if asked == signal.SIGINT else TERMINATED
    if mistake is not None:
        return MISTAKE
    first = cause(failures)
    if first is None:
        return OK
    return LOST if "signal" in first or first.get("exit") == 0 else FAILED


def left_early(gone: Sequence[int], failures: Sequence[Record], noun: str = RANK) -> Finding | None:
    """PL501 when the ranks in `gone` have ended their script well, and the only failures are of ranks that missed them."""
    own = [f for f in failures if not f.get("witness")]
    if not gone or not own or any(code(f) not in _WITNESSES for f in own):
        return None
    waited = [int(f["rank"]) for f in own]
    message = (
        f"{ranks(gone, noun)} ended {verb(gone, 'its script', 'their scripts')}, and {ranks(waited, noun)} still "
        f"{verb(waited, 'waits', 'wait')} for {verb(gone, 'it', 'them')}"
    )
    lines = [f"{noun} {f['rank']}{_where(f)}: {f['message']}" for f in own]
    return Finding("PL501", message, tuple(lines), fatal=True)


def _where(failure: Record) -> str:
    own = [frame for frame in failure.get("frames") or [] if frame.get("user")]
    return f" at {own[-1]['file']}:{own[-1]['line']}" if own else ""


def differing(hashes: Mapping[int, str], noun: str = RANK) -> Finding | None:
    """PL507 when ranks ended with different parameters."""
    groups: dict[str, list[int]] = {}
    for rank, value in sorted(hashes.items()):
        groups.setdefault(value, []).append(rank)
    if len(groups) < 2:
        return None
    told = "; ".join(f"{ranks(group, noun)}: {value[:12]}" for value, group in groups.items())
    return Finding("PL507", f"the hashes of the parameters are {told}", fatal=True)
