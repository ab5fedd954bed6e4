"""One step: where placement meets exchange. Buckets that are full go down the chain; what comes back is checked.

In a backward:
1. the first gradient of a replica asks for the scale of this backward (rows, or what ``job.weight`` said);
2. a full bucket is launched: its coroutine runs to its first request, and backward goes on;
3. at the end of backward the rest is launched, all coroutines are finished, the headers are checked, and ``p.grad`` is the
   gradient of sum(loss)/sum(weight) over the global batch.

With several replicas (a GAN's two models) ranks first agree on which of them this backward has touched, because that may
depend on data; then all buckets are launched in one order.

[Note: step without backward] Gradients that were set by hand, or that no rank's backward has reached, are exchanged when the
optimizer steps: an exchange is owed to every step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from paceline.exchange.chain import Exchange
from paceline.exchange.exact import fits
from paceline.exchange.link import Message, State
from paceline.group.wire import AllReduce, Buffer, Drive, Wire
from paceline.place.replicate import BUCKET, LiveBucket, Replica, Scale
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import PeerLost, StepError
from paceline.train.replicas import fingerprint
from paceline.train.statistics import Statistics

WEIGHT, MISSING, NONFINITE, STEPS, STEPS_SQUARED, STOP, CHANGE, MARK, MARK_SQUARED, PRESENCE = range(10)
"""Places in the header of a bucket's message; one number per parameter follows from PRESENCE on."""

_CYCLE = (
    64  # steps are counted modulo this in the header, so that their squares stay exact in float32 at any world size
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the headers of one backward said, the same on all ranks.

    Attributes:
        weight: Sum of the weights of all ranks.
        nonfinite: Number of ranks whose gradient is not finite.
        stop: True when some rank was asked to stop.
        change: True when somebody waits to join, so that all ranks meet at the next step boundary.
        mine: True when this rank is one of those with a gradient that is not finite.
    """

    weight: float
    nonfinite: int
    stop: bool
    change: bool
    mine: bool


class Where(Protocol):
    """What a rank trains on."""

    @property
    def mark(self) -> int:
        """A small number, the same on ranks that train on the same batches."""

    @property
    def leaves_out(self) -> bool:
        """A step whose gradient is not finite is left out."""

    def where(self) -> str:
        """The same for people."""


class Stepper:
    """Drives the gradient part of the chain for all replicas of a job.

    Args:
        wire: The wire of this job.
        exchange: The recipe's result.
        activity: Where to say what this rank does.
        scale: Gives the scale of the backward that begins now.
        steps: Gives the number of optimizer steps applied so far.
        place: Knows what this rank trains on.
        on_verdict: Called once at the end of every exchanged backward.
        change: Tells whether this rank knows of somebody who waits to join.
        on_lost: Called when a member was lost in an exchange, which is forgotten; None: the run ends with the error.
        hosts: For each rank the index of its host; empty when all are on one.
    """

    def __init__(
        self,
        wire: Wire,
        exchange: Exchange,
        activity: Activity,
        *,
        scale: Callable[[], Scale],
        steps: Callable[[], int],
        place: Where,
        on_verdict: Callable[[Verdict], None],
        change: Callable[[], bool] = lambda: False,
        on_lost: Callable[[bool], None] | None = None,
        hosts: Sequence[int] = (),
    ) -> None:
        self.wire = wire
        self.exchange = exchange
        self.replicas: list[Replica] = []
        self._activity, self._hosts = activity, hosts
        self._scale, self._steps, self._place, self._on_verdict = scale, steps, place, on_verdict
        self._change, self._on_lost = change, on_lost
        self._drive = Drive(wire, activity)
        self._states: dict[LiveBucket, list[State]] = {}
        self._wide: dict[LiveBucket, Buffer] = {}  # where shards are summed, in a step of several
        self._reached: dict[LiveBucket, list[bool]] = {}  # which parameters the shards so far have reached
        self._messages: list[tuple[Replica, LiveBucket, Message]] = []
        self._current: Scale | None = None
        self._nonfinite = self._owing = False
        self._roll: Buffer | None = None
        self._statistics: dict[Replica, Statistics] = {}
        self.probe = True

    # ---- adoption -------------------------------------------------------------------------------------------------
    def add(self, model: nn.Module, params: Sequence[tuple[str, nn.Parameter]]) -> Replica:
        """Place one more model. All ranks add the same models in the same order."""
        megabytes = self.exchange.bucket_mb
        replica = Replica(
            model,
            params,
            self.wire,
            bucket_bytes=int(megabytes * 2**20) if megabytes else BUCKET,
            header_size=lambda n: PRESENCE + n,
            on_backward=self._begin,
            on_full=None if self.exchange.shards else self._full,
            on_end=self._end,
        )
        self.replicas.append(replica)
        self._statistics[replica] = Statistics(model, self.wire, self.exchange.shards)
        if self.exchange.shards:
            replica.measure(False)  # buckets leave when backward has ended, so their order does not matter
        self._remember(replica)
        self._widen(replica)
        if len(self.replicas) > 1:
            self._roll = self._make_roll()
        return replica

    def use(self, exchange: Exchange) -> None:
        """Exchange by this strategy from now on. It asks placement for the same as the one before."""
        if exchange is not self.exchange:
            self.exchange = exchange
            for replica in self.replicas:
                self._remember(replica)

    def attach(self, active: bool) -> None:
        """Exchange what backwards leave, or no more."""
        for replica in self.replicas:
            replica.attach() if active else replica.detach()

    def _remember(self, replica: Replica) -> None:
        for bucket in replica.buckets:
            self._states[bucket] = self.exchange.chain.init(bucket.bucket)

    def _widen(self, replica: Replica) -> None:
        """Memory for the sums of shards."""
        for bucket in replica.buckets if self.exchange.shards else ():
            words, header = 2 * bucket.bucket.numel, PRESENCE + len(bucket.params) + self.exchange.shards
            region = self.wire.allocate(words, torch.float64, bucket.buffer.tensor.device)
            (self._wide[bucket],) = self.wire.cut(region, [words], [header])

    # ---- backward -------------------------------------------------------------------------------------------------
    def _begin(self, replica: Replica) -> Scale:
        if self._current is None:
            self._current = self._scale()
            if self.exchange.shards and self._current.first and not self._owing:
                self._refuse_left_over()
        return self._current

    def _full(self, replica: Replica, bucket: LiveBucket) -> None:
        """A bucket is full while backward runs: start its exchange, and give the others a push."""
        if len(self.replicas) == 1:
            self._launch(replica, bucket)
            if not self.wire.ordered:
                self._drive.poll()
        else:
            bucket.launched = False  # ranks must agree on the replicas first: launched when backward has ended

    def _launch(self, replica: Replica, bucket: LiveBucket) -> None:
        assert self._current is not None
        if self.probe and bucket is replica.buckets[0] and not self.exchange.shards:
            self._nonfinite = self._look(bucket)
        reached = self._reached.get(bucket, bucket.arrived)
        steps, mark = self._steps() % _CYCLE, self._place.mark
        header = [
            self._current.weight,
            float(reached.count(False)),
            float(self._nonfinite),
            float(steps),
            float(steps * steps),
            float(self._activity.board.stop_requested),
            float(self._change()),
            float(mark),
            float(mark * mark),
            *map(float, reached),
        ]
        message = Message(
            bucket.bucket,
            bucket.buffer,
            header,
            divisor=self._current.divisor,
            rank=self.wire.rank,
            size=self.wire.size,
            step=self._steps(),
            hosts=self._hosts,
            wide=self._wide.get(bucket),
            shard=self._current.shard,
            first=self._current.first,
            last=self._current.last,
        )
        self._messages.append((replica, bucket, message))
        self._drive.launch(
            self.exchange.chain.exchange_gradients(message, self._states[bucket]),
            label=f"backward, bucket {bucket.bucket.index + 1}/{len(replica.buckets)}",
        )

    def _look(self, bucket: LiveBucket) -> bool:
        """Is this rank's gradient finite? Looked up in one small gradient that backward reaches early: NaN spreads."""
        ready = [v for v, there in zip(bucket.views, bucket.arrived, strict=True) if there and not v.is_cuda]
        if not ready:
            return False
        smallest = min(ready[:4], key=Tensor.numel)
        return not math.isfinite(float(smallest.detach().sum()))

    def _end(self) -> None:
        """Backward has ended (one call for each replica that it touched; the first does the work)."""
        if self._current is None:
            return
        with self._activity.during(Phase.EXCHANGE, "backward"):
            try:
                touched = self._exchange()
            except PeerLost:
                if self._on_lost is None:
                    raise
                self._drive.drop()
                self._messages.clear()
                self._current, self._nonfinite = None, False
                self._on_lost(True)
                return
        for replica in touched:
            while replica.measuring:
                try:
                    self._rebuild(replica)
                except PeerLost:
                    if self._on_lost is None:
                        raise
                    self._on_lost(False)

    def _exchange(self) -> list[Replica]:
        if self.exchange.shards:
            return self._exchange_shard()
        touched = self._agree()
        for replica in touched:
            for bucket in replica.complete():
                self._launch(replica, bucket)
            self._launch_statistics(replica)
        self._drive.finish()
        self._vote()
        self._check_and_settle(touched)
        return touched

    def _vote(self) -> None:
        """Where the strategy says so, nobody steps before all have come to the same. Raises StepError PL442."""
        if not self.exchange.votes:
            return
        buckets = sorted(self._messages, key=lambda m: (self.replicas.index(m[0]), m[1].bucket.index))
        found = json.dumps(fingerprint(bucket.buffer.tensor for _, bucket, _ in buckets)).encode()
        said = self.wire.gather_bytes("vote", found)
        if len(set(said)) > 1:
            common = max(said, key=said.count)
            odd = [rank for rank, theirs in enumerate(said) if theirs != common]
            who = f"rank {odd[0]} has" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} have"
            raise StepError(
                "PL442", f"step {self._steps() + 1}: {who} come to another gradient than most from the same exchange"
            )

    def _exchange_shard(self) -> list[Replica]:
        """Add up the gradient of one shard; what the shards of this rank add up to is exchanged after the last one."""
        scale = self._current
        assert scale is not None
        self._nonfinite = self._nonfinite and not scale.first
        for bucket in (bucket for replica in self.replicas for bucket in replica.complete()):
            before = [False] * len(bucket.params) if scale.first else self._reached[bucket]
            self._reached[bucket] = [a or b for a, b in zip(before, bucket.arrived, strict=True)]
            self._nonfinite |= not fits(bucket.buffer.tensor)
        for replica in self.replicas:
            for bucket in replica.buckets:
                self._launch(replica, bucket)
            self._launch_statistics(replica)
        if scale.last:
            self._drive.finish()
            self._vote()
            self._check_and_settle(self.replicas)
            return self.replicas
        self._messages.clear()
        self._current = None
        for replica in self.replicas:
            replica.end()
            self._statistics[replica].restore()
        return self.replicas

    def _refuse_left_over(self) -> None:
        """Raise StepError PL450 for a gradient of the step before: it would count once for each shard of a rank.

        Looked for in small parameters; one of them may just have got its gradient.
        """
        for replica in self.replicas:
            some = sorted(replica.names, key=Tensor.numel)[:4]
            if sum(p.grad is not None and bool(p.grad.any()) for p in some) > 1:
                raise StepError("PL450", "exact=True: a backward began with gradients that were not cleared")

    def remember_statistics(self) -> None:
        """A batch begins: running statistics are as they are now for each of its shards."""
        for statistics in self._statistics.values():
            statistics.settle()

    def rewire(self, wire: Wire, hosts: Sequence[int], orders: Sequence[Sequence[str]], *, keep: bool) -> None:
        """Exchange through `wire` from now on.

        Args:
            orders: For each replica the order of its buckets; the same on all ranks.
            keep: Gradients are kept; else the last exchange was lost, and so are they.
        """
        self.wire, self._hosts = wire, hosts
        self._drive = Drive(wire, self._activity)
        self._wide.clear()
        self._reached.clear()
        for replica, names in zip(self.replicas, orders, strict=True):
            states = [self._states.pop(bucket) for bucket in replica.buckets]
            same = list(names) == replica.order()
            replica.rewire(wire, names, keep=keep)
            if same:
                self._states.update(zip(replica.buckets, states, strict=True))
            else:
                self._remember(replica)
            self._widen(replica)
            statistics = self._statistics[replica]
            if not keep:
                statistics.restore()
            statistics.rewire(wire)
        if len(self.replicas) > 1:
            self._roll = self._make_roll()

    def _make_roll(self) -> Buffer:
        region = self.wire.allocate(1, torch.float64, torch.device("cpu"))
        return self.wire.cut(region, [1], [1 + len(self.replicas)])[0]

    def _launch_statistics(self, replica: Replica) -> None:
        """Average the running statistics of batch normalisation along with the gradients."""
        assert self._current is not None
        statistics = self._statistics[replica]
        if statistics.active:
            coroutine = statistics.average(self._current)
            self._drive.launch(coroutine, label="backward, running statistics")

    def _agree(self) -> list[Replica]:
        """The replicas that this backward has touched on any rank."""
        if len(self.replicas) == 1:
            return self.replicas
        assert self._roll is not None
        mine = [1.0, *(float(r.touched) for r in self.replicas)]
        sums: list[float] = self._drive.run(_sum(self._roll, mine), "backward, which models")
        return [r for r, count in zip(self.replicas, sums[1:], strict=True) if count > 0]

    def _check_and_settle(self, touched: Sequence[Replica]) -> None:
        messages, self._messages = self._messages, []
        scale, self._current = self._current, None
        assert scale is not None
        head = messages[0][2].header
        mine, self._nonfinite = self._nonfinite, False
        self._check_steps(head)
        for replica, bucket, message in messages:
            counts = message.header[PRESENCE:] if message.header[MISSING] > 0 else None
            replica.settle(bucket, counts)
        for replica in touched:
            replica.end()
            left_out = head[NONFINITE] > 0 and (self.exchange.shards or self._place.leaves_out)
            self._statistics[replica].restore() if left_out else self._statistics[replica].settle()
        self._on_verdict(Verdict(head[WEIGHT], round(head[NONFINITE]), head[STOP] > 0, head[CHANGE] > 0, mine))

    def _check_steps(self, head: Sequence[float]) -> None:
        """Raise StepError when ranks have applied different numbers of steps (PL401), or train on different batches (PL412)."""
        if self._differ(head[STEPS], head[STEPS_SQUARED]):
            counts = [int(raw) for raw in self.wire.gather_bytes("steps", str(self._steps()).encode())]
            said = ", ".join(f"rank {r} has applied {c}" for r, c in enumerate(counts))
            raise StepError("PL401", f"ranks do not agree on the number of optimizer steps: {said}")
        if self._differ(head[MARK], head[MARK_SQUARED]):
            places = [raw.decode() for raw in self.wire.gather_bytes("batches", self._place.where().encode())]
            said = ", ".join(f"rank {r} on {place}" for r, place in enumerate(places))
            raise StepError("PL412", f"step {self._steps() + 1}: ranks train on different batches: {said}")

    def _differ(self, total: float, squares: float) -> bool:
        """Whether numbers with this sum, and squares with that sum, can all be the same."""
        return abs(self.wire.size * squares - total * total) >= 0.5

    def _rebuild(self, replica: Replica) -> None:
        """Cut the buckets along the order that rank 0 has measured."""
        said = self.wire.gather_bytes("bucket order", json.dumps(replica.measured_order()).encode())
        for bucket in replica.buckets:
            del self._states[bucket]
        replica.rebuild(json.loads(said[0]))
        self._remember(replica)

    # ---- the optimizer --------------------------------------------------------------------------------------------
    def owe(self, replicas: Sequence[Replica]) -> None:
        """Exchange the gradients of those replicas that no backward has exchanged since the last step. See the note above."""
        due = [r for r in replicas if not r.exchanges]
        self._owing = bool(due)
        for replica in due:
            replica.begin()
        self._owing = False
        if due:
            self._end()

    def close(self) -> None:
        """Take all hooks away."""
        self._drive.drop()
        for replica in self.replicas:
            replica.detach()


async def _sum(buffer: Buffer, header: Sequence[float]) -> list[float]:
    return await AllReduce(buffer, header)
