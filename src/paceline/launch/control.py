"""The launcher's door for those who come later: ``paceline join`` asks it for more workers.

Requests and answers are frames of ``group.secure`` with JSON and nothing else. Who knocks knows the secret of the run; what was
said is heard in the launcher's own loop, so an answer is as quick as that.
"""

from __future__ import annotations

import os
import queue
import selectors
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from paceline.terms.errors import EXPLANATIONS, PacelineError, UsageError

if TYPE_CHECKING:
    from paceline.group.secure import Connection

REQUEST, ANSWER = 1, 2
ROLE = "launcher"
_PATIENCE = 5.0

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Requests:
    """Listens, hears and answers. A context manager.

    Args:
        addresses: Where; ports may be 0.
        secret: Of the run.

    Attributes:
        addresses: With the true ports.
    """

    def __init__(self, addresses: Sequence[str], secret: bytes) -> None:
        self._wanted, self._secret = addresses, secret
        self._came: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._guests: list[Connection] = []

    def __enter__(self) -> Requests:
        from paceline.group.secure import Listener

        with ExitStack() as stack:
            self._rope = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._rope)
            stack.callback(self._part)
            listeners = [
                stack.enter_context(Listener(address, self._secret, ROLE, self._welcome, say=lambda text: None))
                for address in self._wanted
            ]
            self.addresses = [listener.address for listener in listeners]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, selector: selectors.BaseSelector, answer: Answer) -> None:
        """The loop begins: `answer` makes an answer of a request; an error of ours it raises is the answer then."""
        self._selector, self._answer = selector, answer
        selector.register(self._rope, selectors.EVENT_READ, self._on_guests)

    def _welcome(self, connection: Connection) -> None:
        self._came.put(connection)
        os.eventfd_write(self._rope, 1)

    def _on_guests(self) -> None:
        os.eventfd_read(self._rope)
        while not self._came.empty():
            connection = self._came.get()
            self._guests.append(connection)
            self._selector.register(connection.fileno(), selectors.EVENT_READ, partial(self._on_frames, connection))
            self._on_frames(connection)  # they may have come with the greeting

    def _on_frames(self, connection: Connection) -> None:
        try:
            while (frame := connection.poll()) is not None:
                connection.send(ANSWER, self._answered(frame.meta), timeout=_PATIENCE)
        except PacelineError:  # it is gone, or talks nonsense
            self._selector.unregister(connection.fileno())
            self._guests.remove(connection)
            connection.close()

    def _answered(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return self._answer(request)
        except PacelineError as error:
            return {"code": error.code, "message": error.message, "help": error.help}

    def _part(self) -> None:
        while not self._came.empty():
            self._guests.append(self._came.get())
        for connection in self._guests:
            connection.close()


def ask(address: str, secret: bytes, request: Mapping[str, Any]) -> tuple[Connection, Mapping[str, Any]]:
    """Ask the launcher of a run; its answer, and the connection, which lasts as long as the launcher.

    Raises:
        WireError: It cannot be reached, or does not know the secret (PL43x).
        UsageError: It has refused.
    """
    from paceline.group.secure import connect

    connection = connect(address, secret, "join", _PATIENCE)
    try:
        connection.send(REQUEST, request, timeout=_PATIENCE)
        frame = connection.try_recv(_PATIENCE)
        answer = frame.meta if frame is not None else {"code": "PL109", "message": f"{address} does not answer"}
        if answer.get("code") in EXPLANATIONS:
            raise UsageError(answer["code"], str(answer.get("message")), help=answer.get("help"))
    except BaseException:
        connection.close()
        raise
    return connection, answer
