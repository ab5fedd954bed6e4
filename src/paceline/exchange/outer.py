"""The link of local steps: the ranks' drift from a common anchor is merged, and the anchor takes an outer step along it.

    D_i = anchor - x_i        D = merge(D_i)
    b = mu b + D              anchor -= lr (D + mu b)   with Nesterov's momentum; anchor -= lr b without
    x_i = anchor

With ``lr=1, mu=0`` the anchor becomes the mean of the ranks' parameters: local SGD (Stich, 1805.09767). With an outer Nesterov step it
is DiLoCo (2311.08105). What travels is the drift, never the parameters: it is small, so a codec rounds little, and what no rank has
changed stays exactly what it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.exchange.link import Message, State
from paceline.exchange.merge import Mean, Merge
from paceline.terms.bucket import Bucket

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outer:
    """One outer step.

    Args:
        lr, momentum, nesterov: Of the outer step.
        merge: How the drifts of the ranks become one.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = True
    merge: Merge = field(default_factory=Mean)

    def init(self, bucket: Bucket) -> State:
        """Empty: the anchor is where the first round begins."""
        return {}

    def begin(self, payload: Tensor, state: State) -> None:
        """The first round begins with these parameters."""
        state["anchor"] = payload.clone()
        if self.momentum:
            state["momentum"] = payload.new_zeros(payload.shape)

    async def __call__(self, message: Message, state: State) -> None:
        """The drift is taken now; what a rank does while it travels is not in it. Alone: the plain loop."""
        import torch

        anchor, payload = state["anchor"], message.payload
        if message.size == 1:
            anchor.copy_(payload)
            return
        drift = torch.sub(anchor, payload, out=payload)
        await self.merge(message)
        if self.momentum:
            b = state["momentum"].mul_(self.momentum).add_(drift)
            drift = drift.add_(b, alpha=self.momentum) if self.nesterov else b
        anchor.sub_(drift, alpha=self.lr)
        payload.copy_(anchor)

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each."""
        codec = self.merge.codec if isinstance(self.merge, Mean) else None
        step = "the anchor moves to it" if self.lr == 1 and not self.momentum else self._step()
        return "\n".join(
            (
                "outer step",
                "  sends     the drift of the parameters from their common anchor: one message per bucket, every round",
                "  to        all ranks",
                f"  encoded   {'not at all' if codec is None else codec.describe()}",
                f"  merged    {self.merge.describe()}",
                f"  then      {step}; every rank goes on from the anchor",
                "  alone     nothing is sent, and nothing happens to the parameters",
            )
        )

    def _step(self) -> str:
        kind = "Nesterov momentum" if self.nesterov else "momentum"
        return f"the anchor takes a step of {self.lr:g} along it" + (
            f", with {kind} {self.momentum:g}" if self.momentum else ""
        )


@dataclass(frozen=True, slots=True)
class Elastic:
    """Elastic averaging, all ranks at once (Zhang, Choromanska, LeCun, NIPS 2015, 1412.6651).

        d_i = alpha (x_i - centre)      x_i -= d_i      centre += sum of d_i

    both from the old values. The centre is the `anchor`; every rank holds it.

    Args:
        alpha: How far a rank is pulled; None: ``beta / n`` on n ranks.
        beta: See above; what the centre moves by is at most this part of the way to the mean.
    """

    alpha: float | None = None
    beta: float = 0.9

    def init(self, bucket: Bucket) -> State:
        """Empty: the centre is where the first round begins."""
        return {}

    def begin(self, payload: Tensor, state: State) -> None:
        """The first round begins with these parameters."""
        state["anchor"] = payload.clone()

    async def __call__(self, message: Message, state: State) -> None:
        """Pull and be pulled; in a full round all ranks then go to the centre."""
        import torch

        centre, payload, size = state["anchor"], message.payload, message.size
        if size == 1:
            centre.copy_(payload)
            return
        alpha = self.beta / size if self.alpha is None else self.alpha
        old = payload.clone()
        difference = torch.sub(payload, centre, out=payload)
        old.sub_(difference, alpha=alpha)
        message.header[0] = message.divisor = 1.0
        await Mean()(message)
        centre.add_(difference, alpha=alpha * size)
        payload.copy_(centre if message.full else old)

    def describe(self) -> str:
        """What is sent, with whom, when, how encoded, how merged: one line each."""
        pull = f"{self.beta:g} / number of ranks" if self.alpha is None else f"{self.alpha:g}"
        return "\n".join(
            (
                "elastic averaging",
                "  sends     the difference of the parameters from the centre: one message per bucket, every round",
                "  to        all ranks",
                "  encoded   not at all",
                f"  merged    each rank goes {pull} of its way to the centre, and the centre by the sum of all that towards them",
                "  alone     nothing is sent, and nothing happens to the parameters",
            )
        )
