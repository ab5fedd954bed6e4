"""A machine of which nothing is heard, and without which the others are no majority: the run waits, and says for whom."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.peers.test_elastic_launch import MEMBER, host_and_guest, processes


@pytest.mark.long
def test_it_is_said_whom_the_run_waits_for(tmp_path: Path) -> None:
    with host_and_guest(tmp_path, MEMBER) as (run, guest):
        guest.until("worker-100000 takes part; 2 workers")
        run.until("worker-0 in worker-0 worker-100000")
        there = [entry["pid"] for entry in processes(tmp_path / "there" / "r").values()]
        for pid in there:
            os.kill(pid, signal.SIGSTOP)
        try:
            line = run.until("no sign of life")
        finally:
            for pid in there:
                os.kill(pid, signal.SIGCONT)
        assert line.startswith("worker-100000 gives no sign of life, and without it the others are no majority")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
