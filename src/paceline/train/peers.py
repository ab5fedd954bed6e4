"""What replicas that are split over ranks exchange: each rank with those that hold the same part of the other replicas.

The parameters may be plain, or pieces (DTensors) of larger ones: then the local piece is what travels. Everything leaves when
backward has ended, bucket by bucket, down the same chain of links as that of whole replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paceline.exchange.chain import Exchange
from paceline.exchange.link import Message, State
from paceline.group.wire import Drive, Wire
from paceline.place.replicate import BUCKET, LiveBucket, Replica, Scale
from paceline.terms.activity import Activity

_WEIGHT, _MISSING, _PRESENCE = range(3)

Named = Sequence[tuple[str, nn.Parameter]]


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor, sharing its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def piece_of(p: Tensor, piece: Tensor) -> Tensor:
    """`piece` as a tensor that is cut as `p` is."""
    if not isinstance(p, DTensor):
        return piece
    return DTensor.from_local(piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


class Peers:
    """The exchange between replicas of this rank's part.

    Args:
        wire: Among the ranks that hold this part, by replica.
        exchange: The strategy.
        activity: Where to say what this rank does.
        steps: Optimizer steps so far.
    """

    def __init__(self, wire: Wire, exchange: Exchange, activity: Activity, steps: Callable[[], int]) -> None:
        self.wire, self._exchange, self._activity, self._steps = wire, exchange, activity, steps
        self._drive = Drive(wire, activity)
        self._added: list[tuple[nn.Module, Named]] = []
        self._replicas: list[Replica] = []
        self._pieces: dict[nn.Parameter, nn.Parameter] = {}  # the local piece by its parameter
        self._states: dict[LiveBucket, list[State]] = {}
        self._factor = 1.0

    def add(self, model: nn.Module, held: Named) -> None:
        """Exchange the gradients of these, too. All ranks of the wire add the same in the same order."""
        self._added.append((model, held))
        self._build(model, held)

    def rewire(self, wire: Wire) -> None:
        """Exchange through `wire` from now on. What links remember stays."""
        self._drive.drop()
        kept = [self._states[bucket] for replica in self._replicas for bucket in replica.buckets]
        self.wire, self._drive = wire, Drive(wire, self._activity)
        self._replicas, self._pieces, self._states = [], {}, {}
        for model, held in self._added:
            self._build(model, held)
        buckets = [bucket for replica in self._replicas for bucket in replica.buckets]
        self._states = dict(zip(buckets, kept, strict=True))

    def _build(self, model: nn.Module, held: Named) -> None:
        pieces = {p: piece(p) for _, p in held}
        self._pieces |= pieces
        megabytes = self._exchange.bucket_mb
        replica = Replica(
            model,
            [(name, pieces[p]) for name, p in held],
            self.wire,
            bucket_bytes=int(megabytes * 2**20) if megabytes else BUCKET,
            header_size=lambda n: _PRESENCE + n,
            on_backward=lambda _: Scale(1.0, float(self.wire.size), self._factor),
            on_full=None,
            on_end=_nothing,
        )
        replica.detach()
        replica.measure(False)
        self._replicas.append(replica)
        for bucket in replica.buckets:
            self._states[bucket] = self._exchange.chain.init(bucket.bucket)

    def exchange(self, factor: float) -> None:
        """Replace the gradients by their sum over the ranks of the wire, each times its `factor`."""
        self._factor = factor
        for p, own in self._pieces.items():
            if own is not p:
                own.grad = local(p.grad) if p.grad is not None else None
        messages = [self._launch(r, bucket) for r in self._replicas for bucket in r.complete()]
        self._drive.finish()
        for replica, bucket, message in messages:
            replica.settle(bucket, message.header[_PRESENCE:] if message.header[_MISSING] > 0 else None)
        for replica in self._replicas:
            replica.end()
        self._hand_back()

    def _launch(self, replica: Replica, bucket: LiveBucket) -> tuple[Replica, LiveBucket, Message]:
        message = Message(
            bucket.bucket,
            bucket.buffer,
            [1.0, float(bucket.arrived.count(False)), *map(float, bucket.arrived)],
            divisor=float(self.wire.size),
            rank=self.wire.rank,
            size=self.wire.size,
            step=self._steps(),
        )
        coroutine = self._exchange.chain.exchange_gradients(message, self._states[bucket])
        self._drive.launch(coroutine, label=f"backward, bucket {bucket.bucket.index + 1}/{len(replica.buckets)}")
        return replica, bucket, message

    def _hand_back(self) -> None:
        for p, own in self._pieces.items():
            if own is not p:
                p.grad = None if own.grad is None else piece_of(p, own.grad)
                own.grad = None

    def drop(self) -> None:
        """Forget what is under way."""
        self._drive.drop()

    def leave(self) -> None:
        """Exchange nothing more through this wire; who waits for this rank is told."""
        self._drive.drop()
        self.wire.close()


def piece(p: nn.Parameter) -> nn.Parameter:
    """This rank's piece of a parameter, as one that shares its memory; itself where it is no piece."""
    return p if not isinstance(p, DTensor) else nn.Parameter(local(p), requires_grad=torch.is_floating_point(p))


def _nothing() -> None:
    return None


def put_aside(held: Named) -> dict[nn.Parameter, Tensor]:
    """A backward begins: take away the gradients that are there. They were exchanged before."""
    aside = {p: local(p.grad).clone() for _, p in held if p.grad is not None}
    for p in aside:
        p.grad = None
    return aside


def add_back(aside: dict[nn.Parameter, Tensor]) -> None:
    """Add what was put aside to what has come since."""
    for p, before in aside.items():
        p.grad = piece_of(p, before if p.grad is None else local(p.grad).add_(before))
