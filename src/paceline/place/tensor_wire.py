"""The four exchanges of tensor parallelism, each with its counterpart in backward, and the same ones imagined.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, the operators f and g; cut and join are the same for a dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paceline.place.tensor_split import Layout, NotLocal, Split


class Group:
    """The ranks of a process group, at work.

    Args:
        group: The process group; collectives block on it.
    """

    trial = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num, self.rank = group.size(), group.rank()
        self.whole: dict[tuple[str, tuple[str, ...]], int] = {}  # why, from where: how often
        self._last: tuple[Tensor, Tensor] | None = None

    def enter(self, whole: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and whole.requires_grad):
            return whole
        if self._last is None or self._last[0] is not whole:  # layers that read the same tensor share one exchange
            self._last = (whole, _applied(_Enter, whole, self))
        return self._last[1]

    def forget(self) -> None:
        """Let go of what was entered last."""
        self._last = None

    def total(self, part: Tensor, *, fresh: bool = False) -> Tensor:
        return _applied(_Total, part, fresh, self)

    def largest(self, part: Tensor) -> Tensor:
        out = part.detach().clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return out

    def cut(self, whole: Tensor, dim: int, layout: Layout) -> Tensor:
        return _applied(_Cut, whole, dim, layout, self)

    def join(self, part: Tensor, dim: int, layout: Layout) -> Tensor:
        return _applied(_Join, part, dim, layout, self)

    def made_whole(self, split: Split, why: NotLocal) -> None:
        key = (why.reason, split.origins)
        self.whole[key] = self.whole.get(key, 0) + 1

    # ---- without autograd -------------------------------------------------------------------------------------------
    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place where the memory allows it."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gathered(self, part: Tensor, dim: int, layout: Layout) -> Tensor:
        """The whole tensor of which every rank holds a part."""
        kind, part = part.dtype, part.detach()
        if kind is torch.bool:
            part = part.to(torch.uint8)
        lengths = [layout.length(rank) for rank in range(self.num)]
        part = part.transpose(0, dim).contiguous()
        if len(set(lengths)) > 1:  # the collective wants equal shapes
            rest = (max(lengths) - part.shape[0], *part.shape[1:])
            part = torch.cat([part, part.new_zeros(rest)])
        parts = [torch.empty_like(part) for _ in range(self.num)]
        dist.all_gather(parts, part, group=self.group)
        parts = [each.narrow(0, 0, length) for each, length in zip(parts, lengths, strict=True)]
        return layout.join(parts, 0).transpose(0, dim).contiguous().to(kind)


class Imagined:
    """Ranks that a trial on the meta device imagines: shapes are right, nothing is sent."""

    trial = True

    def __init__(self, num: int) -> None:
        self.num, self.rank = num, 0

    def enter(self, whole: Tensor) -> Tensor:
        return whole

    def total(self, part: Tensor, *, fresh: bool = False) -> Tensor:
        return part

    def largest(self, part: Tensor) -> Tensor:
        return part

    def cut(self, whole: Tensor, dim: int, layout: Layout) -> Tensor:
        return layout.cut(whole, dim, self.rank)

    def join(self, part: Tensor, dim: int, layout: Layout) -> Tensor:
        shape = list(part.shape)
        shape[dim] = layout.total
        return part.new_empty(shape)

    def made_whole(self, split: Split, why: NotLocal) -> None:
        pass


def _applied(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(grad.clone()), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, fresh: bool, group: Group) -> Tensor:
        return group.sum_(part.detach() if fresh else part.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, layout: Layout, group: Group) -> Tensor:
        ctx.how = (dim, layout, group)
        return layout.cut(whole.detach(), dim, group.rank).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, layout, group = ctx.how
        return group.gathered(grad, dim, layout), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, layout: Layout, group: Group) -> Tensor:
        ctx.how = (dim, layout, group)
        return group.gathered(part, dim, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, layout, group = ctx.how
        return layout.cut(grad, dim, group.rank).contiguous(), None, None, None


@contextmanager
def around_functions(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Iterator[None]:
    """Inside, every autograd Function gets changed arguments, also through an ``apply`` that was taken before.

    For trials only. torch has no hook for it; ``Function.apply`` asks this class, which has no method of its own.
    """
    below = torch.autograd.function._SingleLevelFunction
    assert "apply" not in vars(below)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return super(below, cls).apply(*change(args), **kwargs)

    below.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del below.apply  # type: ignore[attr-defined]
