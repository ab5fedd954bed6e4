"""Runs one function on several real processes, for tests of wires.

1. `run_peers` makes a board, an arena and a directory, and starts `size` fresh interpreters that inherit them.
2. Each calls ``function(peer, **arguments)`` and writes lines of JSON into a pipe: marks on the way, a result at the end.
3. The parent reads marks (a test may kill a rank or abort the run at one), collects results, and leaves nothing behind:
   a peer that is late dumps the stacks of all its threads, then its whole process group is killed.

    def add(peer: Peer, x: int) -> int:
        return peer.rank + x

    assert run_peers("test_this_file:add", 2, x=10) == [10, 11]
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.group import arena
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import PacelineError

_BOOT = (
    "import json, sys; order = json.loads(sys.argv[1]); sys.path[:] = order['path']; "
    f"from {__name__} import child; child(order)"
)
_GRACE_S = 10.0  # after one peer has failed, the others have this long to notice
_DUMP_S = 1.0  # and this long to write their stacks
_PR_SET_PDEATHSIG = 1


# ---- inside a peer --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Peer:
    """What a function under test is given.

    Attributes:
        rank, size: Position among the peers.
        board: The shared board; the parent has it too.
        activity: This rank's page of it, registered.
        arena_fd: Inherited descriptor of an empty arena.
        directory: Private directory of this call, the same for all peers; short enough for a unix socket in it.
    """

    rank: int
    size: int
    board: Board
    activity: Activity
    arena_fd: int
    directory: Path
    _pipe: int = field(repr=False, default=-1)

    @property
    def store(self) -> str:
        """A free rendezvous address, ``unix:PATH``."""
        return f"unix:{self.directory / 'store'}"

    def mark(self, point: str) -> None:
        """Tell the parent that this rank is at `point`, and go on."""
        _tell(self._pipe, {"mark": point})

    def halt(self, point: str) -> None:
        """Tell the parent that this rank is at `point`, and stay there until it is killed."""
        self.mark(point)
        while True:
            signal.pause()


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """How `call` ended, as JSON: ``{"value": …}``, or ``{"error": type, "code": …, "message": …}`` for our own errors."""
    try:
        return {"value": call()}
    except PacelineError as error:
        return {"error": type(error).__name__, "code": error.code, "message": error.message}


def child(order: dict[str, Any]) -> None:
    """Entry point of a fresh interpreter."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    board = Board(memoryview(mmap.mmap(order["board_fd"], Board.nbytes(order["size"]))), order["size"])
    activity = board.activity(order["rank"])
    activity.register(os.getpid())
    place = (order["rank"], order["size"], board, activity, order["arena_fd"], Path(order["directory"]), order["pipe"])
    module, _, name = order["target"].partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(Peer(*place), **order["arguments"])
        _tell(order["pipe"], {"result": result})
    except BaseException:
        _tell(order["pipe"], {"failed": traceback.format_exc()})
        raise


def _tell(pipe: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


# ---- in the test ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mark:
    """A peer has told that it is at a point; what the test can do about it.

    Attributes:
        rank, point: Who is where.
        at: Monotonic time when the parent learned it.
        board: The shared board: ``board.abort(lost=1)`` does what the launcher would.
        pids: Process ids by rank.
    """

    rank: int
    point: str
    at: float
    board: Board
    pids: tuple[int, ...]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a peer; with the default it is dead, and its result will be None."""
        os.kill(self.pids[rank], number)


class PeersFailed(AssertionError):
    """A peer failed, or was not done in time; the message holds everybody's output."""


def run_peers(
    target: str | Callable[..., Any],
    size: int,
    *,
    timeout: float = 60.0,
    kill: Mapping[int, str] | None = None,
    on_mark: Callable[[Mark], None] | None = None,
    env: Mapping[str, str] | None = None,
    inherit: Sequence[int] = (),
    **arguments: Any,
) -> list[Any]:
    """Run ``target(peer, **arguments)`` on `size` fresh processes and return their results, by rank.

    Args:
        target: ``"module:function"``, or a function at the top level of a module that the test can import.
        size: Number of peers.
        timeout: Seconds after which every peer dumps its stacks and is killed.
        kill: Ranks to kill with SIGKILL, each when it marks the point given. The result of a killed rank is None.
        on_mark: Called in the parent for every mark.
        env: Further environment variables. OMP_NUM_THREADS is 1 unless given here.
        inherit: Further descriptors that the peers get under the same numbers.
        arguments: JSON values for the function.

    Raises:
        PeersFailed: A peer raised, ended without a result, or was not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="pl-") as directory:
        crew = _Crew(size, Path(directory), kill or {}, on_mark)
        try:
            name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
            crew.start(name, arguments, {"OMP_NUM_THREADS": "1", **(env or {})}, inherit)
            return crew.collect(timeout)
        finally:
            crew.clear()


class _Crew:
    """The processes of one call, and what is known of them."""

    def __init__(
        self, size: int, directory: Path, kill: Mapping[int, str], on_mark: Callable[[Mark], None] | None
    ) -> None:
        self.size, self.directory, self.kill, self.on_mark = size, directory, kill, on_mark
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: list[list[dict[str, Any]]] = [[] for _ in range(size)]
        self.pipes: dict[int, int] = {}  # read end -> rank, while open
        self.partial: dict[int, bytes] = {}
        self.board_fd = os.memfd_create("board")
        os.ftruncate(self.board_fd, Board.nbytes(size))
        self.memory = mmap.mmap(self.board_fd, Board.nbytes(size))
        self.board = Board(memoryview(self.memory), size)
        self.arena_fd = arena.create()

    def start(self, target: str, arguments: Mapping[str, Any], env: Mapping[str, str], inherit: Sequence[int]) -> None:
        for rank in range(self.size):
            reader, writer = os.pipe()
            self.pipes[reader] = rank
            order = {
                "path": sys.path,
                "rank": rank,
                "size": self.size,
                "board_fd": self.board_fd,
                "arena_fd": self.arena_fd,
                "directory": str(self.directory),
                "pipe": writer,
                "target": target,
                "arguments": arguments,
            }
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, json.dumps(order)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self.board_fd, self.arena_fd, writer, *inherit),
                    env={**os.environ, **env},
                    start_new_session=True,
                )
            os.close(writer)
            self.processes.append(process)

    def collect(self, timeout: float) -> list[Any]:
        """Read until every pipe is closed; then everybody's result, or PeersFailed."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for reader in self.pipes:
                selector.register(reader, selectors.EVENT_READ)
            while self.pipes:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise PeersFailed(self._dump(f"not done after {timeout:g} s"))
                for key, _ in ready:
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        if self._failed(self.pipes.pop(key.fd)):
                            deadline = min(deadline, time.monotonic() + _GRACE_S)
        bad = [rank for rank in range(self.size) if self._failed(rank)]
        if bad:
            raise PeersFailed(self._report(f"failed: rank {', '.join(map(str, bad))}"))
        return [self._result(rank) for rank in range(self.size)]

    def clear(self) -> None:
        """End whoever is left, in whole process groups, and close everything."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        for fd in (*self.pipes, self.board_fd, self.arena_fd):
            os.close(fd)
        self.pipes.clear()

    def _read(self, fd: int) -> bool:
        rank = self.pipes[fd]
        data = os.read(fd, 1 << 16)
        *lines, self.partial[fd] = (self.partial.get(fd, b"") + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.told[rank].append(message)
            if "mark" in message:
                self._marked(rank, message["mark"])
        return bool(data)

    def _marked(self, rank: int, point: str) -> None:
        mark = Mark(rank, point, time.monotonic(), self.board, tuple(p.pid for p in self.processes))
        if self.kill.get(rank) == point:
            mark.kill(rank)
        if self.on_mark is not None:
            self.on_mark(mark)

    def _failed(self, rank: int) -> bool:
        code = self.processes[rank].wait(timeout=_GRACE_S)
        return code != -signal.SIGKILL and (code != 0 or not self.told[rank] or "result" not in self.told[rank][-1])

    def _result(self, rank: int) -> Any:
        last = self.told[rank][-1] if self.told[rank] else {}
        return last.get("result")

    def _dump(self, why: str) -> str:
        """Ask everybody who still runs for the stacks of all threads."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)
        return self._report(why)

    def _report(self, why: str) -> str:
        parts = [why]
        for rank, process in enumerate(self.processes):
            now = self.board.read(rank)
            parts.append(
                f"---- rank {rank}: exit {process.poll()}, {now.phase.name} {now.what!r} waits {now.waits_for}"
            )
            parts.append(self._log(rank).read_text(errors="replace")[-8000:])
        return "\n".join(parts)

    def _log(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.log"
