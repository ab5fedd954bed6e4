"""What saving costs: how long training stands still for a copy, and what is left of its speed.

    python bench/checkpoint_bench.py [--quick] [--processes 2] [--every 60]

1. The copy of the state of the 25-million-parameter model with AdamW, against one memcpy of as many bytes.
2. Samples per second of that model's training: without checkpoints, with them, and with a script that saves by itself and waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import paceline
from report import Bar, machine, median, show, write
from turns import Others, counting, quiet, take_turns
from workloads import WORKLOADS

STALL, KEPT, DEAR = 1.5, 0.98, 0.8
WORKLOAD = WORKLOADS["mlp25m"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, fewer copies")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=60, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--train", choices=["plain", "waits"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.train:
        return _train(args.train, args.steps, args.every)
    here, rows, bars = machine(), [], []
    _copies(4 if args.quick else 12, rows, bars)
    _speeds(args.processes, args.steps, args.every, args.rounds or (1 if args.quick else 5), rows, bars)
    path = write("checkpoint", here, rows, bars)
    show("Checkpoints", rows, ("what", "value", "ratio", "quiet runs"), bars, path)
    return 0


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = WORKLOAD.model()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


# ---- the copy -------------------------------------------------------------------------------------------------------
def _copies(count: int, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """In this process alone, with one thread: nothing else is measured."""
    from paceline.train import tree as trees
    from paceline.train.checkpoint import Checkpointer
    from paceline.train.checkpoint_files import Policy

    torch.set_num_threads(1)
    model, opt = _model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    models = {"model": model}
    things = trees.Things(models=models, optimizers={"0": opt}, names=trees.names_of(models))
    _, tensors = trees.flatten(trees.capture(things))
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    plain = _memcpy(nbytes, count)
    stalls: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        saver = Checkpointer(
            Policy.parse("every=1000,busy=wait"),
            Path(name),
            lambda: trees.capture(things),
            lambda: (0, 0),
            lambda event: stalls.append(event.data["stall"]) if event.kind == "save" else None,
        )
        step = 0
        while len(stalls) < count:
            saver.at_boundary(step, True)
            step += 1
            saver._listen(0.0005)
        saver.stand_down()
    for what, times in (("memcpy", plain), ("copy of the state", stalls)):
        row = {"what": f"ms for {what} of {nbytes / 1e6:.0f} MB", "value": 1e3 * median(times)}
        rows.append({**row, "ratio": median(times) / median(plain), "repetitions": times})
    bars.append(Bar(f"{STALL} memcpys over the copy", 1.0, STALL * median(plain) / median(stalls)))


def _memcpy(nbytes: int, count: int) -> list[float]:
    source, target = (torch.zeros(nbytes, dtype=torch.uint8).fill_(i) for i in (1, 2))
    times = []
    for _ in range(count):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return times


# ---- the speed ------------------------------------------------------------------------------------------------------
def _train(mode: str, steps: int, every: int) -> int:
    """One rank. `waits`: rank 0 saves by itself, and everybody waits for it."""
    from paceline.train.checkpoint import save_tree

    model, opt = _model()
    job = paceline.job()
    data = WORKLOAD.data(WORKLOAD.rows(job.size) * steps)
    loader = torch.utils.data.DataLoader(data, batch_size=WORKLOAD.rows(job.size))
    model, opt, loader = job.adopt(model, opt, loader)
    began, where = 0.0, Path("waits")  # below the temporary directory of the bench
    for number, (x, y) in enumerate(loader):
        if number == every:  # by now memory is there
            began = time.perf_counter()
        opt.zero_grad()
        WORKLOAD.loss(model(x), y).backward()
        opt.step()
        if mode == "waits" and job.main and job.clock.step % every == 0:
            save_tree(job._saving.capture(), where, keep=2)
    if job.main:
        print(
            json.dumps(
                {"samples_per_second": (steps - every) * WORKLOAD.rows(job.size) / (time.perf_counter() - began)}
            )
        )
    return 0


def _run(size: int, steps: int, every: int, mode: str) -> dict[str, Any]:
    others = Others()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        flags = ["--checkpoint", f"every={every}"] if mode == "saves" else []
        script = ["--train", "waits" if mode == "waits" else "plain", "--steps", str(steps), "--every", str(every)]
        command = [
            sys.executable,
            "-m",
            "paceline.launch.cli",
            "run",
            __file__,
            "-n",
            str(size),
            "--run-dir",
            f"{name}/run",
        ]
        done = subprocess.run([*command, *flags, "--", *script], capture_output=True, text=True, check=False, cwd=name)
        found = [line.partition("{")[2] for line in done.stdout.splitlines() if "samples_per_second" in line]
        if done.returncode or not found:
            raise RuntimeError(done.stdout + done.stderr)
        events = Path(name, "run", "events").glob("*.jsonl")
        saves = [json.loads(line) for file in events for line in file.read_text().splitlines() if '"save"' in line]
    result = json.loads("{" + found[0])
    return {
        **result,
        "saves": len(saves),
        "stall": statistics.fmean([s["stall"] for s in saves] or [0.0]),
        "others_cores": others.cores(),
    }


def _speeds(size: int, steps: int, every: int, rounds: int, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    modes = ("none", "saves", "waits")
    results = take_turns(rounds, *(partial(_run, size, steps, every, mode) for mode in modes))
    speeds = [median([r["samples_per_second"] for r in chosen]) for chosen in counting(*results)]
    told = {
        "none": "without checkpoints",
        "saves": f"every {every} steps",
        "waits": f"every {every} steps, and waiting",
    }
    for mode, found, speed in zip(modes, results, speeds, strict=True):
        row = {"what": f"samples per second, {told[mode]}", "value": speed, "ratio": speed / speeds[0]}
        rows.append({**row, "quiet runs": f"{len(quiet(found))} of {len(found)}", "repetitions": found})
        print(f"{told[mode]}: {speed:,.1f}/s", file=sys.stderr)
    bars.append(Bar(f"speed kept with a checkpoint every {every} steps", KEPT, speeds[1] / speeds[0]))
    bars.append(Bar("and a script that waits keeps at most 0.8", 1.0, DEAR * speeds[0] / speeds[2]))


if __name__ == "__main__":
    sys.exit(main())
