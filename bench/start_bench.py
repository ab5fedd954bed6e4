"""How long a person waits: for the help, for the first line of a run, and for the first training step.

    python bench/start_bench.py [--quick]

The first step is compared with torchrun + DDP: from before the command to the end of the first optimizer step of rank 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from launchers import DDP, PACELINE, PEER, Column, run
from report import Bar, machine, median, show, write
from turns import Result, counting, quiet, take_turns

CLI = (sys.executable, "-m", "paceline.launch.cli")
AT_LEAST_AS_QUICK = 1.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    rounds = 3 if args.quick else 7
    sizes = (2,) if args.quick else (2, 4)

    here = machine()
    rows: list[dict[str, Any]] = [_row("paceline --help", 1, [_help() for _ in range(rounds)])]
    rows.append(_row("paceline run: first line", 2, [_first_line() for _ in range(rounds)]))
    bars = []
    for size in sizes:
        both = take_turns(rounds, *(partial(_first_step, column, size) for column in (DDP, PACELINE)))
        for column, results, chosen in zip((DDP, PACELINE), both, counting(*both), strict=True):
            rows.append(_row(f"{column.name}: first step", size, [r["first_step"] for r in chosen]))
            rows[-1] |= {"quiet runs": f"{len(quiet(results))} of {len(results)}", "repetitions": results}
        ratio = rows[-2]["seconds"] / rows[-1]["seconds"]
        bars.append(Bar(f"first step with {size} processes, against {DDP.name}", AT_LEAST_AS_QUICK, ratio))
    path = write("start", here, rows, bars)
    show("Start, seconds", rows, ("what", "processes", "seconds", "quiet runs"), bars, path)
    return 0


def _row(what: str, processes: int, times: list[float]) -> dict[str, Any]:
    return {"what": what, "processes": processes, "seconds": median(times), "repetitions": times}


def _first_step(column: Column, size: int) -> Result:
    result = run(column, size, "--workload", "digits", "--first-step")
    return {**result, "first_step": result["first_step_at"] - result["started_at"]}


def _help() -> float:
    began = time.perf_counter()
    subprocess.run([*CLI, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _first_line() -> float:
    """Seconds to the first line on the terminal; the run is then left to finish."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        script = ("--peer", "paceline", "--workload", "digits", "--first-step", "--out", str(directory / "out.json"))
        command = [*CLI, "run", PEER, "-n", "2", "--run-dir", str(directory / "run"), "--", *script]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.perf_counter() - began
            process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
        return seconds


if __name__ == "__main__":
    sys.exit(main())
