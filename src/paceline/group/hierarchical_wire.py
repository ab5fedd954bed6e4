"""The wire of several hosts with several ranks each: shared memory inside a host, c10d between hosts.

An all-reduce goes home, away and back:

1. The ranks of each host sum their buffers in shared memory (``ShmWire``).
2. The host's sum is cut into slices, one for each rank that has a counterpart on every host. Counterparts sum their slice
   over the network (``TorchWire``), in memory that their whole host has mapped.
3. When all slices of a host are there, its ranks copy them into their buffers.

So every host sends and receives what a single rank on it would, over as many connections as the smallest host has ranks.
Messages stay inside a host where they can; they and the small exchanges else go through a c10d group of everybody.

[Note: in step] c10d's collectives must be started in the same order on every rank, but sums in shared memory end in any
order. So an all-reduce takes its next step only when those launched before it have taken theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from paceline.group import tail
from paceline.group.crews import Crews
from paceline.group.shm_wire import KernelChoice, ShmWire
from paceline.group.torch_wire import TorchWire
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import WireError

T = TypeVar("T")
_PATIENCE_S = 5e-3  # how long a rank that waits for one all-reduce looks after the others before it blocks
_ALL_STEPS = 99
Steps = Generator[Work[Any], Any, list[float]]


@dataclass(eq=False)
class _Region(Region):
    """`home` is the region of this host's wire; `shared` the memory that holds slices, one copy a host."""

    home: Region
    shared: Region | None = None


@dataclass(eq=False)
class _Buffer(Buffer):
    """`home` is the buffer of this host's wire; `slices` are pieces of memory that the host has mapped."""

    home: Buffer
    slices: list[Buffer]


class HierarchicalWire:
    """A :class:`~paceline.group.wire.Wire` over hosts, for CPU buffers.

    Args:
        arena_fd: The arena of this host (see ``ShmWire``).
        store: Where all ranks find each other.
        rank: Position among all ranks.
        hosts: For each rank the index of its host.
        board, activity: This rank's.
        kernel: See ``ShmWire``.
        timeout, prefix, hostname, interface: See ``TorchWire``.
    """

    name = "hierarchical"
    ordered = True

    def __init__(
        self,
        arena_fd: int,
        store: Store,
        rank: int,
        hosts: Sequence[int],
        board: Board,
        activity: Activity,
        *,
        kernel: KernelChoice = "auto",
        timeout: timedelta = timedelta(minutes=30),
        prefix: str = "paceline",
        hostname: str = "",
        interface: str = "",
    ) -> None:
        self.rank, self.size = rank, len(hosts)
        self.crews = Crews.of(rank, hosts)
        mine, others = self.crews.mine, self.crews.counterparts
        self._hosts = tuple(hosts)
        self._flights: list[_Flight] = []
        self._open: list[ShmWire | TorchWire] = []
        self._home = ShmWire(arena_fd, self.crews.place, len(mine), board, activity, kernel=kernel, names=mine)
        self._away: TorchWire | None = None
        self._open.append(self._home)
        settings: dict[str, Any] = {"timeout": timeout, "hostname": hostname, "interface": interface}
        try:
            self._all = TorchWire(store, rank, self.size, board, activity, prefix=f"{prefix}/all", **settings)
            self._open.append(self._all)
            if others:
                settings |= {"prefix": f"{prefix}/slice{self.crews.place}", "names": others}
                self._away = TorchWire(store, self.crews.host, len(others), board, activity, **settings)
                self._open.append(self._away)
        except BaseException:
            self.close()
            raise

    # -- memory
    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        """See ``Wire.allocate``. Raises WireError PL206 for a device other than the CPU."""
        home = self._home.allocate(numel, dtype, device)
        return _Region(home.tensor, home)

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        help = "use `ddp()`, which gives each rank parameters of its own."
        raise WireError("PL206", "ranks on different hosts share no memory", help=help)

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        """See ``Wire.cut``. The memory of the slices is kept when the region is cut anew."""
        assert isinstance(region, _Region)
        homes = self._home.cut(region.home, numels, header_size)
        lengths, headers = self._slices(homes)
        room = tail.room(region.tensor.dtype, lengths, headers)
        if region.shared is None or region.shared.tensor.numel() < room:
            region.shared = self._home.allocate_shared(room, region.tensor.dtype)
        pieces = iter(tail.cut(region.shared, lengths, headers, 0))
        return [
            _Buffer(home.tensor, home.header_size, home.key, home, [next(pieces) for _ in range(self.crews.slices)])
            for home in homes
        ]

    def _slices(self, homes: Sequence[Buffer]) -> tuple[list[int], list[int]]:
        """Lengths and header sizes of all slices of all buffers."""
        lengths = [part.numel() for home in homes for part in self._parts(home)]
        return lengths, [home.header_size for home in homes for _ in range(self.crews.slices)]

    def _parts(self, home: Buffer) -> tuple[Tensor, ...]:
        return home.tensor.tensor_split(self.crews.slices)

    # -- requests
    def start(self, request: Request[T]) -> Work[T]:
        """See ``Wire.start``."""
        with self._telling():
            return cast("Work[T]", self._start(request))

    def _start(self, request: Request[Any]) -> Work[Any]:
        mine = self.crews.mine
        match request:
            case AllReduce():
                flight = _Flight(self, self._steps(request))
                self._flights.append(flight)
                return flight
            case Send(to=to, tensor=tensor, tag=tag) if to in mine:
                return self._home.start(Send(mine.index(to), tensor, tag))
            case Receive(source=source, into=into, tag=tag) if source in mine:
                return self._home.start(Receive(mine.index(source), into, tag))
            case Together(requests=requests):
                return _Mixed([(self._start(each), self._stays(each)) for each in requests])
        return self._all.start(request)

    def _stays(self, request: Request[Any]) -> bool:
        """Whether a message stays inside this host."""
        match request:
            case Send(to=peer) | Receive(source=peer):
                return peer in self.crews.mine
        return False

    def _steps(self, request: AllReduce) -> Steps:
        """Home, away and back."""
        buffer = request.buffer
        assert isinstance(buffer, _Buffer)
        sums = yield self._home.start(AllReduce(buffer.home, request.header))
        parts = self._parts(buffer.home)
        if self._away is not None:
            mine = buffer.slices[self.crews.place]
            mine.tensor.copy_(parts[self.crews.place])
            sums = yield self._away.start(AllReduce(mine, sums, request.divisor))
        # Who has everybody's sums knows that everybody's slice is there. The first rank's are taken: a sum over hosts may
        # have been rounded differently in another group.
        told = yield self._home.start(AllGather(torch.tensor(sums, dtype=torch.float64), "sums between hosts"))
        for part, piece in zip(parts, buffer.slices, strict=True):
            part.copy_(piece.tensor)
        numbers: list[float] = told[0].tolist()
        return numbers

    # -- moving flights
    def advance(self) -> None:
        """Let every all-reduce take the steps that it can take without waiting. See [Note: in step]."""
        with self._telling():
            ahead: _Flight | None = None
            for flight in self._flights:
                while (ahead is None or ahead.steps > flight.steps) and flight.step():
                    pass
                ahead = flight
            self._flights = [flight for flight in self._flights if not flight.done]

    def finish(self, flight: _Flight) -> None:
        """Block until `flight` is done, and those before it."""
        self.advance()
        while not flight.done:
            self._look_after_others()
            if self._flights:
                with self._telling():
                    self._flights[0].block()
            self.advance()

    def _look_after_others(self) -> None:
        """Before this rank blocks for one all-reduce: let the others be on their way between hosts, if that is soon."""
        end = time.monotonic() + _PATIENCE_S
        first = self._flights[0]
        while self._flights[:1] == [first] and self._flights[-1].steps == 1 and time.monotonic() < end:
            os.sched_yield()
            self.advance()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """A failure inside the host is told to the other hosts, by cutting the connections."""
        try:
            yield
        except WireError:
            for wire in self._open[1:]:
                assert isinstance(wire, TorchWire)
                wire.abort()
            raise

    # -- calls that all ranks make together
    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See ``Wire.broadcast``: between hosts among the root's counterparts, then inside each host."""
        source = Crews.of(root, self._hosts)
        if source.place >= source.slices:
            self._all.broadcast(tensor, root)
            return
        if self.crews.place == source.place and self._away is not None:
            self._away.broadcast(tensor, source.host)
        self._home.broadcast(tensor, source.place)

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        """See ``Wire.gather_bytes``."""
        return self._all.gather_bytes(tag, payload)

    def barrier(self, tag: str) -> None:
        """See ``Wire.barrier``."""
        self._all.barrier(tag)

    def close(self) -> None:
        """See ``Wire.close``."""
        for wire in reversed(self._open):
            wire.close()


class _Flight:
    """One all-reduce under way.

    Attributes:
        steps: How many steps it has begun; far more than there are, when it is done.
    """

    def __init__(self, wire: HierarchicalWire, steps: Steps) -> None:
        self._wire, self._steps = wire, steps
        self._work: Work[Any] = next(steps)
        self.steps, self.done = 1, False
        self._value: list[float] = []

    def poll(self) -> bool:
        if not self.done:
            self._wire.advance()
        return self.done

    def wait(self) -> list[float]:
        self._wire.finish(self)
        return self._value

    def block(self) -> None:
        """Wait for the step under way."""
        self._work.wait()

    def step(self) -> bool:
        """Begin the next step if the last one has ended. True when one was begun."""
        if self.done or not self._work.poll():
            return False
        try:
            self._work = self._steps.send(self._work.wait())
            self.steps += 1
            return True
        except StopIteration as end:
            self._value, self.done, self.steps = end.value, True, _ALL_STEPS
            return False


class _Mixed:
    """Several works. Those inside the host are waited for first: gloo goes on by itself, shared memory only while somebody looks."""

    def __init__(self, works: Sequence[tuple[Work[Any], bool]]) -> None:
        self._works = [work for work, _ in works]
        self._order = sorted(range(len(works)), key=lambda i: not works[i][1])

    def poll(self) -> bool:
        polled = [work.poll() for work in self._works]
        return all(polled)

    def wait(self) -> list[Any]:
        results = {i: self._works[i].wait() for i in self._order}
        return [results[i] for i in range(len(self._works))]
