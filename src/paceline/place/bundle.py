"""A model's parameters, or its buffers, as flat buckets of a wire: what is exchanged when ranks step on their own.

The tensors stay where they are; a bucket is filled from them when a round ends, and written back when the round is committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.group.wire import Buffer, Wire
from paceline.terms.bucket import Bucket, Slot

BUCKET = 8 << 20
_ALIGN = 16

Named = tuple[str, Tensor]


@dataclass(eq=False)
class Packed:
    """A bucket with its memory.

    Attributes:
        tensors: What it is filled from; ``views`` are their places in the buffer.
        part: Which fragment it belongs to.
    """

    bucket: Bucket
    buffer: Buffer
    tensors: list[Tensor]
    views: list[Tensor]
    part: int

    def fill(self) -> None:
        """Copy the tensors into the bucket."""
        for view, tensor in zip(self.views, self.tensors, strict=True):
            view.copy_(tensor)

    def write(self, blend: float = 0.0) -> None:
        """``tensor <- blend tensor + (1 - blend) bucket``."""
        for view, tensor in zip(self.views, self.tensors, strict=True):
            if blend:
                tensor.mul_(blend).add_(view, alpha=1.0 - blend)
            else:
                tensor.copy_(view)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Parts of a tensor that is laid out as the bucket is, by name."""
        return {s.name: flat[s.offset : s.offset + s.numel].view(s.shape) for s in self.bucket.slots}


def fragments_of(names: Sequence[str], count: int) -> dict[str, int]:
    """Which of `count` fragments each tensor belongs to: modules in turn, so that every fragment has some of all depths."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    number = {module: i % count for i, module in enumerate(modules)}
    return {name: number[name.rpartition(".")[0]] for name in names}


def pack(
    named: Sequence[Named], wire: Wire, *, bucket_bytes: int = BUCKET, fragments: int = 1, part: int = 0
) -> list[Packed]:
    """Cut tensors into buckets by fragment, type and device, in the order given; the same on all ranks.

    Args:
        fragments: Into how many parts, numbered from `part` on.
    """
    where = fragments_of([name for name, _ in named], fragments)
    found: list[Packed] = []
    for number in range(fragments):
        mine = [pair for pair in named if where[pair[0]] == number]
        for dtype, device in dict.fromkeys((t.dtype, t.device) for _, t in mine):
            groups = list(_groups([p for p in mine if (p[1].dtype, p[1].device) == (dtype, device)], bucket_bytes))
            numels = [_padded(sum(t.numel() for _, t in group)) for group in groups]
            buffers = wire.cut(wire.allocate(sum(numels), dtype, device), numels, [1] * len(groups))
            found += [
                _packed(len(found) + i, group, buffer, part + number)
                for i, (group, buffer) in enumerate(zip(groups, buffers, strict=True))
            ]
    return found


def _packed(index: int, group: Sequence[Named], buffer: Buffer, part: int) -> Packed:
    slots, at = [], 0
    for name, tensor in group:
        slots.append(Slot(name, at, tensor.numel(), tuple(tensor.shape)))
        at += tensor.numel()
    views = [buffer.tensor[s.offset : s.offset + s.numel].view(s.shape) for s in slots]
    buffer.tensor[at:].zero_()
    bucket = Bucket(index, tuple(slots), buffer.tensor.numel(), buffer.tensor.dtype)
    return Packed(bucket, buffer, [tensor.detach() for _, tensor in group], views, part)


def _groups(named: Sequence[Named], bound: int) -> Iterator[list[Named]]:
    group: list[Named] = []
    used = 0
    for name, tensor in named:
        if group and used + tensor.nbytes > bound:
            yield group
            group, used = [], 0
        group.append((name, tensor))
        used += tensor.nbytes
    yield group


def _padded(numel: int) -> int:
    return -(-max(1, numel) // _ALIGN) * _ALIGN


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' bytes in one row."""
    return torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])


def from_bytes(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write what :func:`as_bytes` gave."""
    at = 0
    for t in tensors:
        raw = row[at : at + t.nbytes].clone()  # a row may begin anywhere; a type's elements may not
        t.copy_(raw.view(t.dtype).view(t.shape))
        at += t.nbytes
