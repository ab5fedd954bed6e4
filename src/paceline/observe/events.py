"""Writes what happened: one line of strict JSON an event, in ``events/<name>.jsonl``.

1. :meth:`EventWriter.__call__`, in the training loop: two clocks are read, the event is put into a queue.
2. :meth:`EventWriter.flush`, four times a second from the heartbeat's thread: values are converted (a device may be
   waited for here), log events beyond the budget are merged, the lines are written with one call.

Every line is written whole and appended, so the file can be read at any moment, and survives a kill of the process but
for the last quarter of a second. It is not fsynced: the page cache outlives the process.

**The budget.** A file gets at most about 200 ``log`` lines a second; a slower logger keeps every line. Beyond that,
neighbouring log events with the same names are merged into one line: its values are their weighted means, ``weight``
is the sum of their weights, ``step`` the last step, and ``count`` says how many there were. No other kind is merged, and
the last step of all is not (see ``merge``).

**A full disk does not end training.** What cannot be written is lost and counted; the first error is remembered and
told once; when the disk takes lines again, a ``notice`` says how many are missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from paceline.observe.merge import Stamped, condensed
from paceline.observe.plain import hold, plain
from paceline.terms.event import Event

LINES_PER_SECOND = 200
_BURST = 50  # log lines that one flush may always write
_FULL = 4096  # queued events at which the emitter flushes itself, should no heart beat
_AT_ONCE = frozenset({"fault", "end"})  # kinds after which the process may be gone
_OURS = frozenset({"mono", "wall", "name", "incarnation", "epoch", "step", "kind"})


class EventWriter:
    """The sink of one process. Thread-safe; never raises, and never blocks the caller on a device.

    Args:
        path: File to append to, made if need be, or None to keep nothing.
        name: Name of the process, as in ``processes.json``.
        incarnation: Its incarnation.
        on_failure: Called once, from the thread that flushes, when the file cannot be written.

    Attributes:
        failed: The first error, or None while all is well.
        lost: Number of lines that could not be written.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        name: str,
        incarnation: str,
        on_failure: Callable[[OSError], None] | None = None,
    ) -> None:
        self.failed: OSError | None = None
        self.lost = 0
        self._name, self._incarnation, self._on_failure = name, incarnation, on_failure
        self._queue: deque[Stamped] = deque()
        self._lock = threading.RLock()  # a signal handler may emit while its own thread flushes
        self._epoch = 0
        self._flushed = time.monotonic()
        self._told = False
        self._owed = 0
        self._torn = False
        self._process = os.getpid()
        self._path = path
        self._fd = -1
        if path is not None:
            self._open(path)

    def __call__(self, event: Event) -> None:
        """Queue one event. ``fault`` and ``end`` are written at once."""
        if self._path is None:
            return
        data = {key: hold(value) for key, value in event.data.items()}
        self._queue.append((time.monotonic(), time.time(), Event(event.kind, event.step, data)))
        if event.kind in _AT_ONCE or len(self._queue) > _FULL:
            self.flush()

    def flush(self) -> None:
        """Write what is queued. Does nothing in a forked child, whose queue is a copy."""
        if os.getpid() != self._process:
            return
        with self._lock:
            # An event that is queued meanwhile waits for the next flush.
            batch = [self._queue.popleft() for _ in range(len(self._queue))]
            if batch and self._path is not None:
                self._write([self._line(stamped) for stamped in self._within_budget(batch)])
        self._tell()

    def close(self) -> None:
        """Write what is queued and give the file back. What is emitted afterwards is dropped."""
        self.flush()
        with self._lock:
            self._path = None
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _within_budget(self, batch: list[Stamped]) -> Iterator[Stamped]:
        now = time.monotonic()
        budget = max(_BURST, int(LINES_PER_SECOND * (now - self._flushed)))
        self._flushed = now
        logs = sum(event.kind == "log" for _, _, event in batch)
        stride = -(-logs // budget)
        if stride <= 1:
            yield from batch
            return
        for names, group in groupby(batch, _names):
            run = list(group)
            yield from run if names is None else condensed(run, -(-len(run) // stride))

    def _line(self, stamped: Stamped) -> str:
        mono, wall, event = stamped
        data = plain(event.data)
        epoch = data.pop("epoch", None)
        self._epoch = epoch if isinstance(epoch, int) else self._epoch
        line = {
            "mono": mono,
            "wall": wall,
            "name": self._name,
            "incarnation": self._incarnation,
            "epoch": self._epoch,
            "step": event.step,
            "kind": event.kind,
        }
        line.update((key + "_" if key in _OURS else key, value) for key, value in data.items())
        return json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._torn = not _ends_with_newline(self._fd)
        except OSError as failure:
            self._fail(failure, 0)

    def _write(self, lines: list[str]) -> None:
        # A line that was torn, by us or by a predecessor that was killed, must not swallow the next one.
        start = "\n" if self._torn else ""
        if self._owed:
            start += self._line((time.monotonic(), time.time(), _missing(self._owed)))
        rest = memoryview((start + "".join(lines)).encode("ascii"))
        try:
            if self._fd < 0:
                raise self.failed or OSError("the file is not open")
            while rest:
                rest = rest[os.write(self._fd, rest) :]
                self._torn = True
        except OSError as failure:
            self._fail(failure, min(len(lines), bytes(rest).count(b"\n")))
        else:
            self._torn, self._owed = False, 0

    def _fail(self, failure: OSError, lines: int) -> None:
        self.failed = self.failed or failure
        self.lost += lines
        self._owed += lines

    def _tell(self) -> None:
        """Report the first error, outside of the lock: the listener may emit."""
        if self.failed is None or self._told:
            return
        self._told = True
        if self._on_failure is not None:
            self._on_failure(self.failed)


def _names(stamped: Stamped) -> tuple[str, ...] | None:
    """Log events with equal names may be merged; None for all that may not."""
    event = stamped[2]
    values: Any = event.data.get("values")
    return tuple(values) if event.kind == "log" and isinstance(values, dict) else None


def _missing(lines: int) -> Event:
    return Event("notice", 0, {"code": "PL601", "message": f"{lines} events could not be written", "lost": lines})


def _ends_with_newline(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"
