"""When parameters are exchanged. Pure: a cadence decides from what all ranks know, so that all decide alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from paceline.exchange.arguments import between, whole

MOST = 1_000_000
"""Steps between two rounds at most: a run that never exchanges is no distributed run."""


@runtime_checkable
class Cadence(Protocol):
    """A frozen value."""

    @property
    def name(self) -> str:
        """Its text in a strategy."""

    def due(self, since: int, pace: Pace) -> bool:
        """Whether a round ends after `since` steps."""

    def describe(self) -> str:
        """One phrase."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured, the same numbers on all ranks.

    Attributes:
        step: Seconds of a step, without exchange; 0 while nobody knows.
        exchange: Seconds of a round's exchange.
    """

    step: float = 0.0
    exchange: float = 0.0


@dataclass(frozen=True, slots=True)
class Every:
    """A round ends after so many optimizer steps."""

    steps: int = 1

    @property
    def name(self) -> str:
        """Its text in a strategy."""
        return str(self.steps)

    def due(self, since: int, pace: Pace) -> bool:
        """True from the last step of a round on."""
        return since >= self.steps

    def describe(self) -> str:
        """One phrase."""
        return "every optimizer step" if self.steps == 1 else f"every {self.steps} optimizer steps"


@dataclass(frozen=True, slots=True)
class Within:
    """As often as leaves the exchange at most this part of the time: ``H >= exchange (1 - part) / (part step)``.

    Args:
        part: Of the time, between 0 and 1.
        most: Steps of a round at most.
    """

    part: float
    most: int = 500

    @property
    def name(self) -> str:
        """Its text in a strategy."""
        return f"within({self.part!r}, most={self.most})"

    def steps(self, pace: Pace) -> int:
        """Steps of a round at this pace; 1 while nothing is measured."""
        if not self.part * pace.step > 0:
            return 1
        wanted = pace.exchange * (1 - self.part) / (self.part * pace.step)
        return self.most if wanted >= self.most else max(1, math.ceil(wanted))

    def due(self, since: int, pace: Pace) -> bool:
        """True from the last step of a round on."""
        return since >= self.steps(pace)

    def describe(self) -> str:
        """One phrase."""
        return f"as often as takes {self.part:.0%} of the time, at least every {self.most} optimizer steps"


def within(part: float = 0.1, most: int = 500) -> Cadence:
    """As often as leaves the exchange this part of the time. Raises UsageError PL203."""
    return Within(between("within", "part", part, 0.001, 0.999), whole("within", "most", most, MOST))


CADENCES: dict[str, Callable[..., Cadence]] = {"within": within}
"""Words for cadences in a strategy text, and what they call."""


def cadence_for(recipe: str, every: object) -> Cadence:
    """The cadence that was asked for: a number of steps, or a value. Raises UsageError PL203."""
    return every if isinstance(every, Cadence) else Every(whole(recipe, "every", every, MOST))
