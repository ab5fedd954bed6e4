"""Running statistics of batch normalisation: each rank normalises with its own rows, the statistics are shared.

Policy. In training every rank normalises with the mean and variance of its own rows, as torch's DDP does. The running
statistics are averaged over ranks, weighted by rows, with every backward, so that all ranks evaluate, export and checkpoint
the same model: as running statistics are linear in the batch statistics, they equal those of a run in which each step's batch
statistics were the weighted mean of the ranks' own. Where batches are cut into shards, read shard for rank: each begins with the
statistics of the step before, and the mean is exact. Other buffers are the script's business: they are equal at the start
(broadcast from rank 0) and stay so when all ranks compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.exchange.exact import fold, mean
from paceline.group.wire import AllReduce, Buffer, Wire
from paceline.place.replicate import Scale


class Statistics:
    """The running statistics of one model, flat, on the wire.

    Args:
        model: The adopted model.
        wire: Allocates the buffer, when the model has any statistics.
        shards: Into how many shards batches are cut; 0: one a rank.
    """

    def __init__(self, model: nn.Module, wire: Wire, shards: int = 0) -> None:
        self._shards = shards
        self._weights: dict[int, float] = {}  # of this rank's shards so far
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._buffer: Buffer | None = None
        self.rewire(wire)

    def rewire(self, wire: Wire) -> None:
        """Exchange through `wire` from now on."""
        self._stable = [t.clone() for t in self._kept()]
        if self._norms:
            numel = sum(t.numel() for t in self._tensors()) * (2 if self._shards else 1)
            first = self._tensors()[0]
            region = wire.allocate(numel, torch.float64 if self._shards else first.dtype, first.device)
            self._buffer = wire.cut(region, [numel], [self._shards or 1])[0]

    @property
    def active(self) -> bool:
        """True when the coming exchange has statistics to share: some batch normalisation is in training mode."""
        return any(m.training for m in self._norms)

    async def average(self, scale: Scale) -> None:
        """Replace the statistics by their weighted mean over ranks."""
        assert self._buffer is not None
        tensors = self._tensors()
        flat = torch.cat([t.reshape(-1) for t in tensors], out=None if self._shards else self._buffer.tensor)
        flat.mul_(scale.factor) if scale.factor else flat.zero_()
        if not self._shards:
            await AllReduce(self._buffer, [scale.weight], scale.divisor)
        else:
            self._fold(flat, scale, self._buffer)
            if not scale.last:
                return
            weights = await AllReduce(self._buffer, [self._weights.get(shard, 0.0) for shard in range(self._shards)])
            flat = mean(self._buffer.tensor, weights, scale.divisor)
        offset = 0
        for t in tensors:
            t.copy_(flat[offset : offset + t.numel()].view_as(t))
            offset += t.numel()

    def _fold(self, flat: Tensor, scale: Scale, buffer: Buffer) -> None:
        """Add the statistics of one shard."""
        if scale.first:
            self._weights.clear()
        fold(flat, buffer.tensor, first=scale.first)
        if scale.factor:
            self._weights[scale.shard] = scale.weight

    def settle(self) -> None:
        """The exchange of a backward is over: these are the statistics to return to."""
        for stable, t in zip(self._stable, self._kept(), strict=True):
            stable.copy_(t)

    def restore(self) -> None:
        """Forget what forward passes have added since the last exchange that was completed."""
        for stable, t in zip(self._stable, self._kept(), strict=True):
            t.copy_(stable)

    def _kept(self) -> list[Tensor]:
        """The statistics, and how many batches they are of."""
        return [*self._tensors(), *(m.num_batches_tracked for m in self._norms if m.num_batches_tracked is not None)]

    def _tensors(self) -> list[Tensor]:
        pairs = [(m.running_mean, m.running_var) for m in self._norms]
        return [t for pair in pairs for t in pair if t is not None]
