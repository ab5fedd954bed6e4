"""Reads the events files of a run while they grow, and makes the global values of what the ranks logged.

``job.log`` is never a collective: each rank writes its own mean and its own weight, and the mean over all ranks is made
here, ``sum(weight * value) / sum(weight)`` over the lines of one step. Lines may arrive in any order between files, a
line may still be half written, and a file may begin to exist at any time.

Which step is shown: the newest one that every rank still logging has reached, so that a value is not the mean of
whoever was first. Where a fast logger's lines were merged (``count``), the lines of as many steps are taken together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.observe.merge import weight_of
from paceline.observe.plain import number

_CHUNK = 1 << 20  # bytes read of one file in one poll; the launcher has other things to do
_STEPS = 1024  # steps of a name that are kept open for late lines
_RECENT = 2.0  # seconds after which a rank that no longer logs a name is not waited for
_KEPT = 1000  # events of a kind that are kept
_LISTED = ("start", "adopt", "fault", "notice", "export", "end")


@dataclass(frozen=True, slots=True)
class Summary:
    """One logged name over the run: global means at single steps, and how many steps had one."""

    first: float
    last: float
    lowest: float
    highest: float
    lowest_step: int
    highest_step: int
    steps: int


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

    def latest(self) -> dict[str, float]:
        """The newest global value of each name, in the order in which the names appeared."""
        return {name: series.latest() for name, series in self._series.items()}

    def summary(self) -> dict[str, Summary]:
        """All names over the whole run. Meant for its end: the last value is that of the last step logged."""
        return {name: series.summary() for name, series in self._series.items()}

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
        if kind == "log":
            self._log(event, step)
        elif kind in self.events and len(self.events[kind]) < _KEPT:
            self.events[kind].append(event)

    def _log(self, event: dict[str, Any], step: int) -> None:
        values = event.get("values")
        wall = number(event.get("wall")) or 0.0
        count = int(number(event.get("count")) or 1)
        for name, raw in values.items() if isinstance(values, dict) else ():
            value = number(raw)
            if value is not None:
                series = self._series.setdefault(name, _Series())
                series.add(str(event.get("name")), step, value, weight_of(event), wall, count)


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


@dataclass
class _Series:
    """One name: open steps, the newest step of each rank, and what is known of the steps already closed."""

    open: dict[int, _Sum] = field(default_factory=dict)
    newest: dict[str, tuple[int, float]] = field(default_factory=dict)
    span: int = 1
    closed: Summary | None = None

    def add(self, source: str, step: int, value: float, weight: float, wall: float, count: int) -> None:
        if step not in self.open:
            self._make_room()
        self.open.setdefault(step, _Sum()).add(value, weight)
        self.newest[source] = max((step, wall), self.newest.get(source, (step, wall)))
        self.span = count

    def latest(self) -> float:
        now = max(wall for _, wall in self.newest.values())
        reached = min(step for step, wall in self.newest.values() if wall >= now - _RECENT)
        steps = sorted(step for step in self.open if step <= reached) or sorted(self.open)[:1]
        taken = _Sum()
        for step in steps:
            if step > steps[-1] - self.span:
                taken.join(self.open[step])
        return taken.mean

    def summary(self) -> Summary:
        known = self.closed
        for step in sorted(self.open):
            known = _extended(known, step, self.open[step].mean)
        assert known is not None
        return known

    def _make_room(self) -> None:
        while len(self.open) >= _STEPS:
            step = next(iter(self.open))  # the one opened first: the lowest but for late lines
            self.closed = _extended(self.closed, step, self.open.pop(step).mean)


def _extended(known: Summary | None, step: int, mean: float) -> Summary:
    """The summary with one step more. NaN is neither lowest nor highest, but may be the last."""
    if known is None:
        return Summary(mean, mean, mean, mean, step, step, 1)
    lower = mean < known.lowest or math.isnan(known.lowest)
    higher = mean > known.highest or math.isnan(known.highest)
    return Summary(
        first=known.first,
        last=mean,
        lowest=mean if lower else known.lowest,
        highest=mean if higher else known.highest,
        lowest_step=step if lower else known.lowest_step,
        highest_step=step if higher else known.highest_step,
        steps=known.steps + 1,
    )
