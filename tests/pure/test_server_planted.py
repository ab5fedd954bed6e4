"""Bugs for the parameter server's core: each is one class that forgets one thing. Runs that do not notice them prove nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from paceline.exchange.server import Apply, Ask, Damp, Instruction, Part, Piece, Rule, ServerCore, Step
from paceline.exchange.server_bound import Asynchronous
from paceline.exchange.server_desk import Desk, Worker
from paceline.exchange.server_pool import Batch, Pool
from paceline.exchange.server_together import Synchronous
from support.serving import Plan, World

SEEDS = 1000


class OneMoreTick(Asynchronous):
    """It allows one clock more than the bound."""

    def _may_begin(self, worker: Worker) -> bool:
        others = [w.clock for w in self.desk.workers.values() if w.computing and w is not worker]
        return not others or worker.clock + 1 - min(others) <= self.desk.rule.staleness + 1


class DeadInMinimum(Asynchronous):
    """Who died in a tick holds the others."""

    lowest = math.inf

    def left(self, worker: Worker) -> None:
        if worker.computing:
            self.lowest = min(self.lowest, worker.clock)
        super().left(worker)

    def _may_begin(self, worker: Worker) -> bool:
        return super()._may_begin(worker) and worker.clock + 1 - self.lowest <= self.desk.rule.staleness


class NotReleased(Asynchronous):
    """Held workers are looked at when they push, and never again."""

    def advance(self) -> bool:
        alone = len([w for w in self.desk.workers.values() if w.step is not None]) == 1
        return alone and super().advance()


class LostAtTheEnd(ServerCore):
    """At the end of a pass nobody waits for what is out."""

    def _is_over(self, worker: Worker, ask: Ask) -> bool:
        return self.desk.pool.course(ask.loader, ask.epoch).exhausted


class KeepsLeases(Pool):
    """What a dead worker had is not given back."""

    def leave(self, worker: str) -> None:
        self.held.pop(worker, None)


class CopiesStay(Pool):
    """A part that is delivered is still out with who has a copy."""

    def deliver(self, piece: Piece) -> None:
        batch = self.find(piece)
        assert batch is not None
        batch.delivered[piece.part] = True
        name = next(w for w, pieces in self.held.items() if piece in pieces)
        self.held[name].remove(piece)
        batch.holders[piece.part].pop(name, None)


class Forgetful(Pool):
    """A checkpoint takes what is out for done."""

    def state(self) -> list[dict[str, Any]]:
        return [{**row, "left": []} for row in super().state()]


class AgeInPushes(Desk):
    """The age of a gradient counts pushes."""

    pushes = 0

    def apply(self, parts: Iterable[Part], blame: tuple[str, ...] = ()) -> None:
        parts = tuple(parts)
        version = self.version
        super().apply(parts, blame)
        for part in parts:
            counts = self.histogram[part.worker]
            counts[version - part.read] -= 1
            tau = version - part.read + self.pushes
            counts[tau] = counts.get(tau, 0) + 1
        self.histogram = {w: {t: n for t, n in c.items() if n} for w, c in self.histogram.items()}
        self.pushes += len(parts) - 1


class ForgetsToKeep(Desk):
    """A push that is applied later is not copied aside."""

    def keep(self, worker: Worker, step: Step) -> None:
        pass


class AppliesTheBroken(Desk):
    """Whether gradients are finite is not looked at."""

    def apply(self, parts: Iterable[Part], blame: tuple[str, ...] = ()) -> None:
        super().apply(parts)


class SkipsVersion(Desk):
    """What is not finite is no version."""

    def apply(self, parts: Iterable[Part], blame: tuple[str, ...] = ()) -> None:
        super().apply(parts, blame)
        self.version -= bool(blame)


class NeverFresh(Desk):
    """Who begins again keeps its parameters."""

    def refresh(self, worker: Worker) -> None:
        pass


class AppliedAgain(ServerCore):
    """A step that comes twice is taken for the next one."""

    def _stepped(self, worker: Worker, step: Step) -> None:
        worker.seq = step.seq - 1
        super()._stepped(worker, step)


class InOrderOfArrival(Synchronous):
    """Parts are summed as they come."""

    def _close(self) -> None:
        parts = list(self.parts)
        super()._close()
        index = next(i for i, m in enumerate(self.desk.out) if isinstance(m, Apply) and len(m.parts) == len(parts))
        update = self.desk.out[index]
        assert isinstance(update, Apply)
        self.desk.out[index] = Apply(update.version, tuple(parts), update.skip, update.blame)


class NobodyGoesRound(Synchronous):
    """What comes back waits for somebody to ask."""

    def _wake(self, batch: Batch) -> bool:
        return False


class LookedAheadFirst(Synchronous):
    """Who goes round is given what it has looked ahead."""

    def _is_needed(self, piece: Piece) -> bool:
        return True


class LateStepIn(Synchronous):
    """Who comes late gets a part of the next batch at once, with the parameters of before."""

    def _may_take(self, batch: Batch, ask: Ask, late: bool) -> bool:
        return True


class StalePart(Synchronous):
    """With which version a part was computed is not looked at, nor whether it was done."""

    def step(self, worker: Worker, step: Step) -> None:
        worker.read = self.desk.version
        super().step(worker, step)


class TooFewParts(Synchronous):
    """An update is made when as many parts are there as there are workers."""

    def _complete(self) -> bool:
        return len(self.parts) >= max(1, len(self.desk.workers))


class BufferBeyond(Asynchronous):
    """What is kept waits for as many as make an update."""

    def flush(self) -> bool:
        return len(self.buffer) >= self.desk.rule.buffer and super().flush()


class DividesByZero(Damp):
    """The factor of a fresh gradient is 1 / 0."""

    def __call__(self, tau: int) -> float:
        return 1 / tau


class Undamped(ServerCore):
    """Damps by what cannot be."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        if rule.damp.kind == "inverse":
            object.__setattr__(self.desk, "rule", Rule(rule.staleness, buffer=rule.buffer, damp=DividesByZero()))


class HearsTheDead(ServerCore):
    """Nobody is taken off the list of those who are waited for."""

    def handle(self, event: Any, now: float) -> list[Instruction]:
        out = super().handle(event, now)
        return [m for m in out if getattr(m, "tag", None) is None] if self.desk.gone else out


PLANTED: dict[str, type[ServerCore | Desk | Pool | Asynchronous | Synchronous]] = {
    "bound is off by one": OneMoreTick,
    "dead stay in the minimum": DeadInMinimum,
    "who begins again reads nothing": NeverFresh,
    "held are not released": NotReleased,
    "last piece is lost with its holder": LostAtTheEnd,
    "leases of the dead are not given back": KeepsLeases,
    "copy is applied twice": CopiesStay,
    "checkpoint forgets what is out": Forgetful,
    "age counts pushes": AgeInPushes,
    "push is overwritten": ForgetsToKeep,
    "what is not finite is applied": AppliesTheBroken,
    "versions have gaps": SkipsVersion,
    "repeated step is applied again": AppliedAgain,
    "parts are summed as they come": InOrderOfArrival,
    "nobody does what the dead left": NobodyGoesRound,
    "batch of the next update gets in": LookedAheadFirst,
    "late worker gets in": LateStepIn,
    "stale part is applied": StalePart,
    "update is incomplete": TooFewParts,
    "buffer outlives the pass": BufferBeyond,
    "fresh gradient is divided by zero": Undamped,
    "meeting is never answered": HearsTheDead,
}


def planted(bug: str) -> type[ServerCore]:
    part = PLANTED[bug]

    class Core(ServerCore):
        synchronous = part if issubclass(part, Synchronous) else Synchronous
        asynchronous = part if issubclass(part, Asynchronous) else Asynchronous

        def __init__(self, rule: Rule) -> None:
            super().__init__(rule)
            if issubclass(part, Desk):
                self.desk.__class__ = part
            self.graft()

        def graft(self) -> None:
            if issubclass(part, Pool):
                self.desk.pool.__class__ = part

        @classmethod
        def load(cls, rule: Rule, state: dict[str, Any]) -> ServerCore:
            core = super().load(rule, state)
            core.graft()
            return core

    return part if issubclass(part, ServerCore) else Core


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    core = planted(bug)
    for seed in range(SEEDS):
        try:
            World(Plan.draw(seed), core).run()
        except (AssertionError, ArithmeticError, LookupError) as found:
            print(f"seed {seed}: {str(found).splitlines()[0]}")
            return
    raise AssertionError(f"no run has shown that {bug}")
