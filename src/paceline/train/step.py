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

import torch
from torch import Tensor, nn

from paceline.exchange.chain import Exchange
from paceline.exchange.link import Message, State
from paceline.group.wire import AllReduce, Buffer, Drive, Wire
from paceline.place.replicate import BUCKET, LiveBucket, Replica, Scale
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import StepError
from paceline.train.statistics import Statistics

WEIGHT, MISSING, NONFINITE, STEPS, STEPS_SQUARED, STOP, PRESENCE = range(7)
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
        mine: True when this rank is one of those with a gradient that is not finite.
    """

    weight: float
    nonfinite: int
    stop: bool
    mine: bool


class Stepper:
    """Drives the gradient part of the chain for all replicas of a job.

    Args:
        wire: The wire of this job.
        exchange: The recipe's result.
        activity: Where to say what this rank does.
        scale: Gives the scale of the backward that begins now.
        steps: Gives the number of optimizer steps applied so far.
        on_verdict: Called once at the end of every exchanged backward.
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
        on_verdict: Callable[[Verdict], None],
        hosts: Sequence[int] = (),
    ) -> None:
        self.wire = wire
        self.exchange = exchange
        self.replicas: list[Replica] = []
        self._activity, self._hosts = activity, hosts
        self._scale, self._steps, self._on_verdict = scale, steps, on_verdict
        self._drive = Drive(wire, activity)
        self._states: dict[LiveBucket, list[State]] = {}
        self._messages: list[tuple[Replica, LiveBucket, Message]] = []
        self._current: Scale | None = None
        self._nonfinite = False
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
            on_full=self._full,
            on_end=self._end,
        )
        self.replicas.append(replica)
        self._statistics[replica] = Statistics(model, self.wire)
        self._remember(replica)
        if len(self.replicas) > 1:
            region = self.wire.allocate(1, torch.float64, torch.device("cpu"))
            self._roll = self.wire.cut(region, [1], [1 + len(self.replicas)])[0]
        return replica

    def _remember(self, replica: Replica) -> None:
        for bucket in replica.buckets:
            self._states[bucket] = self.exchange.chain.init(bucket.bucket)

    # ---- backward -------------------------------------------------------------------------------------------------
    def _begin(self, replica: Replica) -> Scale:
        if self._current is None:
            self._current = self._scale()
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
        if self.probe and bucket is replica.buckets[0]:
            self._nonfinite = self._look(bucket)
        steps = self._steps() % _CYCLE
        header = [
            self._current.weight,
            float(bucket.arrived.count(False)),
            float(self._nonfinite),
            float(steps),
            float(steps * steps),
            float(self._activity.board.stop_requested),
            *map(float, bucket.arrived),
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
            touched = self._agree()
            for replica in touched:
                for bucket in replica.complete():
                    self._launch(replica, bucket)
                self._launch_statistics(replica)
            self._drive.finish()
            self._check_and_settle(touched)
        for replica in touched:
            if replica.measuring:
                self._rebuild(replica)

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
        self._on_verdict(Verdict(head[WEIGHT], round(head[NONFINITE]), head[STOP] > 0, mine))

    def _check_steps(self, head: Sequence[float]) -> None:
        n, total, squares = self.wire.size, head[STEPS], head[STEPS_SQUARED]
        if abs(n * squares - total * total) < 0.5:
            return
        counts = [int(raw) for raw in self.wire.gather_bytes("steps", str(self._steps()).encode())]
        said = ", ".join(f"rank {r} has applied {c}" for r, c in enumerate(counts))
        raise StepError("PL401", f"ranks do not agree on the number of optimizer steps: {said}")

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
        for replica in due:
            replica.begin()
        if due:
            self._end()

    def close(self) -> None:
        """Take all hooks away."""
        self._drive.drop()
        for replica in self.replicas:
            replica.detach()


async def _sum(buffer: Buffer, header: Sequence[float]) -> list[float]:
    return await AllReduce(buffer, header)
