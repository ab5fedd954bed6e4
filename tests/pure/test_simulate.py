"""Simulated peers: the numbers of a plain loop, and virtual times that follow the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.exchange.chain import Exchange, chain, optimizer
from paceline.exchange.link import Message, State
from paceline.exchange.recipes import ddp
from paceline.exchange.simulate import Simulation, simulate
from paceline.group.wire import Receive, Send, Together
from paceline.terms.bucket import Bucket

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
BUCKETS = 100 / 2**20  # MiB: some parameters share a bucket, some have their own


def begin() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,), (4, 5), (2, 2))]


def gradient(peer: int, step: int, parameters: list[Tensor]) -> tuple[list[Tensor], float]:
    """Of a mean over ``peer + 1 + step % 3`` terms: uneven, and different in every step."""
    generator = torch.Generator().manual_seed(1000 * step + peer)
    noise = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    return [0.3 * p + n for p, n in zip(parameters, noise, strict=True)], float(peer + 1 + step % 3)


def plain(peers: int, steps: int) -> list[Tensor]:
    """The loop that one process would write: weighted mean of the peers' gradients, one optimizer."""
    parameters = [torch.nn.Parameter(p) for p in begin()]
    opt = SGD(parameters)
    for step in range(steps):
        parts = [gradient(peer, step, [p.detach() for p in parameters]) for peer in range(peers)]
        total = sum(weight for _, weight in parts)
        for i, p in enumerate(parameters):
            p.grad = parts[0][0][i] * (parts[0][1] / peers)
            for grads, weight in parts[1:]:
                p.grad += grads[i] * (weight / peers)
            if total != peers:
                p.grad *= peers / total
        opt.step()
    return [p.detach() for p in parameters]


def run(exchange: Exchange, peers: int = 4, steps: int = 12, **network: Any) -> Simulation:
    return simulate(exchange, peers=peers, steps=steps, gradient=gradient, parameters=begin(), optimizer=SGD, **network)


def distance(mine: list[Tensor], yours: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(mine, yours, strict=True))


@pytest.mark.parametrize("peers", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_mb", [None, BUCKETS])
def test_it_is_the_plain_loop_bit_for_bit(peers: int, bucket_mb: float | None) -> None:
    found = run(ddp(bucket_mb=bucket_mb), peers)
    expected = plain(peers, 12)
    for parameters in found.parameters:
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("algorithm", ["star", "ring", "tree", "halving", "hierarchical"])
def test_other_algorithms_differ_by_rounding_only(algorithm: str) -> None:
    """Sums of four float64 in another order: 12 steps amplify less than 100 units in the last place of numbers below 10."""
    found = run(ddp(algorithm=algorithm, bucket_mb=BUCKETS))
    assert distance(found.parameters[0], plain(4, 12)) < 1e-13
    for other in found.parameters[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found.parameters[0], other, strict=True))


@pytest.mark.parametrize(("codec", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_codecs_stay_near_and_peers_stay_equal(codec: Any, unit: float) -> None:
    found = run(ddp(codec, bucket_mb=BUCKETS))
    assert 0 < distance(found.parameters[0], plain(4, 12)) < 10 * unit
    assert all(torch.equal(a, b) for p in found.parameters for a, b in zip(p, found.parameters[0], strict=True))


def test_on_a_slow_network_half_the_bytes_take_half_the_time() -> None:
    slow = {"bandwidth": 1e3, "latency": 0.0, "compute": 0.0}
    plain, coded = run(ddp(), **slow), run(ddp("bf16"), **slow)
    payload, header = 8 * 44, 8
    per_step = (2 * 44 + 4 * header) / (payload + header)  # in two bytes instead of eight; each slice carries a header
    assert coded.seconds / plain.seconds < per_step < 0.5


def test_virtual_times_order_as_the_formulas_say() -> None:
    def seconds(algorithm: str, **network: Any) -> float:
        return run(ddp(algorithm=algorithm), peers=8, steps=1, compute=0.0, **network).seconds

    names = ("star", "ring", "tree", "halving")
    far = {name: seconds(name, latency=1.0, bandwidth=1e12) for name in names}
    assert far["tree"] == pytest.approx(far["halving"]) == pytest.approx(2 * 3)
    assert far["star"] == pytest.approx(far["ring"]) == pytest.approx(2 * 7)
    narrow = {name: seconds(name, latency=0.0, bandwidth=1e3) for name in names}
    assert narrow["halving"] == pytest.approx(narrow["ring"], rel=0.1)
    assert narrow["ring"] < narrow["tree"] < narrow["star"]


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_a_slow_peer_delays_everybody_by_exactly_its_slowness(algorithm: str) -> None:
    even = run(ddp(algorithm=algorithm), compute=0.3)
    uneven = run(ddp(algorithm=algorithm), compute=0.3, speeds=[1.0, 1.0, 0.25, 1.0])
    assert uneven.seconds - even.seconds == pytest.approx(12 * (0.3 / 0.25 - 0.3))
    assert distance(even.parameters[0], uneven.parameters[0]) == 0.0


def test_buckets_overlap_with_backward() -> None:
    network = {"bandwidth": 1e4, "latency": 0.0, "compute": 0.15}
    one, many = run(ddp(), **network), run(ddp(bucket_mb=BUCKETS), **network)
    exchange = sum(s.end - s.begin for s in one.trace if s.rank == 0 and s.what != "compute")
    assert one.seconds == pytest.approx(12 * 0.15 + exchange)
    assert many.seconds < 12 * 0.15 + 0.6 * exchange


def test_the_same_seed_gives_the_same_trace() -> None:
    runs = [run(ddp(bucket_mb=BUCKETS), jitter=0.3, seed=seed) for seed in (5, 5, 6)]
    assert runs[0].trace == runs[1].trace
    assert runs[0].trace != runs[2].trace
    assert all(distance(runs[0].parameters[0], other.parameters[0]) == 0.0 for other in runs)


@dataclass(frozen=True)
class Mix:
    """Gossip on the ring of two: after the optimizer both take the mean of their parameters."""

    def init(self, bucket: Bucket) -> State:
        return {}

    async def __call__(self, message: Message, state: State) -> None:
        other, theirs = 1 - message.rank, torch.empty_like(message.payload)
        await Together((Send(other, message.payload, 1), Receive(other, theirs, 1)))
        message.payload.add_(theirs).mul_(0.5)

    def describe(self) -> str:
        return "mix"


def test_links_behind_the_optimizer_work_on_parameters() -> None:
    """Mixing after every step of plain SGD is the step with the unweighted mean of the gradients."""
    even = lambda peer, step, parameters: (gradient(peer, step, parameters)[0], 1.0)  # noqa: E731
    sgd = partial(torch.optim.SGD, lr=0.05)
    options: dict[str, Any] = {"peers": 2, "steps": 5, "gradient": even, "parameters": begin(), "optimizer": sgd}
    mixed = simulate(Exchange(chain(optimizer, Mix()), bucket_mb=BUCKETS), **options)
    synchronous = simulate(ddp(), **options)
    assert distance(mixed.parameters[0], synchronous.parameters[0]) < 1e-14
    assert distance(mixed.parameters[0], mixed.parameters[1]) == 0.0
