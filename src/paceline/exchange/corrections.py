"""How a server corrects gradients that come late. Values only; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delay:
    """Delay compensation (Zheng et al., ICML 2017): ``g + strength * g * g * (w - w_read)``.

    Attributes:
        strength: lambda.
        memory: Of the running mean of g*g in the adaptive form, which divides lambda by its root; None: the constant form.
    """

    strength: float
    memory: float | None = None

    @property
    def text(self) -> str:
        """As in a strategy."""
        return f"dc({self.strength!r}{'' if self.memory is None else f', memory={self.memory!r}'})"

    def describe(self) -> str:
        """One phrase."""
        form = "constant" if self.memory is None else "adaptive"
        return f"delay compensation, {form}, strength {self.strength:g}"
