"""The coordinator's process: ``membership`` with a clock, a journal and connections. Imports no torch, so it is there at once.

``python -m paceline.group.coordinator FD`` reads its orders, JSON, from the inherited descriptor FD:

    {"address": "unix:@name", "journal": "/path", "secret_fd": 7, "life_fd": 8, "members": [["worker-0", "<incarnation>"], …],
     "workers_min": 1, "workers_max": 4, "heartbeat": 0.25, "lease": 2.0}

Started again with the same orders it goes on where the journal ends. One thread does everything: read what has come, then let time
pass, write the journal, answer. It ends when ``life_fd`` reaches its end (status 0), when a launcher says stop (0), when the journal
is held by another or damaged or the address cannot be had (2), or when the journal cannot be written (1): what is not durable is
never announced.

A connection with the role ``launcher`` asks, one thing at a time (:class:`Control`); each answer is an ``ANSWER`` with the status,
see ``membership.Coordinator.status``. A certificate is answered when it is in the journal.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from enum import IntEnum
from itertools import count, groupby
from pathlib import Path
from typing import Any

from paceline.group.frames import ANY, Cap, Frame
from paceline.group.journal import Journal
from paceline.group.membership import Coordinator
from paceline.group.secure import Connection, Listener
from paceline.group.view import (
    Action,
    Certificate,
    Close,
    Closed,
    Event,
    Force,
    Identity,
    Limits,
    Note,
    Received,
    Send,
    Tick,
)
from paceline.group.view import Journal as Write
from paceline.terms.errors import PacelineError

CAPS = {ANY: Cap(meta=1 << 18)}
_AT_ONCE = 64  # frames of one connection before the others have their turn
_UNSENT = 256  # messages that a connection may owe before it is given up
_CAME, _LIFE = "came", "life"


class Control(IntEnum):
    """What a launcher sends: ``CERTIFICATE`` {name, incarnation, why}, the others {}. And the answer."""

    CERTIFICATE = 41
    STATUS = 42
    FORCE = 43
    STOP = 44
    ANSWER = 51


class Service:
    """The shell. A context manager; :meth:`run` returns when it is to end.

    Args:
        orders: As in the module's docstring.
        secret: Of the job.

    Raises:
        FileError: The journal is held by another process, damaged, or cannot be had (PL424, PL425, PL601).
        WireError: The address cannot be had (PL407, PL434).
    """

    def __init__(self, orders: Mapping[str, Any], secret: bytes) -> None:
        limits = _limits(orders)
        self._heartbeat = limits.heartbeat
        self._connections: dict[int, Connection] = {}
        self._unsent: dict[int, int] = {}
        self._numbers = count(1)
        self._came: deque[Connection] = deque()
        self._over = False
        with ExitStack() as stack:
            self._journal = Journal(Path(orders["journal"]))
            stack.callback(self._journal.close)
            self._core = Coordinator(limits, self._journal.records, torn=self._journal.torn, now=time.monotonic())
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._bell)
            self._selector.register(self._bell, selectors.EVENT_READ, _CAME)
            if orders.get("life_fd", -1) >= 0:
                self._selector.register(orders["life_fd"], selectors.EVENT_READ, _LIFE)
            stack.callback(self._close_connections)
            listener = Listener(orders["address"], secret, "coordinator", self._welcome, caps=CAPS)
            self.address = stack.enter_context(listener).address
            self._stack = stack.pop_all()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Serve. Raises FileError PL601 when the journal cannot be written."""
        tick = time.monotonic() + self._heartbeat
        again: set[int] = set()
        while not self._over:
            patience = 0.0 if again else max(0.0, tick - time.monotonic())
            again = {link for link in again if self._read(link)}
            for key, events in self._selector.select(patience):
                if key.data == _LIFE:
                    return
                if key.data == _CAME:
                    os.eventfd_read(self._bell)
                elif events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                elif key.data not in again and self._read(key.data):
                    again.add(key.data)
            while self._came:
                link = next(self._numbers)
                connection = self._connections[link] = self._came.popleft()
                self._selector.register(connection, selectors.EVENT_READ, link)
                again.add(link)
            if time.monotonic() >= tick:
                tick = time.monotonic() + self._heartbeat
                self._take(Tick())

    # -- what comes in
    def _welcome(self, connection: Connection) -> None:
        """In the listener's thread."""
        self._came.append(connection)
        os.eventfd_write(self._bell, 1)

    def _read(self, link: int) -> bool:
        """Take what has come over a link. True when there may be more."""
        for _ in range(_AT_ONCE):
            connection = self._connections.get(link)
            if connection is None or self._over:
                return False
            try:
                frame = connection.poll()
            except PacelineError:
                self._drop(link)
                return False
            if frame is None:
                return False
            if connection.role == "launcher":
                self._control(link, frame)
            else:
                self._take(Received(link, frame.kind, frame.meta))
        return True

    def _control(self, link: int, frame: Frame) -> None:
        match frame.kind, frame.meta:
            case Control.CERTIFICATE, {"name": str(name), "incarnation": str(incarnation), "why": str(why)}:
                self._take(Certificate(Identity(name, incarnation), why))
            case Control.FORCE, _:
                self._take(Force())
            case Control.STOP, _:
                self._over = True
            case Control.STATUS, _:
                pass
            case _:
                self._drop(link)
                return
        self._send(link, Control.ANSWER, {"of": frame.kind, **self._core.status()})

    # -- what is done
    def _take(self, event: Event) -> None:
        actions = self._core.handle(event, time.monotonic())
        for write, group in groupby(actions, lambda action: isinstance(action, Write)):
            if write:
                self._journal.append(action.record for action in group if isinstance(action, Write))
            else:
                for action in group:
                    self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Send(link, kind, meta):
                self._send(link, kind, meta)
            case Close(link):
                self._close(link)
            case Note(what, detail):
                print(json.dumps({"mono": round(time.monotonic(), 3), "kind": what, **detail}), flush=True)

    def _send(self, link: int, kind: int, meta: Mapping[str, Any]) -> None:
        connection = self._connections.get(link)
        if connection is not None:
            self._unsent[link] = self._unsent.get(link, 0) + 1
            connection.post(kind, meta)
            self._flush(link)

    def _flush(self, link: int) -> None:
        """Send what the other side takes. Who takes nothing for long is given up; nobody waits for it."""
        connection = self._connections.get(link)
        if connection is None:
            return
        try:
            done = connection.flush()
        except PacelineError:
            self._drop(link)
            return
        if done:
            self._unsent[link] = 0
        elif self._unsent[link] > _UNSENT:
            self._drop(link)
            return
        wanted = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        if self._selector.get_key(connection).events != wanted:
            self._selector.modify(connection, wanted, link)

    def _drop(self, link: int) -> None:
        """A connection has ended by itself."""
        self._close(link)
        self._take(Closed(link))

    def _close(self, link: int) -> None:
        connection = self._connections.pop(link, None)
        self._unsent.pop(link, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()

    def _close_connections(self) -> None:
        for link in list(self._connections):
            self._close(link)
        while self._came:
            self._came.popleft().close()


def _limits(orders: Mapping[str, Any]) -> Limits:
    times = {name: float(orders[name]) for name in ("heartbeat", "lease") if name in orders}
    first = frozenset(name for name, _ in orders["members"])
    unit = int(orders.get("unit", 1))
    return Limits(len(first), orders["workers_min"], orders["workers_max"], first=first, unit=unit, **times)


def main(arguments: list[str]) -> int:
    """The process; its exit status."""
    orders = json.loads(os.pread(int(arguments[0]), 1 << 20, 0))
    secret = os.pread(orders["secret_fd"], 1 << 10, 0)
    try:
        service = Service(orders, secret)
    except PacelineError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    try:
        with service:
            service.run()
    except PacelineError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
