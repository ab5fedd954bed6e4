"""Running statistics of batch normalisation: each rank normalises with its own rows, the statistics are shared.

Policy. In training every rank normalises with the mean and variance of its own rows, as torch's DDP does. The running
statistics are averaged over ranks, weighted by rows, with every backward, so that all ranks evaluate, export and checkpoint
the same model: as running statistics are linear in the batch statistics, they equal those of a run in which each step's batch
statistics were the weighted mean of the ranks' own. Other buffers are the script's business: they are equal at the start
(broadcast from rank 0) and stay so when all ranks compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.group.wire import AllReduce, Buffer, Wire
from paceline.place.replicate import Scale


class Statistics:
    """The running statistics of one model, flat, on the wire.

    Args:
        model: The adopted model.
        wire: Allocates the buffer, when the model has any statistics.
    """

    def __init__(self, model: nn.Module, wire: Wire) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._buffer: Buffer | None = None
        if self._norms:
            numel = sum(t.numel() for t in self._tensors())
            first = self._tensors()[0]
            region = wire.allocate(numel, first.dtype, first.device)
            self._buffer = wire.cut(region, [numel], [1])[0]

    @property
    def active(self) -> bool:
        """True when the coming exchange has statistics to share: some batch normalisation is in training mode."""
        return any(m.training for m in self._norms)

    async def average(self, scale: Scale) -> None:
        """Replace the statistics by their weighted mean over ranks."""
        assert self._buffer is not None
        tensors = self._tensors()
        flat = self._buffer.tensor
        torch.cat([t.reshape(-1) for t in tensors], out=flat)
        flat.mul_(scale.factor) if scale.factor else flat.zero_()
        await AllReduce(self._buffer, [scale.weight], scale.divisor)
        offset = 0
        for t in tensors:
            t.copy_(flat[offset : offset + t.numel()].view_as(t))
            offset += t.numel()

    def _tensors(self) -> list[Tensor]:
        pairs = [(m.running_mean, m.running_var) for m in self._norms]
        return [t for pair in pairs for t in pair if t is not None]
