"""The launcher's side of elastic runs with real processes. The scripts train nothing; who takes part is told as a member would."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.background import Running, running
from support.breadth import more
from support.cli import run_paceline, show
from tests.peers.test_launch import gone, read, write

WAITS = (
    "import os, signal, sys\n"
    "from paceline.launch.session import current\n"
    "place = current().place\n"
    "print(f'up {place.name} on page {place.slot} of {place.slots}.')\n"
)
FOREVER = WAITS + "signal.pause()\n"
MEMBER = (
    WAITS
    + """
import time
from paceline.group.member import Member
from paceline.group.secure import connect
from paceline.group.view import Identity
secret = os.pread(place.secret_fd, 32, 0)
member = Member(lambda: connect(place.coordinator, secret, "worker", 1.0), Identity(place.name, place.incarnation), {})
while True:
    met = member.meet(lambda view: {"from": place.name})
    names = [m.name for m in met.view.members]
    current().report("view", epoch=met.view.epoch, rank=names.index(place.name), size=len(names), members=names)
    assert [said["from"] for said in met.reports] == names
    print(f"{place.name} in {' '.join(names)}.")
    while not member.interrupted and not member.pending:
        time.sleep(0.01)
    if not member.interrupted:
        member.at_boundary(0)
"""
)


def processes(run: Path) -> dict[str, dict[str, Any]]:
    entries = read(run / "processes.json")
    assert isinstance(entries, list)
    return {entry["name"]: entry for entry in entries}


def up(run: Running, *names: str) -> None:
    """Wait until these workers are up, in whatever order."""
    missing = set(names)
    while missing:
        line = run.until("up worker-")
        missing -= {match[1] for match in re.finditer(r"up (worker-\d+) ", line)}


def eventually(condition: Any, patience: float = 10.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.02)


def listening(address: str) -> bool:
    """Whether somebody listens on this unix socket without a name in the file system."""
    return any(
        line.endswith(f" {address.removeprefix('unix:')}") for line in Path("/proc/net/unix").read_text().splitlines()
    )


def test_what_an_elastic_run_consists_of_and_what_stays_of_it(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "2", "--workers", "1:3", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        entries = processes(tmp_path / "r")
        assert [(e["name"], e["role"], e["rank"]) for e in entries.values()] == [
            ("launcher", "launcher", None),
            ("coordinator", "coordinator", None),
            ("worker-0", "worker", 0),
            ("worker-1", "worker", 1),
        ]
        endpoints = read(tmp_path / "r" / "endpoints.json")
        assert isinstance(endpoints, list)
        assert {(e["name"], e["purpose"]) for e in endpoints} == {
            ("coordinator", "membership"),
            ("launcher", "control"),
        }
        eventually(lambda: all(listening(e["address"]) for e in endpoints))
        secret = tmp_path / "r" / "secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        text = secret.read_text().strip()
        assert len(bytes.fromhex(text)) == 32
        for entry in entries.values():
            for kind in ("cmdline", "environ"):
                shown = Path(f"/proc/{entry['pid']}/{kind}").read_bytes()
                assert bytes.fromhex(text) not in shown
                assert text.encode() not in shown
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    assert text not in run.text
    assert not secret.exists()
    assert not any(text in path.read_text(errors="replace") for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert processes(tmp_path / "r") == {}
    assert gone([entry["pid"] for entry in entries.values()])
    assert not any(listening(e["address"]) for e in endpoints)


def test_a_coordinator_that_is_killed_comes_back_and_nobody_else_does(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        before = processes(tmp_path / "r")
        os.kill(before["coordinator"]["pid"], signal.SIGKILL)
        run.until("the coordinator was killed by SIGKILL; it is started again")
        eventually(lambda: processes(tmp_path / "r").get("coordinator", before["coordinator"]) != before["coordinator"])
        after = processes(tmp_path / "r")
        assert {name: e["pid"] for name, e in after.items() if e["role"] == "worker"} == {
            name: e["pid"] for name, e in before.items() if e["role"] == "worker"
        }
        endpoints = read(tmp_path / "r" / "endpoints.json")
        assert isinstance(endpoints, list)
        address = next(e["address"] for e in endpoints if e["name"] == "coordinator")
        eventually(lambda: listening(address))
        run.launcher.send_signal(signal.SIGTERM)
        assert run.end() == 143, run.text
    assert gone([after["coordinator"]["pid"]])


def test_a_worker_that_is_killed_is_replaced_on_its_page(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "3", "--workers", "2:3", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1", "worker-2")
        os.kill(processes(tmp_path / "r")["worker-1"]["pid"], signal.SIGKILL)
        line = run.until("worker-1 (rank 1) was killed")
        assert "was killed by SIGKILL; 2 workers go on from step 0; worker-3 is being started" in line
        assert "up worker-3 on page 1 of 16." in run.until("up worker-")
        assert [name for name in processes(tmp_path / "r") if name.startswith("worker")] == [
            "worker-0",
            "worker-2",
            "worker-3",
        ]
        os.kill(processes(tmp_path / "r")["worker-0"]["pid"], signal.SIGSEGV)
        line = run.until("worker-0 (rank 0) was killed")
        assert "1 worker of at least 2 is left, so the run waits; worker-4 is being started" in line
        up(run, "worker-4")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    logs = run_paceline("logs", "r", "--rank", "3", cwd=tmp_path)
    assert logs.stdout.startswith("[3] up worker-3")


def test_status_0_in_mid_script_is_a_loss(tmp_path: Path) -> None:
    script = write(tmp_path, WAITS + "if place.name == 'worker-1': os._exit(0)\nsignal.pause()\n")
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        told = run.until("exited with status 0")
        assert "worker-1 (rank 1) exited with status 0 without finishing its script; 1 worker goes on" in told
        assert "worker-2 is being started" in told
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


def test_nobody_left_ends_the_run(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        entries = processes(tmp_path / "r")
        for name in ("worker-0", "worker-1"):
            os.kill(entries[name]["pid"], signal.SIGKILL)
        assert run.end() == 3, run.text
    assert "error[PL111]: no worker is left that has the state of the run" in run.text
    assert "--resume auto" in run.text
    assert "error[PL502] on all workers: killed by SIGKILL" in run.text
    record = read(tmp_path / "r" / "run.json")
    assert isinstance(record, dict)
    assert (record["state"], record["exit_code"]) == ("lost", 3)


def test_workers_that_die_as_they_start_end_the_run_when_there_are_too_few(tmp_path: Path) -> None:
    script = write(tmp_path, WAITS + "if place.slot == 1: os.kill(os.getpid(), 9)\nsignal.pause()\n")
    done = run_paceline("run", script, "-n", "2", "--workers", "2:2", "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == 3, show(done)
    said = done.stdout + done.stderr
    assert "worker-6 was killed by SIGKILL before it took part; no more are started, because 5 in a row" in said
    assert "error[PL111]: 1 worker of at least 2, and no more can be started" in said


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise OSError('no data')", "failed with OSError: no data (events/worker-2.jsonl)"),
        ("os._exit(7)", "ended with exit status 7"),
        ("os._exit(0)", "exited with status 0 without finishing its script"),
    ],
)
def test_a_replacement_that_fails_before_it_takes_part_ends_nobody(end: str, said: str, tmp_path: Path) -> None:
    script = write(tmp_path, WAITS + f"if place.name == 'worker-2': {end}\nsignal.pause()\n")
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        os.kill(processes(tmp_path / "r")["worker-0"]["pid"], signal.SIGKILL)
        assert f"worker-2 {said} before it took part; worker-3 is being started" in run.until("before it took part")
        up(run, "worker-3")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


def test_an_exception_ends_an_elastic_run_too(tmp_path: Path) -> None:
    script = write(tmp_path, WAITS + "if place.rank == 1: raise ValueError('mine')\nsignal.pause()\n")
    done = run_paceline("run", script, "-n", "2", "--workers", "1:2", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "error[PL503] on rank 1: ValueError: mine" in done.stderr


def test_who_never_took_part_does_not_keep_the_run_alive(tmp_path: Path) -> None:
    """The replacement waits to be let in; the others come to their end."""
    script = write(
        tmp_path,
        WAITS + "from paceline.terms.activity import Phase\n"
        "def ends(*_): current().activity.enter(Phase.FINISHED); os._exit(0)\n"
        "signal.signal(signal.SIGUSR1, ends)\nprint(f'waits {place.name}.')\n"
        "while True: signal.pause()\n",
    )
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        os.kill(processes(tmp_path / "r")["worker-0"]["pid"], signal.SIGKILL)
        run.until("waits worker-2")
        os.kill(processes(tmp_path / "r")["worker-1"]["pid"], signal.SIGUSR1)
        assert run.end() == 0, run.text
    assert "finished in" in run.said[-1]


def test_ranks_are_what_the_members_say(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        WAITS + "number = int(place.name.rpartition('-')[2])\n"
        "current().report('view', epoch=1 + (number > 1), rank=number if number < 2 else 1, size=2)\n"
        "signal.pause()\n",
    )
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        os.kill(processes(tmp_path / "r")["worker-1"]["pid"], signal.SIGKILL)
        run.until("worker-2 takes part; 2 workers")
        eventually(lambda: processes(tmp_path / "r")["worker-2"]["rank"] == 1)
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


def test_who_ends_its_script_while_the_others_go_on_is_named(tmp_path: Path) -> None:
    """They miss it on the wire, and meet without it: not a loss, a mistake of the script."""
    script = write(
        tmp_path,
        WAITS + "from paceline.terms.activity import Phase\n"
        "number = int(place.name[-1])\n"
        "names = ['worker-0', 'worker-1', 'worker-2']\n"
        "current().report('view', epoch=1, rank=number, size=3, members=names)\n"
        "def ends(*_): current().activity.progress(4, 0, 64); current().activity.enter(Phase.FINISHED); os._exit(0)\n"
        "def goes_on(*_): current().report('view', epoch=2, rank=number - 1, size=2, members=names[1:])\n"
        "signal.signal(signal.SIGUSR1, goes_on if number else ends)\n"
        "print(f'ready {number}.')\n"
        "while True: signal.pause()\n",
    )
    with running(script, "-n", "3", "--workers", "1:3", "--run-dir", "r", cwd=tmp_path) as run:
        for _ in range(3):
            run.until("ready ")
        entries = processes(tmp_path / "r")
        os.kill(entries["worker-0"]["pid"], signal.SIGUSR1)
        eventually(lambda: "worker-0" not in processes(tmp_path / "r"))
        os.kill(entries["worker-1"]["pid"], signal.SIGUSR1)
        assert run.end() == 4, run.text
    assert "error[PL501]: rank 0 ended its script after step 4, and 2 of the others went on" in run.text


def test_nobody_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "2", "--workers", "1:2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        endpoints = read(tmp_path / "r" / "endpoints.json")
        assert isinstance(endpoints, list)
        eventually(lambda: all(listening(e["address"]) for e in endpoints))
        pids = [entry["pid"] for entry in processes(tmp_path / "r").values()]
        run.launcher.kill()
        run.launcher.wait()
        assert gone(pids)
    assert not any(listening(e["address"]) for e in endpoints)


def test_exactly_so_many_is_what_it_always_was(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "--workers", "2", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0", "worker-1")
        assert not (tmp_path / "r" / "secret").exists()
        entries = processes(tmp_path / "r")
        assert "coordinator" not in entries
        assert read(tmp_path / "r" / "endpoints.json") == []
        os.kill(entries["worker-1"]["pid"], signal.SIGKILL)
        assert run.end() == 3, run.text
    assert "error[PL502] on rank 1: killed by SIGKILL" in run.text
    assert "rank 0 was ended as a witness" in run.text


# ---- with members ---------------------------------------------------------------------------------------------------
def together(run: Running, *names: str) -> None:
    """Wait until all of these have entered an epoch with each other."""
    missing = set(names)
    while missing:
        line = run.until(" in worker-")
        if line.rstrip().endswith(f" in {' '.join(names)}."):
            missing -= {f"worker-{number}" for number in _labels(line)}


def _labels(line: str) -> list[int]:
    """``[0,2-4]`` before a line; equal lines of several workers would be folded, but these begin with a name."""
    return [int(number) for number in re.findall(r"\d+", line.partition("]")[0])]


def test_members_go_on_and_the_replacement_becomes_one(tmp_path: Path) -> None:
    with running(write(tmp_path, MEMBER), "-n", "3", "--workers", "1:3", "--run-dir", "r", cwd=tmp_path) as run:
        together(run, "worker-0", "worker-1", "worker-2")
        os.kill(processes(tmp_path / "r")["worker-1"]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        together(run, "worker-0", "worker-2")
        assert time.monotonic() - killed < 2.0
        together(run, "worker-0", "worker-2", "worker-3")
        eventually(
            lambda: [e["rank"] for e in processes(tmp_path / "r").values() if e["role"] == "worker"] == [0, 1, 2]
        )
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    assert "worker-1 (rank 1) was killed by SIGKILL; 2 workers go on" in run.text
    assert "worker-3 takes part; 3 workers" in run.text


def test_a_death_while_the_coordinator_is_down_is_not_forgotten(tmp_path: Path) -> None:
    with running(write(tmp_path, MEMBER), "-n", "3", "--workers", "1:3", "--run-dir", "r", cwd=tmp_path) as run:
        together(run, "worker-0", "worker-1", "worker-2")
        entries = processes(tmp_path / "r")
        for name in ("coordinator", "worker-2"):
            os.kill(entries[name]["pid"], signal.SIGKILL)
        together(run, "worker-0", "worker-1")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


@pytest.mark.parametrize("workers", [2, *more(3)])
def test_a_frozen_worker_is_ended_and_replaced(workers: int, tmp_path: Path) -> None:
    """The others are a majority without it, or not."""
    names = [f"worker-{number}" for number in range(workers)]
    with running(
        write(tmp_path, MEMBER), "-n", str(workers), "--workers", "1:3", "--run-dir", "r", cwd=tmp_path
    ) as run:
        together(run, *names)
        pid = processes(tmp_path / "r")["worker-1"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        run.until("worker-1 (rank 1) gave no sign of life for 5 s and was ended")
        assert gone([pid])
        together(run, *(name for name in names if name != "worker-1"), f"worker-{workers}")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


# ---- joining --------------------------------------------------------------------------------------------------------
def test_workers_join_a_run(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "-n", "1", "--workers", "1:3", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0")
        done = run_paceline("join", "r", "-n", "2", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "r: worker-1, worker-2 are being started\n"), show(done)
        up(run, "worker-1", "worker-2")
        refused = run_paceline("join", "r", "--format", "json", cwd=tmp_path)
        assert refused.returncode == 2, show(refused)
        assert json.loads(refused.stdout)["code"] == "PL112"
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    late = run_paceline("join", "r", cwd=tmp_path)
    assert "error PL109" in late.stderr, show(late)


def test_a_run_that_is_not_elastic_cannot_be_joined(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    with running(script, "--workers", "1", "--run-dir", "r", cwd=tmp_path) as run:
        up(run, "worker-0")
        done = run_paceline("join", "r", cwd=tmp_path)
        assert "error PL112" in done.stderr, show(done)
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


@pytest.mark.parametrize("flags", [("--listen", "127.0.0.1"), ("--listen", "192.0.2.1", "--workers", "1:2")])
def test_listening_where_it_cannot_be_is_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    done = run_paceline("run", write(tmp_path, FOREVER), *flags, cwd=tmp_path)
    assert done.returncode == 2, show(done)
    assert "error PL105" in done.stderr


@contextmanager
def host_and_guest(tmp_path: Path, script: str) -> Iterator[tuple[Running, Running]]:
    """A run with one worker that listens, and one that a launcher with a directory of its own has joined."""
    (tmp_path / "there").mkdir()
    write(tmp_path / "there", script)
    listen = ("-n", "1", "--workers", "1:3", "--run-dir", "r", "--listen", "127.0.0.1")
    with running(write(tmp_path, script), *listen, "--", "--lr", "1", cwd=tmp_path) as run:
        address = run.until("others join with").partition("--address ")[2].split()[0]
        together(run, "worker-0")
        flags = ("--address", address, "--secret-file", str(tmp_path / "r" / "secret"), "--run-dir", "r")
        with running("script.py", *flags, cwd=tmp_path / "there", verb="join") as guest:
            yield run, guest


def test_workers_of_another_launcher_take_part_and_leave(tmp_path: Path) -> None:
    with host_and_guest(tmp_path, MEMBER) as (run, guest):
        guest.until("worker-100000 takes part; 2 workers")
        assert [e["role"] for e in processes(tmp_path / "there" / "r").values()] == ["launcher", "worker"]
        assert read(tmp_path / "there" / "r" / "endpoints.json") == []
        assert not (tmp_path / "there" / "r" / "secret").exists()
        record = read(tmp_path / "there" / "r" / "run.json")
        assert isinstance(record, dict)
        assert record["plan"]["script_args"] == ["--lr", "1"]
        guest.launcher.send_signal(signal.SIGINT)
        assert guest.end() == 130, guest.text
        assert "leaving the run; the others go on" in guest.text
        run.until("worker-0 in worker-0 worker-100000")
        together(run, "worker-0")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text


def test_a_run_goes_on_where_its_own_workers_are_lost(tmp_path: Path) -> None:
    with host_and_guest(tmp_path, MEMBER) as (run, guest):
        guest.until("takes part; 2 workers")
        run.until("worker-0 in worker-0 worker-100000")
        eventually(lambda: processes(tmp_path / "r")["worker-0"]["rank"] == 0)
        os.kill(processes(tmp_path / "r")["worker-0"]["pid"], signal.SIGKILL)
        run.until("1 worker goes on from step 0; worker-1 is being started")
        run.until("worker-1 in worker-100000 worker-1.")
        run.launcher.kill()
        run.launcher.wait()
        assert guest.end() == 3, guest.text
    assert "the launcher that has begun the run is gone" in guest.text


def test_a_launcher_that_does_not_know_the_secret_is_refused(tmp_path: Path) -> None:
    script = write(tmp_path, FOREVER)
    (tmp_path / "wrong").write_text("00" * 32 + "\n")
    (tmp_path / "short").write_text("00\n")
    with running(script, "-n", "1", "--workers", "1:3", "--listen", "127.0.0.1", "--run-dir", "r", cwd=tmp_path) as run:
        address = run.until("others join with").partition("--address ")[2].split()[0]
        for name, code in (("wrong", "PL430"), ("short", "PL603")):
            done = run_paceline("join", script, "--address", address, "--secret-file", name, cwd=tmp_path)
            assert done.returncode == 2, show(done)
            assert f"error {code}" in done.stderr
        assert not (tmp_path / "runs").exists()
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
