"""A script that asks for what ranks that step on their own cannot do: a gradient scaler, or losses that are sums."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

job = paceline.job()
model = nn.Linear(3, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.ones(12, 3)), batch_size=4)
if "scaler" in sys.argv:
    model, opt, scaler, loader = job.adopt(model, opt, torch.amp.GradScaler("cpu"), loader)
else:
    model, opt, loader = job.adopt(model, opt, loader)
for (x,) in loader:
    if "sum" in sys.argv:
        job.weight("sum")
    model(x).sum().backward()
    opt.step()
    if "uneven" in sys.argv and job.rank == 0:
        opt.step()
