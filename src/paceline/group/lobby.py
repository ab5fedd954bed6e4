"""The lobby: where the members of an epoch reach a process. There is one for its whole life; wires come and go.

Whoever connects says of which epoch it is, from which rank and to which: authenticated, since that is part of the greeting. What
is of an epoch that is over is refused here, at the door; what is of one that this process has not begun yet waits.
"""

from __future__ import annotations

import threading
from typing import cast

from paceline.group.channels import CAPS
from paceline.group.frames import Meta
from paceline.group.secure import Connection, Listener

_MOST = 4096  # connections that wait


class Lobby:
    """Where a process is reached by the members of its epochs.

    Args:
        address: ``tcp:HOST:PORT`` (port 0: a free one), ``unix:@name`` or ``unix:/path``.
        secret: Of the job.

    Attributes:
        address: What to tell the others.

    Raises:
        WireError, UsageError: Like :class:`~paceline.group.secure.Listener`.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._epoch = 0
        self._there: dict[tuple[int, int, int], Connection] = {}
        self._taken: set[tuple[int, int, int]] = set()
        self._changed = threading.Condition()
        self._listener = Listener(address, secret, "peer", self._welcome, admit=self._admit, caps=CAPS)
        self.address = self._listener.address

    def open(self, epoch: int) -> None:
        """From now on, what is of an earlier epoch is refused."""
        with self._changed:
            self._epoch = max(self._epoch, epoch)
            self._taken = {key for key in self._taken if key[0] >= self._epoch}
            for key in [key for key in self._there if key[0] < self._epoch]:
                self._there.pop(key).close()

    def take(self, epoch: int, source: int, to: int, seconds: float) -> Connection | None:
        """The connection that rank `source` of this epoch has made to rank `to`; None when it does not come in time."""
        key = (epoch, source, to)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._there, seconds):
                return None
            self._taken.add(key)
            return self._there.pop(key)

    def close(self) -> None:
        """Stop listening. Wires that are open stay so. Idempotent."""
        self._listener.close()
        with self._changed:
            while self._there:
                self._there.popitem()[1].close()

    def _admit(self, role: str, about: Meta) -> str:
        key = _key(about)
        if role != "peer" or any(type(number) is not int for number in key):
            return "it is no member of an epoch"
        with self._changed:
            if key[0] < self._epoch:
                return f"epoch {key[0]} is over, and epoch {self._epoch} has begun"
            if len(self._there) >= _MOST:
                return "too many wait"
            return f"rank {key[1]} is connected already" if key in self._taken else ""

    def _welcome(self, connection: Connection) -> None:
        with self._changed:
            key = _key(connection.about)
            former, self._there[key] = self._there.pop(key, None), connection
            if former is not None:  # it lost patience, and tried again
                former.close()
            self._changed.notify_all()


def _key(about: Meta) -> tuple[int, int, int]:
    """Epoch, from, to."""
    return cast("tuple[int, int, int]", (about.get("epoch"), about.get("from"), about.get("to")))
