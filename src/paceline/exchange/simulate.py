"""An exchange on simulated peers: the same chains as in a real run, on a virtual clock, in one process.

Each peer repeats, for every step:

1. ask `gradient` for its gradient and weight, at the parameters that it has;
2. let a third of the computing time pass for forward, the rest in backward, bucket by bucket from the last layer on;
3. launch the chain's coroutine for a bucket at the moment when backward has filled it;
4. wait for all of them, step its own torch optimizer, run the links behind the optimizer.

So overlap, waiting and contention come out of the same coroutines that real ranks run; what they cost is stated in
``group/memory_wire.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.exchange.chain import Exchange
from paceline.exchange.link import Message, State
from paceline.group.memory_wire import MemoryNetwork, MemoryWire, PerPair, Span
from paceline.group.virtual import Elapse, Promise, Until
from paceline.group.wire import Buffer, Request
from paceline.terms.bucket import Bucket, Slot

Gradient = Callable[[int, int, list[Tensor]], tuple[list[Tensor], float]]
"""(peer, step, parameters) -> (gradient of the peer's mean loss, weight of that mean)."""

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_Part = Callable[[Message, list[State]], Coroutine[Request[Any], Any, Message]]

BUCKET = 8 << 20  # bytes, when the exchange does not say
FORWARD = 1 / 3  # of the computing time: backward costs twice as much


@dataclass(frozen=True, slots=True)
class Simulation:
    """What came out.

    Attributes:
        parameters: For each peer its parameters at the end.
        seconds: Virtual time until the last peer had ended.
        bytes_sent: By all peers together.
        trace: What has occupied whom, and when.
    """

    parameters: list[list[Tensor]]
    seconds: float
    bytes_sent: float
    trace: tuple[Span, ...]


def simulate(
    exchange: Exchange,
    *,
    peers: int,
    steps: int,
    gradient: Gradient,
    parameters: Sequence[Tensor],
    optimizer: Optimizer,
    compute: float = 0.01,
    speeds: Sequence[float] = (),
    bandwidth: PerPair = 1e9,
    latency: PerPair = 1e-4,
    jitter: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Train `steps` steps on `peers` simulated peers that all begin with `parameters`.

    Args:
        exchange: A recipe's result.
        gradient: The peer's gradient of its mean loss, and how many terms that is a mean over.
        optimizer: Makes a peer's optimizer.
        compute: Virtual seconds of one forward and backward at speed 1.
        speeds, bandwidth, latency, jitter, seed: See :class:`~paceline.group.memory_wire.MemoryNetwork`.
    """
    network = MemoryNetwork(peers, bandwidth=bandwidth, latency=latency, speeds=speeds, jitter=jitter, seed=seed)
    riders = [_Peer(network, rank, exchange, parameters, optimizer) for rank in range(peers)]
    for rider in riders:
        network.spawn(rider.rank, rider.train(steps, gradient, compute))
    network.run()
    found = [[p.detach() for p in rider.parameters] for rider in riders]
    return Simulation(found, network.time.now, network.bytes_sent, tuple(network.trace))


@dataclass(eq=False)
class _Live:
    """A bucket, its memory, where in it each parameter lies, and the chain's state."""

    bucket: Bucket
    buffer: Buffer
    views: dict[int, Tensor]
    states: list[State]
    wide: Buffer | None

    def fill(self, tensors: Sequence[Tensor], factor: float) -> None:
        for i, view in self.views.items():
            torch.mul(tensors[i], factor, out=view)


class _Peer:
    def __init__(
        self, network: MemoryNetwork, rank: int, exchange: Exchange, parameters: Sequence[Tensor], optimizer: Optimizer
    ) -> None:
        self.rank = rank
        self.parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        self._network, self._chain, self._shards = network, exchange.chain, exchange.shards
        self._optimizer = optimizer(self.parameters)
        limit = BUCKET if exchange.bucket_mb is None else exchange.bucket_mb * 2**20
        self._buckets = [
            _live(network.wire(rank), exchange, number, indices, self.parameters)
            for number, indices in enumerate(_groups(self.parameters, limit))
        ]

    async def train(self, steps: int, gradient: Gradient, compute: float) -> None:
        numel = sum(live.bucket.numel for live in self._buckets)
        for step in range(steps):
            gradients, weight = gradient(self.rank, step, [p.detach() for p in self.parameters])
            await Elapse(compute * FORWARD)
            flights = []
            for live in self._buckets:
                await Elapse(compute * (1 - FORWARD) * live.bucket.numel / numel)
                live.fill(gradients, weight / self._network.size)
                flights.append(self._launch(self._chain.exchange_gradients, live, step, weight))
            await Until(flights)
            self._step()
            if self._chain.parameter_links:
                await self._exchange_parameters(step, weight)

    def _launch(self, part: _Part, live: _Live, step: int, weight: float) -> Promise[Message]:
        size = self._network.size
        message = Message(live.bucket, live.buffer, [weight], float(size), self.rank, size, step, wide=live.wide)
        message.shard = self.rank % max(1, self._shards)
        return self._network.spawn(self.rank, part(message, live.states))

    def _step(self) -> None:
        for live in self._buckets:
            for i, view in live.views.items():
                self.parameters[i].grad = view
        self._optimizer.step()

    async def _exchange_parameters(self, step: int, weight: float) -> None:
        values = [p.detach() for p in self.parameters]
        for live in self._buckets:
            live.fill(values, 1.0)
        await Until([self._launch(self._chain.exchange_parameters, live, step, weight) for live in self._buckets])
        for live in self._buckets:
            for i, view in live.views.items():
                values[i].copy_(view)


def _groups(parameters: Sequence[Tensor], limit: float) -> Iterator[list[int]]:
    """Positions of parameters, last first, cut where the next one exceeds `limit` bytes or has another type."""
    group: list[int] = []
    for i in reversed(range(len(parameters))):
        nbytes = sum(parameters[j].nbytes for j in (*group, i))
        if group and (nbytes > limit or parameters[i].dtype != parameters[group[0]].dtype):
            yield group
            group = []
        group.append(i)
    yield group


def _live(wire: MemoryWire, exchange: Exchange, number: int, indices: list[int], parameters: Sequence[Tensor]) -> _Live:
    slots, views, at = [], {}, 0
    for i in indices:
        slots.append(Slot(str(i), at, parameters[i].numel(), tuple(parameters[i].shape)))
        at += parameters[i].numel()
    first = parameters[indices[0]]
    bucket = Bucket(number, tuple(slots), at, first.dtype)
    (buffer,) = wire.cut(wire.allocate(at, first.dtype, first.device), [at], [1])
    for i, slot in zip(indices, slots, strict=True):
        views[i] = buffer.tensor[slot.offset : slot.offset + slot.numel].view(slot.shape)
    wide = None
    if exchange.shards:
        (wide,) = wire.cut(wire.allocate(2 * at, torch.float64, first.device), [2 * at], [1 + exchange.shards])
    return _Live(bucket, buffer, views, exchange.chain.init(bucket), wide)
