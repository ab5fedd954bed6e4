"""One buffer's all-reduce in shared memory: the state of it on this rank, in C or in Python.

Both engines follow one protocol (kernel.c tells it) on one layout, so they can face each other, and both give
``((B0 + B1) + B2) + ...`` in the order of ranks, then times ``divisor / sum of weights``: the same bits on all ranks, with
either engine.

bfloat16, float16: summed in float32 in rank order, scaled there, rounded once at the end.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.group.arena import LINE, Span, round_up
from paceline.group.bell import Bell
from paceline.group.kernel import BufferStruct, Kernel, WireStruct
from paceline.terms.errors import StepError

_READY, _DONE, _BAD, _HEADER = 0, 1, 2, 8  # words of a sheet
_CHUNK = 1 << 16  # elements that Python sums at a time: they stay in the second cache
_IN_C = (torch.float32, torch.float64)
_IDLE, _STARTED, _SUMMED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Layout:
    """Where one buffer lies, for all ranks. Offsets and strides in bytes.

    Attributes:
        payload: Span of the region; rank r's copy of the buffer begins at ``start + r * stride``.
        low, high: This rank's slice, in elements.
        sheet: Rank r's words and its header begin at ``r * sheet_stride``.
    """

    rank: int
    size: int
    dtype: torch.dtype
    numel: int
    header_size: int
    payload: Span
    start: int
    stride: int
    low: int
    high: int
    sheet: Span

    @property
    def sheet_stride(self) -> int:
        return sheet_nbytes(self.header_size)

    def copy(self, rank: int) -> Tensor:
        """Rank `rank`'s payload."""
        return tensor_over(self.payload, self.start + rank * self.stride, self.numel, self.dtype)


def sheet_nbytes(header_size: int) -> int:
    """Bytes of one rank's sheet: three words in a cache line of their own, and a header."""
    return round_up(8 * (_HEADER + header_size), LINE)


def slices(start: int, numel: int, itemsize: int, size: int) -> list[tuple[int, int]]:
    """Each rank's share of a buffer that begins `start` bytes into a page, in elements; borders on cache lines.

    Every element is in exactly one slice. Slices may be empty where there are fewer lines than ranks.
    """
    line = max(1, LINE // itemsize)
    shift = start // itemsize % line
    borders = [max(0, (shift + numel * r // size) // line * line - shift) for r in range(size)] + [numel]
    return list(itertools.pairwise(borders))


def tensor_over(span: Span, start: int, numel: int, dtype: torch.dtype) -> Tensor:
    """`numel` elements of shared memory as a tensor, which keeps the mapping alive."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(span.memory, dtype=dtype, count=numel, offset=start)


class Sum(ABC):
    """What both engines have in common: the header's way in, and whose turn it is."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._pack = struct.Struct(f"{layout.header_size}d").pack_into
        self._own_header = 8 * _HEADER + layout.rank * layout.sheet_stride

    def put_header(self, header: Sequence[float]) -> None:
        if len(header) != self.layout.header_size:
            raise ValueError(f"this buffer's header has {self.layout.header_size} numbers, {len(header)} were given")
        self._pack(self.layout.sheet.memory, self._own_header, *header)

    @abstractmethod
    def start(self, header: Sequence[float], divisor: float | None) -> None:
        """Publish this rank's payload. Does not wait."""

    @abstractmethod
    def advance(self) -> bool:
        """Do what can be done without waiting; True when the buffer holds the result."""

    @abstractmethod
    def missing(self) -> int:
        """Bit mask of the ranks that are waited for."""

    @abstractmethod
    def result(self) -> tuple[list[float], bool]:
        """The header's sums, and whether the payload has a value that is not finite."""


def under_way(layout: Layout) -> StepError:
    return StepError(
        "PL410", f"the exchange of a buffer of {layout.numel} elements was started again before it was done"
    )


class KernelSum(Sum):
    """The engine in C, for float32 and float64."""

    def __init__(self, layout: Layout, kernel: Kernel, wire: WireStruct) -> None:
        super().__init__(layout)
        self._wire_struct = wire  # kept: the kernel holds its address
        self._wire = ctypes.addressof(wire)
        self._start, self._poll, self._missing = kernel.start, kernel.poll, kernel.missing
        self._sums = (ctypes.c_double * layout.header_size)()
        self._struct = BufferStruct(
            payload=layout.payload.address + layout.start,
            sheet=layout.sheet.address,
            sums=ctypes.addressof(self._sums),
            payload_stride=layout.stride,
            sheet_stride=layout.sheet_stride,
            low=layout.low,
            high=layout.high,
            header_size=layout.header_size,
            doubles=layout.dtype == torch.float64,
        )
        self.address = ctypes.addressof(self._struct)

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether the kernel can add elements of this type."""
        return dtype in _IN_C

    def start(self, header: Sequence[float], divisor: float | None) -> None:
        if self._struct.stage != _IDLE:
            raise under_way(self.layout)
        self.put_header(header)
        self._start(self._wire, self.address, divisor or 0.0, divisor is not None)

    def advance(self) -> bool:
        return self._struct.stage == _IDLE or self._poll(self._wire, self.address) != 0

    def missing(self) -> int:
        return self._missing(self._wire, self.address)

    def result(self) -> tuple[list[float], bool]:
        return self._sums[:], self._struct.nonfinite != 0


class PureSum(Sum):
    """The engine in Python and torch, for every dtype."""

    def __init__(self, layout: Layout, bell: Bell) -> None:
        super().__init__(layout)
        self._bell = bell
        self._count, self._stage = 0, _IDLE
        self._divisor: float | None = None
        self._sums: list[float] = []
        self._nonfinite = False
        self._copies = [layout.copy(r) for r in range(layout.size)]
        half = layout.dtype in (torch.bfloat16, torch.float16)
        self._sum = torch.empty(min(_CHUNK, layout.numel), dtype=torch.float32 if half else layout.dtype)
        self._zeros = torch.zeros_like(self._sum)

    def start(self, header: Sequence[float], divisor: float | None) -> None:
        if self._stage != _IDLE:
            raise under_way(self.layout)
        self.put_header(header)
        self._count, self._divisor, self._stage = self._count + 1, divisor, _STARTED
        self._publish(_READY)

    def advance(self) -> bool:
        if self._stage == _STARTED:
            if not self._all(_READY):
                return False
            self._sums = self._sum_headers()
            bad = self._combine()
            self.layout.sheet.words[self._word(self.layout.rank, _BAD)] = bad
            self._stage = _SUMMED
            self._publish(_DONE)
        if self._stage == _SUMMED:
            if not self._all(_DONE):
                return False
            words = self.layout.sheet.words
            self._nonfinite = any(words[self._word(r, _BAD)] for r in range(self.layout.size))
            self._stage = _IDLE
        return True

    def missing(self) -> int:
        word = _READY if self._stage == _STARTED else _DONE
        return sum(1 << r for r in range(self.layout.size) if self._stage != _IDLE and not self._reached(r, word))

    def result(self) -> tuple[list[float], bool]:
        return self._sums, self._nonfinite

    def _word(self, rank: int, word: int) -> int:
        return rank * self.layout.sheet_stride // 8 + word

    def _publish(self, word: int) -> None:
        self._bell.publish(self.layout.sheet, self._word(self.layout.rank, word), self._count)

    def _reached(self, rank: int, word: int) -> bool:
        return self._bell.load(self.layout.sheet, self._word(rank, word)) >= self._count

    def _all(self, word: int) -> bool:
        return all(self._reached(r, word) for r in range(self.layout.size))

    def _sum_headers(self) -> list[float]:
        size = self.layout.header_size
        starts = (8 * _HEADER + r * self.layout.sheet_stride for r in range(self.layout.size))
        headers = (struct.unpack_from(f"{size}d", self.layout.sheet.memory, start) for start in starts)
        sums = list(next(headers))
        for header in headers:  # one by one, in rank order: `sum` of newer Pythons rounds differently
            for i, number in enumerate(header):
                sums[i] += number
        return sums

    def _scale(self) -> float:
        if self._divisor is None or self._sums[0] == 0.0:
            return 1.0
        return self._divisor / self._sums[0]

    def _combine(self) -> bool:
        """This rank's slice of every copy = copy 0 + copy 1 + ..., times the scale. True: a value is not finite."""
        scale, bad = self._scale(), False
        for at in range(self.layout.low, self.layout.high, _CHUNK):
            parts = [copy[at : min(at + _CHUNK, self.layout.high)] for copy in self._copies]
            total = _add(parts, self._sum[: parts[0].numel()])
            if scale != 1.0:
                total *= scale
            if total.is_floating_point():  # 0 * x is 0, or NaN where x is not finite: one pass, no temporary
                bad |= not math.isfinite(torch.dot(total, self._zeros[: total.numel()]).item())
            for part in parts:
                part.copy_(total)
        return bad


def _add(parts: list[Tensor], total: Tensor) -> Tensor:
    """`total` = the sum of parts in this order, in the dtype of `total`."""
    if len(parts) > 1 and parts[0].dtype == total.dtype:
        torch.add(parts[0], parts[1], out=total)
        rest = parts[2:]
    else:
        total.copy_(parts[0])
        rest = parts[1:]
    for part in rest:
        total += part
    return total
