"""A script whose parameters after the last step must not depend on who has died meanwhile: float64, no dropout.

    case.py [--epochs 40] [--wide] [--accumulate 1] [--two] [--seed 0] [--hashes DIR] [--pace SECONDS] [--nan ROW] [--flip-every STEPS]

``--wide``: enough parameters for the optimizer's step to be divided between the ranks. ``--hashes``: each process appends the hash of
its parameters after every step to a file of its own. ``--pace``: a row takes so long, as on a device that is not shared.
``--nan``: this row is no number. ``--flip-every``: now and then one rank finds a bit of a parameter flipped.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--wide", action="store_true")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--two", action="store_true", help="two optimizers step in each round")
parser.add_argument("--steps", type=int, help="end after so many")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--hashes", type=Path)
parser.add_argument("--pace", type=float, default=0.0)
parser.add_argument("--nan", type=int)
parser.add_argument("--flip-every", type=int, default=0)
parser.add_argument("--flip-seed", type=int, default=0)
args = parser.parse_args()


class Diary:
    """What this process writes down, a line at a time, so that its end loses nothing."""

    def __init__(self, directory: Path, kind: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(directory / f"{kind}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, step: int, what: int) -> None:
        os.write(self._fd, b"%d %d\n" % (step, what))


def hash_of(model: nn.Module) -> int:
    """One number that any flipped bit changes."""
    return sum(int(p.detach().view(torch.int64).sum()) for p in model.parameters()) % 2**64


def flip(model: nn.Module, draw: random.Random) -> None:
    """One bit of one parameter."""
    p = draw.choice(list(model.parameters()))
    words = p.detach().view(torch.int64).view(-1)
    words[draw.randrange(len(words))] ^= 1 << draw.randrange(63)


torch.manual_seed(args.seed)
x = torch.rand(1797, 64, dtype=torch.float64)
y = (x @ torch.randn(64, 10, dtype=torch.float64)).argmax(1)
if args.nan is not None:
    x[args.nan] = float("nan")
width = 1100 if args.wide else 64
model = nn.Sequential(
    nn.Linear(64, width),
    nn.ReLU(),
    nn.Linear(width, width if args.wide else 32),
    nn.ReLU(),
    nn.Linear(width if args.wide else 32, 10),
)
model = model.double()
if args.two:
    optimizers = [
        torch.optim.AdamW(model[:2].parameters(), lr=1e-3),
        torch.optim.SGD(model[2:].parameters(), lr=0.05, momentum=0.9),
    ]
else:
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3)]
schedules = [torch.optim.lr_scheduler.StepLR(o, step_size=50, gamma=0.9) for o in optimizers]
train = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=100, shuffle=True)
test = DataLoader(TensorDataset(x[1500:], y[1500:]), batch_size=100)

job = paceline.job()
model, *rest = job.adopt(model, *optimizers, *schedules, train, test)
*rest, train, test = rest
optimizers, schedules = rest[: len(optimizers)], rest[len(optimizers) :]
rounds = last = 0
hashes = Diary(args.hashes, "hashes") if args.hashes else None
flips = Diary(args.hashes, "flips") if args.hashes and args.flip_every else None
for epoch in job.epochs(args.epochs):
    for xb, yb in train:
        if args.steps is not None and job.clock.step >= args.steps:
            raise SystemExit
        rounds += 1
        for optimizer in optimizers:
            loss = F.cross_entropy(model(xb), yb) / args.accumulate
            loss.backward()
            if rounds % args.accumulate == 0:
                optimizer.step()
                model.zero_grad()
        if rounds % args.accumulate == 0:
            for schedule in schedules:
                schedule.step()
        job.log(loss=loss)
        time.sleep(args.pace * len(xb))
        if hashes and job.clock.step > last:
            last = job.clock.step
            hashes.write(last, hash_of(model))
        if flips and rounds % args.flip_every == 0:
            draw = random.Random(args.flip_seed + last)
            if job.rank == draw.randrange(job.size):
                flip(model, draw)
                flips.write(last, job.rank)
    if epoch % 5 == 4:
        with job.evaluating(model):
            for xb, yb in test:
                job.count(correct=(model(xb).argmax(-1) == yb).sum(), seen=len(yb))
        job.log(accuracy=job.ratio("correct", "seen"))
