"""One rank of a replica that is split over several is killed, again and again: bar 17."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from chaos.drill import Drill, differ, members, reference, run, steps, wait_for, whole, workers
from drills.work import Work
from support.cli import run_paceline
from support.disturbed import Wrong

STRATEGIES = ("fsdp(2) * ddp()", "tensor(2) * ddp()", "pipeline(2) * ddp()")
FOR_EVER = ("--epochs", "100000")
RUNS = 5  # kills in one run
SIZE = 4
TOLERANCE = 1e-9  # of parameters in float64: sums have another order when ranks are fewer


def replicas(work: Work) -> None:
    """kill -9 of one of four ranks, which hold two replicas; each placement in turn. Nobody else may be started again."""
    wanted = 3 if work.quick else 20
    each = 1 if work.quick else RUNS
    goes_on: list[float] = []
    rebuilt: list[float] = []
    equal = runs = lost = 0
    for number in work.repeat(-(-wanted // each), 3):
        home = work.directory(number)
        runs += 1
        with work.judged(home):
            lost = max(lost, _run(work, home, STRATEGIES[number % len(STRATEGIES)], each, goes_on, rebuilt))
            equal += 1
    work.timed("kill -9 of one rank of a replica to the next committed step of the others", goes_on, wanted)
    work.timed(
        "kill -9 of one rank of a replica until it is built anew and has taken part in a step",
        rebuilt,
        wanted,
        p99=10.0,
    )
    work.all_of("runs whose parameters are those of one process after as many steps, every row once", equal, runs)
    work.at_most("committed steps lost", 10, lost)


def _run(work: Work, home: Path, strategy: str, kills: int, goes_on: list[float], rebuilt: list[float]) -> int:
    """The most committed steps that a loss has cost. Raises Wrong."""
    lost = 0

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        nonlocal lost
        for _ in range(kills):
            wait_for(lambda: whole(drill, SIZE), 90, process)
            target = steps(drill.directory) + work.draw.randrange(1, 40)
            wait_for(lambda target=target: steps(drill.directory) >= target, 90, process)
            before = workers(drill.directory)
            name = work.draw.choice(sorted(before.keys() & set(members(drill))))
            reached, began = steps(drill.directory), time.monotonic()
            os.kill(before[name], signal.SIGKILL)
            wait_for(lambda: not whole(drill, SIZE), 30, process)
            at = steps(drill.directory)
            lost = max(lost, reached - at)
            wait_for(lambda at=at: steps(drill.directory) > at, 30, process)
            goes_on.append(time.monotonic() - began)
            wait_for(lambda: whole(drill, SIZE), 90, process)
            at = steps(drill.directory)
            wait_for(lambda at=at: steps(drill.directory) > at, 30, process)
            rebuilt.append(time.monotonic() - began)
            after = workers(drill.directory)
            kept = [other for other in before if other in after]
            if len(kept) != SIZE // 2 or any(after[other] != before[other] for other in kept):
                raise Wrong(f"{name} was killed, and others were started again: {before} is {after}")
        process.send_signal(signal.SIGINT)

    drill = run(home / "run", ["-n", str(SIZE), "--strategy", strategy], list(FOR_EVER), disturb, 60)
    expected = reference(home, [*FOR_EVER, "--steps", str(steps(drill.directory))])
    off = differ(expected, drill.parameters())
    if off > TOLERANCE:
        raise Wrong(f"{strategy}: after {steps(drill.directory)} steps parameters are {off:.1e} off")
    proved = run_paceline("verify", "ledger", drill.directory, cwd=home)
    if proved.returncode:
        raise Wrong(f"{strategy}: {proved.stdout}{proved.stderr}")
    return lost
