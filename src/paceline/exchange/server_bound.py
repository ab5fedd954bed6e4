"""The asynchronous discipline: every push is an update, within a bound of staleness. Pure.

Stale synchronous parallel (Ho et al. 2013). A worker that computes has a *clock*, the number of its tick. After a push it may begin
the next tick ``c`` only if ``c - min(clock of the others that compute) <= staleness``; else it is held. Three choices:

* A worker that begins a tick reads the newest parameters, so it sees all updates there are. It has no reason to stay behind, and
  its clock becomes the highest of all who live; ticks that are left out hold no updates. A *joiner* enters in the same way: at
  the minimum, as the paper's tables would have it, it would hold everybody back for ticks that it never had.
* Who waits for a piece, for others, or is between passes does not compute, and holds nobody back. When it begins again it
  enters like a joiner.
* Whoever dies leaves the minimum at once.

So for all that compute ``max(clock of the live) - clock <= staleness``: it holds at entry, and a release keeps it. While one
worker is in a tick each other one makes at most ``staleness + 2`` updates: the one that it is about, and those of its ticks from there on.

With ``buffer=K`` (FedBuff, Nguyen et al. 2022) pushes are kept, and K of them make one update; fewer at the end of a pass.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.exchange.server_desk import Desk, Worker, is_empty, real
from paceline.exchange.server_pool import Pass
from paceline.exchange.server_protocol import Ask, Grant, Part, Step


class Asynchronous:
    """Leases whole global batches, and applies each push at once."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.buffer: list[Part] = []
        self.done: dict[str, tuple[int, bool]] = {}  # held in its step: tau, and whether it is kept

    # -- pieces
    def choose(self, worker: Worker, ask: Ask) -> Grant | None:
        """The lowest batch that has come back, or else the next one."""
        mine = self.desk.again(worker, ask)
        if mine is not None:
            return mine
        place = self._place(ask)
        if place is None:
            return None
        self._enter(worker)
        if not ask.ahead:
            self.desk.refresh(worker)
        return self.desk.lend(worker, place[0].start(place[1], 1), 0)

    def _place(self, ask: Ask) -> tuple[Pass, int] | None:
        for course in self.desk.pool.until(ask.loader, ask.epoch):
            back = [n for n, lost in course.returned.items() if lost or course.epoch == ask.epoch]
            if back:
                return course, min(back)
        course = self.desk.pool.course(ask.loader, ask.epoch)
        return None if course.exhausted else (course, course.opened)

    # -- pushes
    def step(self, worker: Worker, step: Step) -> None:
        """Apply or keep it; the answer follows when the worker may go on."""
        desk, covers = self.desk, real(step)
        self._enter(worker)
        if not all(desk.pool.holds(worker.name, piece) for piece in covers) or is_empty(worker, step):
            desk.drop(worker, step)
            worker.clock = desk.latest()
            desk.go(worker)
            return
        for piece in covers:
            desk.pool.deliver(piece)
        worker.step, worker.computing = step, False
        tau, kept = desk.version - worker.read, step.finite and desk.rule.buffer > 1
        self.done[worker.name] = tau, kept
        part = Part(worker.name, step.seq, desk.rule.damp(tau), step.weight, worker.read, covers)
        if not kept:
            desk.apply([part], () if step.finite else (worker.name,))
            return
        desk.keep(worker, step)
        self.buffer.append(part)
        if len(self.buffer) >= desk.rule.buffer:
            self.flush()

    def needs_another(self, worker: Worker, ask: Ask) -> bool:
        """Each batch is for itself."""
        return False

    def flush(self) -> bool:
        """Apply what is kept. The age of a push is what it is now."""
        parts, self.buffer = self.buffer, []
        if parts:
            desk = self.desk
            desk.apply([replace(part, scale=desk.rule.damp(desk.version - part.read)) for part in parts])
        return bool(parts)

    def left(self, worker: Worker) -> None:
        """It holds nobody back any more."""
        worker.computing = False
        self.done.pop(worker.name, None)

    # -- clocks
    def _enter(self, worker: Worker) -> None:
        if not worker.computing and worker.step is None:
            worker.clock, worker.computing = self.desk.latest(), True

    def advance(self) -> bool:
        """Finish a pass that only waits for what is kept; let go who may."""
        if self.buffer and (not self.desk.workers or any(self._only_kept(p) for p in self.desk.pool.passes.values())):
            return self.flush()
        held = [worker for worker in self.desk.live if worker.step is not None]
        for worker in sorted(held, key=lambda w: -w.clock):
            if self._may_begin(worker):
                self._release(worker)
                return True
        return False

    def _only_kept(self, course: Pass) -> bool:
        return not course.closed and bool(course.open) and course.delivered

    def _may_begin(self, worker: Worker) -> bool:
        others = [w.clock for w in self.desk.workers.values() if w.computing and w is not worker]
        return not others or worker.clock + 1 - min(others) <= self.desk.rule.staleness

    def _release(self, worker: Worker) -> None:
        worker.clock, worker.computing = max(worker.clock + 1, self.desk.latest()), True
        tau, kept = self.done.pop(worker.name)
        self.desk.go(worker, applied=not kept, tau=tau, kept=kept)
