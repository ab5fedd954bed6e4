"""Membership: rules one by one on the cores, then whole jobs in the simulator, then the simulator on planted bugs.

``pytest tests/pure/test_membership.py --seeds 20000`` runs more of them, in blocks; a failure names its seed.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest

from paceline.group import coordinator, membership, view
from paceline.group import member as member_module
from paceline.group.journal import decode, encode
from paceline.group.membership import Coordinator
from paceline.group.view import (
    Action,
    Certificate,
    Close,
    Closed,
    Connect,
    Force,
    Identity,
    Journal,
    Kind,
    Leave,
    Limits,
    Meet,
    MemberCore,
    Meta,
    Opened,
    Received,
    Report,
    Send,
    Tick,
    well_formed,
)
from support.membership import Outcome, Violation, World
from support.planted import PLANTED

BLOCK = 250
FOUR = Limits(4, 1, 6)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:
        seeds = metafunc.config.getoption("--seeds")
        blocks = [range(low, min(low + BLOCK, seeds)) for low in range(0, seeds, BLOCK)]
        metafunc.parametrize("block", blocks, ids=[f"{b.start}-{b.stop - 1}" for b in blocks])


# ---- whole jobs -------------------------------------------------------------------------------------------------------
def simulate(seed: int) -> Outcome:
    try:
        return World(seed).run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def test_every_job_ends_with_every_row_once(block: range) -> None:
    outcomes = [simulate(seed) for seed in block]
    assert sum(o.faults for o in outcomes) >= 100 * len(outcomes)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    for seed in range(BLOCK):
        try:
            World(seed, PLANTED[bug]).run()
        except Violation as violation:
            print(f"seed {seed}: {violation}")
            return
    raise AssertionError(f"{BLOCK} seeds did not show that the {bug}")


def test_the_same_seed_gives_the_same_trace_in_any_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom support.membership import World\nprint([World(s).run().trace for s in range(8)])"
    traces = {
        subprocess.run(
            [sys.executable, "-c", code, os.path.join(os.path.dirname(__file__), "..")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }
    here = [World(seed).run().trace for seed in range(8)]
    assert traces == {f"{here}\n"}
    assert len(set(here)) == 8


# ---- the coordinator, rule by rule -------------------------------------------------------------------------------------
def who(number: int, incarnation: str = "") -> Identity:
    return Identity(f"worker-{number}", incarnation or f"{number:032x}")


class Table:
    """A coordinator and what it has said; link n belongs to worker n."""

    def __init__(self, limits: Limits = FOUR) -> None:
        self.limits = limits
        self.now = 100.0
        self.log = b""
        self.core = Coordinator(limits, now=self.now)

    def do(self, event: Any) -> list[Action]:
        actions = self.core.handle(event, self.now)
        self.log += b"".join(encode(a.record) for a in actions if isinstance(a, Journal))
        return actions

    def restart(self, log: bytes | None = None) -> None:
        data = self.log if log is None else log
        records, length = decode(data)
        self.core = Coordinator(self.limits, records, torn=length < len(data), now=self.now)

    def hear(self, number: int, kind: Kind, link: int | None = None, **meta: Any) -> list[Action]:
        return self.do(Received(number if link is None else link, kind, meta))

    def hello(self, number: int, *, link: int | None = None, incarnation: str = "", **meta: Any) -> list[Action]:
        name, incarnation = who(number, incarnation)
        told = {"name": name, "incarnation": incarnation, "nonce": "a", "about": {}, "waiting": True, **meta}
        return self.hear(number, Kind.HELLO, link, **{**state(), **told})

    def beat(self, number: int, **meta: Any) -> list[Action]:
        return self.hear(number, Kind.BEAT, **{**state(), **meta})

    def ready(self, *numbers: int) -> list[Action]:
        return [a for n in numbers for a in self.hear(n, Kind.READY, epoch=self.epoch, report={"of": n})]

    def start(self, *numbers: int) -> None:
        """Bring workers into a started epoch."""
        for number in numbers:
            self.hello(number)
        self.ready(*numbers)
        assert self.core.started
        for number in numbers:
            self.beat(number, started=self.epoch, seen=self.epoch, ready=self.epoch)

    def wait(self, seconds: float, *beating: int, **meta: Any) -> list[Action]:
        """Time passes, tick by tick, while these workers beat."""
        actions = []
        for _ in range(round(seconds / self.limits.heartbeat)):
            self.now += self.limits.heartbeat
            for number in beating:
                inside = self.core.view is not None and self.core.started and self.member(number)
                epoch = self.epoch if inside else 0
                actions += self.beat(number, **{"started": epoch, "seen": epoch, "ready": epoch, **meta})
            actions += self.do(Tick())
        return actions

    def member(self, number: int) -> bool:
        return self.core.view is not None and who(number) in self.core.view.members

    @property
    def epoch(self) -> int:
        return self.core.view.epoch if self.core.view else 0

    @property
    def members(self) -> list[int]:
        return [int(m.name.split("-")[1]) for m in self.core.view.members] if self.core.view else []


def state() -> dict[str, Any]:
    return {"sent": 1.0, "started": 0, "seen": 0, "ready": 0, "left": 0, "boundary": False, "waiting": False}


def sent(actions: list[Action], kind: Kind) -> list[tuple[int, Meta]]:
    return [(a.link, a.meta) for a in actions if isinstance(a, Send) and a.kind == kind]


def test_the_first_epoch_waits_for_all_and_ranks_follow_the_names() -> None:
    table = Table()
    for number in (10, 2, 0):
        assert not sent(table.hello(number), Kind.PROPOSE)
    proposed = sent(table.hello(1), Kind.PROPOSE)
    assert table.members == [0, 1, 2, 10]
    assert [link for link, _ in proposed] == [0, 1, 2, 10]


FIRST = frozenset({"worker-0", "worker-1"})


def test_who_comes_from_elsewhere_is_not_in_the_first_epoch_however_early_it_comes() -> None:
    """The others are at their first adoption then, and it waits where its loop begins."""
    table = Table(Limits(2, 1, 4, first=FIRST))
    table.hello(100_000)
    table.hello(1)
    assert table.members == []
    table.hello(0)
    assert table.members == [0, 1]
    table.do(Certificate(who(1)))
    assert (table.epoch, table.members) == (2, [0])
    assert sent(table.ready(0), Kind.START)
    table.beat(0, started=2, seen=2, ready=2, left=2, boundary=True, waiting=True)
    assert table.members == [0, 100_000]


def test_a_first_epoch_below_the_minimum_starts_when_a_replacement_waits_and_without_it() -> None:
    table = Table(Limits(2, 2, 2, first=FIRST))
    table.hello(0)
    table.do(Certificate(who(1)))
    assert table.members == [0]
    assert not sent(table.ready(0), Kind.START)
    assert sent(table.hello(2), Kind.START)
    assert (table.epoch, table.members) == (1, [0])
    table.beat(0, started=1, seen=1, ready=1, left=1, boundary=True, waiting=True)
    assert table.members == [0, 2]


def test_an_epoch_is_journalled_before_anybody_hears_of_it_and_so_is_its_start() -> None:
    table = Table(Limits(1, 1, 1))
    for actions, kind in ((table.hello(0), "epoch"), (table.ready(0), "start")):
        said = [i for i, a in enumerate(actions) if isinstance(a, Send) and a.kind in (Kind.PROPOSE, Kind.START)]
        written = [i for i, a in enumerate(actions) if isinstance(a, Journal) and a.record["k"] == kind]
        assert written[0] < said[0]


def test_a_start_carries_the_reports_in_rank_order() -> None:
    table = Table(Limits(3, 1, 3))
    for number in (2, 1, 0):
        table.hello(number)
    assert not sent(table.ready(2, 0), Kind.START)
    started = sent(table.ready(1), Kind.START)
    assert [meta["reports"] for _, meta in started] == [[{"of": 0}, {"of": 1}, {"of": 2}]] * 3


def test_a_certificate_makes_the_next_epoch_at_once_and_joiners_wait_for_its_first_boundary() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.hello(4)
    table.do(Certificate(who(1)))
    assert table.members == [0, 2, 3]
    table.do(Certificate(who(0)))
    assert (table.epoch, table.members) == (3, [2, 3])
    assert sent(table.ready(2, 3), Kind.START)
    for number in (2, 3):
        assert sent(table.beat(number, started=3, seen=3, ready=3), Kind.ACK)[0][1]["pending"]
        table.beat(number, started=3, seen=3, ready=3, left=3, boundary=True, waiting=True)
    assert table.members == [2, 3, 4]


def test_who_dies_at_the_boundary_does_not_keep_joiners_out() -> None:
    table = Table(Limits(2, 1, 3))
    table.start(0, 1)
    table.hello(2)
    table.beat(0, started=1, seen=1, ready=1, left=1, boundary=True, waiting=True)
    table.do(Certificate(who(1)))
    assert table.members == [0, 2]


def test_when_all_have_died_joiners_begin_alone() -> None:
    table = Table(Limits(2, 2, 2))
    table.start(0, 1)
    table.do(Certificate(who(0)))
    table.do(Certificate(who(1)))
    table.hello(2)
    assert not sent(table.ready(2), Kind.START)
    table.hello(3)
    assert table.members == [2, 3]
    assert sent(table.ready(2, 3), Kind.START)


def test_joiners_wait_for_the_boundary_of_all() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    assert not sent(table.beat(0, started=1, seen=1, ready=1), Kind.ACK)[0][1]["pending"]
    table.hello(4)
    assert sent(table.beat(0, started=1, seen=1, ready=1), Kind.ACK)[0][1]["pending"]
    for number in (0, 1, 2):
        table.beat(number, started=1, seen=1, ready=1, left=1, boundary=True, waiting=True)
        assert table.epoch == 1
    table.beat(3, started=1, seen=1, ready=1, left=1, boundary=True, waiting=True)
    assert table.members == [0, 1, 2, 3, 4]


def test_joiners_above_the_maximum_wait() -> None:
    table = Table(Limits(2, 1, 2))
    table.start(0, 1)
    table.hello(2)
    assert not sent(table.beat(0, started=1), Kind.ACK)[0][1]["pending"]
    table.do(Certificate(who(0)))
    table.ready(1)
    assert sent(table.beat(1, started=2), Kind.ACK)[0][1]["pending"]


def test_below_the_minimum_members_wait_for_joiners_and_then_step_once_to_their_boundary() -> None:
    table = Table(Limits(3, 3, 4))
    table.start(0, 1, 2)
    table.do(Certificate(who(1)))
    assert table.members == [0, 2]
    assert not sent(table.ready(0, 2), Kind.START)
    assert sent(table.hello(3), Kind.START), "so that the open step is done again by those who were in it"
    for number in (0, 2):
        assert sent(table.beat(number, started=2, seen=2, ready=2), Kind.ACK)[0][1]["pending"]
        table.beat(number, started=2, seen=2, ready=2, left=2, boundary=True, waiting=True)
    assert table.members == [0, 2, 3]


def test_below_the_minimum_members_stop_at_the_boundary_even_if_the_joiner_has_gone() -> None:
    table = Table(Limits(2, 2, 2))
    table.start(0, 1)
    table.hello(2)
    table.do(Certificate(who(1)))
    assert sent(table.ready(0), Kind.START)
    table.do(Certificate(who(2)))
    assert sent(table.beat(0, started=2, seen=2, ready=2), Kind.ACK)[0][1]["pending"]
    table.beat(0, started=2, seen=2, ready=2, left=2, boundary=True, waiting=True)
    assert table.members == [0]
    assert not sent(table.ready(0), Kind.START)
    table.hello(3)
    assert table.members == [0, 3]


def test_silence_for_a_lease_is_eviction_where_the_others_are_a_majority() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    assert not sent(table.wait(1.75, 0, 1, 2), Kind.FENCED)
    assert sent(table.wait(0.75, 0, 1, 2), Kind.FENCED) == [(3, {"epoch": 2, "why": "evicted"})]
    assert table.members == [0, 1, 2]


def test_without_a_majority_nobody_is_left_out_until_the_operator_says_so() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.wait(10, 0, 1)
    assert (table.epoch, table.core.status()["silent"]) == (1, ["worker-2", "worker-3"])
    table.do(Force())
    assert table.members == [0, 1]


def test_certificates_count_towards_the_majority() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.do(Certificate(who(3)))
    assert table.members == [0, 1, 2]
    table.wait(3, 0, 1)
    assert table.members == [0, 1]


def test_a_coordinator_that_was_suspended_blames_nobody() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.now += 3600.0
    table.do(Tick())
    table.wait(1.5)
    assert table.epoch == 1


def test_a_broken_wire_is_given_a_heartbeat_for_the_certificate() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.beat(0, started=1, seen=1, ready=1, left=1, waiting=True)
    assert table.epoch == 1
    table.wait(0.5, 1, 2, 3)
    assert (table.epoch, table.members) == (2, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("number", "meta", "code"),
    [(0, {"incarnation": "f" * 32}, "PL420"), (0, {"nonce": "b"}, "PL421")],
    ids=["same name", "same identity"],
)
def test_a_second_process_is_refused(number: int, meta: dict[str, Any], code: str) -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    actions = table.hello(number, link=77, **meta)
    assert [meta["code"] for _, meta in sent(actions, Kind.REFUSED)] == [code]
    assert Close(77) in actions
    table.restart()
    assert sent(table.hello(number, link=78, **meta), Kind.REFUSED)[0][1]["code"] == code


def test_the_same_process_may_connect_again() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    actions = table.hello(0, link=77, started=1, seen=1, ready=1)
    assert Close(0) in actions
    assert sent(actions, Kind.ACK)[0][0] == 77
    assert not sent(actions, Kind.REFUSED)


def test_who_was_left_out_stays_out_also_after_a_restart() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.do(Certificate(who(3)))
    table.do(Closed(3))
    assert sent(table.hello(3, started=1), Kind.FENCED)
    table.restart()
    assert sent(table.hello(3, started=1), Kind.FENCED)
    assert sent(table.hello(9, started=5), Kind.FENCED), "an epoch that this journal has never seen"


def test_a_finished_member_changes_nothing_and_nobody_joins_any_more() -> None:
    table = Table(Limits(2, 1, 4))
    table.start(0, 1)
    assert sent(table.hear(0, Kind.LEAVE, why="finished"), Kind.BYE)
    table.hello(2)
    assert (table.epoch, table.core.over) == (1, False)
    assert not sent(table.beat(1, started=1), Kind.ACK)[0][1]["pending"]
    actions = table.hear(1, Kind.LEAVE, why="finished")
    assert (table.epoch, table.core.over) == (1, True)
    assert sent(actions, Kind.REFUSED)[0][1]["code"] == "PL422"
    assert sent(table.hello(3), Kind.REFUSED)[0][1]["code"] == "PL422"


def test_who_stops_is_replaced_by_an_epoch_without_it() -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    table.hear(2, Kind.LEAVE, why="stopping")
    assert table.members == [0, 1, 3]


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_an_epoch_is_never_used_again_wherever_the_journal_is_cut(cut: int) -> None:
    """Cut in what is written last, the record of epoch 2: it may have been cut off, or have become unreadable later."""
    table = Table()
    table.start(0, 1, 2, 3)
    table.do(Certificate(who(0)))
    assert table.epoch == 2
    table.restart(table.log[: len(table.log) - cut])
    table.do(Certificate(who(0)))
    table.do(Tick())
    assert table.epoch == 3
    assert table.members == [1, 2, 3]


def test_a_start_that_went_under_in_a_restart_is_made_up_for_by_the_next_epoch() -> None:
    table = Table(Limits(2, 1, 2))
    table.start(0, 1)
    table.restart()
    table.hello(0, started=1, seen=1, ready=1)
    table.wait(0.5, 0)
    assert table.epoch == 1, "members that stand in the epoch are left alone"
    table.hello(1, seen=1, ready=1)
    assert table.epoch == 2


@pytest.mark.parametrize(
    ("kind", "meta"),
    [(99, {}), (Kind.START, {}), (Kind.BEAT, {}), (Kind.BEAT, {**state(), "left": True}), (Kind.READY, {"epoch": "1"})],
)
def test_what_is_no_message_of_a_member_closes_the_link(kind: int, meta: dict[str, Any]) -> None:
    table = Table()
    table.start(0, 1, 2, 3)
    assert Close(2) in table.do(Received(2, kind, meta))
    assert table.epoch == 1


# ---- the member ---------------------------------------------------------------------------------------------------------
def member(now: float = 0.0) -> MemberCore:
    """In epoch 1 with worker-1, its beat of `now` acknowledged."""
    core = MemberCore(who(0), "a", {})
    core.handle(Opened(), now)
    core.handle(Meet(), now)
    tell(core, now, Kind.PROPOSE, epoch=1, members=[list(who(0)), list(who(1))])
    assert core.asked is not None
    core.handle(Report(1, {}), now)
    tell(core, now, Kind.START, epoch=1, reports=[{}, {}])
    assert core.take_meeting() is not None
    tell(core, now, Kind.ACK, sent=now, epoch=1, pending=False)
    return core


def tell(core: MemberCore, now: float, kind: Kind, **meta: Any) -> list[Action]:
    assert well_formed(kind, meta)
    return core.handle(Received(0, kind, meta), now)


def test_a_member_without_a_coordinator_goes_on_but_does_nothing_alone() -> None:
    core = member(10.0)
    assert core.sure(11.5)
    assert not core.sure(11.7)
    core.handle(Closed(), 11.7)
    assert not core.interrupted
    for now in (12.0, 60.0):
        core.handle(Tick(), now)
        assert not core.interrupted


def test_a_late_acknowledgement_protects_from_when_the_beat_was_sent() -> None:
    core = member(10.0)
    tell(core, 20.0, Kind.ACK, sent=10.2, epoch=1, pending=False)
    assert not core.sure(20.0)


def test_a_link_without_answers_is_given_up_and_tried_again() -> None:
    core = member(10.0)
    assert core.handle(Tick(), 11.5) != [Close()]
    assert core.handle(Tick(), 12.0) == [Close()]
    assert core.handle(Tick(), core.wake) == [Connect()]
    pauses = []
    for _ in range(6):
        now = core.wake
        core.handle(Closed(), now)
        pauses.append(core.wake - now)
        core.handle(Tick(), core.wake)
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.5


def test_a_member_enters_only_what_it_is_ready_for() -> None:
    core = member()
    tell(core, 1.0, Kind.PROPOSE, epoch=2, members=[list(who(0))])
    assert core.interrupted
    tell(core, 1.0, Kind.START, epoch=2, reports=[{}])
    assert core.take_meeting() is None
    core.handle(Meet(), 1.0)
    core.handle(Report(2, {}), 1.0)
    tell(core, 1.0, Kind.PROPOSE, epoch=3, members=[list(who(0))])
    tell(core, 1.0, Kind.START, epoch=2, reports=[{}])
    assert (core.take_meeting(), core.epoch) == (None, 1)
    assert core.asked is not None
    assert core.asked.epoch == 3


def test_a_fenced_member_is_interrupted_for_good() -> None:
    core = member()
    tell(core, 1.0, Kind.FENCED, epoch=4, why="evicted")
    assert core.interrupted
    assert core.failed is not None
    assert core.failed[0] == "PL423"
    assert "worker-0" in core.failed[1]


def test_leaving_is_said_until_it_is_heard() -> None:
    core = member()
    core.handle(Closed(), 1.0)
    assert core.handle(Leave("finished"), 1.0) == []
    assert core.handle(Tick(), 2.0) == [Connect()]
    core.handle(Opened(), 2.0)
    assert sent(core.handle(Tick(), 2.25), Kind.LEAVE) == [(0, {"why": "finished"})]
    tell(core, 2.3, Kind.BYE)
    assert core.parted


# ---- the journal ---------------------------------------------------------------------------------------------------------
def test_a_torn_tail_is_told_from_a_damaged_line() -> None:
    lines = [encode({"k": "epoch", "epoch": n}) for n in (1, 2, 3)]
    whole = b"".join(lines)
    for end in range(len(whole)):
        records, length = decode(whole[:end])
        assert length == sum(len(line) for line in lines[: len(records)])
    for position in range(len(lines[0]) + len(lines[1])):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        with pytest.raises(ValueError, match="is damaged"):
            decode(bytes(flipped))


def test_nothing_of_membership_looks_at_the_time_of_day() -> None:
    for module in (coordinator, member_module, membership, view):
        source = inspect.getsource(module)
        assert "time.time(" not in source
        assert "datetime" not in source


# ---- replicas that are split over several workers --------------------------------------------------------------------------
PAIRS = Limits(4, 2, 4, unit=2)


def test_a_replica_that_has_lost_a_worker_is_left_out_whole() -> None:
    table = Table(PAIRS)
    table.start(0, 1, 2, 3)
    actions = table.do(Certificate(who(3), "died"))
    assert table.members == [0, 1]
    assert {link for link, _ in sent(actions, Kind.FENCED)} == {2, 3}
    table.ready(0, 1)
    assert table.core.started


def test_a_replica_with_a_silent_worker_is_left_out_whole() -> None:
    table = Table(PAIRS)
    table.start(0, 1, 2, 3)
    table.wait(2 * PAIRS.lease, 0, 1, 2)
    assert table.members == [0, 1]


def test_a_replica_is_admitted_when_it_is_whole() -> None:
    table = Table(PAIRS)
    table.start(0, 1, 2, 3)
    table.do(Certificate(who(2), "died"))
    table.ready(0, 1)
    table.hello(5)
    first = table.epoch
    assert not any(meta["pending"] for _, meta in sent(table.beat(0, started=first, seen=first), Kind.ACK))
    table.hello(4)
    assert all(meta["pending"] for _, meta in sent(table.beat(0, started=table.epoch, seen=table.epoch), Kind.ACK))
    table.wait(PAIRS.heartbeat, 0, 1, left=table.epoch, boundary=True)
    assert table.members == [0, 1, 4, 5]


def test_a_worker_that_has_finished_does_not_end_its_replica() -> None:
    table = Table(PAIRS)
    table.start(0, 1, 2, 3)
    table.do(Certificate(who(1), "finished"))
    assert table.members == [0, 1, 2, 3]
