"""One process of the run as the launcher sees it: a session of its own, and the pipes between the two.

* its output, which goes to the screen and, as it came, to ``logs/<name>.log``;
* its *reports*: JSON lines that must arrive even when the disk is full: faults, notices, the end, a result;
* its *life line*: a pipe that only the launcher holds the other end of, see ``worker``.

A worker may have children of its own (loader workers). They are in its session, and end with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.launch.rundir import ProcessEntry, Role, now_text, start_ticks

NOTHING_YET = -1
_PIECE = 1 << 16
_LONGEST_LINE = 1 << 20


class Lines:
    """Cuts a stream of bytes into lines, in time that is linear in their length.

    Args:
        longest: Bytes after which a line without an end is cut, so that memory stays bounded; None never cuts.
    """

    def __init__(self, longest: int | None) -> None:
        self._longest = longest
        self._pieces: list[bytes] = []  # of the line that has not ended
        self._held = 0

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        whole, end, rest = data.rpartition(b"\n")
        lines = self._taken(whole).split("\n") if end else []
        self._pieces.append(rest)
        self._held += len(rest)
        if self._longest is not None and self._held > self._longest:
            lines.append(self._taken(b""))
        return lines

    def rest(self) -> list[str]:
        """What came after the last line's end."""
        left = self._taken(b"")
        return [left] if left else []

    def _taken(self, last: bytes) -> str:
        whole = b"".join((*self._pieces, last))
        self._pieces, self._held = [], 0
        return whole.decode("utf-8", "replace")


@dataclass(eq=False)
class Child:
    """A worker's process, or the coordinator's, or a server's.

    Attributes:
        name, incarnation: Who it is.
        number: The N of ``worker-N``; -1 for all others.
        slot: Its page on the board.
        rank: Its rank as far as is known; in an elastic run the members decide, and it may change.
        epoch: Of the last view that it has told of.
        popen: The process; a session and process group of its own.
        pidfd: Becomes readable when it ends.
        status: Exit status, ``-N`` for signal N, or None while it lives.
    """

    name: str
    incarnation: str
    number: int
    slot: int
    popen: subprocess.Popen[bytes]
    pidfd: int
    report_fd: int
    life_fd: int
    rank: int = -1
    epoch: int = -1
    log_fd: int = -1
    status: int | None = None
    started: str = field(default_factory=now_text)
    lines: dict[int, Lines] = field(default_factory=dict)
    reports: Lines = field(default_factory=lambda: Lines(None))

    @property
    def outputs(self) -> tuple[int, int]:
        """Descriptors of its standard output and error."""
        assert self.popen.stdout is not None
        assert self.popen.stderr is not None
        return self.popen.stdout.fileno(), self.popen.stderr.fileno()

    def entry(self, host: str) -> ProcessEntry:
        """Its line in ``processes.json``."""
        pid, is_worker = self.popen.pid, self.number >= 0
        role: Role = "worker" if is_worker else "server" if self.name.startswith("server") else "coordinator"
        rank = self.rank if is_worker and self.rank >= 0 else None
        return ProcessEntry(self.name, role, rank, pid, self.incarnation, host, self.started, start_ticks(pid))

    # -- reading: what has come, and how many bytes that was; 0 at the end, NOTHING_YET where one would have to wait
    def read_output(self, fd: int, failed: Callable[[OSError], None]) -> tuple[list[str], int]:
        """Lines that have come. `failed` is told once when the log cannot be written."""
        data = _read(fd)
        if data is None:
            return [], NOTHING_YET
        if data and self.log_fd >= 0:
            self._log(data, failed)
        cutter = self.lines.setdefault(fd, Lines(_LONGEST_LINE))
        return cutter.feed(data) if data else cutter.rest(), len(data)

    def read_reports(self) -> tuple[list[dict[str, Any]], int]:
        """Reports that have come."""
        data = _read(self.report_fd)
        if data is None:
            return [], NOTHING_YET
        return [json.loads(line) for line in self.reports.feed(data)], len(data)

    def _log(self, data: bytes, failed: Callable[[OSError], None]) -> None:
        try:
            os.write(self.log_fd, data)
        except OSError as error:
            os.close(self.log_fd)
            self.log_fd = -1
            failed(error)

    # -- ending
    def signal(self, number: int, *, alone: bool = False) -> None:
        """Send a signal to its process group, or only to itself. Nothing happens once it has ended."""
        if self.status is not None:
            return
        try:
            os.kill(self.popen.pid, number) if alone else os.killpg(self.popen.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def final_status(self) -> int:
        """How it has ended, or is about to: waits for the end, and leaves the process as a zombie."""
        seen = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
        assert seen is not None
        return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status

    def was_killed(self, patience: float) -> bool:
        """Whether a signal has ended it, or does within so many seconds."""
        if self.status is None and not select.select([self.pidfd], [], [], patience)[0]:
            return False
        return (self.final_status() if self.status is None else self.status) < 0

    def reap(self) -> None:
        """Wait for the end, and end what the process has left behind.

        While it is a zombie its number cannot be used anew, so its group and session are ended first.
        """
        if self.status is None:
            self.final_status()
            _end_session(self.popen.pid)
            self.status = self.popen.wait()

    def close(self) -> None:
        """Close the descriptors. Idempotent; the process must have ended."""
        for stream in (self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()
        for name in ("pidfd", "report_fd", "life_fd", "log_fd"):
            fd: int = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


def spawn(
    command: Sequence[str],
    environ: Mapping[str, str],
    handoff: Callable[[int, int], Mapping[str, str]],
    inherit: Sequence[int],
    *,
    name: str,
    incarnation: str,
    number: int = -1,
    slot: int = -1,
) -> Child:
    """Start one process. SIGINT is blocked in it: one that comes early waits until the process is ready for it.

    Args:
        command: The interpreter and its arguments.
        environ: Its environment.
        handoff: Given the descriptors of its life line and its reports, the variables that tell it so.
        inherit: Further descriptors.
        name, incarnation, number, slot: Who it is.

    Raises:
        OSError: The system does not give a process or a descriptor.
    """
    life_reader, life_writer = os.pipe()
    report_reader, report_writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        variables = handoff(life_reader, report_writer)
        popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(life_reader, report_writer, *inherit),
            env={**environ, **variables},
            start_new_session=True,
        )
    except BaseException:
        os.close(life_writer)
        os.close(report_reader)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(life_reader)
        os.close(report_writer)
    child = Child(name, incarnation, number, slot, popen, os.pidfd_open(popen.pid), report_reader, life_writer)
    for fd in (*child.outputs, report_reader):
        os.set_blocking(fd, False)
    return child


def _read(fd: int) -> bytes | None:
    """Bytes, ``b""`` at the end, None when there is nothing yet."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None


def _end_session(leader: int) -> None:
    """SIGKILL to every process of the session of `leader`, in whatever group it is."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    for pid in _session(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _session(leader: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != leader:
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry))
    return found
