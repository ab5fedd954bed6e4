"""Workers that step on their own are killed: in the inner loop, and while they exchange. Nothing is lost, all end with the same."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from chaos.drill import Drill, killer, run, steps, wait_for, workers
from support.breadth import more
from support.cli import run_paceline


def prove(drill: Drill) -> None:
    """It ended well, all hold the same, and the ledger proves the rows."""
    assert drill.status == 0, drill.said[-6000:]
    assert len(drill.hashes()) == 1, drill.said[-6000:]
    proved = run_paceline("verify", "ledger", drill.directory, cwd=drill.directory.parent)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    assert drill.killed
    assert "was killed by SIGKILL" in drill.said


CASES = {
    "inner steps": ("diloco(every=8, fragments=4, overlap=1, blend=0.5)", ["--epochs", "20", "--accumulate", "2"]),
    "every step": ("gossip(ring)", ["--epochs", "10"]),
    "two optimizers": ("then(ddp(), after=40, next=local_sgd(5))", ["--epochs", "15", "--two"]),
}


@pytest.mark.parametrize("name", ["inner steps", "every step", *more("two optimizers")])
def test_killed_in_a_round(name: str, tmp_path: Path) -> None:
    """At random moments. In gossip a step is short against its exchange, so that most of them fall into one."""
    strategy, script = CASES[name]
    flags = ["-n", "3", "--workers", "1:3", "--strategy", strategy]
    prove(run(tmp_path / "run", flags, script, killer(len(name), 2, 60), 120))


def test_a_replacement_gets_the_outer_state(tmp_path: Path) -> None:
    """All compare what came out of every outer step, so whoever came without anchor and momentum would end the run."""
    script = ["--epochs", "100000"]

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        wait_for(lambda: steps(drill.directory) > 20, 60, process)
        os.kill(workers(drill.directory)["worker-1"], signal.SIGKILL)
        wait_for(lambda: any("worker-2" in e["members"] and e["size"] == 2 for e in drill.events("view")), 60, process)
        joined = steps(drill.directory)
        wait_for(lambda: steps(drill.directory) > joined + 40, 60, process)
        process.send_signal(signal.SIGINT)

    flags = ["-n", "2", "--workers", "1:2", "--strategy", "diloco(every=5)"]
    drill = run(tmp_path / "run", flags, script, disturb, 120)
    assert drill.status == 130, drill.said
    assert len([e for e in drill.events("end") if e.get("hash")]) == 2
    assert len(drill.hashes()) == 1
    proved = run_paceline("verify", "ledger", drill.directory, cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr
