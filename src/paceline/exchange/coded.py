"""The weighted mean of a bucket over all ranks when what travels is encoded.

1. A rank cuts its payload into one slice per rank, encodes each by itself, and gives slice `r` to rank `r`, its header in front.
2. Rank `r` decodes the codes of its slice, its own too, sums them in rank order in at least float32, and encodes the mean.
3. It gives that code to all. Every rank decodes the same codes, so all hold the same bits.

Each rank sends ``2 (n-1)/n`` codes of its payload, as a ring all-reduce would, and an element is rounded twice whatever `n` is; a
sum in the codec's own type would be rounded at each of its `n - 1` additions, could overflow, and is slower than float32 on
common transports (gloo adds float16 element by element). This is the two-sided scheme of 1-bit Adam (arXiv 2102.02888) without
its error memory. Only sends and receives that carry a tag are awaited, so buckets may overtake each other on any wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from paceline.exchange.codec import Codec
from paceline.exchange.link import Message
from paceline.group.tail import scale
from paceline.group.wire import Receive, Send, Together


async def coded_mean(message: Message, codec: Codec) -> list[float]:
    """Exchange the payload of `message` through `codec`, in place; return the headers summed over ranks."""
    payload, rank, size, tag = message.payload, message.rank, message.size, message.buffer.key
    slices = _slices(payload, size)
    header = torch.tensor(message.header, dtype=torch.float64, device=payload.device).view(torch.uint8)

    outgoing = [_packed(codec, part, header) for part in slices]
    incoming = [torch.empty_like(outgoing[rank]) for _ in range(size)]
    await _swap(outgoing, incoming, rank, tag)

    front = header.numel()
    headers = [parcel[:front].view(torch.float64).tolist() for parcel in incoming]
    sums: list[float] = [reduce(add, column) for column in zip(*headers, strict=True)]
    mean = _sum(codec, [parcel[front:] for parcel in incoming], slices[rank])
    scale(mean, sums, message.divisor)

    code = _packed(codec, mean, header[:0])
    codes = [payload.new_empty(codec.nbytes(part.numel()), dtype=torch.uint8) for part in slices]
    await _swap([code] * size, codes, rank, tag)
    for part, code in zip(slices, codes, strict=True):
        if part.numel():
            codec.decode(code, part)
    return sums


def _slices(payload: Tensor, size: int) -> list[Tensor]:
    """Cut into `size` consecutive slices of equal length, the last ones shorter or empty."""
    length = -(-payload.numel() // size)
    return [payload[r * length : (r + 1) * length] for r in range(size)]


def _packed(codec: Codec, part: Tensor, header: Tensor) -> Tensor:
    """The header's bytes and the code of `part`, in one piece."""
    parcel = header.new_empty(header.numel() + codec.nbytes(part.numel()))
    parcel[: header.numel()] = header
    if part.numel():
        codec.encode(part, parcel[header.numel() :])
    return parcel


def _sum(codec: Codec, codes: Sequence[Tensor], like: Tensor) -> Tensor:
    """The decoded codes added in the order given, in at least float32."""
    total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    part = torch.empty_like(total)
    for code in codes if like.numel() else ():
        codec.decode(code, part)
        total += part
    return total


async def _swap(outgoing: Sequence[Tensor], incoming: list[Tensor], rank: int, tag: int) -> None:
    """Give ``outgoing[r]`` to every rank `r`, fill ``incoming[r]`` from it. What is empty, or for oneself, is not sent."""
    incoming[rank] = outgoing[rank]
    size = len(outgoing)
    others = [(rank + step) % size for step in range(1, size)]  # in turn, so that not all begin with rank 0
    receives = tuple(Receive(r, incoming[r], tag) for r in others if incoming[r].numel())
    sends = tuple(Send(r, outgoing[r], tag) for r in others if outgoing[r].numel())
    await Together(receives + sends)
