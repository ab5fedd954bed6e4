"""Everything at once, for long: bar 10."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from chaos.drill import CASE
from drills.work import Work
from report import median
from support.disturbed import Disturbed, Wrong, disturbed, events, prove

WORKERS = 8
PACE = 0.004  # seconds a row
ROWS = 100  # of a global batch
EVERY = 15.0  # seconds between two faults, on average
LONG_STOP = 12.0  # seconds: longer than a lease, and than it takes to end who is silent
SPARED = "worker-0"  # lives from the beginning to the end, so that what it gathers can be seen


@dataclass(frozen=True)
class Sample:
    """What a process holds."""

    descriptors: int
    threads: int
    resident: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads(), process.memory_info().rss)


def mixed(work: Work) -> None:
    """Eight workers; every 15 seconds one is killed, is suspended, comes or goes, or the coordinator is killed."""
    home = work.directory(0)
    with work.judged(home):
        script = ("--", "--epochs", "1000000", "--pace", str(PACE), "--hashes", str(home / "hashes"))
        limits = ("-n", str(WORKERS), "--workers", f"1:{WORKERS + 1}", "--listen", "127.0.0.1")
        with disturbed(home / "run", CASE, *limits, *script) as run, Soak(run, work, home) as soak:
            run.members(count=WORKERS, seconds=180)
            soak.execute()
            run.end(seconds=60)
        compared = prove(home / "run", *soak.guests, hashed=home / "hashes")
        work.row("steps whose hashes were compared", compared)
        soak.report()


class Soak:
    """The faults, and what is measured between them. A context manager: who came as a guest goes.

    Attributes:
        guests: Run directories of launchers that have joined.
    """

    def __init__(self, run: Disturbed, work: Work, home: Path) -> None:
        self._run, self._work, self._home = run, work, home
        self.guests: list[Path] = []
        self._guest: Disturbed | None = None
        self._stack = ExitStack()
        self._faults: Counter[str] = Counter()
        self._gone: dict[str, float] = {}  # by worker, when we ended it
        self._stopped = 0.0  # worker-seconds
        self._samples: dict[str, list[Sample]] = {SPARED: [], "the launcher": []}
        self._kinds = {
            "kill": (10, self._kill),
            "short stop": (4, self._short_stop),
            "long stop": (1, self._long_stop),
            "guest comes or goes": (3, self._come_or_go),
            "coordinator": (2, self._coordinator),
        }

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def execute(self) -> None:
        """Until the time is over; it begins undisturbed."""
        run, draw = self._run, self._work.draw
        every, seconds = (EVERY / 2, 45.0) if self._work.quick else (EVERY, max(60.0, self._work.left - 60.0))
        self._calm = self._measure(5.0 if self._work.quick else 20.0)
        self._began, self._first = time.monotonic(), run.ledgers.step
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while (left := self._began + seconds - time.monotonic()) > 0:
            run.watch(min(left, draw.expovariate(1 / every)))
            name = draw.choices(names, weights)[0]
            self._sample()
            if self._kinds[name][1]():
                self._faults[name] += 1
        self._ended, self._last = time.monotonic(), run.ledgers.step
        if self._guest is not None:
            self._come_or_go()
        run.members(count=WORKERS, seconds=120)
        run.watch(2.0)
        self._sample()

    def _measure(self, seconds: float) -> float:
        """Rows a worker-second, undisturbed."""
        self._run.watch(2.0)
        first, began = self._run.ledgers.step, time.monotonic()
        self._run.watch(seconds)
        rate = (self._run.ledgers.step - first) * ROWS / (time.monotonic() - began) / WORKERS
        self._sample()
        return rate

    def _sample(self) -> None:
        """What two processes hold, whenever the group is as it was in the beginning."""
        alive = self._run.workers()
        if self._guest is None and len(alive) == len(self._run.ledgers.members) == WORKERS:
            self._samples[SPARED].append(Sample.of(alive[SPARED]))
            self._samples["the launcher"].append(Sample.of(self._run.process.pid))

    # -- faults; whether there was one
    def _victim(self) -> str:
        """A member of this launcher that may be hurt, or nobody."""
        members = set(self._run.ledgers.members) & self._run.workers().keys() - {SPARED}
        return self._work.draw.choice(sorted(members)) if members else ""

    def _kill(self) -> bool:
        name = self._victim()
        if name:
            os.kill(self._run.workers()[name], signal.SIGKILL)
            self._gone[name] = time.monotonic()
        return bool(name)

    def _short_stop(self) -> bool:
        name, seconds = self._victim(), 0.2 + self._work.draw.random()
        if name:
            pid = self._run.workers()[name]
            os.kill(pid, signal.SIGSTOP)
            try:
                self._run.watch(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            self._stopped += seconds
        return bool(name)

    def _long_stop(self) -> bool:
        """Nobody lets it go on: it is left out, ended, and replaced."""
        name = self._victim()
        if name:
            os.kill(self._run.workers()[name], signal.SIGSTOP)
            self._gone[name] = time.monotonic()
            self._run.until(lambda: name not in self._run.workers(), 60, f"{name} is suspended and should be ended")
        return bool(name)

    def _coordinator(self) -> bool:
        pid = self._run.coordinator()
        if pid:
            os.kill(pid, signal.SIGKILL)
        return bool(pid)

    def _come_or_go(self) -> bool:
        if self._guest is None:
            self._come()
        else:
            self._go(self._guest)
        return True

    def _come(self) -> None:
        """A launcher of this very host joins with one worker."""
        address = re.search(r"--address (\S+)", self._run.said)
        if address is None:
            raise Wrong(f"no address was said\n{self._run.said[-4000:]}")
        directory = self._home / f"guest-{len(self.guests)}"
        flags = ("--address", address[1], "--secret-file", self._run.directory / "secret")
        self._guest = self._stack.enter_context(disturbed(directory, CASE, *flags, verb="join"))
        self._run.ledgers.directories.append(directory)
        guest = self._guest
        self._run.until(lambda: bool(guest.workers().keys() & set(self._run.ledgers.members)), 60, "a guest comes")
        self.guests.append(directory)

    def _go(self, guest: Disturbed) -> None:
        self._gone |= dict.fromkeys(guest.workers(), time.monotonic())
        guest.end(seconds=30)
        self._guest = None

    # -- afterwards
    def report(self) -> None:
        work, faults = self._work, sum(self._faults.values())
        took = self._ended - self._began
        live = sum(self._lives()) - self._stopped
        goodput = (self._last - self._first) * ROWS / (self._calm * live)
        said = ", ".join(f"{count} {name}" for name, count in sorted(self._faults.items()))
        work.row(f"{faults} faults in {took:.0f} s: {said}; goodput", goodput, rows_per_worker_second=self._calm)
        work.all_of("goodput of live worker-seconds, in percent of 95", round(100 * goodput), 95)
        pauses = self._pauses() / took
        work.row("share of the time in pauses longer than ten steps", pauses)
        work.all_of("time without such pauses, in percent of 95", round(100 * (1 - pauses)), 95)
        for name, samples in self._samples.items():
            self._flat(name, samples)

    def _pauses(self) -> float:
        """Seconds in which nobody committed a step for longer than ten undisturbed steps take: what is lost to faults themselves,
        while goodput also feels that processes which are being started take the processor from the others."""
        usual = ROWS / (self._calm * WORKERS)
        times = [at for at, _ in self._run.ledgers.progress if self._began <= at <= self._ended]
        return sum(b - a - usual for a, b in pairwise(times) if b - a > 10 * usual)

    def _lives(self) -> list[float]:
        """For each worker how many seconds of the drill it could have trained: from when it was ready until its end."""
        lives = []
        for directory in (self._run.directory, *self.guests):
            for event in events(directory, "adopt"):
                until = min(self._gone.get(event["name"], self._ended), self._ended)
                lives.append(max(0.0, until - max(event["mono"], self._began)))
        return lives

    def _flat(self, name: str, samples: list[Sample]) -> None:
        """Descriptors and threads do not grow, and memory does not by more than 5 percent."""
        few = max(1, len(samples) // 4)
        for kind, allowed in (("descriptors", 1.0), ("threads", 1.0), ("resident", 1.05)):
            first, last = (median([getattr(s, kind) for s in part]) for part in (samples[:few], samples[-few:]))
            self._work.at_most(f"{name}: {kind} in the end, of those in the beginning", allowed, last / first)
