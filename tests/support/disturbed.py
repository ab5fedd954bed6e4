"""A run that is disturbed while it trains: its processes, its ledgers as they are written, and the proof that nothing went wrong.

Scripts that write hashes (``case.py --hashes``) have the parameters of all members compared after every step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from paceline.group import journal
from support.cli import CLI, dump_and_kill, run_paceline

LOOK = 0.002  # seconds between two looks at the ledgers


class Wrong(AssertionError):
    """A run did not do what it should."""


class Ledgers:
    """Follows the ledgers of a run while they are written.

    Args:
        directories: Of the run; several when several launchers take part.

    Attributes:
        directories: More may be added.
        step: Committed last, by anybody.
        group: The newest group that has committed a step, and `members` its members.
        progress: When a step was first seen committed, and which; the newest.
        last: By worker, its last step and when that was seen.
        first: By worker, when its first commit was seen.
    """

    def __init__(self, *directories: Path) -> None:
        self.directories = list(directories)
        self._files: dict[Path, tuple[int, bytes]] = {}
        self._groups: dict[str, tuple[int, list[str]]] = {}
        self.step = self.group = 0
        self.members: list[str] = []
        self.progress: deque[tuple[float, int]] = deque(maxlen=100_000)
        self.last: dict[str, tuple[int, float]] = {}
        self.first: dict[str, float] = {}

    def close(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()

    def read(self) -> None:
        """Take what has been written since."""
        for file in [f for directory in self.directories for f in (directory / "ledger").glob("*.jsonl")]:
            if file not in self._files:
                self._files[file] = (os.open(file, os.O_RDONLY | os.O_CLOEXEC), b"")
            fd, rest = self._files[file]
            while data := os.read(fd, 1 << 20):
                *lines, rest = (rest + data).split(b"\n")
                for raw in lines:
                    self._take(file.stem, raw)
            self._files[file] = (fd, rest)

    def _take(self, name: str, raw: bytes) -> None:
        line = json.loads(raw)
        if line["k"] == "g":
            self._groups[name] = (line["g"], line["members"])
        if line["k"] != "c":
            return
        now, (group, members) = time.monotonic(), self._groups.get(name, (0, []))
        self.last[name] = (line["s"], now)
        self.first.setdefault(name, now)
        if group >= self.group:
            self.group, self.members = group, members
        if line["s"] > self.step:
            self.step = line["s"]
            self.progress.append((now, self.step))

    def stall(self, begin: float, end: float) -> float:
        """The longest time without a step, from the last before `begin` to the first after `end`."""
        times = [at for at, _ in self.progress]
        inside = [i for i, at in enumerate(times) if begin <= at <= end]
        if not inside:
            return end - begin
        chosen = times[max(0, inside[0] - 1) : inside[-1] + 2]
        return max((b - a for a, b in pairwise(chosen)), default=end - begin)


class Disturbed:
    """A run under way.

    Args:
        directory: Of the run.
        command: What starts it, all of it.
        ledgers: Directories of all launchers that take part.

    Attributes:
        pids: Of all workers that were ever seen, by name.
    """

    def __init__(self, directory: Path, command: Sequence[str], ledgers: Sequence[Path]) -> None:
        self.directory = directory
        self.ledgers = Ledgers(*ledgers)
        self.pids: dict[str, int] = {}
        self._out = os.memfd_create("said", os.MFD_CLOEXEC)
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._out,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        """All output so far."""
        return os.pread(self._out, 1 << 24, 0).decode(errors="replace")

    def entries(self) -> list[dict[str, Any]]:
        """``processes.json``, or nothing while it is being begun or has ended."""
        try:
            found: list[dict[str, Any]] = json.loads((self.directory / "processes.json").read_text())
        except (OSError, ValueError):
            return []
        return found

    def workers(self) -> dict[str, int]:
        """Process ids of those that live, by name."""
        found = {entry["name"]: entry["pid"] for entry in self.entries() if entry["role"] == "worker"}
        self.pids |= found
        return found

    def coordinator(self) -> int:
        """Its process id, 0 while there is none."""
        return next((entry["pid"] for entry in self.entries() if entry["role"] == "coordinator"), 0)

    def until(self, what: Callable[[], bool], seconds: float, why: str) -> float:
        """Wait until `what` holds; how long that took. Raises Wrong, with `why`."""
        began = time.monotonic()
        while True:
            self.ledgers.read()
            if what():
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise Wrong(f"{why}: not within {seconds:g} s\n{self.said[-4000:]}")
            if self.process.poll() is not None:
                raise Wrong(f"{why}: the run ended with {self.process.returncode}\n{self.said[-4000:]}")
            time.sleep(LOOK)

    def members(self, *names: str, count: int = 0, seconds: float = 60) -> float:
        """Wait until a step was committed with these members, or with so many."""

        def there() -> bool:
            found = self.ledgers.members
            return set(names) <= set(found) and (not count or len(found) == count)

        return self.until(there, seconds, f"{' '.join(names) or count} should take part")

    def steps(self, number: int, seconds: float = 60) -> float:
        """Wait for so many more steps."""
        target = self.ledgers.step + number
        return self.until(lambda: self.ledgers.step >= target, seconds, f"{number} more steps")

    def watch(self, seconds: float) -> None:
        """Go on reading the ledgers for so long."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 5, "time passes")

    def end(self, number: int = signal.SIGINT, status: int = 130, seconds: float = 40) -> None:
        """Send a signal and wait for the end. Raises Wrong."""
        self.process.send_signal(number)
        self.ended(status, seconds)

    def ended(self, status: int, seconds: float) -> None:
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"not ended within {seconds:g} s\n{self.said[-4000:]}") from None
        if found != status:
            raise Wrong(f"ended with {found} instead of {status}\n{self.said[-6000:]}")

    def close(self) -> None:
        if self.process.poll() is None:
            dump_and_kill(self.process.pid, patience=0)
        self.process.wait()
        self.ledgers.close()
        os.close(self._out)


@contextmanager
def disturbed(
    directory: Path,
    *arguments: str | os.PathLike[str],
    verb: str = "run",
    wrap: Callable[[Sequence[str]], list[str]] = list,
    ledgers: Sequence[Path] = (),
) -> Iterator[Disturbed]:
    """``paceline VERB ARGUMENTS``, whose run directory is `directory`; killed where the block leaves it alive.

    Args:
        wrap: Makes a command of a command: one on another machine.
        ledgers: Run directories of the other launchers that take part.
    """
    before = [os.fspath(a) for a in arguments]
    cut = before.index("--") if "--" in before else len(before)
    command = [*CLI, verb, *before[:cut], "--run-dir", os.fspath(directory), *before[cut:]]
    run = Disturbed(directory, wrap(command), [directory, *ledgers])
    try:
        yield run
    finally:
        run.close()


# ---- afterwards -----------------------------------------------------------------------------------------------------
def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """All events of a kind, of all workers of a launcher, by time; each with the worker's `name`."""
    found = []
    for file in sorted((directory / "events").glob("worker-*.jsonl")):
        for raw in file.read_bytes().split(b"\n")[:-1]:
            event = json.loads(raw)
            if event["kind"] == kind:
                found.append(event)
    return sorted(found, key=lambda event: event["mono"])


def hashes(directory: Path) -> dict[int, set[int]]:
    """By step, the hashes that processes have written down after it."""
    found: dict[int, set[int]] = defaultdict(set)
    for file in directory.glob("hashes-*"):
        for line in file.read_text().splitlines():
            step, value = map(int, line.split())
            found[step].add(value)
    return found


def prove(directory: Path, *others: Path, hashed: Path | None = None) -> int:
    """The proof of a run that has ended: every row once, all members equal after each step and at the end, epochs that only rise.

    Args:
        directory: Of the launcher that began the run.
        others: Of those that joined it.
        hashed: Where its workers have written hashes.

    Returns:
        Steps whose hashes were compared between two workers or more.

    Raises:
        Wrong: It says what.
    """
    merged = directory
    if others:
        merged = directory.with_name(f"{directory.name}-merged")
        shutil.copytree(directory, merged, dirs_exist_ok=True)
        for other in others:
            shutil.copytree(other / "ledger", merged / "ledger", dirs_exist_ok=True)
    done = run_paceline("verify", "ledger", merged, cwd=merged.parent)
    if done.returncode:
        raise Wrong(f"the ledger of {merged}\n{done.stdout}{done.stderr}")
    ends = {e["hash"] for path in (directory, *others) for e in events(path, "end") if e.get("hash")}
    if len(ends) > 1:
        raise Wrong(f"{len(ends)} different hashes at the end of {directory}")
    if (directory / "membership.journal").exists():
        epochs_rise(directory)
    compared = hashes(hashed) if hashed is not None else {}
    differing = sorted(step for step, values in compared.items() if len(values) > 1)
    if differing:
        raise Wrong(f"different parameters after steps {differing[:5]} of {directory}, {len(differing)} in all")
    return len(compared)


def epochs_rise(directory: Path) -> list[int]:
    """The epochs of a run's journal. Raises Wrong where one is not above all before it."""
    records, _ = journal.decode((directory / "membership.journal").read_bytes())
    epochs = [record["epoch"] for record in records if record["k"] == "epoch"]
    if epochs != sorted(set(epochs)):
        raise Wrong(f"epochs of {directory}: {epochs}")
    return epochs
