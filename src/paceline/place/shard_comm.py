"""What a unit's shards and gradients travel through: torch's own collectives, or memory that all ranks of the host have mapped.

The sum over ranks is of ``factor * gradient``, with each rank's own factor, and nothing is divided afterwards.

[Note: places in turn] Shards are gathered where all ranks can read them. A place is written to anew only when every rank has
copied what it needs out of it: when a rank enters gather k, it has copied out of all gathers before k - 1, because at most one
other is under way (the next unit's, asked for ahead of time). Whoever has passed the barrier of gather k - 1 knows that all ranks
have entered it, so the place of gather k - 3 is free; four places are one more than needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from paceline.group.wire import Wire

PLACES = 4

_reduce_scatter: Any = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # renamed in torch 2.13


class Gather(Protocol):
    """Collects shards: torch's protocol of ``FSDPModule.set_custom_all_gather``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for all shards, those of one rank after those of another."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Fill `output_tensor` with every rank's `input_tensor`."""


class Reduce(Protocol):
    """Sums gradients: torch's protocol of ``FSDPModule.set_custom_reduce_scatter``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the gradients of all shards, and then for the sum of this rank's."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any = None, async_op: bool = False
    ) -> Any:
        """Fill `output_tensor` with the sum over ranks of this rank's part of `input_tensor`."""


class Comm(Protocol):
    """How the ranks of a mesh talk about one model."""

    def gather(self, name: str) -> Gather | None:
        """For one unit; None: torch's own."""

    def reduce(self, name: str, factor: Callable[[], float]) -> Reduce:
        """For one unit. `factor` is this rank's in the backward that runs."""

    def count(self, numbers: Tensor) -> Tensor:
        """Sum of a short row of float32 numbers over ranks."""

    def reserve(self, nbytes: int) -> None:
        """Be told the bytes of the largest unit, once, by all ranks."""


def weigh(payload: Tensor, factor: float) -> None:
    """``payload *= factor``; zero wins over NaN, because a rank without rows may hold anything."""
    if factor == 0.0:
        payload.zero_()
    elif factor != 1.0:
        payload.mul_(factor)


class TorchComm:
    """Torch's collectives on the process group of a mesh."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def gather(self, name: str) -> None:
        """Torch's own."""
        return None

    def reduce(self, name: str, factor: Callable[[], float]) -> Reduce:
        """See :class:`Comm`."""
        return _TorchReduce(factor)

    def count(self, numbers: Tensor) -> Tensor:
        """See :class:`Comm`."""
        dist.all_reduce(numbers, group=self._group)
        return numbers

    def reserve(self, nbytes: int) -> None:
        """Torch allocates for each collective."""


class _TorchReduce:
    def __init__(self, factor: Callable[[], float]) -> None:
        self._factor = factor

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any = None, async_op: bool = False
    ) -> Any:
        weigh(input_tensor, self._factor())
        return _reduce_scatter(output_tensor, input_tensor, op=dist.ReduceOp.SUM, group=group, async_op=async_op)


class WireComm:
    """Memory that all ranks of the mesh have mapped. Ranks add their own parts in the order of ranks: no copy travels.

    Args:
        wire: Joins exactly the ranks of the mesh, in its order, and has memory that they share (``Wire.allocate_shared``).
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._gathers = _Places(wire, PLACES)
        self._payloads = _Places(wire, 2)
        self._counts = _Places(wire, 2)

    def gather(self, name: str) -> Gather:
        """See :class:`Comm`."""
        return _WireGather(self._wire, self._gathers, name)

    def reduce(self, name: str, factor: Callable[[], float]) -> Reduce:
        """See :class:`Comm`."""
        return _WireReduce(self._wire, self._payloads, name, factor)

    def count(self, numbers: Tensor) -> Tensor:
        """See :class:`Comm`."""
        table = self._counts.next(self._wire.size * numbers.numel(), numbers.dtype).view(self._wire.size, -1)
        table[self._wire.rank].copy_(numbers)
        self._wire.barrier("parameters with a gradient")
        return table.sum(0)

    def reserve(self, nbytes: int) -> None:
        """See :class:`Comm`."""
        self._gathers.reserve(nbytes)
        self._payloads.reserve(nbytes * self._wire.size)


class _Places:
    """Shared memory, a few places in turn, each as large as the largest so far. All ranks ask in the same order."""

    def __init__(self, wire: Wire, number: int) -> None:
        self._wire, self._memory, self._turn = wire, [torch.empty(0, dtype=torch.uint8)] * number, 0

    def reserve(self, nbytes: int) -> None:
        self._memory = [self._wire.allocate_shared(nbytes, torch.uint8).tensor for _ in self._memory]

    def next(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._turn = (self._turn + 1) % len(self._memory)
        nbytes = numel * dtype.itemsize
        if self._memory[self._turn].numel() < nbytes:
            self._memory[self._turn] = self._wire.allocate_shared(nbytes, torch.uint8).tensor
        return self._memory[self._turn][:nbytes].view(dtype)


class _WireGather:
    def __init__(self, wire: Wire, places: _Places, name: str) -> None:
        self._wire, self._places, self._name = wire, places, name

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._places.next(math.prod(size), dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        mine = output_tensor.view(self._wire.size, -1)[self._wire.rank]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor.view(-1))
        self._wire.barrier(f"parameters of {self._name}")


class _WireReduce:
    """Each rank's payload has its own part of a place; the rank adds what all have put there for it.

    Two places in turn are enough: whoever enters sum k + 1 has added up sum k - 1.
    """

    def __init__(self, wire: Wire, places: _Places, name: str, factor: Callable[[], float]) -> None:
        self._wire, self._places, self._name, self._factor = wire, places, name, factor
        self._all: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._all is not None:  # the sum, after the payload
            return torch.empty(*size, dtype=dtype, device=device)
        self._all = self._places.next(self._wire.size * math.prod(size), dtype).view(self._wire.size, -1)
        return self._all[self._wire.rank]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any = None, async_op: bool = False
    ) -> None:
        payloads, self._all = self._all, None
        assert payloads is not None
        weigh(input_tensor, self._factor())
        self._wire.barrier(f"gradients of {self._name}")
        parts = payloads.view(self._wire.size, self._wire.size, -1)[:, self._wire.rank]
        if output_tensor.dtype in (torch.float16, torch.bfloat16):  # rounded once
            output_tensor.copy_(parts.sum(0, dtype=torch.float32))
            return
        torch.add(parts[0], parts[1], out=output_tensor)
        for part in parts[2:]:
            output_tensor.add_(part)
