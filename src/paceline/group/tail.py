"""A payload and its header as one message: the header lies in the elements right behind the payload.

For wires that sum what they send. Only types that add small whole numbers exactly can hold a header: float64, and
float32 up to 2^24. Beyond that a sum of weights is rounded to 24 bits, as precise as the gradients that it divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.group.wire import Buffer, Region

_ALIGN = 16  # elements: a payload begins on a cache line


@dataclass(eq=False)
class TailBuffer(Buffer):
    """A buffer whose memory goes on behind the payload.

    Attributes:
        flat: The whole message: the payload and ``header_size`` further elements.
        behind: These elements.
    """

    flat: Tensor
    behind: Tensor


def holds_header(dtype: torch.dtype) -> bool:
    """Whether header numbers survive being summed in this type."""
    return dtype in (torch.float32, torch.float64)


def cut(region: Region, numels: Sequence[int], header_size: Sequence[int], first_key: int) -> list[Buffer]:
    """Cut `region` into consecutive buffers, with room for a header behind each where the type can hold one.

    The room is not known when the region is allocated: the region's tensor is replaced by a longer one when it must be.
    """
    extras = _extras(region.tensor.dtype, header_size)
    spans = _spans(numels, extras)
    if sum(spans) > region.tensor.numel():
        region.tensor = region.tensor.new_zeros(sum(spans))
    buffers: list[Buffer] = []
    at = 0
    for i, (numel, extra, span) in enumerate(zip(numels, extras, spans, strict=True)):
        payload, flat = region.tensor[at : at + numel], region.tensor[at : at + numel + extra]
        if extra:
            buffers.append(TailBuffer(payload, header_size[i], first_key + i, flat, flat[numel:]))
        else:
            buffers.append(Buffer(payload, header_size[i], first_key + i))
        at += span
    return buffers


def put_header(buffer: TailBuffer, header: Sequence[float]) -> Tensor:
    """Write `header` behind the payload; the whole message is returned."""
    buffer.behind.copy_(torch.tensor(header, dtype=buffer.flat.dtype))
    return buffer.flat


def take_header(buffer: TailBuffer) -> list[float]:
    """The numbers behind the payload."""
    numbers: list[float] = buffer.behind.tolist()
    return numbers


def scale(payload: Tensor, sums: Sequence[float], divisor: float | None) -> None:
    """Turn a sum of weighted payloads into their mean (see :class:`~paceline.group.wire.AllReduce`)."""
    if divisor is not None and sums[0] not in (0.0, divisor):
        payload.mul_(divisor / sums[0])


def room(dtype: torch.dtype, numels: Sequence[int], header_size: Sequence[int]) -> int:
    """Elements that a region needs so that :func:`cut` does not replace its tensor."""
    return sum(_spans(numels, _extras(dtype, header_size)))


def _extras(dtype: torch.dtype, header_size: Sequence[int]) -> list[int]:
    return [size if holds_header(dtype) else 0 for size in header_size]


def _spans(numels: Sequence[int], extras: Sequence[int]) -> list[int]:
    return [-(-(numel + extra) // _ALIGN) * _ALIGN for numel, extra in zip(numels, extras, strict=True)]
