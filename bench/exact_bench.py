"""What ``ddp(exact=True)`` costs: samples per second with it and without, the same global batch, one and two processes.

    python bench/exact_bench.py [--quick] [--rounds 5] [--workload gpt10m]

Where computing dominates (the GPT with 8 rows a shard) it may take at most half as long again. The other two say where it is worse:
a wide model, of which little is computed for each byte of its gradient, and a tiny one, where the rounds of the loop show. With one
process on several cores there is also what its other threads would have done: exact has one thread a process.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from launchers import PACELINE, Column, run
from report import Bar, machine, median, show, write
from turns import Result, counting, take_turns

SLOWDOWN = 1.5
ROWS = {"gpt10m": 64, "mlp25m": 64, "digits": 256}
EPOCHS = {"gpt10m": 1, "mlp25m": 2, "digits": 20}
EXACT = replace(PACELINE, name="paceline, exact", strategy="ddp(exact=True)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workload", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args(argv)

    here, rows, bars = machine(), [], []
    for workload in args.workload:
        for size in (1, 2):
            once = partial(_once, workload, size)
            turns = take_turns(args.rounds or (1 if args.quick else 5), partial(once, PACELINE), partial(once, EXACT))
            usual, exact = (median([r["samples_per_second"] for r in runs]) for runs in counting(*turns))
            rows.append(_row(workload, size, usual, exact, turns))
            if workload == "gpt10m" and size == 2:
                bars.append(Bar(f"{workload} n={size}: exact against usual", 1 / SLOWDOWN, exact / usual))
    columns = ("workload", "processes", "rows", "usual", "exact", "slowdown")
    show("exact=True, samples per second", rows, columns, bars, write("exact", here, rows, bars))
    return 0


def _once(workload: str, size: int, column: Column) -> Result:
    arguments = ("--rows", str(ROWS[workload]), "--timed", str(EPOCHS[workload]))
    result = run(column, size, "--workload", workload, *arguments, timeout=600)
    print(f"{workload} n={size} {column.name}: {result['samples_per_second']:,.1f}/s", file=sys.stderr)
    return result


def _row(workload: str, size: int, usual: float, exact: float, turns: list[list[Result]]) -> dict[str, Any]:
    return {
        "workload": workload,
        "processes": size,
        "rows": ROWS[workload],
        "usual": usual,
        "exact": exact,
        "slowdown": round(usual / exact, 2),
        "runs": turns,
    }


if __name__ == "__main__":
    sys.exit(main())
