"""Connections between processes of one job: nobody else gets a word in.

* :func:`connect` and :class:`Listener` make a :class:`Connection` when both sides have proved that they know the job's secret
  (see ``keys``); it carries frames (see ``frames``). On unix sockets the other side must also be the same user.
* Connections to an address that is not this machine's loopback run inside TLS 1.3, in which both sides show the job's
  certificate. The address that was connected to decides; both sides see the same one. Where TLS cannot be had, nothing starts.
* A listener greets all who come in one thread, which waits for nobody: see Note [guests].

[Note: guests] Whoever has not proved itself yet is a guest. There are at most MAX_GUESTS, and half as many from one address of
another machine; a guest has 5 seconds, 4 KiB, and no memory but that. When all seats are taken, newcomers wait in the kernel's
queue, and guests who have said nothing lose theirs after a tenth of a second, others after one: so many half-open connections
delay who is welcome by moments, and never keep it out.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from paceline.group import keys
from paceline.group.frames import ANY, NO_KEY, Cap, Caps, Frame, Inbox, Outbox, Place
from paceline.group.lines import (
    SLICE_S,
    Line,
    Steps,
    TlsLine,
    is_local,
    listen,
    reach,
    same_user,
    tls_context,
    wait_for,
)
from paceline.terms.errors import PacelineError, PeerLost, WireError

CONTROL: Caps = {ANY: Cap(meta=1 << 20)}
"""Of connections that carry only meta."""

GREETING_S = 5.0
MAX_GUESTS = 64
_SILENT_S, _TALKING_S = 0.1, 1.0  # how long guests keep their seats when others wait
_COMPLAINT_S = 10.0  # between two lines about those who were refused


class Connection:
    """Frames to and from another process of this job.

    Sending and receiving do not disturb each other, and each may be done from any thread. A connection on which anything
    failed is closed, and repeats its error.

    Attributes:
        role, about: What the other side says of itself.
        peer: Its address, for people.
    """

    def __init__(self, line: Line, session: keys.Session, caps: Caps) -> None:
        self.role, self.about, self.peer = session.role, session.about, line.peer
        self._line = line
        line.reads_ahead = True  # nothing has come yet, so whoever selects first, and polls until None, misses nothing
        self._inbox = Inbox(session.receive_key, caps, sums=line.local)
        self._outbox = Outbox(session.send_key, sums=line.local)
        self._sending, self._receiving = threading.RLock(), threading.RLock()
        self._failure: PacelineError | None = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For selectors; readable when :meth:`poll` may have something. -1 when closed."""
        return self._line.fileno()

    # -- waiting
    def send(
        self, kind: int, meta: Mapping[str, Any], buffers: Sequence[Any] = (), timeout: float | None = None
    ) -> None:
        """Send a frame. The buffers (anything contiguous) are sent from where they lie.

        Raises:
            PeerLost: The connection has ended, or could not take it in time and is closed therefore (PL431).
        """
        deadline = _deadline(timeout)
        with self._sending:
            self._outbox.put(kind, meta, [memoryview(buffer).cast("B") for buffer in buffers])
            while not self.flush():
                if not self._line.wait(self._line.write_events, _left(deadline)):
                    raise self._failed(PeerLost("PL431", f"{self.peer} took nothing for {timeout:g} s"))

    def recv(self, place: Place | None = None) -> Frame:
        """Wait for the next frame.

        Args:
            place: Provides memory for its buffers; new memory is made without it.

        Raises:
            PeerLost: The connection has ended (PL431).
            WireError: Something else than the next frame came (PL432).
        """
        frame = self.try_recv(None, place)
        assert frame is not None
        return frame

    def try_recv(self, timeout: float | None, place: Place | None = None) -> Frame | None:
        """The next frame, or None when it has not come, or not to its end, within `timeout` seconds. Raises like :meth:`recv`."""
        deadline = _deadline(timeout)
        with self._receiving:
            while (frame := self.poll(place)) is None:
                if not self._line.wait(self._line.read_events, _left(deadline)):
                    break
            return frame

    # -- not waiting
    def poll(self, place: Place | None = None) -> Frame | None:
        """The next frame if it is there. Raises like :meth:`recv`."""
        with self._receiving:
            if self._failure is not None:
                raise self._failure
            self._inbox.place = place
            try:
                return _take(self._line, self._inbox)
            except PacelineError as error:
                raise self._failed(error) from error.__cause__

    def post(
        self,
        kind: int,
        meta: Mapping[str, Any],
        buffers: Sequence[memoryview] = (),
        *,
        urgent: bool = False,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Queue a frame for :meth:`flush`; see ``Outbox.put``."""
        with self._sending:
            self._outbox.put(kind, meta, buffers, urgent=urgent, done=done)

    def flush(self) -> bool:
        """Send what can be sent without waiting; True when nothing is left. Raises PeerLost PL431."""
        with self._sending:
            if self._failure is not None:
                raise self._failure
            try:
                return _give(self._line, self._outbox)
            except PacelineError as error:
                raise self._failed(error) from error.__cause__

    @property
    def unsent(self) -> int:
        """Frames that were posted and have not left: a measure of how far the other side is behind."""
        return len(self._outbox)

    # -- the end
    def abort(self) -> None:
        """End the connection for both sides, now, from any thread: whoever waits on it gets PL431."""
        self._failure = self._failure or PeerLost("PL431", f"the connection with {self.peer} was closed")
        self._line.cut()

    def close(self) -> None:
        """:meth:`abort`, and give the descriptor back. Idempotent."""
        self.abort()
        with self._sending, self._receiving:
            self._line.close()

    def _failed(self, error: PacelineError) -> PacelineError:
        """The first failure stays."""
        self._failure = self._failure or error
        self._line.cut()
        return self._failure


def connect(
    address: str,
    secret: bytes,
    role: str,
    timeout: float = GREETING_S,
    *,
    about: Mapping[str, Any] | None = None,
    caps: Caps = CONTROL,
    check: Callable[[], None] | None = None,
) -> Connection:
    """Connect to a :class:`Listener` of the same job.

    Args:
        address: ``unix:/path``, ``unix:@name`` or ``tcp:HOST:PORT``.
        role, about: What this side says of itself; `about` is JSON of less than 4 KB.
        timeout: Seconds for everything.
        caps: Of what the other side may send.
        check: Called again and again while this waits; what it raises ends the waiting.

    Raises:
        WireError: PL433, nobody answers; PL430, one of the two does not know the secret; PL436, it does not want us; PL434, TLS is
            needed and cannot be had; PL431, the other side is gone.
        UsageError: PL435, this is no address.
    """
    deadline = time.monotonic() + timeout
    line = reach(address, deadline, check)
    try:
        if not line.local:
            line = TlsLine(line, tls_context(secret, server=False), server=False)
        found: list[keys.Session] = []
        talk = keys.greet(secret, role, about or {}, secrets.token_bytes(32))
        if not wait_for(_greeting(line, talk, found), line, deadline, check):
            raise WireError("PL433", f"{address} did not answer within {timeout:g} s")
        return Connection(line, found[0], caps)
    except BaseException as error:
        line.close()
        if isinstance(error, WireError) and error.code == "PL432":
            raise WireError("PL430", f"{address} was not recognised: {error.message}") from error
        raise


@dataclass(eq=False)
class _Guest:
    """Somebody who has not proved itself. `host` is empty where all are of one kind: on this machine."""

    line: Line
    host: str
    since: float
    steps: Generator[int, None, keys.Session] = field(init=False)
    talked: bool = False


class Listener:
    """Lets processes of this job in. Each becomes a :class:`Connection`, which is given to `welcome`.

    Args:
        address: ``unix:/path``, ``unix:@name``, ``tcp:HOST:PORT``; port 0 takes a free one.
        secret: Of the job.
        role, about: What this side says of itself, to those who have proved themselves.
        welcome: Called in the listener's thread; must not wait. ``queue.put`` will do.
        admit: Role and about of who has proved itself in, a reason to refuse it (PL436 there) out. Must not wait.
        caps: Of what they may send.
        say: Is given a line now and then when somebody was refused.

    Attributes:
        address: With the true port.

    Raises:
        WireError: The address cannot be had (PL407); it is not on this machine alone and there is no TLS (PL434).
        UsageError: PL435, this is no address.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        role: str,
        welcome: Callable[[Connection], None],
        *,
        about: Mapping[str, Any] | None = None,
        admit: keys.Admit = lambda role, about: "",
        caps: Caps = CONTROL,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._secret, self._role, self._about = secret, role, about or {}
        self._welcome, self._admit, self._caps = welcome, admit, caps
        self._say = say or _print
        self._guests: dict[int, _Guest] = {}
        self._newcomer: _Guest | None = None
        self._refused, self._quiet_until = 0, 0.0
        self._socket, self.address, self._path = listen(address)
        try:
            if not is_local(self._socket.family, self._socket.getsockname()):
                tls_context(secret, server=True)  # what cannot be had shall be known now
        except BaseException:
            self._close_socket()
            raise
        self._over = False
        self._rope = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ears = selectors.DefaultSelector()
        self._ears.register(self._rope, selectors.EVENT_READ)
        self._ears.register(self._socket, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="paceline-listener", daemon=True)
        self._thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and send all guests away. Connections that were made stay. Idempotent."""
        if self._over:
            return
        self._over = True
        os.eventfd_write(self._rope, 1)
        self._thread.join()
        for guest in [*self._guests.values(), *([self._newcomer] if self._newcomer else [])]:
            guest.line.close()
        self._ears.close()
        os.close(self._rope)
        self._close_socket()

    def _close_socket(self) -> None:
        self._socket.close()
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)

    def _run(self) -> None:
        while not self._over:
            for key, _ in self._ears.select(self._patience()):
                if key.fd in self._guests:
                    self._advance(self._guests[key.fd])
                elif key.fileobj is self._socket:
                    self._accept()
            now = time.monotonic()
            for guest in [g for g in self._guests.values() if now - g.since > GREETING_S]:
                self._send_away(guest, f"no greeting within {GREETING_S:g} s")
            self._seat(now)

    def _patience(self) -> float | None:
        if self._newcomer is not None:
            return _SILENT_S / 4
        return 0.25 if self._guests else None

    def _accept(self) -> None:
        try:
            accepted, where = self._socket.accept()
        except OSError:  # gone again, or no descriptor left
            time.sleep(SLICE_S)
            return
        peer = "a local process" if accepted.family == socket.AF_UNIX else str(where[0])
        try:
            line = Line(accepted, peer, is_local(accepted.family, accepted.getsockname()))
            if not same_user(accepted):
                raise PermissionError("another user")
        except OSError as error:
            accepted.close()
            self._complain(peer, str(error))
            return
        self._newcomer = _Guest(line, "" if line.local else peer, 0.0)
        self._ears.unregister(self._socket)

    def _seat(self, now: float) -> None:
        """Give the newcomer a seat if there is one, or one can be taken from a guest. See Note [guests]."""
        if self._newcomer is None:
            return
        guests = list(self._guests.values())
        neighbours = [g for g in guests if g.host and g.host == self._newcomer.host]
        crowd = neighbours if len(neighbours) >= MAX_GUESTS // 2 else guests if len(guests) >= MAX_GUESTS else []
        if crowd:
            first = min(crowd, key=lambda g: (g.talked, g.since))
            if now - first.since < (_TALKING_S if first.talked else _SILENT_S):
                return
            self._send_away(first, "no greeting, and others waited")
        guest, self._newcomer = self._newcomer, None
        self._ears.register(self._socket, selectors.EVENT_READ)
        guest.since, guest.steps = now, self._greet(guest)
        fd = guest.line.fileno()
        self._guests[fd] = guest
        self._ears.register(fd, selectors.EVENT_READ)
        self._advance(guest)

    def _greet(self, guest: _Guest) -> Generator[int, None, keys.Session]:
        if not guest.line.local:
            guest.line = TlsLine(guest.line, tls_context(self._secret, server=True), server=True)
            yield from guest.line.handshake()
            guest.talked = True
        found: list[keys.Session] = []
        talk = keys.answer(self._secret, self._role, self._about, secrets.token_bytes(32), self._admit)

        def heard() -> None:
            guest.talked = True

        yield from _greeting(guest.line, talk, found, heard)
        return found[0]

    def _advance(self, guest: _Guest) -> None:
        try:
            events = next(guest.steps)
            self._ears.modify(guest.line.fileno(), events)
        except StopIteration as end:
            self._let_in(guest, end.value)
        except PacelineError as error:
            self._send_away(guest, error.message)
        except Exception as error:  # whatever a guest does: the listener lives
            self._send_away(guest, f"{type(error).__name__}: {error}")

    def _let_in(self, guest: _Guest, session: keys.Session) -> None:
        if session.refused:
            self._send_away(guest, session.refused)
            return
        self._ears.unregister(guest.line.fileno())
        del self._guests[guest.line.fileno()]
        self._welcome(Connection(guest.line, session, self._caps))

    def _send_away(self, guest: _Guest, why: str) -> None:
        fd = guest.line.fileno()
        self._ears.unregister(fd)
        del self._guests[fd]
        guest.steps.close()
        guest.line.close()
        self._complain(guest.line.peer, why)

    def _complain(self, who: str, why: str) -> None:
        self._refused += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            self._say(f"{self.address} has refused {self._refused} connections; the last one, from {who}: {why}")
            self._refused, self._quiet_until = 0, now + _COMPLAINT_S


def _print(line: str) -> None:
    print(f"paceline: {line}", file=sys.stderr, flush=True)


# ---- steps ----------------------------------------------------------------------------------------------------------
def _greeting(
    line: Line,
    talk: Generator[keys.Message | None, Frame, keys.Session],
    found: list[keys.Session],
    heard: Callable[[], None] = lambda: None,
) -> Steps:
    """One side of the greeting over a line; its session is appended to `found`."""
    if isinstance(line, TlsLine):
        yield from line.handshake()
    inbox, outbox = Inbox(NO_KEY, keys.GREETING), Outbox(NO_KEY)
    try:
        message = next(talk)
        while True:
            if message is not None:
                outbox.put(*message)
                while not _give(line, outbox):
                    yield line.write_events
            while (frame := _take(line, inbox)) is None:
                yield line.read_events
            heard()
            message = talk.send(frame)
    except StopIteration as end:
        session: keys.Session = end.value
    except WireError as error:
        if error.code != "PL431":
            outbox.put(keys.REFUSED, {})
            with suppress(PacelineError):
                _give(line, outbox)
        raise
    if session.last is not None:
        outbox.put(*session.last)
        while not _give(line, outbox):
            yield line.write_events
    found.append(session)


def _give(line: Line, outbox: Outbox) -> bool:
    """Send what can be sent now; True when that is all."""
    while pieces := outbox.pieces():
        count = line.write(pieces)
        if not count:
            return False
        outbox.sent(count)
    return True


def _take(line: Line, inbox: Inbox) -> Frame | None:
    """Receive what is there, up to the end of a frame, which is returned."""
    while count := line.read(inbox.want()):
        frame = inbox.got(count)
        if frame is not None:
            return frame
    return None


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
