"""A worker's membership: ``view.MemberCore`` with a clock, and a connection of its own to the coordinator.

One thread reads, beats, and connects again when the connection has ended, whatever the worker is doing. The worker looks at
``interrupted`` and ``pending``, which cost nothing, and comes to :meth:`Member.meet` when it has left its wire. What has come is read
before time is let pass, so a process that was suspended learns first what happened without it.
"""

from __future__ import annotations

import os
import secrets
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paceline.group.secure import Connection
from paceline.group.view import (
    NEVER,
    Action,
    Close,
    Closed,
    Connect,
    Event,
    Identity,
    Leave,
    Meet,
    Meeting,
    MemberCore,
    Opened,
    Received,
    Report,
    Send,
    Tick,
    View,
)
from paceline.terms.errors import PacelineError, WireError

_CHECK_S = 0.05  # between two calls of `check`
_HOPELESS = ("PL430", "PL434", "PL435")  # a wrong secret, no TLS, no address: trying again changes nothing


class Member:
    """This process among the members.

    Args:
        connect: Connects to the coordinator, or raises; it should give up after a second or so.
        identity: Who this is.
        about: JSON about this process: host, pid, slot.
        heartbeat, lease: Seconds, as the coordinator has them.
        patience: Seconds that a meeting waits for a coordinator that cannot be reached.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        identity: Identity,
        about: dict[str, Any],
        *,
        heartbeat: float = 0.25,
        lease: float = 2.0,
        patience: float = 60.0,
    ) -> None:
        self._connect, self._lease, self._patience = connect, lease, patience
        self._core = MemberCore(identity, secrets.token_hex(8), about, heartbeat=heartbeat, lease=lease)
        self._changed = threading.Condition()
        self._todo: deque[Action] = deque()
        self._connection: Connection | None = None
        self._error: BaseException | None = None  # why the thread has ended, or cannot connect, ever
        self._boundary = False
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="paceline-member", daemon=True)
        self._thread.start()

    # -- cheap: looked at again and again
    @property
    def name(self) -> str:
        """Of this worker."""
        return self._core.identity.name

    @property
    def view(self) -> View | None:
        """Started last."""
        return self._core.view

    @property
    def interrupted(self) -> bool:
        """A newer epoch was proposed, or this process is a member no longer: leave the wire."""
        return self._core.interrupted or self._error is not None

    @property
    def pending(self) -> bool:
        """Joiners wait: leave the wire at the next step boundary."""
        return self._core.pending

    @property
    def sure(self) -> bool:
        """Whether this process may act alone on behalf of its epoch: nobody can have been told that it is out."""
        return self._core.sure(time.monotonic())

    def evicted(self) -> frozenset[int]:
        """Ranks of `view` that are members no longer; all others when this process is none itself."""
        return self._core.outside

    # -- what a worker does
    def at_boundary(self, step: int) -> None:
        """This worker has left its wire after `step` steps, because of ``pending``; ``meet`` comes next."""
        self._boundary = True

    def meet(self, report: Callable[[View], dict[str, Any]], check: Callable[[], None] | None = None) -> Meeting:
        """Wait until an epoch starts in which this worker takes part. Its wire must have been left.

        Args:
            report: What the others are told, JSON, for each view that is proposed: it may depend on the rank.
            check: Called many times a second; what it raises is raised here.

        Raises:
            WireError: Another process has this name or identity (PL420, PL421), the run has ended (PL422), this process was left out
                (PL423), the coordinator cannot be reached (PL426), or does not want the connection (PL43x).
        """
        began = time.monotonic()
        self._do(Meet(self._boundary))
        self._boundary = False
        while True:
            asked = None
            with self._changed:
                meeting = self._core.take_meeting()
                if meeting is not None:
                    return meeting
                self._object(began)
                asked = self._core.asked
                if asked is None:
                    self._changed.wait(_CHECK_S)
            if asked is not None:
                self._do(Report(asked.epoch, report(asked)))
            if check is not None:
                check()

    def leave(self, why: str) -> None:
        """Tell the coordinator that this worker ends: ``finished``, ``failed`` or ``stopping``. Waits a lease for its answer.

        No epoch change follows ``finished``.
        """
        self._do(Leave(why))
        with self._changed:
            self._changed.wait_for(lambda: self._core.parted or self._core.failed or self._error, self._lease)

    def close(self) -> None:
        """End the thread and the connection. Idempotent."""
        if not self._over:
            self._over = True
            os.eventfd_write(self._bell, 1)
            self._thread.join()
            self._drop()
            self._selector.close()
            os.close(self._bell)

    def _object(self, began: float) -> None:
        if self._core.failed is not None:
            raise WireError(*self._core.failed)
        if self._error is not None:
            raise self._error
        silent = time.monotonic() - max(began, self._core.heard)
        if silent > self._patience:
            text = f"{self.name} has heard nothing of the coordinator for {silent:.0f} s"
            raise WireError("PL426", text if self._core.heard > NEVER else f"{text}, and never did")

    def _do(self, event: Event) -> None:
        """Tell the core; the thread carries out what follows."""
        with self._changed:
            self._todo += self._core.handle(event, time.monotonic())
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            os.eventfd_write(self._bell, 1)

    # -- the thread
    def _run(self) -> None:
        try:
            while not self._over:
                self._turn()
        except BaseException as error:  # whoever waits must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> None:
        while self._todo and not self._over:
            self._carry_out(self._todo.popleft())
        patience = max(0.0, self._core.wake - time.monotonic())
        for key, _ in self._selector.select(0.0 if self._todo else patience):
            if key.fd == self._bell:
                os.eventfd_read(self._bell)
            else:
                self._read()
        if time.monotonic() >= self._core.wake:
            self._do(Tick())

    def _read(self) -> None:
        connection = self._connection
        try:
            while connection is not None and (frame := connection.poll()) is not None:
                self._do(Received(0, frame.kind, frame.meta))
        except PacelineError:
            self._ended()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Connect():
                self._open()
            case Close():
                self._drop()
            case Send(_, kind, meta) if self._connection is not None:
                try:
                    self._connection.send(kind, meta, timeout=self._lease / 2)
                except PacelineError:
                    self._ended()

    def _open(self) -> None:
        try:
            self._connection = self._connect()
        except PacelineError as error:
            if error.code in _HOPELESS:
                raise
            self._do(Closed())
            return
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._do(Opened())
        self._read()  # it may have been read already what came with the greeting

    def _ended(self) -> None:
        self._drop()
        self._do(Closed())

    def _drop(self) -> None:
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._connection.close()
            self._connection = None
