"""Whose loss is it? What of a step's batches a rank has must be the same for all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paceline.data.rows import Slice
from paceline.terms.errors import StepError


def shard_of(shards: Sequence[Slice], unstepped: bool, weighted: bool) -> Slice:
    """The shard that is trained on, of the batches that were handed out.

    Args:
        unstepped: A gradient was taken, and no step has followed it.
        weighted: The script says how much its loss weighs.

    Raises:
        StepError: PL413, PL450, PL451.
    """
    if not shards or unstepped:
        raise StepError("PL450", "exact=True: a second gradient was taken of the same rows")
    if any(shard.shard < 0 for shard in shards):
        raise StepError("PL451", "exact=True: the rows trained on were not cut into shards")
    if len({(shard.round, shard.rounds) for shard in shards}) > 1:
        raise StepError("PL451", "exact=True: the loaders of one step have batches with different numbers of shards")
    if not weighted and len({shard.rows for shard in shards}) > 1:
        raise StepError("PL413", "exact=True: this step trains on batches of different numbers of rows")
    return shards[-1]


def refuse_unlike_shares(batches: Iterable[int], size: int) -> None:
    """Raise StepError PL413 when it depends on the loader how much of a batch a rank has: whose loss is it?

    Args:
        batches: Rows of the batches of one step.
        size: Number of ranks.
    """
    rows = set(batches)
    if len(rows) > 1 and any(n % size for n in rows):
        raise StepError(
            "PL413",
            f"this step trains on batches of {' and '.join(map(str, sorted(rows)))} rows, of which a rank has different shares",
        )
