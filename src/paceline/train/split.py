"""A replica that is split over ranks: its placements, what its gradients mean, and the exchange with other replicas.

1. A backward begins: ranks tell their weights, so that each knows by which factor its gradient enters the mean.
2. Placement does what belongs to one replica: pieces are reduced, layers talk, a pipeline runs its schedule.
3. Backward has ended: replicas exchange what is left, part by part (``peers``); then all ranks learn the verdict.

All ranks that read the same rows have the same factor. Where ranks of a replica read rows of their own (``fsdp``, ``ddp``), it is
applied before their gradients are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paceline.exchange.axes import Mesh
from paceline.group.wire import AllReduce, Buffer, Drive, Wire
from paceline.place.replicate import Scale
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import PeerLost, StepError
from paceline.train.loop import Loop
from paceline.train.members import Members
from paceline.train.peers import Peers, add_back, local, put_aside
from paceline.train.split_rounds import SplitRounds
from paceline.train.statistics import Statistics
from paceline.train.step import Verdict

_CYCLE = 64
_LOOKED_AT = 8  # small gradients of each backward: what is not finite spreads


class Placement(Protocol):
    """One way to hold a model on several ranks."""

    @property
    def held(self) -> Sequence[tuple[str, nn.Parameter]]:
        """What this rank holds and trains, under original names."""

    def place(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Split the model in place; its optimizers go on with the parts."""

    def describe(self) -> str:
        """Where everything is, for people."""


class Split:
    """The gradients of a job whose replicas are split.

    Args:
        mesh: Where this rank stands.
        wire: Of all ranks that step together: all, or those of this replica where replicas step on their own.
        peers: Exchange gradients, one after the other: inside a replica, then with other replicas; none where there is nobody.
        rounds: Of replicas that step on their own.
        activity: Where to say what this rank does.
        loop: Where the job stands.
        save_due: A checkpoint is due after this step; asked on rank 0.
        members: Of an elastic run: asked whether replicas wait to join, and told when some were lost in a backward, which has ended here.
    """

    def __init__(
        self,
        mesh: Mesh,
        wire: Wire,
        peers: Sequence[Peers],
        rounds: SplitRounds | None,
        activity: Activity,
        loop: Loop,
        save_due: Callable[[], bool],
        members: Members | None = None,
    ) -> None:
        self._mesh, self._wire, self._peers, self._rounds = mesh, wire, peers, rounds
        self._activity, self._loop, self._save_due = activity, loop, save_due
        self._members, self._missed = members, False
        self._drive = Drive(wire, activity)
        self._rolls = [_roll(wire, 7), _roll(wire, 5)]
        self._held: list[tuple[str, nn.Parameter]] = []
        self._statistics: list[Statistics] = []
        self._scale: Scale | None = None
        self._aside: dict[nn.Parameter, Tensor] = {}
        self._factor = 1.0
        self._total = 0.0
        self.save_now = False

    def add(self, model: nn.Module, held: Sequence[tuple[str, nn.Parameter]], *, statistics: bool = True) -> None:
        """One more model, of which this rank holds these parameters.

        Args:
            statistics: Ranks that read other rows have running statistics of their own, to be averaged.
        """
        self._held += held
        for peers in self._peers:
            peers.add(model, held)
        if statistics and (self._readers > 1 or self._members is not None):
            self._statistics.append(Statistics(model, self._among))

    def rewire(self, layout: Mesh, wire: Wire) -> None:
        """Replicas have come or gone. Wires between them are rewired by whoever has them."""
        self._mesh, self._wire = layout, wire
        self._drive.drop()
        self._drive = Drive(wire, self._activity)
        self._rolls = [_roll(wire, 7), _roll(wire, 5)]
        for statistics in self._statistics:
            statistics.rewire(self._among)

    @property
    def held(self) -> Sequence[tuple[str, nn.Parameter]]:
        """What this rank holds of all models."""
        return self._held

    @property
    def begun(self) -> bool:
        """A backward runs."""
        return self._scale is not None

    # ---- a backward -------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """A backward begins. Idempotent until :meth:`end`; all ranks call it."""
        if self._scale is not None:
            return
        scale = self._scale = self._loop.scale()
        mine = scale.weight if self._mesh.leads else 0.0
        steps, mark = self._loop.steps % _CYCLE, self._loop.mark
        about = [mine, 1.0, float(steps), float(steps * steps), float(mark), float(mark * mark), scale.factor]
        if self._peers:
            self._aside = put_aside(self._held)
        try:
            sums: list[float] = self._drive.run(_sum(self._rolls[0], about), "backward, weights")
        except PeerLost:
            if self._members is None:
                raise
            self._missed = True  # the replica ends its backward, which counts for nothing
            self._total = self._factor = 0.0
            return
        self._check(sums)
        self._total = sums[0]
        self._factor = self._factor_of(scale)
        if self._rounds is not None:
            self._rounds.note(self._total)

    def _factor_of(self, scale: Scale) -> float:
        """By what this rank's gradient is multiplied: its share of the global mean, or 1 where it is a sum."""
        if self._sums:
            return scale.factor
        return scale.weight / self._total if self._total else 0.0

    def factor(self) -> float:
        """The same, for ranks that read rows of their own: asked before their gradients are added up."""
        self.begin()
        return self._factor

    @property
    def _readers(self) -> int:
        """Into how many parts the batch is cut, of which the ranks that step together take the mean."""
        return self._mesh.readers if self._rounds is None else self._mesh.reading

    @property
    def _sums(self) -> bool:
        return self._loop.given_weight == "sum"

    @property
    def _own_rows(self) -> bool:
        return self._mesh.reading > 1

    @property
    def _among(self) -> Wire:
        """Between whom running statistics differ."""
        return self._wire if self._own_rows or not self._peers else self._peers[-1].wire

    def end(self) -> None:
        """Backward has ended; ``p.grad`` becomes the gradient of sum(loss)/sum(weight) over the global batch."""
        if self._scale is None:
            return
        with self._activity.during(Phase.EXCHANGE, "backward"):
            try:
                if not self._missed:
                    self._exchange()
            except PeerLost:
                if self._members is None:
                    raise
                self._missed = True
            self._scale = None
            if self._missed and self._members is not None:
                self._forget(self._members)

    def _exchange(self) -> None:
        mine = not self._finite()
        factor = 1.0 if self._mesh.along("fsdp") > 1 else self._factor
        for peers in self._peers:
            peers.exchange(factor)
            factor = 1.0
        if factor != 1.0:
            for _, p in self._held:
                if p.grad is not None:
                    local(p.grad).mul_(factor)
        add_back(self._aside)
        self._aside = {}
        self._average_statistics()
        self._conclude(mine)

    def _forget(self, members: Members) -> None:
        """Other replicas were lost: nobody applies this step."""
        self._missed, self._aside = False, {}
        self._drive.drop()
        for peers in self._peers:
            peers.drop()
        for statistics in self._statistics:
            statistics.restore()
        members.lost(in_step=True)

    def _finite(self) -> bool:
        grads = sorted((local(p.grad) for _, p in self._held if p.grad is not None), key=Tensor.numel)
        return all(math.isfinite(float(grad.sum())) for grad in grads[:_LOOKED_AT])

    def _average_statistics(self) -> None:
        for statistics in self._statistics:
            if statistics.active:
                factor = self._factor if not self._sums else 1.0 / self._readers
                copies = self._wire.size / self._readers if self._own_rows else 1.0
                Drive(self._among, self._activity).run(statistics.average(Scale(factor / copies, 1.0, factor / copies)))

    def _conclude(self, mine: bool) -> None:
        board = self._activity.board
        save = self._mesh.rank == 0 and self._save_due()
        change = self._members is not None and self._members.change
        said = [1.0, float(mine), float(board.stop_requested), float(save), float(change)]
        sums = self._drive.run(_sum(self._rolls[1], said), "backward, verdict")
        self.save_now = sums[3] > 0
        stop = sums[2] > 0
        if self._rounds is not None:  # other replicas must stop after the same round
            self._rounds.asked_to_stop, stop = self._rounds.asked_to_stop or stop, False
        for statistics in self._statistics:
            statistics.restore() if sums[1] > 0 and self._loop.report_nonfinite else statistics.settle()
        self._loop.on_verdict(Verdict(self._total, round(sums[1]), stop, sums[4] > 0, mine))

    def _check(self, sums: Sequence[float]) -> None:
        """Raise StepError when ranks have applied different numbers of steps (PL401), or train on different batches (PL412)."""
        if self._differ(sums[2], sums[3]):
            counts = [int(raw) for raw in self._wire.gather_bytes("steps", str(self._loop.steps).encode())]
            said = ", ".join(f"rank {r} has applied {c}" for r, c in enumerate(counts))
            raise StepError("PL401", f"ranks do not agree on the number of optimizer steps: {said}")
        if self._differ(sums[4], sums[5]):
            places = [raw.decode() for raw in self._wire.gather_bytes("batches", self._loop.where().encode())]
            said = ", ".join(f"rank {r} on {place}" for r, place in enumerate(places))
            raise StepError("PL412", f"step {self._loop.steps + 1}: ranks train on different batches: {said}")

    def _differ(self, total: float, squares: float) -> bool:
        return abs(self._wire.size * squares - total * total) >= 0.5

    def close(self) -> None:
        """Forget what is under way."""
        self._drive.drop()
        for peers in self._peers:
            peers.drop()


def watch(
    held: Iterable[tuple[str, nn.Parameter]], begin: Callable[[], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `begin` before the first gradient of a backward is accumulated in any of these."""

    def on_gradient(grad: Tensor) -> None:
        begin()

    return [p.register_hook(on_gradient) for _, p in held]  # type: ignore[no-untyped-call]


def _roll(wire: Wire, n: int) -> Buffer:
    region = wire.allocate(1, torch.float64, torch.device("cpu"))
    return wire.cut(region, [1], [n])[0]


async def _sum(buffer: Buffer, header: Sequence[float]) -> list[float]:
    return await AllReduce(buffer, header)
