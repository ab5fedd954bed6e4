"""Links on a chain: the position names the algorithm.

``chain(allreduce(), optimizer)`` is synchronous SGD. A link before the optimizer works on gradients, while backward runs;
a link after it works on parameters, when ``opt.step()`` has been called. A link is a frozen value; what it remembers
lives in the state tree that it is handed. Its body is a coroutine that awaits only the wire, so the code reads from top
to bottom as the algorithm: encode, send, merge, decode.

[Note: values without torch] Links, chains and recipes are plain values; torch is imported where tensors are touched, inside
the bodies. So the door checks and describes a strategy before the seconds that ``import torch`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from paceline.terms.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.group.wire import Buffer

State = dict[str, Any]
"""What one link remembers for one bucket: tensors, numbers, or nested dictionaries of these."""


@dataclass
class Message:
    """What travels down the chain for one bucket in one step. Links change it in place.

    Attributes:
        bucket: Description of the bucket.
        buffer: The wire's memory; ``buffer.tensor`` is the payload: gradients before the optimizer, parameters after it.
        header: Numbers for the wire; ``header[0]`` is this rank's weight. After an exchange: the sums over ranks.
        divisor: What the payload was divided by when it was scaled by its weight: payload = weight / divisor * gradient.
        rank, size: This rank and the world size.
        step: Optimizer steps applied so far.
        hosts: For each rank the index of its host; empty when all are on one.
        exchanged: True once the payload is the global mean.
        wide: Two words of float64 for each element of the payload, for links that sum in fixed point.
        shard, first, last: Which part of this rank's share of the batch the payload is of, where it comes in several.
        full: All ranks are to leave with the same parameters.
    """

    bucket: Bucket
    buffer: Buffer
    header: list[float]
    divisor: float = 1.0
    rank: int = 0
    size: int = 1
    step: int = 0
    hosts: Sequence[int] = ()
    exchanged: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    wide: Buffer | None = None
    shard: int = 0
    first: bool = True
    last: bool = True
    full: bool = False

    @property
    def payload(self) -> Tensor:
        return self.buffer.tensor


@runtime_checkable
class Link(Protocol):
    """One element of a chain: a frozen dataclass with these three methods."""

    def init(self, bucket: Bucket) -> State:
        """The state for one bucket at step 0. State that is not returned here does not exist."""

    async def __call__(self, message: Message, state: State) -> None:
        """Work on the message in place; await nothing but requests of ``group.wire``."""

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each, under the name of the link."""


@runtime_checkable
class Anchored(Protocol):
    """A link behind the optimizer that remembers parameters from round to round."""

    def begin(self, payload: Tensor, state: State) -> None:
        """The first round begins; `payload` holds the parameters. Not called for a state that was restored."""
