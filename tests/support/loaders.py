"""Loaders as people write them: every place that an order can be drawn from, every way to make batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from paceline.data.order import KeyedSampler
from support.feeds import Rows, Stream

N = 23


class Shuffled(Sampler[int]):
    """Draws from Python's generator, lazily, one element at a time."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        left = list(range(N))
        while left:
            yield left.pop(random.randrange(len(left)))


class Noisy(Sampler[int]):
    """Draws everything when ``iter()`` is called, from NumPy; an odd number of normals leaves one in NumPy's cache."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(np.argsort(np.random.randn(N)))


class Buckets(Sampler[list[int]]):
    """Batches of unequal length, shuffled among themselves, drawn from all three generators."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N).tolist()
        batches = [order[i : i + 4] for i in range(0, N, 4)]
        random.shuffle(batches)
        for batch in batches:
            yield batch[: max(1, int(np.random.randint(5)))]


class OwnGenerator(Sampler[int]):
    """Holds generators that nobody seeded."""

    def __init__(self) -> None:
        self.python = random.Random()
        self.numpy = np.random.default_rng()
        self.legacy = np.random.RandomState()

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        order = list(range(N))
        self.python.shuffle(order)
        for generator in (self.numpy, self.legacy):
            generator.shuffle(order)
        return iter(order)


def sized(n: int = N, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(Rows(n), **{"batch_size": 5} | options)


def fresh(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "in order": lambda **o: DataLoader(Rows(N), batch_size=5, **o),
    "shuffled": lambda **o: DataLoader(Rows(N), batch_size=5, shuffle=True, **o),
    "drop_last": lambda **o: DataLoader(Rows(N), batch_size=5, shuffle=True, drop_last=True, **o),
    "single rows": lambda **o: DataLoader(Rows(7), batch_size=1, shuffle=True, **o),
    "less than a batch": lambda **o: DataLoader(Rows(3), batch_size=64, shuffle=True, **o),
    "own generator": lambda **o: DataLoader(Rows(N), batch_size=5, shuffle=True, generator=fresh(5), **o),
    "own generator, full batches": lambda **o: DataLoader(Rows(20), 5, shuffle=True, generator=fresh(5), **o),
    "with replacement": lambda **o: DataLoader(Rows(N), 5, sampler=RandomSampler(Rows(N), True, 70, fresh(2)), **o),
    "more than once": lambda **o: DataLoader(Rows(N), 5, sampler=RandomSampler(Rows(N), num_samples=60), **o),
    "weighted": lambda **o: DataLoader(Rows(N), 5, sampler=WeightedRandomSampler(range(1, N + 1), 31), **o),
    "subset": lambda **o: DataLoader(Rows(N), 5, sampler=SubsetRandomSampler(range(2, N)), **o),
    "subset, own generator": lambda **o: DataLoader(
        Rows(N), 5, sampler=SubsetRandomSampler(range(2, N), fresh(1)), generator=fresh(9), **o
    ),
    "keyed": lambda **o: DataLoader(Rows(N), 5, sampler=KeyedSampler(N, 4), **o),
    "python's random": lambda **o: DataLoader(Rows(N), 5, sampler=Shuffled(), **o),
    "numpy's random": lambda **o: DataLoader(Rows(N), 5, sampler=Noisy(), **o),
    "buckets": lambda **o: DataLoader(Rows(N), batch_sampler=Buckets(), **o),
    "batches of tensors": lambda **o: DataLoader(Rows(N), batch_sampler=list(torch.arange(N).split(5)), **o),
    "batch sampler": lambda **o: DataLoader(Rows(N), batch_sampler=BatchSampler(RandomSampler(Rows(N)), 5, True), **o),
    "tensors": lambda **o: DataLoader(TensorDataset(torch.arange(N)), batch_size=5, shuffle=True, **o),
    "subset of tensors": lambda **o: DataLoader(Subset(TensorDataset(torch.arange(N)), range(2, N)), 5, True, **o),
    "iterable": lambda **o: DataLoader(Stream(N), batch_size=5, **o),
    "iterable, drop_last": lambda **o: DataLoader(Stream(N), batch_size=5, drop_last=True, **o),
    "no batching": lambda **o: DataLoader(TensorDataset(torch.arange(60).view(6, 10)), None, shuffle=True, **o),
    "iterable, no batching": lambda **o: DataLoader(Chunks(), None, **o),
}


class Chunks(IterableDataset[torch.Tensor]):
    """Batches of any length, drawn as they come."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(4):
            yield torch.randperm(random.randrange(1, 9))


def rows_of(batch: Any) -> list[int]:
    return (batch[0] if isinstance(batch, (list, tuple)) else batch).tolist()


def noisy_collate(rows: list[int]) -> torch.Tensor:
    random.random()  # draws that depend on the number of rows, and so on the rank
    torch.rand(len(rows))
    return torch.tensor(rows)
