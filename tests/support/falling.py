"""Runs whose servers are killed: a counter that each push adds one to, and what it must be in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from support.cli import CLI, dump_and_kill

CASE = Path(__file__).parents[1] / "chaos" / "counter_case.py"


class Counting:
    """A run of the counter. A context manager.

    Args:
        where: For everything.
        strategy: With servers.
        workers: How many.
        more: Flags.

    Attributes:
        killed: What was killed, in order.
    """

    def __init__(self, where: Path, strategy: str, workers: int, *more: str) -> None:
        self.where, self.run = where, where / "run"
        flags = ("-n", str(workers), "--strategy", strategy, "--run-dir", str(self.run), *more)
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

    def each(self) -> dict[str, int]:
        """Pushes that were acknowledged so far, by worker."""
        found = {file.stem: file.read_text() for file in self.where.glob("*.pushes")}
        return {worker: int(text) for worker, text in found.items() if text}

    def pushes(self) -> int:
        """Of all workers."""
        return sum(self.each().values())

    def wait(self, pushes: int, seconds: float = 60.0) -> None:
        """Until so many were acknowledged."""
        self._until(lambda: self.pushes() >= pushes, seconds, f"{pushes} pushes")

    def wait_each(self, pushes: Mapping[str, int], seconds: float = 60.0) -> None:
        """Until each of these workers has so many."""
        self._until(lambda: all(self.each().get(w, 0) >= n for w, n in pushes.items()), seconds, f"{pushes} pushes")

    def _until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, f"the run ended before {what}: {self.said}"
            assert time.monotonic() < deadline, f"no {what} after {seconds} s, {self.each()}: {self.said}"
            time.sleep(0.002)

    def serving(self, name: str) -> int:
        """How many processes of a server have begun to serve."""
        file = self.run / "events" / f"{name}.jsonl"
        return file.read_text().count('"serve"') if file.exists() else 0

    def complete(self, name: str, seconds: float = 60.0) -> None:
        """Wait until the last process of a server that was killed is replaced."""
        self._until(lambda: self.serving(name) > self.killed.count(name), seconds, f"new process of {name}")

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
