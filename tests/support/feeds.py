"""Many ranks in one process: a program is run once a rank, each run with random states and streams of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from paceline.data.feed import Feed
from paceline.data.generators import RandomState, seed_all
from paceline.data.rows import EpochEnd, Slice
from paceline.data.streams import Streams


class Rows(Dataset[int]):
    """Row i is i, so that a batch shows which rows it is made of."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """Numbers 0 to n, sharded over workers as torch's documentation has it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        return iter(range(info.id, self.n, info.num_workers) if info else range(self.n))


class Rank:
    """What one run of a program is given instead of a job, and what it saw."""

    def __init__(self, rank: int, size: int, share: Callable[[bytes], bytes]) -> None:
        self.rank, self.size = rank, size
        self.streams = Streams(rank, size, share)
        self.feeds: list[Feed] = []
        self.slices: list[Slice] = []
        self.ends: list[EpochEnd] = []
        self.phantoms = True
        self.stops = 0
        self.result: Any = None

    def adopt(self, loader: DataLoader[Any], **options: Any) -> Feed:
        def before() -> None:
            self.stops += 1

        feed = Feed(
            loader,
            rank=self.rank,
            size=self.size,
            streams=self.streams,
            index=len(self.feeds),
            before_batch=before,
            want_phantom=lambda: self.phantoms,
            on_batch=self.slices.append,
            on_epoch=self.ends.append,
            **options,
        )
        self.feeds.append(feed)
        return feed


class Plain:
    """The same program under plain python: nothing is adopted."""

    phantoms = True

    def adopt(self, loader: DataLoader[Any], **_: Any) -> DataLoader[Any]:
        return loader


Program = Callable[[Any], Any]


def run_plain(program: Program, seed: int = 0) -> Any:
    with seeded(seed):
        return program(Plain())


def run_ranks(program: Program, size: int, seed: int = 0, *, unseeded: bool = False) -> list[Rank]:
    """Run `program` for each rank; rank 0 runs first, so what it shares is known when the others ask.

    Args:
        unseeded: Ranks other than 0 start from other random states, as in a script that seeds nothing.
    """
    said: list[bytes] = []
    ranks = []
    for number in range(size):
        heard = iter(said)

        def share(raw: bytes, number: int = number, heard: Iterator[bytes] = heard) -> bytes:
            if number == 0:
                said.append(raw)
                return raw
            return next(heard)

        rank = Rank(number, size, share)
        with seeded(seed + number * unseeded):
            rank.result = program(rank)
            for feed in rank.feeds:
                feed.close()
        assert number == 0 or next(heard, None) is None, "ranks took part in different numbers of collectives"
        ranks.append(rank)
    return ranks


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    before = RandomState.take()
    seed_all(seed)
    try:
        yield
    finally:
        before.put()


def reassembled(ranks: list[Rank]) -> list[list[int]]:
    """The global batches, in the order of rank 0's loop, from what all ranks were given.

    Every program here returns the list of batches that its loop got, as lists of numbers, in the order of `slices`.
    """
    pieces: dict[tuple[int, int, int], dict[int, Any]] = defaultdict(dict)
    sizes: dict[tuple[int, int, int], int] = {}
    for rank in ranks:
        assert len(rank.slices) == len(rank.result)
        for piece, rows in zip(rank.slices, rank.result, strict=True):
            key = (piece.loader, piece.epoch, piece.batch)
            sizes.setdefault(key, piece.rows)
            assert sizes[key] == piece.rows
            assert len(rows) == (1 if piece.phantom else piece.local_rows)
            for i, row in enumerate(rows[: piece.local_rows]):
                assert piece.local_start + i not in pieces[key], "a row was given twice"
                pieces[key][piece.local_start + i] = row
    for key, rows in pieces.items():
        assert sorted(rows) == list(range(sizes[key])), "rows are missing"
    skipping = any(not rank.phantoms for rank in ranks)
    order = sorted(pieces) if skipping else [(s.loader, s.epoch, s.batch) for s in ranks[0].slices]
    return [[pieces[key][i] for i in range(sizes[key])] for key in order]
