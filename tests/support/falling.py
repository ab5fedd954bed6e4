"""Runs whose servers are killed: a counter that each push adds one to, and what it must be in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from support.cli import CLI, dump_and_kill

CASE = Path(__file__).parents[1] / "chaos" / "counter_case.py"


class Counting:
    """A run of the counter. A context manager.

    Args:
        where: For everything.
        strategy: With servers.
        workers: How many.

    Attributes:
        killed: What was killed, in order.
    """

    def __init__(self, where: Path, strategy: str, workers: int) -> None:
        self.where, self.run = where, where / "run"
        flags = ("-n", str(workers), "--strategy", strategy, "--run-dir", str(self.run))
        self._command = (*CLI, "run", str(CASE), *flags, "--", str(where))
        self._workers = workers
        self.killed: list[str] = []

    def __enter__(self) -> Counting:
        said = (self.where / "said.txt").open("wb")
        with said:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.where,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            dump_and_kill(self.process.pid)
        self.process.wait()

    @property
    def said(self) -> str:
        """All that it has printed."""
        return (self.where / "said.txt").read_text()

    def pushes(self) -> int:
        """That were acknowledged so far."""
        files = self.where.glob("*.pushes")
        return sum(int(text) for text in (file.read_text() for file in files) if text)

    def wait(self, pushes: int, seconds: float = 60.0) -> None:
        """Until so many were acknowledged."""
        deadline = time.monotonic() + seconds
        while self.pushes() < pushes:
            assert self.process.poll() is None, f"the run ended before that: {self.said}"
            assert time.monotonic() < deadline, f"{self.pushes()} of {pushes} pushes after {seconds} s: {self.said}"
            time.sleep(0.002)

    def serving(self, name: str) -> int:
        """How many processes of a server have begun to serve."""
        file = self.run / "events" / f"{name}.jsonl"
        return file.read_text().count('"serve"') if file.exists() else 0

    def complete(self, name: str, seconds: float = 60.0) -> None:
        """Wait until the last process of a server that was killed is replaced."""
        deadline = time.monotonic() + seconds
        while self.serving(name) <= self.killed.count(name):
            assert self.process.poll() is None, f"the run ended before that: {self.said}"
            assert time.monotonic() < deadline, f"{name} was not replaced within {seconds} s: {self.said}"
            time.sleep(0.005)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        listed = json.loads((self.run / "processes.json").read_text())
        pid = next(entry["pid"] for entry in listed if entry["name"] == name)
        self.killed.append(name)
        os.kill(pid, signal.SIGKILL)

    def kill_and_wait(self, name: str, rng: random.Random) -> None:
        """Kill at a random moment, see that pushes go on, and wait for the new copy."""
        self.wait(self.pushes() + rng.randint(1, 30))
        self.kill(name)
        self.wait(self.pushes() + 3 * self._workers)
        self.complete(name)

    def end(self) -> tuple[int, list[float], list[float]]:
        """End the run: how many pushes were acknowledged, the values of the counter, and the slowest pushes in seconds."""
        (self.where / "stop").touch()
        self.process.wait(60)
        assert self.process.returncode == 0, self.said
        told = [json.loads(file.read_text()) for file in sorted(self.where.glob("*.json"))]
        assert len(told) == self._workers, self.said
        values = {value for each in told for value in each["values"]}
        slowest = [seconds for each in told for seconds in each["slowest"]]
        return sum(each["acknowledged"] for each in told), sorted(values), sorted(slowest)
