"""``paceline verify ledger RUN``: every row of every completed epoch exactly once, proved offline."""

from __future__ import annotations

import argparse
import json

from paceline.launch.rundir import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["ledger"], help="what is to be proved")
    parser.add_argument("run", help="a run's directory, or its name below runs/")


def main(args: argparse.Namespace) -> int:
    """0 when the ledger proves it, 1 when not."""
    from paceline.train.ledger import verify

    run = find(args.run)
    problems = verify(run)
    if args.format == "json":
        print(json.dumps({"run": str(run), "verified": not problems, "problems": problems}))
    elif problems:
        print(f"error PL602: the ledger of {run} does not prove what it should")
        print("\n".join(f"  {problem}" for problem in problems))
    else:
        print(f"{run}: every row of every completed epoch exactly once, steps without gaps, one order on all ranks")
    return 1 if problems else 0
