"""Bugs for the simulated job: each is one class that forgets one thing. A suite that does not notice them proves nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from paceline.group import journal
from paceline.group.membership import Coordinator, Seat
from paceline.group.view import (
    Action,
    Event,
    Identity,
    Journal,
    Kind,
    MemberCore,
    Meta,
    View,
)
from support.membership import Disk, Host, Parts, Store, Worker


class EpochReused(Coordinator):
    """After a restart it counts on from the last epoch that has started."""

    def _restore(self, history: Iterable[dict[str, Any]], torn: bool) -> None:
        super()._restore(history, torn)
        self._last = self.committed.epoch if self.committed else 0


class AnnouncedFirst(Coordinator):
    """It journals after it has told everybody."""

    def handle(self, event: Event, now: float) -> list[Action]:
        return sorted(super().handle(event, now), key=lambda action: isinstance(action, Journal))


class NoMajority(Coordinator):
    """Whoever is left goes on."""

    def _majority(self, voters: list[Identity]) -> bool:
        return True


class StartedEarly(Coordinator):
    """It starts when more than half are ready."""

    def _all_ready(self, view: View) -> bool:
        ready = sum(m in self.seats and self.seats[m].ready == view.epoch for m in view.members)
        return 2 * ready > len(view.members)


class CertificateIgnored(Coordinator):
    """It waits for leases only."""

    def _certified(self, identity: Identity, why: str) -> None:
        if why == "finished":
            super()._certified(identity, why)


class JoinerMidStep(Coordinator):
    """It lets joiners in whenever there is a new epoch."""

    def _calm(self, kept: list[Identity]) -> bool:
        return True


class NewEpochForJoiners(Coordinator):
    """It makes a new epoch as soon as joiners come."""

    def _left(self, seats: list[Seat], epoch: int) -> str:
        return "boundary" if self._pending() else super()._left(seats, epoch)


class DuplicateAdmitted(Coordinator):
    """The newest process with a name takes its seat."""

    def _refusal(self, identity: Identity, meta: Meta) -> tuple[Kind, dict[str, Any]] | None:
        refusal = super()._refusal(identity, meta)
        return None if refusal and refusal[1].get("code") in ("PL420", "PL421") else refusal


class OldReady(Coordinator):
    """Who was ready once is ready."""

    def _ready(self, seat: Seat, epoch: int, report: dict[str, Any]) -> None:
        seat.report = report
        super()._ready(seat, self.view.epoch if self.view else 0, report)


class NoMinimum(Coordinator):
    """It starts with however few."""

    def _enough(self, view: View) -> bool:
        return True


class FencedComesBack(Coordinator):
    """It forgets whom it has left out."""

    def _is_gone(self, identity: Identity) -> bool:
        return False


class UnforgivingCoordinator(Coordinator):
    """When it was suspended itself, it takes everybody for dead."""

    def _forgive(self, gap: float) -> None:
        pass


class FinishedIsLost(Coordinator):
    """A member that has done its work is a loss."""

    def _reason(self, kept: list[Identity]) -> str:
        if self.view and any(self.gone.get(m) == "finished" for m in self.view.members):
            return "lost"
        return super()._reason(kept)


class EntersUninvited(MemberCore):
    """It enters what was proposed without waiting for the start of that very epoch."""

    def _start(self, epoch: int, reports: list[dict[str, Any]]) -> None:
        if self.seen is not None:
            self._ready = self.seen.epoch
            super()._start(self.seen.epoch, reports)


class FenceRemoved(Store):
    """The resource takes what any epoch writes."""

    def accepts(self, epoch: int) -> bool:
        return True


class PrefetchMovesCursor(Worker):
    """What was read is taken for done, so a step that is done again has other rows."""

    fetched = -1

    def cursor(self, step: int) -> int:
        self.fetched = max(self.fetched + 1, step)
        return min(self.fetched, self.world.steps - 1) if step < self.world.steps else step


class LocalSuccess(Worker):
    """A step counts when it is complete here."""

    def stable(self) -> int:
        return self.applied


class Unhealed(Worker):
    """It takes the count of steps from the others, and goes on with its own parameters."""

    def heal(self, epoch: int, source: Worker | None, identity: Identity) -> None:
        if source is not None and self.wire == epoch:
            self.applied = source.applied
            self.go_on()


class LyingDisk(Disk):
    """It says that it has synced."""

    def sync(self) -> None:
        pass

    def crash(self, rng: random.Random) -> None:
        self.cached = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        return journal.decode(self.durable)[0], False


class TornTailTrusted(Disk):
    """It goes on writing behind a line that was cut off."""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        return journal.decode(self.durable)[0], False


class WallClockHost(Host):
    """It measures leases with the time of day."""

    def clock(self) -> float:
        return super().clock() + self.world.wall.get(self.name, 0.0)


PLANTED: Mapping[str, Parts] = {
    "epoch reused after a restart": Parts(coordinator=EpochReused),
    "announced before it is journalled": Parts(coordinator=AnnouncedFirst),
    "majority rule removed": Parts(coordinator=NoMajority),
    "started before all are ready": Parts(coordinator=StartedEarly),
    "certificate ignored": Parts(coordinator=CertificateIgnored),
    "joiner admitted inside a step": Parts(coordinator=JoinerMidStep),
    "members interrupted for joiners": Parts(coordinator=NewEpochForJoiners),
    "duplicate identity admitted": Parts(coordinator=DuplicateAdmitted),
    "old ready accepted": Parts(coordinator=OldReady),
    "min_workers ignored": Parts(coordinator=NoMinimum),
    "fence check of the coordinator removed": Parts(coordinator=FencedComesBack),
    "own suspension held against members": Parts(coordinator=UnforgivingCoordinator),
    "finished taken for lost": Parts(coordinator=FinishedIsLost),
    "member enters before the start": Parts(member=EntersUninvited),
    "fence check of the store removed": Parts(store=FenceRemoved),
    "cursor moved by prefetch": Parts(worker=PrefetchMovesCursor),
    "commit on local success": Parts(worker=LocalSuccess),
    "healing left out": Parts(worker=Unhealed),
    "lease by the wall clock": Parts(host=WallClockHost),
    "sync left out": Parts(disk=LyingDisk),
    "torn tail kept": Parts(disk=TornTailTrusted),
}
