"""A script for runs with parameter servers, as a user would write it; `python server_case.py --out FILE` is its plain form."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline


class Model(nn.Module):
    """A constant buffer, tied weights, a frozen layer, a layer that a server may have to share, and one that no gradient reaches."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 400))
        self.first = nn.Linear(10, 400)
        self.norm = nn.BatchNorm1d(400) if norm else nn.Identity()
        self.frozen = nn.Linear(400, 400)
        self.frozen.requires_grad_(False)
        self.middle = nn.Linear(400, 400)
        self.tied = nn.Linear(400, 400)
        self.tied.weight = self.middle.weight
        self.last = nn.Linear(400, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.frozen(self.scale * torch.tanh(self.norm(self.first(x)))))
        return self.last(torch.tanh(self.tied(torch.tanh(self.middle(x)))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=203)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--by-hand", action="store_true", help="set the learning rate without a schedule")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--norm", action="store_true", help="with running statistics")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.manual_seed(7)
    data = torch.Generator().manual_seed(1)
    rows = TensorDataset(
        torch.randn(args.rows, 10, dtype=torch.float64, generator=data),
        torch.randint(0, 4, (args.rows,), generator=data),
    )
    model = Model(args.norm).double()
    params = [
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "lr": 2e-3},
        {"params": [p for n, p in model.named_parameters() if "bias" not in n], "lr": 1e-3},
    ]
    opt: torch.optim.Optimizer = torch.optim.AdamW(params, lr=1e-3)
    if args.optimizer == "sgd":
        opt = torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)
    loader = DataLoader(rows, batch_size=32, shuffle=True, num_workers=args.workers)
    test = DataLoader(rows, batch_size=50)
    job = paceline.job()
    model, opt, loader, test = job.adopt(model, opt, loader, test)
    schedule = None
    if not args.by_hand:
        schedule = job.adopt(torch.optim.lr_scheduler.StepLR(opt, 5, gamma=0.7))
    for epoch in job.epochs(args.epochs):
        for number, (x, y) in enumerate(loader, 1):
            loss = F.cross_entropy(model(x), y) / args.accumulate
            loss.backward()
            job.log(loss=loss)
            if number % args.accumulate and number != len(loader):
                continue
            if args.by_hand:
                for group in opt.param_groups:
                    group["lr"] = 1e-3 / (1 + epoch)
            opt.step()
            opt.zero_grad()
            if schedule is not None:
                schedule.step()
            time.sleep(args.pause)
        if args.evaluate:
            with job.evaluating(model):
                for x, y in test:
                    job.count(right=(model(x).argmax(-1) == y).sum(), seen=len(y))
            if job.main:
                print(f"epoch {epoch} right {job.ratio('right', 'seen'):.6f}", flush=True)
    if job.main:
        torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
