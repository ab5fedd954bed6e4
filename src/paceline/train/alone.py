"""What a worker does between two pushes when it steps by itself: local steps under a server, elastic averaging, Hogwild."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from paceline.exchange.outer_step import Elastic
from paceline.exchange.service import Service
from paceline.train.memory import Memory


class Alone:
    """The steps of one worker since its last push.

    Args:
        service: What the strategy asks of servers.

    Attributes:
        every: Steps from push to push; the lead may ask a slow worker for fewer.
        steps: Taken since the last push.
        total: Steps that all workers have pushed, as the lead said last.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.every, self.steps, self.total = service.every, 0, 0
        self._anchor: Tensor | None = None
        self._aside: Tensor | None = None
        self._scheduled: dict[int, int] = {}

    # ---- pushes -----------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """The worker's optimizer has stepped. True: a push is due."""
        self.steps += 1
        return self.steps >= self.every

    def read(self, memory: Memory) -> None:
        """The parameters that are there now are those of the server, or its answer: drift counts from here."""
        self.steps = 0
        if self._service.outer is not None and not isinstance(self._service.outer, Elastic):
            self._anchor = memory.raw_params.clone()

    def fill(self, memory: Memory) -> str:
        """Put there what is pushed: the anchor minus the parameters, or for elastic averaging the parameters.

        Returns:
            The number of the first parameter that is not finite, as text, or nothing.
        """
        if self._service.outer is None:
            return ""
        with torch.no_grad():
            memory.raw_grads.copy_(memory.raw_params)
            if self._anchor is not None:
                anchors = memory.like_params(self._anchor)
                for pushed, anchor, own in zip(memory.grads, anchors, memory.params, strict=True):
                    torch.sub(anchor, own, out=pushed)
            for number, pushed in enumerate(memory.grads):
                if not torch.isfinite(pushed.sum()):
                    return str(number)
        return ""

    # ---- the centre is looked at, and left again ----------------------------------------------------------------------
    def put_aside(self, memory: Memory) -> None:
        """The centre's parameters come into this worker's memory for a while, where it has own ones."""
        if self._service.apart and self._aside is None:
            self._aside = memory.raw_params.clone()

    def take_up(self, memory: Memory) -> None:
        """The worker trains again, with its own parameters."""
        if self._aside is not None:
            memory.raw_params.copy_(self._aside)
            self._aside = None

    # ---- schedules ----------------------------------------------------------------------------------------------------
    def own_schedule(self, number: int, scheduler: LRScheduler, in_pass: Any) -> None:
        """A schedule that is stepped after each step counts the steps of all workers, as it would in one process."""
        step: Any = scheduler.step

        @functools.wraps(scheduler.step)
        def counting(*args: Any, **kwargs: Any) -> None:
            if not in_pass():
                step(*args, **kwargs)
                return
            goal = self.total + self.steps
            for _ in range(self._scheduled.get(number, 0), goal):
                step(*args, **kwargs)
            self._scheduled[number] = max(goal, self._scheduled.get(number, 0))

        scheduler.step = counting  # type: ignore[method-assign]
