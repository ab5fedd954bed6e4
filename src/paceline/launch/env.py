"""Where a process stands, read from its environment. Pure: a mapping in, a :class:`Place` out.

Asked in this order, because an inner launcher knows more than the one around it (``srun torchrun …``, ``mpirun`` that starts
its daemons through ``srun``):

1. ``paceline run`` left one variable, :data:`VARIABLE`;
2. torchrun and everything that speaks its dialect: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT;
3. Open MPI, and launchers that speak PMI;
4. Slurm, but only a real task of ``srun``: a shell of ``salloc`` and the batch script itself carry most of the same
   variables and are one plain process (Lightning#20391).

Whoever names ranks, sizes or addresses that do not fit together is refused with PL104: guessing would start several worlds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from paceline.terms.errors import UsageError
from paceline.terms.plan import Place, Plan

VARIABLE = "PACELINE_PLACE"
_MAX_STEP_ID = 0xFFFFFFF0  # above: Slurm's marks for batch scripts and interactive shells, which are no tasks of srun
_TWO_LAUNCHERS = "start the script through one launcher only and do not set these variables by hand."

Environ = Mapping[str, str]


# ---- what `paceline run` leaves for its workers ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Handoff:
    """What the launcher gives to one worker, in one variable. Holds no secret: it can be read in ``/proc``.

    Attributes:
        place: Who the worker is.
        launcher_pid: The parent that it must not outlive.
        life_fd: Read end of a pipe whose other end only the launcher holds: its end is the launcher's end.
        report_fd: Write end of a pipe of JSON lines to the launcher.
        strategy_given: The command line named the strategy, so it overrides the script's.
        function_fd: A memory file that says what to call instead of a script (``function.describe``), or -1. Arguments
            may be longer than a variable can be.
    """

    place: Place
    launcher_pid: int
    life_fd: int
    report_fd: int
    strategy_given: bool = False
    function_fd: int = -1

    def encode(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def decode(cls, text: str) -> Handoff:
        """Read back what :meth:`encode` wrote. Raises UsageError PL104 for anything else."""
        try:
            raw = json.loads(text)
            raw["place"] = _place_from_json(raw["place"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{VARIABLE} is set to something that `paceline run` did not write ({error})"
            raise UsageError(
                "PL104", message, help=f"unset {VARIABLE}; `paceline run` sets it for its workers."
            ) from error


def plan_from_json(raw: dict[str, Any]) -> Plan:
    """The plan of its ``asdict``. Raises KeyError, TypeError or ValueError for anything else."""
    args, settings = raw["script_args"], raw["settings"]
    return Plan(**{**raw, "script_args": tuple(args), "settings": tuple((k, v) for k, v in settings)})


def _place_from_json(raw: dict[str, Any]) -> Place:
    run_dir = Path(raw["run_dir"]) if raw["run_dir"] is not None else None
    missing = {f.name for f in fields(Place)} - raw.keys()
    if missing:
        raise KeyError(", ".join(sorted(missing)))
    return Place(
        **{
            **raw,
            "plan": plan_from_json(raw["plan"]),
            "run_dir": run_dir,
            "hosts": tuple(raw["hosts"]),
            "servers": tuple(raw["servers"]),
            "doors": tuple(raw["doors"]),
        }
    )


# ---- who started this process ---------------------------------------------------------------------------------------
def place(environ: Environ) -> Place:
    """Where the process with this environment stands.

    Host and incarnation are facts of the machine and the moment, so ``session`` fills them in.

    Raises:
        UsageError: PL104, the variables contradict each other.
    """
    if VARIABLE in environ:
        return Handoff.decode(environ[VARIABLE]).place
    found = _torchrun(environ) or _openmpi(environ) or _pmi(environ) or _slurm(environ)
    return found or Place()


def _torchrun(environ: Environ) -> Place | None:
    """``agent:`` instead of ``tcp:`` where torchrun's agent already serves the store; else rank 0 must.

    torchrun keeps its store over a restart, with the addresses of dead processes in it: the restart count in the prefix
    keeps generations apart (pytorch#135712).
    """
    if "RANK" not in environ and ("WORLD_SIZE" not in environ or _is_task_of_srun(environ)):
        return None  # batch scripts export WORLD_SIZE for srun's tasks, which have their ranks from Slurm
    ranks = _ranks(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    run = environ.get("TORCHELASTIC_RUN_ID", "env")
    prefix = f"{run}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    scheme = "agent" if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "tcp"
    return _joined("torchrun", ranks, _store(environ, ranks, scheme, prefix))


def _openmpi(environ: Environ) -> Place | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ and "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ranks = _ranks(environ, *(f"OMPI_COMM_WORLD_{name}" for name in names))
    return _mpi(environ, ranks, environ.get("PMIX_NAMESPACE", ""))


def _pmi(environ: Environ) -> Place | None:
    if "PMI_RANK" not in environ and "PMI_SIZE" not in environ:
        return None
    ranks = _ranks(environ, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    slurm = _slurm(environ)
    if slurm is not None and (slurm.rank, slurm.size) == (ranks.rank, ranks.size):
        return slurm  # srun --mpi=pmi2: Slurm knows the hosts as well
    return _mpi(environ, ranks, "")


def _mpi(environ: Environ, ranks: _Ranks, job: str) -> Place | None:
    """MPI names no address. On one host its job name gives a port; for several hosts the user must name the first."""
    if ranks.size == 1:
        return None  # mpirun -n 1: a plain program
    implied = ("127.0.0.1", _port(job)) if job and ranks.local_size == ranks.size else None
    return _joined("mpi", ranks, _store(environ, ranks, "tcp", job or "mpi", implied))


def _slurm(environ: Environ) -> Place | None:
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if not _is_task_of_srun(environ) or size not in environ:
        return None
    ranks = _ranks(environ, "SLURM_PROCID", size, "SLURM_LOCALID", "", local_size=_slurm_local_size(environ))
    if ranks.size == 1:
        return None
    if environ.get("WORLD_SIZE", environ[size]) != environ[size]:
        raise _contradiction(environ, size, "WORLD_SIZE", why="Slurm counts other tasks than the variable says")
    job = f"{environ.get('SLURM_JOB_ID', '0')}.{environ['SLURM_STEP_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    first = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    implied = (first, _port(job)) if first else None
    return _joined("slurm", ranks, _store(environ, ranks, "tcp", job, implied))


def _is_task_of_srun(environ: Environ) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    interactive = any(name.startswith("SLURM_PTY_") for name in environ)
    return step.isdigit() and int(step) < _MAX_STEP_ID and "SLURM_PROCID" in environ and not interactive


def _slurm_local_size(environ: Environ) -> int:
    """Tasks of this step on this node, from ``SLURM_STEP_TASKS_PER_NODE`` such as ``4(x2),1``; 0 if unknown."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        if count.isdigit():
            counts += [int(count)] * (int(times) if times.isdigit() else 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[07-09,12],login1`` → ``gpu07``.

    >>> first_host("rack[1-2]node[07-09],x")
    'rack1node07'
    """
    host, depth = "", 0
    skipping = False
    for letter in nodes:
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth, skipping = depth - 1, False
        elif depth and letter in ",-":
            skipping = True
        elif letter == ",":
            break
        elif not skipping:
            host += letter
    return host


# ---- shared by all --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Ranks:
    rank: int
    size: int
    local_rank: int
    local_size: int


def _ranks(environ: Environ, rank: str, size: str, local_rank: str, own_size: str, *, local_size: int = 0) -> _Ranks:
    """The four numbers under the names given; the local ones default to one process per host."""
    number = _reader(environ)
    r, n = number(rank, None), number(size, None)
    local = number(local_rank, 0)
    here = number(own_size, 0) or local_size or (1 if local_rank not in environ else local + 1)
    if not 0 <= r < n:
        raise _contradiction(environ, rank, size, why="the rank is not below the size")
    if not 0 <= local < here <= n or local > r:
        raise _contradiction(environ, rank, size, local_rank, own_size, why="the local numbers do not fit")
    return _Ranks(r, n, local, here)


def _reader(environ: Environ) -> Callable[[str, int | None], int]:
    def number(name: str, default: int | None) -> int:
        text = environ.get(name)
        if text is None and default is not None:
            return default
        if text is None:
            raise UsageError("PL104", f"{name} is not set although its companions are", help=_TWO_LAUNCHERS)
        if not text.strip().isdigit():
            raise UsageError("PL104", f"{name}={text!r} is not a number of 0 or more", help=_TWO_LAUNCHERS)
        return int(text)

    return number


def _contradiction(environ: Environ, *names: str, why: str) -> UsageError:
    said = " ".join(f"{name}={environ[name]}" for name in names if name in environ)
    return UsageError("PL104", f"{said}: {why}", help=_TWO_LAUNCHERS)


def _store(environ: Environ, ranks: _Ranks, scheme: str, prefix: str, implied: tuple[str, int] | None = None) -> str:
    """``tcp:HOST:PORT/PREFIX``: MASTER_ADDR and MASTER_PORT where they are set, else what the launcher implies."""
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if implied is not None:
        host, port = host or implied[0], port or str(implied[1])
    if bool(host) != bool(port):
        raise _contradiction(environ, "MASTER_ADDR", "MASTER_PORT", why="one of MASTER_ADDR and MASTER_PORT is missing")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise _contradiction(environ, "MASTER_ADDR", "MASTER_PORT", why="the port is not between 1 and 65535")
    if not host and ranks.size > 1:
        message = f"rank {ranks.rank} of {ranks.size} knows no address to meet the others at"
        raise UsageError(
            "PL104", message, help="set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there."
        )
    return f"{scheme}:{host}:{port}/{prefix}" if host else ""


def _port(job: str) -> int:
    """A port that all tasks of a job compute alike, below the range that Linux hands out by itself."""
    return 15000 + zlib.crc32(job.encode()) % 15000


def _joined(launcher: str, ranks: _Ranks, store: str) -> Place:
    """`hosts` supposes that ranks are numbered host by host; ``connect`` finds out how they really lie."""
    return Place(
        rank=ranks.rank,
        size=ranks.size,
        local_rank=ranks.local_rank,
        local_size=ranks.local_size,
        hosts=tuple(r // ranks.local_size for r in range(ranks.size)),
        name=f"worker-{ranks.rank}",
        launcher=launcher,
        store=store,
        slot=ranks.rank,
        slots=ranks.size,
    )
