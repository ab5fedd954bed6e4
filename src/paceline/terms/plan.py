"""What was decided for a run, as frozen values: the strategy, the plan, and this process's place in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Value = Any
"""An argument of a recipe: a number, string, boolean, None, or another :class:`Call`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One recipe with its arguments as they were written, e.g. ``ddp(codec=bf16)``.

    A bare name such as ``bf16`` is a call without arguments and without parentheses; it prints back as it was written.
    """

    name: str
    args: tuple[Value, ...] = ()
    kwargs: tuple[tuple[str, Value], ...] = ()
    bare: bool = False

    def __str__(self) -> str:
        if self.bare:
            return self.name
        parts = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs]
        return f"{self.name}({', '.join(parts)})"


@dataclass(frozen=True, slots=True)
class Product:
    """``left * right``: left inside a replica, right between replicas."""

    factors: tuple[Call, ...]

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


Strategy = Call | Product


def _show(value: Value) -> str:
    """Print an argument the way the parser reads it: Python literals, bare names and calls."""
    return str(value) if isinstance(value, Call) else repr(value)


WireName = Literal["auto", "shm", "tcp", "torch"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that was decided before the run, written to ``plan.toml`` and read back by ``run --plan``.

    Attributes:
        script: Path of the user's script as given, or ``module:function`` for ``paceline.launch``.
        processes: World size.
        strategy: Strategy text, canonical form.
        seed: Seed for torch, Python's ``random`` and NumPy at interpreter start, or None to leave them alone.
        threads: Threads per rank for torch and OpenMP.
        wire: Which wire was asked for.
        settings: Environment that the launcher gave to every rank, by variable name, so that it can be printed.
        workers_min, workers_max: Limits of an elastic run, which goes on when it loses a worker; 0 when the run is not
            elastic: then losing one ends it.
        checkpoint: When to save, ``every=500`` steps or ``every=5min``, or empty.
        resume: What to begin from: ``auto`` or a path, or empty.
    """

    script: str
    script_args: tuple[str, ...] = ()
    processes: int = 1
    strategy: str = "ddp()"
    seed: int | None = None
    threads: int = 1
    wire: WireName = "auto"
    stop_on_nan: bool = False
    settings: tuple[tuple[str, str], ...] = ()
    workers_min: int = 0
    workers_max: int = 0
    checkpoint: str = ""
    resume: str = ""

    @property
    def elastic(self) -> bool:
        """The run goes on when it loses a worker."""
        return self.workers_max > 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands: who it is and which handles it inherited. Built by ``launch`` only.

    Attributes:
        rank, size: Position among all ranks of the job; in an elastic run only where this process begins: the members
            decide, and it may change.
        local_rank, local_size: Position among the ranks of this host.
        host: Name of the host, or of the pretended host.
        hosts: For each rank the index of its host, so that everybody knows the topology.
        name: Name of the process in events and files, ``worker-0``; in an elastic run never given twice.
        incarnation: 32 hexadecimal digits, new for each process start.
        run_dir: The run directory, or None when nothing is to be written.
        launcher: Who started this process: ``plain``, ``paceline``, ``torchrun``, ``slurm``, ``mpi``.
        board_fd: Inherited descriptor of the status board, or -1.
        arena_fd: Inherited descriptor of the shared memory of this host, or -1.
        store: Address of the rendezvous, ``unix:PATH`` or ``tcp:HOST:PORT``, or empty.
        slot, slots: Page of this process on the board, and how many pages the board has. In an elastic run a replacement
            takes a page that is free again; else the page is the rank.
        coordinator: Address of the coordinator, ``unix:PATH`` or ``tcp:HOST:PORT``; empty when the run is not elastic.
        secret_fd: Inherited descriptor of the run's secret of 32 bytes, to be read with ``os.pread``, or -1.
        servers: Addresses of the run's parameter servers, the lead first; empty when the strategy has none.
        doors: Where the servers listen for workers of other machines; for servers only.
        serves: Which of the servers this process is, or -1.
        replaces: It stands in for a server that has died, and gets its state from that one's copy, or not at all.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    hosts: tuple[int, ...] = (0,)
    name: str = "worker-0"
    incarnation: str = "0" * 32
    run_dir: Path | None = None
    launcher: str = "plain"
    board_fd: int = -1
    arena_fd: int = -1
    store: str = ""
    plan: Plan = field(default_factory=lambda: Plan(script=""))
    slot: int = 0
    slots: int = 1
    coordinator: str = ""
    secret_fd: int = -1
    servers: tuple[str, ...] = ()
    doors: tuple[str, ...] = ()
    serves: int = -1
    replaces: bool = False

    @property
    def plain(self) -> bool:
        """True under plain ``python``: nobody launched this process, and nothing is to be changed."""
        return self.launcher == "plain"

    @property
    def joins(self) -> bool:
        """The job of this elastic run was begun by others: this process was started later, or in place of one that was lost."""
        return bool(self.coordinator) and self.rank >= self.plan.processes
