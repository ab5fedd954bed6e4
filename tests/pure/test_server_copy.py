"""Two copies of a server, killed between any two of their actions; and bugs that these runs must notice."""

from __future__ import annotations

import collections
from typing import Any

import pytest

from paceline.exchange.server_copy import Ack, Begin, Copy, Event, Given, Heard, Instruction, Lost, Release
from paceline.exchange.server_numbered import Numbered
from support.breadth import more
from support.copying import Plan, Violation, World

SEEDS = sum(more(20_000)) or 1500


def test_what_is_acknowledged_is_counted_once_whoever_dies() -> None:
    worlds = [World(Plan.draw(seed)).run() for seed in range(SEEDS)]
    assert sum(world.deaths for world in worlds) > SEEDS
    assert sum(world.lost for world in worlds) < SEEDS / 2  # both died at once
    assert sum(world.deaths > 2 and not world.lost for world in worlds) > SEEDS / 10


# ---- planted bugs -----------------------------------------------------------------------------------------------------
class SaysAtOnce(Copy):
    """It acknowledges before the second copy has it."""

    def handle(self, event: Event) -> list[Instruction]:
        out = super().handle(event)
        return [*out, Release(self.number)] if isinstance(event, Heard) else out


class AcksBefore(Copy):
    """The second copy acknowledges what it has not carried out."""

    def handle(self, event: Event) -> list[Instruction]:
        return sorted(super().handle(event), key=lambda what: not isinstance(what, Ack))


class SaysNothing(Copy):
    """It takes over, and does not say what its copy may not have said."""

    def handle(self, event: Event) -> list[Instruction]:
        return [what for what in super().handle(event) if not isinstance(what, Begin)]


class StaysFirst(Copy):
    """It waits for a copy that is gone."""

    def handle(self, event: Event) -> list[Instruction]:
        return [] if isinstance(event, Lost) and self.answers else super().handle(event)


class OneTooMuch(Copy):
    """It says what the next record will bring."""

    def _release(self, number: int) -> list[Instruction]:
        self.released = number
        return [Release(number + 1)]


class BeginsWithNothing(Copy):
    """It takes over before it has the state."""

    def _alone(self) -> list[Instruction]:
        super()._alone()
        return [Begin(), Release(self.number)]


class CountsFromNought(Copy):
    """It does not know how many records there were before its state."""

    def handle(self, event: Event) -> list[Instruction]:
        return super().handle(Given(0) if isinstance(event, Given) else event)


class NotAgain(Numbered[Any]):
    """What was said once is not said again."""

    def again(self, heard: int) -> list[tuple[int, Any]]:
        return []


class Forgetful(Numbered[Any]):
    """The state of a line does not tell what is not confirmed."""

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kept": []}


class HearsBack(Numbered[Any]):
    """It does not give the numbers of what it has heard to the next copy."""

    def load(self, state: dict[str, Any]) -> None:
        super().load({**state, "heard": 0})


@pytest.mark.parametrize(
    "bug",
    [
        SaysAtOnce,
        AcksBefore,
        SaysNothing,
        StaysFirst,
        OneTooMuch,
        BeginsWithNothing,
        CountsFromNought,
        NotAgain,
        Forgetful,
        HearsBack,
    ],
)
def test_a_bug_is_noticed(bug: Any) -> None:
    given = {"copy": bug} if issubclass(bug, Copy) else {"numbered": bug}
    with pytest.raises((Violation, AssertionError, ValueError)):
        collections.deque((World(Plan.draw(seed), **given).run() for seed in range(SEEDS)), maxlen=0)


def test_a_line_refuses_what_cannot_be() -> None:
    line: Numbered[str] = Numbered()
    with pytest.raises(ValueError, match="message 2 came after message 0"):
        line.hear(2, 0)
    with pytest.raises(ValueError, match="has heard 3 of 0"):
        line.again(3)
