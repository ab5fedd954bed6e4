"""How gloo is made to stop waiting: we shut the sockets that it opened.

[Note: cutting gloo] ``ProcessGroupGloo.abort()`` does nothing, and a rank whose peer is frozen waits for its timeout. A
socket that is shut makes every operation on it fail at once, in the process that shut it and in its peer, so one rank
that notices a loss tells all others by cutting its own connections. gloo's *listening* socket must not be shut: its
thread ends the process when ``accept`` fails. gloo does not tell its descriptors; they are those that appeared while the
group was made and have a peer. A descriptor may be closed and its number used anew: the inode tells.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_Socket = tuple[int, int]  # descriptor, inode


class Connections:
    """The TCP connections that were opened in a block of code."""

    def __init__(self) -> None:
        self._sockets: list[_Socket] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Remember what is opened inside the block, also when it fails."""
        before = set(_connected())
        try:
            yield
        finally:
            self._sockets += [s for s in _connected() if s not in before]

    def cut(self) -> None:
        """Shut them down, in both directions. May be called again and from any thread."""
        for descriptor, inode in self._sockets:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
                if os.fstat(copy.fileno()).st_ino == inode:
                    copy.shutdown(socket.SHUT_RDWR)


class Watch:
    """Calls `then` once, from a thread of its own, as soon as `when` is true.

    Args:
        when: Cheap; asked every `period` seconds.
    """

    def __init__(self, when: Callable[[], bool], then: Callable[[], None], period: float = 0.02) -> None:
        self._ended = threading.Event()
        arguments = (when, then, period, self._ended)
        self._thread = threading.Thread(target=_watch, args=arguments, name="paceline-torch-wire", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _watch(when: Callable[[], bool], then: Callable[[], None], period: float, ended: threading.Event) -> None:
    while not ended.wait(period):
        if when():
            then()
            return


def _connected() -> Iterator[_Socket]:
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with suppress(OSError):
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode) and _has_peer(descriptor):
                yield descriptor, status.st_ino


def _has_peer(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        copy.getpeername()  # OSError where there is none
        return True
