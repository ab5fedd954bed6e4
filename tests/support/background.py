"""A run in the background: a test waits for what it says, sends signals, and reads how it ended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.cli import CLI, dump_and_kill

PATIENCE = 60.0  # seconds from the end of a run's output to its end


class Running:
    """A run in the background, whose output can be waited for."""

    def __init__(self, *arguments: str, cwd: Path, verb: str = "run") -> None:
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.launcher = subprocess.Popen(
            [*CLI, verb, *arguments],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []

    def until(self, part: str) -> str:
        """Read on until a line holds `part`; that line."""
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.said.append(line)
            if part in line:
                return line
        raise AssertionError(f"{part!r} was never said in\n{''.join(self.said)}")

    def end(self) -> int:
        """Read to the end and return the exit code."""
        assert self.launcher.stdout is not None
        self.said += self.launcher.stdout.readlines()
        return self.launcher.wait(PATIENCE)

    @property
    def text(self) -> str:
        return "".join(self.said)


@contextmanager
def running(*arguments: str, cwd: Path, verb: str = "run") -> Iterator[Running]:
    run = Running(*arguments, cwd=cwd, verb=verb)
    try:
        yield run
    finally:
        if run.launcher.poll() is None:
            dump_and_kill(run.launcher.pid, patience=0)
        run.launcher.wait()
        assert run.launcher.stdout is not None
        run.launcher.stdout.close()
