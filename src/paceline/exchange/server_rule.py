"""What a parameter server is asked to do: how stale a gradient may be, and what is done about its age. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from paceline.exchange.arguments import one_of
from paceline.terms.errors import UsageError

DAMPS = ("constant", "inverse", "polynomial", "hinge")


def _number(argument: str, value: object, most: float = 1e9) -> None:
    if type(value) not in (int, float) or not 0 <= value <= most:  # type: ignore[operator]
        raise _wrong(argument, value, f"{argument} is a number from 0.")


def _wrong(argument: str, value: object, help: str) -> UsageError:
    return UsageError("PL203", f"server: {argument}={value!r} cannot be", help=help)


@dataclass(frozen=True, slots=True)
class Damp:
    """Factor for a gradient that is `tau` versions old; 1 for a fresh one.

    ``constant``: 1. ``inverse``: ``1 / max(1, tau)`` (Zhang et al. 2016, 1511.05950). ``polynomial``: ``(1 + tau)^-a``, and
    ``hinge``: 1 up to `b`, then ``1 / (a (tau - b) + 1)`` (Xie et al. 2019, 1903.03934).

    >>> Damp("polynomial", a=0.5)(3)
    0.5

    Raises:
        UsageError: PL203, unknown kind, or `a` or `b` is not a finite number from 0.
    """

    kind: Literal["constant", "inverse", "polynomial", "hinge"] = "constant"
    a: float = 0.5
    b: float = 4.0

    def __post_init__(self) -> None:
        one_of("damp", "kind", self.kind, DAMPS)
        _number("a", self.a)
        _number("b", self.b)

    def __call__(self, tau: int) -> float:
        match self.kind:
            case "inverse":
                return 1.0 / max(1, tau)
            case "polynomial":
                return float((1 + tau) ** -self.a)
            case "hinge":
                return 1.0 if tau <= self.b else 1.0 / (self.a * (tau - self.b) + 1.0)
        return 1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """The discipline of a run with servers.

    Attributes:
        staleness: 0: synchronous, one update of all parts of a global batch. s: no worker is more than s clocks ahead of the
            slowest that computes (Ho et al. 2013). ``inf``: nobody waits.
        backup: Synchronous only: cut batches for so many workers less; the others compute copies of what is not there yet.
        buffer: Asynchronous only: so many pushes make one update (Nguyen et al. 2022).
        damp: Asynchronous only: factor by age.

    Raises:
        UsageError: PL203, a value that cannot be, or two that do not go together.
    """

    staleness: float = 0
    backup: int = 0
    buffer: int = 1
    damp: Damp = Damp()

    def __post_init__(self) -> None:
        _number("staleness", self.staleness, most=math.inf)
        if self.staleness != math.inf and self.staleness != int(self.staleness):
            raise _wrong("staleness", self.staleness, "it counts clocks: a whole number, or inf.")
        if type(self.backup) is not int or self.backup < 0:
            raise _wrong("backup", self.backup, "it is a whole number of workers, from 0.")
        if type(self.buffer) is not int or self.buffer < 1:
            raise _wrong("buffer", self.buffer, "it is a whole number of pushes, from 1.")
        if self.synchronous and self.buffer > 1:
            raise _wrong("buffer", self.buffer, "pushes are collected where staleness is 1 or more.")
        if self.synchronous and self.damp.kind != "constant":
            raise _wrong("damp", self.damp.kind, "with staleness=0 no gradient is stale.")
        if not self.synchronous and self.backup:
            raise _wrong("backup", self.backup, "where staleness is 1 or more nobody waits for the slowest.")

    @property
    def synchronous(self) -> bool:
        """One update of all parts of a global batch."""
        return self.staleness == 0
