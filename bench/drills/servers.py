"""Processes of parameter servers that are killed while workers push: bar 12."""

from __future__ import annotations

import time

from drills.work import Work
from support.falling import Counting

STRATEGY = "ps(servers=2, staleness=inf, replicas=2)"
NAMES = ("server-0", "server-1", "server-2", "server-3")
RUNS = 10  # kills in one run


def servers(work: Work) -> None:
    """kill -9 of one of four processes at a random moment; the counter is what was acknowledged, and the time until all push again."""
    wanted = 6 if work.quick else 30
    each = min(RUNS, wanted)
    times: list[float] = []
    exact = runs = 0
    for number in work.repeat(-(-wanted // each), 1):
        home = work.directory(number)
        runs += 1
        with work.judged(home), Counting(home, STRATEGY, 3) as run:
            run.wait(30, 90)
            times += [_fall(run, work) for _ in range(each)]
            acknowledged, values, _ = run.end()
            if values != [acknowledged]:
                work.wrong.append(f"{acknowledged} pushes were acknowledged, and the counter is {values}")
            exact += values == [acknowledged]
    work.timed("kill -9 of a server's process to the next acknowledged push of every worker", times, wanted, p99=2.0)
    work.all_of("runs whose counter is what was acknowledged, exactly", exact, runs)


def _fall(run: Counting, work: Work) -> float:
    """Seconds until every worker has begun a push after the kill, and was answered."""
    run.wait(run.pushes() + work.draw.randint(1, 60))
    name = work.draw.choice(NAMES)
    before, began = run.each(), time.monotonic()
    run.kill(name)
    run.wait_each({worker: count + 2 for worker, count in before.items()})
    took = time.monotonic() - began
    run.complete(name, 90)
    return took
