"""Two machines with a gigabit between them, made of two network namespaces: Paceline and DDP, both under torchrun.

    sudo python bench/network_bench.py [--quick] [--rate 1gbit]

A pair of virtual interfaces joins the namespaces, each end limited by a token bucket; one process on each side. Each side
has a host name of its own, which resolves to its address, so nobody can take a short cut through shared memory: the bytes
sent are counted and shown.
Needs root and the tools `ip`, `tc` and `unshare`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launchers import DDP, PACELINE, PEER, Column, background, execute
from report import Bar, machine, median, show, write
from turns import Others, Result, counting, quiet, take_turns
from workloads import WORKLOADS

NOT_SLOWER = 1.0
INTERFACE = "paceline0"
TOOLS = ("ip", "tc", "unshare", "sh")


@dataclass(frozen=True)
class Side:
    """One of the two pretended machines.

    Attributes:
        namespace: Its network, and its host name.
        address: Of its end of the wire.
        hosts: What it sees as /etc/hosts.
    """

    namespace: str
    address: str
    hosts: Path

    def run(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.namespace, *command], check=True, capture_output=True, text=True)

    def wrap(self, command: list[str]) -> list[str]:
        """`command` in this namespace, under a host name of its own."""
        named = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", named, self.namespace, str(self.hosts)]
        return ["ip", "netns", "exec", self.namespace, *inside, *command]

    def bytes_sent(self) -> int:
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "cat", path], check=True, capture_output=True, text=True
        )
        return int(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rate", default="1gbit", help="as `tc` writes it (default: %(default)s)")
    args = parser.parse_args(argv)
    lacking = _lacking()
    if lacking:
        print(f"network: not measured, {lacking}")
        return 0

    rounds = 2 if args.quick else 5
    here, rows, bars = machine(), [], []
    with _two_machines(args.rate) as sides:
        for workload in ("gpt10m",) if args.quick else ("digits", "mlp25m", "gpt10m"):
            turns = (partial(_run, column, workload, sides) for column in (DDP, PACELINE))
            both = take_turns(rounds, *turns)
            speeds = [median([r["samples_per_second"] for r in chosen]) for chosen in counting(*both)]
            for column, results, speed in zip((DDP, PACELINE), both, speeds, strict=True):
                row = {"workload": workload, "peer": column.name, "rate": args.rate, "samples_per_second": speed}
                row |= {"ratio": speed / speeds[0], "MB per step": median([r["megabytes_per_step"] for r in results])}
                rows.append({**row, "quiet runs": f"{len(quiet(results))} of {len(results)}", "repetitions": results})
            bars.append(Bar(f"{workload} at {args.rate}", NOT_SLOWER, speeds[1] / speeds[0]))
    path = write("network", here, rows, bars)
    columns = ("workload", "peer", "rate", "samples_per_second", "ratio", "MB per step", "quiet runs")
    show("Two machines, samples per second", rows, columns, bars, path)
    return 0


def _lacking() -> str:
    """Why this cannot be measured here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"there is no {missing[0]}" if missing else ""


@contextmanager
def _two_machines(rate: str) -> Iterator[tuple[Side, Side]]:
    """Namespaces, interfaces, limits, names; all gone afterwards, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        hosts = Path(directory) / "hosts"
        a, b = (Side(f"pl-bench-{os.getpid()}-{end}", f"10.213.7.{end}", hosts) for end in (1, 2))
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{side.address} {side.namespace}\n" for side in (a, b)))
        try:
            for side in (a, b):
                _ip("netns", "add", side.namespace)
            peer = ("peer", "name", INTERFACE, "netns", b.namespace)
            _ip("link", "add", INTERFACE, "netns", a.namespace, "type", "veth", *peer)
            for side in (a, b):
                side.run("ip", "addr", "add", f"{side.address}/24", "dev", INTERFACE)
                side.run("ip", "link", "set", "lo", "up")
                side.run("ip", "link", "set", INTERFACE, "up")
                limit = ("rate", rate, "burst", "1mb", "latency", "50ms")
                side.run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)
            yield a, b
        finally:
            for side in (a, b):
                subprocess.run(["ip", "netns", "del", side.namespace], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _run(column: Column, workload: str, sides: tuple[Side, Side]) -> Result:
    """One run over both machines, each with half of the cores. Both peers get the same settings."""
    first, second = sides
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        out = Path(name) / "result.json"
        environment = column.environment(1) | {"OMP_NUM_THREADS": str(threads)}
        before, others = first.bytes_sent(), Others()
        there = second.wrap(_torchrun(column, workload, first.address, 1, out))
        here = first.wrap(_torchrun(column, workload, first.address, 0, out))
        with background(there, environment):
            result = execute(here, environment, out, timeout=180)
        result["others_cores"] = others.cores()  # now that the other side has ended, it counts as ours
    told = f"{result['samples_per_second']:,.1f}/s, others used {result['others_cores']} cores"
    print(f"{workload} {column.name}: {told}", file=sys.stderr)
    work = WORKLOADS[workload]
    steps = (work.warm_up + work.timed) * work.steps
    return {**result, "megabytes_per_step": (first.bytes_sent() - before) / steps / 1e6}


def _torchrun(column: Column, workload: str, address: str, node: int, out: Path) -> list[str]:
    where = (f"--node-rank={node}", f"--master-addr={address}", "--master-port=29533")
    script = (PEER, "--peer", column.peer, "--workload", workload, "--out", str(out))
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *where, *script]


if __name__ == "__main__":
    sys.exit(main())
