"""What a server does with the drift of workers that step by themselves. Values only; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DelayedNesterov:
    """The outer optimizer of asynchronous DiLoCo (Liu et al. 2024, arXiv 2401.09135), for one piece of the parameters.

    Nesterov's step at every arrival diverges when drifts come one by one, which is the paper's finding: here the momentum moves
    once in `delay` arrivals. With `delay` 1 it is the Nesterov step of DiLoCo (arXiv 2311.08105).

    Attributes:
        lr, momentum: Of the outer step.
        delay: N of the paper; 0: the number of workers that the run begins with.
        spread: c of the paper, from 0 to 1/N: how much of the momentum each arrival applies.
    """

    lr: float = 0.7
    momentum: float = 0.9
    delay: int = 0
    spread: float = 0.0

    def step(self, theta: Tensor, drift: Tensor, state: dict[str, Any], workers: int) -> None:
        """Move `theta` by one drift (anchor minus what the worker has come to), in place; `state` is kept between calls."""
        import torch

        count = self.delay or workers
        if not state:
            state.update(outer_m=torch.zeros_like(theta), outer_buffer=torch.zeros_like(theta), outer_t=0)
        momentum, buffer = state["outer_m"], state["outer_buffer"]
        buffer.add_(drift)
        state["outer_t"] += 1
        weight = self.spread * self.momentum
        if state["outer_t"] % count == 0:
            momentum.mul_(self.momentum).add_(buffer, alpha=1 / count)
            buffer.zero_()
            weight = (1 - self.spread * count + self.spread) * self.momentum
        theta.add_(momentum, alpha=-self.lr * weight).add_(drift, alpha=-self.lr / count)

    def describe(self) -> str:
        """One phrase."""
        count = self.delay or "as many as there are workers"
        return (
            f"outer step: delayed Nesterov, lr {self.lr:g}, momentum {self.momentum:g}, moved once in {count} arrivals"
        )


@dataclass(frozen=True, slots=True)
class Elastic:
    """Elastic averaging (Zhang et al., NIPS 2015, arXiv 1412.6651): ``d = alpha (x - center); x -= d; center += d``.

    Attributes:
        beta: alpha is beta over the number of workers that the run begins with.
    """

    beta: float = 0.9

    def pull(self, center: Tensor, x: Tensor, own: Tensor, workers: int) -> None:
        """Move both by the same d, made of the old values; `own` is where the worker's parameters lie, `x` what it pushed."""
        d = (x - center) * (self.beta / workers)
        center.add_(d)
        own.copy_(x - d)

    def describe(self) -> str:
        """One phrase."""
        return f"elastic: worker and center move towards each other by {self.beta:g}/n of their distance"
