"""The rendezvous of one host: a small table of bytes behind a unix socket. Imports no torch, so the launcher can serve it.

c10d wants a store to exchange addresses through. Its own TCPStore listens on all interfaces and serves whoever connects.
This one has no port: a socket of mode 0600 in a directory of mode 0700, and a connection from another user is closed
unread. Bytes that are no request close the connection that they came from, and nothing else.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from paceline.group.store_table import MAX_BODY, REQUEST, Garbage, Request, Status, Table, pack_answer
from paceline.terms.errors import WireError

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PIECE = 1 << 16
_LONGEST_SLEEP_S = 60.0


@dataclass(eq=False)
class _Client:
    socket: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    waiting: Request | None = None
    deadline: float = 0.0


class StoreServer:
    """Serves one table until it is closed; clients that wait then get an error at once.

    Args:
        path: The socket to make. Its directory is made with mode 0700 where it is missing, and must be ours alone.

    Raises:
        WireError: The socket cannot be had, or its directory is open to others (PL407).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._table = Table()
        self._clients: set[_Client] = set()
        self._listener = _listen(self.path)
        self._ears = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._ears.register(self._listener, selectors.EVENT_READ)
        self._ears.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="paceline-store", daemon=True)
        self._thread.start()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, close every connection and remove the socket. Idempotent."""
        if self._thread.is_alive():
            self._rope.send(b"!")
            self._thread.join()
        self._rope.close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _serve(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for client in list(self._clients):
                self._part(client)
            for end in (self._listener, self._bell):
                end.close()
            self._ears.close()

    def _turn(self) -> bool:
        """One round of the loop. False when the bell has rung."""
        for key, events in self._ears.select(self._patience()):
            if key.fileobj is self._bell:
                return False
            if key.fileobj is self._listener:
                self._welcome()
            else:
                self._serve_client(key.data, events)
        self._answer_those_who_wait()
        return True

    def _patience(self) -> float | None:
        deadlines = [c.deadline for c in self._clients if c.waiting is not None]
        return min(_LONGEST_SLEEP_S, max(0.0, min(deadlines) - time.monotonic())) if deadlines else None

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor left: the next round tries anew
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        if _PEER.unpack(credentials)[1] != os.geteuid():
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.add(client)
        self._ears.register(connection, selectors.EVENT_READ, client)

    def _part(self, client: _Client) -> None:
        self._ears.unregister(client.socket)
        client.socket.close()
        self._clients.discard(client)

    def _serve_client(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(client)
            self._work(client)
        except (OSError, Garbage):
            self._part(client)

    def _read(self, client: _Client) -> None:
        piece = client.socket.recv(_PIECE)
        if not piece:
            raise ConnectionError("end of stream")
        client.inbox += piece
        if len(client.inbox) > REQUEST.size + MAX_BODY + _PIECE:
            raise Garbage("more than one request at a time")

    def _work(self, client: _Client) -> None:
        """Answer what can be answered and send what can be sent."""
        while client.waiting is None and (request := Request.take(client.inbox)) is not None:
            client.waiting, client.deadline = request, time.monotonic() + request.wait_ms / 1e3
            self._try(client)
        self._send(client)

    def _try(self, client: _Client) -> None:
        assert client.waiting is not None
        answer = self._table.answer(client.waiting.op, client.waiting.fields)
        if answer is None and time.monotonic() >= client.deadline:
            answer = Status.TIMEOUT, b""
        if answer is not None:
            client.waiting = None
            client.outbox += pack_answer(answer)

    def _send(self, client: _Client) -> None:
        with suppress(BlockingIOError):
            while client.outbox:
                del client.outbox[: client.socket.send(client.outbox)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outbox else 0)
        self._ears.modify(client.socket, wanted, client)

    def _answer_those_who_wait(self) -> None:
        for client in [c for c in self._clients if c.waiting is not None]:
            self._try(client)
            if client.waiting is None:
                self._serve_client(client, 0)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.parent.stat()
        if mode.st_uid != os.geteuid() or mode.st_mode & 0o077:
            raise PermissionError(f"{path.parent} is open to other users")
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise WireError("PL407", f"no rendezvous at {path}: {error}") from error
    return listener
