"""Membership, its words and the member's half. Pure: events and a monotonic time go in, instructions come out.

An *identity* is a name and an incarnation. A *view* is an epoch with its members in rank order. The coordinator (``membership``)
proposes views; a member leaves its wire, reports, and enters when the view has started. Messages may be lost, doubled, late or out
of order: each beat carries the member's whole state, so what is missing is sent again.

**Fencing, and what a member may do alone.** An exchange completes only if all members of its epoch take part, and nobody is ready
for a newer epoch before it has left the older one's wire. So two epochs that share a member never both make progress, and a member
that hears nothing from the coordinator may go on exchanging: it cannot tell a dead coordinator from a cut cable, and need not.
What it does *alone* on behalf of its epoch (publish a checkpoint) needs :meth:`MemberCore.sure`: a beat that was acknowledged was
sent less than 0.8 leases ago. Without the coordinator nobody enters an epoch; a member that was left out learns it at the first
contact; and every resource refuses epochs older than the newest that it has seen, which is what protects it from views that share
no member at all (everybody certified dead, the operator's force).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

Meta = Mapping[str, Any]
Record = dict[str, Any]

SAFE = 0.8
"""Share of a lease, counted from when a beat was sent, during which its acknowledgement protects the sender."""

FIRST_PAUSE = 0.2
"""Heartbeats before the first new attempt to connect; doubles up to two heartbeats."""

NEVER = float("-inf")


class Identity(NamedTuple):
    """A worker: its name, and 32 hexadecimal digits that are new for each process."""

    name: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class View:
    """An epoch and its members; a member's rank is its index."""

    epoch: int
    members: tuple[Identity, ...]

    def rank(self, identity: Identity) -> int:
        """Index of `identity`; ValueError for a stranger."""
        return self.members.index(identity)


@dataclass(frozen=True, slots=True)
class Meeting:
    """A view that has started, and what each member reported, in rank order."""

    view: View
    reports: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers of workers, and times in seconds.

    Attributes:
        expected: The first epoch waits for that many.
        first: Names of those who begin; nobody else is in the first epoch. Empty: it does not matter who they are.
        min_workers: No epoch starts with fewer.
        max_workers: Joiners above it wait.
        heartbeat, lease: A beat each; silence for a lease makes a member a candidate for eviction.
        unit: Workers come and go by so many at once, those of one replica that is split over them: numbers 0 to `unit` - 1, the next
            `unit`, and so on. Who begins fills whole units.
    """

    expected: int = 1
    min_workers: int = 1
    max_workers: int = 1
    heartbeat: float = 0.25
    lease: float = 2.0
    first: frozenset[str] = frozenset()
    unit: int = 1


class Kind(IntEnum):
    """Messages: below 10 from members, above to them."""

    HELLO = 1
    BEAT = 2
    READY = 3
    LEAVE = 4
    ACK = 11
    PROPOSE = 12
    START = 13
    FENCED = 14
    REFUSED = 15
    BYE = 16


_STATE = {"sent": float, "started": int, "seen": int, "ready": int, "left": int, "boundary": bool, "waiting": bool}
_FIELDS: dict[int, dict[str, type]] = {
    Kind.HELLO: {"name": str, "incarnation": str, "nonce": str, "about": dict, **_STATE},
    Kind.BEAT: _STATE,
    Kind.READY: {"epoch": int, "report": dict},
    Kind.LEAVE: {"why": str},
    Kind.ACK: {"sent": float, "epoch": int, "pending": bool},
    Kind.PROPOSE: {"epoch": int, "members": list},
    Kind.START: {"epoch": int, "reports": list},
    Kind.FENCED: {"epoch": int, "why": str},
    Kind.REFUSED: {"code": str, "message": str},
    Kind.BYE: {},
}


def well_formed(kind: int, meta: Meta) -> bool:
    """Whether a message has the fields of its kind, each of its type."""
    fields = _FIELDS.get(kind)
    return fields is not None and all(type(meta.get(name)) is wanted for name, wanted in fields.items())


# ---- events -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Received:
    """A message has come over a link; a member has only one, 0."""

    link: int
    kind: int
    meta: Meta


@dataclass(frozen=True, slots=True)
class Closed:
    """A link has ended, or could not be had."""

    link: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. The coordinator wants one each heartbeat, a member at ``wake``; messages that have come go first."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The launcher saw this process end: ``died``, or ``finished`` when it had done all its work."""

    identity: Identity
    why: str = "died"


@dataclass(frozen=True, slots=True)
class Force:
    """The operator vouches that whoever is silent now is dead."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The member's link stands."""


@dataclass(frozen=True, slots=True)
class Meet:
    """The worker has left its wire, at a step boundary because joiners wait or (False) for any other reason."""

    boundary: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """The worker's report for the view in ``asked``."""

    epoch: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker ends: ``finished``, ``failed`` or ``stopping``. No epoch change follows the first."""

    why: str


Event = Received | Closed | Tick | Certificate | Force | Opened | Meet | Report | Leave


# ---- instructions -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Journal:
    """Must be durable before the instructions after it are carried out."""

    record: Record


@dataclass(frozen=True, slots=True)
class Send:
    """Send over a link; that it has gone already is no error."""

    link: int
    kind: Kind
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Close:
    """Close a link once everything sent before is out. No ``Closed`` is expected in return."""

    link: int = 0


@dataclass(frozen=True, slots=True)
class Connect:
    """Try to have a link; ``Opened`` or ``Closed`` tells how it went."""


@dataclass(frozen=True, slots=True)
class Note:
    """For people: what was decided, and why."""

    what: str
    detail: dict[str, Any]


Action = Journal | Send | Close | Connect | Note


# ---- the member -------------------------------------------------------------------------------------------------------
class MemberCore:
    """One worker's membership.

    Args:
        identity: Who it is.
        nonce: Drawn by this very process; tells its new connection from a copy of it.
        about: JSON about the process: host, pid, slot.
        heartbeat, lease: Seconds, as the coordinator has them.

    Attributes:
        view: Started last; `seen`: proposed last. The first trails the second while a meeting is going on.
        pending: Joiners wait; leave the wire at the next step boundary.
        failed: Code and message of why this member takes no part any more, or None.
        meeting: What came of the last ``Meet``, until ``take_meeting``.
        parted: The coordinator knows that this worker has left.
        wake: When the next ``Tick`` is wanted.
    """

    def __init__(
        self, identity: Identity, nonce: str, about: dict[str, Any], *, heartbeat: float = 0.25, lease: float = 2.0
    ) -> None:
        self.identity = identity
        self.view: View | None = None
        self.seen: View | None = None
        self.pending = False
        self.failed: tuple[str, str] | None = None
        self.meeting: Meeting | None = None
        self.parted = False
        self.wake = 0.0
        self.heard = NEVER  # when the newest acknowledged beat was sent
        self._name = {"name": identity.name, "incarnation": identity.incarnation, "nonce": nonce, "about": about}
        self._heartbeat, self._lease = heartbeat, lease
        self._open = self._trying = False
        self._opened = 0.0
        self._pause = FIRST_PAUSE * heartbeat
        self._ready = 0
        self._report: dict[str, Any] = {}
        self._left = 0
        self._boundary = False
        self._waiting = False
        self._leaving = ""
        self._outside: frozenset[int] = frozenset()
        self._now = 0.0
        self._out: list[Action] = []

    @property
    def epoch(self) -> int:
        """Of the view started last, or 0."""
        return self.view.epoch if self.view else 0

    @property
    def interrupted(self) -> bool:
        """A newer epoch was proposed, or this member takes no part any more: leave the wire."""
        return self.failed is not None or (self.seen is not None and self.seen.epoch > self.epoch)

    @property
    def outside(self) -> frozenset[int]:
        """Ranks of `view` that are members no longer, as far as this member knows; all others once it is out itself."""
        return self._outside

    @property
    def asked(self) -> View | None:
        """The proposed view for which a report is wanted now."""
        seen = self.seen
        wanted = self._waiting and seen is not None and seen.epoch > max(self._ready, self.epoch)
        return seen if wanted and self.failed is None else None

    def sure(self, now: float) -> bool:
        """Whether at `now` nobody can have been told that this member is out: it may act alone for its epoch."""
        return self.view is not None and not self.interrupted and now - self.heard < SAFE * self._lease

    def take_meeting(self) -> Meeting | None:
        """The meeting that has come about, once."""
        meeting, self.meeting = self.meeting, None
        return meeting

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; what is to be done now, in this order."""
        self._now, self._out = now, []
        match event:
            case Received(_, kind, meta):
                if kind > Kind.LEAVE and well_formed(kind, meta):
                    self._received(kind, meta)
                else:
                    self._drop()
            case Tick():
                self._tick()
            case Opened():
                self._open, self._trying, self._opened = True, False, now
                self._say(Kind.HELLO, **self._name, **self._state())
                self.wake = now + self._heartbeat
            case Closed():
                self._retry()
            case Meet(boundary):
                self._left, self._boundary, self._waiting, self.meeting = self.epoch, boundary, True, None
                self._say(Kind.BEAT, **self._state())
            case Report(epoch, report):
                if self.asked is not None and epoch == self.asked.epoch:
                    self._ready, self._report = epoch, report
                    self._say(Kind.READY, epoch=epoch, report=report)
            case Leave(why):
                self._leaving = why
                self._say(Kind.LEAVE, why=why)
            case _:
                raise AssertionError(f"not for a member: {event}")
        return self._out

    def _received(self, kind: int, meta: Meta) -> None:
        if kind == Kind.ACK:
            self.heard = max(self.heard, meta["sent"])
            self._pause = FIRST_PAUSE * self._heartbeat
            if meta["epoch"] == self.epoch:
                self.pending = meta["pending"]
        elif kind == Kind.PROPOSE:
            self._proposed(View(meta["epoch"], tuple(Identity(*row) for row in meta["members"])))
        elif kind == Kind.START:
            self._start(meta["epoch"], meta["reports"])
        elif kind == Kind.BYE or self._leaving:
            self.parted = True
        elif kind == Kind.FENCED:
            text = f"{self.identity.name} is no member any more: {meta['why']}, seen from epoch {meta['epoch']}"
            self._fail("PL423", text)
        else:
            self._fail(meta["code"], meta["message"])

    def _proposed(self, view: View) -> None:
        newest = max(self.seen.epoch if self.seen else 0, self.epoch)
        if view.epoch > newest:
            self.seen = view
            self._outside = self._ranks_outside(view.members)
        elif view.epoch == newest == self._ready:  # it asks again
            self._say(Kind.READY, epoch=self._ready, report=self._report)

    def _start(self, epoch: int, reports: list[dict[str, Any]]) -> None:
        if self.seen is None or not epoch == self.seen.epoch == self._ready or epoch <= self.epoch:
            return
        self.view, self._outside = self.seen, frozenset()
        self.meeting = Meeting(self.view, reports)
        self.pending = self._waiting = False

    def _fail(self, code: str, message: str) -> None:
        if self.failed is None:
            self.failed = (code, message)
            self._outside = self._ranks_outside((self.identity,))

    def _ranks_outside(self, members: tuple[Identity, ...]) -> frozenset[int]:
        return frozenset(r for r, m in enumerate(self.view.members if self.view else ()) if m not in members)

    def _tick(self) -> None:
        self.wake = self._now + self._heartbeat
        if self.failed or self.parted:
            return
        if not self._open:
            if not self._trying:
                self._trying = True
                self._out.append(Connect())
        elif (
            self._now - max(self.heard, self._opened) > SAFE * self._lease
        ):  # half open, or the other side does not run
            self._drop()
        elif self._leaving:
            self._say(Kind.LEAVE, why=self._leaving)
        else:
            self._say(Kind.BEAT, **self._state())

    def _drop(self) -> None:
        self._out.append(Close())
        self._retry()

    def _retry(self) -> None:
        self._open = self._trying = False
        self.wake = self._now + self._pause
        self._pause = min(2 * self._pause, 2 * self._heartbeat)

    def _state(self) -> dict[str, Any]:
        return {
            "sent": self._now,
            "started": self.epoch,
            "seen": self.seen.epoch if self.seen else 0,
            "ready": self._ready,
            "left": self._left,
            "boundary": self._boundary,
            "waiting": self._waiting,
        }

    def _say(self, kind: Kind, **meta: Any) -> None:
        if self._open:
            self._out.append(Send(0, kind, meta))
