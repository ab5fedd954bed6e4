"""``paceline logs RUN``: what each worker has printed, as it came, with its number before each line."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from paceline.launch.rundir import look_into
from paceline.terms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, or its name below runs/")
    parser.add_argument("--rank", type=int, metavar="N", help="only worker-N")
    parser.add_argument("--tail", type=int, metavar="LINES", help="only the last lines of each worker")


def main(args: argparse.Namespace) -> int:
    run = look_into(args.run)
    logs = {rank: path for rank, path in _logs(run) if args.rank in (None, rank)}
    if args.rank is not None and not logs:
        raise UsageError("PL105", f"{run} has no log of worker-{args.rank}")
    for rank, path in logs.items():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[-args.tail :] if args.tail else lines:
            shown = line.rpartition("\r")[2] or line
            print(json.dumps({"rank": rank, "line": shown}) if args.format == "json" else f"[{rank}] {shown}")
    return 0


def _logs(run: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"worker-(\d+)\.log", path.name), path) for path in (run / "logs").glob("*.log")]
    return sorted((int(match[1]), path) for match, path in found if match is not None)
