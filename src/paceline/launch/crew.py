"""The ranks of one run on this host: what they share is made, they are started, listed, and ended.

1. Two memory files, the board and the arena; they have no name, so nothing of them can be left behind.
2. Where a wire of c10d may be used, a rendezvous behind a unix socket; its name is gone once all ranks have met.
3. Each rank is a fresh interpreter (``worker``) in a session of its own, with one variable that says who it is.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.launch.child import Child, spawn
from paceline.launch.env import VARIABLE, Handoff
from paceline.launch.rundir import ProcessEntry, RunDirectory, now_text, start_ticks
from paceline.terms.activity import Board
from paceline.terms.errors import UsageError
from paceline.terms.plan import Place, Plan

_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
_WORKER = (sys.executable, "-m", "paceline.launch.worker")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be started.

    Attributes:
        plan: What was decided.
        strategy_given: The command line named the strategy.
        function: For ``paceline.launch``: what to call, see ``function``.
        hang_after: Seconds without progress that are called a hang, or None for the observer's own measure.
    """

    plan: Plan
    strategy_given: bool = False
    function: Mapping[str, Any] = field(default_factory=dict)
    hang_after: float | None = None


class Crew:
    """The ranks. A context manager: whatever happens inside, no rank and no file outlives it.

    Args:
        order: What to start.
        run: The run directory, or None to write nothing.

    Attributes:
        board: What every rank is doing, and what it is told.
        children: By rank, as far as they have been started.
    """

    def __init__(self, order: Order, run: RunDirectory | None) -> None:
        self._order, self._run = order, run
        self.size = order.plan.processes
        self.children: list[Child] = []
        self._stack = ExitStack()
        self._host = socket.gethostname()
        self._launcher = _own_entry(self._host)
        self._rendezvous: Path | None = None
        self._endpoints: list[dict[str, str]] = []

    def __enter__(self) -> Crew:
        with ExitStack() as stack:
            self._stack = stack
            stack.callback(self._end_all)
            self._board_fd = self._memory_file("paceline-board")
            os.ftruncate(self._board_fd, Board.nbytes(self.size))
            self.board = Board(memoryview(mmap.mmap(self._board_fd, Board.nbytes(self.size))), self.size)
            self._function_fd = self._describe_function()
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def alive(self) -> bool:
        """Somebody still runs."""
        return any(child.status is None for child in self.children)

    def signal(self, number: int, *, alone: bool = False, spare: Collection[int] = ()) -> None:
        """Send a signal to every rank that runs and is not to be spared: its process group, or (`alone`) itself."""
        for child in self.children:
            if child.rank not in spare:
                child.signal(number, alone=alone)

    def enlist(self) -> None:
        """Bring ``processes.json`` up to date."""
        if self._run is not None:
            alive = [child.entry(self._host) for child in self.children if child.status is None]
            self._run.processes([self._launcher, *alive])

    def have_met(self) -> None:
        """All ranks are connected: the rendezvous loses its name."""
        if self._rendezvous is not None:
            shutil.rmtree(self._rendezvous, ignore_errors=True)

    def listens(self, rank: int, addresses: Sequence[str]) -> None:
        """A rank has opened these sockets to be connected to; ``endpoints.json`` tells."""
        name = self.children[rank].name
        self._endpoints += [{"name": name, "address": address, "purpose": "gloo"} for address in addresses]
        if self._run is not None:
            self._run.endpoints(sorted(self._endpoints, key=lambda entry: (entry["name"], entry["address"])))

    # -- starting
    def _memory_file(self, name: str) -> int:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def _describe_function(self) -> int:
        if not self._order.function:
            return -1
        fd = self._memory_file("paceline-function")
        with open(fd, "wb", closefd=False) as file:
            file.write(json.dumps(dict(self._order.function)).encode())
        return fd

    def _start(self) -> None:
        wire = self._order.plan.wire
        several = self.size > 1
        arena_fd = self._make_arena() if several and wire != "torch" else -1
        may_need_c10d = wire == "torch" or (wire == "auto" and any(map(os.path.exists, _ACCELERATORS)))
        store = self._open_store() if several and may_need_c10d else ""
        for rank in range(self.size):
            self._start_rank(self._place(rank, arena_fd, store))
        self.enlist()

    def _make_arena(self) -> int:
        from paceline.group import arena

        fd = arena.create()
        self._stack.callback(os.close, fd)
        return fd

    def _open_store(self) -> str:
        from paceline.group.store_server import StoreServer

        self._rendezvous = Path(tempfile.mkdtemp(prefix="paceline-"))
        self._stack.callback(shutil.rmtree, self._rendezvous, ignore_errors=True)
        path = self._rendezvous / "store"
        self._stack.callback(StoreServer(path).close)
        return f"unix:{path}"

    def _start_rank(self, place: Place) -> None:
        order = self._order

        def handoff(life_fd: int, report_fd: int) -> tuple[str, str]:
            told = Handoff(place, os.getpid(), life_fd, report_fd, order.strategy_given, self._function_fd)
            return VARIABLE, told.encode()

        environ = {**os.environ, **dict(order.plan.settings)}
        inherit = [fd for fd in (place.board_fd, place.arena_fd, self._function_fd) if fd >= 0]
        try:
            child = spawn(
                _WORKER, environ, handoff, inherit, rank=place.rank, name=place.name, incarnation=place.incarnation
            )
        except OSError as error:
            message = f"{self.size} processes were asked for, and the system refused number {place.rank + 1}: {error.strerror}"
            raise UsageError(
                "PL103", message, help="ask for fewer, or raise the limits (`ulimit -u`, `ulimit -n`)."
            ) from error
        self.children.append(child)
        child.log_fd = self._run.open_log(place.name) if self._run is not None else -1

    def _place(self, rank: int, arena_fd: int, store: str) -> Place:
        return Place(
            rank=rank,
            size=self.size,
            local_rank=rank,
            local_size=self.size,
            host=self._host,
            hosts=(0,) * self.size,
            name=f"rank{rank}",
            incarnation=secrets.token_hex(16),
            run_dir=self._run.path if self._run is not None else None,
            launcher="paceline",
            board_fd=self._board_fd,
            arena_fd=arena_fd,
            store=store,
            plan=self._order.plan,
        )

    # -- ending
    def _end_all(self) -> None:
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.reap()
            child.close()
        if self._run is not None:
            self._run.processes([])


def _own_entry(host: str) -> ProcessEntry:
    pid = os.getpid()
    return ProcessEntry("launcher", "launcher", None, pid, secrets.token_hex(16), host, now_text(), start_ticks(pid))
