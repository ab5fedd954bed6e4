"""Codecs: how a payload is written into the bytes that travel, and read back.

A codec is an onion inside a link, not a link: what is encoded on one side of the wire must be decoded on the other. Codes are
never summed, because a sum of codes is not the code of a sum (ranks may use different scales); ``exchange/coded.py`` decodes,
merges in full precision and encodes once more. Adding a codec is one file with a frozen value, and one line in :data:`CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from paceline.exchange.codec.cast import Cast

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """A frozen value. Encoding is a pure function of its input, and of equal length for equal `numel` on every rank."""

    @property
    def name(self) -> str:
        """The word for it in a strategy."""

    def nbytes(self, numel: int) -> int:
        """Length of the code of `numel` elements."""

    def encode(self, x: Tensor, code: Tensor) -> None:
        """Write `x` (1-D, not empty, floating) into `code` (uint8, ``nbytes(x.numel())`` long, aligned to 8 bytes)."""

    def decode(self, code: Tensor, out: Tensor) -> None:
        """Write what `code` says into `out` (1-D, any floating type)."""

    def describe(self) -> str:
        """One phrase: the name, the bytes, and what is lost."""


def bf16() -> Codec:
    """bfloat16: float32's range, 8 bits of precision."""
    return Cast("bf16")


def fp16() -> Codec:
    """float16 with a power of two per message that brings its largest element below the limit: 11 bits of precision."""
    return Cast("fp16")


CODECS: dict[str, Callable[..., Codec]] = {"bf16": bf16, "fp16": fp16}
"""Words for codecs in a strategy text, and what they call."""
