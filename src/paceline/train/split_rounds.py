"""Rounds between replicas that are split over ranks: each rank with those that hold the same part of the other replicas.

A replica steps on its own. Its ranks are in step with each other, so whatever ends a round, a step, or the run is decided by what all of
them know: the weight of a batch, a gradient that is not finite, a request to stop come from the verdict of a backward (``split``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from paceline.exchange.cadence import Every
from paceline.exchange.chain import Exchange
from paceline.group.wire import Wire
from paceline.place.replicate import Replica
from paceline.terms.activity import Activity
from paceline.terms.errors import UsageError
from paceline.terms.event import Sink
from paceline.train.exchanging import Desk, Exchanging
from paceline.train.loop import Loop
from paceline.train.peers import Named, piece
from paceline.train.rounds import Member, Rounds


@dataclass(eq=False)
class Held:
    """Parameters of one model that this rank holds, for whoever asks who owns a parameter."""

    model: nn.Module
    names: dict[nn.Parameter, str]
    label: str
    exchanges: int = 0
    stop: list[bool] = field(default_factory=list)


class SplitRounds(Rounds):
    """See :class:`~paceline.train.rounds.Rounds`.

    Attributes:
        asked_to_stop: Some rank of this replica was asked to, as all of them know.
    """

    asked_to_stop = False

    def attach(self, active: bool) -> None:
        """Backwards are told by :meth:`note`."""

    def note(self, weight: float) -> None:
        """A backward over so many rows of this replica."""
        self._weight += weight
        self._backwards += 1

    def leaves_out(self, optimizer: Optimizer) -> bool:
        """See :meth:`Rounds.leaves_out`. A gradient that is not finite was seen by all ranks of the replica when backward ended."""
        if self._loop.redo.skip:
            self._nonfinite += 1
            self._weight = 0.0
        elif not self._backwards:
            self._weight = 1.0
        return self._weight == 0.0

    def _stop(self) -> bool:
        return self.asked_to_stop


class SplitExchanging(Exchanging):
    """The rounds of a job whose replicas are split.

    Args:
        exchange: What stands last in the strategy.
        wire: Among the ranks that hold the same part.
        activity: Where to say what this rank does.
        loop: Where the job stands.
        sink: Where events go.
        desk: The job's.

    Raises:
        UsageError: PL204, the strategy needs what a split replica does not have.
    """

    def __init__(self, exchange: Exchange, wire: Wire, activity: Activity, loop: Loop, sink: Sink, desk: Desk) -> None:
        _refuse(exchange)
        super().__init__(exchange, wire, activity, loop, sink, desk, ())
        self._held_here: list[Held] = []

    def _make_rounds(
        self, wire: Wire, activity: Activity, loop: Loop, sink: Sink, desk: Desk, hosts: Sequence[int]
    ) -> Rounds:
        return SplitRounds(wire, activity, loop, sink, desk.change, desk.save, hosts)

    @property
    def own_rounds(self) -> SplitRounds:
        """The rounds."""
        assert isinstance(self.rounds, SplitRounds)
        return self.rounds

    @property
    def owners(self) -> Sequence[Replica | Member]:
        """See :attr:`Exchanging.owners`."""
        return self._held_here  # type: ignore[return-value]

    def add(self, label: str, model: nn.Module, held: Named) -> None:
        """Take part with what this rank holds of one more model."""
        self._held_here.append(Held(model, {p: name for name, p in held}, label))
        prefix = f"{label}."
        self.own_rounds.add(label, model, [(name.removeprefix(prefix), piece(p)) for name, p in held])
        self.settle()
        if self._held is not None:  # the first round has begun, and no step was taken
            self.own_rounds.begin()


def _refuse(exchange: Exchange) -> None:
    rounds = exchange.rounds
    assert rounds is not None
    if not isinstance(rounds.cadence, Every) or rounds.state != "local":
        message = f"{exchange.text}: replicas that are split end rounds after a number of steps, and keep their optimizer's state"
        raise UsageError("PL204", message, help="say every=8, state=local.")
