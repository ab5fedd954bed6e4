"""What each recipe makes of the same samples, how soon, and for how many bytes: digits and a small GPT, four workers.

    python bench/converge_bench.py [--quick] [--task digits gpt] [--seeds 3] [--recipe "ddp()" "ps()"] [--slow 4]

Every recipe trains the same model from the same seeds on the same number of samples, with workers of the same speed and with one that
is four times slower (the GPT: the recipes only that are meant for that). Computing is mostly a sleep, see ``converge_peer.py``, so
times say who waits for whom, and no more.

A row has, as medians over seeds: loss and accuracy on test data after the last step; the seconds of all steps; the seconds until the
test loss was as low as that of ``ddp()`` of the same seed after two thirds of its samples (empty where more than half never came
there), by the mean of the parameters that the ranks had on the way, or with servers by those of rank 0; and bytes that a rank sends and receives for a
step, as its ``round`` events tell, or by arithmetic where there are none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from launchers import end
from paceline.exchange.recipes import RECIPES
from paceline.exchange.strategy import build
from report import Bar, machine, median, show, write
from workloads import TASKS, Task

HERE = Path(__file__).parent
WORKERS, SLOW = 4, 4.0
SYNCHRONOUS = "ddp()"
NAIVE = "ps(staleness=inf)"
CHOSEN = (
    SYNCHRONOUS,
    "ps()",
    "ps(staleness=4)",
    NAIVE,
    "ps(staleness=inf, late=dc(0.04))",
    "ps(staleness=inf, late=damp(inverse))",
    "ps(staleness=inf, buffer=4)",
    "ps(backup=1)",
    "hogwild()",
    "async_diloco(every=50)",
    "async_easgd(every=10)",
    "adpsgd()",
    "local_sgd(8)",
    "post_local_sgd(100, every=8)",
    "diloco(every=50)",
    "gossip(ring)",
    "sgp()",
    "easgd()",
)
UNEVEN_GPT = (SYNCHRONOUS, "ps(staleness=4)", NAIVE, "diloco(every=50)")
SOON, FAR = 2 / 3, 0.99


@dataclass(frozen=True)
class Run:
    """One run, judged.

    Attributes:
        curve: Seconds and test loss, at even distances.
        after: Samples at each of them.
        loss, accuracy: After the last step.
        seconds: Of all steps, of the last worker.
        nbytes: A step and rank, sent and received; `told` by events, or else by arithmetic.
    """

    curve: list[tuple[float, float]]
    after: list[int]
    loss: float
    accuracy: float
    seconds: float
    nbytes: float
    told: bool


Table = dict[tuple[str, str, float], list[Run]]
"""By task, recipe, and how many times slower worker 1 is; one run a seed."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and fewer recipes with a slow worker")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--recipe", nargs="+", default=list(CHOSEN), metavar="STRATEGY")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--slow", type=float, default=SLOW, help="times; 1: no run with a slow worker")
    args = parser.parse_args(argv)
    seeds = args.seeds or (1 if args.quick else 3)
    here = machine()
    recipes = [recipe for recipe in args.recipe if recipe.partition("(")[0] in RECIPES]
    missing = [recipe for recipe in args.recipe if recipe not in recipes]
    table: Table = {}
    for task in args.task:
        for slow in dict.fromkeys((1.0, args.slow)):
            few = slow > 1 and (args.quick or task == "gpt")
            for recipe in [recipe for recipe in recipes if not few or recipe in UNEVEN_GPT]:
                table[task, recipe, slow] = [_run(task, recipe, slow, seed) for seed in range(seeds)]
            write("converge", here, _rows(table, missing), _bars(table))
    rows, bars = _rows(table, missing), _bars(table)
    columns = ("task", "strategy", "slow", "loss", "accuracy", "seconds", "to target", "bytes a step", "note")
    show(f"Convergence, {WORKERS} workers", rows, columns, bars, write("converge", here, rows, bars))
    return 0


# ---- one run --------------------------------------------------------------------------------------------------------
def _run(name: str, recipe: str, slow: float, seed: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        where = Path(folder)
        flags = ["-n", str(WORKERS), "--threads", "1", "--strategy", recipe, "--run-dir", str(where / "run")]
        told = ["--task", name, "--seed", str(seed), "--slow", str(slow), "--out", str(where)]
        command = [sys.executable, "-m", "paceline.launch.cli", "run", str(HERE / "converge_peer.py"), *flags, "--"]
        _carry_out([*command, *told])
        ranks = [torch.load(where / f"{rank}.pt") for rank in range(WORKERS)]
        run = _judged(TASKS[name], recipe, ranks, _round_bytes(where / "run"))
    said = f"loss {run.loss:.4f}, accuracy {run.accuracy:.4f}, {run.seconds:.1f} s"
    print(f"{name} {recipe} seed {seed}{f', one {slow:g} times slower' if slow > 1 else ''}: {said}", file=sys.stderr)
    return run


def _carry_out(command: list[str]) -> None:
    """Raises RuntimeError when it fails; the message carries its output."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            status = process.wait(600)
        finally:
            end(process)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}\nexit status {status}\n{said.read()[-4000:]}")


def _judged(task: Task, recipe: str, ranks: Sequence[dict[str, Any]], sent: float) -> Run:
    model = task.model()
    _, x, y = task.data()
    served = build(recipe).service is not None
    kept = ranks[0]["kept"]
    curve = []
    for number, (_, seconds, mine) in enumerate(kept):
        found = [mine] if served else [rank["kept"][number][2] for rank in ranks]
        curve.append((seconds, _test(task, model, torch.stack(found).mean(0), x, y)[0]))
    loss, accuracy = _test(task, model, ranks[0]["last"], x, y)
    seconds = max(rank["seconds"] for rank in ranks)
    curve.append((seconds, loss))
    nbytes = _bytes_a_step(recipe, 4 * ranks[0]["last"].numel(), sent, task.steps)
    after = [*(samples for samples, _, _ in kept), ranks[0]["samples"]]
    return Run(curve, after, loss, accuracy, seconds, nbytes, bool(sent))


@torch.no_grad()
def _test(task: Task, model: nn.Module, params: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    vector_to_parameters(params, model.parameters())
    model.eval()
    scores = model(x)
    return task.loss(scores, y).item(), float((scores.argmax(-1) == y).float().mean())


def _round_bytes(run: Path) -> float:
    """Sent by the first worker in all its rounds."""
    lines = [json.loads(line) for line in (run / "events" / "worker-0.jsonl").read_text().splitlines()]
    return float(sum(line["bytes"] for line in lines if line["kind"] == "round"))


def _bytes_a_step(recipe: str, nbytes: int, sent: float, steps: int) -> float:
    """What was `sent` in rounds; by arithmetic where there are none: an all-reduce, or a push and the parameters that come back."""
    exchange = build(recipe)
    service, reduced = exchange.service, 2 * (WORKERS - 1) / WORKERS * nbytes
    if sent:
        synchronous = exchange.phases[1][0] if exchange.phases else 0
        return (sent + synchronous * reduced) / steps
    if service is None:
        return reduced
    if recipe.startswith("hogwild("):
        return 0.0
    every = re.search(r"every=(\d+)", recipe)
    times = 1.0 if service.rule.synchronous else 1 / WORKERS  # a step is that of one worker
    return 2 * nbytes * times / (int(every[1]) if every else 1)


# ---- the table ------------------------------------------------------------------------------------------------------
def _rows(table: Table, missing: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for (task, recipe, slow), runs in table.items():
        reached = _to_target(table, task, recipe, slow)
        rows.append(
            {
                "task": task,
                "strategy": recipe,
                "slow": slow,
                "loss": median([run.loss for run in runs]),
                "accuracy": median([run.accuracy for run in runs]),
                "seconds": median([run.seconds for run in runs]),
                "to target": None if math.isinf(reached) else reached,
                "bytes a step": median([run.nbytes for run in runs]),
                "note": "" if runs[0].told else "bytes by arithmetic",
                "repetitions": [vars(run) for run in runs],
            }
        )
    rows += [{"strategy": recipe, "note": "not among the recipes of this version"} for recipe in missing]
    return rows


def _to_target(table: Table, task: str, recipe: str, slow: float) -> float:
    """Seconds; infinite where it was not reached."""
    targets = [_target(run) for run in table.get((task, SYNCHRONOUS, 1.0), [])]
    runs = table.get((task, recipe, slow), [])
    if not targets or not runs:
        return math.inf
    return median([_reached(run, target) for run, target in zip(runs, targets, strict=True)])


def _target(run: Run) -> float:
    return next(
        loss for (_, loss), samples in zip(run.curve, run.after, strict=True) if samples >= SOON * run.after[-1]
    )


def _reached(run: Run, target: float) -> float:
    return next((seconds for seconds, loss in run.curve if loss <= target), math.inf)


def _bars(table: Table) -> list[Bar]:
    bars = []
    for task in dict.fromkeys(task for task, _, _ in table):
        slows = {slow for name, _, slow in table if name == task and slow > 1}
        bars += [bar for slow in slows for bar in _bars_of_slow(table, task, slow)]
        bars += _bars_of_loss(table, task)
        bars += _bars_of_bytes(table, task)
    return bars


def _bars_of_slow(table: Table, task: str, slow: float) -> list[Bar]:
    theirs = _to_target(table, task, SYNCHRONOUS, slow)
    chosen = [recipe for recipe in ("ps(staleness=4)", NAIVE) if (task, recipe, slow) in table]
    if math.isinf(theirs):
        return []
    return [
        Bar(
            f"{task}, one worker {slow:g} times slower: {recipe} sooner at the target than {SYNCHRONOUS}",
            2.0,
            theirs / _to_target(table, task, recipe, slow),
        )
        for recipe in chosen
    ]


def _bars_of_loss(table: Table, task: str) -> list[Bar]:
    pairs = [(recipe, NAIVE) for recipe in CHOSEN if "late=" in recipe]
    pairs += [("diloco(every=50)", SYNCHRONOUS)] if task == "gpt" else []
    return [
        Bar(f"{task}: loss of {recipe}, at most 1 % above {other}", FAR, _loss(table, task, other) / ours)
        for recipe, other in pairs
        if (ours := _loss(table, task, recipe)) and _loss(table, task, other)
    ]


def _loss(table: Table, task: str, recipe: str) -> float:
    runs = table.get((task, recipe, 1.0), [])
    return median([run.loss for run in runs]) if runs else 0.0


def _bars_of_bytes(table: Table, task: str) -> list[Bar]:
    bars = []
    for recipe, less in (("local_sgd(8)", 8.0), ("diloco(every=50)", 50.0)):
        theirs, ours = table.get((task, SYNCHRONOUS, 1.0)), table.get((task, recipe, 1.0))
        if theirs and ours:
            ratio = theirs[0].nbytes / ours[0].nbytes
            bars.append(Bar(f"{task}: bytes of {SYNCHRONOUS} against {recipe}, 1 % for headers", FAR * less, ratio))
    return bars


if __name__ == "__main__":
    sys.exit(main())
