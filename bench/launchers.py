"""Starts ``peer.py`` under torchrun or under ``paceline run`` and reads what it measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from paceline.launch import tuning
from turns import Others

HERE = Path(__file__).parent
PEER = str(HERE / "peer.py")


@dataclass(frozen=True)
class Column:
    """One way to run the program.

    Attributes:
        name: Head of the table's column.
        peer: What ``peer.py`` is told to be.
        tuned: torchrun's processes get the settings that our launcher gives to its own.
        strategy: Strategy text for ``paceline run``.
        workers: ``--workers``; ``{n}`` stands for the number of processes.
    """

    name: str
    peer: str
    tuned: bool = False
    strategy: str = "ddp()"
    workers: str = "{n}"

    def command(self, processes: int, directory: Path, arguments: tuple[str, ...]) -> list[str]:
        if self.peer == "ddp":
            head = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
                PEER,
            ]
        else:
            options = ["-n", str(processes), "--run-dir", str(directory / "run"), "--strategy", self.strategy]
            options += ["--workers", self.workers.format(n=processes)]
            head = [sys.executable, "-m", "paceline.launch.cli", "run", PEER, *options, "--"]
        return [*head, "--peer", self.peer, *arguments]

    def environment(self, processes: int) -> dict[str, str]:
        """This process's, without settings that somebody exported for another purpose."""
        machine = tuning.Machine.here()
        ours = dict(tuning.choose(machine, processes, {}).given)
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        return clean | ours if self.tuned else clean


DDP = Column("torchrun + DDP", "ddp")
DDP_TUNED = Column("torchrun + DDP, our settings", "ddp", tuned=True)
PACELINE = Column("paceline", "paceline")
PACELINE_ELASTIC = Column("paceline, elastic", "paceline", workers="1:{n}")
PACELINE_SHARED = Column("paceline, params=shared", "paceline", strategy="ddp(params=shared)")


def run(column: Column, processes: int, *arguments: str, timeout: float = 180, tries: int = 3) -> dict[str, Any]:
    """Run the program; the result carries ``started_at``, the moment before the command, and how many tries crashed.

    gloo's processes now and then abort on their way out ("terminate called without an active exception"), after all the
    work was done. That costs a measurement, not the benchmark: the run is repeated, and the crash counted.

    Raises:
        RuntimeError: The command failed each time; the message carries its output.
    """
    for crashes in range(tries - 1):
        with contextlib.suppress(RuntimeError):
            return {**_run_once(column, processes, arguments, timeout), "crashes": crashes}
    return {**_run_once(column, processes, arguments, timeout), "crashes": tries - 1}


def _run_once(column: Column, processes: int, arguments: tuple[str, ...], timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        out = directory / "result.json"
        command = column.command(processes, directory, (*arguments, "--out", str(out)))
        return execute(command, column.environment(processes), out, timeout)


def execute(command: list[str], environment: Mapping[str, str], out: Path, timeout: float) -> dict[str, Any]:
    """Run `command` and read the JSON that it leaves at `out`."""
    others, started = Others(), time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            status = str(process.wait(timeout))
        except subprocess.TimeoutExpired:
            status = f"none after {timeout:g} s"
        finally:
            end(process)
        if status != "0" or not out.exists():
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}\nexit status {status}\n{said.read()[-4000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    return {**result, "started_at": started, "others_cores": others.cores()}


@contextmanager
def background(command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """`command` runs while the block does, and a little longer where it has not finished."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill what is left of a process and of everything below it: torchrun's workers have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
