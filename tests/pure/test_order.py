"""The keyed permutation is a bijection that looks shuffled, and its sampler works in anybody's DataLoader."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from paceline.data.order import KeyedPermutation, KeyedSampler
from support.feeds import Rows


@settings(max_examples=80, deadline=None)
@given(n=st.integers(0, 3000), key=st.integers(-(2**70), 2**70))
def test_every_number_comes_exactly_once(n: int, key: int) -> None:
    assert sorted(KeyedPermutation(n, key)) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10**15), key=st.integers(0, 2**64), data=st.data())
def test_any_index_of_a_huge_order_is_in_range_and_distinct(n: int, key: int, data: st.DataObject) -> None:
    order = KeyedPermutation(n, key)
    indices = data.draw(st.sets(st.integers(0, n - 1), max_size=50))
    values = {order[i] for i in indices}
    assert len(values) == len(indices)
    assert all(0 <= value < n for value in values)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 50])
def test_each_number_is_as_often_at_each_place(n: int) -> None:
    keys = 4000
    counts = Counter((i, value) for key in range(keys) for i, value in enumerate(KeyedPermutation(n, key)))
    expected = keys / n
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n))
    degrees = n * (n - 1)  # what the sum is on average for random permutations
    assert abs(chi_square / degrees - 1) < 5 * (2 / max(n - 1, 1) ** 2) ** 0.5


def test_all_orders_of_four_are_about_equally_frequent() -> None:
    counts = Counter(tuple(KeyedPermutation(4, key)) for key in range(12000))
    assert len(counts) == 24
    assert max(counts.values()) < 1.25 * min(counts.values())


def test_neighbours_are_as_far_apart_as_in_a_shuffle() -> None:
    order = list(KeyedPermutation(10_000, key=1))
    mean = sum(abs(a - b) for a, b in pairwise(order)) / len(order)
    assert abs(mean / (10_000 / 3) - 1) < 0.05


def test_indices_outside_are_refused() -> None:
    order = KeyedPermutation(5, 0)
    assert order[-1] == order[4]
    with pytest.raises(IndexError, match="index 5 is outside of a permutation of 5"):
        order[5]
    with pytest.raises(ValueError, match="got -1"):
        KeyedPermutation(-1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sampler_goes_on_by_itself_and_goes_back_when_told(workers: int) -> None:
    sampler = KeyedSampler(Rows(20), seed=3)
    loader = DataLoader(Rows(20), batch_size=6, sampler=sampler, num_workers=workers)

    def epoch() -> list[int]:
        return [row for batch in loader for row in batch.tolist()]

    first, second, third = epoch(), epoch(), epoch()
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != third != first
    sampler.set_epoch(1)
    assert epoch() == second
    assert len(loader) == 4


def test_seeds_name_different_orders() -> None:
    assert list(KeyedSampler(50, seed=0)) != list(KeyedSampler(50, seed=1))
    assert list(KeyedSampler(50, seed=7)) == list(KeyedSampler(Rows(50), seed=7))
