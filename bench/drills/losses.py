"""Workers that are killed, and workers that come: bars 1 and 3."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from chaos.drill import CASE
from drills.work import Work
from support.cli import run_paceline
from support.disturbed import Disturbed, Wrong, disturbed, events, prove

ENDLESS = ("--", "--epochs", "100000", "--pace", "0.0002")
RUNS = 5  # faults in one run


def kills(work: Work) -> None:
    """kill -9 of one of four at a random moment, a save among them; every fifth time another run."""
    times: list[float] = []
    wanted, proved, runs = (5 if work.quick else 50), 0, 0
    for number in work.repeat(wanted // RUNS, 1):
        home = work.directory(number)
        runs += 1
        with work.judged(home):
            flags = ("-n", "4", "--workers", "1:4", "--checkpoint", "every=40,keep=2")
            with disturbed(home / "run", CASE, *flags, *ENDLESS, "--hashes", str(home / "hashes")) as run:
                for _ in range(RUNS):
                    run.members(count=4, seconds=90)
                    run.watch(work.draw.random() * 0.5)
                    times.append(_kill(run, work))
                run.end()
            prove(home / "run", hashed=home / "hashes")
            proved += 1
    work.timed("kill -9 to the next committed step", times, wanted, 0.5, 1.5)
    work.all_of("runs with every row once and equal parameters after every step", proved, runs)


def _kill(run: Disturbed, work: Work) -> float:
    """Seconds to the next step of those who are left. Raises Wrong when one of them is another process afterwards."""
    before = run.workers()
    name = work.draw.choice(sorted(before.keys() & set(run.ledgers.members)))
    group, began = run.ledgers.group, time.monotonic()
    os.kill(before.pop(name), signal.SIGKILL)
    run.until(lambda: run.ledgers.group > group, 30, f"the others should go on without {name}")
    took = time.monotonic() - began
    after = run.workers()
    if any(after.get(other) != pid for other, pid in before.items()):
        raise Wrong(f"{name} was killed, and others were started again: {before} is {after}")
    return took


def joins(work: Work) -> None:
    """A new process takes part: asked for, or in the place of one that was killed."""
    wanted, each = (4 if work.quick else 30), 4 if work.quick else 6
    ready: list[float] = []
    stalls: list[float] = []
    steps: list[float] = []
    compared = runs = 0
    for number in work.repeat(-(-wanted // each), 1):
        home = work.directory(number)
        runs += 1
        with work.judged(home):
            with disturbed(
                home / "run", CASE, "-n", "2", "--workers", "1:4", *ENDLESS, "--hashes", str(home / "hashes")
            ) as run:
                run.members(count=2)
                firsts = [_join(run, work, home, i) for i in range(each)]
                run.end()
            compared += prove(home / "run", hashed=home / "hashes") > 0
            adopted = {event["name"]: event["mono"] for event in events(home / "run", "adopt")}
            for name, first, stall, step in firsts:
                ready.append(first - adopted[name])
                stalls.append(stall - step)
                steps.append(step)
    work.timed("joining: ready to the first committed step", ready, wanted, p99=2.0)
    work.timed("joining: stall of the others beyond one step", stalls, wanted, p99=0.5)
    work.timed("joining: a step", steps, wanted)
    work.all_of("runs in which the joiner's parameters were those of the others after its first step", compared, runs)


def _join(run: Disturbed, work: Work, home: Path, number: int) -> tuple[str, float, float, float]:
    """Its name, when its first step was seen, the longest pause between two steps around that, and a usual step; seconds."""
    known = set(run.workers()) | run.pids.keys()
    if number < 2:
        done = run_paceline("join", run.directory, cwd=home)
        if done.returncode:
            raise Wrong(f"paceline join: {done.stdout}{done.stderr}")
    else:
        _kill(run, work)
        run.watch(0.5)
    run.until(lambda: bool(run.workers().keys() - known), 60, "a worker should be started")
    (name,) = run.workers().keys() - known
    run.steps(20)
    times = [at for at, _ in run.ledgers.progress][-20:]
    usual = (times[-1] - times[0]) / (len(times) - 1)
    run.until(lambda: name in run.ledgers.first, 90, f"{name} should take part")
    first = run.ledgers.first[name]
    run.steps(20)
    return name, first, run.ledgers.stall(first - 0.5, first + 0.2), usual
