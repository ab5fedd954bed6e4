"""The links of gossip: a rank mixes its parameters with those of its neighbours, and nobody waits for all.

D-PSGD (Lian et al., NIPS 2017): ``x_i = sum of W_ij x_j`` with a symmetric, doubly stochastic ``W``.
Push-sum (SGP, Assran et al., ICML 2019, 1811.10792): a rank sends ``p (x, w)`` along directed edges and keeps a part, all parts adding
up to one; the parameters of the model are ``z = x / w``. Mixing keeps ``sum of x`` and ``sum of w``.

A *full* round (the end of a pass, before an evaluation, a checkpoint) is a mean over all ranks, from which all go on: gossip with
periodic global averaging (Chen et al., ICML 2021, 2105.09080).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.exchange.graphs import Graph
from paceline.exchange.link import Message, State
from paceline.exchange.merge import Mean
from paceline.terms.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor

_FULL = "  full      at the end of a pass, before an evaluation and a checkpoint: all go on from the mean of all"
_ALONE = "  alone     nothing is sent, and nothing happens to the parameters"


@dataclass(frozen=True, slots=True)
class Gossip:
    """Mix with the neighbours on an undirected graph."""

    graph: Graph

    def init(self, bucket: Bucket) -> State:
        """Nothing is remembered."""
        return {}

    async def __call__(self, message: Message, state: State) -> None:
        """One mixing; sums are in the order of ranks."""
        from paceline.group.wire import Receive, Send, Together

        if message.size == 1:
            return
        if message.full:
            message.header[0] = message.divisor = 1.0
            await Mean()(message)
            return
        row, mine, tag = self.graph.mixing(message.size)[message.rank], message.payload, message.buffer.key
        there = {j: mine.new_empty(mine.shape) for j, w in enumerate(row) if w and j != message.rank}
        receives = tuple(Receive(j, into, tag) for j, into in there.items())
        await Together(receives + tuple(Send(j, mine, tag) for j in there))
        there[message.rank] = mine
        total = sum_of([(row[j], there[j]) for j in sorted(there)])
        mine.copy_(total)

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each."""
        return "\n".join(
            (
                "gossip",
                "  sends     parameters: one message per bucket and neighbour, every round",
                f"  to        its neighbours on the graph {self.graph.name}",
                "  encoded   not at all",
                "  merged    with Metropolis weights; ranks hold different parameters between full rounds",
                _FULL,
                _ALONE,
            )
        )


@dataclass(frozen=True, slots=True)
class PushSum:
    """Push a part of parameters and mass along directed edges."""

    graph: Graph

    def init(self, bucket: Bucket) -> State:
        """The mass ``w`` of this rank, and how often it has mixed."""
        import torch

        return {"mass": torch.ones(1, dtype=torch.float64), "turn": 0}

    async def __call__(self, message: Message, state: State) -> None:
        """One mixing. The payload comes in as ``z`` and leaves as ``z``; ``x = z w`` lives only in here."""
        payload, mass = message.payload, state["mass"]
        if message.size == 1:
            mass.fill_(1.0)
            return
        if message.full:
            message.header[0], message.divisor = float(mass), 1.0
            await Mean()(message)
            mass.fill_(1.0)
            return
        sends = self.graph.sends(message.size, state["turn"])
        state["turn"] += 1
        out = sends[message.rank]
        parcel = _pack(payload * (float(mass) / (len(out) + 1)), mass / (len(out) + 1))
        parcels = await self._swap(message, parcel, out, [r for r, to in enumerate(sends) if message.rank in to])
        parts = [_unpack(parcels[r], payload) for r in sorted(parcels)]
        mass.copy_(sum_of([(1.0, w) for _, w in parts]))
        payload.copy_(sum_of([(1.0, x) for x, _ in parts]).div_(float(mass)))

    async def _swap(self, message: Message, parcel: Tensor, out: list[int], into: list[int]) -> dict[int, Tensor]:
        """Mass and parameters travel as one message, so that none is lost without the other."""
        from paceline.group.wire import Receive, Send, Together

        there = {rank: parcel.new_empty(parcel.shape) for rank in into}
        tag = message.buffer.key
        receives = tuple(Receive(rank, mine, tag) for rank, mine in there.items())
        await Together(receives + tuple(Send(rank, parcel, tag) for rank in out))
        return {**there, message.rank: parcel}

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each."""
        return "\n".join(
            (
                "push-sum",
                "  sends     an equal part of parameters and mass: one message per bucket and receiver, every round",
                f"  to        the next ranks on the directed graph {self.graph.name}",
                "  encoded   not at all",
                "  merged    sums of what arrives; gradients are taken at, and the model holds, parameters / mass",
                _FULL,
                _ALONE,
            )
        )


def sum_of(terms: list[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum, in the order given, in new memory."""
    (weight, first), *rest = terms
    total = first * weight
    for weight, term in rest:
        total.add_(term, alpha=weight)
    return total


def _pack(x: Tensor, mass: Tensor) -> Tensor:
    import torch

    return torch.cat([mass.to(x.device).view(torch.uint8), x.contiguous().view(torch.uint8)])


def _unpack(parcel: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    return parcel[8:].view(like.dtype), parcel[:8].view(torch.float64)
