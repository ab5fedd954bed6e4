"""``make bench``: every benchmark, one after the other. What one of them cannot do here it says, and the others go on.

python bench/run.py [--quick] [--only train start]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {  # name: file, and what makes it quick
    "allreduce": ("allreduce.py", "--ranks", "2", "--repeat", "10"),
    "train": ("train_bench.py", "--quick"),
    "plain": ("plain_bench.py", "--quick"),
    "start": ("start_bench.py", "--quick"),
    "elastic": ("elastic_bench.py", "--quick"),
    "checkpoint": ("checkpoint_bench.py", "--quick"),
    "network": ("network_bench.py", "--quick"),
    "ps": ("ps_bench.py", "--quick"),
    "converge": ("converge_bench.py", "--quick"),
    "split": ("split_bench.py", "--quick"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, two processes only")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args()
    failed = []
    for name in args.only:
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        file, *quick = BENCHMARKS[name]
        code = subprocess.call([sys.executable, str(HERE / file), *(quick if args.quick else [])])
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
