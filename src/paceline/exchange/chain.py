"""A chain of links, the optimizer among them, and what a recipe makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paceline.exchange.link import Link, Message, State
from paceline.exchange.service import Service
from paceline.terms.bucket import Bucket


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
    """

    chain: Chain
    params: Literal["private", "shared"] = "private"
    bucket_mb: float | None = None
    text: str = "ddp()"
    shards: int = 0
    service: Service | None = None

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged; then what is asked of placement."""
        if self.service is not None:
            return f"strategy    {self.text}\n{self.service.describe()}"
        buckets = "size chosen by placement" if self.bucket_mb is None else f"at most {self.bucket_mb:g} MiB each"
        return "\n".join(
            (
                f"strategy    {self.text}",
                self.chain.describe(),
                f"parameters  {_PARAMS[self.params]}",
                f"buckets     {buckets}",
            )
        )
