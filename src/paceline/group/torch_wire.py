"""The wire over c10d: gloo for CPU buffers, NCCL for CUDA buffers. It works wherever torch does, on one host or many.

Collectives are c10d's own; what is added is the header in the payload's message (``tail``), the roll call in small
exchanges (``roll``), and an end to waiting when the launcher says so (``torch_sockets``: [Note: cutting gloo]).

Waiting is c10d's own blocking wait: polling takes a core that gloo's threads need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store

from paceline.group import roll, tail
from paceline.group.torch_sockets import Connections, Watch
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.group.works import All, Done, Then
from paceline.terms.activity import Activity, Board, Phase
from paceline.terms.errors import Aborted, PacelineError, PeerLost, WireError

T = TypeVar("T")
CPU = torch.device("cpu")
_MASK_BITS = 62
_PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "Connection refused")


class TorchWire:
    """A :class:`~paceline.group.wire.Wire` over c10d.

    A failed wire stays failed: it has cut its connections, so that all ranks notice, and repeats its error.

    Args:
        store: Where ranks find each other: a ``UnixStore``, or torchrun's.
        rank, size: Position in the group.
        board: Watched while this rank waits: ``abort`` and ``lost`` end the wait.
        activity: Where to say what is waited for.
        device: Of the buffers.
        timeout: How long c10d waits for a peer. Losses are noticed through the board, so it is a last resort.
        prefix: Of the keys in the store. A prefix serves one group once: a second use would find dead addresses.
        hostname, interface: What gloo listens on, as an address or as a network interface; without either, on the
            address that the host's name resolves to.
        members: The ranks of the job that form this group, in group order; without it, all.

    Raises:
        WireError: The others could not be reached (PL411).
    """

    name = "torch"
    ordered = True

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        board: Board,
        activity: Activity,
        *,
        device: torch.device = CPU,
        timeout: timedelta = timedelta(minutes=30),
        prefix: str = "paceline",
        hostname: str = "",
        interface: str = "",
        members: Sequence[int] = (),
    ) -> None:
        self.rank, self.size = rank, size
        self._board, self._activity = board, activity
        self._members = tuple(members or range(size))
        self._failure: WireError | None = None
        self._operation = self._keys = 0
        self._connections = Connections()
        self._store = store  # c10d holds only the C++ half of a store that is written in Python
        self._groups: dict[str, Any] = {}  # by device type; c10d's stubs do not know a backend's collectives
        with _joining(), self._connections.recorded():
            gloo_store = PrefixStore(f"{prefix}/gloo", store)
            self._groups["cpu"] = _gloo(gloo_store, rank, size, timeout, hostname, interface)
        if device.type == "cuda" and torch.cuda.is_available():
            with _joining():
                self._groups["cuda"] = _nccl(PrefixStore(f"{prefix}/nccl", store), rank, size, timeout)
        self._watch = Watch(lambda: board.aborted, self._cut)

    # -- memory
    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        try:
            return Region(torch.zeros(numel, dtype=dtype, device=device))
        except RuntimeError as error:
            raise WireError("PL405", f"no memory for {numel} elements of {dtype}: {_short(error)}") from error

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        """See :meth:`Wire.cut`. Buffers have gaps between them, where their headers travel."""
        buffers = tail.cut(region, numels, header_size, self._keys)
        self._keys += len(buffers)
        return buffers

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        raise WireError("PL206", "the torch wire has no memory that ranks share", help="use `--wire shm` on one host.")

    # -- requests
    def start(self, request: Request[T]) -> Work[T]:
        return cast("Work[T]", self._start(request))

    def _start(self, request: Request[Any]) -> Work[Any]:
        match request:
            case AllReduce():
                return self._all_reduce(request)
            case AllGather(tensor=tensor):
                return self._all_gather(tensor)
            case Send(to=to, tensor=tensor, tag=tag):
                return self._begin(tensor, lambda group: group.send([tensor], to, tag), lambda: None, [to])
            case Receive(source=source, into=into, tag=tag):
                return self._begin(into, lambda group: group.recv([into], source, tag), lambda: into, [source])
            case Together(requests=requests):
                return self._together(requests)
        raise WireError("PL206", f"the torch wire cannot carry out a {type(request).__name__}")

    def _all_reduce(self, request: AllReduce) -> Work[list[float]]:
        buffer, payload = request.buffer, request.buffer.tensor

        def finish(sums: list[float]) -> list[float]:
            tail.scale(payload, sums, request.divisor)
            return sums

        if isinstance(buffer, tail.TailBuffer):
            message = tail.put_header(buffer, request.header)
            return Then(self._sum(message, lambda: tail.take_header(buffer)), finish)
        header = torch.tensor(request.header, dtype=torch.float64)
        both = All([self._sum(payload, lambda: None), self._sum(header, header.tolist)])
        return Then(both, lambda results: finish(results[1]))

    def _sum(self, tensor: Tensor, finish: Callable[[], T]) -> Work[T]:
        return self._begin(tensor, lambda group: group.allreduce([tensor]), finish)

    def _all_gather(self, tensor: Tensor) -> Work[list[Tensor]]:
        gathered = list(tensor.new_empty((self.size, *tensor.shape)))
        if not tensor.numel():
            return Done(gathered)
        mine, rows = _bytes(tensor), [_bytes(row) for row in gathered]
        return self._begin(mine, lambda group: group.allgather([rows], [mine]), lambda: gathered)

    def _together(self, requests: Sequence[Request[Any]]) -> Work[list[Any]]:
        """NCCL runs the kernels of one stream in turn: two ranks that send to each other must be one group for it."""
        nccl = self._groups.get("cuda")
        if nccl is None:
            return All([self._start(request) for request in requests])
        nccl._group_start()
        works = [self._start(request) for request in requests]
        nccl._group_end()
        return All(works)

    def _begin(
        self, tensor: Tensor, call: Callable[[Any], Any], finish: Callable[[], T], peers: Sequence[int] = ()
    ) -> Work[T]:
        """Start `call` on the group of the tensor's device; its result is that of `finish`."""
        if self._failure is not None:
            raise self._failure
        mask = self._mask(peers or range(self.size))
        try:
            work = call(self._groups[tensor.device.type])
        except RuntimeError as error:
            raise self._failed(error) from error
        return _Started(work, finish, lambda: self._activity.waits_for(mask), self._failed)

    def _mask(self, peers: Sequence[int]) -> int:
        """The ranks of the job that `peers` of this group are, as the board writes them."""
        ranks = (self._members[peer] for peer in peers if peer != self.rank)
        return sum(1 << rank for rank in ranks if rank < _MASK_BITS)

    # -- blocking calls
    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        options = BroadcastOptions()
        options.rootRank = root
        if tensor.numel():
            raw = _bytes(tensor)
            self._block("broadcast", self._begin(raw, lambda group: group.broadcast([raw], options), lambda: None))

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        self._operation += 1
        self._activity.operation(self._operation)
        frames = [roll.unpack(raw) for raw in self._gather_equal(tag, roll.pack(self._operation, tag, payload))]
        roll.check(frames)
        if all(frame.complete for frame in frames):
            return [frame.inline for frame in frames]
        longest = max(frame.nbytes for frame in frames)
        rows = self._gather_equal(tag, payload.ljust(longest, b"\0"))
        return [row[: frame.nbytes] for row, frame in zip(rows, frames, strict=True)]

    def barrier(self, tag: str) -> None:
        self.gather_bytes(tag, b"")

    def _gather_equal(self, tag: str, payload: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        memory = [bytearray(len(payload)) for _ in range(self.size)]
        rows = [torch.frombuffer(row, dtype=torch.uint8) for row in memory]
        self._block(tag, self._begin(mine, lambda group: group.allgather([rows], [mine]), lambda: None))
        return [bytes(row) for row in memory]

    def _block(self, what: str, work: Work[None]) -> None:
        with self._activity.during(Phase.WAIT, what):
            work.wait()

    # -- the end
    def abort(self) -> None:
        """Make every operation of this rank, and of its peers that need it, fail now. From any thread."""
        self._failure = self._failure or Aborted("PL404", "the exchange was aborted")
        self._cut()

    def close(self) -> None:
        if self._groups:
            self._failure = Aborted("PL404", "the wire is closed")  # a new one: the old one's frames hold the group
            self._watch.stop()
            self._cut()
            self._groups = {}

    def _cut(self) -> None:
        self._connections.cut()
        if "cuda" in self._groups:
            self._groups["cuda"].abort()

    def _failed(self, error: RuntimeError) -> WireError:
        """Our error for one of c10d's. The others are told by the cut."""
        self._failure = self._failure or self._reason(error)
        self._cut()
        return self._failure

    def _reason(self, error: RuntimeError) -> WireError:
        lost = self._board.lost
        if lost not in (-1, self._activity.rank):
            return PeerLost("PL403", f"rank {lost} was lost")
        if self._board.aborted:
            return Aborted("PL404", "the run was ended")
        if any(sign in str(error) for sign in _PEER_GONE):
            return PeerLost("PL403", f"a peer closed its connection: {_short(error)}")
        return WireError("PL406", _short(error))


class _Started(Generic[T]):
    """A c10d work. c10d knows of a gloo message, unlike a collective, that it is done only when it is waited for."""

    def __init__(
        self,
        work: Any,
        finish: Callable[[], T],
        before_wait: Callable[[], None],
        failed: Callable[[RuntimeError], WireError],
    ) -> None:
        self._work, self._finish, self._before_wait, self._failed = work, finish, before_wait, failed
        self._value: list[T] = []
        self._error: WireError | None = None

    def poll(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> T:
        if self._work is not None:
            self._wait(self._work)
            self._value.append(self._finish())
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _wait(self, work: Any) -> None:
        self._work = None  # whatever comes: a work that is held keeps its group's sockets open
        try:
            self._before_wait()
            work.wait()
        except RuntimeError as error:
            self._error = self._failed(error)
            raise self._error from error


@contextmanager
def _joining() -> Iterator[None]:
    try:
        yield
    except PacelineError:
        raise
    except RuntimeError as error:
        raise WireError("PL411", f"the group could not be formed: {_short(error)}") from error


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, hostname: str, interface: str) -> Any:
    """Connects to everybody now: sockets that are opened later could not be cut, and gloo waits for them without end."""
    make: Any = ProcessGroupGloo
    options = make._Options()
    options._timeout = timeout
    if hostname or interface:
        options._devices = [make.create_device(hostname=hostname, interface=interface, lazy_init=False)]
    else:
        options._devices = [make.create_default_device(lazy_init=False)]
    return make(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # only builds with CUDA have it

    make: Any = ProcessGroupNCCL
    options = make.Options()
    options._timeout = timeout
    return make(store, rank, size, options)


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, as a type that every backend carries."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _short(error: BaseException) -> str:
    """The first sentence of a library's message, without the place in its source."""
    first = str(error).strip().split("\n")[0].split(". ")[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first)[:200] or type(error).__name__
