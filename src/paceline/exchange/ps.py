"""Recipes with parameter servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.exchange.arguments import positive, spell, whole
from paceline.exchange.chain import Chain, Exchange
from paceline.exchange.corrections import Delay
from paceline.exchange.server import Damp, Rule
from paceline.exchange.service import Service
from paceline.terms.errors import UsageError
from paceline.terms.plan import Call

MOST_SERVERS = 16


def ps(
    servers: int = 1,
    *,
    staleness: float = 0,
    backup: int = 0,
    buffer: int = 1,
    late: Delay | Damp | None = None,
) -> Exchange:
    """Parameter servers: they keep the parameters and step the optimizer; workers push gradients.

    ``ps()`` is synchronous: the numbers of ``ddp``, with the optimizer's state on the servers only. ``ps(staleness=s)`` lets
    workers run at most `s` steps ahead of the slowest that computes (Ho et al., NIPS 2013), ``ps(staleness=inf)`` as far as they
    like: each gradient is an update of its own, of a whole global batch, and whoever is free takes the next batch. That wins where
    workers are of unequal speed, or stand still now and then, and loses what stale gradients cost in loss for each sample. With one
    slow link or server everybody waits for the server.

    Args:
        servers: Processes that the parameters are divided among.
        staleness: 0, a whole number, or ``inf``.
        backup: Synchronous only: so many workers compute what others have not delivered yet; whoever is first counts.
        buffer: Asynchronous only: so many gradients make one update (FedBuff: Nguyen et al., AISTATS 2022).
        late: What is done about gradients that come late: ``dc(...)`` or ``damp(...)``.

    Raises:
        UsageError: PL203, a value that cannot be, or two that do not go together.
    """
    whole("ps", "servers", servers, MOST_SERVERS)
    if late is not None and not isinstance(late, (Delay, Damp)):
        raise UsageError("PL203", f"ps: late={late!r} cannot be", help="late is dc(...) or damp(...).")
    rule = Rule(staleness, backup, buffer, late) if isinstance(late, Damp) else Rule(staleness, backup, buffer)
    delay = late if isinstance(late, Delay) else None
    if delay is not None and rule.synchronous:
        raise UsageError("PL203", "ps: late=dc(...) with staleness=0", help="no gradient is late then; leave it out.")
    if delay is not None and buffer > 1:
        raise UsageError(
            "PL203",
            "ps: late=dc(...) with buffer",
            help="what was read is gone when the buffer is applied; use late=damp(...), or buffer=1.",
        )
    text = spell(ps, servers=servers, staleness=staleness, backup=backup, buffer=buffer, late=_spelled(late))
    return Exchange(Chain(()), text=text, service=Service(servers, rule, delay))


def _spelled(late: Delay | Damp | None) -> Any:
    if isinstance(late, Delay):
        memory = () if late.memory is None else (("memory", late.memory),)
        return Call("dc", (late.strength,), memory)
    if isinstance(late, Damp):
        default = Damp(late.kind)
        kwargs = tuple((key, getattr(late, key)) for key in ("a", "b") if getattr(late, key) != getattr(default, key))
        return Call("damp", (Call(late.kind, bare=True),), kwargs)
    return None


def dc(strength: float | None = None, *, memory: float | None = None) -> Delay:
    """Delay compensation (Zheng et al., ICML 2017): constant with strength 0.04; adaptive with `memory` 0 to 1, strength 2."""
    if memory is not None and not (type(memory) in (int, float) and 0 <= memory < 1):
        raise UsageError("PL203", f"dc: memory={memory!r} cannot be", help="memory is a number from 0 to below 1.")
    if strength is None:
        strength = 0.04 if memory is None else 2.0
    return Delay(positive("dc", "strength", strength), memory)


def damp(kind: str = "inverse", *, a: float | None = None, b: float | None = None) -> Damp:
    """Less weight for late gradients: ``inverse``, ``polynomial`` (a), ``hinge`` (a, b), by versions (1511.05950, 1903.03934)."""
    given = {key: value for key, value in (("a", a), ("b", b)) if value is not None}
    return Damp(kind, **given)  # type: ignore[arg-type]


LATE: dict[str, Callable[..., Any]] = {"dc": dc, "damp": damp}
"""Words for what is done about late gradients, in a strategy text."""
