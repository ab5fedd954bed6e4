"""The parameter servers as the launcher sees them: processes that run the same script, beside the workers.

In the place of ``Coordination``: servers know who takes part, because whoever ends closes its connection. ``paceline join`` asks
the launcher, which starts more workers.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from paceline.launch.child import Child
from paceline.launch.control import Answer, Requests
from paceline.launch.coordination import free_address, host_and_port
from paceline.launch.line import memory_file
from paceline.launch.rundir import RunDirectory
from paceline.observe.failure import signal_name

_FAREWELL = 10.0  # seconds that servers have to end when all workers have
_PAUSE = 0.01
_RESTARTS = 20  # of one run; more have a cause that starting again does not mend
_REPLACED = 1000  # copies
_NOBODY_HAS_IT = ("PL460", "PL465")  # faults of a server whose state is gone


class Servers:
    """The servers' processes. A context manager.

    Args:
        count: How many, copies included.
        run: For their logs, and the secret.
        saves: The run makes checkpoints, from which other servers can take over.
        start: Starts the process of a server, given its number, whether all begin again from a checkpoint, and whether it replaces
            one whose copy lives.
        listen: ``HOST`` or ``HOST:PORT`` where launchers of other machines knock; servers then listen on TCP ports of that host too.
        tcp: Workers of this machine use TCP as well, without shared memory.
        copies: Processes of each server; first all first ones, then all second ones.

    Attributes:
        addresses: Where they listen, the lead first.
        doors: Where they listen for workers of other machines.
        secret_fd: A memory file with the secret.
        lost: Why the run cannot go on, or empty.
    """

    child: Child | None = None
    address = ""

    def __init__(
        self,
        count: int,
        run: RunDirectory,
        saves: bool,
        start: Callable[[int, bool, bool], Child],
        listen: str = "",
        tcp: bool = False,
        copies: int = 1,
    ) -> None:
        self._run, self._saves, self._start = run, saves, start
        host, port = host_and_port(listen)
        self.addresses = tuple(free_address("127.0.0.1" if tcp else "", 0) for _ in range(count))
        self.doors = tuple(free_address(host, 0) for _ in range(count)) if host else ()
        self._doors = [free_address("", 0), *([free_address(host, port)] if host else [])]
        self.children: list[Child] = []
        self._last_words: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._copies, self._restarts, self._replaced = copies, 0, 0
        self._empty: set[str] = set()  # copies that have not said that they have their state
        self._somebody_finished = False
        self.lost = ""

    def __enter__(self) -> Servers:
        with ExitStack() as stack:
            secret = secrets.token_bytes(32)
            self.secret_fd = memory_file(stack, "paceline-secret", secret)
            self._run.secret(secret)
            stack.callback(self._run.forget_secret)
            self._control = stack.enter_context(Requests(self._doors, secret))
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def alive(self) -> list[Child]:
        """Those that run."""
        return [child for child in self.children if child.status is None]

    def begin(self) -> None:
        """Start them all."""
        for number in range(len(self.addresses)):
            self.children.append(self._start(number, False, False))
        self._empty_second_copies()

    def open(
        self,
        selector: selectors.BaseSelector,
        say: Callable[[Sequence[str]], None],
        enlist: Callable[[], None],
        answer: Answer,
    ) -> None:
        """The loop begins. See ``Coordination.open``."""
        self._selector, self._say, self._enlist = selector, say, enlist
        for child in self.children:
            self._listen_to(child)
        self._control.open(selector, answer)
        for address in self._control.addresses[1:]:
            command = f"paceline join SCRIPT --address {address} --secret-file FILE -n N"
            say([f"others join with `{command}`; FILE is a copy of {self._run.path / 'secret'}"])

    def lend(self) -> dict[str, Any]:
        """What a launcher of another machine must know to reach the servers."""
        return {"ports": [int(door.rpartition(":")[2]) for door in self.doors]}

    def _listen_to(self, child: Child) -> None:
        for fd in child.outputs:
            self._selector.register(fd, selectors.EVENT_READ, partial(self._on_output, child, fd))
        self._selector.register(child.report_fd, selectors.EVENT_READ, partial(self._on_reports, child))
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._on_exit, child))

    def endpoints(self) -> list[tuple[str, str, str]]:
        """Name, address and purpose of every listening socket."""
        both = (self.addresses, self.doors)
        servers = [(f"server-{number}", door, "parameters") for doors in both for number, door in enumerate(doors)]
        return [*servers, *(("launcher", address, "control") for address in self._control.addresses)]

    @property
    def status(self) -> Mapping[str, Any]:
        """Nothing: servers need nobody to tell them who is gone."""
        return {}

    def certify(self, name: str, incarnation: str, why: str) -> None:
        """Servers have seen it themselves; they have a last checkpoint to write when somebody has finished."""
        self._somebody_finished |= why == "finished"

    def tick(self, now: float) -> None:
        """Nothing to be done."""

    # ---- what they say ----------------------------------------------------------------------------------------------
    def _on_output(self, child: Child, fd: int) -> int:
        lines, count = child.read_output(fd, self._run.failed)
        if lines and fd == child.outputs[1]:
            self._last_words[child.name] = lines[-1]
        if count == 0:
            self._selector.unregister(fd)
        return count

    def _on_reports(self, child: Child) -> int:
        reports, count = child.read_reports()
        for report in reports:
            if report["kind"] == "fault":
                message = (str(report.get("message", "")).splitlines() or [""])[0]
                self._faults[child.name] = f"{report.get('code') or report.get('type')}: {message}"
            elif report["kind"] == "notice" and "copy" not in report:
                self._say([f"{child.name}: {report.get('message')}"])
            elif report["kind"] == "notice":
                self._empty.discard(child.name)
                if self._replaced:
                    self._say([str(report["message"])])
        if count == 0:
            self._selector.unregister(child.report_fd)
        return count

    def _on_exit(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        child.reap()
        registered = self._selector.get_map()
        for fd, read in [
            *((fd, partial(self._on_output, child, fd)) for fd in child.outputs),
            (child.report_fd, partial(self._on_reports, child)),
        ]:
            while fd in registered and read() > 0:
                pass
            if fd in registered:
                self._selector.unregister(fd)
        child.close()
        if child.status and child in self.children:
            self._lose(child)

    def _lose(self, child: Child) -> None:
        """A server is gone. Its copy has what it kept; where there is none, all begin again from the last checkpoint, or the run is lost."""
        assert child.status is not None
        number = self.children.index(child)
        copied = self._copy_of(number)
        how = f"{child.name} {self._how(child)}"
        if copied is not None and child.status > 0:  # another process would fail as well
            self._say([f"{how}; {copied.name} goes on alone"])
            return
        if copied is not None and self._replaced < _REPLACED:
            self._replaced += 1
            self._say([f"{how}; {copied.name} goes on with all that was acknowledged, and gets a new copy"])
            self._replace(number)
            return
        failed = child.status > 0 and not self._faults.get(child.name, "").startswith(_NOBODY_HAS_IT)
        if failed or not self._saves or self._restarts >= _RESTARTS:
            self.lost = how
            return
        self._restarts += 1
        gone, self.children = self.children, []
        for other in gone:
            other.signal(signal.SIGKILL)
        self._say([f"{how}; servers are started again from the newest checkpoint, and workers wait for them"])
        for number in range(len(self.addresses)):
            other = self._start(number, True, False)
            self.children.append(other)
            self._listen_to(other)
        self._empty_second_copies()
        self._enlist()

    def _empty_second_copies(self) -> None:
        self._empty = {child.name for child in self.children[len(self.children) // self._copies :]}

    def _copy_of(self, number: int) -> Child | None:
        """The other copy of a server, if there is one, and it lives, and has its state."""
        half = len(self.addresses) // self._copies
        other = self.children[(number + half) % len(self.children)] if self._copies > 1 else None
        if other is None or other.status is not None or _has_ended(other):
            return None
        while other.report_fd in self._selector.get_map() and self._on_reports(other) > 0:
            pass
        return None if other.name in self._empty else other

    def _replace(self, number: int) -> None:
        """Start a process that gets its state from the copy that is left."""
        child = self.children[number] = self._start(number, False, True)
        self._empty.add(child.name)
        self._listen_to(child)
        self._enlist()

    def _how(self, child: Child) -> str:
        assert child.status is not None
        if child.name in self._faults:
            return f"has failed: {self._faults[child.name]}"
        if child.status < 0:
            kept = "" if self._copies > 1 else ", and with it the parameters that it kept"
            return f"was killed by {signal_name(-child.status)}{kept}"
        words = self._last_words.get(child.name, "")
        return f"ended with exit status {child.status}{': ' + words if words else ''}"

    def _end(self) -> None:
        """All workers have ended: servers end by themselves, or are ended."""
        wait = self._somebody_finished and not self.lost
        deadline = time.monotonic() + (_FAREWELL if wait else 0.0)
        for child in self.children:
            while child.status is None and time.monotonic() < deadline and not _has_ended(child):
                time.sleep(_PAUSE)
            child.signal(signal.SIGKILL)
            child.reap()
            child.close()


def _has_ended(child: Child) -> bool:
    return os.waitid(os.P_PID, child.popen.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def strategy_servers(strategy: str) -> int:
    """How many processes of servers this strategy has, copies included."""
    return _service(strategy)[0]


def strategy_copies(strategy: str) -> int:
    """How many of them keep the same."""
    return _service(strategy)[1]


def _service(strategy: str) -> tuple[int, int]:
    if not strategy:
        return 0, 1
    from paceline.exchange.strategy import build

    service = build(strategy).service
    return (service.processes, service.copies) if service is not None else (0, 1)
