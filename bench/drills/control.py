"""The coordinator and the launcher are killed: bars 8 and 9."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

from chaos.drill import CASE
from drills.losses import ENDLESS
from drills.work import Work
from paceline.train.checkpoint_files import candidates, locate, step_of
from support.cli import run_paceline
from support.disturbed import Disturbed, Ledgers, Wrong, disturbed, prove
from support.leaks import SHM

LASTED = 5.2  # a coordinator that lived that long is started again at once


def coordinator(work: Work) -> None:
    """kill -9 of the coordinator, every other time together with a worker; before that it is silent for a while."""
    wanted, each = (2 if work.quick else 20), 2 if work.quick else 10
    ready: list[float] = []
    losses: list[float] = []
    slower: list[float] = []
    proved = runs = 0
    for number in work.repeat(-(-wanted // each), 1):
        home = work.directory(number)
        runs += 1
        with work.judged(home):
            with disturbed(
                home / "run", CASE, "-n", "3", "--workers", "1:3", *ENDLESS, "--hashes", str(home / "hashes")
            ) as run:
                run.members(count=3)
                slower.append(_silence(run, 3.0 if work.quick else 30.0))
                for i in range(each):
                    run.members(count=3, seconds=90)
                    run.watch(LASTED + work.draw.random())
                    (losses if i % 2 else ready).append(_kill(run, work, worker=bool(i % 2)))
                run.end()
            prove(home / "run", hashed=home / "hashes")
            proved += 1
    work.timed("killed: a new one is ready", ready, wanted // 2, p99=2.0)
    work.timed("killed together with a worker: next committed step", losses, wanted // 2, p99=2.5)
    work.timed("silent: time of a step, against before", slower, runs, p50=1.05)
    work.all_of("runs with epochs that rise, every row once, equal parameters", proved, runs)


def _silence(run: Disturbed, seconds: float) -> float:
    """How much longer a step takes while the coordinator is suspended."""
    run.watch(1.0)
    before = _pace(run, seconds / 2)
    pid = run.coordinator()
    os.kill(pid, signal.SIGSTOP)
    try:
        while_down = _pace(run, seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    after = _pace(run, seconds / 2)
    return while_down / ((before + after) / 2)


def _pace(run: Disturbed, seconds: float) -> float:
    """Seconds a step."""
    run.steps(1)
    first, began = run.ledgers.step, time.monotonic()
    run.watch(seconds)
    return (time.monotonic() - began) / max(1, run.ledgers.step - first)


def _kill(run: Disturbed, work: Work, *, worker: bool) -> float:
    """Seconds until there is a new coordinator that answers, or until the others have committed a step without the worker."""
    old, group, steps = run.coordinator(), run.ledgers.group, run.ledgers.step
    began = time.monotonic()
    os.kill(old, signal.SIGKILL)
    if worker:
        alive = run.workers()
        os.kill(alive[work.draw.choice(sorted(alive))], signal.SIGKILL)
        run.until(lambda: run.ledgers.group > group, 30, "the others should go on")
        return time.monotonic() - began
    journal = run.directory / "membership.journal"
    run.until(lambda: run.coordinator() not in (0, old) and _holds(run.coordinator(), journal), 30, "a new coordinator")
    took = time.monotonic() - began
    run.steps(5)
    if run.ledgers.group != group or run.ledgers.step <= steps:
        raise Wrong(f"the group changed from {group} to {run.ledgers.group} although nobody was lost")
    return took


def _holds(pid: int, journal: Path) -> bool:
    """It has opened its journal, which it does last before it serves."""
    try:
        return any(os.path.samefile(entry, journal) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.exists())
    except OSError:
        return False


# ---- the launcher ---------------------------------------------------------------------------------------------------
ENDS = {"kill": (signal.SIGKILL, -9, 10.0), "Ctrl-C": (signal.SIGINT, 130, 5.0), "SIGTERM": (signal.SIGTERM, 143, 5.0)}


def launcher(work: Work) -> None:
    """The launcher is killed, interrupted, terminated: nobody outlives it, nothing is left, and the status tells."""
    wanted = len(ENDS) * (1 if work.quick else 20)
    times: dict[str, list[float]] = {how: [] for how in ENDS}
    for number in work.repeat(wanted, wanted):
        how = list(ENDS)[number % len(ENDS)]
        home = work.directory(number)
        with work.judged(home):
            times[how].append(_end(home, how, work, elastic=number % 2 == 0))
    for how, (_, _, limit) in ENDS.items():
        work.timed(f"launcher: {how} to the end of all", times[how], wanted // len(ENDS), p99=limit)


def _end(home: Path, how: str, work: Work, *, elastic: bool) -> float:
    number, status, limit = ENDS[how]
    workers = "1:2" if elastic else "2"
    shared = set(SHM.iterdir())
    flags = ("-n", "2", "--workers", workers, "--checkpoint", "every=20,keep=2")
    with disturbed(home / "run", CASE, *flags, *ENDLESS) as run:
        run.until(lambda: run.ledgers.step >= 3, 60, "training should begin")
        run.watch(work.draw.random())
        family = psutil.Process(run.process.pid).children(recursive=True)
        began = time.monotonic()
        run.end(number, status)
        gone, alive = psutil.wait_procs(family, limit)
        took = time.monotonic() - began
        for process in alive:
            process.kill()
        if alive:
            raise Wrong(f"{how}: {len(alive)} of {len(gone) + len(alive)} processes live after {limit:g} s: {alive}")
        left = sorted(str(path) for path in set(SHM.iterdir()) - shared if path.name.startswith("paceline"))
        if left:
            raise Wrong(f"{how}: left behind: {left}")
        if number != signal.SIGKILL:
            prove(home / "run")
            _saved(home / "run")
        return took


def _saved(directory: Path) -> None:
    """All checkpoints are whole, and the newest is that of the last step."""
    done = run_paceline("verify", "checkpoint", directory, cwd=directory.parent)
    if done.returncode:
        raise Wrong(f"checkpoints of {directory}: {done.stdout}{done.stderr}")
    chosen, beside = locate(directory)
    newest = chosen or candidates(beside)[0]
    after = Ledgers(directory)
    after.read()
    after.close()
    step, _ = step_of(newest.name) or (0, 0)
    if step != after.step:
        raise Wrong(f"the last step of {directory} is {after.step}, and the newest checkpoint is {newest}")
