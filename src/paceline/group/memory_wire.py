"""All peers in one process, on a virtual clock: the wire of tests and simulations.

Peers are coroutines (:meth:`MemoryNetwork.spawn`) that await the requests of ``group.wire`` and two more: ``Elapse``, time
that a peer computes, and ``Until``, the end of other coroutines. A seed fixes everything that happens.

What things cost is the alpha-beta model of ``collectives``. With `S` bytes, and for a pair of ranks the latency ``a`` and the
bandwidth ``b``:

* A message takes ``a + S/b``, and in that time the sender's way out and the receiver's way in.
* ``AllReduce`` is a ring: ``2 (n-1) (a + S/n/b)`` from when the last rank has come, at the slowest pair of the ring.
  ``AllGather``: ``(n-1) (a + S/b)``. Both take all ways of all ranks.
* Encoding, decoding and adding cost nothing.

``AllReduce`` adds in rank order, 16-bit types in float32, and scales afterwards: the bits of the shared-memory wire.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, reduce
from itertools import accumulate, count
from operator import add
from random import Random
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from paceline.group.tail import scale
from paceline.group.virtual import Elapse, Promise, Timeline, Traffic, Transfer, Until, all_of
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.terms.errors import StepError, WireError

T = TypeVar("T")
PerPair = float | Callable[[int, int], float]
"""One number for all pairs of ranks, or a function of (from, to)."""


class Span(NamedTuple):
    """One line of the trace: what occupied a rank, how many bytes it sent, from when to when in virtual seconds."""

    rank: int
    what: str
    nbytes: float
    begin: float
    end: float


class MemoryNetwork:
    """Peers, what lies between them, and their clock.

    Args:
        size: Number of peers.
        bandwidth: Bytes a second.
        latency: Seconds.
        speeds: How fast each peer computes; 1 where not given.
        jitter: Computing times and latencies are stretched by random factors between 1 and ``1 + jitter``.
        seed: Of that randomness.

    Attributes:
        time: The clock.
        trace: What has occupied whom.
    """

    def __init__(
        self,
        size: int,
        *,
        bandwidth: PerPair = 1e9,
        latency: PerPair = 1e-4,
        speeds: Sequence[float] = (),
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size, self.time = size, Timeline()
        self.trace: list[Span] = []
        self._bandwidth, self._latency = _function(bandwidth), _function(latency)
        self._speeds = dict(enumerate(speeds))
        self._random, self._jitter = Random(seed), jitter
        self._traffic = Traffic(self.time)
        self._meetings: dict[str, list[dict[int, tuple[Any, Promise[Any]]]]] = defaultdict(list)
        self._channels: dict[tuple[int, int, int], _Channel] = defaultdict(_Channel)
        self._wires = [MemoryWire(self, rank) for rank in range(size)]

    @property
    def bytes_sent(self) -> float:
        """By all peers together."""
        return sum(span.nbytes for span in self.trace)

    def wire(self, rank: int) -> MemoryWire:
        """The wire of one peer."""
        return self._wires[rank]

    def spawn(self, rank: int, coroutine: Coroutine[Request[Any], Any, T]) -> Promise[T]:
        """Run a coroutine of peer `rank`: now up to its first request, then as time allows."""
        return self.time.spawn(f"rank {rank}", coroutine, partial(self.start, rank))

    def run(self) -> None:
        """Let everything happen. Raises StepError PL402 when peers wait for what never will."""
        self.time.run()

    # ---- requests -------------------------------------------------------------------------------------------------
    def start(self, rank: int, request: Request[Any]) -> Promise[Any]:
        """Start a request of `rank`."""
        match request:
            case AllReduce(buffer=buffer):
                return self._meet(f"all-reduce {buffer.key}", rank, request, self._all_reduce)
            case AllGather(tag=tag):
                return self._meet(f"all-gather {tag}", rank, request, self._all_gather)
            case Send():
                return self._send(rank, request)
            case Receive(source=source, into=into, tag=tag):
                promise: Promise[Tensor] = Promise(self.time, f"a message from rank {source}")
                self._channels[source, rank, tag].want(into, promise)
                return promise
            case Together(requests=requests):
                return all_of(self.time, [self.start(rank, r) for r in requests])
            case Until(works=works):
                return all_of(self.time, works)
            case Elapse(seconds=seconds):
                return self._elapse(rank, seconds)
        raise WireError("PL206", f"the memory wire cannot carry out a {type(request).__name__}")

    def _elapse(self, rank: int, seconds: float) -> Promise[None]:
        promise: Promise[None] = Promise(self.time, "its computation")
        end = self.time.now + self._stretched(seconds / self._speeds.get(rank, 1.0))
        self.trace.append(Span(rank, "compute", 0, self.time.now, end))
        self.time.at(end, lambda: promise.keep(None))
        return promise

    def _send(self, rank: int, request: Send) -> Promise[None]:
        promise: Promise[None] = Promise(self.time, f"a message to rank {request.to}")
        channel, tensor = self._channels[rank, request.to, request.tag], request.tensor.clone()

        def arrive() -> None:
            promise.keep(None)
            channel.bring(tensor)

        seconds = self._price(rank, request.to, tensor.nbytes)
        ways = frozenset({("out", rank), ("in", request.to)})
        span = partial(Span, rank, f"send to {request.to}", tensor.nbytes)
        self._traffic.ask(Transfer(ways, seconds, lambda *when: self.trace.append(span(*when)), arrive))
        return promise

    def _meet(self, label: str, rank: int, request: Any, conclude: Callable[..., None]) -> Promise[Any]:
        """Wait for all ranks: the k-th request of one label on a rank meets the k-th of it on all others."""
        promise: Promise[Any] = Promise(self.time, label)
        open_ones = self._meetings[label]
        meeting = next((m for m in open_ones if rank not in m), None)
        if meeting is None:
            open_ones.append(meeting := {})
        meeting[rank] = (request, promise)
        if len(meeting) == self.size:
            open_ones.remove(meeting)
            requests, promises = zip(*(meeting[r] for r in range(self.size)), strict=True)
            conclude(label, requests, promises)
        return promise

    def _all_reduce(self, label: str, requests: Sequence[AllReduce], promises: Sequence[Promise[list[float]]]) -> None:
        tensors = [r.buffer.tensor for r in requests]
        _check_alike(label, tensors)
        sums = [reduce(add, column) for column in zip(*(r.header for r in requests), strict=True)]
        total = reduce(add, [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
        scale(total, sums, requests[0].divisor)

        def end() -> None:
            for tensor, promise in zip(tensors, promises, strict=True):
                tensor.copy_(total)
                promise.keep(sums.copy())

        self._rounds(label, 2 * (self.size - 1), (tensors[0].nbytes + 8 * len(sums)) / self.size, end)

    def _all_gather(self, label: str, requests: Sequence[AllGather], promises: Sequence[Promise[list[Tensor]]]) -> None:
        tensors = [r.tensor.clone() for r in requests]
        _check_alike(label, tensors)

        def end() -> None:
            for promise in promises:
                promise.keep([t.clone() for t in tensors])

        self._rounds(label, self.size - 1, tensors[0].nbytes, end)

    def _rounds(self, label: str, rounds: int, nbytes: float, end: Callable[[], None]) -> None:
        """Take all ways for `rounds` rounds of a ring, in each of which every rank sends `nbytes`."""
        ranks = range(self.size)
        ways = frozenset((way, r) for way in ("out", "in") for r in ranks)
        seconds = rounds * max(self._price(r, (r + 1) % self.size, nbytes) for r in ranks)
        spans = [partial(Span, r, label, rounds * nbytes) for r in ranks]
        self._traffic.ask(Transfer(ways, seconds, lambda *when: self.trace.extend(span(*when) for span in spans), end))

    def _price(self, source: int, to: int, nbytes: float) -> float:
        return self._stretched(self._latency(source, to)) + nbytes / self._bandwidth(source, to)

    def _stretched(self, seconds: float) -> float:
        return seconds * (1.0 + self._jitter * self._random.random())


class _Channel:
    """Messages of one pair of ranks and one tag: they are received in the order in which they were sent."""

    def __init__(self) -> None:
        self._there: deque[Tensor] = deque()
        self._wanted: deque[tuple[Tensor, Promise[Tensor]]] = deque()

    def bring(self, tensor: Tensor) -> None:
        self._there.append(tensor)
        self._match()

    def want(self, into: Tensor, promise: Promise[Tensor]) -> None:
        self._wanted.append((into, promise))
        self._match()

    def _match(self) -> None:
        while self._there and self._wanted:
            tensor, (into, promise) = self._there.popleft(), self._wanted.popleft()
            _check_alike(promise.label, [tensor, into])
            promise.keep(into.copy_(tensor))


class MemoryWire:
    """One peer's end of a :class:`MemoryNetwork`: memory, and requests. Calls that block have no meaning here."""

    name = "memory"
    ordered = False

    def __init__(self, network: MemoryNetwork, rank: int) -> None:
        self.network, self.rank, self.size = network, rank, network.size
        self._keys = count()

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        return Region(torch.zeros(numel, dtype=dtype, device=device))

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        ends = accumulate(numels)
        parts = (region.tensor[end - numel : end] for numel, end in zip(numels, ends, strict=True))
        return [Buffer(part, size, next(self._keys)) for part, size in zip(parts, header_size, strict=True)]

    def start(self, request: Request[T]) -> Work[T]:
        return cast(Work[T], self.network.start(self.rank, request))

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        raise _refused("memory that ranks share")

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        raise _refused("a call that blocks")

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        raise _refused("a call that blocks")

    def barrier(self, tag: str) -> None:
        raise _refused("a call that blocks")

    def close(self) -> None:
        """Nothing to give back."""


def _refused(what: str) -> WireError:
    return WireError(
        "PL206", f"the memory wire does not have {what}", help="await requests: all peers share one thread."
    )


def _function(number: PerPair) -> Callable[[int, int], float]:
    return number if callable(number) else lambda source, to: number


def _check_alike(where: str, tensors: Sequence[Tensor]) -> None:
    kinds = sorted({f"{tuple(t.shape)} {t.dtype}" for t in tensors})
    if len(kinds) > 1:
        raise StepError("PL402", f"ranks met in {where} with different tensors: {', '.join(kinds)}")
