"""A server of a run with parameter servers: the shell around ``exchange.server`` and ``shard``.

It runs the user's script like a worker, and stops where the loop begins. Then it listens, and one thread does everything, one
message after another. Server 0 is the *lead*: it runs the core, which decides the order of all updates, and keeps the ledger. The
others carry out the lead's entries in that order, each as soon as the pushes that it needs have come.

Where a server has two copies (``exchange.server_copy``), what it does follows from what it hears, in order: so whatever comes is
*heard* by the first copy, becomes a record, and is *carried out* by both. What is said thereupon waits (:meth:`Server.afterwards`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from paceline.exchange.server_copy import (
    Ack,
    Begin,
    Carry,
    Copy,
    End,
    Event,
    Forget,
    Forward,
    Give,
    Heard,
    Release,
    Role,
)
from paceline.exchange.server_numbered import Numbered
from paceline.exchange.service import Service
from paceline.group.frames import Frame
from paceline.terms.errors import PacelineError, PeerLost, StepError
from paceline.train import tree as trees
from paceline.train.keeping import Kept
from paceline.train.lead import Lead
from paceline.train.links import LEAD, Links, peer
from paceline.train.rows import heard
from paceline.train.served_state import PieceState, unflatten
from paceline.train.shard import Guest, Shard
from paceline.train.talk import Say
from paceline.train.work import Work

Message = tuple[int, Mapping[str, Any], Sequence[memoryview], float]
"""Kind, meta, bulk, and when it came."""


@dataclass(frozen=True, slots=True)
class Later:
    """Something that is to be done when all copies have carried out record `number`.

    Attributes:
        version: Of an update that it makes known, or 0.
        what: A message: to whom, and its number.
    """

    number: int
    do: Callable[[], None]
    version: int
    what: tuple[str, int]


_EVERY = 64  # entries, until a server tells the lead that it has heard them


class Server:
    """One server, or one copy of it. :meth:`run` returns when the run is over.

    Args:
        kept: What is trained.
        service: What the strategy asks of servers.
        links: Connections with all others.
        lead: Decides, where this is the lead; else None.
        things: What else the script has adopted.
        workers: How many the run begins with.
        version: Of the parameters; more than 0 where they come from a checkpoint.

    Attributes:
        copy: What this process is among the copies of the server.
        work: What is done about what comes.
        ended: The run is over, and the other copy knows.
    """

    def __init__(
        self,
        kept: Kept,
        service: Service,
        links: Links,
        lead: Lead | None,
        things: trees.Things,
        workers: int,
        version: int = 0,
    ) -> None:
        self._kept, self._index, self._lead, self._links = kept, links.index, lead, links
        self._copies = service.copies
        self.copy = Copy()
        self.work = Work(kept, service, links, lead, things, workers, version, self)
        self._inbox: deque[tuple[str, Message]] = deque()
        self._later: deque[Later] = deque()
        self._busy, self.ended = False, False
        self._heard = self.work.numbered()  # from the lead
        self._peers: dict[int, Numbered[Any]] = {}
        self._there: set[int] = set()  # of the other servers
        self._parts: dict[str, Frame] = {}
        if lead is not None:
            self._peers = {number: self.work.numbered() for number in range(1, service.servers)}
            lead.begin(self, service.servers - 1 + (self._copies > 1))

    @property
    def shard(self) -> Shard:
        """What is kept here."""
        return self.work.shard

    @property
    def answers(self) -> bool:
        """This copy answers."""
        return self.copy.answers

    @property
    def idle(self) -> bool:
        """It is alone, and between two records."""
        return self.copy.role is Role.ALONE and not self._busy

    @property
    def leads(self) -> bool:
        """It is the lead."""
        return self._lead is not None

    # ---- the loop -------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until all workers have ended well, or the run is being ended."""
        while not self._done():
            self._links.turn()
            self._drain()
            if self._lead is not None and self.answers and self._lead.may_admit(time.monotonic()):
                self.hear("", Say.TICK, {})
        for guest in list(self.work.by_name.values()):
            if self._lead is not None and self.answers and not guest.gone:
                self._links.refuse(guest.name, "PL422", "the run has ended")

    def _done(self) -> bool:
        if self._links.over() or self.ended:
            return True
        if self._lead is not None:
            return self.answers and self._lead.done and not self._inbox
        return self._copies == 1 and self._links.deserted

    def end(self) -> None:
        """The run is over, and all is said: copies and other servers end too."""
        if self._copies > 1 and self.answers and not self._links.over():
            self.hear("", Say.CLOSE, {})
            self._drain()
            while self._later and not self._links.over():
                self._links.turn()
        self._links.send_all()

    # ---- what comes -------------------------------------------------------------------------------------------------
    def hear(self, source: str, kind: int, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        """Something has come, and makes sense. It is carried out in its turn."""
        self._inbox.append((source, (int(kind), meta, buffers, time.monotonic())))

    def _drain(self) -> None:
        while self._inbox and not self._busy and self.answers:
            source, message = self._inbox.popleft()
            if message[0] == Say.COLLECT:  # it changes nothing
                self.work.add({"do": "collect"})
            else:
                self.take(Heard(source, message))

    def take(self, event: Event) -> None:
        """Let the copy's core decide, and do it."""
        for what in self.copy.handle(event):
            match what:
                case Forward(record):
                    kind, meta, buffers, now = record.message
                    about = {"number": record.number, "source": record.source, "released": record.released}
                    self._links.forward(Say.RECORD, {**about, "kind": kind, "now": now, "meta": meta}, buffers)
                case Carry(_, source, message):
                    self._carry_out(source, message)
                    self._release()
                case Release():
                    self._release()
                case Forget(number):
                    while self._later and self._later[0].number <= number:
                        self._later.popleft()
                case Ack(number):
                    self._links.forward(Say.DONE, {"number": number, "mark": self.work.shard.mark})
                case Give(number):
                    self._links.give(number, self._whole())
                case Begin():
                    unsaid = [later.version for later in self._later if later.version]
                    self._links.begin(min(unsaid, default=self.shard.version + 1) - 1)
                case End():
                    raise PeerLost("PL465", f"server {self._index} has ended before its second copy had its state")

    def _release(self) -> None:
        """Do what waited. What follows from the record that is being carried out is not complete yet."""
        most = self.copy.released - (self._busy and self.copy.released == self.copy.number)
        while self._later and self._later[0].number <= most:
            self._later.popleft().do()

    def afterwards(self, do: Callable[[], None], *, version: int = 0, what: tuple[str, int] = ("", 0)) -> None:
        """Do this when all copies have carried out what it follows from. See :class:`Later`."""
        self._later.append(Later(self.copy.number, do, version, what))

    def waits(self, what: tuple[str, int]) -> bool:
        """It will be said, but not yet."""
        return any(later.what == what for later in self._later)

    def when_known(self, do: Callable[[], None]) -> None:
        """Do this when the other copy, if there is one, knows all that this one does."""
        if self.copy.released < self.copy.number:
            self.afterwards(do)
        else:
            do()

    def sense(self, guest: Guest, frame: Frame) -> None:
        """Raises StepError PL462 for a message of a worker that makes none. Nothing is done yet."""
        try:
            int(frame.meta["n"]), int(frame.meta["h"])
            self._understand(guest, frame.kind, frame.meta, frame.buffers)
        except (KeyError, TypeError, ValueError) as error:
            raise StepError("PL462", f"a message of kind {frame.kind} that makes no sense ({error!r})") from error

    def _understand(
        self, guest: Guest, kind: int, meta: Mapping[str, Any], buffers: Sequence[memoryview]
    ) -> Callable[[], None]:
        """What is to be done about a message of a worker."""
        match kind:
            case Say.STEP:
                if not 0 <= int(meta["optimizer"]) < len(self._kept.optimizers):
                    raise ValueError("there is no such optimizer")
                bulk = 0 if guest.memory.shared else len(self._kept.pushed(guest.memory, self._index))
                push = {**meta, "sparse": heard(meta["sparse"], buffers[bulk:])}
                note = self._lead.understand(guest.name, kind, meta) if self._lead is not None else None
                return partial(self.work.pushed, guest, int(meta["seq"]), push, note)
            case Say.SCHEDULE:
                number, args = int(meta["schedule"]), [float(value) for value in meta["args"]]
                if not 0 <= number < len(self._kept.schedulers):
                    raise ValueError("there is no such schedule")
                return partial(self.shard.schedule, number, str(meta["which"]), args)
            case Say.PULL:
                return partial(self.work.pulled, guest.name, int(meta["version"]))
        if self._lead is None:
            raise ValueError("it is for the lead")
        return self._lead.understand(guest.name, kind, meta)

    def _carry_out(self, source: str, message: Message) -> None:
        """What every copy does about a record."""
        kind, meta, _, now = message
        if self._lead is not None:
            self._lead.now = now
        self._busy = True
        guest = self.work.by_name.get(source)
        try:
            match kind:
                case Say.ATTACH:
                    self.work.attach(source, meta)
                case Say.GONE:
                    self.work.gone(source, meta)
                case Say.TICK if self._lead is not None:
                    self._lead.admit()
                case Say.COPIED if self._lead is not None:
                    self._lead.entered()
                case Say.ENTER if self._lead is not None and int(meta["index"]) not in self._there:
                    self._there.add(int(meta["index"]))
                    self._lead.entered()
                case Say.HEARD:
                    self._peers[int(meta["index"])].confirm(int(meta["number"]))
                case Say.CLOSE:
                    self._tell_servers({"do": "close"})
                    self.ended = True
                case Say.ENTRY:
                    self._entry(meta)
                case _ if guest is not None and not guest.gone:
                    self._of_worker(guest, message)
        finally:
            self._busy = False

    def _of_worker(self, guest: Guest, message: Message) -> None:
        kind, meta, buffers, _ = message
        try:
            if guest.line.hear(meta["n"], meta["h"]):
                self._understand(guest, kind, meta, buffers)()
        except (ValueError, StepError) as error:
            code, text = (error.code, error.message) if isinstance(error, PacelineError) else ("PL462", str(error))
            self.work.tell({"do": "refuse", "worker": guest.name, "code": code, "message": text})

    def _entry(self, entry: Mapping[str, Any]) -> None:
        if not self._heard.hear(entry["n"], 0):
            return
        if self._copies > 1 and self._heard.heard % _EVERY == 0:
            about = {"index": self._index, "number": self._heard.heard}
            self.afterwards(partial(self._links.post, LEAD, Say.HEARD, about))
        if entry["do"] == "close":
            self.ended = True
        else:
            self.work.add(entry)

    # ---- what the lead has decided ------------------------------------------------------------------------------------
    def carry_out(self, entry: Mapping[str, Any]) -> None:
        """Do it here, and tell the other servers."""
        if entry["do"] in ("grant", "met", "refuse", "origin", "bye"):
            self.work.tell(entry)
            return
        self._tell_servers(entry)
        self.work.add(entry)

    def _tell_servers(self, entry: Mapping[str, Any]) -> None:
        for number, line in self._peers.items():
            said = {**entry, "n": line.say(entry)}
            if self.copy.role is Role.ALONE:  # they do it while it is done here
                self._links.post(peer(number), Say.ENTRY, said)
                continue
            say = partial(self._links.post, peer(number), Say.ENTRY, said)
            self.afterwards(say, what=(peer(number), said["n"]))

    # ---- the other servers ----------------------------------------------------------------------------------------------
    def collect(self) -> list[PieceState]:
        """What all servers keep, after the last update; parameters go where they belong. Of the lead; waits for the others.

        Raises:
            PeerLost: PL460, one of them is gone, and has no second copy.
        """
        self.shard.read_buffers()
        found = self.shard.pieces()
        self._wait(lambda: self.copy.role is not Role.FIRST or not self._later)
        self._parts = {}
        for number in self._peers:
            self._links.post(peer(number), Say.COLLECT, {})
        self._wait(lambda: len(self._parts) == len(self._peers))
        for number in self._peers:
            frame = self._parts.pop(peer(number))
            places = self._kept.answered(self.shard.memory, number)
            for place, buffer in zip(places, frame.buffers, strict=False):
                place[:] = buffer
            found += unflatten(frame.meta["pieces"], frame.buffers[len(places) :])
        return found

    def _wait(self, until: Callable[[], bool]) -> None:
        """Read what comes, and carry out none of it."""
        while not until():
            self._links.check()
            lost = [number for number in self._peers if not self._links.has(peer(number))]
            if lost and self._copies == 1:
                raise PeerLost("PL460", f"server {lost[0]} is gone")
            busy, self._busy = self._busy, True
            self._links.turn()
            self._busy = busy

    def collected(self, source: str, frame: Frame) -> None:
        """Another server has told what it keeps."""
        self._parts[source] = frame

    def knows(self, number: int) -> bool:
        """This server was connected before."""
        return number in self._there

    @property
    def heard_entries(self) -> int:
        """So many entries of the lead have come."""
        return self._heard.heard

    def has_entered(self, number: int, heard: int) -> None:
        """Another server is connected, and has heard so many entries; the rest is said again.

        Raises:
            ValueError: It cannot be told what it has missed.
        """
        self.hear(peer(number), Say.ENTER, {"index": number})
        again = self._peers[number].again(heard) if self._copies > 1 else []
        for which, entry in again:
            if not self.waits((peer(number), which)):
                self._links.post(peer(number), Say.ENTRY, {**entry, "n": which})
        if self._busy and peer(number) not in self._parts:  # it was asked in vain
            self._links.post(peer(number), Say.COLLECT, {})

    # ---- another copy -------------------------------------------------------------------------------------------------
    def _whole(self) -> trees.Tree:
        assert not self._later, "this copy is alone: all is said"
        return {
            **self.work.whole(),
            "heard": self._heard.state(),
            "peers": {number: line.state() for number, line in self._peers.items()},
            "there": sorted(self._there),
            "lead": self._lead.whole() if self._lead is not None else None,
        }

    def take_over(self, whole: trees.Tree) -> None:
        """Be as the copy that has told this."""
        self.work.take_over(whole)
        self._heard.load(whole["heard"])
        for number, state in whole["peers"].items():
            self._peers[number].load(state)
        self._there = set(whole["there"])
        if self._lead is not None:
            self._lead.take_over(whole["lead"])
