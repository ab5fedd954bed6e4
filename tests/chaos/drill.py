"""Runs the case and kills its processes while it trains; then looks at what is left with nothing but the run directory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from support.cli import CLI, dump_and_kill, run_paceline

CASE = Path(__file__).with_name("case.py")


@dataclass
class Drill:
    """One run under faults.

    Attributes:
        directory: The run directory.
        status: Exit status of the command.
        said: Its output.
        killed: Names of the workers that were killed, with the time of the monotonic clock.
    """

    directory: Path
    status: int = -1
    said: str = ""
    killed: dict[str, float] = field(default_factory=dict)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind, of all processes, by time."""
        found = []
        for file in sorted((self.directory / "events").glob("worker-*.jsonl")):
            lines = file.read_bytes().split(b"\n")[:-1]
            found += [json.loads(raw) for raw in lines if f'"kind":"{kind}"'.encode() in raw]
        return sorted(found, key=lambda event: event["mono"])

    def parameters(self) -> dict[str, Any]:
        return load_file(self.directory / "model.safetensors")

    def hashes(self) -> set[str]:
        return {event["hash"] for event in self.events("end") if event.get("hash")}


def run(
    directory: Path,
    arguments: list[str],
    script: list[str],
    disturb: Callable[[Drill, subprocess.Popen[str]], None],
    timeout: float,
) -> Drill:
    """``paceline run case.py ARGUMENTS -- SCRIPT`` while `disturb` does its worst in this thread."""
    drill = Drill(directory)
    command = (*CLI, "run", str(CASE), "--run-dir", str(directory), *arguments, "--", *script)
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            text=True,
            start_new_session=True,
        )
        try:
            disturb(drill, process)
            drill.status = process.wait(timeout)
        except (subprocess.TimeoutExpired, AssertionError):
            dump_and_kill(process.pid)
            process.wait()
            out.seek(0)
            raise AssertionError(f"not finished after {timeout:g} s\n{out.read()[-8000:]}") from None
        except BaseException:
            dump_and_kill(process.pid)
            process.wait()
            raise
        out.seek(0)
        drill.said = out.read()
    return drill


def workers(directory: Path) -> dict[str, int]:
    """Process ids by name, as the run directory has them now."""
    try:
        entries = json.loads((directory / "processes.json").read_text())
    except (OSError, ValueError):
        return {}
    return {entry["name"]: entry["pid"] for entry in entries if entry["role"] == "worker"}


def steps(directory: Path) -> int:
    """The last step in any ledger."""
    last = 0
    for file in (directory / "ledger").glob("*.jsonl"):
        for raw in file.read_bytes().split(b"\n")[-3:-1]:
            line = json.loads(raw)
            last = max(last, line.get("s", 0))
    return last


def members(drill: Drill) -> list[str]:
    """Of the newest group."""
    views = drill.events("view")
    return max(views, key=lambda view: view["epoch"])["members"] if views else []


def whole(drill: Drill, size: int) -> bool:
    """The newest group has all its members, and every one of them has entered it."""
    views = drill.events("view")
    newest = max((view["epoch"] for view in views), default=0)
    return sum(view["epoch"] == newest and view["size"] == size for view in views) == size


def wait_for(what: Callable[[], bool], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        assert process.poll() is None, f"the run ended with {process.returncode}"
        time.sleep(0.005)


def killer(
    seed: int, kills: int, every: int, number: int = signal.SIGKILL
) -> Callable[[Drill, subprocess.Popen[str]], None]:
    """Kill a random worker at a random moment within each stretch of `every` steps."""
    print(f"seed {seed}")

    def disturb(drill: Drill, process: subprocess.Popen[str]) -> None:
        draw = random.Random(seed)
        target = 3
        for _ in range(kills):
            target += draw.randrange(1, every)
            wait_for(lambda target=target: steps(drill.directory) >= target, 60, process)
            time.sleep(draw.random() * 0.01)
            alive = {n: pid for n, pid in workers(drill.directory).items() if n not in drill.killed}
            name = draw.choice(sorted(alive))
            os.kill(alive[name], number)
            drill.killed[name] = time.monotonic()
            target = max(target, steps(drill.directory)) + 2

    return disturb


def reference(directory: Path, script: list[str]) -> dict[str, Any]:
    """The parameters of the undisturbed run on one process."""
    done = run_paceline(
        "run", CASE, "-n", "1", "--run-dir", directory, "--", *script, cwd=directory.parent, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(directory / "model.safetensors")


def differ(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def prove(drill: Drill, expected: dict[str, Any], tolerance: float = 1e-9, status: int = 0) -> None:
    """The oracle: it ended well, everybody has the same parameters, those of the undisturbed run, and the ledger proves the rows."""
    assert drill.status == status, drill.said[-6000:]
    assert len(drill.hashes()) == 1, drill.said[-6000:]
    proved = run_paceline("verify", "ledger", drill.directory, cwd=drill.directory.parent)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    assert differ(expected, drill.parameters()) <= tolerance


if __name__ == "__main__":  # by hand: drill.py DIRECTORY SEED KILLS EVERY [run arguments] -- [script arguments]
    cut = sys.argv.index("--")
    home, script = Path(sys.argv[1]), sys.argv[cut + 1 :]
    home.mkdir(parents=True, exist_ok=True)
    drill = run(
        home / "run", sys.argv[5:cut], script, killer(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])), 120
    )
    print(drill.said[-5000:])
    prove(drill, reference(home / "reference", script))
    print("proved", drill.killed)
