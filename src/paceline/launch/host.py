"""The launcher that has begun a run, as one on another machine sees it: ``paceline join --address``.

The launcher that joins starts workers of its own. They, and it, speak with the coordinator of the run directly; the connection
with the other launcher stays open and says nothing, until its end says that the run has ended. It may also be the network that ended
it: while the coordinator answers, which does not outlive its launcher, the run goes on.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from paceline.launch.control import Answer
from paceline.launch.line import Line, memory_file
from paceline.terms.errors import PacelineError

if TYPE_CHECKING:
    from paceline.group.secure import Connection
    from paceline.launch.child import Child

_FAREWELL = 10.0  # seconds that workers have to end by themselves once the run has


class Host:
    """In the place of ``Coordination``. A context manager.

    Args:
        connection: To the other launcher.
        secret: Of the run.
        addresses: Of its coordinator, or of its parameter servers.
        serves: They are of servers; these need nobody to tell them who is gone.
        first: Number of the first worker here.

    Attributes:
        lost: Why the run cannot go on here, or empty.
    """

    child: Child | None = None

    def __init__(
        self, connection: Connection, secret: bytes, addresses: Sequence[str], first: int, *, serves: bool = False
    ) -> None:
        self._connection, self._secret = connection, secret
        self.address, self.first = "" if serves else addresses[0], first
        self.servers = tuple(addresses) if serves else ()
        self._line: Line | None = None
        self._ended_at: float | None = None
        self.lost = ""

    def __enter__(self) -> Host:
        with ExitStack() as stack:
            stack.callback(self._connection.close)
            self.secret_fd = memory_file(stack, "paceline-secret", self._secret)
            if self.address:
                self._line = Line(self.address, self._secret)
                stack.callback(self._line.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(
        self,
        selector: selectors.BaseSelector,
        say: Callable[[Sequence[str]], None],
        enlist: Callable[[], None],
        answer: Answer,
    ) -> None:
        """The loop begins."""
        selector.register(self._connection.fileno(), selectors.EVENT_READ, lambda: self._listen(selector))

    def endpoints(self) -> list[tuple[str, str, str]]:
        """Nothing listens here."""
        return []

    @property
    def status(self) -> Mapping[str, Any]:
        return self._line.status if self._line is not None else {}

    def certify(self, name: str, incarnation: str, why: str) -> None:
        """This worker has ``died`` or ``finished``."""
        if self._line is not None:
            self._line.certify(name, incarnation, why)

    def tick(self, now: float) -> None:
        """Ten times a second."""
        heard = 0.0
        if self._line is not None:
            self._line.poll(now)
            heard = self._line.heard
        if self._ended_at is not None and now - max(self._ended_at, heard) > _FAREWELL:
            self.lost = "the launcher that has begun the run is gone"

    def _listen(self, selector: selectors.BaseSelector) -> None:
        try:
            while self._connection.poll() is not None:
                pass
        except PacelineError:
            selector.unregister(self._connection.fileno())
            self._ended_at = time.monotonic()
