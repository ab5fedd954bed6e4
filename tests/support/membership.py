"""A whole job in one thread on virtual time: coordinator, members, launcher, network, disk, ledger, and everything that can go wrong.

``World(seed).run()`` draws a job and its faults from the seed, runs it to its end and returns what happened; a rule that is broken
raises :class:`Violation`. What is simulated:

* the *network*: messages lost, doubled, late, out of order; links reset; partitions of any shape, in one direction or both;
* the *disk*: what was not synced is lost in a crash, except for any number of its first bytes;
* *processes*: killed, frozen and woken; the coordinator also between any two of its instructions; impostors;
* the *job*: members reduce step after step; a reduction completes only if all members of the epoch have given their part, and may
  complete on some and not on others. Completing step k makes k-1 stable; only then it is written to the store, which holds rows,
  hash and epoch of each step. Who is new or behind gets the state from the most advanced member, or else from the store.

Rules: I1 rows exactly once, I2 equal hashes, I3 nothing accepted from an old epoch, I4 no gaps, I6 the job ends; and what the
coordinator announces is checked against what truly happened. A bug is planted by giving another class for one of the ``Parts``.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paceline.group import journal
from paceline.group.membership import Coordinator
from paceline.group.view import (
    Action,
    Certificate,
    Close,
    Closed,
    Connect,
    Event,
    Identity,
    Journal,
    Kind,
    Leave,
    Limits,
    Meet,
    Meeting,
    MemberCore,
    Opened,
    Received,
    Report,
    Send,
    Tick,
    View,
)

HEARTBEAT, LEASE = 0.25, 2.0
ROUGH = 20.0  # virtual seconds with faults
PATIENCE = 90.0  # and the job must have ended that long after them
LOST, DOUBLED, LATE = 0.06, 0.13, 0.25  # of the control messages while it is rough; cumulative
COORDINATOR = "coordinator"
Rows = tuple[tuple[int, int], ...]


class Violation(AssertionError):
    """A rule is broken; the message begins with its name."""


class Disk:
    """Bytes that survive a crash once they are synced, and perhaps before."""

    def __init__(self) -> None:
        self.durable = b""
        self.cached = b""

    def append(self, data: bytes) -> None:
        self.cached += data

    def sync(self) -> None:
        self.durable, self.cached = self.durable + self.cached, b""

    def crash(self, rng: random.Random) -> None:
        self.durable += self.cached[: rng.randint(0, len(self.cached))]
        self.cached = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Records, and whether a tail was torn; it is cut off."""
        records, length = journal.decode(self.durable)
        torn = length < len(self.durable)
        self.durable = self.durable[:length]
        return records, torn


class Store:
    """The ledger and the newest state, a resource of its own: it refuses epochs older than the newest that it has seen."""

    def __init__(self) -> None:
        self.newest = 0
        self.entries: list[tuple[Rows, int]] = []  # of step 0, 1, …: rows, hash of the state after it

    def enter(self, epoch: int) -> None:
        self.newest = max(self.newest, epoch)

    def accepts(self, epoch: int) -> bool:
        return epoch >= self.newest


class Process:
    """Something that can be killed and frozen. While it is frozen, what happens to it waits, in order."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.alive = True
        self.frozen_until = 0.0
        self.offset = world.rng.uniform(0, 1e6)  # of its monotonic clock
        self.deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def clock(self) -> float:
        return self.world.t + self.offset

    def later(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        self.world.at(delay, self.run, do, args)

    def run(self, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.alive:
            if self.world.t < self.frozen_until:
                self.deferred.append((do, args))
            else:
                do(*args)

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.world.t + seconds)
        self.world.at(seconds + 1e-9, self.thaw)

    def thaw(self) -> None:
        if self.alive and self.world.t >= self.frozen_until:
            deferred, self.deferred = self.deferred, []
            for do, args in deferred:
                self.run(do, args)


class Host(Process):
    """The coordinator's process, in one of its lives."""

    def __init__(self, world: World) -> None:
        super().__init__(world, COORDINATOR)
        records, torn = world.disk.read()
        self.core = world.parts.coordinator(world.limits, records, torn=torn, now=self.clock())
        self.doom = -1  # instructions until it crashes
        self.later(HEARTBEAT, self.tick)

    def tick(self) -> None:
        self.later(HEARTBEAT, self.tick)
        self.take(Tick())

    def take(self, event: Event) -> None:
        for action in self.core.handle(event, self.clock()):
            if self.doom == 0:
                self.world.fault("crash in the middle")
                self.world.crash_coordinator()
                return
            self.doom -= 1
            self.perform(action)
            if not self.alive:
                return
        if isinstance(event, Tick):
            self.world.rules.after_tick(self.core)
        if isinstance(event, Certificate):
            self.world.rules.after_certificate(event.identity, self.core)

    def perform(self, action: Action) -> None:
        world = self.world
        match action:
            case Journal(record):
                world.disk.append(journal.encode(record))
                if self.doom == 0:  # the crash comes while it is being written
                    world.fault("crash while writing")
                    world.crash_coordinator()
                    return
                world.disk.sync()
                world.rules.journalled(record, self.core)
            case Send(link, kind, meta):
                world.rules.sends(self, kind, meta)
                world.send(link, kind, meta)
            case Close(link):
                world.close(link, to_worker=True)


class Worker(Process):
    """A worker: its member's core, and a job that steps."""

    def __init__(self, world: World, identity: Identity) -> None:
        super().__init__(world, identity.name)
        self.identity = identity
        self.core = world.parts.member(identity, f"{world.rng.getrandbits(64):x}", {}, heartbeat=HEARTBEAT, lease=LEASE)
        self.link = 0
        self.ticking = -1.0
        self.applied = -1  # steps; -1: no state yet
        self.hash = 0
        self.log: dict[int, tuple[Rows, int]] = {}  # of steps applied: rows, hash after
        self.wire = 0  # epoch of the wire that it is in, 0 for none
        self.reporting = 0  # epoch whose report is being made
        self.progress = 0
        self.speed = world.rng.uniform(0.02, 0.08)
        world.workers.append(self)
        self.later(world.rng.uniform(0, 0.3), self.take, Meet())
        self.later(world.rng.uniform(0, 0.3), self.take, Tick())

    # -- the member's thread
    def take(self, event: Event) -> None:
        if isinstance(event, Leave):
            self.world.rules.leaves(self)
        for action in self.core.handle(event, self.clock()):
            match action:
                case Send(_, kind, meta):
                    self.world.send(self.link, kind, meta, self)
                case Close():
                    self.world.close(self.link, to_worker=False)
                    self.link = 0
                case Connect():
                    self.world.connect(self)
        self.look()

    def on_tick(self, wanted: float) -> None:
        if wanted == self.ticking:
            self.take(Tick())

    def look(self) -> None:
        """What the worker's threads see in the core."""
        core = self.core
        if core.wake != self.ticking:
            self.ticking = core.wake
            self.later(max(1e-3, core.wake - self.clock()), self.on_tick, core.wake)
        if core.failed or core.parted:
            self.later(0.01, self.end)
            return
        if self.wire and core.interrupted:
            self.later(self.world.rng.uniform(0, 0.02), self.leave_wire, self.wire, "interrupted")
        asked = core.asked
        if asked is not None and self.reporting != asked.epoch:
            self.reporting = asked.epoch
            self.later(self.world.rng.uniform(0, 0.01), self.report, asked)
        meeting = core.take_meeting()
        if meeting is not None:
            self.enter(meeting)

    def report(self, view: View) -> None:
        told = {"epoch": view.epoch, "name": self.name, "applied": self.applied}
        self.world.rules.reports(view.epoch, self.identity)
        self.take(Report(view.epoch, told))

    def end(self, finished: bool = False) -> None:
        if self.alive:
            self.world.kill(self, finished=finished or self.core.parted)

    # -- the job
    def enter(self, meeting: Meeting) -> None:
        world, view = self.world, meeting.view
        world.rules.enters(self, meeting)
        world.store.enter(view.epoch)
        self.wire = view.epoch
        world.wire(view).inside.append(self)
        best = max(report.get("applied", -1) for report in meeting.reports)
        if best < 0:
            self.applied = len(world.store.entries)
            self.hash = world.store.entries[-1][1] if self.applied else 0
            self.log = {}
        elif self.applied < best:
            sources = [m for m, r in zip(view.members, meeting.reports, strict=True) if r.get("applied") == best]
            self.later(
                world.rng.uniform(0.005, 0.1), self.heal, view.epoch, world.inside(view.epoch, sources[0]), sources[0]
            )
            return
        self.go_on()

    def heal(self, epoch: int, source: Worker | None, identity: Identity) -> None:
        if self.wire != epoch:
            return
        source = source or self.world.inside(epoch, identity)
        reachable = source is not None and source.alive and source.wire == epoch
        if not reachable or self.world.cut(source.name, self.name) or self.world.t < source.frozen_until:
            self.later(0.1, self.heal, epoch, source, identity)
            return
        self.applied, self.hash, self.log = source.applied, source.hash, dict(source.log)
        self.go_on()

    def go_on(self) -> None:
        self.progress += 1
        self.later(self.world.rng.uniform(0.5, 1.5) * self.speed, self.contribute, self.wire, self.applied)
        self.later(self.world.rng.uniform(3, 4), self.watch, self.wire, self.progress)

    def cursor(self, step: int) -> int:
        """The step whose rows this worker reads for `step`."""
        return step

    def contribute(self, epoch: int, step: int) -> None:
        if self.wire != epoch:
            return
        wire = self.world.wires[epoch]
        rank, size = wire.view.rank(self.identity), len(wire.view.members)
        low, high = self.world.rows(self.cursor(step))
        part = (low + (high - low) * rank // size, low + (high - low) * (rank + 1) // size)
        wire.parts.setdefault(step, {})[self.identity] = (self.applied, self.hash, part, self.core.pending)
        if len(wire.parts[step]) == size:
            self.world.reduce(wire, step)

    def complete(self, epoch: int, step: int, parts: list[tuple[int, int, tuple[int, int], bool]]) -> None:
        if self.wire != epoch:
            return
        self.world.rules.reduced(epoch, step, parts)
        if step == self.world.steps:  # the closing exchange: everybody has applied the last step
            if self.publish(epoch, step):
                self.wire = 0
                self.take(Leave("finished"))
                self.later(self.world.rng.uniform(0.2, 2.0), self.end, True)
            return
        rows = tuple(sorted(part for *_, part, _ in parts))
        self.hash = zlib.crc32(repr(_merged(rows)).encode(), self.hash)
        self.log[step] = (rows, self.hash)
        self.applied = step + 1
        if not self.publish(epoch, self.stable()):
            return
        if any(pending for *_, pending in parts):
            self.leave_wire(epoch, "boundary")
        else:
            self.go_on()

    def stable(self) -> int:
        """Steps that everybody is known to have applied, once this worker has completed another."""
        return self.applied - 1

    def publish(self, epoch: int, stable: int) -> bool:
        """Write what has become stable. A member whose epoch is refused is out, and ends."""
        store = self.world.store
        if not store.accepts(epoch):
            self.end()
            return False
        for step in range(max(0, min(stable, len(store.entries)) - 1), stable):
            if step in self.log:
                self.world.rules.published(epoch, step, *self.log[step])
        return True

    def leave_wire(self, epoch: int, why: str) -> None:
        if self.wire != epoch:
            return
        self.wire = 0
        self.world.wires[epoch].inside.remove(self)
        if why == "wire":
            self.world.rules.broken.add(epoch)
        elif why == "boundary":
            self.world.rules.boundaries.add((epoch, self.identity))
        if why != "boundary":
            self.world.peer_gone(self, epoch)
        self.take(Meet(boundary=why == "boundary"))

    def watch(self, epoch: int, progress: int) -> None:
        if self.wire == epoch and self.progress == progress:
            self.leave_wire(epoch, "wire")


@dataclass(frozen=True)
class Parts:
    """What the world is made of."""

    coordinator: type[Coordinator] = Coordinator
    member: type[MemberCore] = MemberCore
    worker: type[Worker] = Worker
    host: type[Host] = Host
    disk: type[Disk] = Disk
    store: type[Store] = Store


@dataclass(eq=False)
class Wire:
    view: View
    inside: list[Worker] = field(default_factory=list)
    parts: dict[int, dict[Identity, tuple[int, int, tuple[int, int], bool]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What happened, and a hash of all of it."""

    trace: int
    faults: int
    epochs: int
    steps: int
    seconds: float


class World:
    """One job.

    Args:
        seed: Draws everything.
        parts: What it is made of.
    """

    def __init__(self, seed: int, parts: Parts | None = None) -> None:
        self.rng = rng = random.Random(seed)
        self.parts = parts or Parts()
        self.t = 0.0
        self.trace = 0
        self.faults: dict[str, int] = {}
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.target = rng.randint(1, 5)
        low = rng.randint(1, self.target)
        self.limits = Limits(self.target, low, self.target + rng.randint(0, 2), HEARTBEAT, LEASE)
        self.steps = rng.randint(60, 130)
        self.batch = rng.randint(5, 24)
        self.rows_in_all = self.batch * self.steps - rng.randint(0, self.batch - 1)
        self.wall: dict[str, float] = {}
        self.blocks: dict[tuple[str, str], float] = {}
        self.links: dict[int, tuple[Worker, Host]] = {}
        self.workers: list[Worker] = []
        self.wires: dict[int, Wire] = {}
        self.started = 0
        self.certificates: list[Certificate] = []
        self.store = self.parts.store()
        self.disk = self.parts.disk()
        self.rules = Rules(self)
        self.host = self.parts.host(self)
        for _ in range(self.target):
            self.spawn()
        self.at(1.0, self.replace)
        for _ in range(rng.randint(30, 60)):
            self.at(rng.uniform(0, ROUGH), self.misfortune, rng.choice(MISFORTUNES))

    def run(self) -> Outcome:
        heap, pop = self.heap, heapq.heappop
        while heap and not self.rules.done():
            self.t, _, do, args = pop(heap)
            do(*args)
            if self.t > ROUGH + PATIENCE:
                raise Violation(
                    f"I6: no end in sight: {len(self.store.entries)} of {self.steps} steps, {self.host.core.status()}"
                )
        self.rules.at_the_end()
        return Outcome(self.trace, sum(self.faults.values()), self.rules.highest, len(self.store.entries), self.t)

    # -- time and chance
    def at(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.t + delay, self.count, do, args))

    def record(self, *what: object) -> None:
        self.trace = zlib.crc32(repr((self.t, what)).encode(), self.trace)

    def fault(self, what: str) -> None:
        self.faults[what] = self.faults.get(what, 0) + 1
        self.record(what)

    def rows(self, step: int) -> tuple[int, int]:
        """First row of the global batch of a step and the one behind its last; none in the closing one."""
        return min(step * self.batch, self.rows_in_all), min((step + 1) * self.batch, self.rows_in_all)

    # -- the network
    def cut(self, sender: str, receiver: str) -> bool:
        return self.blocks.get((sender, receiver), 0.0) > self.t

    def block(self, senders: list[str], receivers: list[str], seconds: float, both: bool) -> None:
        for a in senders:
            for b in receivers:
                for pair in ((a, b), (b, a)) if both else ((a, b),):
                    self.blocks[pair] = max(self.blocks.get(pair, 0.0), self.t + seconds)

    def connect(self, worker: Worker) -> None:
        self.at(self.rng.uniform(0.0005, 0.005), self.accept, worker, self.host)

    def accept(self, worker: Worker, host: Host) -> None:
        unheard = self.cut(worker.name, COORDINATOR) or self.cut(COORDINATOR, worker.name)
        if not host.alive:
            worker.run(worker.take, (Closed(),))
        elif unheard or self.t < host.frozen_until:
            worker.later(0.8, worker.take, Closed())
        else:
            self.count += 1
            worker.link = self.count
            self.links[worker.link] = worker, host
            worker.run(worker.take, (Opened(),))

    def send(self, link: int, kind: int, meta: dict[str, Any], sender: Worker | None = None) -> None:
        """Over a link, from its worker or from the coordinator."""
        ends = self.links.get(link)
        if ends is None:
            return
        worker, host = ends
        if self.cut(worker.name, COORDINATOR) if sender else self.cut(COORDINATOR, worker.name):
            return
        delay, times = self.rng.uniform(0.0003, 0.004), 1
        luck = self.rng.random() if self.t < ROUGH else 1.0
        if luck < LOST:
            self.fault("message lost")
            return
        if luck < DOUBLED:
            self.fault("message doubled")
            times = 2
        elif luck < LATE:
            self.fault("message late")
            delay = self.rng.expovariate(4.0)
        for _ in range(times):
            end = (host, self.to_host) if sender else (worker, self.to_worker)
            end[0].later(delay, end[1], link, kind, meta)
            delay += self.rng.uniform(0, 0.05)

    def to_host(self, link: int, kind: int, meta: dict[str, Any]) -> None:
        if link in self.links:
            worker, host = self.links[link]
            self.record(link, kind, meta)
            if kind != Kind.HELLO:
                self.rules.heard(host, link, kind, worker.identity)
            host.take(Received(link, kind, meta))
            if kind == Kind.HELLO:
                self.rules.heard(host, link, kind, worker.identity)

    def to_worker(self, link: int, kind: int, meta: dict[str, Any]) -> None:
        if link in self.links and self.links[link][0].link == link:
            self.record(link, kind, meta)
            self.links[link][0].take(Received(0, kind, meta))

    def close(self, link: int, *, to_worker: bool) -> None:
        """One end closes: the other learns it after what was sent before, unless a cut hides it."""
        if link in self.links:
            worker, host = self.links[link]
            if to_worker:
                worker.later(0.006, self.closed_to_worker, link)
            else:
                del self.links[link]
                if not self.cut(worker.name, COORDINATOR):
                    host.later(0.006, host.take, Closed(link))

    def closed_to_worker(self, link: int) -> None:
        worker, _ = self.links.pop(link, (None, None))
        if worker is not None and worker.link == link and not self.cut(COORDINATOR, worker.name):
            worker.link = 0
            worker.take(Closed())

    # -- the data plane
    def wire(self, view: View) -> Wire:
        return self.wires.setdefault(view.epoch, Wire(view))

    def inside(self, epoch: int, identity: Identity) -> Worker | None:
        return next((w for w in self.wires[epoch].inside if w.identity == identity), None)

    def reduce(self, wire: Wire, step: int) -> None:
        """All parts are there. Each member completes in its own time, and only while none of its peers is cut off."""
        names = [m.name for m in wire.view.members]
        if any(self.cut(a, b) for a in names for b in names):
            if wire.inside:
                self.at(0.05, self.reduce, wire, step)
            return
        parts = [wire.parts[step][m] for m in wire.view.members]
        for worker in list(wire.inside):
            delay = self.rng.uniform(0.0005, 0.01) if self.rng.random() < 0.95 else self.rng.uniform(0, 0.3)
            worker.later(delay, worker.complete, wire.view.epoch, step, parts)

    def peer_gone(self, gone: Worker, epoch: int) -> None:
        """The others of its wire see the end of a stream, perhaps."""
        for other in self.wires[epoch].inside:
            if other is not gone and not self.cut(gone.name, other.name) and self.rng.random() < 0.7:
                other.later(self.rng.uniform(0.001, 0.03), other.leave_wire, epoch, "wire")

    # -- the launcher
    def spawn(self) -> None:
        identity = Identity(f"worker-{self.started}", f"{self.rng.getrandbits(128):032x}")
        self.started += 1
        self.parts.worker(self, identity)

    def replace(self) -> None:
        if "finished" not in self.rules.certified.values():
            if sum(w.alive for w in self.workers) < self.target:
                self.spawn()
            self.at(self.rng.uniform(0.3, 1.0), self.replace)

    def kill(self, worker: Worker, finished: bool = False) -> None:
        self.record("end", worker.name, finished)
        worker.alive = False
        self.close(worker.link, to_worker=False)
        if worker.wire:
            epoch, worker.wire = worker.wire, 0
            self.wires[epoch].inside.remove(worker)
            self.peer_gone(worker, epoch)
        if any(other.alive and other.identity == worker.identity for other in self.workers):
            return  # an impostor, or its victim: the other one lives
        why = "finished" if finished else "died"
        self.at(self.rng.uniform(0.001, 0.02), self.certify, Certificate(worker.identity, why))

    def certify(self, certificate: Certificate) -> None:
        """The launcher keeps all certificates, and gives all of them to each new life of the coordinator."""
        self.certificates.append(certificate)
        self.host.run(self.rules.certificate, (certificate,))

    def crash_coordinator(self) -> None:
        self.fault("coordinator killed")
        host = self.host
        host.alive = False
        self.disk.crash(self.rng)
        for link, (_, end) in list(self.links.items()):
            if end is host:
                self.close(link, to_worker=True)
        self.at(self.rng.uniform(0.05, 1.5), self.restart_coordinator)

    def restart_coordinator(self) -> None:
        try:
            self.rules.restarted()
            self.host = self.parts.host(self)
        except ValueError as error:
            raise Violation(f"the journal can be read: {error}") from error
        for certificate in self.certificates:
            self.host.later(self.rng.uniform(0.001, 0.1), self.rules.certificate, certificate)

    # -- misfortunes
    def misfortune(self, what: str) -> None:
        rng = self.rng
        living = [w for w in self.workers if w.alive]
        someone = rng.choice(living) if living else None
        if what == "kill" and someone:
            self.fault(what)
            for worker in rng.sample(living, rng.choice([1, 1, 1, min(2, len(living)), len(living)])):
                self.kill(worker)
        elif what == "freeze" and someone:
            self.fault(what)
            someone.freeze(rng.uniform(0.1, 4.0))
        elif what == "freeze coordinator" and self.host.alive:
            self.fault(what)
            self.rules.freezes(seconds := rng.uniform(0.1, 4.0))
            self.host.freeze(seconds)
        elif what == "kill coordinator" and self.host.alive:
            self.crash_coordinator()
        elif what == "doom" and self.host.alive:
            self.host.doom = rng.randint(0, 12)
        elif what == "partition":
            self.partition(living)
        elif what == "false certificate" and someone:
            self.fault(what)
            self.certify(Certificate(someone.identity))
        elif what == "joiner":
            self.fault(what)
            self.spawn()
        elif what == "impostor" and someone:
            self.fault(what)
            incarnation = rng.choice([someone.identity.incarnation, f"{rng.getrandbits(128):032x}"])
            self.parts.worker(self, Identity(someone.name, incarnation))
        elif what == "clock":
            self.fault(what)
            self.wall[rng.choice([COORDINATOR, *(w.name for w in living)])] = rng.choice([-86400, -10, 10, 86400])
        elif what == "garbage" and someone and someone.wire:
            self.fault(what)
            someone.run(someone.leave_wire, (someone.wire, "wire"))
        elif what == "reset" and someone and someone.link:
            self.fault(what)
            worker, _ = self.links.get(someone.link, (None, None))
            if worker is someone:
                self.close(someone.link, to_worker=False)
                someone.run(someone.take, (Closed(),))

    def partition(self, living: list[Worker]) -> None:
        rng = self.rng
        names = [w.name for w in living]
        some = rng.sample(names, rng.randint(0, len(names)))
        others = [name for name in names if name not in some]
        shape = rng.choice(["coordinator only", "peers only", "full"])
        self.fault(f"partition, {shape}")
        receivers = {"coordinator only": [COORDINATOR], "peers only": others, "full": [*others, COORDINATOR]}[shape]
        seconds, both = rng.uniform(0.2, 5.0), rng.random() < 0.6
        if rng.random() < 0.5:
            self.block(some, receivers, seconds, both)
        else:
            self.block(receivers, some, seconds, both)


MISFORTUNES = (
    *("kill", "kill", "freeze", "freeze", "freeze coordinator", "kill coordinator", "kill coordinator", "doom", "doom"),
    *("partition", "partition", "partition", "false certificate", "joiner", "impostor", "clock", "garbage", "reset"),
)


def _merged(rows: Rows) -> Rows:
    """Adjacent ranges as one: the same rows, however they were shared out."""
    merged: list[tuple[int, int]] = []
    for low, high in rows:
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        elif low < high:
            merged.append((low, high))
    return tuple(merged)


class Rules:
    """Knows what truly happened, and objects."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.announced: dict[int, tuple[Identity, ...]] = {}
        self.highest = 0
        self.previous: View | None = None
        self.committed: tuple[Identity, ...] = ()
        self.committed_epoch = 0
        self.started: set[int] = set()
        self.durable: set[tuple[str, int]] = set()
        self.removed: set[Identity] = set()
        self.certified: dict[Identity, str] = {}
        self.left: set[Identity] = set()
        self.reported: set[tuple[int, Identity]] = set()
        self.entered: dict[Identity, Worker] = {}
        self.broken: set[int] = set()  # epochs whose wire failed somewhere
        self.boundaries: set[tuple[int, Identity]] = set()
        self.finished: set[Identity] = set()
        self.newest = 0
        self.hash_of: dict[int, int] = {}
        self.last_heard: dict[Identity, float] = {}
        self.restarted_at = 0.0
        self.regroup = False
        self.frozen: list[tuple[float, float]] = []  # of the coordinator: from, to

    def check(self, holds: bool, rule: str, *detail: object) -> None:
        if not holds:
            raise Violation(f"{rule}: {' '.join(map(str, detail))} at {self.world.t:.3f}")

    # -- what happens
    def heard(self, host: Host, link: int, kind: int, identity: Identity) -> None:
        """Over a link that the coordinator has accepted."""
        if link in host.core._links:
            self.last_heard[identity] = self.world.t
            if kind == Kind.LEAVE:
                self.left.add(identity)

    def freezes(self, seconds: float) -> None:
        if seconds < 2.5 * HEARTBEAT:
            return
        begin, end = self.world.t, self.world.t + seconds
        if self.frozen and begin <= self.frozen[-1][1]:
            before = self.frozen.pop()
            begin, end = before[0], max(end, before[1])
        self.frozen.append((begin, end))

    def restarted(self) -> None:
        self.restarted_at, self.regroup, self.frozen = self.world.t, True, []
        records = [r for r in journal.decode(self.world.disk.durable)[0] if "epoch" in r]
        self.durable = {(r["k"], r["epoch"]) for r in records}
        for record in records:  # that became durable in the very crash
            if record["k"] == "epoch" and self.previous and record["epoch"] > self.previous.epoch:
                view = View(record["epoch"], tuple(Identity(*row[:2]) for row in record["members"]))
                self.removed |= set(self.previous.members) - set(view.members)
                self.previous = view
            if record["k"] == "start" and self.previous and record["epoch"] == self.previous.epoch:
                self.committed, self.committed_epoch = self.previous.members, self.previous.epoch

    def journalled(self, record: dict[str, Any], core: Coordinator) -> None:
        if "epoch" in record and not self.world.disk.cached:
            self.durable.add((record["k"], record["epoch"]))
        if record["k"] == "epoch" and core.view is not None:
            self.decided(core.view)
        if record["k"] == "start" and core.view is not None:
            self.committed, self.committed_epoch = core.view.members, core.view.epoch

    def certificate(self, certificate: Certificate) -> None:
        self.certified.setdefault(certificate.identity, certificate.why)
        if certificate.why == "finished":
            self.finished.add(certificate.identity)
        self.world.host.take(certificate)

    def leaves(self, worker: Worker) -> None:
        self.finished.add(worker.identity)

    def reports(self, epoch: int, identity: Identity) -> None:
        self.reported.add((epoch, identity))

    def silence(self, identity: Identity) -> float:
        """Seconds in which the coordinator ran and did not hear it; short pauses of its own are its own affair."""
        t = self.world.t
        since = max(self.restarted_at, self.last_heard.get(identity, 0.0))
        return t - since - sum(max(0.0, min(end, t) - max(begin, since)) for begin, end in self.frozen)

    def after_tick(self, core: Coordinator) -> None:
        """Who is silent is out, if the others may go on without it."""
        inside = [m for m in core.view.members if m not in core.gone] if core.view else []
        overdue = [m for m in inside if self.silence(m) > LEASE + 4 * HEARTBEAT]
        if overdue and any(self.silence(m) < LEASE - HEARTBEAT for m in inside):
            voters = [m for m in self.committed if m in inside]
            heard = sum(self.silence(m) < LEASE for m in voters)
            self.check(2 * heard <= len(voters) and bool(voters), "silence has an end", overdue, voters)

    # -- what the coordinator says
    def decided(self, view: View) -> None:
        """A view was proposed."""
        world, new, old = self.world, view.members, self.previous
        world.record("view", view.epoch, new)
        self.check(len({m.name for m in new}) == len(new), "one process a name", view)
        self.check(len(new) <= max(world.limits.max_workers, len(old.members) if old else 0), "max_workers", view)
        self.check(not self.removed & set(new), "fenced for ever", view)
        if old is not None:
            self.change(old, view)
            self.removed |= set(old.members) - set(new)
        self.previous, self.regroup = view, False

    def change(self, old: View, view: View) -> None:
        new = view.members
        out = [m for m in old.members if m not in new]
        gone = self.certified.keys() | self.left
        silent = [m for m in out if m not in gone]
        for member in silent:
            self.check(self.silence(member) > LEASE - 0.02, "no eviction without cause", member.name)
        voters = [m for m in self.committed if m not in gone and (m in old.members)]
        if any(m in voters for m in silent):
            self.check(2 * sum(m in new for m in voters) > len(voters), "majority", view, voters)
        started = old.epoch in self.started
        lost = any(not (started and (m in self.left or self.certified.get(m) == "finished")) for m in out)
        joiners = [m for m in new if m not in old.members]
        if joiners:
            stay = [m for m in new if m in self.committed]
            calm = all((self.committed_epoch, m) in self.boundaries for m in stay)
            self.check(calm, "joins at boundaries", old, view)
        left = any((old.epoch, m) in self.boundaries for m in new)  # all, or some for long
        reason = lost or self.regroup or (started and old.epoch in self.broken) or (left if started else bool(joiners))
        self.check(reason, "no epoch without a reason", old, view)

    def after_certificate(self, identity: Identity, core: Coordinator) -> None:
        if core.view is not None and core.gone.get(identity) != "finished":
            others = [m for m in core.view.members if m in core.seats and not core.seats[m].silent]
            self.check(identity not in core.view.members or not others, "certificates count at once", identity)

    def sends(self, host: Host, kind: int, meta: dict[str, Any]) -> None:
        if kind == Kind.PROPOSE:
            epoch, members = meta["epoch"], tuple(Identity(*row) for row in meta["members"])
            self.check(("epoch", epoch) in self.durable, "durable before announced", epoch)
            if epoch not in self.announced:
                self.check(epoch > self.highest, "epochs increase", epoch, self.highest)
                self.announced[epoch], self.highest = members, epoch
            self.check(self.announced[epoch] == members, "an epoch is one view", epoch)
        elif kind == Kind.START and meta["epoch"] not in self.started:
            epoch = meta["epoch"]
            members = self.announced.get(epoch, ())
            self.check(("start", epoch) in self.durable, "durable before started", epoch)
            missing = [m.name for m in members if (epoch, m) not in self.reported]
            self.check(not missing, "all are ready", epoch, missing)
            coming = len(host.core._joiners())
            self.check(
                bool(self.finished) or len(members) + coming >= self.world.limits.min_workers, "min_workers", epoch
            )
            self.started.add(epoch)

    # -- what workers do
    def enters(self, worker: Worker, meeting: Meeting) -> None:
        view, reports = meeting.view, meeting.reports
        self.check(worker.identity in view.members, "a member of what it enters", view)
        self.check(self.announced.get(view.epoch) == view.members, "what is entered was announced", view)
        said = [(report.get("epoch"), report.get("name")) for report in reports]
        self.check(said == [(view.epoch, m.name) for m in view.members], "reports of this epoch", view, said)
        first = self.entered.setdefault(worker.identity, worker)
        self.check(first is worker, "two processes are one member", worker.name)
        self.newest = max(self.newest, view.epoch)

    def reduced(self, epoch: int, step: int, parts: list[tuple[int, int, tuple[int, int], bool]]) -> None:
        states = {(applied, state) for applied, state, _, _ in parts}
        self.check(len(states) == 1, "I2 equal hashes", epoch, step, states)
        self.check(parts[0][0] == step, "I4 all have applied the steps before", epoch, step)

    def published(self, epoch: int, step: int, rows: Rows, state: int) -> None:
        entries = self.world.store.entries
        self.check(epoch >= self.newest, "I3 nothing from an old epoch", epoch, self.newest)
        self.check(step <= len(entries), "I4 no gaps", step, len(entries))
        self.check(_merged(rows) == _merged((self.world.rows(step),)), "I1 rows exactly once", step, rows)
        if step < len(entries):
            self.check(entries[step] == (rows, state), "I1 one commit a step", step, entries[step], rows)
        else:
            self.world.record("commit", epoch, step, rows, state)
            entries.append((rows, state))

    def done(self) -> bool:
        world = self.world
        return bool(self.finished) and world.t > ROUGH and not any(w.alive for w in world.workers)

    def at_the_end(self) -> None:
        self.check(len(self.world.store.entries) == self.world.steps, "I6 the job ends", len(self.world.store.entries))
