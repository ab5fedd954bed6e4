"""Samples per second of one worker among several that train the same GPT: alone beside the others, or on parameter servers.

    paceline run bench/crowd_peer.py -n 4 --strategy "ps(staleness=inf)" -- --peer paceline --out result.json
    python bench/crowd_peer.py --peer plain --out 0.json      prints "ready", and goes on with a line from stdin

One server takes the optimizer's steps of all workers, one after the other: with few rows for each of them, it is what they wait for.

A step takes a batch of `rows` rows in either case: with asynchronous servers a worker leases whole batches. Rank 0 counts what the
servers have applied, of all workers, from the moment at which it has warmed up itself until its pass is over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=("plain", "paceline"), required=True)
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt10m")
    parser.add_argument("--rows", type=int, default=4, help="of a step of one worker")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--warm", type=int, default=3, help="steps of each worker that do not count")
    parser.add_argument("--steps", type=int, default=20, help="steps of each worker that do")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    work = WORKLOADS[args.workload]
    share = args.rows * (args.warm + args.steps)
    rows = share * (args.workers if args.peer == "paceline" else 1)
    loader = DataLoader(work.data(rows), batch_size=args.rows, shuffle=True)
    model = work.model()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (plain if args.peer == "plain" else paceline)(args, work.loss, model, opt, loader)


def step(loss_of: Any, model: Any, opt: Any, x: Any, y: Any) -> None:
    opt.zero_grad()
    loss_of(model(x), y).backward()
    opt.step()


def plain(args: argparse.Namespace, loss_of: Any, model: Any, opt: Any, loader: Any) -> None:
    began = used = 0.0
    for number, (x, y) in enumerate(loader):
        if number == args.warm:
            print("ready", flush=True)
            sys.stdin.readline()
            began, used = time.perf_counter(), time.process_time()
        step(loss_of, model, opt, x, y)
    seconds = time.perf_counter() - began
    told = {"samples_per_second": args.steps * args.rows / seconds, "step_seconds": seconds / args.steps}
    told["step_cpu_seconds"] = (time.process_time() - used) / args.steps
    args.out.write_text(json.dumps(told))


def paceline(args: argparse.Namespace, loss_of: Any, model: Any, opt: Any, loader: Any) -> None:
    import paceline

    job = paceline.job()
    model, opt, loader = job.adopt(model, opt, loader)
    began, before, used = 0.0, 0, 0.0
    now, after, number = 0.0, 0, 0
    for number, (x, y) in enumerate(loader, 1):
        step(loss_of, model, opt, x, y)
        now, after = time.perf_counter(), job.clock.samples
        if number == args.warm:
            began, before, used = now, after, time.process_time()
    if job.main:
        steps = number - args.warm
        told = {"samples_per_second": (after - before) / (now - began), "step_seconds": (now - began) / steps}
        told["step_cpu_seconds"] = (time.process_time() - used) / steps
        args.out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
