"""Taking turns on a machine that is not ours alone: who disturbed a measurement is measured too."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
QUIET = 0.1  # of the machine may be used by others
PATIENCE = 3  # times as many rounds as asked for, at most


class Others:
    """How many cores other programs have kept busy since this was made: all busy time less that of our ended children."""

    def __init__(self) -> None:
        self._began, self._busy = time.monotonic(), _busy_seconds()

    def cores(self) -> float:
        """The mean over the time since then."""
        return round(max(0.0, (_busy_seconds() - self._busy) / (time.monotonic() - self._began)), 2)


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - ours.ru_utime - ours.ru_stime


def quiet(results: list[Result]) -> list[Result]:
    """The runs that were hardly disturbed."""
    limit = QUIET * len(os.sched_getaffinity(0))
    return [result for result in results if result["others_cores"] < limit]


def counting(*columns: list[Result]) -> list[list[Result]]:
    """For each column the runs whose median counts: the quiet ones, or all of all columns where one of them has none.

    Never quiet runs of one against disturbed runs of another.
    """
    chosen = [quiet(column) for column in columns]
    return chosen if all(chosen) else list(columns)


def take_turns(rounds: int, *turns: Callable[[], Result]) -> list[list[Result]]:
    """Call each of `turns` in every round, until each has had `rounds` quiet runs, or for three times as many rounds.

    Returns:
        For each of `turns` all of its results.
    """
    results: list[list[Result]] = [[] for _ in turns]
    for _ in range(PATIENCE * rounds):
        for turn, mine in zip(turns, results, strict=True):
            mine.append(turn())
        if all(len(quiet(mine)) >= rounds for mine in results):
            break
    return results
