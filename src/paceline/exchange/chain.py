"""A chain of links, the optimizer among them, and what a recipe makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from paceline.exchange.axes import Axis
from paceline.exchange.cadence import Cadence, Every, Pace
from paceline.exchange.link import Anchored, Link, Message, State
from paceline.exchange.service import Service
from paceline.terms.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The user's optimizer's place in the chain. Its work is done by the user's own ``opt.step()``."""

    def describe(self) -> str:
        """One line for ``describe()``."""
        return "optimizer   the script's own, on every rank, at opt.step()"


optimizer = Optimizer()


@dataclass(frozen=True, slots=True)
class Chain:
    """Links in order; exactly one :class:`Optimizer` among them.

    Attributes:
        gradient_links: Before the optimizer: run bucket by bucket while backward runs.
        parameter_links: After it: run bucket by bucket when ``opt.step()`` has been called.
    """

    gradient_links: tuple[Link, ...]
    parameter_links: tuple[Link, ...] = ()

    def init(self, bucket: Bucket) -> list[State]:
        """The chain's state for one bucket: one tree a link, in order."""
        return [link.init(bucket) for link in (*self.gradient_links, *self.parameter_links)]

    async def exchange_gradients(self, message: Message, states: list[State]) -> Message:
        """The part before the optimizer. Awaits only requests of the wire.

        The payload comes in scaled by its weight and leaves as a gradient: the global one, or where no link has exchanged
        it, this rank's own.
        """
        for link, state in zip(self.gradient_links, states, strict=False):
            await link(message, state)
        if not message.exchanged and message.header[0]:
            message.payload.mul_(message.divisor / message.header[0])
        return message

    async def exchange_parameters(self, message: Message, states: list[State]) -> Message:
        """The part after the optimizer."""
        for link, state in zip(self.parameter_links, states[len(self.gradient_links) :], strict=True):
            await link(message, state)
        return message

    def begin(self, payload: Tensor, states: list[State]) -> None:
        """The first round begins with the parameters in `payload`."""
        for link, state in zip(self.parameter_links, states[len(self.gradient_links) :], strict=True):
            if isinstance(link, Anchored) and not state:
                link.begin(payload, state)

    def describe(self) -> str:
        """What the links say of themselves, in the order in which they act."""
        links: tuple[Link | Optimizer, ...] = (*self.gradient_links, optimizer, *self.parameter_links)
        return "\n".join(link.describe() for link in links)


def chain(*links: Link | Optimizer) -> Chain:
    """Put links in order. Raises ValueError unless exactly one element is ``optimizer``."""
    places = [i for i, link in enumerate(links) if isinstance(link, Optimizer)]
    if len(places) != 1:
        raise ValueError(f"a chain has exactly one optimizer, this one has {len(places)}")
    before = tuple(link for link in links[: places[0]] if not isinstance(link, Optimizer))
    after = tuple(link for link in links[places[0] + 1 :] if not isinstance(link, Optimizer))
    return Chain(before, after)


_PARAMS = {
    "private": "private: every rank has its own copy of parameters and optimizer state",
    "shared": "shared: one copy on each host; every rank updates its slice in place at opt.step()",
}


_STATE = {
    "local": "every rank keeps its own",
    "average": "averaged over ranks with every round",
    "reset": "begins anew with every round",
}


@dataclass(frozen=True, slots=True)
class Rounds:
    """How the links behind the optimizer are run.

    Attributes:
        cadence: When a round ends; with fragments: when the next one is due.
        state: What happens to the state of the script's optimizer when a round ends.
        fragments: Into how many parts the parameters are cut; each round exchanges one of them, in turn.
        overlap: The exchange begins so many steps before the round ends.
        blend: How much of the parameters of the steps made meanwhile is kept.
        level: All ranks hold the same parameters after every round; else after a full one only.
    """

    cadence: Cadence = field(default_factory=Every)
    state: Literal["local", "average", "reset"] = "local"
    fragments: int = 1
    overlap: int = 0
    blend: float = 0.0
    level: bool = True

    def fragment(self, turn: int) -> int:
        """Which part the round number `turn` exchanges; the same on all ranks, as all have ended as many rounds."""
        return turn % self.fragments

    def sends(self, since: int) -> bool:
        """Whether an exchange that overlaps with steps begins after `since` steps of a round."""
        return bool(self.overlap) and self.cadence.due(since + self.overlap, Pace())

    def describe(self) -> str:
        """When, and what else."""
        lines = [f"  when      {self.cadence.describe()}, and at the end of a pass over the data"]
        if self.fragments > 1:
            lines.append(
                f"  parts     {self.fragments}, layers in turn; one of them each time, all at the end of a pass"
            )
        if self.overlap:
            lines.append(
                f"  overlap   sent {self.overlap} steps before; {self.blend:g} of what was learned meanwhile is kept"
            )
        lines.append(f"  state     of the optimizer: {_STATE[self.state]}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a recipe returns: the chain, and what it asks of placement.

    Attributes:
        chain: The links.
        params: ``private``: each rank has its own copy of parameters and optimizer state. ``shared``: one copy per host,
            every rank updates its slice in place.
        bucket_mb: Upper bound of a bucket in MiB (2^20 bytes), or None for placement's choice.
        text: Canonical strategy text; parsing it gives this value again.
        shards: Into how many parts each global batch is cut, whatever the number of ranks; 0: one for each rank.
        service: What is asked of parameter servers, where the strategy has some: then the chain is empty.
        rounds: How the links behind the optimizer are run, where there are any.
        phases: Strategies that follow each other, with the step after which each begins; empty where there is one only.
        ranks: How many take part, where the strategy says so.
        axes: How each replica is split over ranks, innermost first; empty where a replica is one rank.
        votes: Before each step all ranks tell each other what they have come to.
    """

    chain: Chain
    params: Literal["private", "shared"] = "private"
    bucket_mb: float | None = None
    text: str = "ddp()"
    shards: int = 0
    service: Service | None = None
    rounds: Rounds | None = None
    phases: tuple[tuple[int, Exchange], ...] = ()
    ranks: int | None = None
    axes: tuple[Axis, ...] = ()
    votes: bool = False

    def at(self, step: int) -> Exchange:
        """What is in force after `step` steps."""
        return [self, *(phase for start, phase in self.phases if start <= step)][-1]

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged; then what is asked of placement."""
        if self.service is not None:
            return f"strategy    {self.text}\n{self.service.describe()}"
        if self.phases:
            told = (f"after step {start}\n{phase.describe()}" for start, phase in self.phases)
            return "\n".join((f"strategy    {self.text}", *told))
        links = self.chain.describe()
        if self.rounds is not None:
            links += "\n" + self.rounds.describe()
        buckets = "size chosen by placement" if self.bucket_mb is None else f"at most {self.bucket_mb:g} MiB each"
        return "\n".join(
            (
                f"strategy    {self.text}",
                links,
                f"parameters  {_PARAMS[self.params]}",
                f"buckets     {buckets}",
            )
        )
