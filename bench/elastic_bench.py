"""What it costs to be ready for a loss, and how long a loss takes.

    python bench/elastic_bench.py [--quick] [--processes 2] [--kills 50] [--seed 1]

1. Samples per second of a run that goes on when it loses a worker, against the same run of exactly N workers, undisturbed.
2. Workers of a small model are killed (SIGKILL) at random moments, one after the other; the time from the kill to the next step that
   those who are left have committed, read from their ledgers. The run must end well, with every row counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from launchers import PACELINE, PACELINE_ELASTIC, end, run
from report import Bar, machine, median, show, write
from turns import counting, quiet, take_turns
from workloads import WORKLOADS

CASE = Path(__file__).parent.parent / "tests" / "chaos" / "case.py"
COST, MEDIAN_S, WORST_S = 0.98, 0.5, 1.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, ten kills")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    here, rows, bars = machine(), [], []
    for workload in args.workload:
        _cost(workload, args.processes, args.rounds or (2 if args.quick else 5), rows, bars)
    kills = args.kills if args.kills is not None else (10 if args.quick else 50)
    if kills:
        _losses(kills, args.seed, rows, bars)
    path = write("elastic", here, rows, bars)
    columns = ("what", "peer", "value", "ratio", "quiet runs", "p50", "p99")
    show("Elastic runs", rows, columns, bars, path)
    return 0


def _cost(workload: str, size: int, rounds: int, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    columns = (PACELINE, PACELINE_ELASTIC)
    both = take_turns(rounds, *(partial(run, column, size, "--workload", workload) for column in columns))
    speeds = [median([r["samples_per_second"] for r in chosen]) for chosen in counting(*both)]
    for column, results, speed in zip(columns, both, speeds, strict=True):
        row = {"what": f"{workload}, n={size}: samples per second", "peer": column.name, "value": speed}
        row |= {"ratio": speed / speeds[0], "quiet runs": f"{len(quiet(results))} of {len(results)}"}
        rows.append({**row, "repetitions": results})
        print(f"{workload}: {column.name} {speed:,.1f}/s", file=sys.stderr)
    bars.append(Bar(f"{workload}, n={size}: elastic against exactly {size}", COST, speeds[1] / speeds[0]))


def _losses(kills: int, seed: int, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    draw, times, per_run = random.Random(seed), [], 5
    proved = 0
    while len(times) < kills:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            times += _one_run(Path(name) / "run", min(per_run, kills - len(times)), draw)
            done = subprocess.run(
                [sys.executable, "-m", "paceline.launch.cli", "verify", "ledger", str(Path(name) / "run")], check=False
            )
            proved += done.returncode == 0
    runs = -(-kills // per_run)
    ordered = sorted(times)
    p50, p99 = median(ordered), ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    rows.append(
        {
            "what": f"seconds from kill -9 to the next committed step, 4 workers, {kills} kills, seed {seed}",
            "peer": "paceline, elastic",
            "value": p50,
            "p50": p50,
            "p99": p99,
            "repetitions": times,
        }
    )
    bars += [
        Bar(f"{MEDIAN_S} s over the median time", 1.0, MEDIAN_S / p50),
        Bar(f"{WORST_S} s over the 99th percentile", 1.0, WORST_S / p99),
        Bar("runs whose ledger proves every row once", 1.0, proved / runs),
    ]


def _one_run(directory: Path, kills: int, draw: random.Random) -> list[float]:
    command = [sys.executable, "-m", "paceline.launch.cli", "run", str(CASE), "-n", "4", "--workers", "1:4"]
    command += ["--run-dir", str(directory), "--", "--epochs", "100000"]
    times = []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            for _ in range(kills):
                _until(lambda: _members(directory) == 4, process)
                time.sleep(draw.random() * 0.5)  # a random moment of a step
                times.append(_kill(directory, draw, process))
                print(f"{times[-1]:.3f} s", file=sys.stderr)
            process.send_signal(signal.SIGINT)
            if process.wait(30) != 130:
                said.seek(0)
                raise RuntimeError(said.read()[-4000:])
        finally:
            end(process)
    return times


def _kill(directory: Path, draw: random.Random, process: subprocess.Popen[Any]) -> float:
    entries = json.loads((directory / "processes.json").read_text())
    victim = draw.choice([entry for entry in entries if entry["role"] == "worker"])
    epoch = _newest(directory)
    began = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    _until(lambda: _newest(directory, committed=True) > epoch, process, 0.001)
    return time.monotonic() - began


def _until(what: Any, process: subprocess.Popen[Any], pause: float = 0.01) -> None:
    deadline = time.monotonic() + 90
    while not what():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"what was waited for did not happen; exit status {process.poll()}")
        time.sleep(pause)


def _tails(directory: Path) -> list[list[dict[str, Any]]]:
    """The last lines of every ledger."""
    tails = []
    for file in (directory / "ledger").glob("*.jsonl"):
        with file.open("rb") as ledger:
            ledger.seek(max(0, file.stat().st_size - 4096))
            tails.append([json.loads(raw) for raw in ledger.read().split(b"\n")[1:-1]])
    return tails


def _newest(directory: Path, committed: bool = False) -> int:
    """The newest group; `committed`: that has committed a step."""
    newest = 0
    for lines in _tails(directory):
        group = 0
        for line in lines:
            group = line["g"] if line["k"] == "g" else group
            if group and (line["k"] == "c" or not committed):
                newest = max(newest, group)
    return newest


def _members(directory: Path) -> int:
    """Of the newest group that has committed a step, where that is in sight."""
    found = (0, 0)
    for file in (directory / "ledger").glob("*.jsonl"):
        group: dict[str, Any] = {"g": 0, "members": []}
        for raw in file.read_bytes().split(b"\n")[:-1]:
            if raw.startswith(b'{"k":"g"'):
                group = json.loads(raw)
            elif raw.startswith(b'{"k":"c"') and group["g"] > found[0]:
                found = (group["g"], len(group["members"]))
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
