"""A worker's way to one server, whichever of its copies answers.

Over one connection after another it carries what both sides say in order, each once (``exchange.server_numbered``): where a copy has
died, the worker turns to the other one, both tell how far they have heard, and say the rest again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.exchange.server_numbered import Numbered
from paceline.group.frames import Frame, Place
from paceline.group.secure import Connection
from paceline.terms.errors import PacelineError, PeerLost, WireError
from paceline.train.reach import PATIENCE, SOON, refused
from paceline.train.talk import Say

_SLICE = 0.1  # seconds between two looks at the board
_ROUNDS = 3  # in which no copy answers, until none is believed to live
_FAREWELL = 2.0  # seconds that a worker waits until its end is noted

Said = tuple[Say, dict[str, Any], Sequence[memoryview]]


class Way:
    """See above.

    Args:
        addresses: Of all copies of the server.
        open: Connects, or raises.
        check: Called again and again while this waits; what it raises ends the waiting.
        name: Of the worker.
    """

    def __init__(
        self, addresses: Sequence[str], open: Callable[[str], Connection], check: Callable[[], None], name: str
    ) -> None:
        self._addresses, self._open, self._check, self._name = list(addresses), open, check, name
        self._id = secrets.token_hex(8)
        self._line: Numbered[Said] = Numbered(keeps=len(addresses) > 1)
        self._connection: Connection | None = None

    def attach(self, meta: Mapping[str, Any]) -> Mapping[str, Any]:
        """Become known to the server; what it says first.

        Raises:
            StepError, AdoptError: It refuses this worker.
            WireError: PL460, there is none, and none came within ``reach.PATIENCE``.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection = self._open(self._addresses[0])
                self._connection.send(Say.ATTACH, {**meta, "name": self._name, "id": self._id})
                frame = self._next(self._connection)
            except PacelineError as error:
                if error.code not in ("PL433", "PL431") or time.monotonic() > deadline:
                    said = f"the server at {self._addresses[0]} cannot be reached: {error.message}"
                    raise WireError("PL460", said) from error
                frame = None
            if frame is not None and frame.kind == Say.WELCOME:
                self._line.hear(int(frame.meta["n"]), int(frame.meta["h"]))
                return frame.meta
            self._turn_away(frame)

    def send(self, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        """Say something. The buffers stay as they are until it is answered. Raises PeerLost PL460: no copy is left."""
        number = self._line.say((kind, dict(meta), buffers))
        try:
            self._post(number, kind, meta, buffers)
        except PacelineError as error:
            self._resume(error)

    def hear(self, place: Place | None = None) -> Frame | None:
        """The next message, or None if there was none for a while. Raises PeerLost PL460: no copy is left."""
        assert self._connection is not None, "it is attached"
        try:
            frame = self._connection.try_recv(_SLICE, place)
        except PacelineError as error:
            self._resume(error)
            return None
        if frame is None:
            return None
        number, heard = frame.meta.pop("n", 0), frame.meta.pop("h", 0)
        return frame if not number or self._line.hear(number, heard) else None

    def close(self, *, bye: bool = False) -> None:
        """No more of this; `bye`: the worker has ended well. Idempotent."""
        if self._connection is None:
            return
        try:
            if bye and len(self._addresses) == 1:
                self._line.say((Say.BYE, {}, ()))
                self._connection.send(Say.BYE, {"n": self._line.said, "h": self._line.heard}, timeout=1.0)
            elif bye:
                self._take_leave()
        except PacelineError:
            pass  # it is gone already
        self._connection.close()
        self._connection = None

    def _take_leave(self) -> None:
        deadline = time.monotonic() + _FAREWELL
        self.send(Say.BYE, {})
        while time.monotonic() < deadline:
            frame = self.hear()
            if frame is not None and frame.kind == Say.BYE:
                return

    # ---- one connection after another -------------------------------------------------------------------------------
    def _post(self, number: int, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview]) -> None:
        assert self._connection is not None, "it is attached"
        self._connection.send(kind, {**meta, "n": number, "h": self._line.heard}, buffers)

    def _next(self, connection: Connection) -> Frame:
        while (frame := connection.try_recv(_SLICE)) is None:
            self._check()
        return frame

    def _turn_away(self, frame: Frame | None) -> None:
        """From a copy that is gone, or does not answer, to the next one."""
        if self._connection is not None:
            self._connection.close()
        if frame is not None and frame.kind == Say.REFUSE:
            raise refused(frame.meta)
        self._addresses.append(self._addresses.pop(0))
        self._check()
        time.sleep(SOON)

    def _resume(self, error: PacelineError) -> None:
        """Go on over a new connection, with the copy that answers now.

        Raises:
            PeerLost: PL460, there is none, or none that knows this worker.
        """
        self._check()
        silent, deadline = 0, time.monotonic() + PATIENCE
        while len(self._addresses) > 1 and silent < _ROUNDS * len(self._addresses) and time.monotonic() < deadline:
            self._turn_away(None)
            try:
                self._connection = self._open(self._addresses[0])
            except PacelineError:
                silent += 1
                continue
            silent = 0
            try:
                if self._goes_on(self._connection):
                    return
            except PacelineError as later:
                error = later
                if error.code != "PL431":
                    break
        raise PeerLost("PL460", f"the server at {self._addresses[0]} is gone: {error.message}") from error

    def _goes_on(self, connection: Connection) -> bool:
        """Raises PeerLost PL460: it does not know this worker."""
        connection.send(Say.RESUME, {"name": self._name, "id": self._id, "heard": self._line.heard})
        frame = self._next(connection)
        if frame.kind != Say.RESUMED:
            return False
        if not frame.meta["known"]:
            raise PeerLost("PL460", "it has begun afresh")
        for number, (kind, meta, buffers) in self._line.again(int(frame.meta["heard"])):
            self._post(number, kind, meta, buffers)
        return True
