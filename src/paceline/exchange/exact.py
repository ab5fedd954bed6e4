"""The mean of V fixed shards of a global batch, with the same bits whatever rank has computed which shard, and in which order.

Floating-point sums depend on the order of their terms; sums of integers do not. So a gradient is turned into a fixed-point number
of two words, ``x = high + low``: `high` a multiple of 2^-19, `low` one of 2^-64. The words are integers that lie in the mantissas
of float64, where every wire adds them, as fast as it can and without rounding:

* ``|x| <= 2^28`` and at most 64 terms, so a sum of high words has at most 28 + 19 + 6 = 53 bits;
* ``|low| <= 2^-20``, so a sum of low words has at most 64 - 20 + 6 = 50 bits (51 for float64 gradients).

A term is off by 2^-65 at most; a float32 of 2^-41 or more is exact. At the end one addition and one division round, alike on
every rank. The trick that cuts (add and subtract 1.5 * 2^k) is Demmel and Nguyen's, *Fast Reproducible Floating-Point
Summation*, ARITH 2013.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from paceline.exchange.link import Message, State
from paceline.terms.bucket import Bucket
from paceline.terms.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.group.kernel import Kernel

SHARDS = 8
MOST_SHARDS = 64
LIMIT = 2.0**28
"""Terms beyond it are handled like numbers that are not finite."""

_HIGH = 1.5 * 2.0 ** (52 - 19)  # adding and subtracting it leaves a multiple of 2^-19
_LOW = 1.5 * 2.0 ** (52 - 64)
_CHUNK = 1 << 14  # elements at a time: they stay in the second cache


def fits(terms: Tensor) -> bool:
    """Whether each of `terms` is finite and within :data:`LIMIT`."""
    if not terms.numel():
        return True
    low, high = terms.aminmax()
    return bool(low >= -LIMIT) and bool(high <= LIMIT)


def fold(terms: Tensor, sums: Tensor, *, first: bool) -> None:
    """Add `terms` to `sums`, exactly.

    Args:
        terms: 1-D and contiguous, `n` elements, all of which fit.
        sums: `2 n` elements of float64: the high words, then the low ones.
        first: These are the first terms: what is in `sums` is forgotten.
    """
    import torch

    high, low = sums.view(2, -1)
    if terms.dtype is torch.float32 and terms.device.type == "cpu" and (kernel := _kernel()) is not None:
        addresses = (terms.data_ptr(), high.data_ptr(), low.data_ptr())
        kernel.fold(*addresses, terms.numel(), _HIGH, _LOW, first)
        return
    for at in range(0, terms.numel(), _CHUNK):
        some = slice(at, at + _CHUNK)
        rest = terms[some].to(sums.dtype, copy=True)
        whole = rest.add(_HIGH).sub_(_HIGH)
        rest.sub_(whole).add_(_LOW).sub_(_LOW)
        if first:
            high[some], low[some] = whole, rest
        else:
            high[some] += whole
            low[some] += rest


@cache
def _kernel() -> Kernel | None:
    """The same in C, with the same bits, where there is a compiler: one pass over memory instead of nine."""
    from paceline.group import kernel

    with suppress(WireError):
        return kernel.load()
    return None


def total(sums: Tensor) -> Tensor:
    """The sums as numbers of one word, each rounded once: a view of the first half of `sums`."""
    words = sums.view(2, -1)
    words[0] += words[1]
    return words[0]


def mean(sums: Tensor, weights: list[float], divisor: float) -> Tensor:
    """The weighted mean of terms that were scaled by ``weight / divisor``; a view of the first half of `sums`.

    Args:
        weights: Of each shard, in any order; their sum is rounded once.
    """
    weight, found = math.fsum(weights), total(sums)
    return found if weight in (0.0, divisor) else found.mul_(divisor / weight)


@dataclass(frozen=True, slots=True)
class ExactMean:
    """``payload <- sum over shards of w_v g_v / sum of w_v``, the same bits for every number of ranks.

    A rank hands over the gradients of its shards one by one; what they add up to stays in ``message.wide`` until the last one,
    and travels then.
    """

    shards: int = SHARDS

    def init(self, bucket: Bucket) -> State:
        """The weights of this rank's shards of the batch."""
        return {"weights": {}}

    async def __call__(self, message: Message, state: State) -> None:
        """Add the gradient of one shard; exchange the sums with the last one."""
        from paceline.group.wire import AllReduce

        wide, weights = message.wide, state["weights"]
        assert wide is not None
        if message.first:
            weights.clear()
        if message.header[0] or message.first:
            fold(message.payload, wide.tensor, first=message.first)
        if message.header[0]:
            weights[message.shard] = message.header[0]
        message.exchanged = True
        if not message.last:
            message.payload.zero_()
            return
        said = [weights.get(shard, 0.0) for shard in range(self.shards)]  # each of them is said by one rank
        sums = await AllReduce(wide, [*message.header, *said])
        every = sums[len(message.header) :]
        message.header[:] = [math.fsum(every), *sums[1 : len(message.header)]]
        message.payload.copy_(mean(wide.tensor, every, message.divisor))

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each; then what it is for, and what it costs."""
        return "\n".join(
            (
                "all-reduce, exact",
                f"  shards    each global batch is cut into {self.shards}; the loop goes round once for each that a rank has",
                "  sends     gradients: one message per bucket, every step",
                "  to        all ranks: the wire's own all-reduce",
                "  when      after the backward of a rank's last shard: nothing overlaps",
                "  encoded   fixed point, 128 bits an element: four times the bytes of float32",
                "  merged    weighted mean of the shards; the same bits on every rank, for every number of ranks",
                "  randomness  seeded for each shard; one thread per rank",
            )
        )
