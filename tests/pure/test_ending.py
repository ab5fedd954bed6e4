"""How a run ends, without a process: exits, signals and time in, instructions out."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from paceline.launch import ending as ends
from paceline.launch.ending import Abort, Ending, RequestStop, Say, Signal, cause, differing, exit_code, left_early

INT, TERM = signal.SIGINT, signal.SIGTERM


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions if not isinstance(action, Say)]


def test_ranks_that_end_well_need_nothing() -> None:
    ending = Ending()
    assert ending.exited(0, 1.0, well=True) == []
    assert ending.tick(1e9) == []
    assert not ending.ours


def test_a_lost_rank_aborts_then_terminates_then_kills_within_two_seconds() -> None:
    ending = Ending()
    assert ending.exited(1, 10.0, well=False) == [Abort(1)]
    assert ending.tick(10.9) == []
    assert ending.tick(11.0) == [Signal(TERM)]
    assert ending.tick(11.5) == [Signal(signal.SIGKILL)]
    assert ending.tick(99.0) == []


def test_only_the_first_failure_aborts() -> None:
    ending = Ending()
    assert ending.failed(2, 1.0) == [Abort(2)]
    assert ending.exited(2, 1.1, well=False) == []
    assert ending.exited(0, 1.2, well=False) == []
    assert ending.mistake(1.3) == []


def test_ranks_on_their_way_out_have_time_for_farewells_and_deaf_ones_do_not() -> None:
    ending = Ending()
    assert ending.failed(0, 1.0) == [Abort(0)]
    leaving = frozenset({0, 2})
    assert ending.tick(1.0 + ends.WITNESS_GRACE, leaving) == [Signal(TERM, spare=leaving)]
    assert ending.tick(1.0 + ends.WITNESS_GRACE + ends.TERM_GRACE) == [Signal(signal.SIGKILL, spare=leaving)]
    assert ending.tick(0.9 + ends.FAREWELL_GRACE) == []
    assert ending.tick(1.0 + ends.FAREWELL_GRACE) == [Signal(TERM)]
    assert ending.tick(1.0 + ends.FAREWELL_GRACE + ends.TERM_GRACE) == [Signal(signal.SIGKILL)]
    assert ending.deadline is None


def test_three_times_ctrl_c() -> None:
    ending = Ending()
    assert kinds(ending.signalled(INT, 1.0, in_loop=True)) == [RequestStop]
    assert ending.tick(1e6) == []  # a step may take as long as it takes
    assert kinds(ending.signalled(INT, 2.0, in_loop=True)) == [Abort, Signal]
    assert ending.signalled(INT, 2.1, in_loop=True) == [Signal(signal.SIGKILL)]
    assert ending.signalled(INT, 2.2, in_loop=True) == []


def test_sigterm_has_a_deadline() -> None:
    ending = Ending()
    assert kinds(ending.signalled(TERM, 1.0, in_loop=True)) == [RequestStop]
    assert ending.tick(10.9) == []
    assert kinds(ending.tick(11.0)) == [Abort]
    assert kinds(ending.tick(12.0)) == [Signal]
    assert ending.tick(12.5) == [Signal(signal.SIGKILL)]


def test_a_script_that_is_not_in_its_loop_is_interrupted_like_plain_python() -> None:
    ending = Ending()
    assert Signal(INT, alone=True) in ending.signalled(INT, 1.0, in_loop=False)
    assert ending.failed(1, 1.1) == []  # an import that is interrupted raises anything
    assert ending.ours
    assert kinds(ending.tick(1.0 + ends.KEYBOARD_GRACE)) == [Abort]


KILLED = {"rank": 1, "signal": 9, "mono": 5.0}
LEFT = {"rank": 1, "exit": 0, "mono": 5.0}
RAISED = {"rank": 2, "type": "ValueError", "message": "x", "mono": 4.0}
WITNESS = {"rank": 0, "type": "PeerLost", "code": "PL403", "message": "rank 1 died", "mono": 1.0}
ECHO = {"rank": 3, "type": "WireError", "code": "PL406", "message": "gloo", "mono": 2.0}
OURS = {"rank": 4, "signal": 15, "witness": True, "mono": 0.5}


@pytest.mark.parametrize(
    ("failures", "first", "code"),
    [
        ([], None, ends.OK),
        ([WITNESS, KILLED], KILLED, ends.LOST),
        ([OURS, KILLED, ECHO], KILLED, ends.LOST),
        ([WITNESS, LEFT], LEFT, ends.LOST),
        ([KILLED, RAISED], RAISED, ends.FAILED),
        ([ECHO, WITNESS], ECHO, ends.FAILED),
        ([WITNESS], WITNESS, ends.FAILED),
    ],
)
def test_the_cause_is_the_earliest_that_is_no_consequence(
    failures: list[dict[str, Any]], first: dict[str, Any] | None, code: int
) -> None:
    assert cause(failures) == first
    assert exit_code(0, None, failures) == code
    assert exit_code(INT, None, failures) == ends.INTERRUPTED
    assert exit_code(TERM, None, failures) == ends.TERMINATED


def test_a_rank_that_left_early_is_named_and_not_the_one_that_missed_it() -> None:
    finding = left_early([0], [WITNESS | {"rank": 1}, OURS])
    assert finding is not None
    assert finding.code == "PL501"
    assert finding.message.startswith("rank 0 ended its script")
    assert exit_code(0, finding, [WITNESS]) == ends.MISTAKE
    assert left_early([], [WITNESS]) is None
    assert left_early([0], [WITNESS, KILLED]) is None
    assert left_early([0], [RAISED]) is None
    assert left_early([0], [OURS]) is None


def test_differing_hashes() -> None:
    assert differing({0: "a", 1: "a"}) is None
    finding = differing({0: "aaa", 1: "bbb", 2: "bbb"})
    assert finding is not None
    assert finding.code == "PL507"
    assert "rank 0: aaa; ranks 1-2: bbb" in finding.message
