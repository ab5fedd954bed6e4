"""Sees that a run will not go on, and says why, long before a timeout fires. Pure: the time is an argument.

The launcher shows :class:`Watch` what the board says, some ten times a second. A rank *moves* when anything of its page
changes but the heartbeat: phase, operation, step, whom it waits for. Rules, the most certain first; one finding a stall:

* PL501, fatal: a rank has ended its script while others wait for it.
* PL505, fatal: all ranks wait, for each other, in different operations.
* PL506: ranks wait for their next batch, and all others wait for these.
* PL504: nothing moves, for any other reason; the table says who waits for whom, and where.

**What is fatal must be certain.** A process that is stopped (SIGSTOP, a debugger, a frozen container) looks as if it
waited although its answer has arrived. So a fatal rule needs a heartbeat of every rank concerned that is *younger*
than the situation: the process ran, and still could not go on. For the same reason a stall is counted in examinations,
each worth at most half a second, and not in the difference of two clock readings.

**Ranks that regroup are no hang.** While members of an elastic run agree on who takes part, some wait for one that is gone
and others for the agreement: nothing is fatal then, and pauses are long.

**What is slow is no hang.** Nothing is said before ``max(10 s, 20 times the median step)`` without any movement, and not
before a minute where long pauses are ordinary: while the duration of a step is not known, inside ``torch.compile``, while
ranks regroup, and while no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.observe.pace import Pace, Straggler, Stragglers
from paceline.observe.words import COMPILING, RANK, doing, duration, kind, place, ranks, spans, verb
from paceline.terms.activity import REGROUP, Phase, Snapshot
from paceline.terms.errors import EXPLANATIONS

__all__ = ["Finding", "Straggler", "Watch"]

_ENDED_WAIT = 0.3  # seconds that a rank waits for one that has ended; or a step, whose last bytes may still travel
_CROSSED_WAIT = 1.0  # seconds that ranks wait in different operations, once the duration of a step is known
_CROSSED_EARLY = 10.0  # the same before that: the model's parameters may be travelling over a slow network
_QUIET = 10.0
_QUIET_LONG = 60.0
_STEPS = 20  # median steps without movement
_SILENT = 3.0  # seconds after which a heartbeat is missing
_GAP = 0.5  # seconds that one examination may count for
_TABLE = 16  # lines of a table


@dataclass(frozen=True, slots=True)
class Finding:
    """What the watch recognised. ``fatal``: the run cannot go on and should be ended."""

    code: str
    message: str
    lines: tuple[str, ...] = ()
    fatal: bool = False

    def render(self) -> list[str]:
        """Lines for people."""
        head = f"{'error' if self.fatal else 'warning'}[{self.code}]: {self.message}"
        return [head, *(f"  {line}" for line in self.lines), f"  help: {EXPLANATIONS[self.code].help}"]


@dataclass(slots=True)
class _Track:
    """One rank: what its page said last, since when it says so, and the seconds of it that were watched."""

    mark: tuple[object, ...]
    since: float
    still: float = 0.0


class Watch:
    """Remembers what it was shown; see the module for its rules.

    Args:
        after: Seconds without movement after which PL504 and PL506 speak, instead of 10 and 60; 20 times the median
            step holds nevertheless.

    Attributes:
        noun: What the numbers of the snapshots are called, see ``words``.
    """

    def __init__(self, *, after: float | None) -> None:
        self.noun = RANK
        self._after = after
        self._pace = Pace()
        self._stragglers = Stragglers()
        self._tracks: dict[int, _Track] = {}
        self._last: float | None = None
        self._said: dict[str, tuple[object, ...]] = {}

    def examine(
        self, snapshots: Sequence[Snapshot], exited: Mapping[int, int], now: float, *, settled: bool = True
    ) -> list[Finding]:
        """What is recognised now and was not said before in this stall.

        Args:
            snapshots: One for each rank that takes part, or has taken part to its end.
            exited: Exit status of those whose process has ended.
            now: Seconds on the clock of the snapshots.
            settled: False from a loss until those that are left have agreed on what follows from it.
        """
        self._follow(snapshots, exited, now)
        if any(status != 0 for status in exited.values()) or any(s.phase is Phase.FAILED for s in snapshots):
            return []  # what follows a failure is the launcher's to tell
        ended = [s for s in snapshots if exited.get(s.rank) == 0 or s.phase is Phase.FINISHED]
        live = [s for s in snapshots if s not in ended]
        settled = settled and not any(_regroups(s) for s in live)
        finding = self._ended(ended, live, now) or self._crossed(live, now) if settled else None
        finding = finding or self._still(live, now, settled)
        return [finding] if finding is not None and self._is_news(finding, snapshots) else []

    def stragglers(self) -> list[Straggler]:
        """Ranks that were found to hold up the others since the last call; each is named once, until it recovers."""
        return self._stragglers.news()

    @property
    def median_step(self) -> float | None:
        """Seconds of a step, or None before the second step."""
        return self._pace.median

    # -- what is followed
    def _follow(self, snapshots: Sequence[Snapshot], exited: Mapping[int, int], now: float) -> None:
        passed = min(now - self._last, _GAP) if self._last is not None else 0.0
        self._last = now
        for s in snapshots:
            mark = (
                s.phase,
                s.since,
                s.step,
                s.epoch,
                s.rows,
                s.operation,
                s.what,
                s.waits_for,
                s.adopted,
                exited.get(s.rank),
            )
            track = self._tracks.get(s.rank)
            if track is None or track.mark != mark:
                self._tracks[s.rank] = _Track(mark, now)
            else:
                track.still += passed
        self._pace.see(max((s.step for s in snapshots), default=0), now)
        self._stragglers.see(snapshots, now)

    def _is_news(self, finding: Finding, snapshots: Sequence[Snapshot]) -> bool:
        """A finding is repeated only after something has moved."""
        marks = tuple(self._tracks[s.rank].mark for s in snapshots)
        if self._said.get(finding.code) == marks:
            return False
        self._said[finding.code] = marks
        return True

    def _still_for(self, snapshots: Sequence[Snapshot]) -> float:
        return min((self._tracks[s.rank].still for s in snapshots), default=0.0)

    def _awake(self, concerned: Sequence[Snapshot], others: Sequence[Snapshot] = ()) -> bool:
        """Every rank concerned has beaten since the whole situation came about. A rank that never beats is believed."""
        begun = max(self._tracks[s.rank].since for s in (*concerned, *others))
        return all(s.beat == 0 or s.beat > begun for s in concerned)

    # -- the rules
    def _ended(self, ended: Sequence[Snapshot], live: Sequence[Snapshot], now: float) -> Finding | None:
        gone = {s.rank for s in ended}
        patience = max(_ENDED_WAIT, self._pace.median or 0.0)
        all_wait = all(s.phase is Phase.WAIT for s in live)
        waiting = [
            s
            for s in live
            if s.phase is Phase.WAIT
            and (gone & set(s.waits_for) or (all_wait and not s.waits_for))
            and self._tracks[s.rank].still >= patience
        ]
        if not gone or not waiting or self._still_for(ended) < patience or not self._awake(waiting, ended):
            return None
        steps = spans(s.step for s in ended)
        message = (
            f"{ranks(gone, self.noun)} ended {verb(gone, 'its', 'their')} script after step {steps}, and "
            f"{ranks(_numbers(waiting), self.noun)} {verb(_numbers(waiting), 'waits', 'wait')} for "
            f"{verb(gone, 'it', 'them')} in {_operations(waiting)}"
        )
        return Finding("PL501", message, _table([*ended, *live], now, self.noun), fatal=True)

    def _crossed(self, live: Sequence[Snapshot], now: float) -> Finding | None:
        kinds = _by_kind(live)
        patience = _CROSSED_EARLY if self._pace.median is None else max(_CROSSED_WAIT, 2 * self._pace.median)
        stuck = len(kinds) > 1 and all(s.phase is Phase.WAIT and s.what for s in live)
        if not stuck or self._still_for(live) < patience or not self._awake(live):
            return None
        message = f"{self.noun}s wait for each other in different operations: " + ", ".join(
            f"{ranks(_numbers(group), self.noun)} in `{group[0].what}`" for group in kinds.values()
        )
        return Finding("PL505", message, (*_table(live, now, self.noun), _why_crossed(kinds, self.noun)), fatal=True)

    def _still(self, live: Sequence[Snapshot], now: float, settled: bool) -> Finding | None:
        still = self._still_for(live)
        if not live or still < self._patience(live, settled):
            return None
        reading = [s for s in live if s.phase is Phase.INPUT]
        if reading and all(s.phase in (Phase.INPUT, Phase.WAIT) for s in live):
            who = _numbers(reading)
            message = (
                f"the data {verb(who, 'loader', 'loaders')} of {ranks(who, self.noun)} {verb(who, 'has', 'have')} given no batch "
                f"for {duration(still)}" + (", and all others wait" if len(reading) < len(live) else "")
            )
            return Finding("PL506", message, _table(live, now, self.noun))
        message = f"nothing has moved for {duration(still)}"
        if self._pace.median is not None:
            message += f" (a step takes {duration(self._pace.median)})"
        return Finding("PL504", message, (*_table(live, now, self.noun), *_why_still(live, now, self.noun)))

    def _patience(self, live: Sequence[Snapshot], settled: bool) -> float:
        ordinary = not settled or self._pace.median is None or any(COMPILING in s.where for s in live)
        nobody_waits = all(s.phase in (Phase.COMPUTE, Phase.STARTING) for s in live)
        quiet = _QUIET_LONG if ordinary or nobody_waits else _QUIET
        return max(self._after if self._after is not None else quiet, _STEPS * (self._pace.median or 0.0))


def _numbers(snapshots: Sequence[Snapshot]) -> list[int]:
    return [s.rank for s in snapshots]


def _by_kind(snapshots: Sequence[Snapshot]) -> dict[str, list[Snapshot]]:
    groups: dict[str, list[Snapshot]] = {}
    for s in snapshots:
        groups.setdefault(kind(s.what), []).append(s)
    return groups


def _regroups(snapshot: Snapshot) -> bool:
    return snapshot.phase is Phase.WAIT and kind(snapshot.what) == REGROUP


def _operations(snapshots: Sequence[Snapshot]) -> str:
    names = list(dict.fromkeys(f"`{s.what}`" for s in snapshots if s.what))
    return ", ".join(names[:4]) or "an exchange"


def _table(snapshots: Sequence[Snapshot], now: float, noun: str) -> tuple[str, ...]:
    """One line for each rank; ranks that do the same at the same place share one."""
    groups: dict[tuple[object, ...], list[Snapshot]] = {}
    for s in sorted(snapshots, key=lambda s: s.rank):
        alone = s.phase is not Phase.WAIT or _is_silent(s, now)
        key = (s.rank,) if alone else (s.phase, kind(s.what), s.where, s.step)
        groups.setdefault(key, []).append(s)
    rows = [(ranks(_numbers(group), noun), group) for group in groups.values()]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [
        f"{name:<{width}}  {doing(group[0], now, len(group) > 1, noun)}{_beat(group[0], now)}"
        for name, group in rows[:_TABLE]
    ]
    return tuple(lines) + ((f"and {len(rows) - _TABLE} more",) if len(rows) > _TABLE else ())


def _beat(snapshot: Snapshot, now: float) -> str:
    silent = _is_silent(snapshot, now)
    return f" · no heartbeat for {duration(now - snapshot.beat)}" if silent else ""


def _is_silent(snapshot: Snapshot, now: float) -> bool:
    return snapshot.phase not in (Phase.FINISHED, Phase.FAILED) and 0 < snapshot.beat < now - _SILENT


def _why_crossed(kinds: dict[str, list[Snapshot]], noun: str) -> str:
    """The classic mistakes, by who is alone with which operation."""
    backward = kinds.get("backward")
    if backward is None:
        return "likely cause: a collective call under a condition that differs between ranks, such as `if rank == 0`"
    elsewhere = [s for name, group in kinds.items() if name != "backward" for s in group]
    there, here = ranks(_numbers(elsewhere), noun), ranks(_numbers(backward), noun)
    reached = f"{there} reached {_operations(elsewhere)}, {here} did not"
    if len(elsewhere) <= len(backward):
        return f"likely cause: {reached}: a collective call under `if rank == 0`"
    return f"likely cause: {reached}: loops of different length"


def _why_still(live: Sequence[Snapshot], now: float, noun: str) -> tuple[str, ...]:
    """The likely cause, from who does not wait."""
    silent = [s.rank for s in live if _is_silent(s, now)]
    if silent:
        return (
            f"likely cause: {ranks(silent, noun)} {verb(silent, 'does', 'do')} not respond: stopped (SIGSTOP, a debugger), "
            "or in C code that holds the interpreter",
        )
    busy = [s for s in live if s.phase is not Phase.WAIT]
    if not busy and any(map(_regroups, live)):
        return ("likely cause: those that take part cannot agree on who is left; `logs/coordinator.log` may say why",)
    if not busy:
        return ("likely cause: the transport; all ranks wait, and none has anything left to do",)
    if len(busy) < len(live):
        places = ", ".join(dict.fromkeys(filter(None, map(place, busy))))
        at = f" at {places}" if places else ""
        return (f"likely cause: {ranks(_numbers(busy), noun)}, on whom the others wait{at}",)
    return ("no rank waits for another: a long computation, or a loop that does not end",)
