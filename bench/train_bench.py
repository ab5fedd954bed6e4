"""Samples per second against ``torchrun`` + DDP of the same torch: same script, model, data and optimizer.

    python bench/train_bench.py [--quick] [--rounds 5] [--workload digits] [--processes 2 4]

Peers take turns (A-B-C-A-B-C), so that a busy moment of the machine hits all of them; what counts is the median. DDP has
two columns: as torchrun starts it, and with the threads and malloc settings that our launcher gives, which is the fair
comparison of the exchange alone.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from launchers import DDP, DDP_TUNED, PACELINE, Column, run
from report import Bar, machine, median, show, write
from workloads import WORKLOADS

COLUMNS = (DDP, DDP_TUNED, PACELINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, two processes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--processes", nargs="+", type=int)
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 5)
    sizes = args.processes or ([2] if args.quick else [2, 4])

    here, rows, bars = machine(), [], []
    for workload in args.workload:
        for size in sizes:
            measured = _take_turns(workload, size, rounds)
            rows += _rows(workload, size, measured)
            bars += _bars(workload, size, measured)
    path = write("train", here, rows, bars)
    columns = ("workload", "processes", "peer", "samples_per_second", "ratio", "of our settings", "crashes")
    show("Training, samples per second", rows, columns, bars, path)
    return 0


def _take_turns(workload: str, size: int, rounds: int) -> dict[Column, list[dict[str, Any]]]:
    measured: dict[Column, list[dict[str, Any]]] = {column: [] for column in COLUMNS}
    for number in range(rounds):
        for column in COLUMNS:
            measured[column].append(run(column, size, "--workload", workload))
            speed = measured[column][-1]["samples_per_second"]
            print(f"{workload} n={size} round {number + 1}/{rounds} {column.name}: {speed:,.1f}/s", file=sys.stderr)
    return measured


def _speed(results: list[dict[str, Any]]) -> float:
    return median([result["samples_per_second"] for result in results])


def _rows(workload: str, size: int, measured: dict[Column, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    plain, tuned = _speed(measured[DDP]), _speed(measured[DDP_TUNED])
    return [
        {
            "workload": workload,
            "processes": size,
            "peer": column.name,
            "samples_per_second": _speed(results),
            "ratio": _speed(results) / plain,
            "of our settings": _speed(results) / tuned,
            "crashes": sum(result["crashes"] for result in results),
            "repetitions": results,
        }
        for column, results in measured.items()
    ]


def _bars(workload: str, size: int, measured: dict[Column, list[dict[str, Any]]]) -> list[Bar]:
    ours, least = _speed(measured[PACELINE]), WORKLOADS[workload].bar
    return [
        Bar(f"{workload}, {size} processes, against {column.name}", least, ours / _speed(measured[column]))
        for column in (DDP, DDP_TUNED)
    ]


if __name__ == "__main__":
    sys.exit(main())
