"""What an elastic run does about a loss, without a process: events and time in, instructions out."""

from __future__ import annotations

from typing import Any

from paceline.launch.muster import (
    BURST,
    REFILL,
    UNBORN,
    Dismiss,
    GiveUp,
    Loss,
    Muster,
    Standing,
    Start,
    Tell,
)

KILLED = Loss("was killed by SIGKILL", 2, 118)


def told(actions: list[Any]) -> str:
    return " / ".join(action.text for action in actions if isinstance(action, Tell))


def but_words(actions: list[Any]) -> list[Any]:
    return [action for action in actions if not isinstance(action, Tell)]


def test_a_loss_is_told_and_made_good() -> None:
    muster = Muster(range(4), 1, 4)
    actions = muster.lost(2, KILLED, 10.0)
    assert but_words(actions) == [Start(4)]
    assert told(actions) == (
        "worker-2 (rank 2) was killed by SIGKILL; 3 workers go on from step 118; worker-4 is being started"
    )
    assert told(muster.joined(4)) == "worker-4 takes part; 4 workers"
    assert muster.joined(4) == []
    assert but_words(muster.lost(0, KILLED, 11.0)) == [Start(5)]


def test_nobody_left_ends_the_run_although_a_replacement_is_starting() -> None:
    muster = Muster(range(2), 1, 2)
    muster.lost(0, KILLED, 1.0)
    actions = muster.lost(1, KILLED, 1.1)
    assert [type(action) for action in actions] == [Tell, GiveUp]
    assert "no worker is left" in told(actions)


def test_a_member_elsewhere_keeps_the_state() -> None:
    muster = Muster(range(1), 1, 4)
    muster.elsewhere = 1
    actions = muster.lost(0, KILLED, 1.0)
    assert but_words(actions) == [Start(1)]
    assert "1 worker goes on" in told(actions)


def test_too_few_wait() -> None:
    muster = Muster(range(3), 3, 4)
    assert "2 workers of at least 3 are left, so the run waits; worker-3 is being" in told(muster.lost(0, KILLED, 1.0))


def test_replacements_are_rationed() -> None:
    muster = Muster(range(8), 1, 8)
    started = 0
    for number in range(BURST):
        started += Start(8 + number) in muster.lost(number, KILLED, 100.0)
    assert started == BURST
    late = muster.lost(BURST, KILLED, 100.0)
    assert but_words(late) == []
    assert "another is started in 6.0 s" in told(late)
    assert muster.tick(100.0 + REFILL - 0.1) == []
    assert but_words(muster.tick(100.0 + REFILL)) == [Start(8 + BURST)]
    assert muster.tick(1e6) == []


def test_workers_that_die_as_they_start_are_given_up() -> None:
    muster = Muster(range(2), 1, 2)
    actions = muster.lost(0, KILLED, 0.0)
    for number in range(2, 2 + UNBORN - 1):
        actions = muster.lost(number, KILLED, 60.0 * number)
        assert but_words(actions) == [Start(number + 1)]
        assert "before it took part" in told(actions)
    last = 2 + UNBORN - 1
    actions = muster.lost(last, KILLED, 600.0)
    assert but_words(actions) == []
    assert "no more are started, because 5 in a row were lost" in told(actions)
    assert muster.tick(1e6) == []


def test_one_that_takes_part_makes_the_others_forgiven() -> None:
    muster = Muster(range(2), 1, 2)
    muster.lost(0, KILLED, 0.0)
    for number in range(2, 10):
        muster.joined(number)
        assert Start(number + 1) in muster.lost(number, KILLED, 60.0 * number)


def test_too_few_and_none_to_come_ends_the_run() -> None:
    muster = Muster(range(2), 2, 2)
    muster.lost(0, KILLED, 0.0)
    for number in range(2, 1 + UNBORN):
        muster.lost(number, KILLED, 60.0 * number)
    assert isinstance(muster.lost(1 + UNBORN, KILLED, 600.0)[-1], GiveUp)


def test_who_never_took_part_is_dismissed_when_the_others_have_finished() -> None:
    muster = Muster(range(2), 1, 3)
    assert muster.room == 1
    assert muster.add(1) == [Start(2)]
    assert muster.room == 0
    assert muster.finished(0, 5.0) == []
    assert muster.finished(1, 5.1) == [Dismiss(frozenset({2}))]
    assert muster.tick(5.2) == []
    assert muster.tick(5.7) == [Dismiss(frozenset({2}), now=True)]
    assert muster.lost(2, KILLED, 5.8) == []
    assert muster.tick(9.0) == []


def test_nobody_is_replaced_at_the_end_of_the_run_or_while_it_stops() -> None:
    muster = Muster(range(3), 1, 3)
    assert but_words(muster.lost(0, KILLED, 1.0, replace=False)) == []
    muster.finished(1, 2.0)
    actions = muster.lost(2, KILLED, 2.1)
    assert but_words(actions) == []
    assert "the run is at its end" in told(actions)


def test_who_leaves_is_not_replaced_and_does_not_end_the_run() -> None:
    muster = Muster(range(3), 1, 3)
    assert told(muster.left(1, 1.0)) == "worker-1 leaves the run"
    assert muster.finished(1, 1.1) == []
    assert muster.standing(1) is Standing.LEFT
    assert muster.room == 1
    assert Start(3) in muster.lost(0, KILLED, 2.0)


# ---- replicas that are split over several workers ------------------------------------------------------------------------
def test_a_replica_is_lost_and_made_good_whole() -> None:
    muster = Muster(range(4), 2, 4, unit=2)
    actions = muster.lost(3, KILLED, 10.0)
    assert but_words(actions) == [Dismiss(frozenset({2}), now=True), Start(4), Start(5)]
    assert "worker-2 of the same replica is ended; 2 workers go on from step 118; worker-4, worker-5 are" in told(
        actions
    )
    assert muster.lost(2, KILLED, 10.1) == []
    assert muster.standing(2) is Standing.LOST
    muster.joined(4)
    muster.joined(5)
    assert muster.room == 0


def test_a_replica_that_dies_as_it_starts_is_started_again_whole() -> None:
    muster = Muster(range(4), 2, 4, unit=2)
    muster.lost(0, KILLED, 1.0)
    actions = muster.lost(5, KILLED, 2.0)
    assert but_words(actions) == [Dismiss(frozenset({4}), now=True), Start(6), Start(7)]
    assert muster.lost(4, KILLED, 2.1) == []


def test_who_leaves_takes_its_replica_along() -> None:
    muster = Muster(range(4), 2, 4, unit=2)
    assert but_words(muster.left(1, 1.0)) == [Dismiss(frozenset({0}), now=True)]
    assert muster.lost(0, KILLED, 1.1) == []
    assert muster.room == 2


def test_the_last_replica_takes_the_state_with_it() -> None:
    muster = Muster(range(4), 2, 4, unit=2)
    muster.lost(0, KILLED, 1.0)
    assert isinstance(muster.lost(3, KILLED, 1.1)[-1], GiveUp)
