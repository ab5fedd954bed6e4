"""A small convolutional network with batch normalisation over the rows of all ranks; writes its weights and statistics."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

torch.manual_seed(3)
x, y = torch.randn(54, 1, 8, 8, dtype=torch.float64), torch.randint(10, (54,))
model = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding=1),
    nn.BatchNorm2d(6),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(384, 16),
    nn.BatchNorm1d(16),
    nn.Tanh(),
    nn.Linear(16, 10),
).double()
model = paceline.sync_batchnorm(model)
opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
train = DataLoader(TensorDataset(x, y), batch_size=13, shuffle=True)  # four batches of 13 and one of two rows
job = paceline.job()
model, opt, train = job.adopt(model, opt, train)
for _ in job.epochs(3):
    for xb, yb in train:
        opt.zero_grad()
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
job.export(sys.argv[1])
