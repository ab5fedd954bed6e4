"""The arena: one memory file that every rank of a host has mapped, and the rule by which they share it.

1. Somebody makes the file (:func:`create`) and hands its descriptor to all ranks: by inheritance from the launcher, or,
   where ranks have no parent in common, through ``/proc`` (:func:`share_handle`, :func:`open_handle`).
2. Each rank opens an :class:`Arena` over it. The lower half is *common*: every rank makes the same calls of
   :meth:`Arena.take` in the same order and so arrives at the same offsets without talking. The upper half is divided into
   one private *heap* a rank, which its owner fills as it likes.
3. Whoever will write pages commits them first (:meth:`Arena.commit`).

The file is sparse and far larger than the machine: its length costs nothing, pages exist from their commit on.

Note [commit]: a page that the file system cannot give would otherwise be asked for by a store, and the answer to a store
is SIGBUS. ``posix_fallocate`` asks in a call that can fail, so exhaustion is an error with a code (PL405).

Note [memory left]: an anonymous memory file has no length limit of its own; what ends is the machine's memory, and then the
kernel kills a process instead of refusing a page. So a big piece is compared with what is available before it is taken.
The comparison is of the whole file, with the pages that exist already left out: it comes out alike on the rank that is
first and on the one that is last.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from paceline.terms.errors import WireError

PAGE = mmap.PAGESIZE
LINE = 64
_SLAB = 1 << 20  # small pieces share a mapping of this size
_SMALL = _SLAB // 4
_LENGTHS = tuple(1 << bits for bits in (40, 38, 36, 34, 33))  # what a file system may refuse, it may grant smaller
_EXHAUSTED = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


def create(nbytes: int | None = None) -> int:
    """A new, empty arena without a name; returns its descriptor (not inheritable unless passed on).

    Args:
        nbytes: Length of the sparse file, or None for the largest usual length that the system grants.

    Raises:
        WireError: No such file can be had (PL405).
    """
    try:
        fd = _anonymous_file()
    except OSError as error:
        raise _exhausted(f"the shared memory file could not be created: {error.strerror}") from error
    for length in (nbytes,) if nbytes is not None else _LENGTHS:
        try:
            os.ftruncate(fd, length)
            return fd
        except OSError as error:
            refusal = error
    os.close(fd)
    raise _exhausted(f"the shared memory file could not be made long enough: {refusal.strerror}") from refusal


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("paceline-arena", os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix="paceline-arena-")
    os.unlink(path)
    return fd


def share_handle(fd: int) -> str:
    """Text by which another process of this user and host can open the arena, for as long as this one keeps `fd` open."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def open_handle(handle: str) -> int:
    """A descriptor of the arena that :func:`share_handle` named. Raises WireError PL411 when it cannot be opened."""
    try:
        return os.open(handle, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise WireError(
            "PL411",
            f"the shared memory of this host could not be opened at {handle}: {error.strerror}",
            help="ranks of one host must belong to one user and see the same /proc; or use `--wire torch`.",
        ) from error


@dataclass(frozen=True, eq=False)
class Span:
    """A piece of the arena, mapped.

    Attributes:
        offset: Where it begins in the file; the same on all ranks.
        address: Where it begins in this process.
        memory: Its bytes. Whoever holds this, or a tensor made of it, keeps the mapping alive.
        words: The same as 64-bit integers.
    """

    offset: int
    address: int
    memory: memoryview
    words: memoryview

    @classmethod
    def over(cls, offset: int, address: int, memory: memoryview) -> Span:
        """A span of `memory`, whose length is a multiple of eight."""
        return cls(offset, address, memory, memory.cast("q"))


class Arena:
    """One rank's view of the file.

    Args:
        fd: Descriptor of the file. It stays the caller's; the arena works on a duplicate.
        rank, size: Position among the ranks that share the file.
    """

    def __init__(self, fd: int, rank: int, size: int) -> None:
        self.fd = os.dup(fd)
        length = os.fstat(fd).st_size
        self._limit = length // 2 // PAGE * PAGE
        self._next = 0
        self._slab: Span | None = None
        self._slab_used = 0
        self.heap_nbytes = (length - self._limit) // size // PAGE * PAGE
        self._heap_next = self.heap_of(rank)
        self._heap_limit = self._heap_next + self.heap_nbytes

    @property
    def used(self) -> int:
        """Bytes of the common half taken so far: equal on ranks that made the same calls."""
        return self._next + self._slab_used

    def take(self, nbytes: int) -> Span:
        """The next `nbytes` of the common half, mapped, not committed; aligned to a line, and to a page where it is big.

        Raises:
            WireError: The file or the address space has no room for them (PL405).
        """
        if nbytes > _SMALL:
            return self._map(nbytes)
        nbytes = round_up(nbytes, LINE)
        if self._slab is None or self._slab_used + nbytes > _SLAB:
            self._slab, self._slab_used = self._map(_SLAB), 0
        start, slab = self._slab_used, self._slab
        self._slab_used = start + nbytes
        return Span.over(slab.offset + start, slab.address + start, slab.memory[start : start + nbytes])

    def take_committed(self, nbytes: int) -> Span:
        """:meth:`take` and :meth:`commit`."""
        span = self.take(nbytes)
        self.commit(span.offset, nbytes)
        return span

    def commit(self, offset: int, nbytes: int) -> None:
        """Have the pages of a range of the file from now on. Raises WireError PL405. See Note [commit]."""
        if nbytes <= 0 or not hasattr(os, "posix_fallocate"):  # macOS has none: there a signal remains the answer
            return
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            raise _exhausted(f"the host did not give {nbytes / 2**20:.1f} MiB of shared memory") from error

    def heap_of(self, rank: int) -> int:
        """Offset of a rank's heap."""
        return self._limit + rank * self.heap_nbytes

    def take_heap(self, nbytes: int) -> int:
        """Offset of the next `nbytes` of this rank's heap. It is not mapped: see :meth:`write` and :meth:`read`."""
        start = self._heap_next
        if start + nbytes > self._heap_limit:
            raise _exhausted(f"rank's share of {self.heap_nbytes / 2**20:.1f} MiB for messages is used up")
        self._heap_next = round_up(start + nbytes, PAGE)
        return start

    def write(self, data: memoryview, offset: int) -> None:
        """Copy `data` into the file. The kernel copies, so a page that cannot be had is an error here too (PL405)."""
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self.fd, data[done:], offset + done)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            raise _exhausted(f"the host did not give {data.nbytes / 2**20:.1f} MiB of shared memory") from error

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from the file."""
        done = 0
        while done < into.nbytes:
            count = os.preadv(self.fd, [into[done:]], offset + done)
            assert count > 0, "a message lies beyond the end of the arena"
            done += count

    def close(self) -> None:
        """Give the descriptor back. Mappings end with the last span or tensor that uses them. Idempotent."""
        self._slab = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _map(self, nbytes: int) -> Span:
        """Map the next pages of the common half. See Note [memory left]."""
        nbytes = round_up(nbytes, PAGE)
        if self._next + nbytes > self._limit:
            asked, room = nbytes / 2**20, (self._limit - self._next) / 2**20
            raise _exhausted(f"{asked:.1f} MiB of shared memory were asked for, the arena has {room:.1f} MiB left")
        missing = self._next + nbytes - os.fstat(self.fd).st_blocks * 512
        if missing > (available := available_memory()):
            asked, room = missing / 2**20, available / 2**20
            raise _exhausted(f"{asked:.1f} MiB of shared memory are needed, this machine has {room:.1f} MiB left")
        try:
            memory = mmap.mmap(self.fd, nbytes, offset=self._next)
        except OSError as error:
            raise _exhausted(f"{nbytes / 2**20:.1f} MiB could not be mapped: {error.strerror}") from error
        offset, self._next = self._next, self._next + nbytes
        return Span.over(offset, address_of(memory), memoryview(memory))


def available_memory() -> int:
    """Bytes that this process could get without others being pushed out: the machine's, or its control group's if fewer."""
    available = int(psutil.virtual_memory().available)
    for left in (_left_v2, _left_v1):
        try:
            available = min(available, max(0, left()))
        except (OSError, ValueError, KeyError, StopIteration):
            continue  # no control group, or one without a limit ("max")
    return available


def _left_v2() -> int:
    group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip().lstrip("/")
    folder = Path("/sys/fs/cgroup") / group
    limit = int((folder / "memory.max").read_text())
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - int((folder / "memory.current").read_text()) + int(counts["inactive_file"])


def _left_v1() -> int:
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    group = next(path for _, kinds, path in lines if "memory" in kinds.split(","))
    folder = Path("/sys/fs/cgroup/memory") / group.lstrip("/")
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    limit = min(int((folder / "memory.limit_in_bytes").read_text()), int(counts["hierarchical_memory_limit"]))
    return limit - int((folder / "memory.usage_in_bytes").read_text()) + int(counts["total_inactive_file"])


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Address of writable memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def _exhausted(message: str) -> WireError:
    return WireError("PL405", message)
