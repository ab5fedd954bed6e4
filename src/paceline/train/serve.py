"""A server of a run with parameter servers: the shell around ``exchange.server`` and ``shard``.

It runs the user's script like a worker, and stops where the loop begins. Then it listens, and one thread does everything, one
message after another. Server 0 is the *lead*: it runs the core, which decides the order of all updates, and keeps the ledger. The
others carry out the lead's entries in that order, each as soon as the pushes that it needs have come.
"""

from __future__ import annotations

import os
import re
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

import torch

from paceline.exchange.service import Service
from paceline.group.frames import Frame
from paceline.group.secure import Connection, Listener, connect
from paceline.terms.errors import Aborted, AdoptError, PacelineError, PeerLost, StepError
from paceline.train.keeping import Kept
from paceline.train.lead import Lead
from paceline.train.memory import Memory
from paceline.train.reach import reach
from paceline.train.rows import heard
from paceline.train.served_state import PieceState, flatten, unflatten
from paceline.train.shard import Guest, Part, Shard
from paceline.train.talk import CAPS, Say

_CAME = -1
_HANDLE = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
_AT_ONCE = 64  # messages of one connection before the others have their turn
_BEAT = 0.1  # seconds between two looks at the board


class Server:
    """One server. A context manager; :meth:`run` returns when the run is over.

    Args:
        kept: What is trained.
        service: What the strategy asks of servers.
        addresses, doors: Of all servers, for workers of this machine and of others.
        index: Which of them this is.
        secret: Of the run.
        over: Whether the run is being ended.
        lead: Decides, where this is the lead; else None.
        workers: How many the run begins with.
        version: Of the parameters; more than 0 where they come from a checkpoint.

    Raises:
        WireError: PL407, the address cannot be had.
    """

    def __init__(
        self,
        kept: Kept,
        service: Service,
        addresses: Sequence[str],
        doors: Sequence[str],
        index: int,
        secret: bytes,
        over: Callable[[], bool],
        lead: Lead | None,
        workers: int,
        version: int = 0,
    ) -> None:
        self.shard = Shard(kept, index, service, workers)
        self.shard.version = version
        self._kept, self._index, self._over, self._lead = kept, index, over, lead
        self._guests: dict[int, Guest] = {}
        self._by_name: dict[str, Guest] = {}
        self._peers: dict[int, Connection] = {}  # of the lead: the other servers
        self._servers: dict[int, int] = {}  # their numbers
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
                connection.send(Say.ENTER, {"index": index, "is": kept.description, "version": version})
                self._add(connection)
            for address in (addresses[index], *doors[index : index + 1]):
                stack.enter_context(Listener(address, secret, "server", self._welcome, caps=CAPS))
            if lead is not None:
                lead.begin(self, len(addresses) - 1)
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

        def place(kind: int, meta: Any, lengths: Sequence[int]) -> list[memoryview]:
            pushed = self._kept.pushed(guest.memory, self._index)
            return [*pushed, *(memoryview(bytearray(n)) for n in lengths[len(pushed) :])]

        return place

    # ---- what comes -------------------------------------------------------------------------------------------------
    def _hear(self, link: int, connection: Connection, guest: Guest | None, frame: Frame) -> None:
        """Raises StepError PL462 for a message that makes no sense."""
        try:
            act = self._understand(link, connection, guest, frame)
        except (KeyError, TypeError, ValueError) as error:
            raise StepError("PL462", f"a message of kind {frame.kind} that makes no sense ({error!r})") from error
        act()

    def _understand(self, link: int, connection: Connection, guest: Guest | None, frame: Frame) -> Callable[[], None]:
        """What is to be done about a message; nothing is done yet."""
        meta = frame.meta
        if guest is None:
            return self._understand_stranger(link, connection, frame)
        match frame.kind:
            case Say.STEP:
                if not 0 <= int(meta["optimizer"]) < len(self._kept.optimizers):
                    raise ValueError("there is no such optimizer")
                behind = frame.buffers[
                    len(self._kept.pushed(guest.memory, self._index)) if not guest.memory.shared else 0 :
                ]
                return partial(self._pushed, guest, int(meta["seq"]), {**meta, "sparse": heard(meta["sparse"], behind)})
            case Say.SCHEDULE:
                number, args = int(meta["schedule"]), [float(value) for value in meta["args"]]
                if not 0 <= number < len(self._kept.schedulers):
                    raise ValueError("there is no such schedule")
                return partial(self.shard.schedule, number, str(meta["which"]), args)
            case Say.PULL:
                return partial(self._pulled, link, int(meta["version"]))
        if self._lead is None:
            raise ValueError("it is for the lead")
        return partial(self._lead.hear, guest.name, frame.kind, meta)

    def _understand_stranger(self, link: int, connection: Connection, frame: Frame) -> Callable[[], None]:
        meta = frame.meta
        match frame.kind:
            case Say.ATTACH:
                name, handle = str(meta["name"]), str(meta["handle"])
                if handle and not _HANDLE.fullmatch(handle):
                    raise ValueError("this is no memory of a process")
                return partial(self._attach, link, connection, name, str(meta["is"]), handle)
            case Say.ENTER if self._lead is not None:
                return partial(self._enter, link, connection, int(meta["index"]), str(meta["is"]), int(meta["version"]))
            case Say.ENTRY if self._lead is None:
                return partial(self._note, meta)
        raise ValueError("it comes from a stranger")

    def _pushed(self, guest: Guest, seq: int, meta: Mapping[str, Any]) -> None:
        guest.pushes[seq] = meta
        if self._lead is not None:
            self._lead.hear(guest.name, Say.STEP, meta)
        self._go_on()

    def _pulled(self, link: int, version: int) -> None:
        self._pulls.append((link, version))
        self._answer_pulls()

    def _note(self, entry: Mapping[str, Any]) -> None:
        self._entries.append(entry)
        self._go_on()

    def _enter(self, link: int, connection: Connection, index: int, theirs: str, version: int) -> None:
        """Another server is there."""
        assert self._lead is not None
        self._check_same(theirs, f"server {index}")
        if version != self.shard.version:
            raise AdoptError("PL303", f"server {index} goes on from another checkpoint than the lead")
        self._peers[link], self._servers[link] = connection, index
        self._lead.entered()

    def _check_same(self, theirs: str, who: str) -> None:
        if theirs != self._kept.description:
            raise AdoptError("PL303", f"{who} has other models, optimizers or schedules than server {self._index}")

    def _attach(self, link: int, connection: Connection, name: str, theirs: str, handle: str) -> None:
        self._check_same(theirs, name)
        if name in self._by_name and not self._by_name[name].gone:
            raise StepError("PL420", f"a worker named {name} is attached already")
        memory = Memory(self._kept.layout, self._kept.buffer_layout, handle=handle, shared=False)
        guest = Guest(name, connection, memory)
        self._guests[link] = self._by_name[name] = guest
        welcome = self._lead.welcome() if self._lead is not None else {}
        self._send(link, Say.WELCOME, {**welcome, "handle": self.shard.memory.handle})

    # ---- what is done -----------------------------------------------------------------------------------------------
    def carry_out(self, entry: Mapping[str, Any]) -> None:
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
            case "collect" if self._lead is None:
                told, tensors = flatten(self.shard.pieces())
                arrays: list[Any] = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
                parts = [memoryview(array) for array in arrays]
                (lead,) = [link for link in self._connections if link not in self._guests]
                self._send(lead, Say.PART, {"pieces": told}, [*self.shard.told(), *parts])
        return True

    def _apply(self, entry: Mapping[str, Any]) -> bool:
        found = [(self._who_pushed(name, seq), seq, scale) for name, seq, scale in entry["parts"]]
        if any(guest is None for guest, _, _ in found):
            return False
        parts: list[Part] = []
        for guest, seq, scale in found:
            assert guest is not None
            parts.append(self.shard.part(guest, seq, guest.pushes[seq], scale))
        self.shard.apply(entry["version"], parts, skip=entry["skip"], partner=entry.get("partner"))
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
            self.shard.forget(guest.name)
            guest.memory.close()

    def _let_go(self, entry: Mapping[str, Any]) -> None:
        guest = self._by_name.get(entry["worker"])
        if guest is None or guest.gone:
            return
        link = next(link for link, g in self._guests.items() if g is guest)
        if entry["seq"] == 0:
            self.shard.enter(guest.name)
        buffers = self.shard.put(guest, center=entry["seq"] == 0)
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

    def collect(self) -> list[PieceState]:
        """What all servers keep, after the last update; parameters go where they belong. Of the lead; waits for the others.

        Raises:
            PeerLost: One of them is gone.
        """
        found = self.shard.pieces()
        for link in list(self._peers):
            self._send(link, Say.ENTRY, {"do": "collect"})
        for link, connection in list(self._peers.items()):
            frame = self._part_of(link, connection)
            places = self._kept.answered(self.shard.memory, self._servers[link])
            for place, buffer in zip(places, frame.buffers, strict=False):
                place[:] = buffer
            found += unflatten(frame.meta["pieces"], frame.buffers[len(places) :])
        return found

    def _part_of(self, link: int, connection: Connection) -> Frame:
        while True:
            self._check()
            frame = connection.try_recv(_BEAT)
            if frame is not None and frame.kind == Say.PART:
                return frame
            self._flush(link)

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
