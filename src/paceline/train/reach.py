"""The way to a server: connecting while it may be starting still, what it refuses, and what cannot work with servers at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.exchange.service import Service
from paceline.group.secure import Connection
from paceline.terms.errors import EXPLANATIONS, AdoptError, PacelineError, StepError, WireError

PATIENCE = 60.0
"""Seconds that a worker waits for servers to begin."""

SOON = 0.02
"""Seconds between two attempts to connect."""


def reach(open: Callable[[str], Connection], address: str, check: Callable[[], None]) -> Connection:
    """Connect to a server, which may be starting still.

    Args:
        open: Connects, or raises.
        check: Called again and again while this waits.

    Raises:
        WireError: PL460, there is none, and none came within :data:`PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return open(address)
        except PacelineError as error:
            if error.code not in ("PL433", "PL431") or time.monotonic() > deadline:
                raise WireError("PL460", f"the server at {address} cannot be reached: {error.message}") from error
        check()
        time.sleep(SOON)


def refused(meta: Mapping[str, Any]) -> PacelineError:
    """The error with which a server refuses this worker."""
    code = meta["code"] if meta["code"] in EXPLANATIONS else "PL462"
    kind = AdoptError if code.startswith("PL3") else StepError
    return kind(code, str(meta["message"]))


def refuse(
    scalers: Sequence[Any], schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer], service: Service
) -> None:
    """Raise AdoptError PL463 for what cannot work with servers."""
    if scalers:
        raise AdoptError("PL463", "a GradScaler was adopted: it decides about steps that the servers take")
    if service.rule.backup and len(optimizers) > 1:
        raise AdoptError("PL463", "with backup= there is one optimizer, and several were adopted")
    if service.own_steps and len(optimizers) > 1:
        raise AdoptError("PL463", "workers step by themselves, and several optimizers were adopted: whose step counts?")
    for optimizer in optimizers:
        known = any(scheduler.optimizer is optimizer for scheduler in schedulers)
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not known:
            raise AdoptError("PL463", "the learning rate has a schedule that was not adopted")
