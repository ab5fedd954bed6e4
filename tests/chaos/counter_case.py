"""Each push adds one to every parameter; `python counter_case.py DIRECTORY` counts pushes until ``DIRECTORY/stop`` is there."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import paceline


def main() -> None:
    where = Path(sys.argv[1])
    model = torch.nn.Linear(300, 500, dtype=torch.float64)  # large enough to be divided
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    job = paceline.job()
    model, opt = job.adopt(model, opt)
    acknowledged, slowest = 0, []
    while not (where / "stop").exists():
        opt.zero_grad()
        loss = -sum(p.sum() for p in model.parameters())
        loss.backward()
        began = time.monotonic()
        opt.step()
        slowest = sorted([*slowest, time.monotonic() - began])[-100:]
        acknowledged += 1
        (where / f"{job.rank}.pushes").write_text(str(acknowledged))
    with job.once("counted"):
        pass  # all have met, and read the same parameters
    values = {float(v) for p in model.parameters() for v in p.detach().unique()}
    told = {"acknowledged": acknowledged, "slowest": slowest, "values": sorted(values)}
    (where / f"{job.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
