"""What cannot work with parameter servers, one case a name."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import paceline


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(torch.randn(64, 10))


def main(case: str) -> None:
    torch.manual_seed(1)
    rows: object = TensorDataset(torch.randn(64, 10), torch.randint(0, 4, (64,)))
    if case == "stream":
        rows = Stream()
    model = nn.Linear(10, 4)
    if case == "models differ":
        model = nn.Linear(
            10, 4, bias=torch.initial_seed() == 1 and "server" not in paceline.launch.session.current().place.name
        )
    opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2) if case == "schedule" else None
    loader = DataLoader(rows, batch_size=16)  # type: ignore[arg-type, var-annotated]
    job = paceline.job("ps()" if case == "in the script" else None)
    model, opt, loader = job.adopt(model, opt, loader)
    if case == "scaler":
        job.adopt(torch.amp.GradScaler("cpu"))
    if case == "two optimizers":
        job.adopt(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in job.epochs(2):
        for step, (x, y) in enumerate(loader):
            loss = F.cross_entropy(model(x), y)
            if case == "nan" and step == 2:
                loss = loss * float("nan")
            opt.zero_grad()
            loss.backward()
            if case == "closure":
                opt.step(lambda: 0.0)
            opt.step()
            if schedule is not None:
                schedule.step()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
