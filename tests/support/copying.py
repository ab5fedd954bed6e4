"""Two copies of a counting server on virtual time: workers push numbers, processes are killed between any two of their actions.

``World(Plan(seed)).run()`` drives a run to its end and raises :class:`Violation` where a rule is broken:

* each push that was acknowledged is counted once, and none twice, whoever dies;
* what a copy reads of a worker's memory is what the worker pushed: it writes there again as soon as it may go on;
* nobody waits for ever, unless both copies died at once: then the run is lost, and says so.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paceline.exchange.server_copy import (
    Ack,
    Acked,
    Asked,
    Begin,
    Carry,
    Copy,
    End,
    Event,
    Forget,
    Forward,
    Give,
    Given,
    Heard,
    Instruction,
    Lost,
    Record,
    Release,
    Role,
)
from paceline.exchange.server_numbered import Numbered

PATIENCE = 5.0


class Violation(AssertionError):
    """A rule is broken."""


@dataclass(frozen=True)
class Plan:
    """A run: so many workers, pushes of each, and times at which a copy is killed."""

    seed: int
    workers: int = 3
    pushes: int = 6
    kills: int = 3
    latency: float = 1.0
    restart: float = 3.0

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan with a bit of everything."""
        rng = random.Random(seed)
        latency, restart = rng.choice((0.1, 1.0, 3.0)), rng.choice((0.5, 3.0, 20.0))
        return cls(seed, rng.randint(1, 4), rng.randint(1, 8), rng.randint(0, 5), latency, restart)


@dataclass(eq=False)
class App:
    """What is replicated: a sum, and the lines to workers. Its answers are numbered messages."""

    numbered: type[Numbered[Any]]
    total: int = 0
    lines: dict[str, Numbered[Any]] = field(default_factory=dict)

    def line(self, worker: str) -> Numbered[Any]:
        return self.lines.setdefault(worker, self.numbered())

    def state(self) -> tuple[int, dict[str, Any]]:
        return self.total, {name: line.state() for name, line in self.lines.items()}

    def load(self, state: tuple[int, dict[str, Any]]) -> None:
        self.total = state[0]
        for name, saved in state[1].items():
            self.line(name).load(saved)


class Process:
    """A copy's process: does one instruction after another, and may be killed between two."""

    def __init__(self, world: World, joins: bool) -> None:
        self.world, self.core, self.app = world, world.copy(joins=joins), App(world.numbered)
        self.alive, self.busy = True, False
        self.doing: list[Instruction | Event] = []
        self.held: list[tuple[int, str, int]] = []  # number, worker, number of the message
        self.parked: list[tuple[str, int, int]] = []
        self.connected: dict[str, int] = {}  # worker -> which of its connections this is
        self.given: Any = None
        self.other: Process | None = None  # at the other end of its connection

    def hear(self, event: Event) -> None:
        if self.alive:
            self.doing.append(event)
            self.go_on()

    def go_on(self) -> None:
        if not self.busy and self.alive and self.doing:
            self.busy = True
            self.world.at(self.world.rng.random() * self.world.plan.latency / 4, self.step)

    def step(self) -> None:
        self.busy = False
        if not self.alive:
            return
        what = self.doing.pop(0)
        if isinstance(what, Forward | Carry | Release | Forget | Ack | Give | Begin | End):
            self.do(what)
        else:
            self.take(what)
        self.go_on()

    def take(self, event: Event) -> None:
        if isinstance(event, Given):
            self.app.load(self.given)
        if isinstance(event, Asked) and self.core.role is not Role.ALONE:
            return
        if isinstance(event, Heard) and event.message[0] == "resume":
            self.resume(event.source, *event.message[1:])
            return
        if not isinstance(event, Heard) or self.core.answers:
            self.doing[:0] = self.core.handle(event)

    def do(self, what: Instruction) -> None:
        world = self.world
        match what:
            case Forward(record):
                world.to_other(self, record)
            case Carry(number, worker, message):
                self.carry(number, worker, *message)
            case Ack(number):
                world.to_other(self, Acked(number))
            case Release(number):
                for _, worker, which in [h for h in self.held if h[0] <= number]:
                    self.say(worker, which)
                self.held = [h for h in self.held if h[0] > number]
            case Forget(number):
                self.held = [h for h in self.held if h[0] > number]
            case Give(number):
                world.to_other(self, Given(number), self.app.state())
            case Begin():
                for worker, connection, heard in self.parked:
                    self.resume(worker, connection, heard)
            case End():
                world.died(self)

    def carry(self, number: int, worker: str, which: int, heard: int, value: int) -> None:
        line = self.app.line(worker)
        if not line.hear(which, heard):
            return
        if self.world.memory[worker] != value:
            raise Violation(f"{worker} pushed {value}, and {self.world.memory[worker]} was read")
        self.app.total += value
        self.held.append((number, worker, line.say(line.heard)))

    def say(self, worker: str, which: int) -> None:
        kept = dict(self.app.line(worker).kept)
        if which in kept and worker in self.connected:
            self.world.to_worker(self, worker, which, kept[which])

    def resume(self, worker: str, connection: int, heard: int) -> None:
        if not self.core.answers:
            self.parked.append((worker, connection, heard))
            self.world.at(PATIENCE, lambda: self.send_away(worker, connection))
            return
        self.connected[worker] = connection
        line = self.app.line(worker)
        waiting = {which for _, w, which in self.held if w == worker}
        self.world.to_worker(self, worker, 0, line.heard)
        for which, _ in line.again(heard):
            if which not in waiting:
                self.say(worker, which)

    def send_away(self, worker: str, connection: int) -> None:
        """It has come to the wrong one of two copies that live."""
        waiting = [entry for entry in self.parked if entry[:2] == (worker, connection)]
        if waiting and not self.core.answers and self.alive:
            self.parked.remove(waiting[0])
            self.world.after(self, self.world.workers[worker], lambda: self.world.workers[worker].lost(self))


class Worker:
    """Pushes one number after another, and waits for each."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.line: Numbered[int] = world.numbered()
        self.rng = random.Random(f"{world.plan.seed} {name}")
        self.left = world.plan.pushes
        self.server: Process | None = None
        self.connection = 0
        self.resumed = False
        self.acked = 0
        self.sum = 0

    def connect(self) -> None:
        """To either copy that lives; the wrong one answers when it is the right one."""
        living = [process for process in self.world.pair if process is not None and process.alive]
        self.connection += 1
        self.resumed = False
        self.server = self.rng.choice(living) if living else None
        if self.server is None:
            self.world.at(1.0, self.connect)
        else:
            self.world.to_server(self, ("resume", self.connection, self.line.heard))

    def hear(self, connection: int, which: int, value: int) -> None:
        if connection != self.connection:
            return
        if which == 0:
            self.resumed = True
            self.line.confirm(value)
            for number, pushed in self.line.kept:
                self.world.to_server(self, (number, self.line.heard, pushed))
            if not self.line.kept and not self.line.said:
                self.push()
        elif self.line.hear(which, value):
            self.acked += 1
            self.push()

    def push(self) -> None:
        if not self.left:
            self.world.memory[self.name] = -1
            return
        self.left -= 1
        value = self.world.memory[self.name] = self.rng.randint(1, 10**6)
        self.sum += value
        number = self.line.say(value)
        self.world.to_server(self, (number, self.line.heard, value))

    def lost(self, process: Process) -> None:
        if self.server is process:
            self.connect()


class World:
    """Processes, lines and time."""

    def __init__(self, plan: Plan, copy: type[Copy] = Copy, numbered: type[Numbered[Any]] = Numbered) -> None:
        self.plan, self.copy, self.numbered = plan, copy, numbered
        self.rng = random.Random(plan.seed)
        self.t, self.count = 0.0, 0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.lines: dict[tuple[object, object], float] = {}
        self.memory: dict[str, int] = {}
        self.lost = False
        self.deaths = 0
        self.pair: list[Process | None] = [None, None]
        self.workers = {f"worker-{n}": Worker(self, f"worker-{n}") for n in range(plan.workers)}

    def at(self, delay: float, do: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.t + delay, self.count, do))

    def run(self) -> World:
        self.start(0, joins=False)
        self.start(1, joins=True)
        for worker in self.workers.values():
            self.at(0.1, worker.connect)
        for _ in range(self.plan.kills):
            self.at(self.rng.random() * self.plan.pushes * self.plan.latency * 12, self.kill)
        while self.queue and not self.lost:
            self.t, _, do = heapq.heappop(self.queue)
            do()
            if self.count > 50_000:
                raise Violation("the run does not end")
        if not self.lost:
            self.finish()
        return self

    def finish(self) -> None:
        waiting = [w.name for w in self.workers.values() if w.acked < self.plan.pushes]
        if waiting:
            raise Violation(f"{waiting} wait for ever")
        acked = sum(w.sum for w in self.workers.values())
        for process in self.pair:
            whole = process is not None and process.alive and process.core.role is not Role.JOINING
            if process is not None and whole and process.app.total != acked:
                raise Violation(f"{process.app.total} was counted, {acked} was acknowledged")

    # -- processes
    def start(self, place: int, joins: bool) -> None:
        process = self.pair[place] = Process(self, joins)
        if joins:
            process.other = self.pair[1 - place]
            self.to_other(process, Asked())

    def kill(self) -> None:
        living = [p for p in self.pair if p is not None and p.alive]
        if living:
            self.died(self.rng.choice(living))

    def died(self, process: Process) -> None:
        process.alive = False
        self.deaths += 1
        place = self.pair.index(process)
        other = self.pair[1 - place]
        if other is None or not other.alive:
            self.lost = True
        else:
            self.after(process, other, lambda: other.hear(Lost()) if other.other is process else None)
        for worker in self.workers.values():
            self.after(process, worker, lambda worker=worker: worker.lost(process))  # type: ignore[misc]
        self.at(self.plan.restart * (0.5 + self.rng.random()), lambda: self.restart(place))

    def restart(self, place: int) -> None:
        other = self.pair[1 - place]
        if other is not None and other.alive:
            self.start(place, joins=True)
        elif not self.lost:
            raise Violation("both are gone, and nobody has noticed")

    # -- lines: in order, and what was sent arrives
    def after(self, source: object, target: object, do: Callable[[], None]) -> None:
        when = max(self.lines.get((source, target), 0.0), self.t) + self.rng.random() * self.plan.latency
        self.lines[source, target] = when
        self.at(when - self.t, do)

    def to_other(self, process: Process, event: Event, state: Any = None) -> None:
        target = process.other
        if target is None or not target.alive:
            return

        def arrive() -> None:
            if isinstance(event, Asked) and not process.alive:
                return
            if state is not None:
                target.given = state
            if isinstance(event, Asked) and target.core.role is not Role.ALONE:
                self.after(process, target, arrive)  # it has not noticed yet that the copy before is gone
                return
            if isinstance(event, Asked):
                target.other = process
            target.hear(event)

        self.after(process, target, arrive)

    def to_server(self, worker: Worker, message: tuple[Any, ...]) -> None:
        process = worker.server
        connection = worker.connection
        assert process is not None

        def arrive() -> None:
            if message[0] != "resume" and process.connected.get(worker.name) != connection:
                return
            process.hear(Heard(worker.name, message))

        self.after(worker, process, arrive)

    def to_worker(self, process: Process, worker: str, which: int, value: int) -> None:
        target, connection = self.workers[worker], process.connected[worker]
        self.after(process, target, lambda: target.hear(connection, which, value))


__all__ = ["Copy", "Numbered", "Plan", "Process", "Record", "Violation", "World"]
