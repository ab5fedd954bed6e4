"""Which replica knows the state, and which runs of split models go on when they lose a rank."""

from __future__ import annotations

import pytest

from paceline.launch.layout import lay_out, outlives_ranks, replica_ranks
from paceline.terms.errors import WireError
from paceline.terms.plan import Plan
from paceline.train.split_members import furthest


def test_those_who_have_come_furthest_with_all_ranks() -> None:
    assert furthest([5, 5, -1, -1, 5, 5], 2) == [0, 4]
    assert furthest([4, 4, 5, 5], 2) == [2]
    assert furthest([4, 5, 5, 5], 2) == [2]


def test_no_replica_is_whole() -> None:
    with pytest.raises(
        WireError, match="rank 0 at step 4, rank 1 at step 5, rank 2 at step 5, rank 3 at step 4"
    ) as caught:
        furthest([4, 5, 5, 4, -1, -1], 2)
    assert caught.value.code == "PL427"


@pytest.mark.parametrize(
    ("strategy", "processes", "ranks", "outlives"),
    [
        ("ddp()", 4, 1, False),  # as all that are no products: it is not asked here
        ("fsdp()", 4, 4, False),
        ("fsdp(2) * ddp()", 4, 2, True),
        ("fsdp(2) * ddp(2)", 4, 2, True),
        ("pipeline(2) * tensor(2)", 8, 4, True),
        ("tensor(2) * local_sgd(8)", 4, 2, False),
        ("fsdp(2, build=parts) * ddp()", 4, 2, False),
        ("ddp(2) * local_sgd(8)", 4, 2, False),
    ],
)
def test_what_outlives_a_rank(strategy: str, processes: int, ranks: int, outlives: bool) -> None:
    assert replica_ranks(Plan(script="", strategy=strategy, processes=processes)) == ranks
    assert outlives_ranks(strategy, processes) is outlives
    assert (lay_out(strategy, processes) is None) == (ranks == 1)
