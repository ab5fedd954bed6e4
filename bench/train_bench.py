"""Samples per second against ``torchrun`` + DDP of the same torch: same script, model, data and optimizer.

    python bench/train_bench.py [--quick] [--rounds 5] [--workload digits] [--processes 2 4]

Peers take turns (A-B-C-A-B-C), so that a busy moment of the machine hits all of them; what counts is the median of the runs
during which nobody else used the machine, and the table says how many these were. DDP has
two columns: as torchrun starts it, and with the threads and malloc settings that our launcher gives, which is the fair
comparison of the exchange alone. Paceline has two as well: as it comes, and with one copy of parameters and optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from launchers import DDP, DDP_TUNED, PACELINE, PACELINE_SHARED, Column, run
from report import Bar, machine, median, show, write
from turns import Result, counting, quiet, take_turns
from workloads import WORKLOADS

THEIRS, OURS = (DDP, DDP_TUNED), (PACELINE, PACELINE_SHARED)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, two processes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--processes", nargs="+", type=int)
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 5)
    sizes = args.processes or ([2] if args.quick else [2, 4])

    here = machine()
    for size in sizes:
        _measure_size(size, args.workload, rounds, here)
    return 0


def _measure_size(size: int, workloads: list[str], rounds: int, here: dict[str, Any]) -> None:
    rows, bars = [], []
    for workload in workloads:
        measured = _measure(workload, size, rounds)
        rows += _rows(workload, size, measured)
        bars += _bars(workload, size, measured)
        path = write(f"train-n{size}", here, rows, bars)  # each time: whoever ends it early keeps what was measured
    columns = (
        "workload",
        "processes",
        "peer",
        "samples_per_second",
        "ratio",
        "of our settings",
        "quiet runs",
        "crashes",
    )
    show("Training, samples per second", rows, columns, bars, path)


def _measure(workload: str, size: int, rounds: int) -> dict[Column, list[Result]]:
    columns = (*THEIRS, *OURS)
    return dict(zip(columns, take_turns(rounds, *(partial(_once, c, workload, size) for c in columns)), strict=True))


def _once(column: Column, workload: str, size: int) -> Result:
    result = run(column, size, "--workload", workload)
    told = f"{result['samples_per_second']:,.1f}/s, others used {result['others_cores']} cores"
    print(f"{workload} n={size} {column.name}: {told}", file=sys.stderr)
    return result


def _speeds(measured: dict[Column, list[Result]]) -> dict[Column, float]:
    chosen = counting(*measured.values())
    return {c: median([r["samples_per_second"] for r in runs]) for c, runs in zip(measured, chosen, strict=True)}


def _rows(workload: str, size: int, measured: dict[Column, list[Result]]) -> list[dict[str, Any]]:
    speeds = _speeds(measured)
    return [
        {
            "workload": workload,
            "processes": size,
            "peer": column.name,
            "samples_per_second": speeds[column],
            "ratio": speeds[column] / speeds[DDP],
            "of our settings": speeds[column] / speeds[DDP_TUNED],
            "quiet runs": f"{len(quiet(results))} of {len(results)}",
            "crashes": sum(result["crashes"] for result in results),
            "repetitions": results,
        }
        for column, results in measured.items()
    ]


def _bars(workload: str, size: int, measured: dict[Column, list[Result]]) -> list[Bar]:
    speeds = _speeds(measured)
    return [
        Bar(
            f"{workload}, {size} processes: {ours.name} against {theirs.name}",
            WORKLOADS[workload].bar,
            speeds[ours] / speeds[theirs],
        )
        for ours in OURS
        for theirs in THEIRS
    ]


if __name__ == "__main__":
    sys.exit(main())
