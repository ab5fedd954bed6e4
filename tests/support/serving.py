"""Training with servers in one thread on virtual time: the core, and workers whose loops, speeds, deaths and mistakes a plan names.

``World(Plan.draw(seed)).run()`` drives a whole run to its end and raises :class:`Violation` where a rule is broken:

* every part of every batch of a closed pass is in one update, and never in two; versions have no gaps;
* synchronous: an update is of the very batches that one process would take, its parts in their order, each whole;
* what is applied was pushed, was not dropped, is still in memory, and was computed with the parameters that the core believes;
* bounded staleness: while a worker is in a tick, each other one makes at most ``staleness + 2`` updates; read-my-writes;
* nobody waits for ever, and nobody is refused.

Workers speak as ``exchange/server_protocol.py`` says. Each has its own line to the server, in order both ways; lines overtake each other.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from paceline.exchange.server import (
    Apply,
    Ask,
    Closed,
    Damp,
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
    Over,
    Part,
    Piece,
    Refuse,
    Rule,
    ServerCore,
    Skip,
    Step,
)

STEPS = 4
DAMPS = ("constant", "inverse", "polynomial", "hinge")
Script = Generator[float | None, Instruction, None]


class Violation(AssertionError):
    """A rule is broken."""


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        lengths: Global batches of each loader; a script with several takes one of each in a step. None: a script that steps
            ``STEPS`` times in a pass, without a loader.
        accumulate: Batches of a step.
        optimizers: Steps after them; only the first covers the batches.
        ahead: Batches that loaders look ahead.
        left: What a script does with batches that do not make a step at the end of a pass: ``step``, and goes round again if that is
            not applied; step ``last`` of all, and goes on; ``carry`` them on; or ``break`` out before.
        meets: All meet after each pass.
        speeds: Seconds for the rows of a whole batch, of each worker.
        fixed: Seconds that each piece takes besides.
        kills, joins: Times. A restart kills the server and all workers.
        behind: Who joins begins with the first pass, not where the others are, in runs without meetings.
        named: Steps name the fillers that they are of.
    """

    seed: int = 0
    rule: Rule = field(default_factory=Rule)
    lengths: tuple[int, ...] = (5,)
    epochs: int = 2
    accumulate: int = 1
    ahead: int = 0
    left: str = "step"
    meets: bool = True
    speeds: tuple[float, ...] = (1.0, 1.0)
    fixed: float = 0.1
    latency: float = 0.05
    jitter: float = 0.5
    kills: tuple[float, ...] = ()
    joins: tuple[float, ...] = ()
    restarts: tuple[float, ...] = ()
    repeats: float = 0.0
    broken: float = 0.0
    behind: bool = False
    named: bool = True
    optimizers: int = 1

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan with a bit of everything."""
        rng = random.Random(seed)
        length, loaders = rng.randint(0, 9), rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 0))
        staleness = rng.choice((0, 0, 0, 1, 2, 4, math.inf))
        rule = Rule(
            staleness,
            backup=rng.choice((0, 0, 1, 2)) if staleness == 0 else 0,
            buffer=rng.choice((1, 1, 2, 3)) if staleness else 1,
            damp=Damp(rng.choice(DAMPS)) if staleness else Damp(),
        )
        speeds = tuple(rng.choice((0.3, 1, 1, 1, 4, 10)) for _ in range(rng.randint(1, 5)))
        horizon = rng.choice((3.0, 10.0, 40.0))
        rough = rng.random() < 0.7
        comes = rough and (loaders or staleness)  # without a loader nobody could join in the middle of a pass
        return cls(
            seed,
            rule,
            (length,) * loaders,
            rng.randint(1, 3),
            rng.choice((1, 1, 2, 3)),
            rng.choice((0, 1, 2)),
            rng.choice(("step", "step", "step", "last", "carry", "break")),
            rng.random() < 0.6,
            speeds,
            rng.choice((0.0, 0.1)),
            rng.choice((0.0, 0.05, 0.5)),
            rng.choice((0.0, 0.5, 3.0)),
            tuple(rng.uniform(0, horizon) for _ in range(rng.randint(0, 4))) if rough else (),
            tuple(rng.uniform(0, horizon) for _ in range(rng.randint(0, 3))) if comes else (),
            (rng.uniform(0, horizon),) if comes and rng.random() < 0.2 else (),
            rng.choice((0.0, 0.2)),
            rng.choice((0.0, 0.0, 0.1)),
            rng.random() < 0.3,
            rng.random() < 0.5,
            2 if not rule.backup and rng.random() < 0.15 else 1,
        )


class Sim:
    """A worker's process: its loop, its adopted loaders, and its line to the server."""

    def __init__(self, world: World, name: str, speed: float) -> None:
        self.world, self.name, self.speed = world, name, speed
        self.epoch = 0
        self.rng = random.Random(f"{world.plan.seed} {name}")
        self.alive, self.finished = True, False
        self.inbox: list[Instruction] = []
        self.busy = self.asleep = False
        self.sent = self.heard = 0.0
        self.params = -1
        self.seq = 0
        self.queues: dict[int, list[Piece]] = {}
        self.covers: list[Piece] = []
        self.used: set[int] = set()
        self.again = False
        self.micro = 0
        self.script = self._script()

    # -- what the user has written
    def _script(self) -> Script:
        plan = self.world.plan
        self.send(Join(self.name))
        yield from self._hear(Go)
        for epoch in range(self.epoch, plan.epochs):
            self.epoch = epoch
            yield from self._pass() if plan.lengths else self._steps()
            if plan.meets:
                self.send(Meet(self.name, f"pass {self.epoch}", str(self.params)))
                yield from self._hear(Met)
        self.send(Leave(self.name))

    def _pass(self) -> Script:
        plan, rounds = self.world.plan, 0
        self.micro = len(self.covers) // len(plan.lengths)
        while True:
            pieces: list[Piece] = []
            for loader in range(len(plan.lengths)):
                piece = yield from self._next(loader)
                if piece is None:
                    break
                pieces.append(piece)
            if len(pieces) < len(plan.lengths):
                self._give_back(pieces)
                break
            yield from self._compute(pieces)
            rounds += 1
            if self.micro % plan.accumulate == 0:
                yield from self._step()
                if plan.left == "break" and rounds >= 3 * plan.accumulate and not self.again:
                    self._give_back([])
                    break
        if plan.left in ("step", "last") and self.covers:
            yield from self._step()
            while self.again and plan.left == "step":
                seq = self.seq
                yield from self._pass()
                self.again &= self.seq > seq

    def _steps(self) -> Script:
        for _ in range(STEPS):
            yield self.speed
            self.used.add(self.params)
            yield from self._step()

    def _compute(self, pieces: list[Piece]) -> Script:
        for piece in pieces:
            share = 1 / piece.parts if piece.parts else 1
            yield self.speed * share * (1 + self.rng.random() * self.world.plan.jitter) + self.world.plan.fixed
            self.covers.append(piece)
        if any(piece.parts for piece in pieces):
            self.used.add(self.params)
        self.micro += 1

    # -- the adopted optimizer
    def _step(self) -> Script:
        yield from self._push()
        again = self.again
        for _ in range(1, self.world.plan.optimizers):
            self.used = {self.params}
            yield from self._push()
        self.again |= again

    def _push(self) -> Script:
        self.seq += 1
        event = Step(self.name, self.seq, 1.0, self._said(), self.rng.random() >= self.world.plan.broken)
        self.world.pushed(self, event, self.used)
        self.covers, self.used = [], set()
        self.send(event)
        if self.rng.random() < self.world.plan.repeats:
            self.send(event)
        go = yield from self._hear(Go)
        while go.seq != self.seq:
            go = yield from self._hear(Go)
        self.again = not (go.applied or go.kept)

    def _said(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.covers if piece.parts or self.world.plan.named)

    # -- the adopted loader
    def _next(self, loader: int) -> Generator[float | None, Instruction, Piece | None]:
        queue = self.queues.setdefault(loader, [])
        piece = queue.pop(0) if queue and not self.again else (yield from self._ask(loader, False))
        if piece in queue:
            queue.remove(piece)
        while piece and not self.again and len(queue) < self.world.plan.ahead:
            further = yield from self._ask(loader, True)
            if further is None:
                break
            queue.append(further)
        return piece

    def _ask(self, loader: int, ahead: bool) -> Generator[float | None, Instruction, Piece | None]:
        while True:
            self.send(Ask(self.name, loader, self.epoch, ahead))
            piece = (yield from self._hear(Grant)).piece
            length = self.world.plan.lengths[loader]
            if piece is None or not piece.parts or piece.batch < length:
                return piece
            self.send(Over(self.name, loader, piece.epoch, length))

    def _give_back(self, pieces: list[Piece]) -> None:
        pieces = pieces + [piece for queue in self.queues.values() for piece in queue]
        self.queues.clear()
        if pieces:
            self.send(Skip(self.name, tuple(pieces)))

    # -- the line
    def send(self, event: Event) -> None:
        self.sent = max(self.sent, self.world.t) + self.rng.random() * self.world.plan.latency
        self.world.at(self.sent, lambda core=self.world.core: self.world.serve(event, self, core))

    def _hear(self, kind: type[Any]) -> Generator[float | None, Instruction, Any]:
        while True:
            message = yield None
            if isinstance(message, Go):
                self.params = message.version
            if isinstance(message, kind):
                return message

    def told(self, message: Instruction) -> None:
        if self.alive and not self.finished:
            self.inbox.append(message)
            self.proceed()

    def proceed(self) -> None:
        """Run the script up to where it waits."""
        while self.alive and not self.finished and not self.busy and (self.inbox or not self.asleep):
            try:
                wanted = self.script.send(self.inbox.pop(0)) if self.asleep else next(self.script)
            except StopIteration:
                self.finished = True
                return
            self.asleep = wanted is None
            if wanted is not None:
                self.busy = True
                self.world.at(self.world.t + wanted, self.awake)

    def awake(self) -> None:
        self.busy = False
        self.proceed()


class World:
    """The server, its workers, and what is checked."""

    def __init__(self, plan: Plan, core: type[ServerCore] = ServerCore) -> None:
        self.plan, self.kind = plan, core
        self.core = core(plan.rule)
        self.rng = random.Random(plan.seed)
        self.t = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.sims: dict[str, Sim] = {}
        self.version = 0
        self.pushes: dict[tuple[str, int], tuple[Step, set[int]]] = {}
        self.slot: dict[str, int] = {}
        self.kept: set[tuple[str, int]] = set()
        self.dropped: set[tuple[str, int]] = set()
        self.applied: Counter[Piece] = Counter()
        self.updates: list[tuple[Part, ...]] = []
        self.progress: list[tuple[float, int]] = []  # when each was made
        self.closed: dict[tuple[int, int], int] = {}
        self.accepted: list[str] = []  # who has pushed, in the order in which the core took it
        self.read_at: dict[str, int] = {}
        self.has: dict[str, int] = {}  # version of the parameters of each
        self.exempt: set[str] = set()
        self.asked = 0  # the last pass that somebody is in
        self.between = False
        self.at_door: list[tuple[Event, Sim]] = []
        self.ages: dict[str, Counter[int]] = {}
        self.trace: list[str] = []

    # -- time
    def at(self, when: float, do: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.queue, (when, self.count, do))

    def run(self) -> World:
        """The run to its end."""
        for speed in self.plan.speeds:
            self.start(speed)
        for when in self.plan.kills:
            self.at(when, self.kill)
        for when in self.plan.joins:
            self.at(when, lambda: self.start(self.rng.choice(self.plan.speeds)))
        for when in self.plan.restarts:
            self.at(when, self.restart)
        while self.queue:
            self.t, _, do = heapq.heappop(self.queue)
            do()
            if self.count > 20_000:
                raise Violation("the run does not end: " + " | ".join(self.trace[-30:]))
        self.finish()
        return self

    def start(self, speed: float, again: bool = False) -> None:
        name = f"worker-{len(self.sims)}"
        goes = any(sim.alive and not sim.finished for sim in self.sims.values())
        if not again and not goes and any(sim.finished for sim in self.sims.values()):
            return  # the run has ended
        sim = self.sims[name] = Sim(self, name, speed)
        self.at(self.t, sim.proceed)

    def unfinished(self) -> int:
        """The first pass that is not closed."""
        return next((e for e in range(self.plan.epochs) if (0, e) not in self.closed), self.plan.epochs)

    def kill(self) -> None:
        living = [sim for sim in self.sims.values() if sim.alive and not sim.finished]
        if living:
            sim = self.rng.choice(living)
            sim.alive = False
            sim.send(Leave(sim.name))  # behind what it has sent
            if len(living) == 1:
                self.start(sim.speed)

    def restart(self) -> None:
        living = [sim for sim in self.sims.values() if sim.alive and not sim.finished]
        for sim in living:
            sim.alive = False
        self.asked, self.between = self.unfinished(), False
        self.at_door.clear()
        self.core = self.kind.load(self.plan.rule, json.loads(json.dumps(self.core.state())))
        for sim in living:
            self.start(sim.speed, again=True)

    def serve(self, event: Event, sim: Sim, core: ServerCore) -> None:
        """The core takes an event; everybody carries out what it says."""
        if core is not self.core:
            return  # the connection was to a server that is no more
        if isinstance(event, Join) and self.between and self.core.live:
            self.at_door.append((event, sim))  # all have met, and do what is between two passes
            return
        if isinstance(event, Join):
            sim.epoch = 0 if self.plan.behind and not self.plan.meets else self.asked
        if isinstance(event, Ask) or (isinstance(event, Step) and event.worker in self.core.live):
            self.asked = max(self.asked, sim.epoch)
            self.between = False
            self.admit()
        if isinstance(event, Step):
            self.slot[event.worker] = max(self.slot.get(event.worker, 0), event.seq)
        if isinstance(event, Join | Meet) and (not self.plan.lengths or self.plan.optimizers > 1):
            self.exempt.add(event.worker)  # when its next tick begins is known at its end
        if isinstance(event, Meet) and self.core.desk.pool.held.get(event.worker):
            self.exempt.add(event.worker)
        fresh = isinstance(event, Step) and event.worker in self.core.live
        seq = self.core.desk.workers[event.worker].seq if fresh else 0
        out = self.core.handle(event, self.t)
        self.trace.append(f"{self.t:.2f} {event}")
        if isinstance(event, Step) and fresh and event.seq > seq and Drop(event.worker, event.seq) not in out:
            self.taken(event)
        for message in out:
            self.trace.append(f"    {message}")
            self.between |= isinstance(message, Met)
            self.check(message)
            target = self.sims.get(getattr(message, "worker", ""))
            if target is not None and isinstance(message, Go | Grant | Met):
                self.deliver(target, message)
        if not self.core.live:
            self.admit()

    def admit(self) -> None:
        """Who has come between two passes begins with the next one."""
        waiting, self.at_door = self.at_door, []
        for event, sim in waiting:
            if sim.alive:
                self.serve(event, sim, self.core)

    def deliver(self, sim: Sim, message: Instruction) -> None:
        sim.heard = max(sim.heard, self.t) + sim.rng.random() * self.plan.latency
        self.at(sim.heard, lambda: sim.told(message))

    # -- rules
    def fail(self, text: str) -> None:
        raise Violation(f"{text}\n" + "\n".join(self.trace[-60:]))

    def pushed(self, sim: Sim, step: Step, used: set[int]) -> None:
        self.pushes[step.worker, step.seq] = step, used or {sim.params}

    def taken(self, step: Step) -> None:
        """Bounded staleness, counted in pushes."""
        since = self.accepted[self.read_at[step.worker] :]
        self.accepted.append(step.worker)
        most = max(Counter(name for name in since if name != step.worker).values(), default=0)
        if step.worker not in self.exempt and self.plan.rule.staleness and most > self.plan.rule.staleness + 2:
            self.fail(f"{step.worker} saw {most} pushes of another")

    def check(self, message: Instruction) -> None:
        match message:
            case Apply():
                self.check_update(message)
            case Go(worker, seq, version):
                self.read_at[worker], self.has[worker] = len(self.accepted), version
                if message.applied or message.kept or self.plan.lengths:
                    self.exempt.discard(worker)
                if version > self.version:
                    self.fail(f"{message} of a version that is not there")
                if message.kept and (worker, seq) not in self.kept:
                    self.fail(f"{message} was not kept")
                if message.applied and not any((p.worker, p.seq) == (worker, seq) for u in self.updates for p in u):
                    own = [v for v, u in enumerate(self.updates, 1) if any(p.worker == worker for p in u)]
                    if not own or own[-1] > version:
                        self.fail(f"{message} was not applied")
            case Grant(worker, piece) if piece is not None and piece.parts and self.plan.rule.buffer > 1:
                if len(self.core.desk.pool.held[worker]) == 1:
                    self.read_at[worker] = len(self.accepted)
            case Keep(worker, seq):
                self.check_memory(worker, seq)
                self.kept.add((worker, seq))
            case Drop(worker, seq):
                self.dropped.add((worker, seq))
            case Closed(loader, epoch, batches):
                self.check_closed(loader, epoch, batches)
            case Met():
                self.check_meeting(message)
            case Refuse():
                self.fail(f"{message}")

    def check_memory(self, worker: str, seq: int) -> None:
        if (worker, seq) in self.dropped:
            self.fail(f"{worker} {seq} was dropped before")
        if (worker, seq) not in self.kept and self.slot.get(worker) != seq:
            self.fail(f"{worker} {seq} is overwritten")

    def check_update(self, update: Apply) -> None:
        self.version += 1
        if update.version != self.version:
            self.fail(f"version {update.version} after {self.version - 1}")
        for part in update.parts:
            step, used = self.pushes[part.worker, part.seq]
            self.check_memory(part.worker, part.seq)
            if {part.read} != used:
                self.fail(f"{part} was computed with versions {used}")
            if any((p.worker, p.seq) == (part.worker, part.seq) for u in self.updates for p in u):
                self.fail(f"{part} is applied again")
            if sorted(p for p in step.covers if p.parts) != list(part.covers):
                self.fail(f"{part} covers something else than {step}")
            tau = update.version - 1 - part.read
            self.ages.setdefault(part.worker, Counter())[tau] += 1
            if part.scale != self.plan.rule.damp(tau) or not 0 < part.scale <= 1:
                self.fail(f"{part} is {tau} updates old")
        if update.skip != bool(update.blame) or update.skip != any(
            not self.pushes[p.worker, p.seq][0].finite for p in update.parts
        ):
            self.fail(f"{update} with what is not finite")
        self.updates.append(update.parts)
        self.progress.append((self.t, update.version))
        pieces = [piece for part in update.parts for piece in part.covers]
        self.applied.update(pieces)
        self.check_whole(pieces)
        if self.plan.rule.synchronous:
            self.check_order(update)

    def check_whole(self, pieces: list[Piece]) -> None:
        for key in {(p.loader, p.epoch, p.batch) for p in pieces}:
            every = sorted(p for p in self.applied.elements() if (p.loader, p.epoch, p.batch) == key)
            here = sorted(p for p in pieces if (p.loader, p.epoch, p.batch) == key)
            if [p.part for p in here] != list(range(here[0].parts)) or every != here:
                self.fail(f"batch {key} is applied as {every}")

    def check_order(self, update: Apply) -> None:
        if list(update.parts) != sorted(update.parts, key=lambda p: p.covers):
            self.fail(f"parts out of order in {update}")
        if any(part.read != update.version - 1 for part in update.parts):
            self.fail(f"a stale part in {update}")
        if self.plan.left != "step" or not self.plan.lengths or self.plan.optimizers > 1:
            return
        got = {(p.loader, p.epoch, p.batch) for part in update.parts for p in part.covers}
        epoch, first = min(e for _, e, _ in got), min(b for _, _, b in got)
        last = min(first + self.plan.accumulate, self.plan.lengths[0])
        if first % self.plan.accumulate or got != {
            (loader, epoch, b) for loader in range(len(self.plan.lengths)) for b in range(first, last)
        }:
            self.fail(f"update {update.version} is of {sorted(got)}")

    def check_closed(self, loader: int, epoch: int, batches: int) -> None:
        done = {p.batch for p in self.applied if (p.loader, p.epoch) == (loader, epoch)}
        if (loader, epoch) in self.closed or batches != self.plan.lengths[loader] or done != set(range(batches)):
            self.fail(f"pass {epoch} over {loader} is closed with {sorted(done)}")
        self.closed[loader, epoch] = batches

    def check_meeting(self, met: Met) -> None:
        """Who meets, and is in no step, has the newest parameters: all evaluate the same."""
        rests = met.worker in dict(met.notes) and not self.core.desk.pool.held.get(met.worker)
        if rests and self.has[met.worker] != self.version:
            self.fail(f"{met} with version {self.has[met.worker]}")

    def finish(self) -> None:
        waiting = [sim.name for sim in self.sims.values() if sim.alive and not sim.finished]
        if waiting:
            self.fail(f"{waiting} wait for ever")
        if self.core.histogram != self.ages or self.core.version != self.version:
            self.fail(f"counted {self.core.histogram}, applied {self.ages}")
        if self.plan.left == "step" and self.plan.lengths and not self.may_lose():
            wanted = {(0, e) for e in range(self.plan.epochs)}  # nobody finds the end of the second of two loaders
            if wanted - self.closed.keys():
                self.fail(f"passes {sorted(wanted - self.closed.keys())} are not closed")
            done = Counter((p.loader, p.epoch, p.batch) for p in self.applied if p.part == 0)
            if len(done) != sum(self.plan.lengths) * self.plan.epochs:
                self.fail(f"only {sorted(done)} are applied")

    def may_lose(self) -> bool:
        """A worker may die with a part of what its last step would be of, when all others are past theirs."""
        falls = self.plan.kills or self.plan.restarts
        several = self.plan.accumulate > 1 or len(self.plan.lengths) > 1
        return bool(self.plan.rule.staleness and several and falls)
