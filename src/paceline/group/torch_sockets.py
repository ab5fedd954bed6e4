"""The connections that gloo has opened: whom they lead to, whether they are still there, and how to end them.

[Note: cutting gloo] ``ProcessGroupGloo.abort()`` does nothing. A socket that is shut makes most operations on it fail at
once, here and in the peer, so one rank that notices a loss tells all others by cutting its own connections. gloo's
*listening* socket must not be shut: its thread ends the process when ``accept`` fails.

gloo does not tell its descriptors; they are those that appeared while the group was made and have a peer. A descriptor
may be closed and its number used anew: the inode tells.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b

DIGEST = 8


@dataclass(frozen=True, slots=True)
class Connection:
    """One TCP connection of this process.

    Attributes:
        descriptor, inode: Which socket it is.
        digest: Hash of both its ends, the same in both processes.
        peer: Rank at the other end, or -1 while that is not known.
    """

    descriptor: int
    inode: int
    digest: bytes
    peer: int = -1

    def is_open(self) -> bool:
        try:
            return os.fstat(self.descriptor).st_ino == self.inode
        except OSError:
            return False

    def cut(self) -> None:
        """Shut it down in both directions."""
        with suppress(OSError), socket.socket(fileno=os.dup(self.descriptor)) as copy:
            if os.fstat(copy.fileno()).st_ino == self.inode:
                copy.shutdown(socket.SHUT_RDWR)


class Connections:
    """The TCP connections that were opened in a block of code."""

    def __init__(self) -> None:
        self._all: list[Connection] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Remember what is opened inside the block."""
        before = {(c.descriptor, c.inode) for c in _connections()}
        yield
        self._all = [c for c in _connections() if (c.descriptor, c.inode) not in before]

    def digests(self) -> bytes:
        """What this rank shows to the others, so that each end of a connection learns who is at the other."""
        return b"".join(c.digest for c in self._all)

    def name(self, rank: int, shown: Sequence[bytes]) -> None:
        """Learn who is where from everybody's :meth:`digests`, in rank order; `rank` is this one."""
        owner = {
            raw[at : at + DIGEST]: other
            for other, raw in enumerate(shown)
            if other != rank
            for at in range(0, len(raw), DIGEST)
        }
        self._all = [replace(c, peer=owner.get(c.digest, -1)) for c in self._all]

    def lost(self, peers: Collection[int]) -> list[int]:
        """Those of `peers` whose connection is closed: gloo closes it when the other end is gone."""
        return sorted({c.peer for c in self._all if c.peer in peers and not c.is_open()})

    def cut(self) -> None:
        """Cut all. May be called again and from any thread."""
        for connection in self._all:
            connection.cut()


def _connections() -> Iterator[Connection]:
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with suppress(OSError):
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode) and (digest := _digest(descriptor)):
                yield Connection(descriptor, status.st_ino, digest)


def _digest(descriptor: int) -> bytes:
    """Hash of the two ends of a TCP connection; empty for other sockets, OSError where there is no peer."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
            return b""
        ends = sorted(f"{end[0]} {end[1]}" for end in (copy.getsockname(), copy.getpeername()))
    return blake2b("|".join(ends).encode(), digest_size=DIGEST).digest()
