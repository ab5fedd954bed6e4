"""The launcher's connection to the coordinator: it tells of deaths, and hears who takes part.

A thread connects, again and again; a certificate is owed until it is acknowledged, over as many connections as that takes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from paceline.terms.errors import Aborted, PacelineError

if TYPE_CHECKING:
    from paceline.group.secure import Connection

CERTIFICATE, STATUS = 41, 42
"""Of ``group.coordinator.Control``, which is not imported where it is not needed."""

_POLL = 0.5  # seconds between two questions for the status
_RECONNECT = 0.05
_PATIENCE = 2.0  # seconds for a connection
_AT_ONCE = 0.2  # seconds that the loop may wait for a coordinator that does not read
_UNANSWERED = 4


class Line:
    """The launcher's connection to the coordinator, in a thread of its own that connects again and again.

    Args:
        address, secret: Of the coordinator.

    Attributes:
        status: What the coordinator said last, see ``group.membership``; empty before it has said anything.
        heard: When that was, in monotonic seconds.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._address, self._secret = address, secret
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._owed: dict[str, dict[str, str]] = {}  # certificates that are not in the journal as far as we know
        self._asked: deque[str] = deque()  # what the next answers are about: whose certificate, or nobody's
        self._polled = 0.0
        self._over = False
        self.status: Mapping[str, Any] = {}
        self.heard = 0.0
        self._thread = threading.Thread(target=self._run, name="paceline-coordinator-line", daemon=True)
        self._thread.start()

    def certify(self, name: str, incarnation: str, why: str) -> None:
        """Send a certificate, now if there is a connection, else as soon as there is one."""
        with self._lock:
            self._owed[name] = {"name": name, "incarnation": incarnation, "why": why}
            self._ask(CERTIFICATE, name)

    def poll(self, now: float) -> None:
        """Ask for the status, now and then."""
        if now - self._polled >= _POLL:
            self._polled = now
            with self._lock:
                if len(self._asked) < _UNANSWERED:
                    self._ask(STATUS)

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._over = True
            if self._connection is not None:
                self._connection.abort()
        self._thread.join()

    def _ask(self, kind: int, about: str = "") -> None:
        """With the lock. A connection that has failed is the thread's affair."""
        if self._connection is not None:
            self._asked.append(about)
            with suppress(PacelineError):
                self._connection.send(kind, self._owed.get(about, {}), timeout=_AT_ONCE)

    def _run(self) -> None:
        from paceline.group.secure import connect

        while not self._over:
            try:
                with connect(self._address, self._secret, "launcher", _PATIENCE, check=self._check) as connection:
                    self._serve(connection)
            except PacelineError:
                time.sleep(_RECONNECT)
            self._connection = None

    def _serve(self, connection: Connection) -> None:
        with self._lock:
            self._check()
            self._connection = connection
            self._asked.clear()
            for name in list(self._owed):
                self._ask(CERTIFICATE, name)
        while True:
            status = connection.recv().meta
            with self._lock:
                self._owed.pop(self._asked.popleft() if self._asked else "", None)
                self.status, self.heard = status, time.monotonic()

    def _check(self) -> None:
        if self._over:
            raise Aborted("PL404", "the run has ended")


def memory_file(stack: ExitStack, name: str, content: bytes) -> int:
    """A descriptor of a memory file, without a name in the file system; closed with the stack."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    if content:
        os.pwrite(fd, content, 0)
    return fd
