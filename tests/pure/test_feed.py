"""n ranks see, together and in order, exactly the batches that one process sees, each row once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    get_worker_info,
)

from support.feeds import Rows, reassembled, run_plain, run_ranks
from support.loaders import LOADERS, N, OwnGenerator, noisy_collate, rows_of, sized


def alternating(make: Callable[..., DataLoader[Any]], **options: Any) -> Callable[[Any], list[list[int]]]:
    """Three epochs of a loader, with a shuffled test loader in between, as scripts do."""

    def program(job: Any) -> list[list[int]]:
        train, test = job.adopt(make(**options)), job.adopt(DataLoader(Rows(11), batch_size=4, shuffle=True))
        seen = []
        for _ in range(3):
            seen += [rows_of(batch) for batch in train]
            seen += [rows_of(batch) for batch in test]
        return seen

    return program


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", LOADERS)
def test_all_ranks_together_see_the_batches_of_one_process(name: str, size: int) -> None:
    program = alternating(LOADERS[name])
    ranks = run_ranks(program, size)
    assert reassembled(ranks) == run_plain(program)
    assert all(rank.ends == ranks[0].ends for rank in ranks)
    assert all(end.complete for end in ranks[0].ends)
    assert len(ranks[0].ends) == 6


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
@pytest.mark.parametrize(
    "name", ["shuffled", "own generator", "with replacement", "numpy's random", "buckets", "iterable", "no batching"]
)
def test_worker_processes_change_nothing(name: str, options: dict[str, Any]) -> None:
    program = alternating(LOADERS[name], **options)
    ranks = run_ranks(program, 2)
    assert reassembled(ranks) == run_plain(program)
    assert ranks[0].ends == ranks[1].ends


@pytest.mark.parametrize("name", ["shuffled", "python's random", "numpy's random", "iterable, no batching"])
def test_a_script_that_seeds_nothing_has_the_order_of_rank_0(name: str) -> None:
    program = alternating(LOADERS[name])
    assert reassembled(run_ranks(program, 3, unseeded=True)) == run_plain(program)


def test_generators_that_nobody_seeded_are_those_of_rank_0() -> None:
    ranks = run_ranks(alternating(lambda: DataLoader(Rows(N), 5, sampler=OwnGenerator())), 3, unseeded=True)
    batches = reassembled(ranks)
    assert sorted(row for batch in batches[:5] for row in batch) == list(range(N))
    assert ranks[0].ends == ranks[1].ends == ranks[2].ends


@pytest.mark.parametrize("fork", [False, True])
def test_reseeding_in_the_script_means_the_order_too(fork: bool) -> None:
    def program(job: Any) -> list[list[int]]:
        train, test = job.adopt(sized(shuffle=True)()), job.adopt(sized(9, shuffle=True)())
        seen = []
        if fork:  # with the number that the fork seeds with: the two streams begin alike
            torch.manual_seed(7)
        for epoch in range(3):
            if not fork:
                torch.manual_seed(epoch)
            seen += [rows_of(batch) for batch in train]
            with torch.random.fork_rng(enabled=fork):
                torch.manual_seed(7)
                seen += [rows_of(batch) for batch in test]
        return seen

    plain = run_plain(program)
    assert reassembled(run_ranks(program, 3)) == plain
    assert not fork or (plain[5:7] == plain[12:14] and plain[:5] != plain[7:12])


def test_ranks_draw_different_noise_and_the_same_order() -> None:
    def program(job: Any) -> list[list[int]]:
        train, noise = job.adopt(sized(shuffle=True)()), []
        for _ in range(2):
            for batch in train:
                seen.append(rows_of(batch))
                noise.append((torch.rand(()).item(), random.random(), np.random.rand()))
        noises.append(noise)
        return seen[-10:]

    seen: list[list[int]] = []
    noises: list[Any] = []
    reassembled(run_ranks(program, 3))
    numbers = [number for noise in noises for draw in noise for number in draw]
    assert len(numbers) == len(set(numbers))


def test_nested_loops_a_break_and_two_iterators_at_once_are_as_in_one_process() -> None:
    def program(job: Any) -> list[list[int]]:
        train, test = job.adopt(sized(shuffle=True)()), job.adopt(sized(9, shuffle=True)())
        seen = []
        for i, batch in enumerate(train):
            seen.append(rows_of(batch))
            seen += [rows_of(batch) for batch in test]
            if i == 2:
                break
        for left, right in zip(train, train, strict=True):
            seen += [rows_of(left), rows_of(right)]
        it = iter(train)
        return [*seen, rows_of(next(it)), rows_of(next(it))]

    ranks = run_ranks(program, 2)
    assert reassembled(ranks) == run_plain(program)
    left_early = [(e.loader, e.epoch, e.batches, e.rows) for e in ranks[0].ends if not e.complete]
    # The third pass began while the second was open, which is reported at that time. The last one is never finished.
    assert left_early == [(0, 0, 3, 15), (0, 1, 0, 0), (0, 3, 2, 10)]
    assert ranks[0].ends == ranks[1].ends


def test_an_iterator_of_persistent_workers_goes_on_in_the_newer_pass() -> None:
    def program(job: Any) -> list[list[int]]:
        train = job.adopt(sized(shuffle=True, num_workers=1, persistent_workers=True)())
        old = iter(train)
        first = rows_of(next(old))
        new = iter(train)
        return [first] + [rows_of(next(it)) for it in (old, new, old, new, old)]

    assert reassembled(run_ranks(program, 2)) == run_plain(program)


class Seeds(Dataset[int]):
    """Each row says how the process that read it draws."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        info = get_worker_info()
        return info.seed if info else int(torch.randint(10**9, ()))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_of_different_ranks_have_different_seeds(workers: int) -> None:
    def program(job: Any) -> list[list[int]]:
        return [rows_of(batch) for batch in job.adopt(DataLoader(Seeds(), batch_size=4, num_workers=workers))]

    ranks = run_ranks(program, 3)
    seeds = [{seed for batch in rank.result for seed in batch} for rank in ranks]
    assert not seeds[0] & seeds[1]
    assert not seeds[0] & seeds[2]
    assert not seeds[1] & seeds[2]
    if workers:  # rank 0's are those of one process
        assert seeds[0] <= {seed for batch in run_plain(program) for seed in batch}


class Walked(IterableDataset[int]):
    """The order is drawn while walking."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        for _ in range(12):
            yield (info.id if info else 0) * 1000 + random.randrange(1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function_that_draws_does_not_move_the_walk(workers: int) -> None:
    def program(job: Any, collate: Any = noisy_collate) -> list[list[int]]:
        loader = job.adopt(DataLoader(Walked(), batch_size=5, num_workers=workers, collate_fn=collate))
        return [rows_of(batch) for _ in range(2) for batch in loader]

    # Without the drawing collate: under plain python that one would move the walk.
    expected = run_plain(lambda job: program(job, torch.tensor))
    assert reassembled(run_ranks(program, 3)) == expected
