"""What the screen shows, as lines of styled text for a given width and height. Pure; the terminal is not its business.

A header with the progress and the newest values, then one line for each rank:

    step 1200 · epoch 3 · 5310 samples/s · 12 ms/step · loss 0.3121
    rank 0    ██████████████▒▒▒▒░░░░  computes                    train.py:31 in train
    ranks 1-3 █████████░░░░░░░░░░░░░  waits for rank 0: backward   train.py:31 in train

The bar divides the last two seconds: computing, exchanging, waiting, reading input. From 16 ranks on, and where the
window is too low for a line each, ranks that do the same share a line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.observe.pace import Spent, spent
from paceline.observe.words import RANK, duration, kind, ranks
from paceline.terms.activity import TIMED, Phase, Snapshot

Strip = tuple[tuple[str, str], ...]
"""One line: pieces of text, each with the name of a style."""

FOLD_FROM = 16  # ranks from which they share lines
_WINDOW = 2.0
_STALLED = 4  # times the duration of a step after which a rate is not said any more
_MOST_GROUPS = 12
_LONG = 0.5  # seconds that a rank waits before the line says for whom; a shorter wait would only flicker

STYLES = {Phase.COMPUTE: "green", Phase.EXCHANGE: "blue", Phase.WAIT: "yellow", Phase.INPUT: "magenta"}
_MARKS = {Phase.COMPUTE: "█", Phase.EXCHANGE: "▓", Phase.WAIT: "░", Phase.INPUT: "▒"}
_PLAIN_MARKS = {Phase.COMPUTE: "#", Phase.EXCHANGE: "+", Phase.WAIT: ".", Phase.INPUT: "="}
_WORDS = {
    Phase.STARTING: "starts",
    Phase.COMPUTE: "computes",
    Phase.EXCHANGE: "exchanges",
    Phase.WAIT: "waits",
    Phase.INPUT: "reads",
    Phase.FINISHED: "has ended",
    Phase.FAILED: "has failed",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the run is, and how fast it goes. Rates are None until they were observed."""

    step: int
    epoch: int
    samples: int
    samples_per_second: float | None
    seconds_per_step: float | None


class Meter:
    """Rates and shares over the last two seconds of snapshots.

    Rates are taken between moments at which the step counter moved, the first of them at the end of the first step: what lies
    before it is the start, and what follows the last one is a step that is not over.
    """

    def __init__(self) -> None:
        self._history: deque[tuple[float, Sequence[Snapshot]]] = deque()
        self._at: tuple[int, int] | None = None  # the most steps and samples seen
        self._moves: deque[tuple[float, int, int]] = deque()

    def see(self, snapshots: Sequence[Snapshot], now: float) -> None:
        self._history.append((now, tuple(snapshots)))
        while len(self._history) > 2 and self._history[1][0] <= now - _WINDOW:
            self._history.popleft()
        at = _furthest(snapshots)
        self._at = self._at or at
        if at[0] > self._at[0]:
            self._moves.append((now, *at))
            while len(self._moves) > 2 and self._moves[1][0] <= now - _WINDOW:
                self._moves.popleft()
            self._at = at

    def progress(self) -> Progress:
        """The furthest rank's counts; they are global counts, and differ between ranks for moments only."""
        now, last = self._history[-1] if self._history else (0.0, ())
        step, samples = _furthest(last)
        seconds, steps, grown = self._pace(now)
        return Progress(
            step=step,
            epoch=max((s.epoch for s in last), default=0),
            samples=samples,
            samples_per_second=grown / seconds if seconds > 0 and grown > 0 else None,
            seconds_per_step=seconds / steps if steps > 0 else None,
        )

    def _pace(self, now: float) -> tuple[float, int, int]:
        """Seconds, and the steps and samples in them; all 0 where nothing is known, or nothing moves any more."""
        if len(self._moves) < 2:
            return 0.0, 0, 0
        began, ended = self._moves[0], self._moves[-1]
        seconds, steps = ended[0] - began[0], ended[1] - began[1]
        if now - ended[0] > max(_WINDOW, _STALLED * seconds / steps):
            return 0.0, 0, 0
        return seconds, steps, ended[2] - began[2]

    def shares(self, numbers: Sequence[int]) -> Spent:
        """For each timed phase, the share of it in the time of the ranks named. Empty when nothing was observed."""
        (began, first), (now, last) = self._by_rank(0), self._by_rank(-1)
        total = dict.fromkeys(TIMED, 0.0)
        for rank in first.keys() & last.keys() & set(numbers):
            before, after = spent(first[rank], began), spent(last[rank], now)
            for phase in TIMED:
                total[phase] += max(0.0, after[phase] - before[phase])
        everything = sum(total.values())
        return {phase: part / everything for phase, part in total.items()} if everything > 0 else {}

    def _by_rank(self, index: int) -> tuple[float, dict[int, Snapshot]]:
        then, snapshots = self._history[index]
        return then, {s.rank: s for s in snapshots}


def _furthest(snapshots: Sequence[Snapshot]) -> tuple[int, int]:
    return max((s.step for s in snapshots), default=0), max((s.rows for s in snapshots), default=0)


def headline(progress: Progress, values: Mapping[str, float]) -> str:
    """Progress and values on one line."""
    return " · ".join([f"step {progress.step}", f"epoch {progress.epoch}", *_rates(progress), *_told(values)])


def epoch_line(epoch: int, step: int, progress: Progress, values: Mapping[str, float]) -> str:
    """An epoch that has ended, at `step`, on one line."""
    return " · ".join([f"epoch {epoch} done", f"step {step}", *_rates(progress), *_told(values)])


def _rates(progress: Progress) -> list[str]:
    parts = []
    if progress.samples_per_second is not None:
        parts.append(f"{progress.samples_per_second:.0f} samples/s")
    if progress.seconds_per_step is not None:
        parts.append(f"{_step_time(progress.seconds_per_step)}/step")
    return parts


def _told(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]


def region(
    snapshots: Sequence[Snapshot],
    values: Mapping[str, float],
    meter: Meter,
    *,
    now: float,
    width: int,
    height: int,
    unicode: bool = True,
    noun: str = RANK,
) -> list[Strip]:
    """The lines of the live region: none longer than `width`, no more than `height`; see ``words`` for `noun`."""
    lines: list[Strip] = [((_cut(headline(meter.progress(), values), width), "bold"),)]
    groups = _groups(snapshots, height - 1)
    names = [ranks([s.rank for s in group], noun) for group in groups]
    name_width = min(max(map(len, names), default=0), max(8, width // 4))
    marks = _MARKS if unicode else _PLAIN_MARKS
    for name, group in zip(names, groups, strict=True):
        bar = _bar(meter.shares([s.rank for s in group]), _bar_width(width), marks)
        room = width - name_width - 1 - sum(len(text) for text, _ in bar)
        label = (_cut(name, name_width).ljust(name_width)[:width], "cyan")
        lines.append((label, (" "[: max(0, width - name_width)], ""), *bar, *_status(group, now, room, noun)))
    return lines[: max(1, height)]


def _groups(snapshots: Sequence[Snapshot], lines: int) -> list[list[Snapshot]]:
    """One group a rank, or groups of ranks that do the same, when there are many ranks or few lines."""
    if len(snapshots) < FOLD_FROM and len(snapshots) <= lines:
        return [[s] for s in snapshots]
    groups: dict[object, list[Snapshot]] = {}
    for s in snapshots:
        groups.setdefault((s.phase, kind(s.what) if s.phase is Phase.WAIT else ""), []).append(s)
    ordered = sorted(groups.values(), key=lambda group: group[0].rank)
    most = max(1, min(_MOST_GROUPS, lines))
    head, rest = ordered[: most - 1], ordered[most - 1 :]
    return [*head, [s for group in rest for s in group]] if rest else head


def _bar_width(width: int) -> int:
    """No bar in a window too narrow to say anything beside it."""
    return 0 if width < 40 else min(24, width // 4)


def _bar(shares: Spent, width: int, marks: Mapping[Phase, str]) -> list[tuple[str, str]]:
    """The shares as cells that always sum to the width, by largest remainder."""
    if not width:
        return []
    if not shares:
        return [(" " * (width + 2), "")]
    cells = {phase: int(shares[phase] * width) for phase in TIMED}
    for phase in sorted(TIMED, key=lambda p: cells[p] - shares[p] * width)[: width - sum(cells.values())]:
        cells[phase] += 1
    return [(marks[p] * cells[p], STYLES[p]) for p in TIMED if cells[p]] + [("  ", "")]


def _status(group: Sequence[Snapshot], now: float, room: int, noun: str) -> list[tuple[str, str]]:
    """What the first of the group does, and where; the place goes first when there is no room for both."""
    first = group[0]
    style = "red" if first.phase is Phase.FAILED else STYLES.get(first.phase, "")
    text = _WORDS[first.phase] if len({s.phase for s in group}) == 1 else "others"
    waited = now - first.since
    if first.phase is Phase.WAIT and waited >= _LONG:
        peers = f" for {ranks(first.waits_for, noun)}" if first.waits_for else ""
        text += f" {duration(waited)}{peers}" + (f": {first.what}" if first.what else "")
    column = min(36, max(12, room // 2))
    where = first.where if len({s.where for s in group}) == 1 or len(group) == 1 else ""
    if room < 12:
        return [(_cut(text, max(0, room)), style)]
    return [(_cut(text, column - 1).ljust(column), style), (_cut(where, room - column), "dim")]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return text[: width - 1] + "…" if width > 1 else text[: max(0, width)]


def _step_time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
