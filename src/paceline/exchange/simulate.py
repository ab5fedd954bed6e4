"""An exchange on simulated peers: the same chains as in a real run, on a virtual clock, in one process.

Each peer repeats, for every step:

1. ask `gradient` for its gradient and weight, at the parameters that it has;
2. let a third of the computing time pass for forward, the rest in backward, bucket by bucket from the last layer on;
3. launch the chain's coroutine for a bucket at the moment when backward has filled it;
4. wait for all of them, step its own torch optimizer;
5. run the links behind the optimizer where a round ends, or begin to, where their exchange overlaps with steps. The last step ends
   a round, a full one.

So overlap, waiting and contention come out of the same coroutines that real ranks run; what they cost is stated in
``group/memory_wire.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.exchange.cadence import Pace
from paceline.exchange.chain import Exchange, Rounds
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
        self._network, self._exchange, self._shards = network, exchange, exchange.shards
        self._phase = exchange.at(0)
        self._optimizer = optimizer(self.parameters)
        limit = BUCKET if exchange.bucket_mb is None else exchange.bucket_mb * 2**20
        self._buckets = [
            _live(network.wire(rank), self._phase, number, indices, self.parameters)
            for number, indices in enumerate(_groups(self.parameters, limit))
        ]
        self._turn = self._since = 0
        self._weight = 0.0  # of the open round
        self._sent: list[tuple[_Live, Promise[Message]]] = []

    async def train(self, steps: int, gradient: Gradient, compute: float) -> None:
        numel = sum(live.bucket.numel for live in self._buckets)
        self._begin()
        for step in range(steps):
            gradients, weight = gradient(self.rank, step, [p.detach() for p in self.parameters])
            await Elapse(compute * FORWARD)
            flights = []
            for live in self._buckets:
                await Elapse(compute * (1 - FORWARD) * live.bucket.numel / numel)
                if not self._sent:  # else its memory travels
                    live.fill(gradients, weight / self._network.size)
                    flights.append(self._launch(self._phase.chain.exchange_gradients, live, step, weight))
            await Until(flights)
            self._step(gradients)
            if self._phase.chain.parameter_links:
                await self._end_step(step, weight, last=step == steps - 1)
            if (phase := self._exchange.at(step + 1)) is not self._phase:
                await self._change(phase, step)

    def _launch(self, part: _Part, live: _Live, step: int, weight: float, full: bool = False) -> Promise[Message]:
        size = self._network.size
        message = Message(live.bucket, live.buffer, [weight], float(size), self.rank, size, step, wide=live.wide)
        message.shard, message.full = self.rank % max(1, self._shards), full
        return self._network.spawn(self.rank, part(message, live.states))

    def _step(self, gradients: Sequence[Tensor]) -> None:
        for live in self._buckets:
            for i, view in live.views.items():
                self.parameters[i].grad = gradients[i] if self._sent else view
        self._optimizer.step()

    # ---- rounds -----------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        for live in self._buckets if self._phase.chain.parameter_links else ():
            live.fill([p.detach() for p in self.parameters], 1.0)
            self._phase.chain.begin(live.buffer.tensor, live.states)

    async def _end_step(self, step: int, weight: float, *, last: bool) -> None:
        rounds = self._phase.rounds or Rounds()
        self._since += 1
        self._weight += weight
        if rounds.sends(self._since) and not self._sent:
            self._send(rounds, step, full=False)
        if rounds.cadence.due(self._since, Pace()):
            if not self._sent:
                self._send(rounds, step, full=False)
            await self._receive(rounds.blend)
        if last:
            await self._close(step)

    def _send(self, rounds: Rounds, step: int, *, full: bool) -> None:
        values, part = [p.detach() for p in self.parameters], rounds.fragment(self._turn)
        for live in self._buckets:
            if full or live.bucket.index % rounds.fragments == part:
                live.fill(values, 1.0)
                flight = self._launch(self._phase.chain.exchange_parameters, live, step, self._weight or 1.0, full)
                self._sent.append((live, flight))

    async def _receive(self, blend: float) -> None:
        sent, self._sent = self._sent, []
        await Until([flight for _, flight in sent])
        for live, _ in sent if self._network.size > 1 else ():
            for i, view in live.views.items():
                self.parameters[i].detach().mul_(blend).add_(view, alpha=1.0 - blend) if blend else self._put(i, view)
        self._since, self._weight, self._turn = 0, 0.0, self._turn + 1

    def _put(self, i: int, view: Tensor) -> None:
        self.parameters[i].detach().copy_(view)

    async def _close(self, step: int) -> None:
        """All ranks end up with the same parameters."""
        rounds = self._phase.rounds
        if rounds is None or (rounds.level and not self._since):
            return
        if self._sent:
            await self._receive(rounds.blend)
        self._send(rounds, step, full=True)
        await self._receive(0.0)

    async def _change(self, phase: Exchange, step: int) -> None:
        await self._close(step)
        self._phase = phase
        for live in self._buckets:
            live.states = phase.chain.init(live.bucket)
        self._begin()


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
