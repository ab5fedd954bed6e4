"""A program with everything that a checkpoint must bring back. Run whole, and stopped and resumed; test_resume compares.

Two groups of parameters, AdamW, a schedule, a gradient scaler, an average that the job keeps, accumulation, an evaluation at
the end of each epoch.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline


class Average:
    """A moving average of the parameters, and how often it moved."""

    def __init__(self, model):
        self.values = [p.detach().clone() for p in model.parameters()]
        self.moves = 0

    def move(self, model):
        self.moves += 1
        for value, p in zip(self.values, model.parameters(), strict=True):
            value.mul_(0.9).add_(p.detach(), alpha=0.1)

    def state_dict(self):
        return {"values": self.values, "moves": self.moves}

    def load_state_dict(self, state):
        self.values, self.moves = state["values"], state["moves"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stop", type=int, default=0, help="after so many steps the run is asked to end")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--width", type=int, default=33)
    args = parser.parse_args()
    torch.manual_seed(11)
    g = torch.Generator().manual_seed(5)
    rows = TensorDataset(torch.randn(137, 8, generator=g).double(), torch.randint(4, (137,), generator=g))
    model = nn.Sequential(
        nn.Linear(8, args.width), nn.Tanh(), nn.BatchNorm1d(args.width), nn.Linear(args.width, 4)
    ).double()
    model[2].eval()
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01}]
    groups.append({"params": [p for p in model.parameters() if p.dim() == 1]})
    opt = torch.optim.AdamW(groups, lr=3e-3, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.01, total_steps=60)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
    loader = DataLoader(rows, batch_size=26, shuffle=True)  # five batches and a last one of 7
    held_out = DataLoader(rows, batch_size=50)
    job = paceline.job()
    average = Average(model)
    job.keep(average=average)
    model, opt, loader = job.adopt(model, opt, loader)
    schedule, scaler, held_out = job.adopt(schedule, scaler, held_out)
    seen = []
    for _ in job.epochs(7):
        for number, (x, y) in enumerate(loader):
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss / args.accumulate).backward()
            if (number + 1) % args.accumulate:
                continue
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            schedule.step()
            average.move(model)
            if job.main and job.clock.step == args.stop:
                job._activity.board.request_stop()  # what the launcher does when it is told to stop
        with job.evaluating(model):
            for x, y in held_out:
                job.count(right=(model(x).argmax(1) == y).sum(), all=len(y))
        seen.append(job.ratio("right", "all"))
    if job.main:
        states = opt.state_dict()["state"]
        state = {f"{i}.{k}": torch.as_tensor(v) for i, s in states.items() for k, v in s.items()}
        kept = {f"average.{i}": value for i, value in enumerate(average.values)}
        rest = [
            job.clock.step,
            job.clock.samples,
            average.moves,
            *schedule.get_last_lr(),
            *(float(v) for v in scaler.state_dict().values()),
        ]
        torch.save({**model.state_dict(), **state, **kept, "rest": torch.tensor(rest).double()}, args.out / "end.pt")
        torch.save(torch.tensor(seen), args.out / "seen.pt")


if __name__ == "__main__":
    main()
