"""What the ranks print, folded: a line that all ranks print is shown once.

Pure. A line waits for at most the window (0.15 s) in case other ranks print the same; then it comes out with a label
that names who printed it: ``[1]``, ``[0,2]``, ``[0-3]``; no label in a run of one rank. Lines of one rank never change
their order, and lines come out in the order in which they first came in.

Of a line that was drawn over and over with carriage returns (a progress bar), only what stood last is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.observe.words import spans

_LOOK = 64  # equal lines that are looked at before folding gives up; a flood must not cost more than its lines


@dataclass(frozen=True, slots=True)
class Line:
    """A line to show. Unpacks into ``label, text``.

    Attributes:
        label: Who printed it, or nothing when there is only one rank.
        text: The line, without its newline.
        err: True when it came from standard error.
    """

    label: str
    text: str
    err: bool = False

    def __iter__(self) -> Iterator[str]:
        yield self.label
        yield self.text


@dataclass(slots=True)
class _Waiting:
    number: int
    text: str
    err: bool
    since: float
    ranks: set[int] = field(default_factory=set)


class Folder:
    """Collects lines with :meth:`feed`, gives them back with :meth:`due`.

    Args:
        size: Number of ranks.
        window: Seconds that a line waits for its equals, once there are several ranks.
    """

    def __init__(self, size: int, window: float = 0.15) -> None:
        self._window = window
        self._labelled = False
        self.resize(size)
        self._queue: deque[_Waiting] = deque()
        self._equal: dict[tuple[str, bool], deque[_Waiting]] = {}
        self._last: dict[int, int] = {}  # number of the newest line of each rank
        self._count = 0

    def resize(self, size: int) -> None:
        """From now on there are `size` ranks. Lines keep their labels once there were several."""
        self.size = size
        self._labelled = self._labelled or size > 1
        self.window = self._window if self._labelled else 0.0

    def feed(self, rank: int, line: str, stream: str, now: float) -> None:
        """Take one line of one rank; `stream` is ``stdout`` or ``stderr``."""
        text = _last_drawn(line)
        err = stream in ("stderr", "err")
        waiting = self._equal_of(rank, text, err)
        if waiting is None:
            self._count += 1
            waiting = _Waiting(self._count, text, err, now)
            self._queue.append(waiting)
            self._equal.setdefault((text, err), deque()).append(waiting)
        waiting.ranks.add(rank)
        self._last[rank] = waiting.number

    def due(self, now: float) -> list[Line]:
        """Lines that need not wait any more: their window is over, or every rank has printed them."""
        result: list[Line] = []
        while self._queue and (now - self._queue[0].since >= self.window or len(self._queue[0].ranks) >= self.size):
            result.append(self._take())
        return result

    def flush(self) -> list[Line]:
        """All lines that still wait, as they stand."""
        return [self._take() for _ in range(len(self._queue))]

    def _equal_of(self, rank: int, text: str, err: bool) -> _Waiting | None:
        """The line that `rank` can join without overtaking what it printed before."""
        last = self._last.get(rank, 0)
        for looked, waiting in enumerate(self._equal.get((text, err), ())):
            if waiting.number > last:
                return waiting
            if looked >= _LOOK:
                return None
        return None

    def _take(self) -> Line:
        waiting = self._queue.popleft()
        equal = self._equal[waiting.text, waiting.err]
        equal.popleft()  # the queue and this one have the same order
        if not equal:
            del self._equal[waiting.text, waiting.err]
        label = f"[{spans(waiting.ranks)}]" if self._labelled else ""
        return Line(label, waiting.text, waiting.err)


def _last_drawn(line: str) -> str:
    """What a terminal would show of a line with carriage returns."""
    drawn = [part for part in line.rstrip("\r\n").split("\r") if part]
    return drawn[-1] if drawn else ""
