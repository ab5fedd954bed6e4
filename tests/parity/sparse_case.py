"""An embedding whose gradients are sparse, or dense: `python sparse_case.py sparse|dense OPTIMIZER OUT`."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(500, 16, sparse=sparse)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.words(x).mean(1))
        return found


def main(kind: str, optimizer: str, out: str) -> None:
    torch.manual_seed(3)
    x, y = torch.randint(0, 500, (203, 6)), torch.randint(0, 4, (203,))
    model = Words(kind == "sparse").double()
    opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if optimizer == "adagrad":
        opt = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    job = paceline.job()
    model, opt, loader = job.adopt(model, opt, loader)
    for _ in job.epochs(4):
        for rows, labels in loader:
            opt.zero_grad()
            F.cross_entropy(model(rows), labels).backward()
            opt.step()
    if job.main:
        torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
