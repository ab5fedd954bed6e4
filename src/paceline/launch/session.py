"""This process's session: who it is, where its events go, its one job. What ``paceline.job()`` asks.

Under plain ``python`` it is next to nothing: no thread, no file, no descriptor; only an exit handler. Under ``paceline run``
``worker`` begins it before the script and ends it afterwards. Under torchrun, Slurm or MPI nobody does that, so it ends
itself when the interpreter does.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import secrets
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from paceline.launch import env
from paceline.launch.env import Handoff
from paceline.terms.activity import Board
from paceline.terms.event import Event, Sink, ignore
from paceline.terms.plan import Place

if TYPE_CHECKING:
    import torch

    from paceline.exchange.chain import Exchange
    from paceline.group.reunion import Reunion
    from paceline.group.wire import Wire
    from paceline.observe.events import EventWriter
    from paceline.observe.heartbeat import Heartbeat
    from paceline.train.job import Job

DEFAULT_STRATEGY = "ddp()"
_REPORTED = (
    "adopt",
    "view",
    "notice",
    "export",
    "place",
    "end",
)  # events that the launcher must hear of at once, whatever becomes of the disk


_SECRET = 32  # bytes


class Session:
    """One process's session.

    Args:
        place: Who it is.
        board: Where it says what it is doing.
        sink: Where its events go.
        strategy_given: The command line named the strategy, which then overrides the script's.
    """

    def __init__(self, place: Place, board: Board, sink: Sink = ignore, strategy_given: bool = False) -> None:
        self.place, self.board, self.sink = place, board, sink
        self.activity = board.activity(place.slot)
        self._strategy_given = strategy_given
        self._job: Job | None = None
        self.built: Any = None

    def begin_building(self) -> None:
        """The script begins. Where the strategy says so, ranks keep their own rows of what it builds, until it is adopted."""
        from paceline.exchange.strategy import splits

        if self.place.size == 1 or not splits(self.place.plan.strategy):
            return
        from paceline.launch.groups import built_in_parts

        self.built = built_in_parts(self.place)
        if self.built is not None:
            self.built.__enter__()

    @property
    def adopted(self) -> bool:
        """The script has adopted something."""
        return self._job is not None and self._job.adopted

    def job(self, strategy: str | Exchange | None = None) -> Job:
        """The job, made at the first call.

        Raises:
            UsageError: The strategy cannot be (PL2xx).
            StepError: The strategy is given after ``adopt`` (PL410).
        """
        if self._job is None:
            self._decide(strategy)
            self._job = self._make_job()
        if strategy is not None and self._strategy_given:
            self._say_overridden(strategy)
        elif strategy is not None:
            self._job.use_strategy(strategy)
        return self._job

    def _decide(self, strategy: str | Exchange | None) -> None:
        """Where nobody else can have named it (torchrun, Slurm, MPI) the script says how replicas are split."""
        if strategy is None or self.place.launcher in ("plain", "paceline"):
            return
        from paceline.exchange.strategy import build

        exchange = build(strategy)
        if exchange.axes:
            self.place = replace(self.place, plan=replace(self.place.plan, strategy=exchange.text))

    def _make_job(self) -> Job:
        from paceline.exchange.strategy import splits
        from paceline.train.job import Job

        place = self.place
        if place.size > 1 and splits(place.plan.strategy):
            return self._make_split_job()
        if not place.servers:
            return Job(place, self._connect, self.sink, self.activity, self._reunion())
        from paceline.train.served_job import ServedJob

        secret = os.pread(place.secret_fd, _SECRET, 0)
        return ServedJob(place, self.sink, self.activity, secret)

    def _make_split_job(self) -> Job:
        from paceline.launch.groups import Groups
        from paceline.train.split_job import SplitJob

        groups = Groups(self.place, self.board, self.activity)
        return SplitJob(self.place, self._connect, groups, self.built, self.sink, self.activity, self._reunion())

    def _connect(self, device: torch.device) -> Wire:
        from paceline.launch.connect import open_wire

        return open_wire(self.place, device, self.activity, self.board, self.sink)

    def _reunion(self) -> Reunion | None:
        """How this process meets the other members of an elastic run."""
        place = self.place
        if not place.coordinator:
            return None
        from paceline.group.coordinator import CAPS
        from paceline.group.member import Member
        from paceline.group.reunion import Reunion
        from paceline.group.secure import connect
        from paceline.group.view import Identity
        from paceline.launch.connect import host_identity, own_address

        secret = os.pread(place.secret_fd, _SECRET, 0)
        host, always_tcp = host_identity(), place.plan.wire == "tcp"
        identity = Identity(place.name, place.incarnation)
        about = {"host": host, "pid": os.getpid(), "slot": place.slot}
        member = Member(lambda: connect(place.coordinator, secret, "worker", 1.0, caps=CAPS), identity, about)
        lobby = None
        if always_tcp or place.coordinator.startswith("tcp:"):
            from paceline.group.lobby import Lobby

            lobby = Lobby(own_address(place.coordinator), secret)
            self._listens(lobby.address)
        pages = f"{host} {os.fstat(place.board_fd).st_ino}"
        return Reunion(
            member,
            host,
            place.slot,
            pages,
            self.board,
            self.activity,
            lobby=lobby,
            secret=secret,
            always_tcp=always_tcp,
        )

    def _listens(self, address: str) -> None:
        """This process has a listening socket."""

    def _say_overridden(self, strategy: str | Exchange) -> None:
        from paceline.exchange.strategy import build

        asked, given = build(strategy).text, self.place.plan.strategy
        if asked != given and self.place.rank == 0:
            self.sink(Event("notice", 0, {"message": f"--strategy {given} overrides the script's {asked}"}))

    def finish(self, error: BaseException | None = None) -> None:
        """The script has ended, by `error` if it did not end well. Idempotent."""
        if self._job is not None:
            self._job.finish(error)


class LaunchedSession(Session):
    """The session of a rank of ``paceline run``: a shared board, events, a heartbeat, reports to the launcher.

    Args:
        handoff: What the launcher left.
    """

    def __init__(self, handoff: Handoff) -> None:
        from paceline.observe.events import EventWriter
        from paceline.observe.heartbeat import Heartbeat

        place = handoff.place
        if not place.plan.strategy:
            place = replace(place, plan=replace(place.plan, strategy=DEFAULT_STRATEGY))
        memory = mmap.mmap(place.board_fd, Board.nbytes(place.slots))
        super().__init__(place, Board(memoryview(memory), place.slots), self._take, handoff.strategy_given)
        self.activity.register(os.getpid())
        self._report_fd, self._sending = handoff.report_fd, threading.Lock()
        path = place.run_dir / "events" / f"{place.name}.jsonl" if place.run_dir is not None else None
        self._writer: EventWriter = EventWriter(
            path, name=place.name, incarnation=place.incarnation, on_failure=self._events_failed
        )
        script = Path(place.plan.script).absolute() if handoff.function_fd < 0 else None
        self._heartbeat: Heartbeat = Heartbeat(self.activity, script, self._writer.flush)
        self._heartbeat.start()
        self.sink(Event("start", 0, {"rank": place.rank, "size": place.size, "pid": os.getpid(), "host": place.host}))

    def _take(self, event: Event) -> None:
        """The sink."""
        self._writer(event)
        if event.kind in _REPORTED:
            self.report(event.kind, **event.data)

    def _connect(self, device: torch.device) -> Wire:
        """Opens the wire, and tells what it listens on."""
        from paceline.launch.connect import listening

        before = listening()
        wire = super()._connect(device)
        if opened := listening() - before:
            self.report("listening", addresses=sorted(opened))
        return wire

    def _listens(self, address: str) -> None:
        self.report("listening", addresses=[address], purpose="exchange")

    def report(self, kind: str, **data: Any) -> None:
        """Tell the launcher. It is gone when it does not listen; then so is this process, soon."""
        from paceline.observe.plain import plain

        try:
            self._send(json.dumps(plain({"kind": kind, **data}), allow_nan=False))
        except OSError:
            pass

    def result(self, text: str) -> None:
        """Tell the launcher what a launched function has returned, as JSON text."""
        self._send(f'{{"kind": "result", "value": {text}}}')

    def _send(self, line: str) -> None:
        """A whole line: the heartbeat's thread has reports of its own."""
        rest = memoryview(line.encode() + b"\n")
        with self._sending:
            while rest:
                rest = rest[os.write(self._report_fd, rest) :]

    def _events_failed(self, error: OSError) -> None:
        message = f"the events of {self.place.name} cannot be written ({error.strerror or error}); training goes on"
        self.report("notice", code="PL601", message=message)

    def close(self) -> None:
        """Stop the heartbeat and write what is left. Nothing is emitted afterwards."""
        self._heartbeat.stop()
        self._writer.close()


# ---- the one of this process ----------------------------------------------------------------------------------------
_session: Session | None = None


def current() -> Session:
    """This process's session, made at the first call unless ``worker`` has begun it."""
    global _session
    if _session is None:
        _session = _from_environment()
    return _session


def begin(handoff: Handoff) -> LaunchedSession:
    """Make the session of a launched rank. Called once, before the script."""
    global _session
    launched = LaunchedSession(handoff)
    _session = launched
    return launched


def _from_environment() -> Session:
    """A process without a worker around it ends its session itself, with the exception that ended the script."""
    place = Place() if _is_helper() else env.place(os.environ)
    if not place.plain:
        place = replace(place, host=socket.gethostname(), incarnation=secrets.token_hex(16))
    session = Session(place, Board.private(place.size))
    session.activity.register(os.getpid())
    atexit.register(_Farewell(session, watch=not place.plain).say)
    return session


def _is_helper() -> bool:
    """A process that ``multiprocessing`` has started, such as a loader worker, has its parent's environment and no rank."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


class _Farewell:
    """Remembers the exception that ended the script, for the handler at exit, which is not told.

    Args:
        session: Whose end it is.
        watch: Remember exceptions; else nothing is hooked.
    """

    def __init__(self, session: Session, watch: bool) -> None:
        self._session = session
        self._error: BaseException | None = None
        self._next = sys.excepthook
        if watch:
            sys.excepthook = self._hook

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._error = error
        self._next(kind, error, trace)

    def say(self) -> None:
        self._session.finish(self._error)
