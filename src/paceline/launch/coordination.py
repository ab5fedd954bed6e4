"""The coordinator as the launcher sees it: a process that is kept alive, is told of deaths, and says who takes part.

* The *process* has a life line like a worker's, writes ``logs/coordinator.log``, and is started again whenever it ends, with
  the same journal and address, later each time when it does not last. Workers go on stepping meanwhile.
* The run's *secret* lies in a memory file that the coordinator and the workers inherit, and in ``secret`` of the run directory,
  readable by its owner only, for ``paceline join``.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from paceline.launch.child import Child, spawn
from paceline.launch.control import Answer, Requests
from paceline.launch.layout import replica_ranks
from paceline.launch.line import Line, memory_file
from paceline.launch.rundir import RunDirectory
from paceline.observe.failure import signal_name
from paceline.observe.words import duration
from paceline.terms.errors import UsageError
from paceline.terms.plan import Plan

_PROCESS = (sys.executable, "-m", "paceline.group.coordinator")
_LASTED = 5.0  # seconds after which a coordinator that ends is started again at once
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
LEASE = 5.0
"""Seconds without a sign of life after which a worker is left out. Deaths need no lease, the launcher sees them; this is for the
frozen. A worker that holds its interpreter for some seconds is not frozen."""


class Coordination:
    """The coordinator's process, and the line to it. A context manager.

    Args:
        plan: With the limits of the run.
        listen: ``HOST`` or ``HOST:PORT`` where launchers of other machines knock; the coordinator takes the next port. When
            empty, both listen on unix sockets without names in the file system.
        run: For its journal, its log, and the secret.
        members: Incarnations of the workers that the run begins with, by name.

    Attributes:
        address: Where it listens, ``unix:@NAME`` or ``tcp:HOST:PORT``.
        secret_fd: A memory file with the secret.
        child: Its process, while there is one.
        status: What it said last, see ``group.membership``.
        lost: Never anything: it is started again.
    """

    lost = ""

    def __init__(self, plan: Plan, listen: str, run: RunDirectory, members: Mapping[str, str]) -> None:
        self._plan, self._run, self._members = plan, run, members
        self._job = secrets.token_hex(16)
        host, port = host_and_port(listen)
        self.address = free_address(host, port + 1 if port else 0)
        self._doors = [free_address("", 0), *([free_address(host, port)] if host else [])]
        self.child: Child | None = None
        self._pause, self._start_at, self._began = 0.0, 0.0, 0.0
        self._failures = 0
        self._last_words = ""

    def __enter__(self) -> Coordination:
        with ExitStack() as stack:
            secret = secrets.token_bytes(32)
            self.secret_fd = memory_file(stack, "paceline-secret", secret)
            self._run.secret(secret)
            stack.callback(self._run.forget_secret)
            stack.callback(self._end)
            self._start()
            self._line = Line(self.address, secret)
            stack.callback(self._line.close)
            self._control = stack.enter_context(Requests(self._doors, secret))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(
        self,
        selector: selectors.BaseSelector,
        say: Callable[[Sequence[str]], None],
        enlist: Callable[[], None],
        answer: Answer,
    ) -> None:
        """The loop begins.

        Args:
            selector: Of the loop, which calls what is registered with a descriptor.
            say: Tells the person at the terminal.
            enlist: Called when the process is another one.
            answer: Answers the requests of ``paceline join``.
        """
        self._selector, self._say, self._enlist = selector, say, enlist
        self._listen_to()
        self._control.open(selector, answer)
        for address in self._control.addresses[1:]:
            command = f"paceline join {self._plan.script} --address {address} --secret-file FILE -n N"
            say([f"others join with `{command}`; FILE is a copy of {self._run.path / 'secret'}"])

    def lend(self) -> dict[str, Any]:
        """What a launcher of another machine must know to reach those who coordinate."""
        return {"ports": [int(self.address.rpartition(":")[2])]}

    def endpoints(self) -> list[tuple[str, str, str]]:
        """Name, address and purpose of every listening socket."""
        doors = [("launcher", address, "control") for address in self._control.addresses]
        return [("coordinator", self.address, "membership"), *doors]

    @property
    def status(self) -> Mapping[str, Any]:
        return self._line.status

    def certify(self, name: str, incarnation: str, why: str) -> None:
        """This worker has ``died`` or ``finished``."""
        self._line.certify(name, incarnation, why)

    def tick(self, now: float) -> None:
        """Ten times a second: start it again when it is time to, and ask how things are."""
        if self.child is None and now >= self._start_at:
            try:
                self._start()
            except OSError as error:
                self._later(now, f"could not be started ({error.strerror})")
                return
            self._listen_to()
            self._enlist()
        self._line.poll(now)

    # -- the process
    def _start(self) -> None:
        run = self._run

        with ExitStack() as stack:
            config_fd = memory_file(stack, "paceline-coordinator", b"")

            def handoff(life_fd: int, report_fd: int) -> Mapping[str, str]:
                os.pwrite(config_fd, self._config(life_fd), 0)
                return {}

            self.child = spawn(
                (*_PROCESS, str(config_fd)),
                os.environ,
                handoff,
                [config_fd, self.secret_fd],
                name="coordinator",
                incarnation=secrets.token_hex(16),
            )
        self._began = time.monotonic()
        self.child.log_fd = run.open_log("coordinator")

    def _config(self, life_fd: int) -> bytes:
        plan = self._plan
        told = {
            "address": self.address,
            "journal": str(self._run.path / "membership.journal"),
            "secret_fd": self.secret_fd,
            "life_fd": life_fd,
            "job": self._job,
            "members": [list(member) for member in self._members.items()],
            "workers_min": plan.workers_min,
            "workers_max": plan.workers_max,
            "lease": LEASE,
            "unit": replica_ranks(plan),
        }
        return json.dumps(told).encode()

    def _listen_to(self) -> None:
        child = self.child
        assert child is not None
        for fd in (*child.outputs, child.report_fd):
            self._selector.register(fd, selectors.EVENT_READ, partial(self._on_output, child, fd))
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._on_exit, child))

    def _on_output(self, child: Child, fd: int) -> int:
        lines, count = child.read_output(fd, self._run.failed)
        if lines and fd == child.outputs[1]:
            self._last_words = lines[-1]
        if count == 0:
            self._selector.unregister(fd)
        return count

    def _on_exit(self, child: Child) -> None:
        """It has ended, and shall not have."""
        self._selector.unregister(child.pidfd)
        child.reap()
        for fd in (*child.outputs, child.report_fd):
            while fd in self._selector.get_map() and self._on_output(child, fd) > 0:
                pass
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        child.close()
        self.child = None
        assert child.status is not None
        words = f": {self._last_words}" if self._last_words else ""
        how = f"was killed by {signal_name(-child.status)}" if child.status < 0 else f"ended{words}"
        self._later(time.monotonic(), how)
        self._enlist()

    def _later(self, now: float, how: str) -> None:
        """Decide when it is started again."""
        lasted = self.child is None and now - self._began >= _LASTED
        self._pause = 0.0 if lasted else min(_LONGEST_PAUSE, max(_FIRST_PAUSE, 2 * self._pause))
        self._failures = 0 if lasted else self._failures + 1
        self._start_at, self._began = now + self._pause, now
        if self._failures < 4 or self._failures % 16 == 0:
            when = f"in {duration(self._pause)}" if self._pause >= 1 else "now"
            self._say([f"the coordinator {how}; it is started again {when}, and training goes on"])

    def _end(self) -> None:
        if self.child is not None:
            self.child.signal(signal.SIGKILL)
            self.child.reap()
            self.child.close()
            self.child = None


def host_and_port(listen: str) -> tuple[str, int]:
    """The two parts of ``--listen``; port 0 where none is named. Raises UsageError PL105."""
    host, colon, port = listen.rpartition(":")
    if not colon or listen.endswith("]"):
        return listen, 0
    if not port.isdecimal() or not 0 < int(port) < 65535:
        raise UsageError("PL105", f"--listen {listen}: the port is not between 1 and 65534")
    return host, int(port)


def free_address(host: str, port: int) -> str:
    """An address that nobody has, so that one can say it beforehand, and take it again after a restart.

    Raises:
        UsageError: PL105, it is no address of this machine, or is taken.
    """
    if not host:
        return f"unix:@paceline-{secrets.token_hex(8)}"
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(*found[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
            return f"tcp:{host}:{probe.getsockname()[1]}"
    except OSError as error:
        message = f"--listen {host}: {error.strerror or error}"
        raise UsageError("PL105", message, help="give a name or address of this machine.") from error
