"""Ranks come and go in the middle of a pass: the loop that holds it gets the same global batches, cut among those who are there."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from support.feeds import Rank, run_ranks
from support.loaders import LOADERS, rows_of

IN_MAIN = [name for name in LOADERS if name != "less than a batch"]


def script(
    job: Any, make: Any, options: dict[str, Any], *, change: int, ranks: int, again: bool
) -> list[tuple[int, list[int]]]:
    """Two epochs. At batch number `change` rank `ranks` and those after it are lost before its step is applied.

    Args:
        again: The first of two optimizers has stepped on that batch, and so has committed it.

    Returns:
        The number of the step and the rows, for every batch whose step was applied.
    """
    train = job.adopt(make(**options))
    step, done = 0, []
    for _ in range(2):
        for batch in train:
            if step == change and ranks:
                if again:
                    train.commit()
                if job.rank >= ranks:
                    return done
                train.resplit(job.rank, ranks, again=again)
                ranks = 0
                continue
            if not job.slices[-1].phantom:
                done.append((step, rows_of(batch)))
            step += 1
            train.commit()
    return done


def batches(ranks: list[Rank]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for rank in ranks:
        for step, rows in rank.result:
            found[step] += rows
    return {step: sorted(rows) for step, rows in found.items()}


def check(name: str, options: dict[str, Any], change: int, again: bool) -> None:
    whole = run_ranks(lambda job: script(job, LOADERS[name], options, change=-1, ranks=0, again=False), 3)
    less = run_ranks(lambda job: script(job, LOADERS[name], options, change=change, ranks=2, again=again), 3)
    assert batches(less) == batches(whole)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("change", [1, 2, 4])
@pytest.mark.parametrize("name", IN_MAIN)
def test_the_same_batches_among_fewer_ranks(name: str, change: int, again: bool) -> None:
    check(name, {}, change, again)


@pytest.mark.parametrize("name", ["shuffled", "own generator", "iterable", "no batching"])
def test_the_same_batches_with_workers(name: str) -> None:
    check(name, {"num_workers": 1}, 2, False)
    check(name, {"num_workers": 1, "persistent_workers": True}, 2, False)
