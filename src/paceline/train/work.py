"""What a server does: the lead's entries in order, and answers to workers. It follows from what was heard, so all copies do the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from paceline.exchange.server_numbered import Numbered
from paceline.exchange.service import Service
from paceline.terms.errors import PeerLost, WireError
from paceline.train import tree as trees
from paceline.train.copied import frozen, hear_guest, tell_guest
from paceline.train.keeping import Kept
from paceline.train.lead import Lead
from paceline.train.links import LEAD, Links
from paceline.train.memory import Memory
from paceline.train.served_state import flatten
from paceline.train.shard import Guest, Part, Shard
from paceline.train.talk import Say

Item = tuple[int, dict[str, Any], bool, Any]
"""An answer: kind, meta, whether parameters go with it, and the buffers that are to be put where the worker reads them."""


class Order(Protocol):
    """See ``serve.Server``."""

    def afterwards(self, do: Callable[[], None], *, version: int = 0, what: tuple[str, int] = ("", 0)) -> None: ...
    def waits(self, what: tuple[str, int]) -> bool: ...


class Work:
    """See above.

    Args:
        kept: What is trained.
        service: What the strategy asks of servers.
        links: Connections.
        lead: Decides, where this is the lead; else None.
        things: What else the script has adopted, for another copy.
        workers: How many the run begins with.
        version: Of the parameters; more than 0 where they come from a checkpoint.
        order: Does things when all copies of this server have carried out what they follow from.

    Attributes:
        by_name: The workers.
    """

    def __init__(
        self,
        kept: Kept,
        service: Service,
        links: Links,
        lead: Lead | None,
        things: trees.Things,
        workers: int,
        version: int,
        order: Order,
    ) -> None:
        self.shard = Shard(kept, links.index, service, workers)
        self.shard.version = version
        self._kept, self._service, self._index, self._lead, self._links = kept, service, links.index, lead, links
        self._order, self._things = order, things
        self.by_name: dict[str, Guest] = {}
        self._entries: deque[Mapping[str, Any]] = deque()
        self._pulls: list[tuple[str, int]] = []

    def numbered(self) -> Numbered[Any]:
        """A line, which keeps what was said where somebody may have to say it again."""
        return Numbered(keeps=self._service.copies > 1)

    def add(self, entry: Mapping[str, Any]) -> None:
        """The lead has decided this."""
        self._entries.append(entry)
        self.go_on()

    def pushed(self, guest: Guest, seq: int, meta: Mapping[str, Any], note: Callable[[], None] | None) -> None:
        """A push is there; `note` it with the lead's core."""
        guest.pushes[seq] = meta
        if note is not None:
            note()
        self.go_on()

    def pulled(self, name: str, version: int) -> None:
        """A worker wants the parameters of this version."""
        self._pulls.append((name, version))
        self._answer_pulls()

    def attach(self, name: str, meta: Mapping[str, Any]) -> None:
        """A worker has come."""
        before = self.by_name.get(name)
        if before is not None and not before.gone:
            return
        handle = str(meta["handle"])
        try:
            memory = Memory(self._kept.layout, self._kept.buffer_layout, handle=handle, shared=False)
        except WireError:  # it has died since it came here, and pushes nothing
            memory = Memory(self._kept.layout, self._kept.buffer_layout, shared=False)
        self.by_name[name] = Guest(name, memory, handle, str(meta["id"]), self.numbered())
        welcome = self._lead.welcome() if self._lead is not None else {}
        self._answer(self.by_name[name], Say.WELCOME, {**welcome, "handle": self.shard.memory.handle})

    def gone(self, name: str, meta: Mapping[str, Any]) -> None:
        """A worker has ended, or ends with an error."""
        guest = self.by_name.get(name)
        if guest is None or guest.gone or meta.get("id", guest.id) != guest.id:
            return
        guest.gone = True
        if self._lead is not None:
            self._lead.left(name)
        self._forget(guest)

    def go_on(self) -> None:
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
            case "collect":
                told, tensors = flatten(self.shard.pieces())
                arrays: list[Any] = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
                parts = [memoryview(array) for array in arrays]
                self._links.post(LEAD, Say.PART, {"pieces": told}, [*self.shard.told(), *parts])
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
        guest = self.by_name.get(name)
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
            self.by_name.pop(guest.name, None)
            self.shard.forget(guest.name)
            guest.memory.close()

    def _let_go(self, entry: Mapping[str, Any]) -> None:
        guest = self.by_name.get(entry["worker"])
        if guest is None or guest.gone:
            return
        if entry["seq"] == 0:
            self.shard.enter(guest.name)
        self.shard.put(guest, center=entry["seq"] == 0)
        meta: dict[str, Any] = {"seq": entry["seq"]}
        if self._lead is not None:
            meta |= self._lead.about(entry)
            if guest.told != self.shard.stamp:
                guest.told = self.shard.stamp
                meta["hypers"] = self.shard.settings()
        self._answer(guest, Say.GO, meta, bulk=True)

    def tell(self, entry: Mapping[str, Any]) -> None:
        """The lead has decided what a worker is told."""
        guest = self.by_name.get(entry["worker"])
        if guest is None or guest.gone:
            return
        match entry["do"]:
            case "grant":
                self._answer(guest, Say.GRANT, {"piece": entry["piece"]})
            case "origin":
                self._answer(guest, Say.ORIGIN, {"origin": entry["origin"]})
            case "met":
                self._answer(guest, Say.MET, {key: entry[key] for key in ("notes", "rank", "size", "version")})
            case "bye":
                self._answer(guest, Say.BYE, {})
            case "refuse":
                self._order.afterwards(partial(self._links.refuse, guest.name, entry["code"], entry["message"]))
                self.gone(guest.name, {})

    def _answer_pulls(self) -> None:
        waiting = []
        for name, version in self._pulls:
            guest = self.by_name.get(name)
            if self.shard.version < version:
                waiting.append((name, version))
            elif guest is not None and not guest.gone:
                self.shard.put(guest)
                self._answer(guest, Say.PULLED, {"version": self.shard.version}, bulk=True)
        self._pulls = waiting

    # ---- answers ----------------------------------------------------------------------------------------------------
    def _answer(self, guest: Guest, kind: Say, meta: Mapping[str, Any], *, bulk: bool = False) -> None:
        """Say something to a worker; with `bulk` the parameters that were put where it reads them.

        Buffers lie where the worker has pushed its own, which another copy may have to read yet: they are put there when this is said.
        """
        later = bulk and self._service.copies > 1 and guest.memory.shared and self._index == 0
        buffers = self.shard.memory.raw_buffers.clone() if later else None
        item = (int(kind), {**meta, "h": guest.line.heard}, bulk, buffers)
        number = guest.line.say(item)
        self._order.afterwards(partial(self.post_answer, guest, number, item), what=(guest.name, number))

    def post_answer(self, guest: Guest, number: int, item: Item) -> None:
        """Say it now, or again."""
        kind, meta, bulk, buffers = item
        if buffers is not None:
            guest.memory.raw_buffers.copy_(buffers)
        private = bulk and not guest.memory.shared and not self._service.one_copy
        sent = self._kept.answered(guest.memory, self._index) if private else []
        self._links.post(guest.name, Say(kind), {**meta, "n": number}, sent)

    def come_back(self, meta: Mapping[str, Any]) -> Callable[[], None] | None:
        """A worker goes on over a new connection. What is to be done when that bears its name; None: it is not known."""
        guest = self.by_name.get(str(meta["name"]))
        if guest is None or guest.gone or guest.id != str(meta["id"]):
            return None
        try:
            again = [
                (n, item)
                for n, item in guest.line.again(int(meta.get("heard", 0)))
                if not self._order.waits((guest.name, n))
            ]
        except ValueError:
            return None

        def go_on() -> None:
            if "heard" in meta:
                self._links.post(guest.name, Say.RESUMED, {"known": True, "heard": guest.line.heard})
            for number, item in again:
                self.post_answer(guest, number, item)

        return go_on

    # ---- another copy -------------------------------------------------------------------------------------------------
    def whole(self) -> trees.Tree:
        """All that another copy must know, between two records."""
        return {
            "shard": self.shard.whole(),
            "guests": [tell_guest(guest) for guest in self.by_name.values()],
            "entries": [dict(entry) for entry in self._entries if entry["do"] != "collect"],
            "pulls": list(self._pulls),
            "frozen": frozen(self._kept),
            "things": trees.capture(self._things),
            "random": torch.get_rng_state(),
        }

    def take_over(self, whole: trees.Tree) -> None:
        """Be as the copy that has told this."""
        self.shard.take_over(whole["shard"])
        self.by_name = {told["name"]: hear_guest(told, self._kept, self.numbered) for told in whole["guests"]}
        self._entries = deque(whole["entries"])
        self._pulls = list(whole["pulls"])
        with torch.no_grad():
            for p, name in self._kept.names.items():
                if name in whole["frozen"]:
                    p.copy_(whole["frozen"][name])
        trees.restore(self._things, whole["things"])
        torch.set_rng_state(whole["random"])

    def close(self) -> None:
        """Give all memory back."""
        for guest in self.by_name.values():
            guest.memory.close()
