"""``paceline verify ledger RUN``: every row of every completed epoch exactly once. ``paceline verify checkpoint PATH|RUN``: every
byte is the one that was saved. Both offline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from paceline.launch.rundir import HOME, look_into
from paceline.terms.errors import FileError
from paceline.train.checkpoint_files import Checkpoint, candidates, locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["ledger", "checkpoint"], help="what is to be proved")
    parser.add_argument("run", help="a run's directory, or its name below runs/; or one checkpoint")


def main(args: argparse.Namespace) -> int:
    """0 when it is proved, 1 when not."""
    return _checkpoints(args) if args.what == "checkpoint" else _ledger(args)


def _ledger(args: argparse.Namespace) -> int:
    from paceline.train.proof import verify

    run = look_into(args.run)
    problems = verify(run)
    if args.format == "json":
        print(json.dumps({"run": str(run), "verified": not problems, "problems": problems}))
    elif problems:
        print(f"error PL602: the ledger of {run} does not prove what it should")
        print("\n".join(f"  {problem}" for problem in problems))
    else:
        print(f"{run}: every row of every completed epoch exactly once, steps without gaps, one order on all ranks")
    return 1 if problems else 0


def _checkpoints(args: argparse.Namespace) -> int:
    """One, or all of a run: an older one is what a damaged one is replaced by."""
    path = next((p for p in (Path(args.run), HOME / args.run) if p.exists()), Path(args.run))
    chosen, directory = locate(path)
    paths = [chosen] if chosen is not None else candidates(directory)
    if not paths:
        raise FileError("PL614", f"{path} holds no checkpoint")
    problems = {path: _problems(path) for path in paths}
    for path, found in problems.items():
        if args.format == "json":
            print(json.dumps({"checkpoint": str(path), "verified": not found, "problems": found}))
        elif not found:
            print(f"{path}: whole")
        for problem in found if args.format != "json" else ():
            print(f"error PL613: {problem}")
    return 1 if any(problems.values()) else 0


def _problems(path: Path) -> list[str]:
    try:
        with Checkpoint.open(path) as checkpoint:
            return list(checkpoint.damage())
    except FileError as error:
        return [error.message]
