"""The wire over c10d: gloo for CPU buffers, NCCL for CUDA buffers. It works wherever torch does, on one host or many.

Collectives are c10d's own; what is added is the header in the payload's message (``tail``), the roll call in small
exchanges (``roll``), and an end to waiting when a peer is lost or the launcher says so (``torch_work``, ``torch_sockets``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store

from paceline.group import roll, tail
from paceline.group.torch_sockets import Connections
from paceline.group.torch_work import CollectiveWork, Errands, Guard, MessageWork, keep_for_good, settled, short
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.group.works import All, Done, Then
from paceline.terms.activity import Activity, Board, Phase
from paceline.terms.errors import Aborted, PacelineError, WireError

T = TypeVar("T")
CPU = torch.device("cpu")
_FAREWELL_S = 0.5  # what is cut ends within milliseconds, or is stuck


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
        names: The rank on the board of each rank of the wire, where they differ.

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
        names: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._activity = activity
        self._operation = self._keys = 0
        self._connections, self._errands = Connections(), Errands()
        self._open: list[Any] = []  # c10d's collectives that may be under way
        self._names = tuple(range(size)) if names is None else tuple(names)
        self._guard = Guard(board, activity, self._connections, self._names, self._cut)
        self._store: Store | None = store  # c10d holds only the C++ half of a store that is written in Python
        self._groups: dict[str, Any] = {}  # by device type; c10d's stubs do not know a backend's collectives
        with _joining(), self._connections.recorded():
            gloo_store = PrefixStore(f"{prefix}/gloo", store)
            self._groups["cpu"] = _gloo(gloo_store, rank, size, timeout, hostname, interface)
        try:
            if device.type == "cuda" and torch.cuda.is_available():
                with _joining():
                    self._groups["cuda"] = _nccl(PrefixStore(f"{prefix}/nccl", store), rank, size, timeout)
            self._connections.name(rank, self.gather_bytes(f"join {prefix}", self._connections.digests()))
        except BaseException:
            self.close()
            raise

    # -- memory
    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        try:
            return Region(torch.zeros(numel, dtype=dtype, device=device))
        except RuntimeError as error:
            raise WireError("PL405", f"no memory for {numel} elements of {dtype}: {short(error)}") from error

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
                return self._message(tensor, to, lambda group: group.send([tensor], to, tag), lambda: None)
            case Receive(source=source, into=into, tag=tag):
                return self._message(into, source, lambda group: group.recv([into], source, tag), lambda: into)
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

    def _begin(self, tensor: Tensor, call: Callable[[Any], Any], finish: Callable[[], T]) -> Work[T]:
        """Start a collective on the group of the tensor's device; its result is that of `finish`."""
        work = self._call(tensor, call)
        self._open = [other for other in self._open if not other.is_completed()] + [work]
        return CollectiveWork(work, finish, self._guard, range(self.size), tensor.is_cuda)

    def _message(self, tensor: Tensor, peer: int, call: Callable[[Any], Any], finish: Callable[[], T]) -> Work[T]:
        work = self._call(tensor, call)
        if tensor.is_cuda:  # NCCL knows when a message is done
            return CollectiveWork(work, finish, self._guard, (peer,), on_cuda=True)
        return MessageWork(work, finish, self._guard, peer, self._errands)

    def _call(self, tensor: Tensor, call: Callable[[Any], Any]) -> Any:
        self._guard.check()
        try:
            return call(self._groups[tensor.device.type])
        except RuntimeError as error:
            raise self._guard.failed(error) from error.with_traceback(None)

    # -- blocking calls
    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be overwritten by a broadcast")
        options = BroadcastOptions()
        options.rootRank = root
        self._count()
        if tensor.numel():
            raw = _bytes(tensor)
            what = f"broadcast of {tensor.dtype} {tuple(tensor.shape)} from rank {self._names[root]}"
            self._block(what, self._begin(raw, lambda group: group.broadcast([raw], options), lambda: None))

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        self._count()
        frames = [roll.unpack(raw) for raw in self._gather_equal(tag, roll.pack(self._operation, tag, payload))]
        roll.check(frames, self._names)
        if all(frame.complete for frame in frames):
            return [frame.inline for frame in frames]
        longest = max(frame.nbytes for frame in frames)
        rows = self._gather_equal(tag, payload.ljust(longest, b"\0"))
        return [row[: frame.nbytes] for row, frame in zip(rows, frames, strict=True)]

    def barrier(self, tag: str) -> None:
        self.gather_bytes(f"barrier {tag}", b"")

    def _count(self) -> None:
        """One more call that all ranks make."""
        self._operation += 1
        self._activity.operation(self._operation)

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
        self._guard.fail(Aborted("PL404", "the exchange was aborted"))

    def close(self) -> None:
        if not self._groups:
            return
        self._guard.failure = Aborted("PL404", "the wire is closed")
        self._cut()
        deadline = time.monotonic() + _FAREWELL_S
        self._errands.close(deadline)
        groups, self._groups = self._groups, {}
        if not all(settled(work, deadline) for work in self._open):
            keep_for_good(groups["cpu"])
        self._open.clear()
        self._store = None

    def _cut(self) -> None:
        self._connections.cut()
        nccl = self._groups.get("cuda")
        if nccl is not None:
            nccl.abort()


@contextmanager
def _joining() -> Iterator[None]:
    try:
        yield
    except PacelineError:
        raise
    except RuntimeError as error:
        full = any(word in str(error) for word in ("Too many open files", "socket", "Cannot assign", "in use"))
        raise WireError("PL407" if full else "PL411", f"the group could not be formed: {short(error)}") from error


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
