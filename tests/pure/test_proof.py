"""The proof of the ledger, on lines in memory: what a member that was left out had open is nobody's loss."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.train.proof import problems

Line = dict[str, Any]
ROWS, BATCH = 40, 10


def group(number: int, step: int, *members: str) -> Line:
    return {"k": "g", "g": number, "s": step, "members": list(members), "rank": 0}


def part(step: int, rank: int, size: int) -> list[int]:
    """Loader 0, epoch 0: this rank's share of the batch of a step."""
    first, share = (step - 1) * BATCH, BATCH // size
    return [0, 0, first, BATCH, first + rank * share, share]


def commits(first: int, last: int, rank: int, size: int) -> list[Line]:
    return [{"k": "c", "s": step, "r": [part(step, rank, size)]} for step in range(first, last + 1)]


def walked(rows: int, complete: bool, order: int) -> Line:
    return {"k": "e", "l": 0, "e": 0, "rows": rows, "batches": rows // BATCH, "complete": complete, "order": order}


@pytest.fixture
def ledgers() -> dict[str, list[Line]]:
    """worker-1 is left out with step 3 open, which worker-0 does alone."""
    end = {"k": "x", "s": 4, "r": []}
    return {
        "worker-0": [
            group(1, 0, "worker-0", "worker-1"),
            *commits(1, 2, 0, 2),
            group(2, 2, "worker-0"),
            *commits(3, 4, 0, 1),
            walked(ROWS, True, 7),
            end,
        ],
        "worker-1": [
            group(1, 0, "worker-0", "worker-1"),
            *commits(1, 2, 1, 2),
            walked(30, False, 5),
            {"k": "x", "s": 2, "r": [part(3, 1, 2)]},
        ],
    }


def test_what_was_open_where_a_member_was_left_out(ledgers: dict[str, list[Line]]) -> None:
    assert problems(ledgers) == []


def test_rows_that_are_missing_are_missed(ledgers: dict[str, list[Line]]) -> None:
    del ledgers["worker-0"][4]
    assert problems(ledgers)


def test_a_step_that_one_who_was_left_out_has_committed_is_found(ledgers: dict[str, list[Line]]) -> None:
    ledgers["worker-1"][3:] = commits(3, 3, 1, 2)
    assert any("by several groups" in problem for problem in problems(ledgers))
    assert any("read twice" in problem for problem in problems(ledgers))


def test_one_who_stayed_and_walked_another_order_is_found(ledgers: dict[str, list[Line]]) -> None:
    ledgers["worker-1"] = [*ledgers["worker-1"][:3], walked(ROWS, True, 5)]
    assert any("different orders" in problem for problem in problems(ledgers))
