"""``-n`` and ``--workers``: how many workers a run begins with, and between which limits it is elastic."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.group.coordinator import Control
from paceline.launch import line
from paceline.launch.commands.run import workers
from paceline.launch.crew import slots
from paceline.launch.muster import MOST_WORKERS
from paceline.terms.activity import Board, Phase
from paceline.terms.errors import UsageError
from paceline.terms.plan import Plan

NEW = Plan("train.py")


@pytest.mark.parametrize(
    ("processes", "text", "expected"),
    [
        (None, "2:6", (6, 2, 6)),
        (3, "2:6", (3, 2, 6)),
        (None, "4", (4, 0, 0)),
        (4, "4", (4, 0, 0)),
        (None, "1:1", (1, 0, 0)),
        (1, "1:4", (1, 1, 4)),
        (100, "100", (100, 0, 0)),
    ],
)
def test_limits_that_are_given(processes: int | None, text: str, expected: tuple[int, int, int]) -> None:
    assert workers(processes, text, NEW, False) == expected


@pytest.mark.parametrize(
    ("processes", "text"),
    [
        (7, "2:6"),
        (1, "2:6"),
        (3, "4"),
        (None, "0:4"),
        (None, "0"),
        (None, "4:2"),
        (None, "-1:2"),
        (None, "a:b"),
        (None, "2:"),
        (None, ":2"),
        (None, "1:2:3"),
        (None, f"1:{MOST_WORKERS + 1}"),
    ],
)
def test_limits_that_cannot_be(processes: int | None, text: str) -> None:
    with pytest.raises(UsageError) as refused:
        workers(processes, text, NEW, False)
    assert refused.value.code == "PL105"


@pytest.mark.parametrize(
    ("default", "processes", "expected"),
    [
        (True, None, (1, 0, 0)),
        (True, 4, (4, 1, 4)),
        (True, MOST_WORKERS + 1, (MOST_WORKERS + 1, 0, 0)),
        (False, 4, (4, 0, 0)),
    ],
)
def test_the_default(default: bool, processes: int | None, expected: tuple[int, int, int]) -> None:
    assert workers(processes, None, NEW, False, default) == expected


@pytest.mark.parametrize("default", [True, False])
def test_a_plan_keeps_what_it_says(default: bool) -> None:
    exact: dict[str, Any] = {"processes": 4}
    elastic = exact | {"workers_min": 2, "workers_max": 4}
    assert workers(None, None, Plan("a.py", **exact), True, default) == (4, 0, 0)
    assert workers(None, None, Plan("a.py", **elastic), True, default) == (4, 2, 4)
    assert workers(6, None, Plan("a.py", **elastic), True, default) == (6, 2, 6)
    assert workers(1, None, Plan("a.py", **elastic), True, default) == (1, 1, 4)
    assert workers(None, "4", Plan("a.py", **elastic), True, default) == (4, 0, 0)


def test_the_board_has_room_for_replacements() -> None:
    assert slots(Plan("a.py", processes=3)) == 3
    assert slots(Plan("a.py", processes=3, workers_min=1, workers_max=3)) == 16
    assert slots(Plan("a.py", processes=3, workers_min=1, workers_max=12)) == 24
    assert slots(Plan("a.py", processes=3, workers_min=1, workers_max=62)) == 62


def test_the_launcher_speaks_the_words_of_the_coordinator() -> None:
    assert (line.CERTIFICATE, line.STATUS) == (Control.CERTIFICATE, Control.STATUS)


def test_a_page_begins_anew_for_another_process() -> None:
    board = Board.private(3)
    fresh = board.read(1)
    for slot in range(3):
        activity = board.activity(slot)
        activity.register(7)
        activity.progress(5, 1, 64)
        activity.enter(Phase.WAIT, "backward", 0b101)
        activity.beat("train.py:3", 0)
    board.clear(1)
    assert board.read(1) == fresh
    assert [board.read(slot).pid for slot in range(3)] == [7, 0, 7]
    assert board.read(2).where == "train.py:3"
