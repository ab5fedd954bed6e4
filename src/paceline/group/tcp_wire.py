"""The wire over Paceline's own connections: between any members, on one host or many, authenticated, and encrypted between hosts.

1. Each process has one ``Lobby`` for its whole life: a listener whose address it tells the others.
2. For each epoch a :class:`TcpWire` connects everybody with everybody: a rank calls those before it. Who belongs to another
   epoch is refused.
3. Collectives are the coroutines of ``collectives``; their messages go straight from and into the tensors
   (see ``channels``).

Note [driver]: sockets never block, and one thread at a time moves everything: the one that waits, or, while nobody does and
something is under way that is worth it, a thread of the wire. So transfers go on while the caller computes, and whoever waits is
not woken up by another thread but by its own data. One short sum alone is not worth it: two threads that take turns cost more.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from paceline.group import roll, tail
from paceline.group.channels import CAPS, EAGER, Message, Peer
from paceline.group.collectives import all_reduce_by
from paceline.group.lobby import Lobby
from paceline.group.secure import Connection, connect
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import Aborted, PacelineError, PeerLost, WireError

T = TypeVar("T")
JOIN_S = 30.0
_NAP_S = 0.02  # between two looks at what could end the waiting
_TAG = 200
_MASK_BITS = 62
Done = Callable[[Any], None]


class TcpWire:
    """A :class:`~paceline.group.wire.Wire` over connections of our own, for CPU buffers.

    A wire on which a request failed stays failed: it has cut its connections, so that all ranks notice, and repeats its error.

    Args:
        peers: The lobbies' addresses, by rank.
        rank: This one's.
        secret: Of the job.
        epoch: Only processes that open a wire of this epoch are connected.
        lobby: Of this process.
        activity: This process's page; its board is watched for the end of the run.
        names: The page on the board of each rank.
        hosts: For each rank the index of its host, for the choice of algorithms.
        interrupted: Whether this epoch is over, as somebody has said; asked while waiting.
        evicted: Gives the ranks that are no longer members; asked while waiting.
        join: Seconds for connecting to everybody.

    Raises:
        PeerLost: Somebody is not there, or in another epoch (PL403).
        Aborted: The run is being ended (PL404).
        WireError: Like :func:`~paceline.group.secure.connect`.
    """

    name = "tcp"
    ordered = False

    def __init__(
        self,
        peers: Sequence[str],
        rank: int,
        secret: bytes,
        epoch: int,
        lobby: Lobby,
        activity: Activity,
        *,
        names: Sequence[int] | None = None,
        hosts: Sequence[int] = (),
        interrupted: Callable[[], bool] = lambda: False,
        evicted: Callable[[], Collection[int]] = tuple,
        join: float = JOIN_S,
    ) -> None:
        self.rank, self.size = rank, len(peers)
        self._names = tuple(names) if names is not None else tuple(range(self.size))
        self._hosts, self._activity, self._board = tuple(hosts), activity, activity.board
        self._interrupted, self._evicted = interrupted, evicted
        self._keys = self._operation = 0
        self._failure: PacelineError | None = None
        self._looked = 0.0
        self._flights: set[_Flight[Any]] = set()
        self._completed: deque[Callable[[], None]] = deque()
        self._peers: dict[int, Peer] = {}
        self._restless: set[Peer] = set()  # have something to move
        self._join(peers, secret, epoch, lobby, time.monotonic() + join)
        self._start_driving()

    def _join(self, addresses: Sequence[str], secret: bytes, epoch: int, lobby: Lobby, deadline: float) -> None:
        lobby.open(epoch)
        try:
            for other, address in enumerate(addresses):
                if other < self.rank:
                    about = {"epoch": epoch, "from": self.rank, "to": other}
                    left = max(0.1, deadline - time.monotonic())
                    connection = connect(address, secret, "peer", left, about=about, caps=CAPS, check=self._look)
                elif other > self.rank:
                    connection = self._await(lobby, epoch, other, deadline)
                else:
                    continue
                self._peers[other] = Peer(other, connection, self._completed)
        except BaseException as error:
            for peer in self._peers.values():
                peer.connection.close()
            if isinstance(error, WireError) and error.code in ("PL431", "PL433", "PL436"):
                raise PeerLost("PL403", f"rank {self._names[other]} was not there: {error.message}") from error
            raise

    def _await(self, lobby: Lobby, epoch: int, other: int, deadline: float) -> Connection:
        while time.monotonic() < deadline:
            connection = lobby.take(epoch, other, self.rank, _NAP_S)
            if connection is not None:
                return connection
            self._look()
        raise PeerLost("PL403", f"rank {self._names[other]} did not come in time")

    # -- memory
    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        """See ``Wire.allocate``. Raises WireError PL206 for a device other than the CPU."""
        if device.type != "cpu":
            raise WireError("PL206", f"the tcp wire cannot hold buffers on {device}", help="use `--wire torch`.")
        try:
            return Region(torch.zeros(numel, dtype=dtype))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise WireError("PL405", f"no memory for {numel} elements of {dtype}: {reason}") from error

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        """See ``Wire.cut``. Buffers have gaps between them, where their headers travel."""
        buffers = tail.cut(region, numels, header_size, self._keys)
        self._keys += len(buffers)
        return buffers

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        raise WireError("PL206", "the tcp wire has no memory that ranks share", help="use `--wire shm` on one host.")

    # -- requests
    def start(self, request: Request[T]) -> Work[T]:
        """See ``Wire.start``."""
        short = isinstance(request, AllReduce) and request.buffer.tensor.nbytes <= EAGER
        flight: _Flight[T] = _Flight(self, not short)
        with self._driving():
            self._take_off(flight, partial(self._issue, request, ""))
        return flight

    def _take_off(self, flight: _Flight[Any], begin: Callable[[Done], None]) -> None:
        self._check()
        self._flights.add(flight)
        try:
            begin(partial(self._land, flight))
            self._settle()
        except BaseException as error:
            self._flights.discard(flight)
            if isinstance(error, PacelineError) and error.code != "PL206":
                self._fail(error)
            raise

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _land(self, flight: _Flight[Any], value: Any) -> None:
        flight.value.append(value)
        self._flights.discard(flight)

    def _issue(self, request: Request[Any], prefix: str, done: Done) -> None:
        """Begin a request; `done` is told its result. `prefix` keeps the channels of coroutines apart."""
        match request:
            case Send(to=to, tensor=tensor, tag=tag):
                message = Message(tensor.detach().contiguous(), partial(done, None))
                self._with(to, lambda peer: peer.send(f"{prefix}.{tag}", message))
            case Receive(source=source, into=into, tag=tag):
                assert into.is_contiguous(), "only a contiguous tensor can be received into"
                message = Message(into, partial(done, into))
                self._with(source, lambda peer: peer.receive(f"{prefix}.{tag}", message))
            case Together(requests=requests):
                self._together(requests, prefix, done)
            case AllReduce(buffer=buffer, header=header, divisor=divisor):
                reduce = all_reduce_by("auto", buffer, header, divisor, self.rank, self.size, self._hosts)
                self._run(reduce, f"r{buffer.key}", done)
            case AllGather(tensor=tensor, tag=tag):
                self._run(_all_gather(tensor, self.rank, self.size), f"g{_short(tag)}", done)
            case _:
                raise WireError("PL206", f"the tcp wire cannot carry out a {type(request).__name__}")

    def _together(self, requests: Sequence[Request[Any]], prefix: str, done: Done) -> None:
        results: list[Any] = [None] * len(requests)
        left = set(range(len(requests)))

        def one(index: int, value: Any) -> None:
            results[index] = value
            left.discard(index)
            if not left:
                self._completed.append(partial(done, results))

        for index, request in enumerate(requests):
            self._issue(request, prefix, partial(one, index))
        if not requests:
            self._completed.append(partial(done, results))

    def _run(self, coroutine: Coroutine[Any, Any, Any], prefix: str, done: Done) -> None:
        """Drive a coroutine that awaits requests; `done` is told what it returns."""

        def resume(value: Any) -> None:
            try:
                request = coroutine.send(value)
            except StopIteration as end:
                done(end.value)
                return
            self._issue(request, prefix, resume)

        resume(None)

    def _with(self, rank: int, do: Callable[[Peer], None]) -> None:
        """Give a peer something to do. Raises PeerLost PL403."""
        peer = self._peers[rank]
        try:
            do(peer)
        except WireError as error:
            raise self._lost(peer, error) from error
        self._restless.add(peer)

    # -- calls that all ranks make together
    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See ``Wire.broadcast``: along a binomial tree."""
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be overwritten by a broadcast")
        what = f"broadcast of {tensor.dtype} {tuple(tensor.shape)} from rank {self._names[root]}"
        self._count()
        self._block(what, _broadcast(tensor, root, self.rank, self.size))

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        """See ``Wire.gather_bytes``. Raises also what :meth:`start` and waiting raise."""
        self._count()
        mine = roll.pack(self._operation, tag, payload)
        frames = [roll.unpack(raw) for raw in self._exchange(tag, mine, [len(mine)] * self.size)]
        roll.check(frames, self._names)
        if all(frame.complete for frame in frames):
            return [frame.inline for frame in frames]
        return self._exchange(tag, payload, [frame.nbytes for frame in frames])

    def barrier(self, tag: str) -> None:
        """See ``Wire.barrier``."""
        self.gather_bytes(f"barrier {tag}", b"")

    def _count(self) -> None:
        """One more call that all ranks make."""
        self._operation += 1
        self._activity.operation(self._operation)

    def _exchange(self, what: str, mine: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Everybody's bytes, of these lengths."""
        memory = [bytearray(length) for length in lengths]
        memory[self.rank][:] = mine
        rows = [torch.frombuffer(row, dtype=torch.uint8) if row else torch.empty(0) for row in memory]
        self._block(what, _to_all(rows[self.rank], rows, self.rank))
        return [bytes(row) for row in memory]

    def _block(self, what: str, coroutine: Coroutine[Any, Any, None]) -> None:
        flight: _Flight[None] = _Flight(self, long=False)
        try:
            with self._activity.during(Phase.WAIT, what), self._driving():
                self._take_off(flight, partial(self._run, coroutine, "c"))
                self._wait(flight)
        finally:
            coroutine.close()

    # -- moving, see Note [driver]
    def _start_driving(self) -> None:
        self._epoll = select.epoll()
        self._rope = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._rope, select.EPOLLIN)
        self._events: dict[int, tuple[Peer, int]] = {}
        for peer in self._peers.values():
            self._events[peer.connection.fileno()] = (peer, peer.events)
            self._epoll.register(peer.connection.fileno(), peer.events)
        self._over = False
        self._lock = threading.Lock()  # whoever holds it drives
        self._meanwhile = threading.Event()  # set while there is something to do, and nobody waits for it
        self._thread = threading.Thread(target=self._drive_meanwhile, name="paceline-tcp-wire", daemon=True)
        self._thread.start()

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """The caller drives inside of the block, and the wire's thread, if there is something to do, after it."""
        self._meanwhile.clear()
        if not self._lock.acquire(blocking=False):
            os.eventfd_write(self._rope, 1)
            self._lock.acquire()
        try:
            yield
        finally:
            if len(self._flights) > 1 or any(flight.long for flight in self._flights):
                self._meanwhile.set()
            self._lock.release()

    def _drive_meanwhile(self) -> None:
        while not self._over:
            self._meanwhile.wait()
            with self._lock:
                if not self._flights:
                    self._meanwhile.clear()
                elif self._meanwhile.is_set():
                    self._turn(_NAP_S)

    def over(self, flight: _Flight[Any]) -> bool:
        """Whether `flight` has ended, after moving what can be moved if nobody else does."""
        if self._lock.acquire(blocking=False):
            try:
                self._turn(0)
            finally:
                self._lock.release()
        return flight not in self._flights

    def wait(self, flight: _Flight[Any]) -> None:
        """Drive until `flight` has landed. Raises PeerLost PL403, Aborted PL404, WireError."""
        with self._driving():
            self._wait(flight)

    def _wait(self, flight: _Flight[Any]) -> None:
        try:
            while flight in self._flights:
                self._announce()
                self._turn(_NAP_S)
                self._watch()
        finally:
            self._activity.waits_for(0)
        if not flight.value:
            self._check()

    def _turn(self, seconds: float) -> None:
        """Move what can be moved, after waiting for that for at most so many seconds."""
        try:
            for fd, _ in self._epoll.poll(0 if self._restless else seconds):
                if fd == self._rope:
                    os.eventfd_read(self._rope)
                else:
                    self._restless.add(self._events[fd][0])
            self._settle()
        except PacelineError as error:
            self._fail(error)
        except Exception as error:
            self._fail(WireError("PL406", f"{type(error).__name__}: {error}"))

    def _settle(self) -> None:
        """Let every restless peer have its turn once, and complete what is complete."""
        for peer in list(self._restless):
            self._restless.discard(peer)
            if peer.lost is None:
                self._move(peer)
        while self._completed:
            self._completed.popleft()()

    def _move(self, peer: Peer) -> None:
        fd = peer.connection.fileno()
        try:
            if peer.turn():
                self._restless.add(peer)
        except WireError as error:
            peer.lost = error
            self._epoll.unregister(fd)
            if peer.needed:
                self._look()  # the reason may be known
                raise self._lost(peer, error) from error
            return
        if peer.events != self._events[fd][1]:
            self._events[fd] = (peer, peer.events)
            self._epoll.modify(fd, peer.events)

    # -- the end
    def _announce(self) -> None:
        names = [self._names[peer.rank] for peer in self._peers.values() if peer.needed]
        self._activity.waits_for(sum(1 << name for name in names if name < _MASK_BITS))

    def _watch(self) -> None:
        """Fail if waiting is of no use any more. Looks fifty times a second."""
        if time.monotonic() - self._looked < _NAP_S:
            return
        self._looked = time.monotonic()
        try:
            self._look()
        except WireError as error:
            self._fail(error)

    def _look(self) -> None:
        me = self._names[self.rank]
        if self._board.aborted:
            if self._board.lost not in (-1, self._activity.rank):
                raise PeerLost("PL403", f"rank {self._board.lost} was lost while rank {me} waited")
            raise Aborted("PL404", f"the run was ended while rank {me} waited")
        for rank in self._evicted():
            raise PeerLost("PL403", f"rank {self._names[rank]} is no longer a member, and rank {me} waited")
        if self._interrupted():
            raise PeerLost("PL403", f"this epoch ended while rank {me} waited")

    def _lost(self, peer: Peer, error: WireError) -> PeerLost:
        who, me = self._names[peer.rank], self._names[self.rank]
        return PeerLost("PL403", f"rank {who} was lost while rank {me} exchanged with it: {error.message}")

    def _fail(self, error: PacelineError) -> None:
        """Make `error` the failure, unless there is one, and cut the connections."""
        self._failure = self._failure or error
        self._flights.clear()
        for peer in self._peers.values():
            peer.connection.abort()

    def abort(self) -> None:
        """Make every operation of this rank, and of its peers that need it, fail now. From any thread."""
        self._failure = self._failure or Aborted("PL404", "the exchange was aborted")
        for peer in self._peers.values():
            peer.connection.abort()

    def close(self) -> None:
        """See ``Wire.close``."""
        if self._over:
            return
        with self._driving():
            self._over = True
            self._fail(Aborted("PL404", "the wire is closed"))
        self._meanwhile.set()
        self._thread.join()
        for peer in self._peers.values():
            peer.connection.close()
        self._epoll.close()
        os.close(self._rope)


class _Flight(Generic[T]):
    """A request under way. A `long` one is worth another thread."""

    def __init__(self, wire: TcpWire, long: bool) -> None:
        self._wire, self.long = wire, long
        self.value: list[T] = []

    def poll(self) -> bool:
        """See ``Work.poll``."""
        return bool(self.value) or self._wire.over(self)

    def wait(self) -> T:
        """See ``Work.wait``."""
        if not self.value:
            self._wire.wait(self)
        return self.value[0]


# ---- coroutines -----------------------------------------------------------------------------------------------------
async def _to_all(mine: Tensor, rows: Sequence[Tensor], rank: int) -> None:
    """Send `mine` to everybody, and receive everybody's into `rows`. Empty ones do not travel."""
    others = [other for other in range(len(rows)) if other != rank]
    sends = [Send(other, mine) for other in others if mine.numel()]
    receives = [Receive(other, rows[other]) for other in others if rows[other].numel()]
    await Together((*sends, *receives))


async def _all_gather(tensor: Tensor, rank: int, size: int) -> list[Tensor]:
    gathered = list(tensor.new_empty((size, *tensor.shape)))
    gathered[rank].copy_(tensor.detach())
    await _to_all(gathered[rank], gathered, rank)
    return gathered


async def _broadcast(tensor: Tensor, root: int, rank: int, size: int) -> None:
    """Down a binomial tree: who has it, sends it to the rank twice as far on as the one before."""
    place, distance = (rank - root) % size, 1
    while distance < size:
        if place < distance and place + distance < size and tensor.numel():
            await Send((rank + distance) % size, tensor)
        elif distance <= place < 2 * distance and tensor.numel():
            await Receive((rank - distance) % size, tensor)
        distance *= 2


def _short(tag: str) -> str:
    return tag if len(tag) <= _TAG else tag[:_TAG] + blake2b(tag.encode(), digest_size=16).hexdigest()
