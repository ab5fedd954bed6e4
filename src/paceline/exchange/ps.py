"""Recipes with parameter servers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from paceline.exchange.arguments import one_of, positive, spell, whole
from paceline.exchange.chain import Chain, Exchange
from paceline.exchange.corrections import Delay
from paceline.exchange.outer_step import DelayedNesterov, Elastic, Pairwise
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
    where: Literal["process", "host"] = "process",
    replicas: int = 1,
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
        replicas: Processes that keep the same part; with 2 either one may die: the other one goes on, and nothing that was
            acknowledged is lost. With 1 servers begin again from the last checkpoint.
        where: ``host`` keeps the parameters once for all workers of a host, in memory that they read (TensorFlow calls it central
            storage); then there is one server, and updates are synchronous.

    Raises:
        UsageError: PL203, a value that cannot be, or two that do not go together.
    """
    one_of("ps", "where", where, ("process", "host"))
    if where == "host" and (servers > 1 or staleness):
        said = "a worker would compute with parameters that change under it; hogwild() does that on purpose."
        raise UsageError("PL203", "ps: where=host with staleness or several servers", help=said)
    whole("ps", "servers", servers, MOST_SERVERS)
    whole("ps", "replicas", replicas, 2)
    if where == "host" and replicas > 1:
        said = "workers read the parameters in the very memory in which the server steps them."
        raise UsageError("PL203", "ps: where=host with replicas", help=said)
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
    given = {"servers": servers, "staleness": staleness, "backup": backup, "buffer": buffer, "late": _spelled(late)}
    text = spell(ps, **given, where=where, replicas=replicas)
    service = Service(servers, rule, delay, one_copy=where == "host", copies=replicas)
    return Exchange(Chain(()), text=text, service=service)


def hogwild() -> Exchange:
    """Processes of one host step on one copy of the parameters, without locks.

    (Niu et al., NIPS 2011.) Each worker leases batches, and its own optimizer writes into parameters that all share; what two write at once may be lost
    in part. It wins where updates touch few parameters (sparse models), and by needing nothing but memory; it loses accuracy where
    all workers move all parameters, and works on one host only. A worker that dies may leave a step half written; its batch is
    leased again.
    """
    return Exchange(Chain(()), text="hogwild()", service=Service(1, Rule(math.inf), one_copy=True, own_steps=True))


def async_diloco(
    every: int = 50,
    *,
    lr: float = 0.7,
    momentum: float = 0.9,
    delay: int = 0,
    by_speed: bool = False,
    staleness: float = math.inf,
    servers: int = 1,
) -> Exchange:
    """Asynchronous DiLoCo: a server takes in how far each worker has come, as it comes.

    (Liu et al. 2024, arXiv 2401.09135.) The server's momentum is moved once in `delay` arrivals, because moved at each it diverges.
    It wins over slow or uneven links and with workers of unequal speed: bytes fall by `every`, and nobody waits. It loses samples:
    at equal samples its loss is behind a synchronous run's, the more so the more workers there are.

    Args:
        every: Local steps from push to push; a pass ends with a push.
        lr, momentum: Of the outer step.
        delay: N of the paper; 0: the number of workers.
        by_speed: Slower workers take fewer local steps (DyLU).
        staleness: As in ``ps``, in pushes.
        servers: Processes that the parameters are divided among.
    """
    whole("async_diloco", "every", every, 10**9)
    positive("async_diloco", "lr", lr)
    if type(momentum) not in (int, float) or not 0 <= momentum < 1:
        raise UsageError(
            "PL203", f"async_diloco: momentum={momentum!r} cannot be", help="it is a number from 0 to below 1."
        )
    if type(delay) is not int or delay < 0:
        raise UsageError("PL203", f"async_diloco: delay={delay!r} cannot be", help="it is a whole number from 0.")
    if not isinstance(by_speed, bool):
        raise UsageError("PL203", f"async_diloco: by_speed={by_speed!r} cannot be", help="it is True or False.")
    whole("async_diloco", "servers", servers, MOST_SERVERS)
    if not staleness:
        raise UsageError("PL203", "async_diloco: staleness=0", help="diloco(...) is the synchronous form.")
    given = {"every": every, "lr": lr, "momentum": momentum, "delay": delay, "by_speed": by_speed}
    text = spell(async_diloco, **given, staleness=staleness, servers=servers)
    outer = DelayedNesterov(lr, momentum, delay)
    service = Service(servers, Rule(staleness), own_steps=True, every=every, by_speed=by_speed, outer=outer)
    return Exchange(Chain(()), text=text, service=service)


def async_easgd(every: int = 10, *, beta: float = 0.9, servers: int = 1) -> Exchange:
    """Asynchronous elastic averaging: each worker and a centre pull each other now and then.

    (Zhang et al., NIPS 2015.) Workers explore by themselves and are held together by an elastic force; the centre is what is evaluated and exported. It wins
    where exploring helps and links are slow; it loses where `every` or the number of workers is so large that the centre hardly moves.

    Args:
        every: Local steps from one pull to the next.
        beta: The force: a worker moves by beta over the number of workers of its distance to the centre.
        servers: Processes that the parameters are divided among.
    """
    whole("async_easgd", "every", every, 10**9)
    if not positive("async_easgd", "beta", beta) <= 1:
        raise UsageError("PL203", f"async_easgd: beta={beta!r} cannot be", help="beta is at most 1.")
    whole("async_easgd", "servers", servers, MOST_SERVERS)
    text = spell(async_easgd, every=every, beta=beta, servers=servers)
    service = Service(servers, Rule(math.inf), own_steps=True, every=every, outer=Elastic(beta))
    return Exchange(Chain(()), text=text, service=service)


def adpsgd(graph: Literal["complete", "ring"] = "complete", *, every: int = 1, servers: int = 1) -> Exchange:
    """Asynchronous gossip: whoever has stepped is averaged with another worker, which is not waited for.

    (AD-PSGD: Lian et al., ICML 2018.) Each worker has parameters and an optimizer of its own, and nobody ever waits. It wins with
    workers of unequal speed; it loses loss at equal samples against an exact mean, the more so the more workers there are. A server
    keeps what is averaged, so an average is one action, but all bytes pass the server: this is the method's mathematics, not its network.

    Args:
        graph: ``complete``: with any other worker; ``ring``: with one of two neighbours.
        every: Steps of its own from one average to the next.
        servers: Processes that the parameters are divided among.
    """
    one_of("adpsgd", "graph", graph, ("complete", "ring"))
    whole("adpsgd", "every", every, 10**9)
    whole("adpsgd", "servers", servers, MOST_SERVERS)
    text = spell(adpsgd, graph=graph, every=every, servers=servers)
    service = Service(servers, Rule(math.inf), own_steps=True, every=every, outer=Pairwise(graph))
    return Exchange(Chain(()), text=text, service=service)


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
