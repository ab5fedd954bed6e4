"""Membership, the coordinator's half: decides who takes part in which epoch. Pure, see ``view`` for the words.

One process, no rank; workers go on stepping while it is down. Its life of a view:

1. **Why a new one**: a death certificate, a lease that ran out, a broken wire, joiners and everybody at a step boundary.
2. **Proposed**: the epoch is journalled, then announced; its number is never used again. Whoever it leaves out is *fenced*.
3. **Ready**: each member has left its old wire and sends its report of this very epoch. Another loss: back to 1 with the next epoch.
4. **Started**: all are ready, and there are ``min_workers``, counting those who wait for the next step boundary; journalled, then
   announced with all reports in rank order.

Joiners come in where every member that stays has left its wire at a step boundary, so never into a step that a death has opened.

Where a replica is split over several workers they are a *unit*: one that has lost a worker is left out whole, one that is not complete
is not admitted.

Who may be left out without a certificate: silent members (no message for a lease), if the others are more than half of those
members of the last started view that are not known to be gone; or any silent member if the operator forces it. Durations are of
this process's monotonic clock only, and time in which it did not run itself counts against nobody.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from paceline.group.view import (
    Action,
    Certificate,
    Close,
    Closed,
    Event,
    Force,
    Identity,
    Journal,
    Kind,
    Limits,
    Meta,
    Note,
    Received,
    Record,
    Send,
    Tick,
    View,
    well_formed,
)


@dataclass(slots=True, eq=False)
class Seat:
    """What the coordinator knows of one process that is not gone. Epochs; times on the coordinator's clock."""

    identity: Identity
    nonce: str
    heard: float
    link: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    ready: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    left: int = 0
    left_at: float = 0.0
    boundary: bool = False
    waiting: bool = False
    silent: bool = False


class Coordinator:
    """Decides who is in which epoch.

    Args:
        limits: Numbers and times.
        history: Records of the journal, oldest first, when this is a restart.
        torn: The journal's last record was cut off. It may have held an epoch, so one number is skipped.
        now: Monotonic seconds. Members of the last view have a fresh lease from here.

    Attributes:
        view: Proposed last; `started` tells whether it has.
        committed: Started last.
        gone: Who will not come back, and why: ``died``, ``finished``, ``failed``, ``stopping``, ``evicted``.
        ending: Somebody has finished, so nobody is admitted any more.
    """

    def __init__(self, limits: Limits, history: Iterable[Record] = (), *, torn: bool = False, now: float = 0.0) -> None:
        self.limits = limits
        self.view: View | None = None
        self.committed: View | None = None
        self.started = False
        self.ending = False
        self.gone: dict[Identity, str] = {}
        self.seats: dict[Identity, Seat] = {}
        self._links: dict[int, Seat] = {}
        self._nonces: dict[Identity, str] = {}
        self._reports: list[dict[str, Any]] | None = None
        self._last = 0
        self._forced = False
        self._changed = True
        self._ticked = self._now = now
        self._out: list[Action] = []
        self._regroup = False
        self._restore(history, torn)

    @property
    def over(self) -> bool:
        """Somebody has finished, and everybody else is gone."""
        return self.ending and self.view is not None and all(m in self.gone for m in self.view.members)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; what is to be done now, in this order."""
        self._now, self._out = now, []
        match event:
            case Received(link, kind, meta):
                self._received(link, kind, meta)
            case Closed(link):
                seat = self._links.pop(link, None)
                if seat is not None:
                    seat.link, self._changed = None, True
            case Tick():
                self._tick()
            case Certificate(identity, why):
                self._certified(identity, why)
            case Force():
                self._forced = self._changed = True
            case _:
                raise AssertionError(f"not for a coordinator: {event}")
        if self._changed:
            self._changed = False
            self._decide()
        return self._out

    def status(self) -> dict[str, Any]:
        """What there is to know, as JSON."""
        view = self.view
        return {
            "epoch": view.epoch if view else 0,
            "started": self.started,
            "members": [list(m) for m in view.members] if view else [],
            "gone": {m.name: why for m, why in self.gone.items()},
            "silent": [s.identity.name for s in self.seats.values() if s.silent],
            "joiners": [list(s.identity) for s in self._joiners()],
            "about": {s.identity.name: s.about for s in self.seats.values()},
            "over": self.over,
        }

    # -- the journal
    def _restore(self, history: Iterable[Record], torn: bool) -> None:
        for record in history:
            self._replay(record)
        self._last += torn
        self._regroup = not self.started  # a view that was only proposed: who was ready for it is forgotten
        if self.view is not None:
            alive = [m for m in self.view.members if m not in self.gone]
            self.seats = {m: Seat(m, self._nonces[m], heard=self._now) for m in alive}

    def _replay(self, record: Record) -> None:
        match record:
            case {"k": "epoch", "epoch": int(epoch), "members": [*rows]}:
                identities = [Identity(name, incarnation) for name, incarnation, _ in rows]
                self._nonces.update({m: row[2] for m, row in zip(identities, rows, strict=True)})
                for member in self.view.members if self.view else ():
                    if member not in identities:
                        self.gone.setdefault(member, "evicted")
                self.view, self.started, self._last = View(epoch, tuple(identities)), False, epoch
            case {"k": "start"}:
                self.started, self.committed = True, self.view
            case {"k": "gone", "who": [str(name), str(incarnation)], "why": str(why)}:
                self._depart(Identity(name, incarnation), why)
            case _:
                raise ValueError(f"unknown record {record}")

    # -- what comes in
    def _received(self, link: int, kind: int, meta: Meta) -> None:
        if kind > Kind.LEAVE or not well_formed(kind, meta):
            self._out.append(Close(link))
            self._changed = True
            seat = self._links.pop(link, None)
            if seat is not None:
                seat.link = None
            return
        if kind == Kind.HELLO:
            self._hello(link, meta)
            return
        seat = self._links.get(link)
        if seat is None:  # no HELLO came over it, or it was replaced, fenced, refused: a new one will tell
            self._out.append(Close(link))
            return
        if seat.silent:
            seat.silent, self._changed = False, True
        seat.heard = self._now
        if kind == Kind.BEAT:
            self._beat(seat, meta)
        elif kind == Kind.READY:
            self._ready(seat, meta["epoch"], meta["report"])
        else:
            self._say(seat, Kind.BYE)
            self._dismiss(seat.identity, meta["why"] if meta["why"] in ("finished", "stopping") else "failed")

    def _hello(self, link: int, meta: Meta) -> None:
        identity = Identity(meta["name"], meta["incarnation"])
        refusal = self._refusal(identity, meta)
        if refusal is not None:
            self._out += [Send(link, *refusal), Close(link)]
            self._note("refused", name=identity.name, why=refusal[1].get("message") or refusal[1].get("why"))
            return
        seat = self.seats.setdefault(identity, Seat(identity, meta["nonce"], self._now))
        if seat.link is not None and seat.link != link:
            self._unlink(seat)
        seat.link, seat.about, seat.heard, seat.silent = link, meta["about"], self._now, False
        self._links[link] = seat
        self._changed = True
        self._beat(seat, meta)

    def _refusal(self, identity: Identity, meta: Meta) -> tuple[Kind, dict[str, Any]] | None:
        seat = self.seats.get(identity)
        if self._is_gone(identity):
            return Kind.FENCED, {"epoch": self._last, "why": self.gone[identity]}
        if seat is None and meta["started"]:
            return Kind.FENCED, {"epoch": self._last, "why": f"in epoch {meta['started']}, which is not in the journal"}
        if self.over:
            return Kind.REFUSED, {"code": "PL422", "message": "the run has ended, so nobody can join it"}
        if seat is not None and seat.nonce != meta["nonce"]:
            text = f"another process is {identity.name}, incarnation {identity.incarnation}, and lives"
            return Kind.REFUSED, {"code": "PL421", "message": text}
        if seat is None and any(identity.name == other.name for other in self.seats):
            return Kind.REFUSED, {"code": "PL420", "message": f"a worker {identity.name} takes part and lives"}
        return None

    def _is_gone(self, identity: Identity) -> bool:
        return identity in self.gone

    def _beat(self, seat: Seat, meta: Meta) -> None:
        if meta["left"] > seat.left:
            seat.left, seat.left_at, seat.boundary, self._changed = meta["left"], self._now, meta["boundary"], True
        if meta["waiting"] != seat.waiting:
            seat.waiting, self._changed = meta["waiting"], True
        view = self.view
        inside = view is not None and seat.identity in view.members
        pending = inside and self._pending()
        self._say(seat, Kind.ACK, sent=meta["sent"], epoch=view.epoch if view and inside else 0, pending=pending)
        if view is None or not inside:
            return
        if not self.started:
            if meta["seen"] < view.epoch or (meta["ready"] == view.epoch and seat.ready != view.epoch):
                self._announce(seat, view)
        elif meta["started"] < view.epoch:
            if self._reports is None:  # they were lost in a restart: nobody can tell this member how to enter
                self._regroup = self._changed = True
            else:
                self._say(seat, Kind.START, epoch=view.epoch, reports=self._reports)

    def _ready(self, seat: Seat, epoch: int, report: dict[str, Any]) -> None:
        view = self.view
        if view is not None and epoch == view.epoch and not self.started and seat.identity in view.members:
            seat.ready, seat.report, self._changed = epoch, report, True

    def _certified(self, identity: Identity, why: str) -> None:
        if identity not in self.gone:
            self._dismiss(identity, "finished" if why == "finished" else "died")

    def _tick(self) -> None:
        self._forgive(self._now - self._ticked)
        self._ticked = self._now
        for seat in list(self.seats.values()):
            seat.silent = self._now - seat.heard > self.limits.lease
            if seat.silent and (self.view is None or seat.identity not in self.view.members):
                self._unlink(seat)
                del self.seats[seat.identity]
        self._changed = True

    def _forgive(self, gap: float) -> None:
        """Nobody could be heard while this process did not run: suspended, or starved of the processor."""
        if gap > 2 * self.limits.heartbeat:
            for seat in self.seats.values():
                seat.heard = min(self._now, seat.heard + gap)

    # -- what is decided
    def _decide(self) -> None:
        self._propose()
        self._start()
        self._forced = False
        if self.over:
            for seat in list(self.seats.values()):
                self._say(seat, Kind.REFUSED, code="PL422", message="the run has ended, so nobody can join it")
                self._unlink(seat)
                del self.seats[seat.identity]

    def _propose(self) -> None:
        """The next view, where there is a reason for one and somebody to be in it."""
        kept = self._kept()
        why = self._reason(kept)
        joiners = self._invited()[: self._room(kept)] if self._calm(kept) else []  # room for whole units
        members = (*kept, *(seat.identity for seat in joiners))
        if not why or not members:
            return
        self._last += 1
        old = self.view.members if self.view else ()
        self.view, self.started, self._reports, self._regroup = View(self._last, members), False, None, False
        rows = [[*m, self.seats[m].nonce] for m in members]
        self._out.append(Journal({"k": "epoch", "epoch": self._last, "members": rows}))
        lost = {m.name: self.gone.get(m, "evicted") for m in old if m not in members}
        self._note("proposed", epoch=self._last, why=why, members=[m.name for m in members], lost=lost)
        for member in old:
            if member not in members:
                self._fence(member, "evicted")
        for member in members:
            self._announce(self.seats[member], self.view)

    def _reason(self, kept: list[Identity]) -> str:
        view = self.view
        if view is None:
            return "first" if self._all_have_come() else ""
        if any(m not in kept and not (self.started and self.gone.get(m) == "finished") for m in view.members):
            return "lost"
        if self._regroup:
            return "restart"
        if not self.started:
            short = len(kept) < self.limits.min_workers and self._room(kept) > 0
            return "joiners" if short and self._invited() and self._calm(kept) else ""
        return self._left([self.seats[m] for m in kept], view.epoch)

    def _left(self, seats: list[Seat], epoch: int) -> str:
        """Members have left the wire of this epoch: all of them, or one long enough ago that no certificate explains it."""
        left = [seat for seat in seats if seat.left == epoch]
        if left and len(left) == len(seats):
            return "boundary" if all(seat.boundary for seat in left) else "wire"
        patience = {True: self.limits.lease, False: self.limits.heartbeat}
        return "wire" if any(self._now - seat.left_at >= patience[seat.boundary] for seat in left) else ""

    def _all_have_come(self) -> bool:
        """For the first epoch. Who died before it is not waited for."""
        first = self.limits.first
        gone = sum(not first or identity.name in first for identity in self.gone)
        least = 0 if first else self.limits.min_workers  # who begins need not be so many, if others wait to come in
        return len(self._invited()) >= max(1, least, self.limits.expected - gone)

    def _invited(self) -> list[Seat]:
        """Who may come in now. Those who come from elsewhere, or in the place of another, take part in a run that has begun."""
        first = self.limits.first
        begun = self.committed is not None or not first
        return [s for s in self._joiners() if begun or s.identity.name in first]

    def _kept(self) -> list[Identity]:
        """Members of the view that stay: not gone, and not silent where the others may go on without them."""
        if self.view is None:
            return []
        voters = self.committed.members if self.committed else ()
        evict = self._forced or self._majority([m for m in voters if m not in self.gone])
        found = [
            m
            for m in self.view.members
            if m not in self.gone and not (self.seats[m].silent and (evict or m not in voters))
        ]
        broken = {self._unit(m) for m in self.view.members if m not in found and self.gone.get(m) != "finished"}
        return [m for m in found if self._unit(m) not in broken]

    def _unit(self, identity: Identity) -> tuple[str, int]:
        """With whom this worker comes and goes."""
        stem, number, _ = _natural(identity)
        return stem, number // self.limits.unit

    def _majority(self, voters: list[Identity]) -> bool:
        return not voters or 2 * sum(not self.seats[m].silent for m in voters) > len(voters)

    def _joiners(self) -> list[Seat]:
        """Who waits to come in, in the order of their names: whole units."""
        inside = self.view.members if self.view else ()
        found = [s for s in self.seats.values() if s.waiting and s.link is not None and s.identity not in inside]
        if self.limits.unit > 1:
            there = Counter(self._unit(s.identity) for s in found)
            found = [s for s in found if there[self._unit(s.identity)] == self.limits.unit]
        return sorted(found, key=lambda seat: _natural(seat.identity)) if len(found) > 1 else found

    def _calm(self, kept: list[Identity]) -> bool:
        """Those who stay of the last started view have all left it at a step boundary."""
        if self.committed is None:
            return True
        stay = [self.seats[m] for m in kept if m in self.committed.members]
        return all(seat.left == self.committed.epoch and seat.boundary for seat in stay)

    def _room(self, kept: Collection[Identity]) -> int:
        room = 0 if self.ending else max(0, self.limits.max_workers - len(kept))
        return room - room % self.limits.unit

    def _pending(self) -> bool:
        """Whether members are to stop at the next step boundary: somebody wants to come in, or has to."""
        if self.view is None or not self.started or self.ending:
            return False
        alive = [m for m in self.view.members if m not in self.gone]
        return len(alive) < self.limits.min_workers or (self._room(alive) > 0 and bool(self._joiners()))

    def _start(self) -> None:
        view = self.view
        if view is None or self.started or not self._all_ready(view) or not self._enough(view):
            return
        self.started, self.committed = True, view
        self._reports = [self.seats[m].report for m in view.members]
        self._out.append(Journal({"k": "start", "epoch": view.epoch}))
        self._note("started", epoch=view.epoch, members=[m.name for m in view.members])
        for member in view.members:
            self._say(self.seats[member], Kind.START, epoch=view.epoch, reports=self._reports)

    def _all_ready(self, view: View) -> bool:
        return all(m in self.seats and self.seats[m].ready == view.epoch for m in view.members)

    def _enough(self, view: View) -> bool:
        waiting = min(self._room(view.members), len(self._joiners()))
        return self.ending or len(view.members) + waiting >= self.limits.min_workers

    # -- what goes out
    def _dismiss(self, identity: Identity, why: str) -> None:
        """For good: journalled, so that a restarted coordinator knows it too."""
        self._out.insert(0, Journal({"k": "gone", "who": list(identity), "why": why}))
        self._depart(identity, why)
        self._fence(identity, why)

    def _depart(self, identity: Identity, why: str) -> None:
        self.gone[identity] = why
        self.ending |= why == "finished" and self.view is not None and identity in self.view.members

    def _fence(self, identity: Identity, why: str) -> None:
        self.gone.setdefault(identity, why)
        seat = self.seats.pop(identity, None)
        if seat is not None:
            if why in ("died", "evicted"):
                self._say(seat, Kind.FENCED, epoch=self._last, why=why)
            self._unlink(seat)
        self._changed = True

    def _announce(self, seat: Seat, view: View) -> None:
        self._say(seat, Kind.PROPOSE, epoch=view.epoch, members=[list(m) for m in view.members])

    def _say(self, seat: Seat, kind: Kind, **meta: Any) -> None:
        if seat.link is not None:
            self._out.append(Send(seat.link, kind, meta))

    def _unlink(self, seat: Seat) -> None:
        if seat.link is not None:
            self._links.pop(seat.link, None)
            self._out.append(Close(seat.link))
            seat.link = None

    def _note(self, what: str, **detail: Any) -> None:
        self._out.append(Note(what, detail))


def _natural(identity: Identity) -> tuple[str, int, str]:
    """Sorts worker-2 before worker-10."""
    match = re.fullmatch(r"(.*?)(\d{1,18})", identity.name)
    return (match[1], int(match[2]), identity.name) if match else (identity.name, -1, identity.name)
