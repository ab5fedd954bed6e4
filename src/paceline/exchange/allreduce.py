"""The link of synchronous SGD: every rank leaves with the weighted mean of all ranks' gradients."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.exchange.codec import Codec
from paceline.exchange.link import Message, State
from paceline.terms.bucket import Bucket

ALGORITHMS = ("auto", "star", "ring", "tree", "halving", "hierarchical")
"""Ways to all-reduce. ``auto`` is the wire's own; the others are built from its sends and receives."""


@dataclass(frozen=True, slots=True)
class AllReduceMean:
    """``payload <- sum over ranks of w_r g_r / sum of w_r``, the same bits on every rank.

    The payload comes in as ``w_r / c * g_r``, with the constant ``c`` in ``message.divisor``; the header carries ``w_r``
    and leaves as the sum of all headers. See Li et al., *PyTorch Distributed*, VLDB 2020, for buckets and overlap.

    Args:
        codec: How payloads are encoded on the wire, or None to send them as they are.
        algorithm: One of :data:`ALGORITHMS`; with a codec only ``auto``, because coded sums travel in their own way
            (see ``exchange/coded.py``).
    """

    codec: Codec | None = None
    algorithm: str = "auto"

    def init(self, bucket: Bucket) -> State:
        """Nothing is remembered from step to step."""
        return {}

    async def __call__(self, message: Message, state: State) -> None:
        """Exchange the bucket. On one rank nothing is sent, so nothing is encoded: the numbers of the plain loop."""
        if self.codec is not None and message.size > 1:
            from paceline.exchange.coded import coded_mean

            message.header[:] = await coded_mean(message, self.codec)
        elif self.algorithm != "auto" and message.size > 1:
            message.header[:] = await _by_name(self.algorithm, message)
        else:
            from paceline.group.wire import AllReduce

            message.header[:] = await AllReduce(message.buffer, message.header, message.divisor)
        message.exchanged = True

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each."""
        way = "the wire's own all-reduce" if self.algorithm == "auto" else f"{self.algorithm} all-reduce"
        way = way if self.codec is None else "each rank merges one slice of every message and gives it to all"
        return "\n".join(
            (
                "all-reduce",
                "  sends     gradients: one message per bucket, every step",
                f"  to        all ranks: {way}",
                "  when      as soon as backward has filled the bucket: overlaps with backward",
                f"  encoded   {'not at all' if self.codec is None else self.codec.describe()}",
                "  merged    weighted mean; the same bits on every rank",
            )
        )


async def _by_name(algorithm: str, message: Message) -> list[float]:
    from paceline.group.collectives import all_reduce_by

    return await all_reduce_by(
        algorithm,
        message.buffer,
        message.header,
        message.divisor,
        rank=message.rank,
        size=message.size,
        hosts=message.hosts,
        tag=message.buffer.key,
    )
