"""How the contributions of all ranks become one: a weighted mean, or what a few wild ones cannot move.

A merge is a frozen value whose body is a coroutine: it leaves the same bits in the payload on every rank. ``header[0]`` is the
weight of this rank's payload; a weight of 0 does not count, whatever the payload holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from paceline.exchange.allreduce import AllReduceMean
from paceline.exchange.arguments import one_of
from paceline.exchange.codec import CODECS, Codec
from paceline.exchange.link import Message
from paceline.terms.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Merge(Protocol):
    """A frozen value."""

    @property
    def name(self) -> str:
        """Its text in a strategy."""

    async def __call__(self, message: Message) -> None:
        """Leave the merged payload in ``message.payload``."""

    def describe(self) -> str:
        """One phrase."""


@dataclass(frozen=True, slots=True)
class Mean:
    """``sum of w_r x_r / sum of w_r``.

    Args:
        codec: How payloads travel, or None to send them as they are.
    """

    codec: Codec | None = None

    @property
    def name(self) -> str:
        """Its text in a strategy."""
        return "mean"

    async def __call__(self, message: Message) -> None:
        """Through the wire's own all-reduce."""
        weigh(message)
        await AllReduceMean(self.codec)(message, {})

    def describe(self) -> str:
        """One phrase."""
        return "mean over ranks, weighted by the rows that each has trained on"


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Element by element the mean of what is left without the `part` largest and the `part` smallest; rows do not count.

    Yin et al., *Byzantine-Robust Distributed Learning*, ICML 2018. Each rank gathers the payloads of all others.
    """

    part: float

    @property
    def name(self) -> str:
        """Its text in a strategy."""
        return f"trimmed({self.part!r})"

    async def __call__(self, message: Message) -> None:
        """Gather, sort, mean."""
        import torch

        rows = torch.stack(await gathered(message)).sort(0).values
        cut = int(self.part * len(rows))
        message.payload.copy_(rows[cut : len(rows) - cut].mean(0))

    def describe(self) -> str:
        """One phrase."""
        return f"element by element the mean without the {self.part:.0%} largest and smallest; rows do not count"


@dataclass(frozen=True, slots=True)
class Median:
    """Element by element the median, of an even number the mean of the middle two; rows do not count."""

    @property
    def name(self) -> str:
        """Its text in a strategy."""
        return "median"

    async def __call__(self, message: Message) -> None:
        """Gather, sort, middle."""
        import torch

        rows = torch.stack(await gathered(message)).sort(0).values
        message.payload.copy_((rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / 2)

    def describe(self) -> str:
        """One phrase."""
        return "element by element the median; rows do not count"


def weigh(message: Message) -> None:
    """``payload <- weight / divisor * payload``. Not a product where the weight is 0: zero times NaN is NaN."""
    factor = message.header[0] / message.divisor
    if factor == 0.0:
        message.payload.zero_()
    elif factor != 1.0:
        message.payload.mul_(factor)


async def gathered(message: Message) -> list[Tensor]:
    """The payloads of all ranks that have a weight, in the order of ranks; if none has, those of all."""
    from paceline.group.wire import AllGather

    tag = f"merge {message.buffer.key}"
    weight = message.payload.new_full((1,), float(message.header[0] > 0))
    weights = await AllGather(weight, f"{tag}, weights")
    rows = await AllGather(message.payload, tag)
    return [row for row, counts in zip(rows, weights, strict=True) if counts] or rows


def mean() -> Merge:
    """The mean, weighted by rows."""
    return Mean()


def median() -> Merge:
    """The median of each element."""
    return Median()


def trimmed(part: float = 0.25) -> Merge:
    """The mean of each element without the `part` largest and smallest. Raises UsageError PL203."""
    if type(part) not in (int, float) or not 0 <= part < 0.5:
        raise UsageError("PL203", f"trimmed: part={part!r} cannot be", help="part is a number from 0 to below 0.5.")
    return Trimmed(part)


MERGES: dict[str, Callable[..., Merge]] = {"mean": mean, "median": median, "trimmed": trimmed}
"""Words for merges in a strategy text, and what they call."""


def merge_for(recipe: str, merge: object, codec: object) -> Merge:
    """The merge that was asked for, with the codec if there is one. Raises UsageError PL203."""
    if not (codec is None or isinstance(codec, Codec)):
        codec = CODECS[one_of(recipe, "codec", codec, CODECS)]()
    chosen = merge if isinstance(merge, Merge) else MERGES[one_of(recipe, "merge", merge, MERGES)]()
    if codec is None:
        return chosen
    if not isinstance(chosen, Mean):
        said = "leave one of them out: only the mean travels encoded."
        raise UsageError("PL203", f"{recipe}: merge={chosen.name} cannot be combined with a codec", help=said)
    return Mean(codec)
