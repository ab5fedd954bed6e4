"""Membership with real processes: meetings, deaths, a coordinator that is killed, a member that is frozen."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paceline.group.coordinator import Control
from paceline.group.journal import decode
from support.coordination import CONTINUE, KILL, LEASE, STOP, Coordination, meet


def epochs(journal: Path) -> list[int]:
    """That were given out, in the order in which that was."""
    return [record["epoch"] for record in decode(journal.read_bytes())[0] if record["k"] == "epoch"]


def test_three_meet_and_read_each_others_reports_in_rank_order(tmp_path: Path) -> None:
    with Coordination(tmp_path) as job:
        met = meet(*reversed(job.members(3)))
        assert met[0] == met[1] == met[2]
        assert (met[0]["epoch"], met[0]["members"]) == (1, ["worker-0", "worker-1", "worker-2"])
        assert [(said["of"], said["epoch"], said["rank"]) for said in met[0]["reports"]] == [
            (f"worker-{rank}", 1, rank) for rank in range(3)
        ]


def test_a_certificate_interrupts_the_others_at_once(tmp_path: Path) -> None:
    with Coordination(tmp_path) as job:
        a, b, c = job.members(3)
        meet(a, b, c)
        b.signal(KILL)
        killed = time.monotonic()
        status = job.certify(b)
        assert status["gone"] == {"worker-1": "died"}
        for one in (a, c):
            said = one.ask("until", "interrupted")
            assert said["evicted"] == [1]
            assert said["at"] - killed < LEASE / 2
        assert [met["members"] for met in meet(a, c)] == [["worker-0", "worker-2"]] * 2


@pytest.mark.parametrize("death", [False, True], ids=["nobody dies meanwhile", "one dies meanwhile"])
def test_a_coordinator_is_killed_and_started_again(tmp_path: Path, death: bool) -> None:
    """Members stay what they are while it is down; epochs strictly increase over all its lives."""
    with Coordination(tmp_path, workers=4) as job:
        members = job.members(4)
        seen = [meet(*members)[0]["epoch"]]
        for _ in range(3):
            job.kill()
            lost = members.pop() if death else None
            if lost:
                lost.signal(KILL)
            assert not any(one.ask("state")["interrupted"] for one in members)
            began = time.monotonic()
            job.start()
            if lost:
                job.certify(lost)
            met = meet(*members)
            assert time.monotonic() - began < 2 + LEASE
            assert len({one["epoch"] for one in met}) == 1
            assert met[0]["members"] == [one.name for one in members]
            seen.append(met[0]["epoch"])
        assert seen == sorted(set(seen))
        given = epochs(job.journal)
        assert given == sorted(set(given))


def test_a_coordinator_that_comes_back_leaves_members_alone(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2) as job:
        a, b = job.members(2)
        meet(a, b)
        job.kill()
        job.start()
        for one in (a, b):
            assert one.ask("until", "sure")["sure"]
            assert not one.ask("state")["interrupted"]
        assert epochs(job.journal) == [1]


@pytest.mark.parametrize(("again", "code"), [(False, "PL420"), (True, "PL421")], ids=["same name", "same identity"])
def test_a_second_process_is_refused_with_an_error_that_says_so(tmp_path: Path, again: bool, code: str) -> None:
    with Coordination(tmp_path, workers=2) as job:
        a, b = job.members(2)
        meet(a, b)
        second = job.member(1, b.incarnation if again else "")
        second.ask("state")
        began = time.monotonic()
        refused = second.ask("meet")
        assert refused["code"] == code
        assert "worker-1" in refused["message"]
        assert time.monotonic() - began < 2
        assert not a.ask("state")["interrupted"]
        assert not b.ask("state")["interrupted"]


def test_a_frozen_member_is_left_out_and_learns_it_when_it_wakes(tmp_path: Path) -> None:
    with Coordination(tmp_path) as job:
        a, b, c = job.members(3)
        meet(a, b, c)
        b.signal(STOP)
        frozen = time.monotonic()
        said = a.ask("until", "interrupted")
        assert said["evicted"] == [1]
        assert said["at"] - frozen < LEASE + 1.5
        assert meet(a, c)[0]["members"] == ["worker-0", "worker-2"]
        assert job.control(Control.STATUS)["gone"] == {"worker-1": "evicted"}
        b.signal(CONTINUE)
        woken = b.ask("until", "interrupted")
        assert woken["evicted"] == [0, 2]
        assert not woken["sure"]
        assert b.ask("meet")["code"] == "PL423"
        assert not a.ask("state")["interrupted"]


def test_a_frozen_coordinator_evicts_nobody(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2) as job:
        a, b = job.members(2)
        meet(a, b)
        job.process.send_signal(STOP)
        deadline = time.monotonic() + 10
        while a.ask("state")["sure"]:
            assert time.monotonic() < deadline
        assert not a.ask("state")["interrupted"]
        job.process.send_signal(CONTINUE)
        for one in (a, b):
            assert one.ask("until", "sure")["sure"]
        assert epochs(job.journal) == [1]


def test_a_joiner_waits_for_the_boundary(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2, most=3) as job:
        a, b = job.members(2)
        meet(a, b)
        late = job.member(2)
        late.tell("meet")
        for one in (a, b):
            said = one.ask("until", "pending")
            assert said["pending"]
            assert not said["interrupted"]
            one.ask("boundary", 7)
            one.tell("meet")
        assert [one.answer()["members"] for one in (a, b, late)] == [["worker-0", "worker-1", "worker-2"]] * 3


def test_finished_members_go_quietly_and_nobody_joins_any_more(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2, most=3) as job:
        a, b = job.members(2)
        meet(a, b)
        a.ask("leave", "finished")
        assert not b.ask("state")["interrupted"]
        b.ask("leave", "finished")
        assert job.control(Control.STATUS)["over"]
        assert job.member(2).ask("meet")["code"] == "PL422"
        assert epochs(job.journal) == [1]


def test_the_operator_can_force_what_has_no_majority(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2) as job:
        a, b = job.members(2)
        meet(a, b)
        b.signal(STOP)
        deadline = time.monotonic() + 10
        while job.control(Control.STATUS)["silent"] != ["worker-1"]:
            assert time.monotonic() < deadline
        assert not a.ask("state")["interrupted"]
        job.control(Control.FORCE)
        assert meet(a)[0]["members"] == ["worker-0"]


def test_without_a_coordinator_a_meeting_ends_when_patience_does(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=1) as job:
        job.kill()
        assert job.member(0, patience=0.5).ask("meet")["code"] == "PL426"


def test_it_ends_with_its_launcher_and_when_it_is_told_to(tmp_path: Path) -> None:
    with Coordination(tmp_path) as job:
        job.control(Control.STATUS)
        job.cut_life_line()
        assert job.process.wait(10) == 0
        job.process.communicate()
    with Coordination(tmp_path) as job:
        job.control(Control.STOP)
        assert job.process.wait(10) == 0


def test_a_journal_has_one_coordinator(tmp_path: Path) -> None:
    with Coordination(tmp_path) as first:
        first.control(Control.STATUS)
        with Coordination(tmp_path) as second:
            _, said = second.process.communicate(timeout=20)
            assert second.process.returncode == 2
            assert said.startswith("PL424: another coordinator holds ")


def test_a_journal_on_a_disk_that_lies_is_refused(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=2) as job:
        meet(*job.members(2))
        job.kill()
        data = bytearray(job.journal.read_bytes())
        data[20] ^= 1
        job.journal.write_bytes(data)
        _, said = job.start().communicate(timeout=20)
        assert job.process.returncode == 2
        assert said.startswith("PL425: ")
        assert "line 1 is damaged" in said


def test_what_cannot_be_journalled_is_announced_to_nobody(tmp_path: Path) -> None:
    with Coordination(tmp_path, workers=1) as job:
        job.control(Control.STATUS)
        resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        one = job.member(0)
        one.tell("meet")
        _, said = job.process.communicate(timeout=20)
        assert job.process.returncode == 1
        assert said.startswith("PL601: cannot write the journal ")
        job.start()
        assert one.answer()["epoch"] == 1


def test_it_starts_without_torch() -> None:
    code = "import sys, paceline.group.coordinator, paceline.group.member; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
