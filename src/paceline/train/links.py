"""A server's connections: who is at the other end, what may come from there, and how they are found again when a copy has died.

Every connection gets a name when its first message is understood: a worker's own, ``#0`` for the lead, ``#1`` and so on for the other
servers, ``copy`` for the other copy of this one. Names outlive connections. A copy that does not answer keeps strangers
waiting for a moment: the one that answers may just have died. If it lives, they are told to go there.
"""

from __future__ import annotations

import os
import re
import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from paceline.exchange.server_copy import Acked, Asked, Copy, Given, Lost, Record, Role
from paceline.exchange.service import Service
from paceline.group.frames import Frame, Place
from paceline.group.secure import Connection, Listener, connect
from paceline.terms.errors import Aborted, AdoptError, PacelineError, StepError
from paceline.train.copied import pack, unpack
from paceline.train.keeping import Kept
from paceline.train.memory import Memory
from paceline.train.pair import Other, Tell, ask_for_state
from paceline.train.reach import PATIENCE, SOON, reach
from paceline.train.talk import CAPS, Say

if TYPE_CHECKING:
    from paceline.train.serve import Server

LEAD, COPY = "#0", "copy"
BEAT = 0.1
"""Seconds between two looks at the board."""

_CAME = -1
_HANDLE = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
_AT_ONCE = 64  # messages of one connection before the others have their turn
_PARKED = 0.2  # seconds that strangers wait at a copy that does not answer
_RETURN = 30.0  # seconds that workers of other machines have to come back to a copy that took over
_HERE, _STILL = 1.0, 30.0  # seconds between two signs of life, and after which a copy is given up
_LAST = 2.0  # seconds that the last words of a server may take


def peer(number: int) -> str:
    """The name of another server."""
    return f"#{number}"


class Links:
    """See above. A context manager; :meth:`start` before anything else.

    Args:
        kept: What is trained.
        service: What the strategy asks of servers.
        addresses, doors: Of all processes, for workers of this machine and of others: first copies, then second ones.
        number: Which of them this is.
        secret: Of the run.
        replaces: Another copy has the state, or nobody.
        tell: What others must know.
    """

    def __init__(
        self,
        kept: Kept,
        service: Service,
        addresses: Sequence[str],
        doors: Sequence[str],
        number: int,
        secret: bytes,
        replaces: bool,
        tell: Tell,
    ) -> None:
        self.index, self._place = number % service.servers, number // service.servers
        self._kept, self._copies, self._secret, self._tell = kept, service.copies, secret, tell
        self._replaces, self.over = replaces, tell.over
        self._mine = (addresses[number], *doors[number : number + 1])
        self._leads = list(addresses[:: service.servers])
        self._partner = addresses[(number + service.servers) % len(addresses)]
        self._connections: dict[int, Connection] = {}
        self._names: dict[int, str] = {}
        self._links: dict[str, int] = {}
        self._next = 0
        self._came: deque[Connection] = deque()
        self._again: set[int] = set()
        self._parked: dict[int, tuple[float, Frame]] = {}
        self._missing: dict[str, float] = {}
        self._asking: tuple[int, int] | None = None
        self._other: Other | None = None
        self._cut = False
        self._lead_at = 0.0  # when to look for it next
        self._moved = self._told = 0.0  # when the other copy was heard last, and was told something

    def __enter__(self) -> Links:
        with ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._bell)
            self._selector.register(self._bell, selectors.EVENT_READ, _CAME)
            stack.callback(self._close_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, server: Server) -> None:
        """Find the other copy and the lead, and listen.

        Raises:
            WireError: PL407, the address cannot be had; PL460, there is no lead.
            PeerLost: PL465, the other copy ended before it had given its state.
        """
        self._server = server
        joined = self._copies > 1 and self._join()
        if self.index and self._copies == 1:
            self._enter(reach(self._connect, self._leads[0], self.check))
        for address in self._mine:
            self._stack.enter_context(Listener(address, self._secret, "server", self._welcome, caps=CAPS))
        if not joined:
            self._tell.begins(None)

    def check(self) -> None:
        """Raises Aborted PL404: the run is being ended."""
        if self.over():
            raise Aborted("PL404", "the run was ended while this server waited")

    def _connect(self, address: str) -> Connection:
        return connect(address, self._secret, "server", caps=CAPS)

    # ---- one turn ---------------------------------------------------------------------------------------------------
    def turn(self) -> None:
        """Read what has come, wait for a moment if nothing has, and see to those who are looked for."""
        self._again = {link for link in self._again if self._read(link)}
        for key, events in self._selector.select(0.0 if self._again else BEAT):
            if key.data == _CAME:
                os.eventfd_read(self._bell)
            elif events & selectors.EVENT_WRITE:
                self._flush(key.data)
            elif key.data not in self._again and self._read(key.data):
                self._again.add(key.data)
        while self._came:
            self._add(self._came.popleft())
        self._tend(time.monotonic())

    def _tend(self, now: float) -> None:
        self._watch(now)
        if self._cut:
            self._lose_other()
        for link, (until, frame) in list(self._parked.items()):
            if self._server.answers:
                del self._parked[link]
                self._again.add(link)
                self._guarded(link, frame)
            elif now > until:
                del self._parked[link]
                self._send(link, Say.ELSEWHERE, {})
                self._drop(link)
        if self._asking is not None and self._server.idle:
            self._server.take(Asked())
        for name, until in list(self._missing.items()):
            guest = self._server.work.by_name.get(name)
            if guest is None or guest.gone or name in self._links:
                del self._missing[name]
            elif now > until or (guest.handle and not guest.memory.is_at(guest.handle)):
                del self._missing[name]
                self._server.hear(name, Say.GONE, {"id": guest.id})
        if self.index and self._copies > 1 and now > self._lead_at and LEAD not in self._links:
            self._lead_at = now + SOON
            self._find_lead()

    def _watch(self, now: float) -> None:
        """A copy that stands still holds everybody up: it is given up, and ended."""
        role, copy = self._server.copy.role, self._server.copy
        if role is Role.FIRST:
            if copy.released == copy.number:
                self._moved = max(self._moved, now)
            if now - self._told > _HERE:
                self._told = now
                self.forward(Say.HERE, {})
        self._cut |= role in (Role.FIRST, Role.SECOND) and now - self._moved > _STILL

    def _find_lead(self) -> None:
        """Whichever copy of it answers. At first the second copy of this server must be there."""
        if self._server.copy.role is Role.FIRST or (self._server.answers and self._server.heard_entries):
            self._leads.append(self._leads.pop(0))
            with suppress(PacelineError):
                self._enter(self._connect(self._leads[0]))

    def _enter(self, connection: Connection) -> None:
        about = {"index": self.index, "is": self._kept.description, "version": self._server.work.shard.version}
        connection.send(Say.ENTER, {**about, "heard": self._server.heard_entries})
        self._bind(self._add(connection), LEAD)

    # ---- connections ------------------------------------------------------------------------------------------------
    def _welcome(self, connection: Connection) -> None:
        """In the listener's thread."""
        self._came.append(connection)
        os.eventfd_write(self._bell, 1)

    def _add(self, connection: Connection) -> int:
        self._next += 1
        self._connections[self._next] = connection
        self._selector.register(connection, selectors.EVENT_READ, self._next)
        self._again.add(self._next)  # it may have received more than was taken
        return self._next

    def _bind(self, link: int, name: str) -> None:
        """This connection bears the name from now on."""
        before = self._links.pop(name, None)
        if before is not None:
            self._drop(before)
        self._links[name], self._names[link] = link, name

    def _read(self, link: int) -> bool:
        """Take what has come over a link. True when there may be more."""
        for _ in range(_AT_ONCE):
            connection = self._connections.get(link)
            if connection is None or link in self._parked:
                return False
            try:
                frame = connection.poll(self._place_of(link))
            except PacelineError:
                self._drop(link)
                return False
            if frame is None:
                return False
            self._guarded(link, frame)
        return True

    def _guarded(self, link: int, frame: Frame) -> None:
        """Hear a message; who says what makes no sense ends with that error."""
        try:
            self._hear(link, frame)
        except (KeyError, TypeError, ValueError) as error:
            self._turn_out(link, "PL462", f"a message of kind {frame.kind} that makes no sense ({error!r})")
        except (AdoptError, StepError) as error:
            self._turn_out(link, error.code, error.message)
        except PacelineError as error:
            if error.code.startswith("PL46"):
                raise
            self._turn_out(link, error.code, error.message)

    def _place_of(self, link: int) -> Place | None:
        """Where a push from another host goes."""
        name = self._names.get(link)

        def place(kind: int, meta: Any, lengths: Sequence[int]) -> list[memoryview]:
            guest = self._server.work.by_name.get(str(meta.get("source")) if name == COPY else str(name))
            push = Say.STEP in (kind, meta.get("kind")) and guest is not None and not guest.memory.shared
            pushed = self._kept.pushed(guest.memory, self.index) if push and guest is not None else []
            return [*pushed, *(memoryview(bytearray(n)) for n in lengths[len(pushed) :])]

        return place

    def _hear(self, link: int, frame: Frame) -> None:
        name, server, meta = self._names.get(link), self._server, frame.meta
        if name is None:
            if server.answers:
                self._hear_stranger(link, frame)
            else:
                self._parked[link] = time.monotonic() + _PARKED, frame
        elif name == COPY:
            self._hear_copy(frame)
        elif name == LEAD and frame.kind == Say.ELSEWHERE:
            self._drop(link)
        elif name.startswith("#"):
            if frame.kind not in (Say.ENTRY, Say.COLLECT, Say.PART, Say.HEARD):
                raise ValueError("a server does not say that")
            if frame.kind == Say.PART:
                server.collected(name, frame)
            else:
                server.hear(name, frame.kind, meta)
        else:
            guest = server.work.by_name.get(name)
            if guest is not None and not guest.gone:
                server.sense(guest, frame)
                server.hear(name, frame.kind, meta, frame.buffers)

    # ---- strangers --------------------------------------------------------------------------------------------------
    def _hear_stranger(self, link: int, frame: Frame) -> None:
        meta, server = frame.meta, self._server
        match frame.kind:
            case Say.ATTACH:
                self._attach(link, meta)
            case Say.RESUME:
                name, go_on = str(meta["name"]), server.work.come_back(meta)
                if go_on is None:
                    self._send(link, Say.RESUMED, {"known": False})
                    self._drop(link)
                    return
                self._bind(link, name)
                server.when_known(go_on)
            case Say.ENTER if server.leads:
                index, version = int(meta["index"]), int(meta["version"])
                self._check_same(str(meta["is"]), f"server {index}")
                if not server.knows(index) and version != server.work.shard.version:
                    raise AdoptError("PL303", f"server {index} goes on from another checkpoint than the lead")
                self._bind(link, peer(index))
                server.has_entered(index, int(meta["heard"]))
            case Say.COPY if self._copies > 1:
                self._check_same(str(meta["is"]), f"the second copy of server {self.index}")
                self._asking = link, int(meta["pid"])
            case _:
                raise ValueError("it comes from a stranger")

    def _attach(self, link: int, meta: Mapping[str, Any]) -> None:
        name, handle, server = str(meta["name"]), str(meta["handle"]), self._server
        if not name or name[0] == "#" or name == COPY or (handle and not _HANDLE.fullmatch(handle)):
            raise ValueError("this is no worker, or no memory of a process")
        self._check_same(str(meta["is"]), name)
        go_on = server.work.come_back({"name": name, "id": str(meta["id"])})
        if go_on is not None:  # the copy that it was attached to has died before it could say so
            self._bind(link, name)
            server.when_known(go_on)
            return
        guest = server.work.by_name.get(name)
        if name in self._links or (guest is not None and not guest.gone):
            raise StepError("PL420", f"a worker named {name} is attached already")
        if handle:
            Memory(self._kept.layout, self._kept.buffer_layout, handle=handle).close()
        self._bind(link, name)
        server.hear(name, Say.ATTACH, meta)

    def _check_same(self, theirs: str, who: str) -> None:
        if theirs != self._kept.description:
            raise AdoptError("PL303", f"{who} has other models, optimizers or schedules than server {self.index}")

    # ---- the other copy -----------------------------------------------------------------------------------------------
    def _join(self) -> bool:
        """Get the state from the other copy, if there is one. The second one waits for it; the first one is the run's first then."""
        try:
            connection = (
                reach(self._connect, self._partner, self.check) if self._place else self._connect(self._partner)
            )
        except PacelineError as error:
            if self._place or error.code not in ("PL433", "PL431"):
                raise
            return False
        self._server.copy = Copy(joins=True)
        frame = ask_for_state(connection, self._kept.description, f"server {self.index}", self.check)
        self._server.take_over(unpack(frame.buffers))
        self._other = Other(connection, int(frame.meta["pid"]))
        self._bind(self._add(connection), COPY)
        self._moved = time.monotonic()
        self._tell.joined()
        self._server.take(Given(int(frame.meta["number"])))
        return True

    def give(self, number: int, tree: Any) -> None:
        """Send the state to the copy that has asked for it."""
        assert self._asking is not None
        (link, pid), self._asking = self._asking, None
        connection = self._connections.get(link)
        if connection is None:  # it has died meanwhile
            self._cut = True
            return
        self._bind(link, COPY)
        self._other = Other(connection, pid)
        about = {"number": number, "pid": os.getpid()}
        self._cut = not self._other.send(Say.WHOLE, about, pack(tree), PATIENCE)
        self._moved = time.monotonic() + PATIENCE
        self._server.hear("", Say.COPIED, {})

    def forward(self, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        """Send it to the other copy."""
        if self._other is None or not self._other.send(kind, meta, buffers):
            self._cut = True

    def _hear_copy(self, frame: Frame) -> None:
        meta = frame.meta
        self._moved = time.monotonic()
        match frame.kind:
            case Say.HERE:
                return
            case Say.DONE:
                self._compare(int(meta["mark"][0]), int(meta["mark"][1]))
                self._server.take(Acked(int(meta["number"])))
            case Say.RECORD:
                message = int(meta["kind"]), meta["meta"], frame.buffers, float(meta["now"])
                self._server.take(Record(int(meta["number"]), str(meta["source"]), message, int(meta["released"])))
            case _:
                raise ValueError("the other copy does not say that")

    def _compare(self, version: int, theirs: int) -> None:
        """The other copy's parameters at a version must be those of this one: else it is replaced by one that has them."""
        mine = self._server.shard.mark
        if version and version == mine[0] and theirs != mine[1]:
            self._cut = True
            message = f"the copies of server {self.index} had different parameters at update {version}; the second one is replaced"
            self._tell.notice("PL466", message)

    def _lose_other(self) -> None:
        """It is gone, or else it is made to be: nobody but this copy answers from now on."""
        self._cut = False
        if self._other is not None and self._server.ended:
            self._other.close()
        elif self._other is not None:
            self._other.end()
        self._other = None
        link = self._links.pop(COPY, None)
        if link is not None:
            self._drop(link)
        if self._server.answers or not self._server.ended:
            self._server.take(Lost())

    def begin(self, since: int) -> None:
        """This copy takes over. Workers must come back; those that are seen to have died need not."""
        until = time.monotonic() + _RETURN
        self._missing = {guest.name: until for guest in self._server.work.by_name.values() if not guest.gone}
        self._tell.begins(since)

    # ---- what is said -------------------------------------------------------------------------------------------------
    def has(self, name: str) -> bool:
        """It is connected."""
        return name in self._links

    @property
    def deserted(self) -> bool:
        """Nobody is connected."""
        return not self._connections and not self._came

    def post(self, name: str, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        """Say something to whoever bears this name now. To nobody it is not said."""
        link = self._links.get(name)
        if link is not None:
            self._send(link, kind, meta, buffers)

    def refuse(self, name: str, code: str, message: str) -> None:
        """A worker ends with this error."""
        link = self._links.pop(name, None)
        if link is not None:
            self._turn_out(link, code, message)

    def send_all(self) -> None:
        """Wait until all that was said has left, for a moment."""
        until = time.monotonic() + _LAST
        while time.monotonic() < until and any(c.unsent for c in self._connections.values()):
            self.turn()

    def _turn_out(self, link: int, code: str, message: str) -> None:
        self._send(link, Say.REFUSE, {"code": code, "message": message})
        self._drop(link)

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

    def _drop(self, link: int) -> None:
        """A connection has ended; who bore its name is gone, unless another connection bears it."""
        connection, name = self._connections.pop(link, None), self._names.pop(link, None)
        self._parked.pop(link, None)
        if self._asking is not None and self._asking[0] == link:
            self._asking = None
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
        if name is not None and self._links.get(name) == link:
            del self._links[name]
            self._left(name)

    def _left(self, name: str) -> None:
        if name == COPY:
            self._cut = True
        elif name[0] != "#" and self._server.answers:
            guest = self._server.work.by_name.get(name)
            self._server.hear(name, Say.GONE, {} if guest is None else {"id": guest.id})

    def _close_all(self) -> None:
        for link in list(self._connections):
            connection = self._connections.pop(link)
            self._selector.unregister(connection)
            connection.close()
        while self._came:
            self._came.popleft().close()
        if self._other is not None:
            self._other.close()
