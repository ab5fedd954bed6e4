"""A plain PyTorch program whose ranks may step on their own: float64, plain SGD unless asked, a pass of uneven batches.

Writes the weights, and what an evaluation saw, where `--out` says.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--steps", type=int, default=0, help="leave the loop after so many")
parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
parser.add_argument("--even", action="store_true", help="every rank of 2, 3 or 4 has as many rows of every batch")
parser.add_argument("--norm", action="store_true")
parser.add_argument("--tokens", action="store_true")
parser.add_argument(
    "--poison", type=int, default=0, help="the rank that holds row 0 of this batch has a loss that is NaN"
)
args = parser.parse_args()

torch.manual_seed(3)
middle = nn.BatchNorm1d(16) if args.norm else nn.Identity()
model = nn.Sequential(nn.Linear(12, 16), middle, nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)).double()
idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
model.register_parameter("idle", idle)  # never gets a gradient
g = torch.Generator().manual_seed(7)
rows = 120 if args.even else 133
x, y = torch.randn(rows, 12, generator=g).double(), torch.randint(5, (rows,), generator=g)
train = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True)
test = DataLoader(TensorDataset(x[:30], y[:30]), batch_size=10)
if args.optimizer == "sgd":
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
else:
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=7, gamma=0.95)

job = paceline.job()
model, opt, schedule, train, test = job.adopt(model, opt, schedule, train, test)
done, seen = 0, []
for _ in job.epochs(args.epochs):
    for xb, yb in train:
        opt.zero_grad()
        each = F.cross_entropy(model(xb), yb, reduction="none")
        if args.tokens:
            w = 1.0 + yb.double()
            job.weight(w.sum())
            loss = (each * w).sum() / w.sum()
        else:
            loss = each.mean()
        done += 1
        if done == args.poison and job.rank == 0:
            loss = loss * float("nan")
        loss.backward()
        opt.step()
        schedule.step()
        if done == args.steps:
            break
    if done == args.steps:
        break
    with job.evaluating(model):
        for xb, yb in test:
            job.count(loss=F.cross_entropy(model(xb), yb, reduction="sum"), rows=len(yb))
    seen.append(job.ratio("loss", "rows"))
with job.evaluating(model):
    pass
if job.main:
    torch.save({**model.state_dict(), "seen": torch.tensor(seen, dtype=torch.float64)}, args.out / "end.pt")
