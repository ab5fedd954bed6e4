"""Batch normalisation over the rows of all ranks, on any device: the numbers of one process on the whole batch.

Torch's ``SyncBatchNorm`` wants a GPU, and weighs the ranks' gradients alike, which is wrong where ranks have unequal rows.

Forward: every rank says (n, mean, M2) of its rows, where M2 is the sum of squares around its own mean; all merge them in the
order of ranks (Chan, Golub, LeVeque 1979):

    mean = sum(n_r mean_r) / N        M2 = sum(M2_r + n_r (mean_r - mean)^2)

Backward: the loss of the job is ``sum over ranks of f_r loss_r``, and whoever sums the gradients multiplies those of rank r by f_r. With
xhat the normalised input, the gradient of rank r's input must therefore be that of the job's loss, divided by f_r:

    dx = weight / std * (dy - A / f_r - xhat B / f_r),   A = sum(f_r sum(dy)) / N,   B = sum(f_r sum(dy xhat)) / N
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.terms.errors import StepError

Gather = Callable[[Tensor], Tensor]
"""Takes this rank's row of float64 numbers; returns all ranks' rows as a table, in the order of ranks."""


@dataclass(frozen=True)
class Ranks:
    """Whom a layer shares its statistics with.

    Attributes:
        gather: See :data:`Gather`.
        factor: How this rank's gradient enters the job's sum, asked in backward. None: its share of the rows.
        real: Whether this rank has rows in this batch; a rank without computes on a stand-in that must not count.
    """

    gather: Gather
    factor: Callable[[], float] | None = None
    real: Callable[[], bool] = lambda: True


def convert(
    model: nn.Module,
    group: dist.ProcessGroup | Gather,
    *,
    factor: Callable[[], float] | None = None,
    real: Callable[[], bool] = lambda: True,
) -> list[str]:
    """Let every batch normalisation of `model` use the rows of all ranks; returns the names of those layers.

    Layers keep their identity, parameters, buffers, hooks and the keys of their state; each is still an instance of its class.

    Args:
        group: The ranks that share a batch, or how to gather their rows.
        factor, real: See :class:`Ranks`.
    """
    ranks = Ranks(group if callable(group) else _through(group), factor, real)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) in _SYNCHRONISED:
            module.__class__ = _SYNCHRONISED[type(module)]
            module.__dict__["ranks"] = ranks
            found.append(name)
    return found


def _through(group: dist.ProcessGroup) -> Gather:
    def gather(row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(group.size())]
        dist.all_gather(rows, row, group=group)
        return torch.stack(rows)

    return gather


class _Synchronised(_BatchNorm):
    """What the layers of all dimensions have in common."""

    ranks: Any

    def forward(self, input: Tensor) -> Tensor:
        """See ``torch.nn.BatchNorm2d``. Raises StepError PL558 for one value per channel in all ranks together."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        with torch.no_grad():
            merged = _merge(input.detach(), self.ranks)
            if self.training and self.track_running_stats:
                self._remember(merged)
        result: Tensor = _Normalise.apply(input, self.weight, self.bias, merged, self.eps, self.ranks)  # type: ignore[no-untyped-call]
        return result

    def _remember(self, merged: _Merged) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked or 1)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(merged.mean.to(self.running_mean.dtype), momentum)
            unbiased = merged.squares / (merged.count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over all ranks."""


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over all ranks."""


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` over all ranks."""


_SYNCHRONISED: dict[type, type[_Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


@dataclass(frozen=True)
class _Merged:
    """Statistics of all ranks' rows, per channel, in float64; ``mine`` is how many values of a channel this rank has."""

    count: float
    mine: float
    mean: Tensor
    squares: Tensor


def _merge(x: Tensor, ranks: Ranks) -> _Merged:
    x = x.transpose(0, 1).reshape(x.shape[1], -1).double()
    mine = float(x.shape[1]) if ranks.real() else 0.0
    row = x.new_zeros(1 + 2 * x.shape[0])
    if mine:
        mean = x.mean(1)
        row[0] = mine
        row[1:] = torch.cat([mean, (x - mean[:, None]).square().sum(1)])
    table = ranks.gather(row)
    n, means, squares = table[:, :1], *table[:, 1:].chunk(2, 1)
    count = float(n.sum())
    if count <= 1:
        raise StepError("PL558", f"batch normalisation in training over {count:.0f} values per channel")
    mean = (n * means).sum(0) / count
    return _Merged(count, mine, mean, (squares + n * (means - mean).square()).sum(0))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, merged: _Merged, eps: float, ranks: Ranks
    ) -> Tensor:
        inner = x.dtype if x.dtype is torch.float64 else torch.float32
        scale = (merged.squares / merged.count + eps).rsqrt().to(inner)
        mean = merged.mean.to(inner)
        ctx.merged, ctx.ranks, ctx.bias_dtype = merged, ranks, bias.dtype if bias is not None else None
        ctx.save_for_backward(x, weight, mean, scale)
        y = (x.to(inner) - _wide(mean, x)) * _wide(scale, x)
        if weight is not None:
            y = y * _wide(weight.to(inner), x)
        if bias is not None:
            y = y + _wide(bias.to(inner), x)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        merged: _Merged = ctx.merged
        dy = dy.to(mean.dtype)
        xhat = (x.to(mean.dtype) - _wide(mean, x)) * _wide(scale, x)
        dims = [d for d in range(x.dim()) if d != 1]
        db, dw = dy.sum(dims), (dy * xhat).sum(dims)
        dx = None
        if ctx.needs_input_grad[0]:
            a, b = _shares(torch.cat([db, dw]).double(), merged, ctx.ranks).to(mean.dtype).chunk(2)
            gain = scale if weight is None else scale * weight.to(mean.dtype)
            dx = ((dy - _wide(a, x) - xhat * _wide(b, x)) * _wide(gain, x)).to(x.dtype)
        has_weight, has_bias = ctx.needs_input_grad[1:3]
        return (
            dx,
            dw.to(weight.dtype) if has_weight else None,
            db.to(ctx.bias_dtype) if has_bias else None,
            None,
            None,
            None,
        )


def _shares(sums: Tensor, merged: _Merged, ranks: Ranks) -> Tensor:
    """``A / f_r`` and ``B / f_r``; see the head of this file."""
    factor = merged.mine / merged.count if ranks.factor is None or not merged.mine else ranks.factor()
    total = ranks.gather(sums * factor if factor else torch.zeros_like(sums)).sum(0) / merged.count
    if not merged.mine:
        return torch.zeros_like(total)  # nothing of this rank's gradient counts
    if factor == 0.0:
        raise StepError(
            "PL558", "this rank's rows shape the others' statistics, but its own gradient was given the weight zero"
        )
    return total / factor


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    return channels.view(1, -1, *[1] * (like.dim() - 2))
