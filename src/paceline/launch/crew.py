"""The workers of one run on this host: what they share is made, they are started, listed, and ended.

1. Two memory files, the board and the arena; they have no name, so nothing of them can be left behind.
2. Where a wire of c10d may be used, a rendezvous behind a unix socket; its name is gone once all ranks have met.
3. In an elastic run a secret, also in a memory file, and the coordinator.
4. Each worker is a fresh interpreter (``worker``) in a session of its own, with one variable that says who it is.

A worker has a *number*, the N of ``worker-N``, which is never given twice; and a *slot*, its page on the board, which a
replacement may get again. In a run that is not elastic number, slot and rank are the same.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paceline.launch.child import Child, spawn
from paceline.launch.coordination import Coordination
from paceline.launch.env import VARIABLE, Handoff
from paceline.launch.host import Host
from paceline.launch.muster import MOST_WORKERS
from paceline.launch.rundir import ProcessEntry, RunDirectory, now_text, start_ticks
from paceline.launch.servers import Servers, strategy_copies, strategy_servers
from paceline.launch.tuning import has_accelerator
from paceline.terms.activity import Board, Snapshot
from paceline.terms.errors import UsageError
from paceline.terms.plan import Place, Plan

_WORKER = (sys.executable, "-m", "paceline.launch.worker")
_RENDEZVOUS = "rendezvous"
_FEWEST_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be started.

    Attributes:
        plan: What was decided.
        strategy_given: The command line named the strategy.
        function: For ``paceline.launch``: what to call, see ``function``.
        hang_after: Seconds without progress that are called a hang, or None for the observer's own measure.
        listen: In an elastic run, where launchers of other machines may knock, see ``coordination``.
        host: The launcher that has begun the run, when this one only joins it.
    """

    plan: Plan
    strategy_given: bool = False
    function: Mapping[str, Any] = field(default_factory=dict)
    hang_after: float | None = None
    listen: str = ""
    host: Host | None = None


def slots(plan: Plan) -> int:
    """Pages of the board: one a rank, or twice as many as there may be workers, so that the dead need not make room first."""
    if not plan.elastic:
        return plan.processes
    return min(MOST_WORKERS, max(2 * plan.workers_max, _FEWEST_SLOTS))


class Crew:
    """The workers. A context manager: whatever happens inside, no process and no file outlives it.

    Args:
        order: What to start.
        run: The run directory, or None to write nothing.

    Attributes:
        board: What every worker is doing, and what it is told.
        children: All workers that were started, by number.
        coordination: In an elastic run: the coordinator, here or elsewhere, or the parameter servers.
    """

    def __init__(self, order: Order, run: RunDirectory | None) -> None:
        self._order, self._run = order, run
        self.size = order.plan.processes
        self.children: dict[int, Child] = {}
        self.coordination: Coordination | Host | Servers | None = None
        self._on_page: list[Child | None] = [None] * slots(order.plan)
        self._servers = strategy_servers(order.plan.strategy) if order.host is None else 0
        self._pages = len(self._on_page) + self._servers  # servers have theirs behind those of the workers
        self._stack = ExitStack()
        self._host = socket.gethostname()
        self._launcher = _own_entry(self._host)
        self._rendezvous: Path | None = None
        self._arena_fd, self._store = -1, ""
        self._endpoints: list[dict[str, str]] = []

    def __enter__(self) -> Crew:
        with ExitStack() as stack:
            self._stack = stack
            stack.callback(self._end_all)
            self._board_fd = self._memory_file("paceline-board")
            nbytes = Board.nbytes(self._pages)
            os.ftruncate(self._board_fd, nbytes)
            self.board = Board(memoryview(mmap.mmap(self._board_fd, nbytes)), self._pages)
            self._function_fd = self._describe_function()
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def alive(self) -> list[Child]:
        """Who still runs."""
        return [child for child in self.children.values() if child.status is None]

    def signal(self, number: int, *, alone: bool = False, spare: Collection[int] = ()) -> None:
        """Send a signal to every worker that runs and is not to be spared: its process group, or (`alone`) itself."""
        for child in self.children.values():
            if child.number not in spare:
                child.signal(number, alone=alone)

    def snapshots(self) -> list[Snapshot]:
        """What is on the board, with the numbers of the workers instead of their pages."""
        found = []
        for slot, child in enumerate(self._on_page):
            if child is not None:
                snapshot = self.board.read(slot)
                waits_for = [other.number for s in snapshot.waits_for if (other := self._on_page[s]) is not None]
                found.append(replace(snapshot, rank=child.number, waits_for=tuple(waits_for)))
        return sorted(found, key=lambda s: s.rank)

    def release(self, child: Child) -> None:
        """A worker that was lost needs its page no longer."""
        if self._on_page[child.slot] is child:
            self._on_page[child.slot] = None

    def enlist(self) -> None:
        """Bring ``processes.json`` up to date."""
        if self._run is not None:
            coordinator = self.coordination.child if self.coordination is not None else None
            servers = self.coordination.alive if isinstance(self.coordination, Servers) else []
            alive = [child.entry(self._host) for child in filter(None, (coordinator, *servers, *self.alive))]
            self._run.processes([self._launcher, *alive])

    def have_met(self) -> None:
        """All ranks are connected: the rendezvous loses its name."""
        if self._rendezvous is not None:
            shutil.rmtree(self._rendezvous, ignore_errors=True)
            self._endpoints = [entry for entry in self._endpoints if entry["purpose"] != _RENDEZVOUS]
            self._publish()

    def listens(self, name: str, addresses: Sequence[str], purpose: str) -> None:
        """A process has opened these sockets to be connected to; ``endpoints.json`` tells."""
        self._endpoints += [{"name": name, "address": address, "purpose": purpose} for address in addresses]
        self._publish()

    def _publish(self) -> None:
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
        plan, first = self._order.plan, self._order.host.first if self._order.host is not None else 0
        wire = plan.wire
        several = self.size > 1
        self._arena_fd = self._make_arena() if several and wire != "torch" else -1
        may_need_c10d = wire == "torch" or (wire == "auto" and has_accelerator()) or _splits(plan.strategy)
        self._store = self._open_store() if several and may_need_c10d else ""
        numbers = range(first, first + self.size)
        incarnations = {number: secrets.token_hex(16) for number in numbers}
        if plan.elastic:
            self._coordinate({_name(number): incarnation for number, incarnation in incarnations.items()})
        for number in numbers:
            self.start_worker(number, incarnations[number])
        self.enlist()

    def _coordinate(self, members: Mapping[str, str]) -> None:
        assert self._run is not None
        order = self._order
        coordination: Coordination | Host | Servers
        if self._servers:
            tcp, copies = order.plan.wire == "tcp", strategy_copies(order.plan.strategy)
            saves = bool(order.plan.checkpoint)
            coordination = Servers(self._servers, self._run, saves, self._start_server, order.listen, tcp, copies)
        else:
            coordination = order.host or Coordination(order.plan, order.listen, self._run, members)
        coordination.__enter__()
        self._stack.push(coordination)
        self.coordination = coordination
        if isinstance(coordination, Servers):
            coordination.begin()
        for name, address, purpose in coordination.endpoints():
            self.listens(name, [address], purpose)

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
        self.listens("launcher", [f"unix:{path}"], _RENDEZVOUS)
        return f"unix:{path}"

    def start_worker(self, number: int, incarnation: str = "") -> Child:
        """Start the worker of the next number on a free page of the board.

        Raises:
            UsageError: PL103, the system does not give a process; PL112, the board has no page for it.
        """
        if None not in self._on_page:
            raise UsageError("PL112", f"all {len(self._on_page)} pages of the board are taken")
        slot = self._on_page.index(None)
        self.board.clear(slot)
        place = self._place(number, slot, incarnation or secrets.token_hex(16))
        try:
            child = self._spawn(place, number)
        except OSError as error:
            message = (
                f"{self.size} processes were asked for, and the system refused number {number + 1}: {error.strerror}"
            )
            raise UsageError(
                "PL103", message, help="ask for fewer, or raise the limits (`ulimit -u`, `ulimit -n`)."
            ) from error
        begins = self._order.host is None and number < self.size
        child.rank = place.rank if begins else -1
        self.children[number] = child
        self._on_page[slot] = child
        return child

    def _start_server(self, number: int, again: bool, replaces: bool = False) -> Child:
        """Start one of the parameter servers, `again` where all have ended, or one in the place of one. Raises UsageError PL103."""
        place = self._place(0, len(self._on_page) + number, secrets.token_hex(16))
        place = replace(place, name=f"server-{number}", serves=number, replaces=replaces)
        try:
            return self._spawn(replace(place, plan=replace(place.plan, resume="auto")) if again else place, -1)
        except OSError as error:
            message = f"the system refused a process for server {number}: {error.strerror}"
            raise UsageError("PL103", message, help="raise the limits (`ulimit -u`, `ulimit -n`).") from error

    def _spawn(self, place: Place, number: int) -> Child:
        """A fresh interpreter that is told who it is. Raises OSError."""
        order = self._order

        def handoff(life_fd: int, report_fd: int) -> Mapping[str, str]:
            told = Handoff(place, os.getpid(), life_fd, report_fd, order.strategy_given, self._function_fd)
            return {VARIABLE: told.encode()}

        environ = {**os.environ, **dict(order.plan.settings)}
        handles = (place.board_fd, place.arena_fd, place.secret_fd, self._function_fd)
        child = spawn(
            _WORKER,
            environ,
            handoff,
            [fd for fd in handles if fd >= 0],
            name=place.name,
            incarnation=place.incarnation,
            number=number,
            slot=place.slot,
        )
        child.log_fd = self._run.open_log(place.name) if self._run is not None else -1
        return child

    def _place(self, number: int, slot: int, incarnation: str) -> Place:
        coordination = self.coordination
        return Place(
            rank=number,
            size=self.size,
            local_rank=slot,
            local_size=self.size,
            host=self._host,
            hosts=(0,) * self.size,
            name=_name(number),
            incarnation=incarnation,
            run_dir=self._run.path if self._run is not None else None,
            launcher="paceline",
            board_fd=self._board_fd,
            arena_fd=self._arena_fd,
            store=self._store,
            plan=self._order.plan,
            slot=slot,
            slots=self._pages,
            coordinator=coordination.address if coordination is not None else "",
            secret_fd=coordination.secret_fd if coordination is not None else -1,
            servers=self._server_addresses(),
            doors=coordination.doors if isinstance(coordination, Servers) else (),
        )

    def _server_addresses(self) -> tuple[str, ...]:
        if isinstance(self.coordination, Servers):
            return self.coordination.addresses
        return self.coordination.servers if isinstance(self.coordination, Host) else ()

    # -- ending
    def _end_all(self) -> None:
        self.signal(signal.SIGKILL)
        for child in self.children.values():
            child.reap()
            child.close()
        if self._run is not None:
            self._run.processes([])


def _splits(strategy: str) -> bool:
    from paceline.exchange.strategy import splits

    return splits(strategy)


def _name(number: int) -> str:
    return f"worker-{number}"


def _own_entry(host: str) -> ProcessEntry:
    pid = os.getpid()
    return ProcessEntry("launcher", "launcher", None, pid, secrets.token_hex(16), host, now_text(), start_ticks(pid))
