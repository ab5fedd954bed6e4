"""The phrases that every report shares: ranks as ranges, durations, what a rank is doing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from paceline.terms.activity import Phase, Snapshot

COMPILING = "torch.compile"
"""Said in a heartbeat while the main thread is inside torch's compiler, which may take minutes and is no hang."""

RANK, WORKER = "rank", "worker"
"""What a number is called. It is always the N of ``worker-N``, which a run never gives twice; while that is its rank too,
people know it as the rank. Once a worker was replaced ranks have moved, and the word is another so that nobody mistakes them."""

_VERBS = {
    Phase.STARTING: ("is starting", "are starting"),
    Phase.COMPUTE: ("computes", "compute"),
    Phase.EXCHANGE: ("exchanges", "exchange"),
    Phase.WAIT: ("waits", "wait"),
    Phase.INPUT: ("reads its next batch", "read their next batch"),
    Phase.FINISHED: ("has ended its script", "have ended their script"),
    Phase.FAILED: ("has failed", "have failed"),
}


def spans(ranks: Iterable[int]) -> str:
    """Ranks in order as ranges: ``0-2,5``.

    >>> spans([5, 0, 2, 1])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ranks(numbers: Collection[int], noun: str = RANK) -> str:
    """``rank 1`` or ``ranks 0-2,5``; see :data:`WORKER` for the other noun."""
    return f"{noun if len(set(numbers)) == 1 else noun + 's'} {spans(numbers)}"


def verb(numbers: Collection[int], singular: str, plural: str) -> str:
    """The form of a verb that fits the number of ranks."""
    return singular if len(set(numbers)) == 1 else plural


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min``, ``2.5 h``: two digits are enough to act on."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7170 else f"{seconds / 3600:.1f} h"


def kind(what: str) -> str:
    """The operation without its particulars, so that `backward, bucket 1/7` and `backward, bucket 2/7` are the same.

    >>> kind("backward, bucket 1/7")
    'backward'
    """
    return re.split(r"[,:(\[\d]", what, maxsplit=1)[0].strip().lower() or what


def place(snapshot: Snapshot) -> str:
    """The line of the user's script, if it was looked up in the phase that the rank is in now; an older one would mislead."""
    return snapshot.where if snapshot.beat == 0 or snapshot.beat >= snapshot.since else ""


def doing(snapshot: Snapshot, now: float, many: bool = False, noun: str = RANK) -> str:
    """What a rank (or many like it) is doing, since when, for whom and where, as half a sentence."""
    parts = [_VERBS[snapshot.phase][many]]
    timed = snapshot.phase not in (Phase.FINISHED, Phase.FAILED) and snapshot.since > 0
    if timed:
        parts.append(f"for {duration(now - snapshot.since)}")
    if snapshot.what and snapshot.phase in (Phase.WAIT, Phase.EXCHANGE):
        parts.append(f"in `{snapshot.what}`")
    if snapshot.phase is Phase.WAIT and snapshot.waits_for:
        parts.append(f"on {ranks(snapshot.waits_for, noun)}")
    tail = [f"step {snapshot.step}"] + ([where] if (where := place(snapshot)) else [])
    return " ".join(parts) + " · " + " · ".join(tail)
