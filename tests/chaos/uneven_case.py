"""An optimizer whose steps depend on the process that takes them: two copies of a server come apart."""

from __future__ import annotations

import os
from typing import Any

import torch

import paceline


class Uneven(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1e-9 * os.getpid())
        return found


def main() -> None:
    model = torch.nn.Linear(3, 5, dtype=torch.float64)
    opt = Uneven(model.parameters(), lr=1.0)
    job = paceline.job()
    model, opt = job.adopt(model, opt)
    for _ in range(300):
        opt.zero_grad()
        model.weight.sum().backward()
        opt.step()


if __name__ == "__main__":
    main()
