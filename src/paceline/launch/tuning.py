"""The settings that the launcher gives to every rank, and the number of ranks that it agrees to start.

Each setting is there because it was measured to matter, is printed, is written to the plan, and gives way: first to what the
user's environment already says, and both of them to ``--set KEY=VALUE``.

**Threads.** N ranks that each use all cores wait for each other's threads. One share of the cores each; and where there are
more threads than cores all the same, waiting threads must sleep instead of spin.

**Memory.** glibc returns big blocks to the kernel as soon as they are free, so a training step with temporaries of 40–100 MB
faults in the same pages again at every step. Kept in the heap they are faulted once. What may stay unused is bounded.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline.terms.errors import UsageError

_MOST_PROCESSES = 1024
_FILES_PER_RANK = 6  # two pipes of output, reports, life, the process itself, its log
_FILES_BESIDES = 64
_MIB = 1 << 20

_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def has_accelerator() -> bool:
    """Whether this machine has a device whose memory is not the processor's."""
    return any(map(os.path.exists, _ACCELERATORS))


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine gives this launcher.

    Attributes:
        cores: Processors that it may use: the affinity mask, and the quota of its container.
        memory: Bytes of physical memory.
        glibc: The C library is glibc, so that the MALLOC_ variables mean something.
    """

    cores: int
    memory: int
    glibc: bool

    @classmethod
    def here(cls) -> Machine:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(_cores(), memory, _is_glibc())


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):
        return False


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return allowed


@dataclass(frozen=True, slots=True)
class Settings:
    """What was decided for every rank.

    Attributes:
        threads: Threads per rank.
        given: Environment that every rank gets, by name.
        kept: Names that the user's environment had set, and that were left alone.
    """

    threads: int
    given: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        parts = [" ".join(f"{name}={value}" for name, value in self.given)]
        if self.kept:
            parts.append(f"left as you set it: {' '.join(self.kept)}")
        return "; ".join(filter(None, parts))


def choose(
    machine: Machine,
    processes: int,
    environ: Mapping[str, str],
    *,
    threads: int | None = None,
    overrides: Mapping[str, str] | None = None,
    servers: int = 0,
    lean: bool = False,
) -> Settings:
    """Decide the settings of each of `processes` ranks. Pure.

    Args:
        machine: Where they run.
        processes: How many.
        environ: The user's environment; what it sets is left alone.
        threads: ``--threads``: stronger than OMP_NUM_THREADS in the environment.
        overrides: ``--set``: strongest, and the way to set anything else.
        servers: Processes beside the ranks, with as many threads. They work while ranks wait for them, so ranks keep their
            cores; but threads that spin after their work would hold the cores that the other side needs.
        lean: Memory counts for more than time: what is freed goes back at once.
    """
    asked = dict(overrides or {})
    named = threads or _whole(asked.get("OMP_NUM_THREADS")) or _whole(environ.get("OMP_NUM_THREADS"))
    count = named or max(1, machine.cores // processes)
    advised = {"OMP_NUM_THREADS": str(count)}
    if count > 1 and (processes + servers) * count > machine.cores:
        advised["OMP_WAIT_POLICY"] = "PASSIVE"
    if machine.glibc:
        advised |= _LEAN if lean else _malloc(machine, processes)
    strong = asked if threads is None else {"OMP_NUM_THREADS": str(threads), **asked}
    kept = tuple(name for name in advised if name in environ and name not in strong)
    given = {name: value for name, value in advised.items() if name not in kept} | strong
    return Settings(count, tuple(given.items()), kept)


_LEAN = {"MALLOC_MMAP_THRESHOLD_": str(_MIB), "MALLOC_TRIM_THRESHOLD_": str(_MIB)}


def _malloc(machine: Machine, processes: int) -> dict[str, str]:
    """Big blocks come from the heap and stay there, up to an eighth of this rank's share of the memory."""
    idle = min(1024 * _MIB, max(64 * _MIB, machine.memory // (8 * processes)))
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(idle),
        "MALLOC_TOP_PAD_": str(64 * _MIB),
    }


def _whole(text: str | None) -> int | None:
    """The first number of ``4`` or ``4,2``; None for anything else."""
    head = (text or "").split(",")[0].strip()
    return int(head) if head.isdigit() and int(head) > 0 else None


def check_processes(processes: int) -> None:
    """Refuse a number of ranks that cannot be had here. Never fewer instead.

    Raises:
        UsageError: PL103.
    """
    most, why = _limit()
    if processes < 1:
        raise UsageError("PL103", f"{processes} processes were asked for", help=f"ask for 1 to {most}.")
    if processes > most:
        raise UsageError("PL103", f"{processes} processes were asked for, and {why}", help=f"ask for 1 to {most}.")


def _limit() -> tuple[int, str]:
    """The largest number of ranks, and what limits it."""
    limits = [(_MOST_PROCESSES, f"Paceline starts at most {_MOST_PROCESSES} on one machine")]
    users, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if users != resource.RLIM_INFINITY and os.geteuid() != 0:
        limits.append((users, f"this user may have {users} processes (`ulimit -u`)"))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        ranks = (files - _FILES_BESIDES) // _FILES_PER_RANK
        limits.append((ranks, f"a launcher that may open {files} files can serve {ranks} (`ulimit -Hn`)"))
    return min(limits)


def allow_files(processes: int) -> None:
    """Raise this process's own soft limit of open files to what `processes` ranks need. Workers inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_BESIDES + _FILES_PER_RANK * processes
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
