"""All-reduce on one host: the shared-memory wire, with its C kernel and without, against gloo.

    python bench/allreduce.py [--ranks 2 4] [--repeat 30] [--check] [--tcp]

For each number of ranks, fresh processes run all candidates in turn, in one loop, so that a busy machine is busy for all of
them. A sample is the time of the slowest rank for a short burst of operations, divided by their number. Medians and the share
of the machine that other processes used meanwhile are printed, and written to ``bench/results/allreduce.json`` with the
ratios to gloo. With ``--check`` the exit status is 1 unless the wire with its kernel is five times as fast as gloo at every
size. With ``--tcp`` the wire between hosts takes part too, on the loopback, where it is not encrypted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paceline.group import arena, kernel
from paceline.group.lobby import Lobby
from paceline.group.shm_wire import ShmWire
from paceline.group.tcp_wire import TcpWire
from paceline.group.wire import AllReduce
from paceline.terms.activity import Board
from paceline.terms.errors import WireError

RESULTS = Path(__file__).parent / "results" / "allreduce.json"
SIZES = {"4 KB": 4 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "100 MB": 100 << 20}
BURSTS = {"4 KB": 50, "1 MB": 20, "16 MB": 6, "100 MB": 3}
WARM = 2
NAMES = {"c": "shm, C", "pure": "shm, Python"}
BAR = 5.0
Operation = Callable[[], object]


# ---- one rank -------------------------------------------------------------------------------------------------------
def rank_main(order: dict[str, Any]) -> None:
    """Measure everything; print this rank's samples as JSON."""
    torch.set_num_threads(1)
    rank, size, repeat = order["rank"], order["size"], order["repeat"]
    store = dist.FileStore(order["store"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    wires: list[ShmWire | TcpWire] = [
        open_wire(fd, rank, size, choice) for fd, choice in zip(order["fds"], order["kernels"], strict=True)
    ]
    lobby = None
    if order["tcp"]:
        lobby, wire = open_tcp(Path(order["store"]).parent, rank, size)
        wires.append(wire)
    samples = {}
    for label, nbytes in SIZES.items():
        operations = [operation_of(wire, nbytes) for wire in wires] + [gloo_operation(nbytes)]
        samples[label] = measure(operations, lambda: wires[0].barrier("burst"), repeat, BURSTS[label])
    for wire in wires:
        wire.close()
    if lobby is not None:
        lobby.close()
    dist.destroy_process_group()
    print(json.dumps(samples))


def open_wire(fd: int, rank: int, size: int, choice: Any) -> ShmWire:
    board = Board.private(size)
    return ShmWire(fd, rank, size, board, board.activity(rank), kernel=choice)


def open_tcp(folder: Path, rank: int, size: int) -> tuple[Lobby, TcpWire]:
    """The ranks tell each other their addresses through files."""
    secret = bytes(32)  # nobody else is on this machine
    lobby = Lobby("tcp:127.0.0.1:0", secret)
    (folder / f"{rank}.new").write_text(lobby.address)
    (folder / f"{rank}.new").rename(folder / f"{rank}.address")
    files = [folder / f"{other}.address" for other in range(size)]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    addresses = [file.read_text() for file in files]
    return lobby, TcpWire(addresses, rank, secret, 1, lobby, Board.private(size).activity(rank))


def operation_of(wire: ShmWire | TcpWire, nbytes: int) -> Operation:
    buffer = wire.cut(wire.allocate(nbytes // 4, torch.float32, torch.device("cpu")), [nbytes // 4], [2])[0]

    def operation() -> object:
        return wire.start(AllReduce(buffer, [1.0, 0.0], float(wire.size))).wait()

    buffer.tensor.fill_(wire.rank + 1.0)
    operation()
    assert buffer.tensor.eq(wire.size * (wire.size + 1) / 2).all()
    buffer.tensor.zero_()
    return operation


def gloo_operation(nbytes: int) -> Operation:
    tensor = torch.zeros(nbytes // 4)
    return lambda: dist.all_reduce(tensor)


def measure(operations: list[Operation], meet: Operation, repeat: int, burst: int) -> list[list[float]]:
    """Seconds an operation, by operation and sample. Each burst begins with a few operations that are not counted: the
    candidate before it has left the caches full of its own buffers."""
    samples: list[list[float]] = [[] for _ in operations]
    for _ in range(repeat):
        for operation, kept in zip(operations, samples, strict=True):
            meet()
            for _ in range(WARM):
                operation()
            begin = time.perf_counter()
            for _ in range(burst):
                operation()
            kept.append((time.perf_counter() - begin) / burst)
    return samples


# ---- all ranks ------------------------------------------------------------------------------------------------------
def run(size: int, repeat: int, kernels: list[str], tcp: bool) -> dict[str, list[list[float]]]:
    """Start the ranks; by size label and candidate, each sample's slowest rank."""
    fds = [arena.create() for _ in kernels]
    with tempfile.TemporaryDirectory() as folder:
        order = {"size": size, "repeat": repeat, "kernels": kernels, "tcp": tcp, "fds": fds, "store": f"{folder}/store"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", json.dumps({**order, "rank": rank})],
                stdout=subprocess.PIPE,
                pass_fds=fds,
                env=env,
            )
            for rank in range(size)
        ]
        answers = [process.communicate()[0] for process in processes]
    for fd in fds:
        os.close(fd)
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    by_rank = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {
        label: [
            [max(each) for each in zip(*(r[label][c] for r in by_rank), strict=True)]
            for c in range(len(by_rank[0][label]))
        ]
        for label in SIZES
    }


def machine(has_kernel: bool) -> dict[str, object]:
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": has_kernel,
        "load": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def cpu_seconds_of_others() -> float:
    """CPU time used so far by everybody but our children; only differences mean something. 0 where it is not known."""
    try:
        ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupt, soft, steal = ticks[:8]
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - ours.ru_utime - ours.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(json.loads(arguments.rank))
        return 0
    try:
        kernel.load()
        kernels = ["c", "pure"]
    except WireError as error:
        print(error)
        kernels = ["pure"]
    about, rows = machine(len(kernels) == 2), []
    names = [*(NAMES[each] for each in kernels), *(["tcp"] if arguments.tcp else []), "gloo"]
    print(f"{about}\n{'ranks':>5} {'size':>7} " + " ".join(f"{name:>18}" for name in names))
    for size in arguments.ranks:
        begin, others = time.monotonic(), cpu_seconds_of_others()
        by_label = run(size, arguments.repeat, kernels, arguments.tcp)
        foreign = max(0.0, cpu_seconds_of_others() - others) / (time.monotonic() - begin) / len(os.sched_getaffinity(0))
        about[f"others, {size} ranks"] = round(foreign, 3)
        for label, samples in by_label.items():
            row = summary(size, label, dict(zip(names, samples, strict=True)))
            rows.append(row)
            print(f"{size:5} {label:>7} " + " ".join(f"{show(row, name):>18}" for name in row["median_us"]))
        print(f"      others used {foreign:.0%} of the machine", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"command": " ".join(["python", *sys.argv]), "machine": about, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if arguments.check and any(row["times_gloo"].get(NAMES["c"], 0.0) < BAR for row in rows) else 0


def summary(size: int, label: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
    return {
        "ranks": size,
        "nbytes": SIZES[label],
        "median_us": {name: round(value, 2) for name, value in medians.items()},
        "best_us": {name: round(min(values) * 1e6, 2) for name, values in samples.items()},
        "times_gloo": {name: round(medians["gloo"] / value, 2) for name, value in medians.items()},
    }


def show(row: dict[str, Any], name: str) -> str:
    value = row["median_us"][name]
    text = f"{value:.1f} us" if value < 10_000 else f"{value / 1000:.1f} ms"
    return text if name == "gloo" else f"{text} {row['times_gloo'][name]:5.1f}x"


if __name__ == "__main__":
    sys.exit(main())
