"""The members of an elastic run whose models are split: replicas may be lost, and come anew; the others go on.

What a rank holds no other rank of its replica has, so the replica is what is lost and what joins, whole (``launch`` ends what is left of
a broken one). Those who are left do the open step again, as in ``members``; torch's group is of one replica, so it is none the wiser.

A replica that joins is given the whole state when its script adopts its first model: the furthest of the others puts it together, and
every rank of the new one gets it, restores what it adopts, and splits it then. The others wait for its first backward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.exchange.axes import Mesh
from paceline.group.reunion import Epoch, Reunion
from paceline.group.wire import Wire
from paceline.terms.errors import WireError
from paceline.terms.event import Sink
from paceline.train import tree as trees
from paceline.train.ledger import Ledger
from paceline.train.loop import Loop
from paceline.train.members import Hands, Members

Given = tuple[trees.Tree, dict[str, Tensor]]
"""A state, as a skeleton and its tensors by name."""


@dataclass(frozen=True, slots=True)
class SplitHands:
    """What the job does for its members.

    Attributes:
        move: Be another rank of another world; where this rank stands then.
        leave: Close what this replica exchanges with others through.
        rewire: Make wires between those who are there now; all of them call it.
        settle: Exchange through them, and through this one of all. Those who have just come do it when they have a model.
        whole: Put the state together; all ranks of a replica call it, and the first gets it.
    """

    move: Callable[[Epoch], Mesh]
    leave: Callable[[], None]
    rewire: Callable[[Wire], None]
    settle: Callable[[Wire], None]
    whole: Callable[[], trees.Tree]


class SplitMembers(Members):
    """See :class:`~paceline.train.members.Members`.

    Args:
        reunion, joins, loop, ledger, sink: As there.
        hands: What the job does.
        layout: Where this rank stands.

    Attributes:
        given: The state that this rank joins with, once it has it.
    """

    def __init__(
        self,
        reunion: Reunion,
        joins: bool,
        loop: Loop,
        ledger: Ledger,
        sink: Sink,
        hands: SplitHands,
        layout: Mesh,
    ) -> None:
        none = Hands(_nothing, lambda: None, dict, _nothing, lambda epoch: hands.settle(epoch.wire))
        super().__init__(reunion, joins, loop, ledger, sink, none)
        self._does, self._layout = hands, layout
        self._is_member = not joins
        self.given: Given | None = None

    def begin(self) -> Wire:
        """The wire of the first adoption. Who joins gets the state of the run now."""
        epoch, _ = self._regroup(keep=True)
        return epoch.wire

    def join(self) -> None:
        """The loop begins, and this rank takes part in it."""
        if self.joining:
            self.joining = False
            self._loop.resplit(self._layout.reader, self._layout.readers)

    def _reads(self, epoch: Epoch) -> tuple[int, int]:
        return self._layout.reader, self._layout.readers

    @property
    def _applied(self) -> int:
        return self._loop.steps if self._is_member else -1

    def _leave(self) -> None:
        self._does.leave()
        super()._leave()

    def _enter(self, epoch: Epoch) -> None:
        self._wire = epoch.wire
        self._layout = self._does.move(epoch)

    def _record(self, epoch: Epoch) -> None:
        """The ledger knows those who count rows: of the ranks that read the same rows, the first."""
        layout = self._layout
        counting = tuple(name for rank, name in enumerate(epoch.names) if layout.among(rank, epoch.size).leads)
        self._ledger.group(epoch.number, self._loop.steps, counting, layout.reader)
        self._tell({"epoch": epoch.number, "rank": epoch.rank, "size": epoch.size, "members": list(epoch.names)})

    def _rewire(self, epoch: Epoch, keep: bool, redo: bool) -> None:
        self._does.rewire(epoch.wire)

    def _heal(self, epoch: Epoch) -> None:
        """Raise WireError PL423 where this replica is behind others: then it is ended, and built anew."""
        if len(set(epoch.applied)) == 1:
            return
        complete = furthest(epoch.applied, self._layout.inner)
        if self._is_member and epoch.rank - self._layout.part not in complete:
            step = max(epoch.applied)
            raise WireError("PL423", f"this replica has not applied step {step}, which others have; it is built anew")
        first = complete[0]
        self._hand_over(epoch, first, first <= epoch.rank < first + self._layout.inner)

    def _hand_over(self, epoch: Epoch, leader: int, leads: bool) -> None:
        """The whole state goes to those who join. All ranks take part."""
        raw, mine = b"", dict[str, Tensor]()
        if leads:
            tree = self._does.whole()
            if epoch.rank == leader:
                skeleton, mine = trees.flatten(tree)
                raw = json.dumps(skeleton).encode()
        skeleton = json.loads(epoch.wire.gather_bytes("state", raw)[leader])
        given: dict[str, Tensor] = {}
        for name, dtype, shape in sorted({(name, kind, tuple(shape)) for name, kind, shape in trees.leaves(skeleton)}):
            tensor = mine[name].contiguous() if mine else torch.empty(shape, dtype=trees.KINDS[dtype])
            epoch.wire.broadcast(tensor, leader)
            if not self._is_member:
                given[name] = tensor
        if not self._is_member:
            self.given, self._is_member = (skeleton, given), True
            self._loop.load_state_dict(skeleton["loop"])


def furthest(applied: Sequence[int], inner: int) -> list[int]:
    """The first ranks of the replicas that have come furthest, with all of their `inner` ranks.

    Args:
        applied: By rank, how many steps it has applied; -1 for one that has just come.

    Raises:
        WireError: PL427, there is none.
    """
    step = max(applied)
    found = [first for first in range(0, len(applied), inner) if min(applied[first : first + inner]) == step]
    if not found:
        said = ", ".join(f"rank {rank} at step {at}" for rank, at in enumerate(applied) if at >= 0)
        raise WireError("PL427", f"no replica of the model is whole: {said}")
    return found


def _nothing(_: object) -> None:
    return None
