"""Runs the command line as a user would, in a session of its own, and never waits for ever.

When the time is up, every process of the tree is asked for its stacks (workers first, the launcher last, so that it can
still pass their output on), then the whole tree is killed, and the output so far is in the failure.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

CLI = (sys.executable, "-m", "paceline")


def run_paceline(
    *arguments: str | os.PathLike[str],
    cwd: Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``paceline ARGUMENTS`` in `cwd`; see :func:`run_python`."""
    return run_command((*CLI, *map(os.fspath, arguments)), cwd=cwd, timeout=timeout, env=env)


def run_python(
    *arguments: str | os.PathLike[str],
    cwd: Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with the interpreter of the tests."""
    return run_command((sys.executable, *map(os.fspath, arguments)), cwd=cwd, timeout=timeout, env=env)


def run_command(
    command: tuple[str, ...],
    *,
    cwd: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `command` and return its status and output.

    Args:
        command: Program and arguments.
        cwd: Working directory; it is where ``runs/`` appears.
        timeout: Seconds. When they are over, the test fails with the stacks of all processes.
        env: Added to this process's environment.
    """
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    # Files, not pipes: a grandchild that outlives the command must not keep the test waiting for the end of a pipe.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            dump_and_kill(process.pid)
            process.wait()
            text = _report(command, out, err)
            raise AssertionError(f"not finished after {timeout:g} s\n{text}") from None
        except BaseException:
            dump_and_kill(process.pid, patience=0)
            process.wait()
            raise
        return subprocess.CompletedProcess(command, status, _read(out), _read(err))


def show(done: subprocess.CompletedProcess[str]) -> str:
    """Command, status and output, for the message of an assertion."""
    return f"$ {' '.join(done.args)}\nexit {done.returncode}\n-- stdout\n{done.stdout}\n-- stderr\n{done.stderr}"


def dump_and_kill(pid: int, *, patience: float = 1.0) -> None:
    """SIGABRT to the tree below `pid`, youngest generation first, `pid` last; then SIGKILL to whatever is left of it."""
    generations = _generations(psutil.Process(pid))
    for family in reversed(generations):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGCONT)
                member.send_signal(signal.SIGABRT)
        time.sleep(patience)
    for member in itertools.chain(*generations):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _generations(root: psutil.Process) -> list[list[psutil.Process]]:
    """`root`, its children, their children, and so on."""
    found = [[root]]
    while found[-1]:
        found.append([])
        for parent in found[-2]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[-1] += parent.children()
    return found


def _read(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return file.read()  # type: ignore[attr-defined]


def _report(command: tuple[str, ...], out: object, err: object) -> str:
    return f"$ {' '.join(command)}\n-- stdout\n{_read(out)}\n-- stderr, with the stacks\n{_read(err)}"
