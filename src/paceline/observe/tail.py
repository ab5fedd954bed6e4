"""Reads the events files of a run while they grow, and makes the global values of what the ranks logged.

``job.log`` is never a collective: each rank writes its own mean and its own weight, and the mean over all ranks is made
here, ``sum(weight * value) / sum(weight)`` over the lines of one step. Lines may arrive in any order between files, a
line may still be half written, and a file may begin to exist at any time.

A number is shown for a step only when every rank has said its part of it, or has gone on without a word: who has not been read
yet is waited for. Where a fast logger's lines were merged (see ``merge``), ranks have lines of different lengths; then the lines
since the cut before are taken together that all of them have.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.observe.merge import weight_of
from paceline.observe.plain import number

_CHUNK = 1 << 20  # bytes read of one file in one poll; the launcher has other things to do
_STEPS = 1024  # steps of a name that are kept open for late lines
_PATIENCE = 2.0  # seconds that a rank is waited for, on the clock of the events
_KEPT = 1000  # events of a kind that are kept
_LISTED = ("start", "adopt", "fault", "notice", "export", "end")


Moment = tuple[int, int]
"""Epoch and step."""


@dataclass(frozen=True, slots=True)
class Ended:
    """An epoch that has ended on all ranks: its last step, and the newest global value of each name at that time."""

    epoch: int
    step: int
    values: dict[str, float]


class Values:
    """The global values of a run.

    Args:
        where: The directory of events files, or the files themselves.
        size: Number of ranks.
    """

    def __init__(self, where: Path | Iterable[Path], size: int) -> None:
        self.size = size
        self._where: Path | tuple[Path, ...] = where if isinstance(where, Path) else tuple(where)
        self._files: dict[Path, _File] = {}
        self._series: dict[str, _Series] = {}
        self._ranks: dict[str, _Rank] = {}
        self._wall = 0.0  # of the newest event
        self._steps: dict[int, int] = {}  # the last step of each epoch
        self._told = -1  # the epoch told last
        self._first: tuple[float, float, float] | None = None  # `step` events: when, steps, samples
        self._last: tuple[float, float, float] | None = None
        self.events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _LISTED}

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Events of kind ``fault`` so far, at most the first thousand."""
        return self.events["fault"]

    @property
    def notices(self) -> list[dict[str, Any]]:
        return self.events["notice"]

    @property
    def ends(self) -> list[dict[str, Any]]:
        return self.events["end"]

    def poll(self) -> bool:
        """Read what is new, at most a megabyte of each file. True when there may be more to read at once."""
        more = False
        for path in self._paths():
            file = self._files.setdefault(path, _File(path))
            for line in file.read():
                self._take(line)
            more = more or file.more
        return more

    def drain(self) -> None:
        """Read to the ends of the files; for when nobody writes any more."""
        while self.poll():
            pass

    def latest(self, alive: Collection[str] | None = None) -> dict[str, float]:
        """The newest global value of each name, in the order in which the names appeared.

        Args:
            alive: Names of the processes that take part; all that have written by default.
        """
        ranks = {name: rank for name, rank in self._ranks.items() if alive is None or name in alive}
        found = {name: series.latest(ranks, self._wall) for name, series in self._series.items()}
        return {name: value for name, value in found.items() if value is not None}

    def final(self) -> dict[str, float]:
        """The value of the last step that each name was logged in, when nobody writes any more."""
        return {name: series.mean(max(series.lines)) for name, series in self._series.items()}

    def ended(self, alive: Collection[str]) -> Ended | None:
        """The newest epoch that all who take part have left, if it was not told before."""
        inside = [r.epoch for name, r in self._ranks.items() if name in alive and not r.over and r.epoch >= 0]
        return self._tell(min(inside, default=0) - 1)

    def last_epoch(self) -> Ended | None:
        """The last epoch of a run that has come to its end, if there were several and it was not told before."""
        last = max((r.epoch for r in self._ranks.values()), default=0)
        return self._tell(last) if last > 0 else None

    @property
    def rate(self) -> tuple[float, float] | None:
        """Steps and samples a second, from the first step to the last; None where they are too close."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        seconds, steps, samples = (b - a for a, b in zip(self._first, self._last, strict=True))
        return steps / seconds, samples / seconds

    def _tell(self, epoch: int) -> Ended | None:
        if (
            epoch <= self._told or epoch not in self._steps
        ):  # a run that goes on from a checkpoint has not seen them all
            return None
        self._told = epoch
        known = {name: series.until(epoch) for name, series in self._series.items()}
        return Ended(epoch, self._steps[epoch], {name: value for name, value in known.items() if value is not None})

    def _paths(self) -> Iterable[Path]:
        if isinstance(self._where, Path) and not self._where.is_file():
            return sorted(self._where.glob("*.jsonl"))
        return (self._where,) if isinstance(self._where, Path) else self._where

    def _take(self, raw: bytes) -> None:
        try:
            event = json.loads(raw)
            kind, step = event["kind"], int(event["step"])
        except (ValueError, KeyError, TypeError):
            return  # torn by a kill, or not ours
        name, moment = str(event.get("name")), (int(number(event.get("epoch")) or 0), step)
        wall = number(event.get("wall")) or 0.0
        self._wall = max(self._wall, wall)
        rank = self._ranks.setdefault(name, _Rank())
        rank.newest = max(rank.newest, moment)
        rank.over = rank.over or kind in ("end", "fault")
        if kind in ("step", "log"):
            rank.epoch = moment[0]
            self._steps[moment[0]] = max(step, self._steps.get(moment[0], 0))
        if kind == "step":
            self._clock(event, step)
        if kind == "log":
            self._log(event, name, moment, wall)
        elif kind in self.events and len(self.events[kind]) < _KEPT:
            self.events[kind].append(event)

    def _clock(self, event: dict[str, Any], step: int) -> None:
        mono, samples = number(event.get("mono")), number(event.get("samples"))
        if mono is not None and samples is not None:
            self._first = min(self._first or (mono, step, samples), (mono, step, samples))
            self._last = max(self._last or (mono, step, samples), (mono, step, samples))

    def _log(self, event: dict[str, Any], source: str, moment: Moment, wall: float) -> None:
        values = event.get("values")
        for name, raw in values.items() if isinstance(values, dict) else ():
            value = number(raw)
            if value is not None:
                self._series.setdefault(name, _Series()).add(source, moment, value, weight_of(event), wall)


class _File:
    """One file, read from where the last reading ended; what follows the last newline waits for its rest."""

    def __init__(self, path: Path) -> None:
        self.more = False
        self._path = path
        self._offset = 0
        self._partial = b""

    def read(self) -> list[bytes]:
        self.more = False
        try:
            with self._path.open("rb", buffering=0) as stream:
                stream.seek(self._offset)
                chunk = stream.read(_CHUNK)
        except OSError:
            return []  # not there yet, or for a moment not readable: the next poll tries again
        self._offset += len(chunk)
        self.more = len(chunk) == _CHUNK
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        return lines


@dataclass
class _Sum:
    """A weighted mean under way. The plain mean stands by for lines whose weights are all 0."""

    total: float = 0.0
    weight: float = 0.0
    plain: float = 0.0
    lines: int = 0

    def add(self, value: float, weight: float) -> None:
        self.total += value * weight if weight else 0.0
        self.weight += weight
        self.plain += value
        self.lines += 1

    def join(self, other: _Sum) -> None:
        self.total += other.total
        self.weight += other.weight
        self.plain += other.plain
        self.lines += other.lines

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else self.plain / self.lines


@dataclass(slots=True)
class _Rank:
    """What was read of one process.

    Attributes:
        newest: The newest moment of any of its events.
        epoch: That it trains in; -1 before it does.
        over: It has said its last word.
    """

    newest: Moment = (0, 0)
    epoch: int = -1
    over: bool = False


@dataclass
class _Series:
    """One name.

    Attributes:
        lines: By the moment at which they end, then by process: its lines.
        walls: When the first line of a moment was written.
        newest, oldest: The last and the first moment of each process.
    """

    lines: dict[Moment, dict[str, _Sum]] = field(default_factory=dict)
    walls: dict[Moment, float] = field(default_factory=dict)
    newest: dict[str, Moment] = field(default_factory=dict)
    oldest: dict[str, Moment] = field(default_factory=dict)

    def add(self, source: str, moment: Moment, value: float, weight: float, wall: float) -> None:
        if moment not in self.lines and len(self.lines) >= _STEPS:
            first = next(iter(self.lines))  # the one opened first: the lowest but for late lines
            del self.lines[first], self.walls[first]
        self.lines.setdefault(moment, {}).setdefault(source, _Sum()).add(value, weight)
        self.walls.setdefault(moment, wall)
        self.newest[source] = max(moment, self.newest.get(source, moment))
        self.oldest.setdefault(source, moment)

    def latest(self, ranks: Mapping[str, _Rank], wall: float) -> float | None:
        """At the newest moment that all `ranks` have said their part of; `wall` is the time of the newest event of all."""
        for moment in sorted(self.lines, reverse=True):
            late = wall - self.walls[moment] > _PATIENCE
            if all(self._is_whole(moment, name, rank, late) for name, rank in ranks.items()):
                return self.mean(moment)
        return None

    def until(self, epoch: int) -> float | None:
        """At the last moment of an epoch that has ended, or before."""
        moments = [moment for moment in self.lines if moment[0] <= epoch]
        return self.mean(max(moments)) if moments else None

    def _is_whole(self, moment: Moment, name: str, rank: _Rank, late: bool) -> bool:
        """The process has said its part of `moment`, or goes on, or has ended, without one."""
        if name in self.lines[moment]:
            return True
        if self.newest.get(name, moment) > moment:  # its part is in a longer line
            return False
        return late or rank.over or rank.newest > moment

    def mean(self, moment: Moment) -> float:
        """The mean over all processes that have a line which ends at `moment`, since the cut before it that they share."""
        sources, total = self.lines[moment].keys(), _Sum()
        for there in sorted(self.lines, reverse=True):
            if there < moment and all(name in self.lines[there] or self.oldest[name] > there for name in sources):
                break
            for name in sources & self.lines[there].keys() if there <= moment else ():
                total.join(self.lines[there][name])
        return total.mean
