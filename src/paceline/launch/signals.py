"""Signals as readable bytes, so that one loop can wait for them beside everything else."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Catches signals inside a ``with`` block. Only Python's main thread can; elsewhere nothing is caught.

    SIGHUP stays ignored where it was (``nohup``); SIGINT is caught even so, because ``paceline stop`` sends it.

    Args:
        numbers: Which.
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        self._numbers = numbers if threading.current_thread() is threading.main_thread() else ()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        if self._numbers:
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, _noticed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._numbers:
            signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._reader.fileno()

    def taken(self) -> list[int]:
        """The signals that have come, in order."""
        try:
            return [number for number in self._reader.recv(4096) if number in self._before]
        except BlockingIOError:
            return []


def _noticed(number: int, frame: FrameType | None) -> None:
    """The byte on the wakeup descriptor says it all."""
