"""The wire of one host: every buffer lies in memory that all ranks have mapped, and each rank sums its own slice in place.

1. Ranks join: each opens the arena, finds its control page and writes its process id there.
2. ``allocate`` takes one copy of a region for every rank; ``cut`` lays buffers over it (``regions``).
3. ``start`` publishes this rank's copy and returns. Whoever polls or waits sums its slice once all are there (``sums``,
   ``kernel.c``): nothing is copied, no thread runs, and what is started inside backward costs next to nothing.
4. What is not a sum goes through lanes, matched by tag (``lanes``), or through rounds, matched by order (``rounds``).

Buffers may be started in any order on any rank: who waits for one serves all the others meanwhile. A wire belongs to one
thread.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from paceline.group import kernel as kernels
from paceline.group.arena import PAGE, Arena, Span
from paceline.group.bell import SLICE_S, Bell, KernelBell
from paceline.group.kernel import Kernel, WireStruct
from paceline.group.lanes import TABLE_NBYTES, Gather, Lanes, Receiving, Sending, bytes_of
from paceline.group.patience import CROWDED_NS, PID, QUICK_NS, Patience, Pending
from paceline.group.regions import Regions, ShmBuffer, ShmRegion
from paceline.group.rounds import Rounds
from paceline.group.shm_work import LaneWork, SumWork, TogetherWork
from paceline.group.sums import KernelSum, Layout, PureSum, Sum
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.terms.activity import Activity, Board, Phase
from paceline.terms.errors import StepError, WireError

T = TypeVar("T")
KernelChoice = Literal["auto", "pure", "c"]
_SIZE = 0  # word of a control page: number of ranks, once its owner has joined
_SLICE_NS = int(SLICE_S * 1e9)


class ShmWire:
    """The wire between the ranks of one host.

    Args:
        arena_fd: Descriptor of the arena (``arena.create``), the same file on all ranks, used by no wire before. It stays
            the caller's.
        rank, size: Position among the ranks that share the arena.
        board: Read while waiting: an abort ends every wait.
        activity: Where this rank says whom it waits for.
        kernel: ``c``: the C kernel, or WireError PL206. ``pure``: Python, on x86 only. ``auto``: C if it can be had, else
            Python, with a warning by rank 0. Ranks need not agree, and sums have the same bits.
        cache_dir: Where built kernels are kept (``kernel.load``).
        names: The page on the board of each rank of the wire, where they differ.
        evicted: Gives the ranks that are members no longer, in a run whose members change: nobody waits for them.

    Attributes:
        notice: Why ``auto`` does not use the C kernel, or empty.

    Raises:
        WireError: There is no room (PL405), this rank has joined the arena before or with another size (PL411), or the
            kernel asked for cannot be used here (PL206).
    """

    name = "shm"
    ordered = False

    def __init__(
        self,
        arena_fd: int,
        rank: int,
        size: int,
        board: Board,
        activity: Activity,
        *,
        kernel: KernelChoice = "auto",
        cache_dir: Path | None = None,
        names: Sequence[int] | None = None,
        evicted: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.rank, self.size = rank, size
        self._board, self._activity, self._evicted = board, activity, evicted
        self._closed = False
        self._pending: list[Pending] = []  # started, and advanced by Python
        self._kernel, self.notice = _choose(kernel, cache_dir, rank)
        self._arena = Arena(arena_fd, rank, size)
        try:
            control = _join(self._arena, rank, size)
            self._struct = WireStruct(
                control=control.address,
                control_stride=PAGE,
                quick_ns=QUICK_NS,
                crowded_ns=CROWDED_NS,
                rank=rank,
                size=size,
            )
            bell = _hang_bell(control, rank, size, self._kernel, self._struct)
            self._names = names = tuple(range(size)) if names is None else tuple(names)
            self._patience = Patience(control, bell, board, activity, names, evicted)
            self._rounds = Rounds(self._arena, control, bell, self._patience, names)
            self._lanes = Lanes(self._arena, self._arena.take_committed(size * TABLE_NBYTES), bell)
            self._regions = Regions(self._arena, rank, size, _engines(self._kernel, self._struct, bell))
        except BaseException:
            self._arena.close()
            raise

    def among(self, arena_fd: int, ranks: Sequence[int]) -> ShmWire:
        """A wire of some of its ranks, this one too. Of whom this one does not wait any more, that one does not either."""

        def evicted() -> list[int]:
            gone = self._evicted()
            return [place for place, rank in enumerate(ranks) if rank in gone]

        names = [self._names[rank] for rank in ranks]
        mine = ranks.index(self.rank)
        return ShmWire(arena_fd, mine, len(ranks), self._board, self._activity, names=names, evicted=evicted)

    # -- memory
    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> ShmRegion:
        """See ``Wire.allocate``. Raises WireError PL206 for a device other than the CPU."""
        self._check_open()
        _check_cpu(device)
        return self._regions.allocate(numel, dtype)

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> ShmRegion:
        """See ``Wire.allocate_shared``."""
        self._check_open()
        return self._regions.allocate_shared(numel, dtype)

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        """See ``Wire.cut``. Raises StepError PL410 while a buffer of the region is under way."""
        self._check_open()
        assert isinstance(region, ShmRegion)
        return list(self._regions.cut(region, numels, header_size))

    # -- requests
    def start(self, request: Request[T]) -> Work[T]:
        """See ``Wire.start``. Raises StepError PL410 for a buffer that is under way or was cut away."""
        self._check_open()
        self._forget_done()
        if isinstance(request, AllReduce):
            return cast(Work[T], self._start_sum(request))
        if isinstance(request, Together):
            return cast(Work[T], TogetherWork([self.start(each) for each in request.requests]))
        message = self._message(request)
        self._pending.append(message)
        return LaneWork(message, self._wait)

    def _start_sum(self, request: AllReduce) -> SumWork:
        buffer = request.buffer
        assert isinstance(buffer, ShmBuffer)
        if buffer.sum is None:
            raise StepError("PL410", f"buffer {buffer.key} was started after its region had been cut anew")
        if request.divisor is not None and not buffer.tensor.is_floating_point():
            raise WireError("PL206", f"a weighted mean needs floating-point numbers, not {buffer.tensor.dtype}")
        buffer.sum.start(request.header, request.divisor)
        if not isinstance(buffer.sum, KernelSum):
            self._pending.append(buffer.sum)
        return SumWork(buffer.sum, self._wait)

    def _message(self, request: Request[T]) -> Gather | Sending | Receiving:
        if isinstance(request, AllGather):
            _check_cpu(request.tensor.device)
            return Gather(self._lanes, request.tensor, request.tag)
        if isinstance(request, Send):
            _check_cpu(request.tensor.device)
            return Sending(self._lanes, request.to, request.tensor, request.tag)
        if isinstance(request, Receive):
            _check_cpu(request.into.device)
            return Receiving(self._lanes, request.source, request.into, request.tag)
        raise WireError("PL206", f"shared memory knows no request of the kind {type(request).__name__}")

    def _wait(self, pending: Pending) -> None:
        """Block until `pending` is done, and advance everything else meanwhile."""
        self._check_open()
        if self._pending or not isinstance(pending, KernelSum):
            self._patience.wait(pending, self._others(pending))
        else:
            self._wait_in_kernel(pending)

    def _wait_in_kernel(self, pending: KernelSum) -> None:
        """The short way: the kernel itself serves what else is under way."""
        assert self._kernel is not None
        wait, wire = self._kernel.wait, ctypes.addressof(self._struct)
        if wait(wire, pending.address, _SLICE_NS):
            return
        try:
            self._patience.look(pending)
            while not wait(wire, pending.address, _SLICE_NS):
                self._patience.look(pending)
        finally:
            self._activity.waits_for(0)

    def _forget_done(self) -> None:
        if self._pending:
            self._pending = [each for each in self._pending if not each.advance()]

    def _others(self, but: Pending | None = None) -> list[Pending]:
        """What is under way besides `but`."""
        self._forget_done()
        others = [each for each in self._pending if each is not but]
        if self._kernel is not None and self._struct.first:
            others.append(_InKernel(self._kernel, ctypes.addressof(self._struct)))
        return others

    # -- calls that all ranks make together
    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See ``Wire.broadcast``. Shape and dtype are part of its tag."""
        _check_cpu(tensor.device)
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be overwritten by a broadcast")
        tag = f"broadcast of {tensor.dtype} {tuple(tensor.shape)} from rank {root}"
        with self._together(tag):
            self._rounds.broadcast(tag, bytes_of(tensor), root, self._others())

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        """See ``Wire.gather_bytes``."""
        with self._together(tag):
            return self._rounds.gather(tag, memoryview(payload), self._others())

    def barrier(self, tag: str) -> None:
        """See ``Wire.barrier``."""
        tag = f"barrier {tag}"
        with self._together(tag):
            self._rounds.gather(tag, memoryview(b""), self._others())

    @contextmanager
    def _together(self, tag: str) -> Iterator[None]:
        """Say on the board that this rank is in the next operation."""
        self._check_open()
        self._activity.operation(self._rounds.operation + 1)
        with self._activity.during(Phase.WAIT, tag):
            yield

    def close(self) -> None:
        """See ``Wire.close``. Peers that still need this rank are told (PL403). Tensors made by the wire stay valid."""
        if not self._closed:
            self._closed = True
            self._patience.leave()
            self._pending.clear()
            self._regions.clear()
            self._arena.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StepError("PL410", "the wire was used after it had been closed")


class _InKernel:
    """Everything that the kernel has under way, as one thing to advance."""

    def __init__(self, kernel: Kernel, wire: int) -> None:
        self._serve, self._wire = kernel.serve, wire

    def advance(self) -> bool:
        return not self._serve(self._wire)

    def missing(self) -> int:
        return 0


def _choose(choice: KernelChoice, cache_dir: Path | None, rank: int) -> tuple[Kernel | None, str]:
    """The kernel or None, and why it is None though it was wanted."""
    if choice == "pure":
        return None, ""
    try:
        return kernels.load(cache_dir), ""
    except WireError as error:
        if choice == "c":
            raise
        notice = f"shared memory works without its C kernel, which is slower: {error.message}"
    if rank == 0:
        warnings.warn(notice, RuntimeWarning, stacklevel=3)
    return None, notice


def _join(arena: Arena, rank: int, size: int) -> Span:
    """The control pages, with this rank's own filled in."""
    control = arena.take_committed(size * PAGE)
    own = rank * PAGE // 8
    sizes = {control.words[r * PAGE // 8 + _SIZE] for r in range(size)} - {0, size}
    if control.words[own + _SIZE] or sizes:
        raise WireError(
            "PL411",
            f"rank {rank} of {size} cannot join this arena: "
            + (f"others joined as one of {min(sizes)}" if sizes else "it has joined before"),
        )
    control.words[own + PID] = os.getpid()
    control.words[own + _SIZE] = size
    return control


def _hang_bell(control: Span, rank: int, size: int, kernel: Kernel | None, struct: WireStruct) -> Bell:
    return Bell(control, rank, size) if kernel is None else KernelBell(control, rank, size, kernel, struct)


def _engines(kernel: Kernel | None, struct: WireStruct, bell: Bell) -> Callable[[Layout], Sum]:
    """What makes the state of a buffer's all-reduce: in C where that can add its numbers."""

    def engine(layout: Layout) -> Sum:
        if kernel is not None and KernelSum.takes(layout.dtype):
            return KernelSum(layout, kernel, struct)
        return PureSum(layout, bell)

    return engine


def _check_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise WireError("PL206", f"shared memory holds tensors of the CPU, not of {device}")
