"""The members of an elastic run: they may die, freeze, come late or come back, and those who are left go on.

What happens when one is lost, to those who are left:

1. The exchange that missed it ends with PeerLost on every rank, or on none: what the dead have published stays, what they have not
   published never comes, so all see the same. (Where that is not certain, after a frozen process or between hosts, 4 mends it.)
2. They leave the wire and meet (``group.reunion``); nothing of the old wire reaches the new one.
3. Buckets and loaders are cut anew for the new ranks. The step in which the member was lost was applied by nobody, and is done
   again (``redo``).
4. Who has applied fewer steps than another, or has just come, gets everything from the one who has come furthest: models,
   optimizers, schedules, kept objects, positions of the loaders (``tree``).

Who comes late builds its model like everybody, joins where its loop begins, and starts at the batch where the others are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.group.reunion import Epoch, Reunion
from paceline.group.solo_wire import SoloWire
from paceline.group.wire import Wire
from paceline.terms.errors import PeerLost
from paceline.terms.event import Event, Sink
from paceline.train import tree as trees
from paceline.train.exchanging import Exchanging
from paceline.train.ledger import Ledger
from paceline.train.loop import Loop


@dataclass(frozen=True, slots=True)
class Hands:
    """What the job does for its members.

    Attributes:
        move: Be another rank of another world, through another wire.
        exchanging: Who exchanges, once something was adopted.
        capture: The state of the job, as references.
        restore: Take over a state.
        divide: Divide the work of optimizers anew.
    """

    move: Callable[[Epoch], None]
    exchanging: Callable[[], Exchanging | None]
    capture: Callable[[], Any]
    restore: Callable[[Any], None]
    divide: Callable[[Epoch], None]


class Members:
    """This process among the members.

    Args:
        reunion: How they meet.
        joins: The job has begun without this process.
        loop, ledger, sink: The job's.
        hands: What the job does.

    Attributes:
        joining: This process has not met the others yet.
    """

    def __init__(self, reunion: Reunion, joins: bool, loop: Loop, ledger: Ledger, sink: Sink, hands: Hands) -> None:
        self.joining = joins
        self._reunion, self._loop, self._ledger, self._sink, self._hands = reunion, loop, ledger, sink, hands
        self._wire: Wire | None = None
        self._told = False
        loop.on_boundary = self.at_boundary

    def begin(self) -> Wire:
        """The wire of the first adoption. Who joins later has none yet, and meets the others when its loop begins."""
        if self.joining:
            self._wire = SoloWire()
            return self._wire
        epoch = self._reunion.meet(self._loop.steps)
        self._enter(epoch)
        self._record(epoch)
        return epoch.wire

    def join(self) -> None:
        """The loop begins: become a member."""
        if self.joining:
            epoch, _ = self._regroup(keep=True)
            self._loop.resplit(*self._reads(epoch))
            self.joining = False

    def _reads(self, epoch: Epoch) -> tuple[int, int]:
        """Which part of each batch this rank reads, and how many there are."""
        return epoch.rank, epoch.size

    @property
    def change(self) -> bool:
        """Somebody waits to join, and can: who begins late must be told in which epoch it is."""
        if not self._reunion.member.pending:
            return False
        if not self._loop.in_epochs and not self._told:
            self._told = True
            message = "a worker waits to join, and cannot: the script does not loop over job.epochs(n)"
            self._sink(Event("notice", self._loop.steps, {"code": "PL311", "message": message}))
        return self._loop.in_epochs

    def at_boundary(self) -> None:
        """All ranks are between two steps, because somebody waits to join."""
        self._reunion.member.at_boundary(self._loop.steps)
        epoch, _ = self._regroup(keep=True)
        self._loop.resplit(*self._reads(epoch))

    def lost(self, in_step: bool) -> None:
        """A member was lost in an exchange.

        Args:
            in_step: In the exchange of a backward, which is forgotten; else in a call that will be made again.
        """
        if self._loop.round_open:
            self.lost_in_round(self._loop.repeatable)
            return
        epoch, healed = self._regroup(keep=not in_step)
        if in_step or healed or self._loop.holds_batch:
            self._loop.abort(*self._reads(epoch), healed=healed)
        else:
            self._loop.resplit(*self._reads(epoch))

    def lost_in_round(self, redo: bool) -> bool:
        """A member was lost while ranks stepped on their own, or exchanged what came of it.

        Args:
            redo: The loop can do the open round again. Else it counts without what the lost member has contributed.

        Returns:
            The round was undone, or done by others: the loop goes on from their state.
        """
        opened = self._loop.round_open
        epoch, healed = self._regroup(keep=True, redo=redo)
        if (opened and redo) or healed:
            self._loop.rewind(epoch.rank, epoch.size)
            return True
        self._loop.resplit(epoch.rank, epoch.size)
        return False

    def lost_in_optimizer(self) -> None:
        """A member was lost while the optimizer stepped: that step is finished by those who are left."""
        epoch, _ = self._regroup(keep=True)
        self._loop.resplit_later(epoch.rank, epoch.size)

    def _regroup(self, *, keep: bool, redo: bool = True) -> tuple[Epoch, bool]:
        """Meet, and agree with those who are there. The second result: this rank was behind, and was given the state."""
        while True:
            self._leave()
            applied = self._applied
            epoch = self._reunion.meet(applied)
            try:
                self._enter(epoch)
                self._rewire(epoch, keep, redo)
                self._heal(epoch)
                self._hands.divide(epoch)
            except PeerLost:
                continue
            self._record(epoch)
            return epoch, applied < max(epoch.applied)

    @property
    def _applied(self) -> int:
        """Steps that this rank has applied, as it tells the others."""
        return -1 if self.joining else self._loop.settled_steps

    def _leave(self) -> None:
        """Nothing more is exchanged in this epoch."""
        if self._wire is not None:
            self._wire.close()

    def _enter(self, epoch: Epoch) -> None:
        self._wire = epoch.wire
        self._hands.move(epoch)

    def _record(self, epoch: Epoch) -> None:
        self._ledger.group(epoch.number, self._loop.settled_steps, epoch.names, epoch.rank)
        self._tell({"epoch": epoch.number, "rank": epoch.rank, "size": epoch.size, "members": list(epoch.names)})

    def _tell(self, view: dict[str, Any]) -> None:
        self._sink(Event("view", self._loop.steps, view))

    def _rewire(self, epoch: Epoch, keep: bool, redo: bool) -> None:
        """Buckets move to the new wire, cut as the leader's are."""
        exchanging = self._hands.exchanging()
        if exchanging is None:
            return
        replicas = exchanging.stepper.replicas if exchanging.stepper is not None else []
        mine = [(replica.order(), replica.measuring) for replica in replicas], self._loop.settled_steps
        said = epoch.wire.gather_bytes("regroup", json.dumps(mine).encode() if epoch.rank == epoch.leader else b"")
        theirs, steps = json.loads(said[epoch.leader])
        hosts = epoch.hosts if len(set(epoch.hosts)) > 1 else ()
        exchanging.settle(steps, build=False)
        for replica, (_, measuring) in zip(replicas, theirs, strict=True):
            replica.measure(measuring)
        if exchanging.stepper is not None:
            exchanging.stepper.rewire(epoch.wire, hosts, [order for order, _ in theirs], keep=keep)
        exchanging.rewire(epoch.wire, hosts)
        if self._loop.round_open:
            exchanging.roll_back(redo=redo)

    def _heal(self, epoch: Epoch) -> None:
        """Everybody who is behind gets the leader's state; the others take part, and keep what they have."""
        if len(set(epoch.applied)) == 1:
            return
        behind = epoch.applied[epoch.rank] < max(epoch.applied)
        mine: dict[str, Tensor] = {}
        raw = b""
        if not behind:
            skeleton, mine = trees.flatten(self._hands.capture())
            raw = json.dumps(skeleton).encode() if epoch.rank == epoch.leader else b""
        skeleton = json.loads(epoch.wire.gather_bytes("state", raw)[epoch.leader])
        given: dict[str, Tensor] = {}
        for name, dtype, shape in sorted(set(map(_hashable, trees.leaves(skeleton)))):
            given[name] = _target(mine.get(name), trees.KINDS[dtype], shape)
            epoch.wire.broadcast(given[name], epoch.leader)
        if behind:
            self._hands.restore(trees.unflatten(skeleton, given))
            if (exchanging := self._hands.exchanging()) is not None:
                exchanging.forget_copy()

    def close(self, why: str) -> None:
        """The script has ended: ``finished``, ``failed``."""
        self._reunion.member.leave(why)
        self._reunion.member.close()


def _hashable(leaf: tuple[str, str, list[int]]) -> tuple[str, str, tuple[int, ...]]:
    name, dtype, shape = leaf
    return name, dtype, tuple(shape)


def _target(mine: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Where a broadcast may be put down: who has the same bits already overwrites them with themselves."""
    if mine is not None and mine.dtype is dtype and mine.shape == torch.Size(shape):
        return mine.contiguous()
    return torch.empty(tuple(shape), dtype=dtype)
