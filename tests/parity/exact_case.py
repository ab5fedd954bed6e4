"""A plain PyTorch program, adopted, with much that could depend on the number of ranks; test_exact compares final hashes.

Run by `paceline run --strategy 'ddp(exact=True)'`.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import paceline


class Noisy(Dataset):
    """Rows with random augmentation."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(self.x[i].shape), self.y[i]


def model_of(name):
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    if name == "wide":  # enough elements for the optimizer's step to be divided between ranks
        return nn.Sequential(nn.Linear(64, 1100), nn.Tanh(), nn.Linear(1100, 1000), nn.Tanh(), nn.Linear(1000, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 16, 10),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["mlp", "cnn", "wide"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--noisy", action="store_true")
    parser.add_argument("--tokens", choices=["no", "weight", "sum"], default="no")
    parser.add_argument("--nan", action="store_true", help="one row is not a number")
    args = parser.parse_args()

    torch.manual_seed(3)
    x = torch.randn(203, 64)
    y = (x[:, :10] + 0.1 * torch.randn(203, 10)).argmax(1)
    if args.nan:
        x[77] = float("nan")
    data = Noisy(x, y) if args.noisy else TensorDataset(x, y)
    loader = DataLoader(data, batch_size=50, shuffle=True, num_workers=args.workers)  # 50, 50, 50, 50, 3
    test = DataLoader(TensorDataset(x, y), batch_size=64)
    model = model_of(args.model)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5 * args.epochs)
    job = paceline.job()
    model, opt, schedule, loader, test = job.adopt(model, opt, schedule, loader, test)

    for _ in job.epochs(args.epochs):
        for batch, labels in loader:
            opt.zero_grad(set_to_none=args.model != "mlp")
            if args.tokens == "no":
                loss = F.cross_entropy(model(batch), labels)
            else:
                some = torch.rand(len(labels)) < 0.7
                some[0] = True
                weights = torch.rand(len(labels))[some]
                each = F.cross_entropy(model(batch)[some], labels[some], reduction="none") * weights
                loss = each.sum() / (weights.sum() if args.tokens == "weight" else 1)
                job.weight(weights.sum() if args.tokens == "weight" else "sum")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
        with job.evaluating():
            for batch, labels in test:
                job.count(right=(model(batch).argmax(1) == labels).sum(), seen=len(labels))
        job.log(accuracy=job.ratio("right", "seen"))
    if job.main:
        print("accuracy", job.ratio("right", "seen"), "steps", job.clock.step, "samples", job.clock.samples)


main()
