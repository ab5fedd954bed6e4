"""The protocol of a wire: what an exchange may ask for, and what answers.

A link is a coroutine that awaits only *requests*: ``sums = await AllReduce(buffer, header, divisor)``. Whoever drives the
coroutine hands each request to a wire, which starts it and returns a :class:`Work`; when the work is done its result is
sent into the coroutine. So the same link runs on shared memory, on c10d, and in a simulation with a virtual clock, and
its first half overlaps with backward without callbacks or threads (see :class:`Drive`).

**The wire allocates the buffers.** On one host they lie in memory that every process has mapped. A buffer has a header:
a short list of numbers that travels in the same message as its payload and is summed over ranks with it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from paceline.terms.activity import Activity, Phase

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(eq=False)
class Buffer:
    """Memory for one bucket, made by a wire and exchanged through it.

    Attributes:
        tensor: 1-D, contiguous view of this rank's payload.
        header_size: How many numbers travel with the payload.
        key: Number of the buffer, the same on all ranks.
    """

    tensor: Tensor
    header_size: int
    key: int


@dataclass(eq=False)
class Region:
    """A piece of a wire's memory that can be cut into buffers, and cut anew: when buckets are rebuilt, when they are resized.

    Attributes:
        tensor: 1-D, contiguous, this rank's own copy (or the one shared copy, for :meth:`Wire.allocate_shared`).
    """

    tensor: Tensor


class Request(Generic[T_co]):
    """Something a link awaits. The driver answers with the value of type ``T_co``."""

    def __await__(self) -> Generator[Request[Any], Any, T_co]:
        result: T_co = yield self
        return result


@dataclass(frozen=True, eq=False)
class AllReduce(Request[list[float]]):
    """Sum a buffer over all ranks, in place, headers too; every rank gets the same bits.

    Args:
        buffer: Payload; holds the result afterwards.
        header: ``buffer.header_size`` numbers. ``header[0]`` is the weight of this rank's payload.
        divisor: When given, the payload's sum is multiplied by ``divisor / sum of header[0]`` unless that is exactly 1
            (or the sum of weights is 0, which leaves the sum as it is). A payload that was scaled by ``weight / divisor``
            thus becomes the weighted mean.

    Result: the headers summed over ranks, in float64 where the wire can.
    """

    buffer: Buffer
    header: Sequence[float]
    divisor: float | None = None


@dataclass(frozen=True, eq=False)
class AllGather(Request[list[Tensor]]):
    """Collect one tensor of equal shape and dtype from every rank, in rank order. ``tag`` must be equal on all ranks."""

    tensor: Tensor
    tag: str = ""


@dataclass(frozen=True, eq=False)
class Send(Request[None]):
    """Give `tensor` to rank `to`. Done when the tensor may be changed again. Messages of one pair and tag keep their order."""

    to: int
    tensor: Tensor
    tag: int = 0


@dataclass(frozen=True, eq=False)
class Receive(Request[Tensor]):
    """Take the next message of rank `source` with this tag into `into`, which is returned."""

    source: int
    into: Tensor
    tag: int = 0


@dataclass(frozen=True, eq=False)
class Together(Request[list[Any]]):
    """Several requests at once; the result is the list of their results. Needed wherever two ranks send to each other."""

    requests: tuple[Request[Any], ...]


class Work(Protocol[T_co]):
    """A request under way."""

    def poll(self) -> bool:
        """Do what can be done without waiting; True when the result is there. Never blocks."""

    def wait(self) -> T_co:
        """Block until done and return the result.

        Raises:
            PeerLost: A rank that is needed has died (PL403).
            Aborted: The launcher ends the run (PL404).
            WireError: The transport failed (PL406).
        """


class Wire(Protocol):
    """What ranks exchange through. All ranks make the same calls of ``allocate*``, ``broadcast`` and ``gather_bytes``
    in the same order; requests on buffers are matched by buffer where :attr:`ordered` is False, by order where it is True."""

    name: str
    rank: int
    size: int
    ordered: bool
    """True when collectives must be started in the same order on every rank (c10d); False when buffers are matched by key."""

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        """Memory for `numel` elements on every rank. Raises WireError PL405 when it cannot be had."""

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        """Cut a region into consecutive buffers. Cutting again makes the former buffers of the region invalid."""

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        """One copy of `numel` elements for all ranks of a host. Raises WireError PL206 where there is no such memory."""

    def start(self, request: Request[T]) -> Work[T]:
        """Start a request. Raises WireError PL206 for a kind of request that this wire does not know."""

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` (contiguous, any dtype, CPU or the wire's device) with that of `root`. Blocks."""

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        """Collect a small message from every rank, in rank order. Blocks.

        `tag` says what this call is, for people; ranks that meet with different tags raise StepError PL402, naming both.
        """

    def barrier(self, tag: str) -> None:
        """Wait until every rank is at the barrier of this tag. Raises like :meth:`gather_bytes`."""

    def close(self) -> None:
        """Give everything back. Idempotent, never raises, never waits for peers."""


@dataclass
class _Flight:
    coroutine: Coroutine[Request[Any], Any, Any]
    work: Work[Any] | None
    done: Callable[[Any], None] | None
    label: str


class Drive:
    """Runs coroutines against a wire: launch now, advance when convenient, finish when the results are needed.

    Invariant: flights are started in the order of :meth:`launch`, and :meth:`finish` completes them in that order.

    Args:
        wire: Who answers the requests.
        activity: Where to say what is waited for.
        on_start: Told of each request that is started.
    """

    def __init__(self, wire: Wire, activity: Activity, on_start: Callable[[Request[Any]], None] | None = None) -> None:
        self._wire = wire
        self._activity = activity
        self._on_start = on_start
        self._flights: list[_Flight] = []

    def launch(
        self,
        coroutine: Coroutine[Request[Any], Any, T],
        done: Callable[[T], None] | None = None,
        label: str = "",
    ) -> None:
        """Run `coroutine` up to its first request and start that. `done` gets its return value when it ends."""
        flight = _Flight(coroutine, None, done, label)
        if not self._resume(flight, None):
            self._flights.append(flight)

    def poll(self) -> None:
        """Advance every flight as far as it goes without waiting."""
        self._flights = [f for f in self._flights if not self._advance(f)]

    def finish(self) -> None:
        """Wait for all flights, in order, each to its end."""
        try:
            while self._flights:
                flight = self._flights[0]
                assert flight.work is not None
                if not flight.work.poll():
                    with self._activity.during(Phase.WAIT, flight.label):
                        flight.work.wait()
                if self._resume(flight, flight.work.wait()):
                    self._flights.pop(0)
        except BaseException:
            self.drop()
            raise

    def run(self, coroutine: Coroutine[Request[Any], Any, T], label: str = "") -> T:
        """Run one coroutine from start to end and return its value."""
        result: list[T] = []
        self.launch(coroutine, result.append, label)
        self.finish()
        return result[0]

    def drop(self) -> None:
        """Forget all flights; their coroutines are closed."""
        for flight in self._flights:
            flight.coroutine.close()
        self._flights.clear()

    def _advance(self, flight: _Flight) -> bool:
        while flight.work is not None and flight.work.poll():
            if self._resume(flight, flight.work.wait()):
                return True
        return False

    def _resume(self, flight: _Flight, value: Any) -> bool:
        """Send `value` into the coroutine; start its next request. True when the coroutine has ended."""
        try:
            request = flight.coroutine.send(value)
        except StopIteration as end:
            if flight.done is not None:
                flight.done(end.value)
            return True
        if self._on_start is not None:
            self._on_start(request)
        flight.work = self._wire.start(request)
        return False
