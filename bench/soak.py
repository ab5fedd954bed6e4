"""``make soak``: real runs with real faults, one drill after the other, for as long as there is time.

    PYTHONPATH=tests python bench/soak.py [--for MINUTES] [--seed S] [--only NAME ...] [--quick]

Whatever a drill finds wrong (a row lost or doubled, parameters that differ, a process left behind, somebody taken for dead) is printed
with its run directory, which is kept, and makes the exit status 1. How fast things went is measured against bars; on a machine that
others use too a bar may be missed, and that is said, but is no error.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from drills.control import coordinator, launcher
from drills.links import links
from drills.losses import joins, kills
from drills.mixed import mixed
from drills.replicas import replicas
from drills.results import exact, numbers
from drills.servers import servers
from drills.work import Work
from report import machine, show, write

DRILLS: dict[str, tuple[float, Callable[[Work], None]]] = {  # share of the time, and what is done
    "kills": (0.15, kills),
    "joins": (0.12, joins),
    "coordinator": (0.12, coordinator),
    "launcher": (0.12, launcher),
    "numbers": (0.03, numbers),
    "exact": (0.10, exact),
    "links": (0.10, links),
    "mixed": (0.18, mixed),
    "replicas": (0.08, replicas),
    "servers": (0.10, servers),
}
PR_SET_CHILD_SUBREAPER = 36
COLUMNS = ("drill", "what", "value", "p50", "p99")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="minutes", type=float, default=30.0, metavar="MINUTES", help="(default: 30)")
    parser.add_argument("--seed", type=int, help="of all that is random (default: a new one)")
    parser.add_argument(
        "--only", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="NAME", help=", ".join(DRILLS)
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions of each")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 30)
    _settle()
    print(f"soak: seed {seed}", flush=True)
    here, done = machine(), []
    shares = sum(DRILLS[name][0] for name in args.only)
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    for name in args.only:
        share, drill = DRILLS[name]
        done.append(_drill(Work(name, home, seed, 60 * args.minutes * share / shares, args.quick), drill))
    rows, bars = [row for work in done for row in work.rows], [bar for work in done for bar in work.bars]
    path = write("soak", here, rows, bars)
    show("Soak", rows, COLUMNS, bars, path)
    wrong = [f"{work.name}: {text}" for work in done for text in work.wrong]
    print("\n".join(f"\nWRONG: {text}" for text in wrong) or "nothing was wrong", file=sys.stderr)
    if not wrong:
        shutil.rmtree(home)
    return 1 if wrong else 0


def _drill(work: Work, drill: Callable[[Work], None]) -> Work:
    print(f"== {work.name}: for {work.seconds:.0f} s", flush=True)
    drill(work)
    work.finish()
    for bar in work.bars:
        print(f"   {bar}", flush=True)
    for text in work.wrong:
        print(f"   WRONG: {text}", flush=True)
    return work


def _settle() -> None:
    """Orphans come to us, and nobody leaves a core behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
