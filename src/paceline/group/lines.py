"""Lines: streams of bytes between processes, plain or inside TLS, that never block; and the addresses that they lead to.

An address is ``unix:/path``, ``unix:@name`` (which has no place in the file system) or ``tcp:HOST:PORT``.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from paceline.group import keys
from paceline.terms.errors import PeerLost, UsageError, WireError

if TYPE_CHECKING:
    import ssl

SLICE_S = 0.02
"""Between two calls of a `check`."""

_USER_TIMEOUT_MS = 15_000  # for how long what was sent may stay unanswered; membership notices far earlier
_BACKLOG = 1024
_IOV = 64
_AHEAD = 1 << 12  # bytes that are received in advance, where less was wanted
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Steps = Generator[int, None, None]
"""Something under way: yields the events of ``poll`` that it waits for."""


class Line:
    """A stream of bytes that never blocks: a connected socket.

    Attributes:
        peer: Whose, for people.
        local: Whether what is sent never leaves this machine.
        read_events, write_events: What to wait for when :meth:`read` or :meth:`write` has done nothing.
        reads_ahead: Whether more may be received than was wanted. Only :meth:`read` knows of it then, and no selector.
    """

    read_events, write_events = select.POLLIN, select.POLLOUT
    reads_ahead = False

    def __init__(self, connected: socket.socket, peer: str, local: bool) -> None:
        self.sock, self.peer, self.local = connected, peer, local
        self._ahead: memoryview | None = None
        connected.setblocking(False)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self, view: memoryview) -> int:
        """Receive some bytes; 0 when there are none now. Short pieces come out of what was received in advance.

        Raises:
            PeerLost: The stream has ended (PL431).
            WireError: Something else than TLS came (PL432).
        """
        if self._ahead is None:
            if len(view) >= _AHEAD or not self.reads_ahead:
                return self.receive(view)
            memory = memoryview(bytearray(_AHEAD))
            count = self.receive(memory)
            if not count:
                return 0
            self._ahead = memory[:count]
        count = min(len(view), len(self._ahead))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:] if count < len(self._ahead) else None
        return count

    def receive(self, view: memoryview) -> int:
        """What :meth:`read` does, of the socket itself."""
        try:
            count = self.sock.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.ended(error) from error
        if not count:
            raise self.ended()
        return count

    def write(self, pieces: Sequence[memoryview]) -> int:
        """Send some bytes; 0 when none can be sent now. Raises PeerLost PL431."""
        try:
            return self.sock.sendmsg(pieces[:_IOV])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.ended(error) from error

    def wait(self, events: int, seconds: float | None) -> bool:
        """Wait until there is something to do; False when the time is over."""
        poll = select.poll()
        poll.register(self.sock, events)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1e3))

    def ended(self, error: OSError | None = None) -> PeerLost:
        how = f": {error.strerror or error}" if error is not None else ""
        return PeerLost("PL431", f"{self.peer} closed the connection{how}")

    def cut(self) -> None:
        """End it for both sides; the descriptor stays, for whoever waits on it."""
        with suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class TlsLine(Line):
    """TLS over a line, which it takes over. OpenSSL may not be asked for two things at once, hence the lock."""

    def __init__(self, line: Line, context: ssl.SSLContext, server: bool) -> None:
        import ssl

        self._ssl, self._lock, self._ready = ssl, threading.Lock(), False
        self.peer, self.local, self._ahead = line.peer, line.local, None
        try:
            self._tls = context.wrap_socket(line.sock, server_side=server, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:  # it has ended before it began
            raise PeerLost("PL431", f"{self.peer} closed the connection: {error}") from error
        self.sock = self._tls

    def handshake(self) -> Steps:
        while not self._ready:
            events = self._try(self._tls.do_handshake, None)[1]
            self._ready = not events
            if events:
                yield events

    def receive(self, view: memoryview) -> int:
        count, events = self._try(self._tls.recv_into, view)
        self.read_events = events
        if not events and not count:
            raise self.ended()
        return count or 0

    def write(self, pieces: Sequence[memoryview]) -> int:
        count, self.write_events = self._try(self._tls.send, pieces[0])
        return count or 0

    def _try(self, call: Callable[..., int | None], view: memoryview | None) -> tuple[int | None, int]:
        """What the call returned, and the events that it waits for, if it could do nothing."""
        with self._lock:
            try:
                return (call() if view is None else call(view)), 0
            except self._ssl.SSLWantReadError:
                return None, select.POLLIN
            except self._ssl.SSLWantWriteError:
                return None, select.POLLOUT
            except self._ssl.SSLEOFError as error:
                raise self.ended() from error
            except self._ssl.SSLError as error:
                raise WireError("PL432", f"TLS with {self.peer} failed: {error.reason or error}") from error
            except OSError as error:
                raise self.ended(error) from error


@lru_cache(maxsize=16)
def tls_context(secret: bytes, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with the job's certificate on both sides. Raises WireError PL434."""
    try:
        import ssl

        made, pem = keys.certificate(secret)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the certificate is the job's, wherever it runs
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=made)
        fd = os.memfd_create("paceline-certificate", os.MFD_CLOEXEC)  # Python reads keys from files only
        try:
            os.write(fd, pem.encode())
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        if server:
            context.num_tickets = 0
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise WireError("PL434", f"no TLS 1.3 with Ed25519: {error}") from error
    return context


def wait_for(steps: Iterator[int], line: Line, deadline: float | None, check: Callable[[], None] | None = None) -> bool:
    """Do `steps` until they are done, or time is over: then False."""
    for events in steps:
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if line.wait(events, left if check is None else min(SLICE_S, SLICE_S if left is None else left)):
                break
            if check is not None:
                check()
    return True


# ---- addresses ------------------------------------------------------------------------------------------------------
def parse(address: str) -> tuple[str, str, int]:
    """``("unix", path, 0)``, where an abstract name begins with a zero, or ``("tcp", host, port)``. Raises UsageError PL435."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and len(rest) > 1 and "\0" not in rest:
        return "unix", "\0" + rest[1:] if rest[0] == "@" else rest, 0
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal() and len(port) < 6 and int(port) < 1 << 16:
        return "tcp", host.removeprefix("[").removesuffix("]"), int(port)
    raise UsageError("PL435", f"{address!r} is no address")


def is_local(family: int, name: Any) -> bool:
    """Whether what is sent to this socket address never leaves this machine."""
    if family == socket.AF_UNIX:
        return True
    address = ipaddress.ip_address(name[0].partition("%")[0])
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def same_user(connected: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is of the same user; true of all others."""
    if connected.family != socket.AF_UNIX:
        return True
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


def listen(address: str) -> tuple[socket.socket, str, str]:
    """A listening socket, its address, and the path to remove in the end."""
    scheme, host, port = parse(address)
    try:
        if scheme == "unix":
            return _listen_at(socket.AF_UNIX, host), address, "" if host[0] == "\0" else host
        family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = _listen_at(family, bound)
        shown = f"[{host}]" if ":" in host else host
        return listener, f"tcp:{shown}:{listener.getsockname()[1]}", ""
    except OSError as error:
        raise WireError("PL407", f"cannot listen at {address}: {error.strerror or error}") from error


def _listen_at(family: socket.AddressFamily, bound: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            _remove_dead(bound)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bound)
        if family == socket.AF_UNIX and bound[0] != "\0":
            os.chmod(bound, 0o600)
        listener.setblocking(False)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_dead(path: str) -> None:
    """Remove a socket that a process which was killed has left at `path`."""
    if path[0] != "\0" and os.path.exists(path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except BlockingIOError:
                pass


def reach(address: str, deadline: float, check: Callable[[], None] | None) -> Line:
    """A connected line. Raises WireError PL433."""
    scheme, host, port = parse(address)
    try:
        places: list[tuple[socket.AddressFamily, Any]] = [(socket.AF_UNIX, host)]
        if scheme == "tcp":
            places = [(p[0], p[4]) for p in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for number, (family, where) in enumerate(places, 1):
            connected = socket.socket(family, socket.SOCK_STREAM)
            try:
                line = Line(connected, address, is_local(family, where))
                _connect(line, where, deadline, check)
                if not same_user(connected):
                    raise PermissionError("it belongs to another user")
                return line
            except OSError:
                connected.close()
                if number == len(places):
                    raise
            except BaseException:
                connected.close()
                raise
        raise OSError("it has no address")
    except OSError as error:
        raise WireError("PL433", f"nobody answers at {address}: {error.strerror or error}") from error


def _connect(line: Line, where: Any, deadline: float, check: Callable[[], None] | None) -> None:
    while (number := line.sock.connect_ex(where)) == errno.EAGAIN:  # the queue of a unix socket is full
        if time.monotonic() > deadline:
            raise TimeoutError("no answer in time")
        time.sleep(SLICE_S)
    if number == errno.EINPROGRESS:
        if not wait_for(iter([select.POLLOUT]), line, deadline, check):
            raise TimeoutError("no answer in time")
        number = line.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
