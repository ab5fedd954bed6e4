"""What ranks exchange at present, gradients with every backward or parameters with every round, and the change from one to the other.

A round of a loop with one optimizer ends inside ``opt.step()``; with several of them where the loop asks for its next batch, so that
what has to be done again when a member is lost is always whole rounds of the user's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from paceline.exchange.chain import Exchange
from paceline.group.wire import Wire
from paceline.place.replicate import Replica
from paceline.terms.activity import Activity
from paceline.terms.errors import AdoptError, PeerLost
from paceline.terms.event import Event, Sink
from paceline.train import adopt as adoption
from paceline.train import tree as trees
from paceline.train.loop import Loop
from paceline.train.rounds import Member, News, Rounds
from paceline.train.step import Stepper


class Group(Protocol):
    """The members of an elastic run, see ``members``."""

    @property
    def change(self) -> bool: ...
    def lost(self, in_step: bool) -> None: ...
    def lost_in_round(self, redo: bool) -> bool: ...


@dataclass(frozen=True, slots=True)
class Desk:
    """What the job tells.

    Attributes:
        group: Hears of members that were lost; None: members do not change, so nothing is ever undone.
        save: A checkpoint is due here.
        things: All that makes up the state of the job.
    """

    group: Group | None
    save: Callable[[], bool]
    things: Callable[[], trees.Things]

    def change(self) -> bool:
        """Somebody waits to join, as far as this rank knows."""
        return self.group is not None and self.group.change


class Exchanging:
    """The exchange of a job.

    Args:
        exchange: The strategy.
        wire: The wire of this job.
        activity: Where to say what this rank does.
        loop: Where this rank stands.
        sink: Where events go.
        desk: The job's.
        hosts: For each rank the index of its host.

    Attributes:
        stepper: Exchanges gradients; None where the strategy never does.
        rounds: Exchanges parameters; None where it never does.
    """

    def __init__(
        self,
        exchange: Exchange,
        wire: Wire,
        activity: Activity,
        loop: Loop,
        sink: Sink,
        desk: Desk,
        hosts: Sequence[int],
    ) -> None:
        self._exchange, self._loop, self._sink, self._desk = exchange, loop, sink, desk
        hosts = hosts if len(set(hosts)) > 1 else ()
        phases = [phase for _, phase in exchange.phases] or [exchange]
        self.stepper: Stepper | None = None
        self.rounds: Rounds | None = None
        self._now: Exchange | None = None
        self._held: tuple[trees.Tree, dict[str, Tensor]] | None = None
        self._optimizers = 0
        together = [phase for phase in phases if phase.rounds is None]
        if together:
            self.stepper = Stepper(
                wire,
                together[0],
                activity,
                scale=loop.scale,
                steps=lambda: loop.steps,
                place=loop,
                on_verdict=loop.on_verdict,
                change=desk.change,
                on_lost=desk.group.lost if desk.group is not None else None,
                hosts=hosts,
            )
        if len(together) < len(phases):
            self.rounds = self._make_rounds(wire, activity, loop, sink, desk, hosts)
            loop.on_iteration, loop.on_close = self.at_iteration, lambda: self.close(full=True)
            loop.on_begin_round = self.begin_round

    def _make_rounds(
        self, wire: Wire, activity: Activity, loop: Loop, sink: Sink, desk: Desk, hosts: Sequence[int]
    ) -> Rounds:
        return Rounds(wire, activity, loop, sink, desk.change, desk.save, hosts)

    @property
    def local(self) -> bool:
        """Ranks step on their own at present, or will."""
        return self.rounds is not None

    @property
    def owners(self) -> Sequence[Replica | Member]:
        """Who owns parameters."""
        if self.stepper is not None:
            return self.stepper.replicas
        return self.rounds.members if self.rounds is not None else ()

    # ---- adoption -------------------------------------------------------------------------------------------------
    def place(self, models: dict[str, nn.Module]) -> None:
        """Take part with these models. All ranks place the same ones in the same order."""
        for label, model in models.items():
            taken = {p for owner in self.owners for p in owner.names}
            params = adoption.trainable(model, taken)
            if not params:
                continue
            if self.stepper is not None:
                self.stepper.add(model, [(f"{label}.{name}", p) for name, p in params])
            if self.rounds is not None:
                self.rounds.add(label, model, params)
            text = replicated(params, self._exchange)
            self._sink(Event("place", self._loop.steps, {"model": label, "text": text, "svg": ""}))
        self.settle()

    def own(self, given: adoption.Adopted) -> None:
        """Know the optimizers. Raises AdoptError PL210 for a gradient scaler where ranks step on their own."""
        self._optimizers += len(given.optimizers)
        if self.rounds is not None:
            self.rounds.remembered.optimizers += given.optimizers
            if given.scalers:
                message = "a gradient scaler leaves out steps, each rank others, and ranks that step on their own must be in step"
                raise AdoptError("PL210", message)

    # ---- phases -----------------------------------------------------------------------------------------------------
    def settle(self, steps: int | None = None, *, build: bool = True) -> None:
        """Be what the strategy says for the present step.

        Args:
            steps: The step; None: the loop's.
            build: Get memory now; else when the wire has changed.
        """
        now = self._exchange.at(self._loop.steps if steps is None else steps)
        if now is self._now:
            return
        self._now = now
        local = now.rounds is not None
        if self.stepper is not None:
            if not local:
                self.stepper.use(now)
            self.stepper.attach(not local)
        if self.rounds is not None:
            if local:
                self.rounds.use(now)
                if build:
                    self.rounds.build()
            else:
                self.rounds.rest()
            self.rounds.attach(local)
        self._loop.be_local(local)
        self._loop.level = True
        self._held = None

    def rewire(self, wire: Wire, hosts: Sequence[int]) -> None:
        """Exchange parameters through `wire` from now on."""
        if self.rounds is not None:
            self.rounds.rewire(wire, hosts)

    # ---- steps ------------------------------------------------------------------------------------------------------
    def stepped(self) -> None:
        """A step was taken and committed."""
        if self._loop.local:
            assert self.rounds is not None
            try:
                self.rounds.stepped()
            except PeerLost:
                if self._desk.group is None:
                    raise
                self._desk.group.lost_in_round(self._loop.repeatable)
                return
            self._loop.round_due = self._changes or self.rounds.due
        if self._optimizers == 1:
            self.at_iteration()

    @property
    def _changes(self) -> bool:
        """Another phase begins here."""
        return self._exchange.at(self._loop.steps) is not self._now

    def at_iteration(self) -> None:
        """Between two rounds of the user's loop: end the round that is due, or go on to the next phase."""
        if self._loop.round_due and self.close(full=self._changes):
            return
        if self._loop.save_due:
            self._loop.save_due = False
            self.close(full=True)
        if not self._loop.round_open:
            self.settle()

    def without_loader(self) -> None:
        """A step begins in a loop that asks no loader for its batches."""
        if self._loop.local:
            self.at_iteration()
            if not self._loop.round_open:
                self.begin_round()

    def remember_statistics(self) -> None:
        """A batch that comes in shards begins."""
        if self.stepper is not None:
            self.stepper.remember_statistics()

    def begin_round(self) -> None:
        """Between two rounds. Where members may be lost, everything that a round changes is copied: that is what is returned to."""
        assert self.rounds is not None
        if self._held is None:
            self.rounds.begin()
            self._held = ({}, {})
        if not self._held[0] and self._desk.group is not None and self._loop.size > 1:
            skeleton, tensors = trees.flatten(trees.capture(self._undoable()))
            self._held = skeleton, {name: t.clone() for name, t in tensors.items()}

    def _undoable(self) -> trees.Things:
        """What a round changes, without where the loaders stand, which the loop knows."""
        return self._desk.things().without_place()

    def close(self, *, full: bool, redo: bool = True) -> bool:
        """End the open round, if there is one.

        Args:
            full: All ranks are to have the same parameters, also where the strategy does not ask for it after every round.
            redo: The loop goes on afterwards, so that rows may be given to it again.

        Returns:
            True: a member was lost, the round was undone, and the loop does it again.
        """
        if self.rounds is None or not self._loop.local:
            return False
        while self.rounds.owes(full):
            try:
                if full and self.rounds.under_way:
                    self._count(self.rounds.exchange(full=False))
                self._count(self.rounds.exchange(full=full))
            except PeerLost:
                if self._desk.group is None:
                    raise
                again = redo and self._loop.repeatable
                if self._desk.group.lost_in_round(again):
                    return True
                if not again:
                    self.say_lost_rows()
        return False

    def _count(self, news: News) -> None:
        assert self.rounds is not None
        self._loop.close_round(stop=news.stop, change=news.change)
        self._loop.level = self.rounds.level
        self._loop.save_due = news.save and not self.rounds.level
        self._held = None

    def roll_back(self, *, redo: bool) -> None:
        """The open round is undone; without `redo` only in what links remember, and its steps stay."""
        if self.rounds is None or not self._loop.local:
            return
        self.rounds.drop()
        if self._held is None or not self._held[0]:
            return
        skeleton, tensors = self._held
        tree = trees.unflatten(skeleton, {name: t.clone() for name, t in tensors.items()})
        if redo:
            trees.restore(self._undoable(), tree)
            for p in (p for member in self.rounds.members for p in member.names):
                p.grad = None
        else:
            since = self.rounds.open_steps
            self.rounds.load_state_dict(tree["chain"])
            self.rounds.keep_steps(*since)

    def forget_copy(self) -> None:
        """The state has come from elsewhere."""
        self._held = None
        self._loop.level = self.rounds is None or self.rounds.level

    def say_lost_rows(self) -> None:
        """The loop is over, and cannot train on what a lost member had trained on since the last round."""
        message = "a worker was lost in the last round of a loop that had ended: what it had learned in it is missing"
        self._sink(Event("notice", self._loop.steps, {"message": message}))

    def close_down(self) -> None:
        """Take all hooks away."""
        if self.stepper is not None:
            self.stepper.close()
        if self.rounds is not None:
            self.rounds.drop()
            self.rounds.attach(False)


def replicated(params: Sequence[tuple[str, nn.Parameter]], exchange: Exchange) -> str:
    """Where the parameters of an unsplit model are: all of them on every rank."""
    width = max(len(name) for name, _ in params)
    rows = [f"{name:<{width}}  {tuple(p.shape)!s:<18} {p.nbytes:>13,} bytes  on every rank" for name, p in params]
    total = sum(p.nbytes for _, p in params)
    what = "parameters, every round" if exchange.rounds is not None else "gradients, every step"
    return "\n".join([*rows, f"in all {total:,} bytes on each rank; exchanged: as many bytes of {what}"])
