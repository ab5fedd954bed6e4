"""``paceline chaos`` disturbs a run that is alive, and says what became of it."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from chaos.drill import Drill, run, steps, wait_for
from support.cli import run_paceline


def test_a_drill_on_a_living_run(tmp_path: Path) -> None:
    reports = []

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 5, 60, process)
        arguments = ("--kill", "2s", "--for", "6s", "--seed", "1", "--format", "json")
        done = run_paceline("chaos", drill.directory, *arguments, cwd=tmp_path, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        reports.append(json.loads(done.stdout))
        process.send_signal(signal.SIGINT)

    drill = run(tmp_path / "run", ["-n", "3", "--workers", "1:3"], ["--epochs", "100000"], disturb, 120)
    assert drill.status == 130, drill.said
    (report,) = reports
    assert report["ok"]
    assert report["seed"] == 1
    assert report["faults"]["SIGKILL"] >= 1
    assert report["steps"] > 0
    assert 0 < report["recovery p50"] <= report["recovery p99"]


def test_what_cannot_be_drilled(tmp_path: Path) -> None:
    done = run_paceline("chaos", "nothing", "--kill", "1s", cwd=tmp_path)
    assert done.returncode == 2
    assert "PL106" in done.stderr
    done = run_paceline("chaos", "nothing", "--kill", "soon", cwd=tmp_path)
    assert done.returncode == 2
    assert "PL105" in done.stderr
