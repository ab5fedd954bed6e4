"""Regions of the arena and the buffers that they are cut into.

A region has one copy for every rank, in the order of ranks, each beginning with a page; each rank commits its own. A buffer
is a stretch of all copies, with a sheet: the words and headers of all ranks. Cutting anew makes new sheets, because a peer
may still look at the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from paceline.group.arena import PAGE, Arena, Span, round_up
from paceline.group.sums import Layout, Sum, sheet_nbytes, slices, tensor_over
from paceline.group.wire import Buffer, Region
from paceline.terms.errors import StepError


@dataclass(eq=False)
class ShmBuffer(Buffer):
    """A buffer in shared memory.

    Attributes:
        sum: The state of its all-reduce on this rank; None once its region has been cut anew.
    """

    sum: Sum | None


@dataclass(eq=False)
class ShmRegion(Region):
    """A region in shared memory: rank r's copy begins at byte ``r * stride`` of the span."""

    span: Span
    stride: int
    buffers: list[ShmBuffer] = field(default_factory=list)


class Regions:
    """What this rank has of the arena for payloads.

    Args:
        engine: Makes the state of a buffer's all-reduce.
    """

    def __init__(self, arena: Arena, rank: int, size: int, engine: Callable[[Layout], Sum]) -> None:
        self._arena, self._rank, self._size, self._engine = arena, rank, size, engine
        self._regions: list[ShmRegion] = []  # kept: the kernel holds addresses of buffers under way
        self._num_buffers = 0

    def allocate(self, numel: int, dtype: torch.dtype) -> ShmRegion:
        """One copy for every rank."""
        stride = round_up(max(numel * dtype.itemsize, 1), PAGE)
        span = self._arena.take(self._size * stride)
        start = self._rank * stride
        self._arena.commit(span.offset + start, stride)
        region = ShmRegion(tensor_over(span, start, numel, dtype), span, stride)
        self._regions.append(region)
        return region

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> ShmRegion:
        """One copy for all ranks."""
        span = self._arena.take_committed(max(numel * dtype.itemsize, 1))
        return ShmRegion(tensor_over(span, 0, numel, dtype), span, 0)

    def cut(self, region: ShmRegion, numels: Sequence[int], header_size: Sequence[int]) -> list[ShmBuffer]:
        """See ``Wire.cut``. Raises StepError PL410 while a buffer of the region is under way."""
        if region.stride == 0:
            raise ValueError("a shared region has one copy and cannot be cut into buffers")
        if sum(numels) > region.tensor.numel():
            raise ValueError(f"buffers of {sum(numels)} elements do not fit into {region.tensor.numel()}")
        if any(buffer.sum is not None and not buffer.sum.advance() for buffer in region.buffers):
            raise StepError("PL410", "a region was cut anew while one of its buffers was under way")
        for buffer in region.buffers:
            buffer.sum = None
        region.buffers, first = [], 0
        for numel, headers in zip(numels, header_size, strict=True):
            region.buffers.append(self._lay(region, first, numel, headers))
            first += numel
        return region.buffers

    def clear(self) -> None:
        """Forget all regions. Memory lives as long as somebody's tensor uses it."""
        self._regions.clear()

    def _lay(self, region: ShmRegion, first: int, numel: int, header_size: int) -> ShmBuffer:
        """A buffer of `numel` elements, from element `first` of a region on."""
        dtype = region.tensor.dtype
        start = first * dtype.itemsize
        low, high = slices(start, numel, dtype.itemsize, self._size)[self._rank]
        layout = Layout(
            rank=self._rank,
            size=self._size,
            dtype=dtype,
            numel=numel,
            header_size=header_size,
            payload=region.span,
            start=start,
            stride=region.stride,
            low=low,
            high=high,
            sheet=self._arena.take_committed(self._size * sheet_nbytes(header_size)),
        )
        self._num_buffers += 1
        tensor = region.tensor[first : first + numel]
        return ShmBuffer(tensor, header_size, self._num_buffers - 1, self._engine(layout))
