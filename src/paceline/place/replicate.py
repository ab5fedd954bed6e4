"""Replication: every rank holds the whole model; its gradients lie in flat buckets that the wire allocated.

1. Parameters that need gradients are cut into buckets by (dtype, device), in the order in which backward reaches them:
   first guessed (reverse of registration), measured in the first backward, then cut anew from the same memory.
2. A hook per parameter runs when autograd has accumulated its gradient: the gradient is scaled (:class:`Scale`)
   into its view of the bucket, and ``p.grad`` becomes that view. This copy is the only one, and it is what other ranks see.
3. A bucket whose parameters have all arrived is *full* and is handed on at once, buckets in order.
4. When backward ends, missing parameters are filled in: by zeros, or by what earlier backwards of the same step have left.

[Note: scaling what was accumulated] Under accumulation ``p.grad`` holds G, equal on all ranks, plus the new local part.
Scaling all of it is right: the weights of the mean sum to one, so the mean of ``G + g_r`` is ``G + mean(g_r)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from paceline.group.wire import Buffer, Region, Wire
from paceline.place.torch_private import after_backward
from paceline.terms.bucket import Bucket, Slot
from paceline.terms.errors import StepError

ALIGN = 16  # elements: slots begin on cache lines, so that ranks never write to the same one
FIRST_BUCKET = 1 << 20
BUCKET = 8 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """How this rank's gradient enters the mean: ``payload = factor * gradient``.

    After the sum over ranks the payload is multiplied by ``divisor / sum of weights``. With ``factor = weight / divisor`` it is
    the weighted mean.

    Attributes:
        shard, first, last: Which part of the rank's share of the batch it is, where that comes in several parts.
    """

    weight: float
    divisor: float
    factor: float
    shard: int = 0
    first: bool = True
    last: bool = True

    @classmethod
    def mean(cls, weight: float, divisor: float) -> Scale:
        """This rank's gradient is a mean over `weight` terms; `divisor` is any positive number that all ranks know."""
        return cls(weight, divisor, weight / divisor)


@dataclass(eq=False)
class LiveBucket:
    """A bucket with its memory and what has arrived in it during the current backward."""

    bucket: Bucket
    buffer: Buffer
    params: list[nn.Parameter]
    views: list[Tensor]
    arrived: list[bool] = field(default_factory=list)
    pending: int = 0
    launched: bool = False

    def reset(self) -> None:
        self.arrived = [False] * len(self.params)
        self.pending = len(self.params)
        self.launched = False


class Replica:
    """One adopted model on this rank.

    Args:
        model: The user's module; kept as it is.
        params: Its parameters to exchange, with neutral names, without those that another replica owns.
        wire: Who allocates the buckets.
        bucket_bytes: Upper bound of a bucket's size; a larger parameter is a bucket of its own.
        header_size: Function from the number of parameters of a bucket to the length of its header.
        on_backward: Called when a backward reaches this replica first; returns the scale for this backward.
        on_full: Called for each bucket, in order, as soon as it is full, while backward runs. None: not before its end.
        on_end: Called when backward has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[tuple[str, nn.Parameter]],
        wire: Wire,
        *,
        bucket_bytes: int = BUCKET,
        header_size: Callable[[int], int],
        on_backward: Callable[[Replica], Scale],
        on_full: Callable[[Replica, LiveBucket], None] | None,
        on_end: Callable[[], None],
    ) -> None:
        self.model = model
        self.names = {p: name for name, p in params}
        self.touched = False
        self.exchanges = 0
        self.buckets: list[LiveBucket] = []
        self._wire, self._bucket_bytes, self._header_size = wire, bucket_bytes, header_size
        self._on_backward, self._on_full, self._on_end = on_backward, on_full, on_end
        self._factor = 1.0
        self._measured: list[nn.Parameter] | None = []
        self._place: dict[nn.Parameter, tuple[LiveBucket, int]] = {}
        self._next = 0
        order = [p for _, p in reversed(list(params))]
        self._regions = self._allocate(order)
        self._cut(order)
        self._handles: list[Any] = []
        self.attach()

    # ---- memory ---------------------------------------------------------------------------------------------------
    def _allocate(self, order: list[nn.Parameter]) -> dict[tuple[torch.dtype, torch.device], Region]:
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for p in order:
            kind = (p.dtype, p.device)
            sizes[kind] = sizes.get(kind, 0) + _padded(p.numel())
        return {kind: self._wire.allocate(n, *kind) for kind, n in sizes.items()}

    def _cut(self, order: list[nn.Parameter]) -> None:
        """Cut the regions into buckets along `order`. Gradients that are there move with their parameters."""
        kept = {p: p.grad.clone() for p in order if p.grad is not None and p in self._place}
        live: list[LiveBucket] = []
        for kind, region in self._regions.items():
            region.tensor.zero_()  # the gaps between slots travel too
            groups = list(self._grouped([p for p in order if (p.dtype, p.device) == kind]))
            numels = [sum(_padded(p.numel()) for p in group) for group in groups]
            buffers = self._wire.cut(region, numels, [self._header_size(len(group)) for group in groups])
            live += [self._bucket(group, buffer) for group, buffer in zip(groups, buffers, strict=True)]
        rank = {p: i for i, p in enumerate(order)}
        live.sort(key=lambda b: rank[b.params[-1]])
        self.buckets = [_renumbered(b, i) for i, b in enumerate(live)]
        self._place = {p: (b, i) for b in self.buckets for i, p in enumerate(b.params)}
        for p, grad in kept.items():
            bucket, i = self._place[p]
            p.grad = bucket.views[i].copy_(grad)
        self._reset()

    def _grouped(self, order: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Buckets of at most the bound; the first is small, so that the wire has something to do early."""
        bound = min(FIRST_BUCKET, self._bucket_bytes)
        number, used = 0, 0
        marks: list[int] = []
        for p in order:
            nbytes = p.numel() * p.element_size()
            if used and used + nbytes > bound:
                number, used, bound = number + 1, 0, self._bucket_bytes
            used += nbytes
            marks.append(number)
        for _, group in groupby(zip(marks, order, strict=True), key=lambda pair: pair[0]):
            yield [p for _, p in group]

    def _bucket(self, params: list[nn.Parameter], buffer: Buffer) -> LiveBucket:
        offset, slots, views = 0, [], []
        for p in params:
            slots.append(Slot(self.names[p], offset, p.numel(), tuple(p.shape)))
            views.append(_view_like(buffer.tensor, offset, p))
            offset += _padded(p.numel())
        return LiveBucket(Bucket(0, tuple(slots), offset, buffer.tensor.dtype), buffer, params, views)

    # ---- backward -------------------------------------------------------------------------------------------------
    def _arrive(self, p: nn.Parameter) -> None:
        if not self.touched:
            self.begin()
            after_backward(self._on_end)
        bucket, i = self._place[p]
        if bucket.arrived[i]:
            raise StepError(
                "PL410",
                f"parameter {self.names[p]!r} received two gradients in one backward",
                help="this happens with reentrant activation checkpointing: use torch.utils.checkpoint(..., use_reentrant=False).",
            )
        self._publish(p, bucket.views[i])
        bucket.arrived[i] = True
        bucket.pending -= 1
        if self._measured is not None:
            self._measured.append(p)
        elif self._on_full is not None and bucket.pending == 0:
            self._hand_on()

    def begin(self) -> None:
        """An exchange of this replica begins: by the first gradient of a backward, or because one is owed."""
        self.touched = True
        self._factor = self._on_backward(self).factor

    def _publish(self, p: nn.Parameter, view: Tensor) -> None:
        """Put ``factor * p.grad`` where other ranks can see it, and let ``p.grad`` be that memory."""
        grad = p.grad
        assert grad is not None
        if grad.dtype is not view.dtype or grad.device != view.device:
            raise StepError(
                "PL309",
                f"the gradient of {self.names[p]!r} is {grad.dtype} on {grad.device}, "
                f"but it was {view.dtype} on {view.device} when it was adopted",
                help="move or convert the model before job.adopt, not after.",
            )
        grad, factor = grad.detach(), self._factor
        same = grad.data_ptr() == view.data_ptr() and grad.stride() == view.stride()
        if factor == 0.0:
            view.zero_()  # not a product: zero times NaN is NaN
        elif same:
            if factor != 1.0:
                view.mul_(factor)
        elif factor == 1.0:
            view.copy_(grad)
        else:
            torch.mul(grad, factor, out=view)
        if not same:
            p.grad = view

    def _hand_on(self) -> None:
        """Hand on full buckets, strictly in order: ranks must start exchanges in one order on wires that count on it."""
        assert self._on_full is not None
        while self._next < len(self.buckets) and self.buckets[self._next].pending == 0:
            bucket = self.buckets[self._next]
            bucket.launched = True
            self._next += 1
            self._on_full(self, bucket)

    def complete(self) -> list[LiveBucket]:
        """Fill in what did not arrive; return the buckets that were not handed on yet, in order."""
        if not self.touched:  # some other rank's backward reached this replica
            self.begin()
        rest = [b for b in self.buckets if not b.launched]
        for bucket in rest:
            if bucket.pending:
                self._fill_in(bucket)
            bucket.launched = True
        return rest

    def _fill_in(self, bucket: LiveBucket) -> None:
        for i, (p, view) in enumerate(zip(bucket.params, bucket.views, strict=True)):
            if bucket.arrived[i]:
                continue
            if p.grad is None:
                view.zero_()
            else:  # left by an earlier backward, or set by hand: equal on all ranks, or this rank's own; see the note above
                self._publish(p, view)
                bucket.arrived[i] = True

    def settle(self, bucket: LiveBucket, counts: Sequence[float] | None) -> None:
        """After the exchange: parameters that some rank reached get the global gradient, others keep None.

        Args:
            bucket: A bucket whose exchange has ended.
            counts: For each parameter the number of ranks that had a gradient; None when all had all.
        """
        if counts is None:
            return
        for i, (p, view) in enumerate(zip(bucket.params, bucket.views, strict=True)):
            if counts[i] > 0 and not bucket.arrived[i]:
                p.grad = view

    def end(self) -> None:
        """The exchange of this backward is over."""
        self.exchanges += 1
        self._reset()

    def _reset(self) -> None:
        self.touched, self._next = False, 0
        for bucket in self.buckets:
            bucket.reset()

    # ---- measured order -------------------------------------------------------------------------------------------
    @property
    def measuring(self) -> bool:
        """True until the order of backward is known."""
        return self._measured is not None

    def measured_order(self) -> list[str]:
        """Names in the order in which this rank's first backward reached them; those it did not reach come last."""
        assert self._measured is not None
        seen = set(self._measured)
        rest = [p for p in self._place if p not in seen]
        return [self.names[p] for p in (*self._measured, *rest)]

    def rebuild(self, names: Sequence[str]) -> None:
        """Cut the buckets anew along `names`, the order that all ranks agreed on."""
        by_name = {name: p for p, name in self.names.items()}
        self._measured = None
        self._cut([by_name[name] for name in names])

    # ---- another wire -----------------------------------------------------------------------------------------------
    def rewire(self, wire: Wire, names: Sequence[str], *, keep: bool) -> None:
        """Move the buckets to memory of `wire`, cut along `names`.

        Args:
            keep: Gradients go with them. Else an exchange was lost, and they are zero, as if nothing had been computed; the
                memory left behind is not written to, because others may still read it.
        """
        self._wire = wire
        by_name = {name: p for p, name in self.names.items()}
        order = [by_name[name] for name in names]
        had = [p for p in order if p.grad is not None and not keep]
        for p in had:
            p.grad = None
        self._regions = self._allocate(order)
        self._cut(order)
        for p in had:
            bucket, i = self._place[p]
            p.grad = bucket.views[i]

    def order(self) -> list[str]:
        """Names in the order of the buckets now."""
        return [self.names[p] for bucket in self.buckets for p in bucket.params]

    def measure(self, wanted: bool) -> None:
        """Measure the order in the next backward, or know it from elsewhere."""
        self._measured = [] if wanted else None

    def attach(self) -> None:
        """Hear of gradients, from the next backward on."""
        if not self._handles:
            self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in self.names]  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Take the hooks away; gradients stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _padded(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN


def _view_like(flat: Tensor, offset: int, p: Tensor) -> Tensor:
    """The part of `flat` for `p`, in the memory layout of `p` where that is dense (channels_last keeps its strides)."""
    if p.is_contiguous() or not dense(p):
        return flat[offset : offset + p.numel()].view(p.shape)
    return flat.as_strided(p.shape, p.stride(), flat.storage_offset() + offset)


def dense(p: Tensor) -> bool:
    """True when the elements of `p` fill a piece of memory without gaps or overlap, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _renumbered(bucket: LiveBucket, index: int) -> LiveBucket:
    old = bucket.bucket
    bucket.bucket = Bucket(index, old.slots, old.numel, old.dtype)
    return bucket
