"""Loops that would train something else with another number of ranks; argument 1 says which."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import paceline


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(x, y, strict=True))


case = sys.argv[1]
torch.manual_seed(0)
x, y = torch.randn(64, 5), torch.randint(3, (64,))
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(Stream() if case == "stream" else TensorDataset(x, y), batch_size=16)
short = DataLoader(TensorDataset(x, y), batch_size=1)
job = paceline.job()
model, opt, loader, short = job.adopt(model, opt, loader, short)
if case == "two optimizers":
    job.adopt(torch.optim.SGD(model.parameters(), lr=0.1))
if case == "scaler":
    job.adopt(torch.amp.GradScaler("cpu"))
if case == "schedule":
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)

for _ in range(2):
    pairs = zip(loader, short, strict=False) if case == "loaders" else ((batch, None) for batch in loader)
    for i, ((rows, labels), _) in enumerate(pairs):
        if not (case == "accumulates" and i % 2) and case != "clears nothing":
            opt.zero_grad()
        loss = F.cross_entropy(model(rows), labels)
        loss.backward(retain_graph=case == "two backwards")
        if case == "two backwards":
            loss.backward()
        if case == "accumulates" and i % 2 == 0:
            continue
        opt.step()
        if case == "leaves" and i == 1:
            break
