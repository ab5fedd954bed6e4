"""The synchronous discipline: one update of all parts of a global batch, whoever delivers them. Pure.

A batch is cut into as many parts as there are workers when it is opened, less ``backup``. Each worker gets one part of it. The *open
update* needs all parts of every batch of which some part is delivered (a script may accumulate, or take several loaders); when
they are there it is applied, parts in the order of (loader, epoch, batch, part) whatever order they came in, and all go on.

* A part that comes back, because its holder died or left its loop, goes to one who asks and has none of this batch, or else to one
  who waits in its step: the push of that worker is kept aside, and it is told to *go round once more*. Where nothing is
  left for it by then, or its script asks for more, it gets fillers. So the update is of the batches that one process would take.
* A worker for which a batch has no part (it joined late, or is a backup worker) waits until the update is over, or until parts of
  the open update come back.
* ``backup``: a worker for which no part is left gets a *copy* of one that is not delivered yet (speculative execution). The first
  delivery counts. Chen et al. 2016 (1604.00981) drop the slowest gradients instead, and with them always the same workers' rows; here
  each row is in exactly one update.
* An update without rows (no loader is adopted, or a second optimizer steps after the first) is of all who took part in the one before,
  or never ask. Who comes late waits for the next batch. When a worker dies between two optimizers, the second update is of those who are left.
* A gradient that is not finite: the whole update is left out, and counts.
"""

from __future__ import annotations

from paceline.exchange.server_desk import Desk, Worker, filler, is_empty, real
from paceline.exchange.server_pool import Batch, Pass
from paceline.exchange.server_protocol import Ask, Grant, Part, Piece, Step

VAIN = 8  # rounds without a piece, after which a worker is not sent round for it any more: its script does not ask


class Synchronous:
    """Cuts global batches into parts, and applies them when all are there."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.parts: list[Part] = []  # of the open update
        self.blame: list[str] = []
        self.crew: set[str] = set()  # who took part in the last update
        self.early: set[str] = set()  # who has stepped a further optimizer before the update with rows was made
        self.rowless = 0  # updates without rows since the last one with rows
        self.further = 0  # how many of them there were the time before: the script steps further optimizers

    # -- pieces
    def choose(self, worker: Worker, ask: Ask) -> Grant | None:
        """Its part of the first batch of which it has none, never a second one of the same; or what it goes round for."""
        grant = self._redone(worker, ask) if worker.redo == self.desk.version else self._next(worker, ask)
        if grant is None and not ask.ahead and self._must_step(worker, ask):
            return filler(worker, ask)
        return grant

    def _must_step(self, worker: Worker, ask: Ask) -> bool:
        """It has computed on pieces that others wait for, and its script needs more before it steps."""
        begun = self.desk.begun(worker)
        return any(self._is_needed(piece) for piece in begun) or bool(begun and not self._is_exhausted(ask))

    def _redone(self, worker: Worker, ask: Ask) -> Grant | None:
        if ask.ahead:
            return None
        mine = self.desk.again(worker, ask, self._is_needed)
        if mine is not None:
            return mine
        for course in self.desk.pool.until(ask.loader, ask.epoch):
            for number in sorted(course.open):
                batch = course.open[number]
                if batch.covered and batch.free():
                    return self._lend(worker, batch, batch.free()[0], ask)
        return Grant(worker.name, None) if self._is_needed_later(ask) else filler(worker, ask)

    def _is_needed_later(self, ask: Ask) -> bool:
        later = (b for b in self.desk.pool.open_batches() if b.loader == ask.loader and b.epoch > ask.epoch)
        return self._is_exhausted(ask) and any(batch.covered and batch.free() for batch in later)

    def _is_exhausted(self, ask: Ask) -> bool:
        return self.desk.pool.course(ask.loader, ask.epoch).exhausted

    def _is_needed(self, piece: Piece) -> bool:
        batch = self.desk.pool.find(piece)
        return batch is not None and batch.covered

    def _next(self, worker: Worker, ask: Ask) -> Grant | None:
        """A *late* worker has no part of a batch that others have begun: for it there is only the open update."""
        if self.rowless < self.further:
            return None
        late = False
        copies: list[tuple[int, float, Batch, int]] = []
        for course, number in self.desk.pool.pending(ask.loader, ask.epoch):
            batch = course.open.get(number)
            if batch is None:
                if not late and (course.returned[number] or course.epoch == ask.epoch):
                    return self._open(worker, course, number, ask)
            elif not self._has_part(worker, batch):
                if batch.free() and self._may_take(batch, ask, late):
                    return self._lend(worker, batch, self._usual(worker, batch), ask)
                if not late or batch.covered:
                    copies += [(len(h), min(h.values()), batch, i) for i, h in self._out(batch)]
                late = True
            elif not late or batch.covered:
                mine = self.desk.again(worker, ask, batch.has)
                if mine is not None:
                    return mine
        if late:
            return self._copy(worker, copies, ask)
        course = self.desk.pool.course(ask.loader, ask.epoch)
        if course.exhausted:
            return None
        if self.desk.pool.is_behind(course):
            return Grant(worker.name, None)
        return self._open(worker, course, course.opened, ask)

    def _usual(self, worker: Worker, batch: Batch) -> int:
        """The free part with the number that it has of other batches: so sums over accumulated batches repeat as well."""
        others = [p.part for p in (*self._given(worker), *self.desk.holding(worker))]
        return next((part for part in reversed(others) if part in batch.free()), batch.free()[0])

    def _may_take(self, batch: Batch, ask: Ask, late: bool) -> bool:
        return batch.covered or (not late and (batch.lost or batch.epoch == ask.epoch))

    def _out(self, batch: Batch) -> list[tuple[int, dict[str, float]]]:
        return [(i, batch.holders[i]) for i in batch.missing() if batch.holders[i]]

    def _copy(self, worker: Worker, copies: list[tuple[int, float, Batch, int]], ask: Ask) -> Grant | None:
        """Of what is out with the fewest, the part that is out longest."""
        if not copies or not self.desk.rule.backup:
            return None
        _, _, batch, part = min(copies, key=lambda c: (c[0], c[1], c[2].piece(c[3])))
        return self._lend(worker, batch, part, ask)

    def _has_part(self, worker: Worker, batch: Batch) -> bool:
        return any(batch.has(piece) for piece in (*self._given(worker), *self.desk.holding(worker)))

    def _open(self, worker: Worker, course: Pass, number: int, ask: Ask) -> Grant:
        parts = max(1, len(self.desk.workers) - self.desk.rule.backup)
        batch = course.start(number, parts)
        return self._lend(worker, batch, self._usual(worker, batch), ask)

    def _lend(self, worker: Worker, batch: Batch, part: int, ask: Ask) -> Grant:
        if not ask.ahead:
            self.desk.refresh(worker)
        return self.desk.lend(worker, batch, part)

    # -- pushes
    def step(self, worker: Worker, step: Step) -> None:
        """Take it into the open update; the answer follows when that is over, or something came back."""
        desk, covers = self.desk, real(step)
        worker.redo = -1
        worker.vain = 0 if covers else worker.vain + 1
        held = all(desk.pool.holds(worker.name, piece) for piece in covers)
        early = not covers and not is_empty(worker, step) and (self._has_stepped(worker) or self._has_rows())
        counts = bool(covers) or not (early or is_empty(worker, step))
        if worker.read == desk.version and held and counts:
            self._take(worker, step, covers)
            return
        desk.drop(worker, step)
        if early:
            self.early.add(worker.name)
        if worker.read == desk.version and (early or self._has_share(worker, covers)):
            worker.step = step
        else:
            desk.go(worker)

    def _has_share(self, worker: Worker, covers: tuple[Piece, ...]) -> bool:
        """Whether for what it has pushed, and is dropped, there is something else in the open update."""
        batches = [self.desk.pool.find(piece) for piece in covers]
        copied = any(batch is not None and batch.covered for batch in batches)
        return copied or self._has_stepped(worker) or self._without_rows()

    def _take(self, worker: Worker, step: Step, covers: tuple[Piece, ...]) -> None:
        for piece in covers:
            self.desk.pool.deliver(piece)
        self.parts.append(Part(worker.name, step.seq, 1.0, step.weight, worker.read, covers))
        if not step.finite:
            self.blame.append(worker.name)
        worker.step = step

    def needs_another(self, worker: Worker, ask: Ask) -> bool:
        """The open update needs a part of another loader's batch; a script asks its loaders in turn."""
        other = (b for b in self.desk.pool.open_batches() if b.loader != ask.loader and b.epoch <= ask.epoch)
        return worker.vain < VAIN and any(batch.covered and batch.free() for batch in other)

    def _has_stepped(self, worker: Worker) -> bool:
        return any(part.worker == worker.name for part in self.parts)

    def _has_rows(self) -> bool:
        return any(part.covers for part in self.parts)

    def _without_rows(self) -> bool:
        return any(not part.covers for part in self.parts)

    def flush(self) -> bool:
        """Nothing is kept beyond an update."""
        return False

    def left(self, worker: Worker) -> None:
        """What it has delivered stays."""
        self._keep(worker)

    def _keep(self, worker: Worker) -> None:
        if worker.step and any((p.worker, p.seq) == (worker.name, worker.step.seq) for p in self.parts):
            self.desk.keep(worker, worker.step)

    # -- updates
    def advance(self) -> bool:
        """Close the update if it is complete; else have somebody go round for what nobody else will do."""
        if self._complete():
            self._close()
            return True
        return any(self._wake(batch) for batch in self.desk.pool.open_batches() if batch.covered) or self._next_rows()

    def _next_rows(self) -> bool:
        """All ask for rows: no further optimizer is stepped now, though one was before."""
        expected, live = self.rowless < self.further, self.desk.live
        if expected and all(w.waiting for w in live) and any(w.ask for w in live):
            self.further = 0
            return True
        return False

    def _complete(self) -> bool:
        crew = [w for w in self.desk.live if w.name in self.crew or not w.loaders]
        waits = self._without_rows() and not all(w.step for w in crew)
        covered = (batch for batch in self.desk.pool.open_batches() if batch.covered)
        return bool(self.parts) and not waits and all(batch.complete for batch in covered)

    def _close(self) -> None:
        parts, blame = sorted(self.parts, key=lambda p: (p.covers, p.worker, p.seq)), tuple(sorted(set(self.blame)))
        self.further, self.rowless = (self.rowless, 0) if parts[-1].covers else (self.further, self.rowless + 1)
        self.parts, self.blame = [], []
        self.desk.apply(parts, blame)
        self.crew, self.early = {part.worker for part in parts} - self.early, set()
        for worker in self.desk.live:
            if worker.step is not None:
                self.desk.go(worker, applied=worker.name in self.crew)

    def _wake(self, batch: Batch) -> bool:
        """Whether somebody was told to go round for a part of this batch."""
        asleep = [w for w in self.desk.live if w.step is not None and batch.loader in w.loaders and w.vain < VAIN]
        for _, holders in self._out(batch):
            if all(any(w.name == name for w in asleep) for name in holders):
                self._go_round(next(w for w in asleep if w.name in holders))
                return True
        takers = [w for w in self.desk.live if not w.waiting and (self._is_redoing(w) or not self._has_part(w, batch))]
        if len(batch.free()) <= len(takers) or not asleep:
            return False
        self._go_round(min(asleep, key=lambda w: (len(self._given(w)), w.name)))
        return True

    def _is_redoing(self, worker: Worker) -> bool:
        return worker.redo == self.desk.version

    def _given(self, worker: Worker) -> list[Piece]:
        return [p for part in self.parts if part.worker == worker.name for p in part.covers]

    def _go_round(self, worker: Worker) -> None:
        self._keep(worker)
        self.early.discard(worker.name)
        worker.redo = self.desk.version
        self.desk.go(worker)
