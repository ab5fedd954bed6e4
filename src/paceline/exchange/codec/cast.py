"""Half the bytes: elements are rounded to a 16-bit floating-point type.

``bf16`` has float32's range (it ends at 3.39e38) and 8 bits of precision: a plain cast. ``fp16`` has 11 bits and ends at 65504,
so each message is shifted by a power of two, which is exact, until its largest element lies in [2^14, 2^15); the shift travels in
front. So nothing becomes infinite unless rounding to 11 bits passes the range of the payload's own type (0.9998 of its largest
number), and precision is lost only below 2^-28 of the largest element. NaN and infinity stay what they are.

Rounding is to nearest: ``|decode(encode(x)) - x| <= 2^-8 |x|`` for bf16; ``<= 2^-11 max(|x|, 2^-28 max|x|)`` for fp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FRONT = 8  # bytes in front of an fp16 code: what decoding multiplies by, as float64
_TOP = 15  # fp16 codes end at 2^15, half of what float16 holds


@dataclass(frozen=True, slots=True)
class Cast:
    """Round to nearest in bfloat16 or float16.

    Args:
        name: Which.
    """

    name: Literal["bf16", "fp16"]

    def nbytes(self, numel: int) -> int:
        """Two bytes an element, and for fp16 the shift."""
        return 2 * numel + (_FRONT if self._shifted else 0)

    def encode(self, x: Tensor, code: Tensor) -> None:
        """Write `x` into `code`."""
        if not self._shifted:
            code.view(self._dtype).copy_(x)
            return
        import torch

        up = _shift(x)
        torch.reciprocal(up, out=code[:_FRONT].view(torch.float64)[0])
        torch.mul(x, up, out=code[_FRONT:].view(self._dtype))

    def decode(self, code: Tensor, out: Tensor) -> None:
        """Write what `code` says into `out`."""
        if not self._shifted:
            out.copy_(code.view(self._dtype))
            return
        import torch

        out.copy_(code[_FRONT:].view(self._dtype)).mul_(code[:_FRONT].view(torch.float64)[0])

    def describe(self) -> str:
        """One phrase: the name, the bytes, and what is lost."""
        if self._shifted:
            return "fp16: 2 bytes an element, shifted by a power of two per message, 11 bits of precision kept"
        return "bf16: 2 bytes an element, 8 bits of precision kept"

    @property
    def _shifted(self) -> bool:
        return self.name == "fp16"

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return torch.float16 if self.name == "fp16" else torch.bfloat16


def _shift(x: Tensor) -> Tensor:
    """``2^s`` as float64, on the device of `x`, so that encoding never waits for it.

    ``s`` brings max|x| into [2^14, 2^15), within what the type of `x` can multiply by; it is 0 when max|x| is not finite.
    """
    import torch

    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high).double()
    bound = math.frexp(torch.finfo(x.dtype).max)[1] - 2
    shift = torch.where(torch.isfinite(largest), _TOP - torch.frexp(largest).exponent, 0)
    return torch.exp2(shift.clamp(-bound, bound).double())
