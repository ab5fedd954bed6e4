"""Several log events as one: what the budget of :mod:`paceline.observe.events` does to a logger that is too fast.

Pure. The merged value of a name is ``sum(weight * value) / sum(weight)``, in double precision; where all weights are 0
it is the plain mean; a NaN stays visible. Values that are no numbers are those of the last event.

Ranks merge without asking each other, and a mean over ranks needs lines of the same steps. So lines are cut where other ranks
cut, too: after multiples of a power of two of steps, which nest, and at the ends of epochs. The last step stays by itself: it
is the one that is shown in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from paceline.observe.plain import number, plain
from paceline.terms.event import Event

Stamped = tuple[float, float, Event]


def condensed(run: Sequence[Stamped], lines: int) -> Iterator[Stamped]:
    """A run of log events with the same names as about so many lines."""
    first, last = run[0][2].step, run[-1][2].step
    width = 1
    while width * lines <= last - first:
        width *= 2
    by_epoch = len({event.data.get("epoch") for _, _, event in run}) <= lines

    def line(stamped: Stamped) -> tuple[Any, ...]:
        event = stamped[2]
        return event.data.get("epoch") if by_epoch else None, event.step // width, event.step == last

    for _, group in groupby(run, line):
        yield merged(list(group))


def merged(run: Sequence[Stamped]) -> Stamped:
    """One event for a run of log events with the same names, at the time and step of the last."""
    mono, wall, last = run[-1]
    if len(run) == 1:
        return run[0]
    weights = [weight_of(event.data) for _, _, event in run]
    values = [plain(event.data["values"]) for _, _, event in run]
    means = {name: _mean([v[name] for v in values], weights) for name in values[-1]}
    data = {**last.data, "values": means, "weight": math.fsum(weights), "count": len(run)}
    return mono, wall, Event(last.kind, last.step, data)


def weight_of(data: Any) -> float:
    """The weight that a log event carries; 1 where it says nothing usable."""
    weight = number(plain(data.get("weight")))
    return weight if weight is not None and math.isfinite(weight) and weight >= 0 else 1.0


def _mean(values: list[Any], weights: list[float]) -> Any:
    numbers = [number(v) for v in values]
    pairs = [(v, w) for v, w in zip(numbers, weights, strict=True) if v is not None]
    if len(pairs) < len(values):
        return values[-1]
    total = math.fsum(w for _, w in pairs)
    if total == 0:
        return sum(v for v, _ in pairs) / len(pairs)
    return sum(v * w for v, w in pairs) / total
