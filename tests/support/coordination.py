"""A real coordinator and real members, each a process, for tests that kill, freeze and cut.

with Coordination(tmp_path) as job:
    a, b = job.members(2)
    assert a.meet()["epoch"] == 1
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from paceline.group.coordinator import CAPS, Control
from paceline.group.member import Member
from paceline.group.secure import connect
from paceline.group.view import Identity, Meeting, View
from paceline.terms.errors import PacelineError

PATIENCE = 30.0
LEASE = 1.5
_PDEATHSIG = "import ctypes, signal; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
_MEMBER = f"{_PDEATHSIG}import json, sys; order = json.loads(sys.argv[1]); sys.path[:] = order['path']; from {__name__} import member; member(order)"


# ---- inside a member's process ----------------------------------------------------------------------------------------
def member(order: dict[str, Any]) -> None:
    """Do what the lines of the standard input say, and answer each with a line."""
    secret = os.pread(order["secret_fd"], 100, 0)
    me = Member(
        partial(connect, order["address"], secret, "worker", 1.0, caps=CAPS),
        Identity(order["name"], order["incarnation"]),
        {"pid": os.getpid()},
        lease=LEASE,
        patience=order.get("patience", 60.0),
    )
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            said = _do(me, what, *arguments)
        except PacelineError as error:
            said = {"code": error.code, "message": error.message}
        print(json.dumps(said), flush=True)
    me.close()


def _do(me: Member, what: str, *arguments: Any) -> dict[str, Any]:
    if what == "meet":

        def report(view: View) -> dict[str, Any]:
            return {"of": me.name, "epoch": view.epoch, "rank": [m.name for m in view.members].index(me.name)}

        met: Meeting = me.meet(report)
        return {"epoch": met.view.epoch, "members": [m.name for m in met.view.members], "reports": met.reports}
    if what == "until":
        deadline = time.monotonic() + PATIENCE
        while not getattr(me, arguments[0]) and time.monotonic() < deadline:
            time.sleep(0.002)
    elif what == "boundary":
        me.at_boundary(arguments[0])
    elif what == "leave":
        me.leave(arguments[0])
    elif what == "close":
        me.close()
    names = ("interrupted", "pending", "sure")
    return {**{name: getattr(me, name) for name in names}, "evicted": sorted(me.evicted()), "at": time.monotonic()}


# ---- in the test ----------------------------------------------------------------------------------------------------------
class MemberProcess:
    """A worker that does as it is told; `ask` waits for the answer, `tell` does not."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.name, self.incarnation = order["name"], order["incarnation"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MEMBER, json.dumps({**order, "path": sys.path})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(order["secret_fd"],),
        )

    def tell(self, *what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), f"{self.name} says nothing"
        line = self.process.stdout.readline()
        assert line, f"{self.name} has ended"
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, *what: Any) -> dict[str, Any]:
        self.tell(*what)
        return self.answer()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


class Coordination:
    """The coordinator's process, as a launcher has it.

    Args:
        directory: For the journal.
        workers: The first epoch waits for so many; also the largest number unless `most` says otherwise.
    """

    def __init__(self, directory: Path, workers: int = 3, least: int = 1, most: int = 0) -> None:
        self.journal = directory / "membership.journal"
        self._members: list[MemberProcess] = []
        self._secret = secrets.token_bytes(32)
        self._secret_fd = os.memfd_create("secret")
        os.pwrite(self._secret_fd, self._secret, 0)
        self._config_fd = os.memfd_create("orders")
        life, self._life = os.pipe()
        self.address = f"unix:@paceline-test-{secrets.token_hex(8)}"
        names = [[f"worker-{i}", ""] for i in range(workers)]
        self.orders = {
            "address": self.address,
            "journal": str(self.journal),
            "secret_fd": self._secret_fd,
            "life_fd": life,
            "members": names,
            "workers_min": least,
            "workers_max": most or workers,
            "lease": LEASE,
        }
        os.pwrite(self._config_fd, json.dumps(self.orders).encode(), 0)
        self.process = self.start()

    def __enter__(self) -> Coordination:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._members:
            process.end()
        self.kill()
        for fd in (self._secret_fd, self._config_fd, self.orders["life_fd"], self._life):
            os.close(fd)

    def start(self) -> subprocess.Popen[str]:
        """One more life of it."""
        code = f"{_PDEATHSIG}import runpy; runpy.run_module('paceline.group.coordinator', run_name='__main__', alter_sys=True)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._config_fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(self._config_fd, self._secret_fd, self.orders["life_fd"]),
        )
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def cut_life_line(self) -> None:
        os.close(self._life)
        self._life = os.memfd_create("nothing")

    def member(self, number: int, incarnation: str = "", **more: Any) -> MemberProcess:
        order = {"name": f"worker-{number}", "incarnation": incarnation or secrets.token_hex(16), **more}
        process = MemberProcess({**order, "address": self.address, "secret_fd": self._secret_fd})
        self._members.append(process)
        return process

    def members(self, count: int) -> list[MemberProcess]:
        return [self.member(number) for number in range(count)]

    def control(self, kind: Control, **meta: Any) -> dict[str, Any]:
        """Ask as a launcher does, as soon as the coordinator answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with connect(self.address, self._secret, "launcher", 1.0, caps=CAPS) as line:
                    line.send(kind, meta)
                    return line.recv().meta
            except PacelineError:
                assert time.monotonic() < deadline, "no coordinator"
                time.sleep(0.01)

    def certify(self, lost: MemberProcess, why: str = "died") -> dict[str, Any]:
        return self.control(Control.CERTIFICATE, name=lost.name, incarnation=lost.incarnation, why=why)


def meet(*members: MemberProcess) -> list[dict[str, Any]]:
    """All of them meet; what each has come to."""
    for one in members:
        one.tell("meet")
    return [one.answer() for one in members]


KILL, STOP, CONTINUE = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
