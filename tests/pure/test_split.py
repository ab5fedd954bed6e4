"""Every row of a batch goes to exactly one rank, in even or in asked-for parts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.split import Cut, share


@given(count=st.integers(0, 500), size=st.integers(1, 40), first=st.integers(0, 10**9))
def test_pieces_cover_the_batch_once_and_differ_by_at_most_one(count: int, size: int, first: int) -> None:
    pieces = [share(count, size, rank, first=first) for rank in range(size)]
    rows = sorted(row for start, number in pieces for row in range(start, start + number))
    assert rows == list(range(count))
    numbers = [number for _, number in pieces]
    assert max(numbers) - min(numbers) <= 1


@given(count=st.integers(0, 500), size=st.integers(1, 40))
def test_full_batches_are_cut_in_the_order_of_ranks(count: int, size: int) -> None:
    pieces = [share(count, size, rank) for rank in range(size)]
    rows = [row for start, number in pieces for row in range(start, start + number)]
    assert rows == list(range(count))


@given(
    count=st.integers(0, 10_000),
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 1e-3),
)
def test_shares_are_met_to_within_a_row(count: int, shares: list[float]) -> None:
    pieces = [share(count, len(shares), rank, shares=shares) for rank in range(len(shares))]
    rows = [row for start, number in pieces for row in range(start, start + number)]
    assert rows == list(range(count))
    for part, (_, number) in zip(shares, pieces, strict=True):
        assert abs(number - count * part / sum(shares)) <= 1 + 1e-6


def test_single_rows_go_round_all_ranks() -> None:
    owners = Counter(rank for row in range(100) for rank in range(4) if share(1, 4, rank, first=row) == (0, 1))
    assert owners == {0: 25, 1: 25, 2: 25, 3: 25}


def test_a_cut_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="rank 4 is not among 4 ranks"):
        Cut(4, 4)
    for shares in [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("inf")), (1.0, float("nan"))]:
        with pytest.raises(ValueError, match="shares are 2 non-negative numbers"):
            Cut(0, 2, shares)
    assert Cut(1, 2, (3.0, 1.0)).of(8, 0) == (6, 2)
