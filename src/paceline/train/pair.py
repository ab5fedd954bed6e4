"""The other copy of a server, as this one sees it: a connection, and the certainty that its process has ended."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from paceline.group.frames import Frame
from paceline.group.secure import Connection
from paceline.terms.errors import AdoptError, PacelineError, PeerLost
from paceline.train.talk import Say

_SLICE = 0.1  # seconds between two looks at the board
_STUCK = 10.0  # seconds that the other copy may take nothing
_DYING = 1.0  # seconds from the end of a connection to the end of a process that is ending


@dataclass(frozen=True, slots=True)
class Tell:
    """What others must know, and what they tell.

    Attributes:
        begins: This process begins to answer; the one before has kept the ledger up to this version, if there was one.
        joined: This process has the state of its other copy.
        notice: A code and a message for whoever watches the run.
        over: Whether the run is being ended.
    """

    begins: Callable[[int | None], None]
    joined: Callable[[], None]
    notice: Callable[[str, str], None]
    over: Callable[[], bool]


class Other:
    """The other copy.

    Args:
        connection: To it.
        pid: Of its process.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self._pidfd = -1
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid)

    def send(
        self, kind: Say, meta: Mapping[str, object], buffers: Sequence[memoryview] = (), patience: float = _STUCK
    ) -> bool:
        """Send it something: when this returns True it will come there, though this process died. False: it is gone."""
        try:
            self.connection.send(kind, meta, buffers, timeout=patience)
        except PacelineError:
            return False
        return True

    def hear(self, timeout: float) -> Frame | None:
        """Its next message. Raises PeerLost PL431: it is gone."""
        return self.connection.try_recv(timeout)

    def end(self) -> None:
        """Its connection has ended, or it takes nothing: when this returns its process is no more, so it answers nobody."""
        self.connection.close()
        if self._pidfd < 0:
            return
        if not self._has_ended(_DYING):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._has_ended(None)
        self.close()

    def _has_ended(self, seconds: float | None) -> bool:
        watch = select.poll()
        watch.register(self._pidfd, select.POLLIN)
        return bool(watch.poll(None if seconds is None else seconds * 1000))

    def close(self) -> None:
        """Idempotent."""
        self.connection.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def ask_for_state(connection: Connection, description: str, who: str, check: Callable[[], None]) -> Frame:
    """What the copy at the other end knows.

    Args:
        description: Of what this one has, see ``keeping.described``.
        who: The server, for people.
        check: Called again and again while this waits; what it raises ends the waiting.

    Raises:
        PeerLost: PL465, it has ended before it had told it.
        AdoptError: PL303, it has something else.
    """
    try:
        connection.send(Say.COPY, {"pid": os.getpid(), "is": description})
        while (frame := connection.try_recv(_SLICE)) is None:
            check()
    except PacelineError as error:
        connection.close()
        if isinstance(error, PeerLost):
            raise PeerLost("PL465", f"{who} has ended before its second copy had its state") from error
        raise
    if frame.kind != Say.WHOLE:
        connection.close()
        raise AdoptError("PL303", f"{who} refuses its second copy: {frame.meta.get('message')}")
    return frame
