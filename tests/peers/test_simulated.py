"""Simulated equals real: a strategy on the memory wire arrives where the same strategy on real processes arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline.exchange.simulate import simulate
from paceline.exchange.strategy import build
from paceline.group.shm_wire import ShmWire
from paceline.terms.plan import Place, Plan
from paceline.train.job import Job
from support.breadth import more
from support.peers import Peer, run_peers

STEPS, ROWS = 12, 8  # rows of each rank: a power of two, so that scaling by weights is exact


def model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def batch(peer: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + peer)
    x = torch.randn(ROWS, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (ROWS,), generator=generator)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2, momentum=0.9)


def real(peer: Peer, strategy: str) -> list[list[str]]:
    """One rank of a real job, with the loop that a user would write."""
    place = Place(
        rank=peer.rank,
        size=peer.size,
        local_rank=peer.rank,
        local_size=peer.size,
        hosts=(0,) * peer.size,
        launcher="paceline",
        plan=Plan(script="", strategy=strategy),
    )
    wire = ShmWire(peer.arena_fd, peer.rank, peer.size, peer.board, peer.activity)
    job = Job(place, lambda device: wire, lambda event: None, peer.activity)
    net = model()
    opt = sgd(net.parameters())
    net, opt = job.adopt(net, opt)
    for step in range(STEPS):
        x, y = batch(peer.rank, step)
        job.weight(ROWS)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    with job.evaluating(net):
        pass
    found = [[float(v).hex() for v in p.detach().flatten()] for p in net.parameters()]
    job.finish()
    return found


def simulated(size: int, strategy: str) -> list[Tensor]:
    def gradient(peer: int, step: int, parameters: list[Tensor]) -> tuple[list[Tensor], float]:
        net = model()
        with torch.no_grad():
            for p, value in zip(net.parameters(), parameters, strict=True):
                p.copy_(value)
        x, y = batch(peer, step)
        F.cross_entropy(net(x), y).backward()
        return [p.grad for p in net.parameters() if p.grad is not None], float(ROWS)

    begin = [p.detach() for p in model().parameters()]
    done = simulate(build(strategy), peers=size, steps=STEPS, gradient=gradient, parameters=begin, optimizer=sgd)
    assert all(torch.equal(a, b) for theirs in done.parameters for a, b in zip(theirs, done.parameters[0], strict=True))
    return done.parameters[0]


@pytest.mark.parametrize(
    ("size", "strategy"),
    [(3, "ddp()"), (2, "ddp(codec=bf16)"), (3, "diloco(every=4)"), *more((2, "ddp()"), (2, "easgd(every=5)"))],
)
def test_simulated_equals_real(size: int, strategy: str) -> None:
    """To the last bits: only the constant by which payloads are scaled may differ, which rounds once per step."""
    expected = simulated(size, strategy)
    for rank in run_peers("peers.test_simulated:real", size, strategy=strategy):
        for have, want in zip(rank, expected, strict=True):
            found = torch.tensor([float.fromhex(v) for v in have], dtype=torch.float64).view_as(want)
            assert (found - want).abs().max() <= 1e-13
