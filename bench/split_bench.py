"""Split models: samples per second against the same model split by hand from the same parts of torch, under torchrun.

    python bench/split_bench.py [--quick] [--rounds 3] [--only fsdp pipeline]

By hand means what the documentation of torch shows: ``fully_shard`` on each block, ``parallelize_module`` with a plan for this model,
stages cut in the middle under a schedule; with the threads and malloc settings of our launcher. The plan by hand splits feed-forward
layers only (a fused qkv would have to be rewritten); ours splits attention as well. Sides take turns; medians of quiet runs count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launchers import DDP_TUNED, Column, execute, run
from report import Bar, machine, median, show, write
from turns import Result, counting, quiet, take_turns

HERE = Path(__file__).parent
BAR = 0.97


@dataclass(frozen=True)
class Case:
    """One way to split.

    Attributes:
        how: What ``split_peer.py`` calls it.
        strategy: What we call it.
        processes: How many.
        workload: What is trained.
        rows: Of a global batch.
    """

    how: str
    strategy: str
    processes: int
    workload: str
    rows: int


CASES = {
    "fsdp": Case("fsdp", "fsdp", 2, "gpt10m", 8),
    "fsdp mlp": Case("fsdp", "fsdp", 2, "mlp25m", 32),
    "tensor": Case("tensor", "tensor", 2, "gpt10m", 8),
    "gpipe": Case("gpipe", "pipeline(schedule=gpipe, microbatches=4)", 2, "gpt10m", 8),
    "1f1b": Case("1f1b", "pipeline(schedule=1f1b, microbatches=4)", 2, "gpt10m", 8),
    "1f1b mlp": Case("1f1b", "pipeline(schedule=1f1b, microbatches=4)", 2, "mlp25m", 32),
    "hsdp": Case("hsdp", "fsdp(2) * ddp(2)", 4, "gpt10m", 16),
    "tensor * ddp": Case("tensor_ddp", "tensor(2) * ddp(2)", 4, "gpt10m", 16),
}
QUICK = ("fsdp", "tensor", "1f1b")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, three cases")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", choices=CASES)
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 3)
    names = args.only or (QUICK if args.quick else tuple(CASES))

    here, rows, bars = machine(), [], []
    path = None
    for name in names:
        case = CASES[name]
        sides = take_turns(rounds, partial(_by_hand, case), partial(_ours, case))
        chosen = counting(*sides)
        hand, ours = (median([r["samples_per_second"] for r in runs]) for runs in chosen)
        rows.append(
            {
                "case": name,
                "strategy": case.strategy,
                "workload": case.workload,
                "processes": case.processes,
                "by hand": hand,
                "paceline": ours,
                "ratio": ours / hand,
                "quiet runs": " ".join(f"{len(quiet(runs))} of {len(runs)}" for runs in sides),
                "repetitions": {"by hand": sides[0], "paceline": sides[1]},
            }
        )
        bars.append(Bar(f"{name}: paceline against the same by hand", BAR, ours / hand))
        path = write("split", here, rows, bars)  # each time: whoever ends it early keeps what was measured
    assert path is not None
    columns = ("case", "workload", "processes", "by hand", "paceline", "ratio", "quiet runs")
    show("Split models, samples per second", rows, columns, bars, path)
    return 0


def _by_hand(case: Case) -> Result:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        out = Path(name) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
        command += [str(HERE / "split_peer.py"), "--how", case.how, "--workload", case.workload]
        command += ["--rows", str(case.rows), "--out", str(out)]
        return _tell(
            case, "by hand", _often(partial(execute, command, DDP_TUNED.environment(case.processes), out, 300))
        )


def _ours(case: Case) -> Result:
    column = Column("paceline", "paceline", strategy=case.strategy)
    result = run(column, case.processes, "--workload", case.workload, "--rows", str(case.rows), timeout=300)
    return _tell(case, "paceline", result)


def _often(once: Any, tries: int = 3) -> Result:
    """gloo's processes now and then abort on their way out, after all the work was done."""
    for _ in range(tries - 1):
        try:
            return once()  # type: ignore[no-any-return]
        except RuntimeError:
            continue
    return once()  # type: ignore[no-any-return]


def _tell(case: Case, side: str, result: Result) -> Result:
    told = (
        f"{result['samples_per_second']:,.1f}/s, loss {result['loss']:.4f}, others used {result['others_cores']} cores"
    )
    print(f"{case.how} {case.workload} n={case.processes} {side}: {told}", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
