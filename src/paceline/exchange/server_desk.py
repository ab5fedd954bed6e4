"""What both disciplines of the parameter server share: who is there, what was promised to whom, what is said to whom. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from paceline.exchange.server_pool import Batch, Pool
from paceline.exchange.server_protocol import (
    Apply,
    Ask,
    Closed,
    Drop,
    Go,
    Grant,
    Instruction,
    Keep,
    Meet,
    Part,
    Piece,
    Refuse,
    Step,
)
from paceline.exchange.server_rule import Rule


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that lives.

    Attributes:
        clock: See ``server_bound``.
        computing: It begins a step, or is in one, and so holds back who is too far ahead.
        read: Version of its parameters.
        seq: Its last step; `answer` is what was said to it.
        ask, step, meet: What it waits for an answer to.
        turn: Order in which those who wait have asked.
        filled: It was given fillers since its last step.
        loaders: Loaders that it has asked for.
        redo: Version of the open update for which it goes round once more.
        vain: Steps without rows that it has taken one after the other.
        past: Loader -> pass that it has come to the end of.
        aside: What it had looked ahead when its step was not applied, see ``server_protocol``.
    """

    name: str
    clock: int
    read: int
    seq: int = 0
    computing: bool = False
    answer: Go | None = None
    ask: Ask | None = None
    step: Step | None = None
    meet: Meet | None = None
    turn: int = 0
    filled: bool = False
    loaders: tuple[int, ...] = ()
    redo: int = -1
    vain: int = 0
    past: dict[int, int] = field(default_factory=dict)
    aside: tuple[Piece, ...] = ()

    @property
    def waiting(self) -> bool:
        """Nothing comes from it before something is said to it."""
        return self.ask is not None or self.step is not None or self.meet is not None


class Desk:
    """State of the core, and the words in which it answers. Instructions are collected in `out`, in order."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.version = 0
        self.workers: dict[str, Worker] = {}
        self.gone: set[str] = set()
        self.pool = Pool()
        self.histogram: dict[str, dict[int, int]] = {}
        self.out: list[Instruction] = []
        self.now = 0.0

    # -- who is there
    @property
    def live(self) -> list[Worker]:
        """In order of their names."""
        return [worker for _, worker in sorted(self.workers.items())]

    def holding(self, worker: Worker) -> list[Piece]:
        """Pieces that are out with it."""
        return self.pool.held.get(worker.name, [])

    def begun(self, worker: Worker) -> list[Piece]:
        """Pieces that it has computed on, or will before its next step."""
        return [piece for piece in self.holding(worker) if piece not in worker.aside]

    def latest(self) -> int:
        """The highest clock of all who live."""
        return max((w.clock for w in self.workers.values()), default=0)

    def remove(self, worker: Worker) -> None:
        """It has left; its pieces are back."""
        del self.workers[worker.name]
        self.gone.add(worker.name)
        self.pool.leave(worker.name)

    def refuse(self, worker: Worker, code: str, message: str) -> None:
        """End a worker with an error."""
        self.out.append(Refuse(worker.name, code, message))
        self.remove(worker)

    # -- answers
    def go(self, worker: Worker, *, applied: bool = False, tau: int = 0, kept: bool = False) -> None:
        """Answer its step, with parameters of the newest version."""
        worker.step, worker.read = None, self.version
        worker.aside = () if applied or kept else tuple(sorted(self.holding(worker)))
        clock = self.version if self.rule.synchronous else worker.clock
        worker.answer = Go(worker.name, worker.seq, self.version, clock, applied, tau, kept)
        self.out.append(worker.answer)

    def refresh(self, worker: Worker) -> None:
        """Give it the newest parameters, if it can take them now and has older ones."""
        if worker.read != self.version and worker.step is None and not self.holding(worker):
            worker.read = self.version
            clock = self.version if self.rule.synchronous else worker.clock
            self.out.append(Go(worker.name, worker.seq, self.version, clock, False, 0))

    def lend(self, worker: Worker, batch: Batch, part: int) -> Grant:
        """Give it a piece."""
        return Grant(worker.name, self.pool.lend(worker.name, batch, part, self.now))

    def again(self, worker: Worker, ask: Ask, wanted: Callable[[Piece], bool] = lambda piece: True) -> Grant | None:
        """One of the pieces that it has put aside, if it asks for them now."""
        aside = [p for p in worker.aside if p.loader == ask.loader and self.pool.holds(worker.name, p) and wanted(p)]
        if ask.ahead or not aside:
            return None
        worker.aside = tuple(p for p in worker.aside if p != aside[0])
        return Grant(worker.name, aside[0])

    def drop(self, worker: Worker, step: Step) -> None:
        """Do without a push; pieces that it covers come back."""
        self.out.append(Drop(worker.name, step.seq))
        for piece in step.covers:
            if self.pool.holds(worker.name, piece):
                self.pool.take_back(worker.name, piece, lost=True)

    def keep(self, worker: Worker, step: Step) -> None:
        """Have a push copied aside."""
        self.out.append(Keep(worker.name, step.seq))

    def apply(self, parts: Iterable[Part], blame: tuple[str, ...] = ()) -> None:
        """One update."""
        parts = tuple(parts)
        for part in parts:
            counts = self.histogram.setdefault(part.worker, {})
            tau = self.version - part.read
            counts[tau] = counts.get(tau, 0) + 1
        self.version += 1
        self.out.append(Apply(self.version, parts, bool(blame), blame))
        self.pool.applied([piece for part in parts for piece in part.covers])
        self.close()

    def close(self) -> None:
        """Tell of passes that are finished."""
        self.out += [Closed(p.loader, p.epoch, p.total or 0) for p in self.pool.closing()]


class Discipline(Protocol):
    """What makes the difference between servers."""

    def __init__(self, desk: Desk) -> None: ...

    def choose(self, worker: Worker, ask: Ask) -> Grant | None:
        """The piece for an Ask. None: there is none for it now."""

    def step(self, worker: Worker, step: Step) -> None:
        """A new push has come."""

    def left(self, worker: Worker) -> None:
        """A worker is about to be removed."""

    def advance(self) -> bool:
        """Do what has become possible, one thing. False: there is nothing."""

    def needs_another(self, worker: Worker, ask: Ask) -> bool:
        """Whether a worker for which nothing is left of this loader is needed for another."""

    def flush(self) -> bool:
        """Apply what is kept for later. False: there is nothing."""


def is_empty(worker: Worker, step: Step) -> bool:
    """Whether a step is of fillers only, which its worker may name or not."""
    return not real(step) and (bool(step.covers) or worker.filled)


def real(step: Step) -> tuple[Piece, ...]:
    """The pieces of a step without fillers, in order."""
    return tuple(sorted(piece for piece in step.covers if piece.parts))


def filler(worker: Worker, ask: Ask) -> Grant:
    """Something to compute that counts nothing."""
    worker.filled = True
    return Grant(worker.name, Piece(ask.loader, ask.epoch, 0, 0, 0))
