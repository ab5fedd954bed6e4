"""Learns a task under any strategy, and keeps what its parameters were on the way.

    paceline run bench/converge_peer.py -n 4 --strategy "ps(staleness=4)" -- --task digits --out DIR [--slow 4]

Each row takes `row_seconds` to compute, most of which is a sleep: so four workers on two cores are as quick as on four machines, and
what is measured is the waiting for each other. With ``--slow`` worker 1 takes so many times as long.

Each rank leaves ``DIR/<rank>.pt``: samples, seconds since the first batch, and parameters, at even distances; rank 0 also the
parameters after the last step, when all have met.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, RandomSampler

import paceline
from workloads import TASKS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--points", type=int, default=16, help="at which parameters are kept")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task = TASKS[args.task]
    data, _, _ = task.data()
    model = task.model()
    opt = torch.optim.AdamW(model.parameters(), lr=task.lr)
    order = RandomSampler(data, num_samples=task.steps * task.rows)  # several times through the data, in one pass
    train = DataLoader(data, batch_size=task.rows, sampler=order)
    interval = task.steps // args.points * task.rows

    job = paceline.job()
    model, opt, train = job.adopt(model, opt, train)
    pace = task.row_seconds * (args.slow if job.rank == 1 else 1.0)
    kept: list[tuple[int, float, Tensor]] = []
    began = 0.0
    for x, y in train:
        began = began or time.perf_counter()
        opt.zero_grad()
        loss = task.loss(model(x), y)
        time.sleep(pace * len(x))
        loss.backward()
        opt.step()
        samples = job.clock.samples
        if samples // interval > (kept[-1][0] // interval if kept else 0):
            kept.append((samples, time.perf_counter() - began, flat(model)))
    seconds = time.perf_counter() - began
    with job.evaluating(model):
        last = flat(model)
    told = {"kept": kept, "seconds": seconds, "samples": job.clock.samples, "last": last if job.main else None}
    torch.save(told, args.out / f"{job.rank}.pt")


def flat(model: torch.nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


if __name__ == "__main__":
    main()
