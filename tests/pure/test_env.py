"""Who started this process, from its environment alone. Each row is what a launcher really leaves, or a trap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paceline.launch import env
from paceline.launch.env import VARIABLE, Handoff, first_host, place
from paceline.terms.errors import UsageError
from paceline.terms.plan import Place, Plan

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-box-1@1",
}
MASTER = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


JOINED = {
    "torchrun": (TORCHRUN, ("torchrun", 5, 8, 1, 4, "agent:node0:29500/job/2")),
    "torchrun, its own store": (
        TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        ("torchrun", 5, 8, 1, 4, "tcp:node0:29500/job/2"),
    ),
    "Kubeflow: only the four classic names": (
        {"RANK": "2", "WORLD_SIZE": "3", **MASTER},
        ("torchrun", 2, 3, 0, 1, "tcp:head:1234/env/0"),
    ),
    "torchrun inside srun": (SRUN | TORCHRUN, ("torchrun", 5, 8, 1, 4, "agent:node0:29500/job/2")),
    "an IPv6 address": (TORCHRUN | {"MASTER_ADDR": "::1"}, ("torchrun", 5, 8, 1, 4, "agent:::1:29500/job/2")),
    "srun with an address": (SRUN | MASTER, ("slurm", 3, 4, 1, 2, "tcp:head:1234/77.0.0")),
    "srun, batch script exported WORLD_SIZE": (
        SRUN | MASTER | {"WORLD_SIZE": "4"},
        ("slurm", 3, 4, 1, 2, "tcp:head:1234/77.0.0"),
    ),
    "srun --mpi=pmi2": (
        SRUN | MASTER | {"PMI_RANK": "3", "PMI_SIZE": "4"},
        ("slurm", 3, 4, 1, 2, "tcp:head:1234/77.0.0"),
    ),
    "mpirun": (OPENMPI | MASTER, ("mpi", 1, 2, 1, 2, "tcp:head:1234/prterun-box-1@1")),
    "mpirun whose daemons were started by srun": (
        SRUN | OPENMPI | MASTER,
        ("mpi", 1, 2, 1, 2, "tcp:head:1234/prterun-box-1@1"),
    ),
    "Intel MPI": (
        {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **MASTER},
        ("mpi", 1, 4, 1, 2, "tcp:head:1234/mpi"),
    ),
    "Intel MPI in a shell of salloc": (
        BATCH | {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"} | MASTER,
        ("mpi", 0, 4, 0, 2, "tcp:head:1234/mpi"),
    ),
}


@pytest.mark.parametrize(("environ", "expected"), JOINED.values(), ids=JOINED.keys())
def test_joined(environ: dict[str, str], expected: tuple[object, ...]) -> None:
    found = place(environ)
    assert (
        found.launcher,
        found.rank,
        found.size,
        found.local_rank,
        found.local_size,
        found.store,
    ) == expected
    assert found.name == f"worker-{found.rank}"
    assert (found.slot, found.slots) == (found.rank, found.size)
    assert len(found.hosts) == found.size


PLAIN = {
    "nothing": {},
    "a batch script of Slurm": BATCH,  # Lightning#20391
    "a batch script, newer Slurm": BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"},
    "a shell of salloc": BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "srun --pty bash": SRUN | {"SLURM_PTY_PORT": "41000", "SLURM_PTY_WIN_COL": "80"},
    "one task of srun": SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "an address alone": MASTER,
}  # fmt: skip


@pytest.mark.parametrize("environ", PLAIN.values(), ids=PLAIN.keys())
def test_plain(environ: dict[str, str]) -> None:
    assert place(environ) == Place()


CONTRADICTIONS = {
    "a rank beyond the size": TORCHRUN | {"RANK": "8"},
    "a size and no rank": without(TORCHRUN, "RANK"),
    "a rank and no size": without(TORCHRUN, "WORLD_SIZE"),
    "a rank that is no number": TORCHRUN | {"RANK": "first"},
    "a negative rank": TORCHRUN | {"RANK": "-1"},
    "more local ranks than ranks": TORCHRUN | {"LOCAL_WORLD_SIZE": "9"},
    "a local rank beyond the local size": TORCHRUN | {"LOCAL_RANK": "4"},
    "no address": without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"),
    "half an address": without(TORCHRUN, "MASTER_PORT"),
    "a port that is none": TORCHRUN | {"MASTER_PORT": "70000"},
    "Slurm and WORLD_SIZE differ": SRUN | {"WORLD_SIZE": "8"},
    "several hosts under MPI and no address": OPENMPI
    | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    "somebody else's variable": {VARIABLE: "{}"},
}


@pytest.mark.parametrize("environ", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as refused:
        place(environ)
    assert refused.value.code == "PL104"


def test_slurm_implies_an_address_that_all_tasks_compute_alike() -> None:
    others = [
        SRUN | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % 2), "SLURM_NODEID": str(r // 2)} for r in range(4)
    ]
    stores = {place(environ).store for environ in others}
    assert len(stores) == 1
    assert stores.pop().startswith("tcp:gpu07:")
    another_step = place(SRUN | {"SLURM_STEP_ID": "1"}).store
    assert another_step != place(SRUN).store


def test_mpi_on_one_host_needs_no_address() -> None:
    store = place(OPENMPI).store
    assert store.startswith("tcp:127.0.0.1:")
    assert 15000 <= int(store.split(":")[2].split("/")[0]) < 30000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("rack[1-2]node[07-09],x", "rack1node07"),
        ("n1", "n1"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ours_wins_and_comes_back_whole() -> None:
    plan = Plan("train.py", ("--lr", "0.1"), 2, "", 7, 3, "shm", True, (("OMP_NUM_THREADS", "3"),), 1, 4)
    mine = Place(
        1,
        2,
        1,
        2,
        "box",
        (0, 0),
        "worker-5",
        "ab" * 16,
        Path("/tmp/run"),
        "paceline",
        5,
        6,
        "unix:/tmp/x/store",
        plan,
        3,
        16,
        "unix:@coordinator",
        10,
    )
    handoff = Handoff(mine, 42, 7, 8, True, 9)
    assert Handoff.decode(handoff.encode()) == handoff
    assert place(TORCHRUN | {VARIABLE: handoff.encode()}) == mine
    nowhere = Handoff(replace(mine, run_dir=None), 42, 7, 8)
    assert Handoff.decode(nowhere.encode()) == nowhere


def test_the_environment_is_not_read_behind_the_callers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert env.place({}) == Place()
