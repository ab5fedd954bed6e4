"""What happened, as a value. Rooms emit events into a :data:`Sink`; who listens is not their business."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One line of ``events/<name>.jsonl``, before the writer adds mono, wall, name, incarnation and epoch.

    Kinds: ``start``, ``adopt``, ``step``, ``log``, ``fault``, ``notice``, ``export``, ``end``.

    Attributes:
        kind: What happened.
        step: Number of optimizer steps applied when it happened.
        data: JSON values. Values that are tensors are converted when the line is written, not when it is emitted.
    """

    kind: str
    step: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


Sink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The sink of a job that nobody watches."""
