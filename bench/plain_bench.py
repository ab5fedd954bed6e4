"""What ``job.adopt`` costs a program that is run by plain ``python``: with it against without it.

    python bench/plain_bench.py [--quick]

Both loops live in one process and take turns, epoch by epoch, so that a hundredth can be seen on a busy machine.
The tiny model is the worst case: everything that is not arithmetic shows. The bits of both are compared at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

import paceline
from report import Bar, machine, median, show, write
from workloads import WORKLOADS, Workload

PROMISE = 0.99
Epoch = Callable[[], None]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    turns = {"digits": 60 if args.quick else 400, "mlp25m": 8 if args.quick else 30}

    torch.set_num_threads(1)
    here, rows, bars = machine(), [], []
    for name, count in turns.items():
        work = WORKLOADS[name]
        plain_model, plain = _program(work, adopted=False)
        our_model, ours = _program(work, adopted=True)
        seconds = _take_turns((plain, ours), count)
        same = all(torch.equal(a, b) for a, b in zip(plain_model.parameters(), our_model.parameters(), strict=True))
        samples = work.steps * work.rows(1)
        ratio = median([a / b for a, b in zip(*seconds, strict=True)])  # neighbours in time: drift cancels
        for peer, times in zip(("without adopt", "with adopt"), seconds, strict=True):
            speed = samples / median(times)
            row = {"workload": name, "peer": peer, "samples_per_second": speed, "same bits": same}
            rows.append({**row, "ratio": ratio if times is seconds[1] else 1.0, "repetitions": times})
        bars.append(Bar(f"{name}, plain python with adopt", PROMISE, ratio))
    path = write("plain", here, rows, bars)
    columns = ("workload", "peer", "samples_per_second", "ratio", "same bits")
    show("Plain python, samples per second", rows, columns, bars, path)
    return 0


def _program(work: Workload, *, adopted: bool) -> tuple[nn.Module, Epoch]:
    """A model, and one epoch of its training with its own stream of random numbers."""
    torch.manual_seed(0)
    data = work.data(work.rows(1) * work.steps)
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(data, batch_size=work.rows(1), shuffle=True, generator=generator)
    model = work.model()
    opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if adopted:
        model, opt, train = paceline.job().adopt(model, opt, train)

    def epoch() -> None:
        for x, y in train:
            opt.zero_grad()
            work.loss(model(x), y).backward()
            opt.step()

    return model, epoch


def _take_turns(programs: tuple[Epoch, Epoch], turns: int) -> tuple[list[float], list[float]]:
    """Seconds of each epoch of each program, after a warm-up. Who goes first changes every turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-2, turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            programs[which]()
            if turn >= 0:
                seconds[which].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
