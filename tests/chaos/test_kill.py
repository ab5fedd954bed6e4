"""Workers are killed at random moments; those who are left go on, and nothing is lost. Bar 1 of the failure model, in short."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chaos.drill import Drill, killer, prove, reference, run, steps, wait_for, workers
from support.breadth import more

SCRIPTS = {
    "plain": ["--epochs", "30"],
    "accumulate": ["--epochs", "30", "--accumulate", "3"],
    "two optimizers": ["--epochs", "20", "--two"],
    "divided step": ["--epochs", "5", "--wide"],
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The parameters of each script, by its name."""
    home = tmp_path_factory.mktemp("reference")
    names = ["plain", "divided step", *more("accumulate", "two optimizers")]
    return {name: reference(home / str(number), SCRIPTS[name]) for number, name in enumerate(names)}


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("name", ["plain", "divided step", *more("accumulate", "two optimizers")])
def test_killed_workers_change_nothing(name: str, seed: int, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    every = {"divided step": 15, "accumulate": 40}.get(name, 80)
    drill = run(tmp_path / "run", ["-n", "4", "--workers", "1:4"], SCRIPTS[name], killer(seed, 3, every), 150)
    prove(drill, undisturbed[name])
    for worker in drill.killed:
        assert f"{worker} " in drill.said
    assert "was killed by SIGKILL" in drill.said


def test_a_replacement_takes_part(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """It is given everything by those who are there, and ends with their parameters."""
    script = ["--epochs", "100000"]

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 5, 60, process)
        os.kill(workers(drill.directory)["worker-1"], signal.SIGKILL)
        wait_for(
            lambda: any(e["size"] == 2 for e in drill.events("view")[3:] if "worker-2" in e["members"]), 60, process
        )
        joined = steps(drill.directory)
        wait_for(lambda: steps(drill.directory) > joined + 120, 60, process)  # twice compared with the other replica
        process.send_signal(signal.SIGINT)

    drill = run(tmp_path / "run", ["-n", "2", "--workers", "1:2"], script, disturb, 150)
    assert drill.status == 130, drill.said
    assert len(drill.hashes()) == 1
    assert len([e for e in drill.events("end") if e.get("hash")]) == 2
    assert "worker-2 takes part" in drill.said


@pytest.mark.long
def test_killed_workers_change_nothing_where_all_vote(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    flags = ["-n", "4", "--workers", "1:4", "--strategy", "ddp(commit=vote)"]
    drill = run(tmp_path / "run", flags, SCRIPTS["plain"], killer(2, 3, 80), 150)
    prove(drill, undisturbed["plain"])
