"""A script whose parameters after the last step must not depend on who has died meanwhile: float64, no dropout.

    case.py [--epochs 40] [--wide] [--accumulate 1] [--gan]

``--wide``: enough parameters for the optimizer's step to be divided between the ranks.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--wide", action="store_true")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--two", action="store_true", help="two optimizers step in each round")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
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
rounds = 0
for epoch in job.epochs(args.epochs):
    for xb, yb in train:
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
    if epoch % 5 == 4:
        with job.evaluating(model):
            for xb, yb in test:
                job.count(correct=(model(xb).argmax(-1) == yb).sum(), seen=len(yb))
        job.log(accuracy=job.ratio("correct", "seen"))
