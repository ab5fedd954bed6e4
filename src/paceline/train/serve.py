"""A server of a run with parameter servers: the shell around ``exchange.server`` and ``shard``.

It runs the user's script like a worker, and stops where the loop begins. Then it listens, and one thread does everything, one
message after another. Server 0 is the *lead*: it runs the core, which decides the order of all updates, and keeps the ledger. The
others carry out the lead's entries in that order, each as soon as the pushes that it needs have come.
"""

from __future__ import annotations

import os
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

from paceline.exchange.service import Service
from paceline.group.frames import Frame
from paceline.group.secure import Connection, Listener, connect
from paceline.terms.errors import Aborted, AdoptError, PacelineError, PeerLost
from paceline.train.keeping import Kept
from paceline.train.lead import Lead
from paceline.train.memory import Memory
from paceline.train.served import reach
from paceline.train.shard import Guest, Part, Shard
from paceline.train.talk import CAPS, Say

_CAME, _LIFE = -1, -2
_AT_ONCE = 64  # messages of one connection before the others have their turn
_BEAT = 0.1  # seconds between two looks at the board


class Server:
    """One server. A context manager; :meth:`run` returns when the run is over.

    Args:
        kept: What is trained.
        service: What the strategy asks of servers.
        addresses: Of all servers.
        index: Which of them this is.
        secret: Of the run.
        over: Whether the run is being ended.
        lead: Decides, where this is the lead; else None.

    Raises:
        WireError: PL407, the address cannot be had.
    """

    def __init__(
        self,
        kept: Kept,
        service: Service,
        addresses: Sequence[str],
        index: int,
        secret: bytes,
        over: Callable[[], bool],
        lead: Lead | None,
    ) -> None:
        self.shard = Shard(kept, index, service.delay)
        self._kept, self._index, self._over, self._lead = kept, index, over, lead
        self._guests: dict[int, Guest] = {}
        self._by_name: dict[str, Guest] = {}
        self._peers: dict[int, Connection] = {}  # of the lead: the other servers
        self._entries: deque[Mapping[str, Any]] = deque()
        self._pulls: list[tuple[int, int]] = []
        self._connections: dict[int, Connection] = {}
        self._numbers = count(1)
        self._came: deque[Connection] = deque()
        with ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._bell)
            self._selector.register(self._bell, selectors.EVENT_READ, _CAME)
            stack.callback(self._close_all)
            if lead is None:
                connection = reach(partial(connect, secret=secret, role="server", caps=CAPS), addresses[0], self._check)
                connection.send(Say.ENTER, {"index": index, "is": kept.description})
                self._add(connection)
            self._listener = stack.enter_context(Listener(addresses[index], secret, "server", self._welcome, caps=CAPS))
            if lead is not None:
                lead.begin(self.shard, self._carry_out, len(addresses) - 1)
            self._stack = stack.pop_all()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _check(self) -> None:
        if self._over():
            raise Aborted("PL404", "the run was ended while this server waited for the lead")

    # ---- the loop -------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until all workers have ended well, or the run is being ended."""
        again: set[int] = set()
        while not self._done():
            again = {link for link in again if self._read(link)}
            for key, events in self._selector.select(0.0 if again else _BEAT):
                if key.data == _CAME:
                    os.eventfd_read(self._bell)
                elif events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                elif key.data not in again and self._read(key.data):
                    again.add(key.data)
            while self._came:
                again.add(self._add(self._came.popleft()))
            if self._lead is not None:
                self._lead.admit()
        for link, guest in list(self._guests.items()):
            if guest.name not in self._by_name or not guest.gone:
                self._refuse(link, "PL422", "the run has ended")

    def _done(self) -> bool:
        if self._over():
            return True
        if self._lead is not None:
            return self._lead.done
        return not self._connections and not self._came

    def _welcome(self, connection: Connection) -> None:
        """In the listener's thread."""
        self._came.append(connection)
        os.eventfd_write(self._bell, 1)

    def _add(self, connection: Connection) -> int:
        link = next(self._numbers)
        self._connections[link] = connection
        self._selector.register(connection, selectors.EVENT_READ, link)
        return link

    def _read(self, link: int) -> bool:
        """Take what has come over a link. True when there may be more."""
        for _ in range(_AT_ONCE):
            connection = self._connections.get(link)
            if connection is None:
                return False
            guest = self._guests.get(link)
            try:
                frame = connection.poll(self._place_of(guest) if guest is not None else None)
                if frame is None:
                    return False
                self._hear(link, connection, guest, frame)
            except (KeyError, TypeError, ValueError) as error:
                self._refuse(link, "PL462", f"a message that cannot be understood: {error!r}")
            except PacelineError as error:
                if connection.fileno() < 0 or error.code.startswith("PL43"):
                    self._drop(link)
                    return False
                self._refuse(link, error.code, error.message)
        return True

    def _place_of(self, guest: Guest) -> Callable[[int, Any, Sequence[int]], list[memoryview]] | None:
        """Where a push from another host goes."""
        if guest.memory.shared:
            return None
        return lambda kind, meta, lengths: self._kept.pushed(guest.memory, self._index)

    # ---- what comes -------------------------------------------------------------------------------------------------
    def _hear(self, link: int, connection: Connection, guest: Guest | None, frame: Frame) -> None:
        meta = frame.meta
        if guest is None:
            self._hear_stranger(link, connection, frame)
        elif frame.kind == Say.STEP:
            guest.pushes[int(meta["seq"])] = meta
            if self._lead is not None:
                self._lead.step(guest.name, meta)
            self._go_on()
        elif frame.kind == Say.SCHEDULE:
            self.shard.schedule(int(meta["schedule"]), str(meta["which"]), meta["args"])
        elif frame.kind == Say.PULL:
            self._pulls.append((link, int(meta["version"])))
            self._answer_pulls()
        elif self._lead is not None:
            self._lead.hear(guest.name, frame.kind, meta)

    def _hear_stranger(self, link: int, connection: Connection, frame: Frame) -> None:
        match frame.kind:
            case Say.ATTACH:
                self._attach(link, connection, frame.meta)
            case Say.ENTER if self._lead is not None:
                self._check_same(str(frame.meta["is"]), f"server {frame.meta['index']}")
                self._peers[link] = connection
                self._lead.entered()
            case Say.ENTRY if self._lead is None:
                self._entries.append(frame.meta)
                self._go_on()
            case _:
                self._drop(link)

    def _check_same(self, theirs: str, who: str) -> None:
        if theirs != self._kept.description:
            raise AdoptError("PL303", f"{who} has other models, optimizers or schedules than server {self._index}")

    def _attach(self, link: int, connection: Connection, meta: Mapping[str, Any]) -> None:
        name = str(meta["name"])
        self._check_same(str(meta["is"]), name)
        memory = Memory(self._kept.layout, self._kept.buffer_layout, handle=str(meta["handle"]), shared=False)
        guest = Guest(name, connection, memory)
        self._guests[link] = self._by_name[name] = guest
        self._send(link, Say.WELCOME, self._lead.welcome() if self._lead is not None else {})

    # ---- what is done -----------------------------------------------------------------------------------------------
    def _carry_out(self, entry: Mapping[str, Any]) -> None:
        """The lead has decided: do it here, and tell the other servers."""
        if entry["do"] in ("grant", "met", "refuse", "origin"):
            self._tell(entry)
            return
        for link in list(self._peers):
            self._send(link, Say.ENTRY, entry)
        self._entries.append(entry)
        self._go_on()

    def _go_on(self) -> None:
        """Do what can be done, in order."""
        while self._entries and self._do(self._entries[0]):
            self._entries.popleft()
        self._answer_pulls()

    def _do(self, entry: Mapping[str, Any]) -> bool:
        """Do one entry; False when something that it needs has not come yet."""
        match entry["do"]:
            case "apply":
                return self._apply(entry)
            case "keep" | "drop":
                guest = self._who_pushed(entry["worker"], entry["seq"])
                if guest is None:
                    return False
                if entry["do"] == "keep":
                    self.shard.keep(guest, entry["seq"])
                else:
                    self._take(guest, entry["seq"])
                    self.shard.drop(guest.name, entry["seq"])
            case "go":
                self._let_go(entry)
        return True

    def _apply(self, entry: Mapping[str, Any]) -> bool:
        found = [(self._who_pushed(name, seq), seq, scale) for name, seq, scale in entry["parts"]]
        if any(guest is None for guest, _, _ in found):
            return False
        parts: list[Part] = []
        for guest, seq, scale in found:
            assert guest is not None
            parts.append(self.shard.part(guest, seq, guest.pushes[seq], scale))
        self.shard.apply(entry["version"], parts, skip=entry["skip"])
        for guest, seq, _ in found:
            assert guest is not None
            self._take(guest, seq)
        if self._lead is not None:
            self._lead.applied(entry["version"], [part.message for part in parts], skip=entry["skip"])
        return True

    def _who_pushed(self, name: str, seq: int) -> Guest | None:
        """The worker whose push this is; None when it has not come yet. Workers tell the lead last, so it will come.

        Raises:
            PeerLost: PL460, it will not: the worker is gone, with what was on its way.
        """
        guest = self._by_name.get(name)
        if guest is None or (guest.gone and seq not in guest.pushes):
            raise PeerLost("PL460", f"push {seq} of {name} was lost on its way to server {self._index}")
        return guest if seq in guest.pushes else None

    def _take(self, guest: Guest, seq: int) -> None:
        """A push is dealt with."""
        guest.pushes.pop(seq)
        self._forget(guest)

    def _forget(self, guest: Guest) -> None:
        """Who is gone, and has left nothing, needs no memory."""
        if guest.gone and not guest.pushes:
            self._by_name.pop(guest.name, None)
            guest.memory.close()

    def _let_go(self, entry: Mapping[str, Any]) -> None:
        guest = self._by_name.get(entry["worker"])
        if guest is None or guest.gone:
            return
        link = next(link for link, g in self._guests.items() if g is guest)
        buffers = self.shard.put(guest)
        meta: dict[str, Any] = {"seq": entry["seq"]}
        if self._lead is not None:
            meta |= self._lead.about(entry)
            if guest.told != self.shard.stamp:
                guest.told = self.shard.stamp
                meta["hypers"] = self.shard.settings()
        self._send(link, Say.GO, meta, buffers)

    def _tell(self, entry: Mapping[str, Any]) -> None:
        guest = self._by_name.get(entry["worker"])
        link = next((link for link, g in self._guests.items() if g is guest), None)
        if link is None:
            return
        match entry["do"]:
            case "grant":
                self._send(link, Say.GRANT, {"piece": entry["piece"]})
            case "origin":
                self._send(link, Say.ORIGIN, {"origin": entry["origin"]})
            case "met":
                self._send(link, Say.MET, {key: entry[key] for key in ("notes", "rank", "size", "version")})
            case "refuse":
                self._refuse(link, entry["code"], entry["message"])

    def _answer_pulls(self) -> None:
        waiting = []
        for link, version in self._pulls:
            if self.shard.version < version:
                waiting.append((link, version))
            elif link in self._guests:
                self._send(link, Say.PULLED, {"version": self.shard.version}, self.shard.put(self._guests[link]))
        self._pulls = waiting

    # ---- connections ------------------------------------------------------------------------------------------------
    def _send(self, link: int, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        connection = self._connections.get(link)
        if connection is not None:
            connection.post(kind, meta, buffers)
            self._flush(link)

    def _flush(self, link: int) -> None:
        connection = self._connections.get(link)
        if connection is None:
            return
        try:
            done = connection.flush()
        except PacelineError:
            self._drop(link)
            return
        wanted = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        if self._selector.get_key(connection).events != wanted:
            self._selector.modify(connection, wanted, link)

    def _refuse(self, link: int, code: str, message: str) -> None:
        """A worker ends with this error; what it held returns."""
        self._send(link, Say.REFUSE, {"code": code, "message": message})
        self._drop(link)

    def _drop(self, link: int) -> None:
        """A connection has ended."""
        connection = self._connections.pop(link, None)
        guest = self._guests.pop(link, None)
        self._peers.pop(link, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
        if guest is not None:
            guest.gone = True
            if self._lead is not None:
                self._lead.left(guest.name)
            self._forget(guest)

    def _close_all(self) -> None:
        for link in list(self._connections):
            connection = self._connections.pop(link)
            self._selector.unregister(connection)
            connection.close()
        while self._came:
            self._came.popleft().close()
        for guest in self._by_name.values():
            guest.memory.close()
