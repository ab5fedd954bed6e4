"""c10d's store over the rendezvous of our launcher: no port, no pickle (see ``store_server``)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import Store

from paceline.group.store_table import Garbage, Op, Status, pack_request, read_answer
from paceline.terms.errors import WireError

_SLACK_S = 5.0  # the server keeps the deadline; the client gives up on a server that does not answer this much later


class UnixStore(Store):
    """A client of :class:`~paceline.group.store_server.StoreServer`. c10d calls it from its own threads; calls take turns.

    A ``get`` or ``wait`` ends with the key, at its deadline, or when the server closes, whichever comes first.

    Args:
        path: The server's socket.
        timeout: How long ``get`` and ``wait`` wait for a key.

    Raises:
        WireError: Nobody serves there (PL411). Also from every method, at its deadline and when the server has gone.
    """

    timeout: timedelta  # a property of c10d's, which its stubs forget

    def __init__(self, path: Path | str, timeout: timedelta = timedelta(minutes=5)) -> None:
        super().__init__()
        self.set_timeout(timeout)
        self._path = str(path)
        self._turn = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(self._path)
        except OSError as error:
            self._socket.close()
            raise WireError("PL411", f"no rendezvous answers at {self._path}: {error}") from error

    def close(self) -> None:
        """Close the connection. Idempotent; a call that waits in another thread raises."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()

    # -- what c10d calls
    def set(self, key: str, value: str | bytes) -> None:
        self._ask(Op.SET, key.encode(), _raw(value))

    def get(self, key: str) -> bytes:
        return self._ask(Op.GET, key.encode(), wait=self.timeout)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._ask(Op.WAIT, *(key.encode() for key in keys), wait=timeout or self.timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(Op.CHECK, *(key.encode() for key in keys)) == b"1"

    def add(self, key: str, value: int) -> int:
        return int(self._ask(Op.ADD, key.encode(), b"%d" % value))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return self._ask(Op.COMPARE_SET, key.encode(), _raw(expected_value), _raw(desired_value))

    def delete_key(self, key: str) -> bool:
        return self._ask(Op.DELETE, key.encode()) == b"1"

    def num_keys(self) -> int:
        return int(self._ask(Op.COUNT))

    def clone(self) -> UnixStore:
        """A second connection, so that a thread of c10d's does not wait for its turn behind a waiting ``get``."""
        return UnixStore(self._path, self.timeout)

    def has_extended_api(self) -> bool:
        return False

    # c10d's C++ side looks these two up under the names that they have there.
    deleteKey = delete_key  # noqa: N815
    getNumKeys = num_keys  # noqa: N815

    def _ask(self, op: Op, *fields: bytes, wait: timedelta = timedelta(0)) -> bytes:
        seconds = wait.total_seconds()
        with self._turn:
            try:
                self._socket.settimeout(seconds + _SLACK_S)
                self._socket.sendall(pack_request(op, fields, round(seconds * 1e3)))
                status, payload = read_answer(self._socket)
            except (OSError, Garbage) as error:
                self.close()  # a late answer would be taken for that of the next request
                raise WireError("PL411", f"the rendezvous at {self._path} does not answer: {error}") from error
        if status is Status.TIMEOUT:
            names = ", ".join(field.decode(errors="replace") for field in fields)
            raise WireError("PL411", f"after {seconds:g} s nobody has published {names} at {self._path}")
        if status is Status.REFUSED:
            raise WireError("PL411", f"the rendezvous at {self._path} refused: {payload.decode(errors='replace')}")
        return payload


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
