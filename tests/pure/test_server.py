"""The parameter server's core, rule by rule; whole runs are in ``test_server_runs``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.exchange.server import (
    Apply,
    Ask,
    Closed,
    Damp,
    Drop,
    Event,
    Go,
    Grant,
    Instruction,
    Join,
    Keep,
    Leave,
    Meet,
    Met,
    Over,
    Piece,
    Refuse,
    Rule,
    ServerCore,
    Skip,
    Step,
)
from paceline.terms.errors import UsageError


class Table:
    """A core, and workers 0, 1, … that speak when they are told to."""

    def __init__(self, rule: Rule, workers: int = 0, core: type[ServerCore] = ServerCore) -> None:
        self.core = core(rule)
        self.seq: dict[str, int] = {}
        self.holds: dict[str, list[Piece]] = {}
        self.last: list[Instruction] = []
        for number in range(workers):
            self.join(number)

    def tell(self, event: Event) -> list[Instruction]:
        self.last = self.core.handle(event, 0.0)
        for message in self.last:
            if isinstance(message, Grant) and message.piece:
                self.holds.setdefault(message.worker, []).append(message.piece)
        return self.last

    def join(self, number: int) -> list[Instruction]:
        return self.tell(Join(f"worker-{number}"))

    def ask(self, number: int, epoch: int = 0, *, ahead: bool = False, loader: int = 0) -> Piece | str | None:
        """The piece, or None, or 'held'."""
        answers = [m for m in self.tell(Ask(f"worker-{number}", loader, epoch, ahead)) if isinstance(m, Grant)]
        mine = [m for m in answers if m.worker == f"worker-{number}"]
        return mine[0].piece if mine else "held"

    def step(self, number: int, covers: Iterable[Piece] | None = None, **more: Any) -> list[Instruction]:
        """Push what it holds, or else `covers`."""
        name = f"worker-{number}"
        covers = tuple(self.holds.pop(name, ()) if covers is None else covers)
        self.seq[name] = self.seq.get(name, 0) + 1
        return self.tell(Step(name, self.seq[name], more.pop("weight", 1.0), covers, **more))

    def end(self, number: int, batches: int, epoch: int = 0) -> list[Instruction]:
        self.holds[f"worker-{number}"] = []
        return self.tell(Over(f"worker-{number}", 0, epoch, batches))

    def went(self) -> dict[str, Go]:
        return {m.worker: m for m in self.last if isinstance(m, Go)}

    def applied(self) -> list[Apply]:
        return [m for m in self.last if isinstance(m, Apply)]

    def refused(self) -> list[tuple[str, str]]:
        return [(m.worker, m.code) for m in self.last if isinstance(m, Refuse)]


def piece(batch: int, part: int = 0, parts: int = 1, epoch: int = 0, loader: int = 0) -> Piece:
    return Piece(loader, epoch, batch, part, parts)


# ---- bounded staleness --------------------------------------------------------------------------------------------------
def pushes_before_held(table: Table, fast: int) -> int:
    for count in itertools.count(1):
        table.ask(fast)
        table.step(fast)
        if f"worker-{fast}" not in table.went():
            return count
        if count > 50:
            return count
    raise AssertionError


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_a_worker_makes_the_ticks_that_the_bound_allows_and_not_one_more(staleness: int) -> None:
    table = Table(Rule(staleness), 2)
    table.ask(0)
    assert pushes_before_held(table, 1) == staleness + 1
    table.step(0)
    assert table.went().keys() == {"worker-0", "worker-1"}
    assert {go.version for go in table.went().values()} == {staleness + 2}, "both read everything"


def test_without_a_bound_nobody_is_held() -> None:
    table = Table(Rule(math.inf), 2)
    table.ask(0)
    assert pushes_before_held(table, 1) > 50


def test_who_is_released_is_where_the_first_are() -> None:
    table = Table(Rule(2), 3)
    table.ask(0)
    table.ask(1)
    assert pushes_before_held(table, 2) == 3
    table.step(0)
    assert table.went()["worker-0"].clock == 2, "it reads fresh parameters, so it does not stay behind"
    table.step(1)
    assert table.went()["worker-1"].clock == 3
    assert table.went()["worker-2"].clock == 3


def test_the_dead_leave_the_minimum_at_once() -> None:
    table = Table(Rule(1), 2)
    table.ask(0)
    pushes_before_held(table, 1)
    table.tell(Leave("worker-0"))
    assert "worker-1" in table.went()


def test_who_joins_enters_where_the_first_are() -> None:
    table = Table(Rule(1), 1)
    for _ in range(10):
        table.ask(0)
        table.step(0)
    table.join(1)
    table.ask(1)
    assert pushes_before_held(table, 0) == 2, "it does not hold others for ticks that it never had"
    table.step(1)
    assert {go.clock for go in table.went().values()} == {12}


def test_who_has_not_begun_holds_nobody() -> None:
    assert pushes_before_held(Table(Rule(1), 2), 0) > 50


def test_who_is_in_a_meeting_holds_nobody() -> None:
    table = Table(Rule(1), 2)
    table.ask(1)
    table.step(1)
    table.tell(Meet("worker-1", "somewhere"))
    assert pushes_before_held(table, 0) > 50


def test_who_is_past_its_pass_holds_nobody() -> None:
    table = Table(Rule(1), 2)
    table.ask(1)
    table.step(1)
    table.ask(1)
    table.end(1, 1)
    assert table.ask(1) is None
    table.core.handle(Ask("worker-0", 0, 1), 0.0)
    for seq in range(1, 50):
        out = table.core.handle(Step("worker-0", seq, 1.0), 0.0)
        assert any(isinstance(m, Go) for m in out)


def test_who_waits_for_a_piece_holds_nobody() -> None:
    table = Table(Rule(1), 2)
    table.ask(1)
    table.step(1)
    ahead = [table.ask(0, ahead=batch > 0) for batch in range(6)]
    table.ask(1)
    table.end(1, 7)
    assert table.ask(1) == "held"
    for each in ahead:
        assert isinstance(each, Piece)
        table.step(0, [each])
        assert "worker-0" in table.went()
    assert table.went()["worker-0"].clock > 3


def test_what_a_worker_reads_holds_its_own_updates() -> None:
    table = Table(Rule(4), 3)
    for number in (0, 1, 2, 1, 1, 0, 2):
        if table.ask(number) != "held":
            (update,) = (m for m in table.step(number) if isinstance(m, Apply))
            assert table.went()[f"worker-{number}"].version >= update.version


def test_who_begins_again_reads_first() -> None:
    table = Table(Rule(1), 2)
    table.tell(Meet("worker-1", "somewhere"))
    for _ in range(5):
        table.ask(0)
        table.step(0)
    table.tell(Meet("worker-0", "somewhere"))
    assert Go("worker-1", 0, 5, 0, False, 0) in table.last
    table.join(2)
    table.ask(0)
    table.step(0)
    table.ask(2)
    assert table.last == [Go("worker-2", 0, 6, 6, False, 0), Grant("worker-2", piece(6))]


def test_age_counts_updates_between_reading_and_applying() -> None:
    table = Table(Rule(math.inf, damp=Damp("inverse")), 2)
    table.ask(0)
    for _ in range(3):
        table.ask(1)
        table.step(1)
    (update,) = (m for m in table.step(0) if isinstance(m, Apply))
    assert (update.parts[0].read, update.version, update.parts[0].scale) == (0, 4, 1 / 3)
    assert table.went()["worker-0"].tau == 3
    assert table.core.histogram == {"worker-0": {3: 1}, "worker-1": {0: 3}}


# ---- pieces --------------------------------------------------------------------------------------------------------------
def test_batches_are_lent_in_order_and_what_comes_back_first() -> None:
    table = Table(Rule(math.inf), 3)
    assert [table.ask(number) for number in (0, 1, 2)] == [piece(0), piece(1), piece(2)]
    table.tell(Leave("worker-1"))
    assert table.ask(0, ahead=True) == piece(1)
    assert table.ask(0, ahead=True) == piece(3)


def test_the_end_of_a_pass_waits_for_the_last_piece_and_none_is_lost() -> None:
    table = Table(Rule(math.inf), 2)
    table.ask(0)
    table.ask(1)
    table.step(1)
    table.ask(1)
    table.end(1, 2)
    assert table.ask(1) == "held", "worker-0 has batch 0, and may die"
    assert table.tell(Leave("worker-0")) == [Grant("worker-1", piece(0))]
    out = table.step(1)
    assert Closed(0, 0, 2) in out
    assert table.ask(1) is None


def test_who_looks_ahead_is_told_at_once() -> None:
    table = Table(Rule(math.inf), 2)
    table.ask(0)
    table.ask(1)
    table.ask(1, ahead=True)
    table.end(1, 2)
    assert table.ask(0, ahead=True) is None


def test_a_pass_without_batches_is_over() -> None:
    for rule in (Rule(), Rule(1)):
        table = Table(rule, 1)
        table.ask(0)
        assert table.end(0, 0) == [Closed(0, 0, 0)]
        assert table.ask(0) is None


def test_the_number_of_batches_is_found_once() -> None:
    table = Table(Rule(1), 3)
    table.ask(0)
    table.step(0)
    assert [m for m in table.tell(Over("worker-1", 0, 0, 0)) if isinstance(m, Refuse)] != [], "batch 0 is trained"
    assert table.refused() == [("worker-1", "PL306")]
    table.tell(Over("worker-0", 0, 0, 5))
    table.tell(Over("worker-0", 0, 0, 5))
    assert not table.refused()
    (refusal,) = table.tell(Over("worker-2", 0, 0, 6))
    assert isinstance(refusal, Refuse)
    assert "worker-0" in refusal.message
    assert "worker-2" in refusal.message


def test_what_is_skipped_is_for_this_pass_only() -> None:
    table = Table(Rule(1), 2)
    table.ask(0)
    table.tell(Skip("worker-0", (piece(0), piece(7))))
    assert table.ask(1, epoch=1) == piece(0, epoch=1)
    assert table.ask(0, epoch=0) == piece(0)


def test_what_a_worker_takes_to_its_end_is_for_whoever_asks() -> None:
    table = Table(Rule(1), 2)
    table.ask(0)
    assert table.ask(1, epoch=1) == piece(0, epoch=1)
    table.tell(Leave("worker-0"))
    assert table.ask(1, epoch=1) == piece(0, epoch=0), "others have left the pass, and the batch is not trained"


# ---- synchronous ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_are_summed_in_their_order(order: tuple[int, ...]) -> None:
    table = Table(Rule(), 3)
    for number in range(3):
        assert table.ask(number) == piece(0, number, 3)
    for number in order:
        assert not table.applied()
        table.step(number)
    (update,) = table.applied()
    assert [part.covers for part in update.parts] == [(piece(0, i, 3),) for i in range(3)]
    assert {go.version for go in table.went().values()} == {1}
    assert all(go.applied and go.tau == 0 for go in table.went().values())


def test_a_part_of_the_dead_is_done_by_one_who_waits() -> None:
    table = Table(Rule(), 3)
    for number in range(3):
        table.ask(number)
    table.step(0)
    table.step(1)
    out = table.tell(Leave("worker-2"))
    assert out == [Keep("worker-0", 1), Go("worker-0", 1, 0, 0, False, 0)]
    assert table.ask(0) == piece(0, 2, 3)
    assert [(p.worker, p.seq) for p in next(m for m in table.step(0) if isinstance(m, Apply)).parts] == [
        *(("worker-0", 1), ("worker-1", 1), ("worker-0", 2))
    ]


def test_what_the_dead_have_delivered_stays() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(1)
    assert table.tell(Leave("worker-1")) == [Keep("worker-1", 1)]
    (update,) = (m for m in table.step(0) if isinstance(m, Apply))
    assert [part.worker for part in update.parts] == ["worker-0", "worker-1"]


def test_an_accumulating_script_goes_round_for_its_own_batches_only() -> None:
    table = Table(Rule(), 2)
    for batch in (0, 1):
        for number in (0, 1):
            assert table.ask(number) == piece(batch, number, 2)
    table.step(0)
    table.tell(Leave("worker-1"))
    assert table.ask(0) == piece(0, 1, 2)
    assert table.ask(0) == piece(1, 1, 2)
    third = table.ask(0)
    assert isinstance(third, Piece)
    assert third.parts == 0, "a filler: batch 2 belongs to the next update"
    (update,) = (m for m in table.step(0) if isinstance(m, Apply))
    assert [p.covers for p in update.parts] == [(piece(0, 0, 2), piece(1, 0, 2)), (piece(0, 1, 2), piece(1, 1, 2))]


def test_what_was_looked_ahead_waits_until_its_update() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    ahead = table.ask(0, ahead=True)
    table.step(0, [piece(0, 0, 2)])
    table.tell(Leave("worker-1"))
    assert table.ask(0) == piece(0, 1, 2)
    table.step(0, [piece(0, 1, 2)])
    assert table.core.version == 1
    assert ahead == piece(1, 0, 2)
    table.step(0, [piece(1, 0, 2)])
    assert table.ask(0) == piece(1, 1, 2)


def test_who_comes_late_waits_for_the_next_update_and_reads_it() -> None:
    table = Table(Rule(), 1)
    table.ask(0)
    table.join(1)
    assert table.ask(1) == "held"
    out = table.step(0)
    assert out[-2:] == [Go("worker-1", 0, 1, 1, False, 0), Grant("worker-1", piece(1, 0, 2))]


def test_a_copy_counts_once() -> None:
    table = Table(Rule(backup=1), 3)
    assert [table.ask(n) for n in range(3)] == [piece(0, 0, 2), piece(0, 1, 2), piece(0, 0, 2)]
    table.step(2)
    table.step(1)
    (update,) = table.applied()
    assert [part.worker for part in update.parts] == ["worker-2", "worker-1"]
    out = table.step(0)
    assert out == [Drop("worker-0", 1), Go("worker-0", 1, 1, 1, False, 0)]


def test_a_copy_that_comes_late_in_the_same_update_waits_for_it() -> None:
    table = Table(Rule(backup=1), 3)
    for number in range(3):
        table.ask(number)
    table.step(2)
    assert table.step(0) == [Drop("worker-0", 1)]
    table.step(1)
    assert table.went().keys() == {"worker-0", "worker-1", "worker-2"}


def test_there_is_one_part_at_least() -> None:
    table = Table(Rule(backup=5), 3)
    assert [table.ask(n) for n in range(3)] == [piece(0)] * 3


def test_an_update_without_rows_needs_all() -> None:
    table = Table(Rule(), 3)
    table.step(0)
    table.step(1)
    assert not table.applied()
    table.step(2)
    assert len(table.applied()) == 1
    table.step(2)
    table.step(0)
    table.tell(Leave("worker-1"))
    assert [len(update.parts) for update in table.applied()] == [2]


def test_asynchronous_steps_without_rows_are_one_update_each() -> None:
    table = Table(Rule(1), 2)
    for number in (0, 1, 0):
        table.step(number)
        assert [len(update.parts) for update in table.applied()] == [1]


def test_a_second_optimizer_steps_without_whoever_came_between() -> None:
    table = Table(Rule(), 2)
    for batch in range(2):
        for number in (0, 1):
            assert table.ask(number) == piece(batch, number, 2)
        table.step(0)
        table.step(1)
        if batch == 1:
            table.join(2)
            assert table.ask(2) == "held"
        table.step(0, ())
        assert not table.applied()
        table.step(1, ())
        assert len(table.applied()) == 1
    assert Grant("worker-2", piece(2, 0, 3)) in table.last


def test_a_second_optimizer_may_be_left_out_again() -> None:
    table = Table(Rule(), 2)
    for covers in (None, (), None, ()):
        for number in (0, 1):
            if covers is None:
                table.ask(number)
        for number in (0, 1):
            table.step(number, covers)
    for number in (0, 1):
        table.ask(number)
    for number in (0, 1):
        table.step(number)
    assert table.core.version == 5
    assert table.ask(0) == "held", "a step of the second one is due"
    assert table.ask(1) != "held", "it is not: both ask for rows"


def test_a_worker_that_holds_rows_of_one_loader_is_not_held_at_the_other() -> None:
    table = Table(Rule(), 1)
    table.ask(0, loader=1)
    table.join(1)
    assert table.ask(0) == piece(0, 0, 2)
    assert table.ask(1) == piece(0, 1, 2)
    mine = table.ask(1, loader=1)
    assert isinstance(mine, Piece)
    assert mine.parts == 0, "a filler, so that its script comes to its step"
    table.step(0)
    table.step(1)
    assert len(table.applied()) == 1


def test_who_is_needed_for_the_other_loader_gets_there() -> None:
    table = Table(Rule(), 1)
    first = table.ask(0)
    table.end(0, 1)
    table.tell(Skip("worker-0", (piece(0),)))
    table.join(1)
    assert first == piece(0)
    assert table.ask(0) == piece(0, 0, 2)
    assert table.ask(0, loader=1) == piece(0, 0, 2, loader=1)
    assert table.ask(1) == piece(0, 1, 2)
    table.step(1)
    table.step(0)
    table.tell(Leave("worker-1"))
    table.tell(Leave("worker-0"))
    table.join(2)
    mine = table.ask(2)
    assert isinstance(mine, Piece)
    assert mine.parts == 0
    assert table.ask(2, loader=1) == piece(0, 1, 2, loader=1)
    table.step(2)
    assert len(table.applied()) == 1


def test_a_pass_that_others_have_left_is_over() -> None:
    table = Table(Rule(), 2)
    assert table.ask(0, epoch=3) == piece(0, 0, 2, epoch=3)
    assert table.ask(1, epoch=2) is None


def test_who_goes_round_is_given_nothing_ahead() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(0)
    table.tell(Leave("worker-1"))
    assert table.ask(0, ahead=True) is None
    assert table.ask(0) == piece(0, 1, 2)


def test_who_waits_for_one_that_has_left_its_step_open_is_not_kept() -> None:
    table = Table(Rule(), 1)
    table.ask(0)
    table.join(1)
    assert table.ask(1) == "held"
    out = table.tell(Meet("worker-0", "in the middle of a step"))
    assert out == [Grant("worker-1", piece(0, parts=0))]


# ---- what is not finite ------------------------------------------------------------------------------------------------------
def test_what_is_not_finite_is_left_out_for_all_and_named() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(1, finite=False)
    table.step(0)
    (update,) = table.applied()
    assert (update.skip, update.blame, update.version) == (True, ("worker-1",), 1)


def test_what_is_not_finite_does_not_get_into_the_buffer() -> None:
    table = Table(Rule(1, buffer=2), 1)
    table.ask(0)
    table.step(0)
    assert table.last[0] == Keep("worker-0", 1)
    table.ask(0)
    table.step(0, finite=False)
    assert [(update.skip, len(update.parts)) for update in table.applied()] == [(True, 1)]
    table.ask(0)
    table.step(0)
    (update,) = table.applied()
    assert [part.seq for part in update.parts] == [1, 3]
    assert not update.skip


# ---- the buffer -----------------------------------------------------------------------------------------------------------
def test_so_many_pushes_make_one_update() -> None:
    table = Table(Rule(math.inf, buffer=3, damp=Damp("polynomial")), 2)
    table.ask(1)
    for count in range(1, 3):
        table.ask(0)
        table.step(0)
        assert not table.applied(), count
        assert table.went()["worker-0"].kept
    table.step(1)
    (update,) = table.applied()
    assert len(update.parts) == 3
    assert {part.scale for part in update.parts} == {1.0}, "all were computed with version 0"
    table.ask(1)
    for _ in range(3):
        table.ask(0)
        table.step(0)
    assert len(table.applied()) == 1
    for _ in range(2):
        table.ask(0)
        table.step(0)
    table.step(1)
    assert table.applied()[0].parts[-1].scale == 2**-0.5


@pytest.mark.parametrize("ends", ["the pass", "a meeting", "the run"])
def test_a_buffer_is_not_kept_beyond(ends: str) -> None:
    table = Table(Rule(math.inf, buffer=10), 1)
    table.ask(0)
    table.step(0)
    if ends == "the pass":
        table.ask(0)
        table.tell(Over("worker-0", 0, 0, 1))
    elif ends == "a meeting":
        table.tell(Meet("worker-0", "end"))
    else:
        table.tell(Leave("worker-0"))
    assert [len(update.parts) for update in table.applied()] == [1]


# ---- what is said twice, too early, or wrongly ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [Rule(), Rule(1)])
def test_a_step_that_comes_again_is_answered_again(rule: Rule) -> None:
    table = Table(rule, 1)
    table.ask(0)
    table.step(0)
    answer = table.went()["worker-0"]
    again = Step("worker-0", 1, 1.0, (piece(0),))
    assert table.tell(again) == [answer]
    table.ask(0)
    table.step(0)
    assert table.tell(again) == []
    assert table.core.version == 2


def test_a_step_that_waits_is_not_answered_twice() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(0)
    assert table.tell(Step("worker-0", 1, 1.0, (piece(0, 0, 2),))) == []
    table.step(1)
    assert len([m for m in table.last if isinstance(m, Go)]) == 2


def test_a_gap_between_steps_is_refused() -> None:
    table = Table(Rule(), 2)
    table.tell(Step("worker-0", 2, 1.0))
    assert table.refused() == [("worker-0", "PL401")]
    assert table.core.live == ("worker-1",)


@pytest.mark.parametrize("rule", [Rule(), Rule(1)])
def test_a_step_of_a_piece_that_is_not_held_counts_nothing(rule: Rule) -> None:
    table = Table(rule, 2)
    mine = table.ask(0)
    assert isinstance(mine, Piece)
    out = table.step(0, [mine, piece(5)])
    assert [type(m) for m in out] == [Drop, Go]
    assert not table.went()["worker-0"].applied
    assert table.ask(1) == mine, "it came back"


@pytest.mark.parametrize("rule", [Rule(), Rule(1)])
def test_what_was_looked_ahead_is_granted_again_after_a_step_that_counts_nothing(rule: Rule) -> None:
    table = Table(rule, 1)
    table.ask(0)
    ahead = table.ask(0, ahead=True)
    table.step(0, [piece(9)])
    assert not table.went()["worker-0"].applied
    again = [table.ask(0), table.ask(0)]
    assert again == [piece(0), ahead]


@pytest.mark.parametrize("rule", [Rule(), Rule(1)])
def test_events_of_those_who_are_not_there_are_ignored(rule: Rule) -> None:
    table = Table(rule, 1)
    before = table.core.state()
    for event in (Ask("worker-9", 0, 0), Step("worker-9", 1, 1.0), Leave("worker-9"), Meet("worker-9", "x")):
        assert table.tell(event) == []
    table.tell(Leave("worker-0"))
    assert table.tell(Join("worker-0")) == [], "a name is never used again"
    assert table.core.live == ()
    assert table.core.state() == before


def test_joining_twice_is_joining() -> None:
    table = Table(Rule(), 1)
    assert table.join(0) == []
    assert table.core.live == ("worker-0",)


# ---- meetings -----------------------------------------------------------------------------------------------------------------
def test_all_meet() -> None:
    table = Table(Rule(1), 3)
    assert table.tell(Meet("worker-1", "end", "b")) == []
    assert table.tell(Meet("worker-0", "end", "a")) == []
    notes = (("worker-0", "a"), ("worker-1", "b"))
    assert table.tell(Leave("worker-2")) == [Met("worker-0", "end", notes), Met("worker-1", "end", notes)]


def test_all_who_meet_read_the_same() -> None:
    table = Table(Rule(math.inf), 2)
    table.ask(0)
    table.step(0)
    table.tell(Meet("worker-0", "end"))
    table.ask(1)
    table.step(1)
    out = table.tell(Meet("worker-1", "end"))
    assert out[0] == Go("worker-0", 1, 2, 1, False, 0)
    assert [type(m) for m in out] == [Go, Met, Met]


def test_two_places_of_the_program_are_refused() -> None:
    table = Table(Rule(), 2)
    table.tell(Meet("worker-0", "end of pass 1"))
    out = table.tell(Meet("worker-1", "evaluation"))
    assert table.refused() == [("worker-1", "PL402")]
    text = next(m.message for m in out if isinstance(m, Refuse))
    assert all(word in text for word in ("worker-0", "worker-1", "end of pass 1", "evaluation"))
    assert any(isinstance(m, Met) for m in out), "the other is now all there are"


def test_a_meeting_and_a_step_that_wait_for_each_other_are_refused() -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(0)
    out = table.tell(Meet("worker-1", "end"))
    assert table.refused() == [("worker-1", "PL402")]
    assert Go("worker-0", 1, 0, 0, False, 0) in out, "it does what the other had"


@pytest.mark.parametrize("covers", [(), (piece(0, parts=0),)])
def test_rows_that_nobody_asks_for_end_the_run(covers: tuple[Piece, ...]) -> None:
    table = Table(Rule(), 2)
    table.ask(0)
    table.ask(1)
    table.step(0)
    table.tell(Leave("worker-1"))
    for _ in range(20):
        if not table.refused():
            assert "worker-0" in table.went(), "it is sent round for the part that came back"
            table.step(0, covers)
    assert table.refused() == [("worker-0", "PL402")]


# ---- restarts -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [Rule(), Rule(2), Rule(2, buffer=3)])
def test_a_checkpoint_counts_what_is_out_as_not_done(rule: Rule) -> None:
    table = Table(rule, 2)
    for _ in range(3):
        for number in (0, 1):
            table.ask(number)
        for number in (0, 1):
            table.step(number)
    table.ask(0)
    state = json.loads(json.dumps(table.core.state()))
    again = Table(rule)
    again.core = ServerCore.load(rule, state)
    assert (again.core.version, again.core.histogram) == (table.core.version, table.core.histogram)
    assert again.core.state() == table.core.state()
    again.join(7)
    assert again.ask(7) == piece(3 if rule.synchronous else 6)
    assert again.core.live == ("worker-7",)


# ---- rules ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"staleness": -1},
        {"staleness": math.nan},
        {"staleness": 0.5},
        {"staleness": "4"},
        {"staleness": True},
        {"backup": -1},
        {"backup": 1.0},
        {"backup": 1, "staleness": 4},
        {"buffer": 0, "staleness": 4},
        {"buffer": 2},
        {"damp": Damp("inverse")},
    ],
)
def test_rules_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        Rule(**wrong)
    assert refused.value.code == "PL203"


@pytest.mark.parametrize("wrong", [{"kind": "linear"}, {"a": -1}, {"a": math.inf}, {"b": math.nan}, {"a": "1"}])
def test_factors_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        Damp(**wrong)
    assert refused.value.code == "PL203"


@given(
    kind=st.sampled_from(["constant", "inverse", "polynomial", "hinge"]),
    a=st.floats(0, 100),
    b=st.floats(0, 100),
    tau=st.integers(0, 10**6),
)
def test_a_fresh_gradient_counts_in_full_and_an_older_one_never_more(kind: Any, a: float, b: float, tau: int) -> None:
    damp = Damp(kind, a, b)
    assert damp(0) == 1
    assert 0 <= damp(tau + 1) <= damp(tau) <= 1


def test_factors_are_those_of_the_papers() -> None:
    assert [Damp("inverse")(tau) for tau in (0, 1, 4)] == [1, 1, 0.25]
    assert [Damp("polynomial", a=0.5)(tau) for tau in (0, 3)] == [1, 0.5]
    assert [Damp("hinge", a=10, b=4)(tau) for tau in (4, 5)] == [1, 1 / 11]
    assert Damp()(10**9) == 1
