"""A worker that freezes is left out; a coordinator that dies is started again; a worker on the TCP wire is lost like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chaos.drill import Drill, killer, prove, reference, run, steps, wait_for, workers

SCRIPT = ["--epochs", "60"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reference(tmp_path_factory.mktemp("reference") / "run", SCRIPT)


def test_a_frozen_worker_is_left_out(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 5, 60, process)
        os.kill(workers(drill.directory)["worker-1"], signal.SIGSTOP)
        drill.killed["worker-1"] = 0.0

    drill = run(tmp_path / "run", ["-n", "3", "--workers", "1:3"], SCRIPT, disturb, 120)
    prove(drill, undisturbed)
    assert "worker-1" in drill.said


def test_a_killed_coordinator_costs_nothing(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Workers go on without it; its journal survives, so a loss afterwards gets a number that was never used."""

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 5, 60, process)
        entries = json.loads((drill.directory / "processes.json").read_text())
        (coordinator,) = [entry["pid"] for entry in entries if entry["role"] == "coordinator"]
        os.kill(coordinator, signal.SIGKILL)
        os.kill(workers(drill.directory)["worker-2"], signal.SIGKILL)
        drill.killed["worker-2"] = 0.0

    drill = run(tmp_path / "run", ["-n", "3", "--workers", "1:3"], SCRIPT, disturb, 120)
    prove(drill, undisturbed)
    epochs = [event["epoch"] for event in drill.events("view") if event["name"] == "worker-0"]
    assert epochs == sorted(set(epochs))
    assert len(epochs) >= 2


def test_a_loss_on_the_tcp_wire(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    drill = run(tmp_path / "run", ["-n", "3", "--workers", "1:3", "--wire", "tcp"], SCRIPT, killer(5, 2, 80), 120)
    prove(drill, undisturbed)
    endpoints = json.loads((drill.directory / "endpoints.json").read_text())
    assert all(entry["address"].startswith("unix:") for entry in endpoints)
