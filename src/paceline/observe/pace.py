"""How fast a run goes, and which rank holds it up, from what the board said over time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from paceline.observe.words import RANK, ranks
from paceline.terms.activity import TIMED, Phase, Snapshot

_SAMPLES = 64
_PIECE = 0.5  # seconds that a piece has at least
_PIECES = 3  # pieces before a rank is called slow
_UNUSUAL = 4  # times the usual duration of a step
_WINDOW = 10.0  # seconds over which shares are taken
_ENOUGH = 5.0  # seconds of observation before a rank is called slow
_SLOW, _RECOVERED = 1.5, 1.2  # ratio to the median of the others
_MARGIN = 0.1  # share of the time that must be lost before it is worth a word

Spent = dict[Phase, float]


class Pace:
    """The median duration of a step, from the moments at which the step counter was seen to move."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._step: int | None = None
        self._moved: float | None = None
        self._seen = 0.0

    @property
    def median(self) -> float | None:
        """Seconds; None until two steps were seen. A resumed run does not begin at step 0."""
        return median(self._samples) if self._samples else None

    def see(self, step: int, now: float) -> None:
        """The furthest rank has applied `step` steps."""
        if self._step is None:
            self._step = step
        steps = step - self._step
        if steps > 0 and self._moved is not None:
            self._samples.append((now - self._moved) / steps)
        elif steps > 1:  # before the first step lies the start-up; but those after it fitted between two looks
            self._samples.append((now - self._seen) / (steps - 1))
        if steps > 0:
            self._step, self._moved = step, now
        self._seen = now


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that works while the others wait.

    Attributes:
        share: Share of the time in which it computes or reads its input.
        others: Median of that share over the other ranks.
        reading: True when most of it is reading.
    """

    rank: int
    share: float
    others: float
    reading: bool

    def render(self, noun: str = RANK) -> str:
        work = "reads its input" if self.reading else "computes"
        who = ranks([self.rank], noun)
        return (
            f"{who} is slow: it {work} {self.share:.0%} of the time, the others work {self.others:.0%} and wait for it"
        )

    def __str__(self) -> str:
        return self.render()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some whole steps of all ranks: how long they took, and where each rank's time went."""

    seconds: float
    per_step: float
    spent: dict[int, Spent]


class Stragglers:
    """Compares how much of the last ten seconds of stepping each rank was busy.

    Time is cut into pieces of whole steps. When other ranks take part than before, observation begins anew. A piece whose steps took much longer than usual is left out: who evaluates
    or saves alone is busy while others wait, too, and is not slow.
    """

    def __init__(self) -> None:
        self._began: tuple[float, int, dict[int, Spent]] | None = None
        self._pieces: deque[_Piece] = deque()
        self._slow: set[int] = set()
        self._news: list[Straggler] = []

    def see(self, snapshots: Sequence[Snapshot], now: float) -> None:
        step = min((s.step for s in snapshots), default=0)
        if self._began is not None and self._began[2].keys() != {s.rank for s in snapshots}:
            self._began = None
            self._pieces.clear()
        if self._began is not None and (step <= self._began[1] or now - self._began[0] < _PIECE):
            return
        after = {s.rank: spent(s, now) for s in snapshots}
        if self._began is not None:
            then, first, before = self._began
            seconds = now - then
            self._pieces.append(_Piece(seconds, seconds / (step - first), _difference(before, after)))
            self._judge()
        self._began = (now, step, after)

    def _judge(self) -> None:
        while sum(p.seconds for p in self._pieces) - self._pieces[0].seconds >= _WINDOW:
            self._pieces.popleft()
        usual = median(p.per_step for p in self._pieces)
        taken = [p for p in self._pieces if p.per_step <= _UNUSUAL * usual]
        seconds = sum(p.seconds for p in taken)
        if len(taken) >= _PIECES and seconds >= _ENOUGH:
            self._compare({rank: _busy([p.spent[rank] for p in taken], seconds) for rank in taken[-1].spent})

    def news(self) -> list[Straggler]:
        """Ranks that became slow since the last call."""
        news, self._news = self._news, []
        return news

    def _compare(self, busy: dict[int, tuple[float, bool]]) -> None:
        for rank, (share, reading) in busy.items():
            others = median([s for r, (s, _) in busy.items() if r != rank] or [share])
            if share < _RECOVERED * others:
                self._slow.discard(rank)
            elif share >= _SLOW * others and share - others >= _MARGIN and rank not in self._slow:
                self._slow.add(rank)
                self._news.append(Straggler(rank, share, others, reading))


def spent(snapshot: Snapshot, now: float) -> Spent:
    """Seconds by phase, with the phase that is not over yet."""
    result = dict(snapshot.spent)
    if snapshot.phase in TIMED:
        result[snapshot.phase] = result.get(snapshot.phase, 0.0) + max(0.0, now - snapshot.since)
    return result


def _difference(before: dict[int, Spent], after: dict[int, Spent]) -> dict[int, Spent]:
    return {r: {p: after[r].get(p, 0.0) - before.get(r, {}).get(p, 0.0) for p in TIMED} for r in after}


def _busy(pieces: Sequence[Spent], seconds: float) -> tuple[float, bool]:
    """Share of the time spent working, and whether most of it was reading."""
    compute, reading = (sum(piece[p] for piece in pieces) for p in (Phase.COMPUTE, Phase.INPUT))
    return max(0.0, (compute + reading) / seconds), reading > compute
