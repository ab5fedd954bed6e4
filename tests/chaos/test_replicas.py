"""One rank of a replica that is split over several is killed: the other replicas go on without a restart, and it is built anew.

Bar 17 of the failure model, in short; ``bench/soak.py --only replicas`` is the long one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.drill import Drill, members, prove, reference, run, steps, wait_for, whole, workers
from support.breadth import more
from support.cli import run_paceline

FOR_EVER = ["--epochs", "100000"]
PLACEMENTS = [
    "pipeline(2) * ddp()",
    *more("fsdp(2) * ddp()", "tensor(2) * ddp()", "fsdp(2, stage=2) * ddp()"),
]


def breaker(
    seed: int, kills: int, size: int, number: int = signal.SIGKILL
) -> Callable[[Drill, subprocess.Popen[str]], None]:
    """Kill a random worker, whenever all replicas are there."""
    print(f"seed {seed}")

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        draw = random.Random(seed)
        for _ in range(kills):
            wait_for(lambda: whole(drill, size), 60, process)
            target = steps(drill.directory) + draw.randrange(1, 30)
            wait_for(lambda target=target: steps(drill.directory) >= target, 60, process)
            name = draw.choice(sorted(name for name in workers(drill.directory) if name in members(drill)))
            os.kill(workers(drill.directory)[name], number)
            drill.killed[name] = 0.0
            wait_for(lambda: not whole(drill, size), 60, process)
        wait_for(lambda: whole(drill, size), 60, process)
        process.send_signal(signal.SIGINT)

    return disturb


def begun(drill: Drill) -> dict[str, int]:
    """How often each worker has started its script."""
    names = [event["name"] for event in drill.events("start")]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("strategy", PLACEMENTS)
def test_both_replicas_are_lost_in_turn_and_nothing_of_the_mathematics_changes(strategy: str, tmp_path: Path) -> None:
    """In the end nobody is left of those who began: what they knew was handed on twice."""

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        for name in ("worker-3", "worker-0"):
            wait_for(lambda: whole(drill, 4), 60, process)
            target = steps(drill.directory) + 7
            wait_for(lambda target=target: steps(drill.directory) >= target, 60, process)
            os.kill(workers(drill.directory)[name], signal.SIGKILL)
            wait_for(lambda: not whole(drill, 4), 60, process)
        process.send_signal(signal.SIGINT)

    drill = run(tmp_path / "run", ["-n", "4", "--strategy", strategy], FOR_EVER, disturb, 120)
    undisturbed = reference(tmp_path, [*FOR_EVER, "--steps", str(steps(drill.directory))])
    prove(drill, undisturbed, status=130)
    assert drill.said.count("of the same replica is ended; 2 workers go on") == 2
    assert "worker-4 takes part" in drill.said
    assert set(begun(drill).values()) == {1}
    assert members(drill)[:2] == ["worker-4", "worker-5"]


@pytest.mark.long
def test_a_frozen_rank_takes_its_replica_along(tmp_path: Path) -> None:
    drill = run(
        tmp_path / "run",
        ["-n", "4", "--strategy", "fsdp(2) * ddp()"],
        FOR_EVER,
        breaker(3, 1, 4, signal.SIGSTOP),
        170,
    )
    assert drill.status == 130, drill.said[-6000:]
    assert len(drill.hashes()) == 1
    assert "gave no sign of life" in drill.said


@pytest.mark.long
def test_the_last_replica_ends_the_run(tmp_path: Path) -> None:
    """It says so, and what goes on from here."""

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 5, 60, process)
        for name in ("worker-0", "worker-3"):
            os.kill(workers(drill.directory)[name], signal.SIGKILL)

    drill = run(tmp_path / "run", ["-n", "4", "--strategy", "fsdp(2) * ddp()"], FOR_EVER, disturb, 100)
    assert drill.status == 3
    assert "PL111" in drill.said
    assert "--resume auto" in drill.said


def test_the_only_replica_begins_again_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """By itself, as often as there is a newer one."""

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")), 60, process)
        os.kill(workers(drill.directory)["worker-1"], signal.SIGKILL)
        wait_for(lambda: (tmp_path / "run" / "earlier" / "1").exists(), 60, process)
        wait_for(lambda: steps(drill.directory) > 30, 60, process)
        process.send_signal(signal.SIGINT)

    flags = ["-n", "2", "--strategy", "fsdp", "--checkpoint", "every=10"]
    drill = run(tmp_path / "run", flags, FOR_EVER, disturb, 100)
    assert "all begin again from the checkpoint of step" in drill.said
    undisturbed = reference(tmp_path, [*FOR_EVER, "--steps", str(steps(drill.directory))])
    prove(drill, undisturbed, status=130)


def test_a_run_of_one_replica_gets_a_second(tmp_path: Path) -> None:
    """Who is alone at first exchanges with those who come."""

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: whole(drill, 2), 60, process)
        joined = run_paceline("join", drill.directory, "-n", "2", cwd=tmp_path)
        assert joined.returncode == 0, joined.stderr
        wait_for(lambda: whole(drill, 4), 60, process)
        target = steps(drill.directory) + 9
        wait_for(lambda: steps(drill.directory) >= target, 60, process)
        process.send_signal(signal.SIGINT)

    flags = ["-n", "2", "--workers", "2:4", "--strategy", "tensor(2) * ddp()"]
    drill = run(tmp_path / "run", flags, FOR_EVER, disturb, 100)
    prove(drill, reference(tmp_path, [*FOR_EVER, "--steps", str(steps(drill.directory))]), status=130)
