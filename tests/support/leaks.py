"""What a test could leave behind on the machine, looked at before and after it.

Watched: child processes (orphans too, when this process is their subreaper), descriptors and listening sockets, threads,
files in /dev/shm, and temporary files with our name.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
DESCRIPTORS = ("socket:", "pipe:", "/memfd:", "anon_inode:[eventpoll]", "anon_inode:[pidfd]", "/dev/shm/")
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # Python's own, one a process, on purpose


@dataclass(frozen=True)
class Traces:
    """What there is at one moment. Keys tell two things apart that look alike, values are what a failure says."""

    processes: dict[tuple[int, float], str]
    descriptors: dict[tuple[int, str], str]
    threads: dict[int, str]
    files: dict[str, str]

    @classmethod
    def now(cls) -> Traces:
        return cls(_processes(), _descriptors(), _threads(), _files())

    def missing_from(self, before: Traces) -> list[str]:
        """One line for each thing that is here and was not there before."""
        pairs = (
            ("process", self.processes, before.processes),
            ("descriptor", self.descriptors, before.descriptors),
            ("thread", self.threads, before.threads),
            ("file", self.files, before.files),
        )
        return sorted(f"{kind}: {now[key]}" for kind, now, then in pairs for key in now.keys() - then.keys())

    def clean_up(self, before: Traces) -> None:
        """End the processes and remove the files that were not there before, so that the next test is not blamed."""
        for pid, created in self.processes.keys() - before.processes.keys():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    process.kill()
        for name in self.files.keys() - before.files.keys():
            with contextlib.suppress(OSError):
                shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def _processes() -> dict[tuple[int, float], str]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                _reap(child)
                continue
            command = " ".join(child.cmdline()) or child.name()
            if not any(helper in command for helper in HELPERS):
                found[child.pid, child.create_time()] = f"{child.pid} {command[:300]}"
    return found


def _reap(child: psutil.Process) -> None:
    """Collect an orphan that ended. One that a ``Popen`` of this process waits for is left to it."""
    waited_for = {popen.pid for popen in gc.get_objects() if type(popen) is subprocess.Popen}
    if child.ppid() == os.getpid() and child.pid not in waited_for:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


def _descriptors() -> dict[tuple[int, str], str]:
    found = {}
    listening = {c.fd: c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(DESCRIPTORS):
                note = f", listening on {listening[int(name)]}" if int(name) in listening else ""
                found[int(name), target] = f"{name} -> {target}{note}"
    return found


def _threads() -> dict[int, str]:
    return {thread.ident or 0: thread.name for thread in threading.enumerate()}


def _files() -> dict[str, str]:
    shared = [path for path in SHM.iterdir() if not _belongs_to_others(path)] if SHM.is_dir() else []
    temporary = Path(tempfile.gettempdir()).glob("paceline*")
    return {str(path): str(path) for path in (*shared, *temporary)}


def _belongs_to_others(path: Path) -> bool:
    """Another program of this machine has it mapped. A file that a test leaves behind is mapped by nobody or by us."""
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in ours:
            with contextlib.suppress(OSError):
                if str(path) in (process / "maps").read_text():
                    return True
    return False
