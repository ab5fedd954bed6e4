"""What a server does with the drift of workers that step by themselves. Values only; importing them does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
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


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Asynchronous gossip (AD-PSGD: Lian et al., ICML 2018, arXiv 1710.06952): ``x_i = x_j = (x_i + x_j) / 2``, then ``x_i -= drift_i``.

    The two halves of an average are one action, so it is never half applied, and nobody waits for a partner that computes: its
    parameters are averaged where they are kept, and its own drift is applied to the average later.

    Attributes:
        graph: ``complete``: any other worker; ``ring``: one of the two neighbours.
    """

    graph: str = "complete"

    def partner(self, worker: str, members: Sequence[str], draw: int) -> str | None:
        """With whom to average now; None where a worker is alone.

        Args:
            members: All workers, in the same order everywhere.
            draw: A number that is never the same twice.
        """
        others = [name for name in members if name != worker]
        if self.graph == "ring" and len(members) > 3 and worker in members:
            at = members.index(worker)
            others = [members[at - 1], members[(at + 1) % len(members)]]
        return Random(draw).choice(others) if others else None

    def average(self, mine: Tensor, theirs: Tensor) -> None:
        """Both become their mean, in place."""
        theirs.add_(mine).mul_(0.5)
        mine.copy_(theirs)

    def describe(self) -> str:
        """One phrase."""
        whom = "any other worker" if self.graph == "complete" else "a neighbour on a ring"
        return f"pairwise: the mean with {whom}, drawn anew each time; evaluated and exported is the mean of all"
