"""The known algorithms, each a few lines of links. Importing them does not import torch (note in ``exchange/link.py``).

A recipe is a function that checks its arguments, spells them, and returns an :class:`Exchange`; adding one is one function
here or in ``local``, and its name in :data:`RECIPES`. The first line of its docstring is its line in ``paceline run --help``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from paceline.exchange.allreduce import ALGORITHMS, AllReduceMean
from paceline.exchange.arguments import one_of, positive, spell, whole
from paceline.exchange.axes import AXES, MOST_RANKS
from paceline.exchange.cadence import MOST, Cadence, cadence_for
from paceline.exchange.chain import Exchange, chain, optimizer
from paceline.exchange.codec import CODECS, Codec
from paceline.exchange.exact import MOST_SHARDS, SHARDS, ExactMean
from paceline.exchange.link import Link
from paceline.exchange.local import diloco, easgd, gossip, local_sgd, sgp, shown
from paceline.exchange.ps import adpsgd, async_diloco, async_easgd, hogwild, ps
from paceline.terms.errors import UsageError
from paceline.terms.plan import Call


def ddp(
    codec: Literal["bf16", "fp16"] | Codec | int | None = None,
    *,
    ranks: int | None = None,
    algorithm: str = "auto",
    params: Literal["private", "shared"] = "private",
    bucket_mb: float | None = None,
    exact: bool = False,
    shards: int = SHARDS,
    commit: Literal["header", "vote"] = "header",
) -> Exchange:
    """Synchronous data parallelism: every rank steps with the same mean gradient.

    Gradients are exchanged bucket by bucket while backward runs, as the weighted mean over the global batch; every rank
    then takes the step that one process would take on that batch. It wins whenever the model fits on each rank and the
    wire keeps up with backward: nothing about the mathematics changes. It loses on slow or uneven links, where every
    step waits for the slowest rank and for ``2 (n-1)/n`` times the gradient's bytes.

    Args:
        codec: ``bf16`` or ``fp16`` halve the bytes and round each element twice; they pay where the network is the limit,
            not on one host. In Python any :class:`Codec`. A number in its place is that of the `ranks`.
        ranks: How many, for products such as ``tensor(2) * ddp(2)``; all that there are by default.
        algorithm: How to all-reduce: ``auto`` (the wire's own), ``star``, ``ring``, ``tree``, ``halving``,
            ``hierarchical`` (within hosts, then between them).
        params: ``shared`` keeps one copy of parameters and optimizer state per host; every rank updates a slice.
        bucket_mb: Upper bound of a bucket in MiB. Small buckets overlap sooner, large ones have fewer messages.
        exact: The same bits for every number of ranks, whoever joins or dies: each global batch is cut into `shards` parts, the
            loop goes round once for each part that a rank has, and gradients are summed in fixed point (``exchange/exact.py``).
        shards: How many parts; more ranks than that have nothing to do.
        commit: ``header``: that all have applied a step is told by the header of the next one's gradients. ``vote``: before each step all
            ranks also tell each other a fingerprint of the gradient that they have come to, and step only when all are the same: one
            small message more, and a check on the wire and on links of one's own.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    if type(codec) is int and ranks is None:
        codec, ranks = None, codec
    if ranks is not None:
        whole("ddp", "ranks", ranks, MOST_RANKS)
    if not (codec is None or isinstance(codec, Codec)):
        codec = CODECS[one_of("ddp", "codec", codec, CODECS)]()
    one_of("ddp", "algorithm", algorithm, ALGORITHMS)
    if codec is not None and algorithm != "auto":
        said = "leave one of them out: coded sums travel in their own way, in which each rank merges one slice."
        raise UsageError("PL203", f"ddp: algorithm={algorithm} cannot be combined with a codec", help=said)
    one_of("ddp", "params", params, ("private", "shared"))
    one_of("ddp", "commit", commit, ("header", "vote"))
    if bucket_mb is not None:
        positive("ddp", "bucket_mb", bucket_mb)
    _check_exact(exact, shards, codec, algorithm)
    word = codec.name if codec else None
    given = {"codec": word, "ranks": ranks, "algorithm": algorithm, "params": params, "bucket_mb": bucket_mb}
    text = spell(ddp, **given, exact=exact, shards=shards, commit=commit)
    link: Link = ExactMean(shards) if exact else AllReduceMean(codec, algorithm)
    votes = commit == "vote"
    return Exchange(chain(link, optimizer), params, bucket_mb, text, shards if exact else 0, ranks=ranks, votes=votes)


def _check_exact(exact: object, shards: object, codec: Codec | None, algorithm: str) -> None:
    if not isinstance(exact, bool):
        raise UsageError("PL203", f"ddp: exact={exact!r} cannot be", help="exact is True or False.")
    whole("ddp", "shards", shards, MOST_SHARDS)
    if not exact and shards != SHARDS:
        raise UsageError(
            "PL203", f"ddp: shards={shards} without exact=True", help="add exact=True, or leave shards out."
        )
    if exact and (codec is not None or algorithm != "auto"):
        said = "exact sums are fixed-point numbers, which travel by the wire's own all-reduce."
        raise UsageError("PL203", "ddp: exact=True cannot be combined with a codec or an algorithm", help=said)


def post_local_sgd(start: int, every: int | Cadence = 16, state: str = "local") -> Exchange:
    """Synchronous steps first, then local ones.

    It is ``then(ddp(), after=start, next=local_sgd(every))``.

    Lin et al., 1808.07217: local steps from the beginning on may end in worse minima; after the first drop of the learning rate
    they generalise at least as well as synchronous ones. The optimizer's state is that of the synchronous steps, on all ranks.

    Args:
        start: Synchronous steps, all counted from the beginning of the run.
        every, state: See :func:`local_sgd`.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    whole("post_local_sgd", "start", start, MOST)
    cadence = cadence_for("post_local_sgd", every)
    text = spell(post_local_sgd, start=start, every=shown(cadence), state=state)
    return replace(then(ddp(), start, local_sgd(every, state=state)), text=text)


def then(first: Exchange | str, after: int, next: Exchange | str) -> Exchange:
    """One strategy for the first steps, another one for the rest.

    ``then(ddp(), after=1000, next=diloco(every=50))``.

    All ranks change over between the same two steps. It wins where the beginning is delicate (large gradients, a warm-up) and
    bandwidth is short afterwards; it costs the memory of both.

    Args:
        first: In force from the beginning.
        after: Optimizer steps, counted from the beginning of the run.
        next: In force from then on; a `then` itself counts from the beginning of the run too.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have, or a strategy that cannot be changed to or from.
    """
    whole("then", "after", after, MOST)
    begin, end = _phase("first", first), _phase("next", next)
    phases = [(start, phase) for start, phase in _phases(begin) if start < after]
    phases += [(max(start, after), phase) for start, phase in _phases(end)]
    last = dict(phases)  # of several that begin together the last
    text = spell(then, first=Call(begin.text, bare=True), after=after, next=Call(end.text, bare=True))
    return Exchange(phases[0][1].chain, bucket_mb=begin.bucket_mb, text=text, phases=tuple(last.items()))


def _phases(exchange: Exchange) -> tuple[tuple[int, Exchange], ...]:
    return exchange.phases or ((0, exchange),)


def _phase(argument: str, value: object) -> Exchange:
    exchange = RECIPES[one_of("then", argument, value, RECIPES)]() if not isinstance(value, Exchange) else value
    for _, phase in _phases(exchange):
        if phase.shards or phase.params != "private" or phase.service is not None:
            said = "exact=True, params=shared and parameter servers arrange the whole run, from its first step to its last."
            raise UsageError("PL203", f"then: {argument}={phase.text} cannot be changed to or from", help=said)
    return exchange


RECIPES: dict[str, Callable[..., Exchange]] = {
    "ddp": ddp,
    "ps": ps,
    "hogwild": hogwild,
    "async_diloco": async_diloco,
    "async_easgd": async_easgd,
    "adpsgd": adpsgd,
    "local_sgd": local_sgd,
    "post_local_sgd": post_local_sgd,
    "diloco": diloco,
    "easgd": easgd,
    "gossip": gossip,
    "sgp": sgp,
    "then": then,
}


def summaries() -> dict[str, str]:
    """One line for each recipe."""
    return {name: (inspect.getdoc(recipe) or "").partition("\n")[0] for name, recipe in {**RECIPES, **AXES}.items()}
