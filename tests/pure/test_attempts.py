"""The ledgers of a run that was begun again, read as one: what counts is what was not done again."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.train.attempts import Lines, joined
from paceline.train.proof import problems

Line = dict[str, Any]


def commit(step: int, rank: int, size: int, rows: int = 12, epoch: int = 0) -> Line:
    """Step `step` of `rows` rows, divided evenly."""
    start, mine = (step - 1) * rows, rows // size
    return {"k": "c", "s": step, "r": [[0, epoch, start, rows, start + rank * mine, mine]]}


def viewed(epoch: int, rank: int, size: int) -> Line:
    return {"k": "v", "r": [[1, epoch, 0, 12, rank * 12 // size, 12 // size]]}


def end(rows: int, loader: int = 0, epoch: int = 0) -> Line:
    return {"k": "e", "l": loader, "e": epoch, "rows": rows, "batches": rows // 12, "complete": True, "order": 1}


def resumed(step: int, rows: int = 0) -> Line:
    return {"k": "r", "s": step, "r": [[0, 0, 0, rows, 0, rows]]}


def ranks(size: int, first: int, last: int, *, resume: int | None = None, ends: int = 0) -> Lines:
    """An attempt of so many ranks that has done these steps."""
    begin = [resumed(resume, resume * 12)] if resume is not None else []
    steps = range(first, last + 1)
    return {
        f"worker-{rank}": [*begin, *(commit(step, rank, size) for step in steps), *([end(ends)] if ends else [])]
        for rank in range(size)
    }


def test_one_attempt_is_as_it_is() -> None:
    alone = ranks(2, 1, 3, ends=36)
    assert joined([alone]) is alone
    assert not problems(alone)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 4)])
def test_steps_that_were_done_again_count_once(sizes: tuple[int, int]) -> None:
    first, second = ranks(sizes[0], 1, 7), ranks(sizes[1], 5, 10, resume=4, ends=120)
    assert not problems(joined([first, second]))


def test_three_attempts_each_from_before_the_last_ones_end() -> None:
    attempts = [ranks(2, 1, 7), ranks(3, 5, 9, resume=4), ranks(1, 4, 10, resume=3, ends=120)]
    assert not problems(joined(attempts))


def test_an_attempt_that_began_afresh_forgets_those_before_it() -> None:
    assert not problems(joined([ranks(2, 1, 7), ranks(2, 1, 10, ends=120)]))
    assert not problems(joined([ranks(2, 1, 7), ranks(2, 1, 8), ranks(3, 7, 10, resume=6, ends=120)]))


def test_a_run_that_goes_on_from_another_ones_checkpoint_proves_its_own_part() -> None:
    assert not problems(ranks(2, 5, 10, resume=4, ends=120))
    wrong = ranks(2, 6, 10, resume=4, ends=120)
    assert any("step 6 was committed where step 5 was expected" in problem for problem in problems(wrong))


def test_a_gap_between_attempts_is_found() -> None:
    found = problems(joined([ranks(2, 1, 3), ranks(2, 6, 10, resume=5, ends=120)]))
    assert any("step 4 was committed by nobody" in problem for problem in found)
    assert any("rows 36..59 were read by no rank" in problem for problem in found)


def test_rows_that_are_trained_on_in_both_attempts_are_found() -> None:
    second = ranks(2, 5, 10, resume=4, ends=120)
    for lines in second.values():
        lines[1]["r"][0][4] -= 24
    assert any("read twice" in problem for problem in problems(joined([ranks(2, 1, 4), second])))


def test_an_evaluation_after_the_checkpoint_counts_where_it_was_done_last() -> None:
    first, again = ranks(2, 1, 4), ranks(2, 5, 6, resume=4, ends=72)
    for rank in range(2):
        first[f"worker-{rank}"] += [viewed(0, rank, 2), end(12, loader=1)]
    assert not problems(joined([first, again]))
    for rank in range(2):
        again[f"worker-{rank}"][1:1] = [viewed(0, rank, 2), end(12, loader=1)]
    assert not problems(joined([first, again]))


def test_groups_of_elastic_attempts_are_told_apart() -> None:
    def elastic(size: int, first: int, last: int, resume: int | None, ends: int = 0) -> Lines:
        made = ranks(size, first, last, resume=resume, ends=ends)
        group = {"k": "g", "g": 1, "s": 0, "members": sorted(made), "rank": 0}
        return {name: [group, *lines] for name, lines in made.items()}

    first, second = elastic(3, 1, 7, None), elastic(2, 5, 10, 4, ends=120)
    assert not problems(joined([first, second]))
    second["worker-7"] = [commit(6, 0, 2)]
    assert any(
        "no member of group" in problem or "expected" in problem for problem in problems(joined([first, second]))
    )
