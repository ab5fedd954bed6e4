"""The parameter server's core: events in, instructions out. Pure: no clock, no socket, no torch.

One of the servers is the *lead* and runs it; the others carry out the same list of instructions in the same order, so each
version is one consistent snapshot over all shards. The words are in ``server_protocol``, the leases in ``server_pool``, the two
disciplines in ``server_together`` (synchronous) and ``server_bound`` (asynchronous).

What is lent comes back: with a ``Leave``, a ``Skip``, or a ``Step`` that is dropped. A worker that asks at the end of a pass, and
holds nothing, is kept waiting until every batch is applied, so that none is lost with the last holder. Nobody waits for ever: when
all wait and nothing can be answered, who waits for a piece is told that there is none, and then who stands in a meeting
while others wait in their step is refused (PL402).
"""

from __future__ import annotations

from typing import Any, ClassVar

from paceline.exchange.server_bound import Asynchronous
from paceline.exchange.server_desk import Desk, Discipline, Worker, filler
from paceline.exchange.server_pool import Pool
from paceline.exchange.server_protocol import (
    Apply,
    Ask,
    Closed,
    Drop,
    Event,
    Go,
    Grant,
    Instruction,
    Join,
    Keep,
    Leave,
    Meet,
    Met,
    Opened,
    Over,
    Part,
    Piece,
    Refuse,
    Skip,
    Step,
)
from paceline.exchange.server_rule import Damp, Rule
from paceline.exchange.server_together import Synchronous

__all__ = [
    "Apply",
    "Ask",
    "Closed",
    "Damp",
    "Drop",
    "Event",
    "Go",
    "Grant",
    "Instruction",
    "Join",
    "Keep",
    "Leave",
    "Meet",
    "Met",
    "Opened",
    "Over",
    "Part",
    "Piece",
    "Refuse",
    "Rule",
    "ServerCore",
    "Skip",
    "Step",
]


class ServerCore:
    """Decides who computes what, when an update is made of it, and who may go on.

    >>> core = ServerCore(Rule(staleness=4))
    >>> core.handle(Join("worker-0"), now=0.0)
    [Go(worker='worker-0', seq=0, version=0, clock=0, applied=False, tau=0, kept=False)]
    >>> core.handle(Ask("worker-0", loader=0, epoch=0), now=0.0)
    [Grant(worker='worker-0', piece=Piece(loader=0, epoch=0, batch=0, part=0, parts=1))]
    """

    synchronous: ClassVar[type[Discipline]] = Synchronous
    asynchronous: ClassVar[type[Discipline]] = Asynchronous

    def __init__(self, rule: Rule) -> None:
        self.desk = Desk(rule)
        self.discipline = (self.synchronous if rule.synchronous else self.asynchronous)(self.desk)
        self._turns = 0

    @property
    def rule(self) -> Rule:
        """The discipline of the run."""
        return self.desk.rule

    @property
    def version(self) -> int:
        """Updates made."""
        return self.desk.version

    @property
    def histogram(self) -> dict[str, dict[int, int]]:
        """Worker -> age of its applied pushes, in updates, -> how many there were."""
        return self.desk.histogram

    @property
    def live(self) -> tuple[str, ...]:
        """Who takes part, in order of names."""
        return tuple(sorted(self.desk.workers))

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; what is to be done now, in this order. `now` in seconds of any clock that does not go back."""
        desk = self.desk
        desk.out, desk.now = [], now
        worker = desk.workers.get(event.worker)
        if isinstance(event, Join):
            self._join(event.worker)
        elif worker is not None:
            self._take(worker, event)
        self._settle()
        return desk.out

    def state(self) -> dict[str, Any]:
        """As JSON, between two updates: what is out, or delivered and not applied, counts as not done."""
        histogram = {w: {str(tau): n for tau, n in counts.items()} for w, counts in sorted(self.histogram.items())}
        return {"version": self.version, "passes": self.desk.pool.state(), "histogram": histogram}

    @classmethod
    def load(cls, rule: Rule, state: dict[str, Any]) -> ServerCore:
        """Go on from what :meth:`state` told. Nobody has joined yet; names may be used again."""
        core = cls(rule)
        core.desk.version = state["version"]
        core.desk.pool = Pool.load(state["passes"])
        core.desk.histogram = {w: {int(t): n for t, n in counts.items()} for w, counts in state["histogram"].items()}
        return core

    # -- events
    def _join(self, name: str) -> None:
        desk = self.desk
        if name not in desk.workers and name not in desk.gone:
            worker = desk.workers[name] = Worker(name, clock=desk.latest(), read=desk.version)
            desk.go(worker)

    def _take(self, worker: Worker, event: Event) -> None:
        match event:
            case Leave():
                self.discipline.left(worker)
                self.desk.remove(worker)
            case Ask():
                self._asked(worker, event)
            case Step():
                self._stepped(worker, event)
            case Over():
                self._over(worker, event)
            case Opened():
                pool = self.desk.pool
                pool.opened(pool.course(event.loader, event.epoch), event.batches)
            case Meet():
                self._met(worker, event)
            case Skip():
                for piece in event.pieces:
                    if self.desk.pool.holds(worker.name, piece):
                        self.desk.pool.take_back(worker.name, piece, lost=False)
                self._rest(worker)

    def _asked(self, worker: Worker, ask: Ask) -> None:
        if ask.loader not in worker.loaders:
            worker.loaders += (ask.loader,)
        worker.ask = ask
        self._queue(worker)
        if not self._answer(worker) and ask.ahead:
            self._none(worker, ask)
        if worker.ask is not None:
            self._rest(worker)

    def _stepped(self, worker: Worker, step: Step) -> None:
        if step.seq > worker.seq + 1:
            text = f"{worker.name} has pushed step {step.seq} after step {worker.seq}"
            self._refuse(worker, "PL401", text)
        elif step.seq == worker.seq + 1:
            worker.seq, worker.aside = step.seq, ()
            self.discipline.step(worker, step)
            worker.filled = False
        elif step.seq == worker.seq and worker.step is None and worker.answer is not None:
            self.desk.out.append(worker.answer)

    def _over(self, worker: Worker, over: Over) -> None:
        course = self.desk.pool.course(over.loader, over.epoch)
        if course.total is not None and course.total != over.batches:
            text = f"{worker.name} finds {over.batches} batches, {course.said or 'an earlier run'} {course.total}"
            self._refuse(worker, "PL306", f"pass {over.epoch} over loader {over.loader}: {text}")
        elif course.total is None and course.trained_from(over.batches):
            text = f"{worker.name} finds {over.batches} batches, and later ones are trained already"
            self._refuse(worker, "PL306", f"pass {over.epoch} over loader {over.loader}: {text}")
        elif course.total is None:
            self.desk.pool.end(course, over.batches, worker.name)
            self.desk.close()

    def _met(self, worker: Worker, meet: Meet) -> None:
        other = next((w for w in self.desk.live if w is not worker and w.meet is not None), None)
        there = other.meet.tag if other is not None and other.meet is not None else None
        if other is not None and there != meet.tag:
            self._refuse(worker, "PL402", f"{worker.name} is at {meet.tag!r}, {other.name} at {there!r}")
            return
        worker.meet, worker.computing = meet, False

    def _refuse(self, worker: Worker, code: str, message: str) -> None:
        self.discipline.left(worker)
        self.desk.refuse(worker, code, message)

    def _queue(self, worker: Worker) -> None:
        self._turns += 1
        worker.turn = self._turns

    def _rest(self, worker: Worker) -> None:
        """It holds nothing, and holds nobody back."""
        if not self.desk.holding(worker):
            worker.computing = False

    # -- what follows
    def _settle(self) -> None:
        while self._answers() or self.discipline.advance() or self._meeting() or self._unstick():
            pass

    def _answers(self) -> bool:
        asking = sorted((w for w in self.desk.live if w.ask is not None), key=lambda w: w.turn)
        return any(self._answer(worker) for worker in asking)

    def _answer(self, worker: Worker) -> bool:
        """Whether its Ask could be answered."""
        ask = worker.ask
        assert ask is not None
        grant = self.discipline.choose(worker, ask)
        if grant is None and self._is_over(worker, ask):
            grant = Grant(worker.name, None)
        if grant is not None and grant.piece is None:
            self._none(worker, ask)
        elif grant is not None:
            worker.ask = None
            self.desk.out.append(grant)
        return worker.ask is None

    def _is_over(self, worker: Worker, ask: Ask) -> bool:
        """Nothing can come any more: the pass is closed; or it waits for this worker, and others that wait or are past it."""
        course = self.desk.pool.course(ask.loader, ask.epoch)
        begun = any(p.loader == ask.loader for p in self.desk.begun(worker))
        others = [self.desk.workers[name] for name in self.desk.pool.out(course)]
        stands = all(w.waiting or w.past.get(ask.loader, -1) >= ask.epoch for w in others)
        return course.closed or (begun and course.exhausted and stands)

    def _none(self, worker: Worker, ask: Ask) -> None:
        worker.ask = None
        self._rest(worker)
        if not ask.ahead:
            worker.past[ask.loader] = max(ask.epoch, worker.past.get(ask.loader, -1))
            self.desk.refresh(worker)
        self.desk.out.append(Grant(worker.name, None))

    def _meeting(self) -> bool:
        live = self.desk.live
        if not live or any(w.meet is None for w in live):
            return False
        if self.discipline.flush():
            return True
        notes = tuple((w.name, w.meet.note) for w in live if w.meet is not None)
        for worker in live:
            meet, worker.meet = worker.meet, None
            assert meet is not None
            self.desk.refresh(worker)
            self.desk.out.append(Met(worker.name, meet.tag, notes))
        return True

    def _unstick(self) -> bool:
        """All wait, and nothing can be answered: see the head of the file."""
        live = self.desk.live
        if not live or not all(w.waiting for w in live):
            return False
        for worker in live:
            if worker.ask is not None:
                self._give_up(worker, worker.ask)
                return True
        inside = next((w for w in live if w.step is not None), None)
        for worker in live:
            if inside is not None and worker.meet is not None:
                text = f"{worker.name} is at {worker.meet.tag!r}, {inside.name} waits for it in opt.step()"
                self._refuse(worker, "PL402", text)
                return True
        return self._refuse_steps(live)

    def _give_up(self, worker: Worker, ask: Ask) -> None:
        exhausted = self.desk.pool.course(ask.loader, ask.epoch).exhausted
        if exhausted and not self.discipline.needs_another(worker, ask):
            self._none(worker, ask)
        else:
            worker.ask = None
            self.desk.out.append(filler(worker, ask))

    def _refuse_steps(self, live: list[Worker]) -> bool:
        for worker in live:
            self._refuse(worker, "PL402", f"{worker.name} waits in opt.step() for rows that nobody asks for")
        return bool(live)
