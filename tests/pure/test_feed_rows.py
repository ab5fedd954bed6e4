"""What a rank gets of a batch, what it is told when reading fails, and which loaders are refused."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    TensorDataset,
)

from paceline.data.inner import build
from paceline.data.split import Cut
from paceline.data.streams import Streams
from paceline.terms.errors import AdoptError
from support.feeds import Rank, Rows, Stream, reassembled, run_plain, run_ranks
from support.loaders import Chunks, fresh, noisy_collate, rows_of, sized


def test_a_rank_without_rows_gets_a_phantom_or_lets_the_batch_pass() -> None:
    def program(job: Any) -> list[list[int]]:
        loader = job.adopt(sized(10, batch_size=8)())
        seen = [rows_of(batch) for batch in loader]
        job.phantoms = False
        return seen + [rows_of(batch) for batch in loader]

    ranks = run_ranks(program, 4)
    assert [rank.result for rank in ranks] == [
        [[0, 1], [8], [0, 1], [8]],
        [[2, 3], [9], [2, 3], [9]],
        [[4, 5], [8], [4, 5]],
        [[6, 7], [8], [6, 7]],
    ]
    assert [(s.phantom, s.local_rows, s.rows, s.start) for s in ranks[3].slices] == [
        (False, 2, 8, 0),
        (True, 0, 2, 8),
        (False, 2, 8, 0),
    ]
    assert all(rank.ends == ranks[0].ends for rank in ranks)
    assert all(rank.stops == len(rank.result) + 2 for rank in ranks)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["single rows", "iterable"])
def test_evaluating_single_rows_reads_each_once_over_all_ranks(name: str, workers: int) -> None:
    def program(job: Any) -> list[list[int]]:
        job.phantoms = False
        data = Rows(7) if name == "single rows" else Stream(7)
        return [rows_of(batch) for batch in job.adopt(DataLoader(data, batch_size=1, num_workers=workers))]

    ranks = run_ranks(program, 3)
    assert sorted(row for batch in reassembled(ranks) for row in batch) == list(range(7))
    assert max(len(rank.result) for rank in ranks) <= 4
    assert all(rank.ends == ranks[0].ends for rank in ranks)


def test_a_phantom_that_is_wanted_after_workers_ran_past_it_is_read() -> None:
    def program(job: Any) -> list[list[int]]:
        job.phantoms = False
        it = iter(job.adopt(sized(4, batch_size=1, num_workers=1, prefetch_factor=8)()))
        job.phantoms = True
        return [rows_of(batch) for batch in it]

    ranks = run_ranks(program, 2)
    assert [rank.result for rank in ranks] == [[[0], [1], [2], [3]]] * 2
    assert reassembled(ranks) == [[0], [1], [2], [3]]


def test_collate_sees_this_ranks_rows_only() -> None:
    calls: list[list[int]] = []

    def collate(rows: list[int]) -> torch.Tensor:
        calls.append(rows)
        return torch.tensor(rows)

    for data in (Rows(10), Stream(10)):
        calls.clear()
        run_ranks(lambda job, d=data: [rows_of(b) for b in job.adopt(DataLoader(d, 5, collate_fn=collate))], 2)
        assert calls == [[0, 1, 2], [5, 6, 7], [3, 4], [8, 9]]


@pytest.mark.parametrize("workers", [0, 1])
def test_unequal_shares(workers: int) -> None:
    def program(job: Any) -> list[list[int]]:
        loader = job.adopt(sized(20, batch_size=8, num_workers=workers)(), shares=[3.0, 1.0])
        return [rows_of(batch) for batch in loader]

    ranks = run_ranks(program, 2)
    assert [len(batch) for batch in ranks[0].result] == [6, 6, 3]
    assert [row for batch in reassembled(ranks) for row in batch] == list(range(20))


class Breaks(Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise KeyError("row seven")
        return index


class BreaksWalking(Stream):
    def __iter__(self) -> Iterator[int]:
        yield from range(7)
        raise KeyError("row seven")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("data", "where"),
    [
        (Breaks(), "was reading rows 6 to 7 of epoch 0 of loader 0 (batch 1), indices [6, 7]"),
        (BreaksWalking(12), "was reading batch 1 of epoch 0 of loader 0, from row 4"),
    ],
)
def test_the_users_exception_keeps_its_type_and_names_the_rows(data: Any, where: str, workers: int) -> None:
    def program(job: Any) -> list[list[int]]:
        it, seen = iter(job.adopt(DataLoader(data, batch_size=4, num_workers=workers))), []
        while True:
            try:
                seen.append(rows_of(next(it)))
            except KeyError as error:
                notes.extend(getattr(error, "__notes__", []))
            except StopIteration:
                return seen

    notes: list[str] = []
    plain = run_plain(program)
    assert not notes
    ranks = run_ranks(program, 2)
    assert any(note.startswith("PL307: rank 1 ") and where in note for note in notes)
    # As in one process: an iterator over indices goes on after the batch that failed, a generator has ended.
    assert ranks[1].result == [batch[2:] for batch in plain]
    assert all(s.batch != 1 for s in ranks[1].slices)


def test_a_batch_without_rows_is_refused() -> None:
    class Texts(Rows):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.zeros(3), "name": "a"}

    def program(job: Any) -> Any:
        return list(job.adopt(DataLoader(Texts(3), batch_size=None)))

    with pytest.raises(AdoptError, match=r"PL305.*yields \{'x': a tensor of shape \(3,\), 'name': str\}"):
        run_ranks(program, 2)


def test_nested_structures_are_cut_along_their_rows() -> None:
    Pair = __import__("collections").namedtuple("Pair", "left right")

    class Nested(Rows):
        def __getitem__(self, index: int) -> Any:
            x = torch.arange(5)
            return {"x": x, "more": (x, [x.view(5, 1)], Pair(x, x))}

    ranks = run_ranks(lambda job: list(job.adopt(DataLoader(Nested(1), batch_size=None))), 2)
    (batch,) = ranks[1].result
    assert batch["x"].tolist() == batch["more"][0].tolist() == batch["more"][2].left.tolist() == [3, 4]
    assert batch["more"][1][0].shape == (2, 1)


class OwnWay(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class Replicas(Sampler[int]):
    num_replicas = 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "code"),
    [
        (lambda: OwnWay(Rows(3)), "PL305"),
        (lambda: DataLoader(Rows(3), num_workers=1, in_order=False), "PL306"),
        (lambda: DataLoader(Rows(3), sampler=Replicas()), "PL306"),
    ],
)
def test_loaders_that_cannot_be_divided_are_refused(loader: Callable[[], Any], code: str) -> None:
    with pytest.raises(AdoptError, match=code):
        Rank(0, 2, bytes).adopt(loader())


def test_a_feed_passes_for_the_users_loader() -> None:
    g = fresh(0)
    loader = DataLoader(Rows(10), batch_size=4, shuffle=True, generator=g)
    feed = Rank(0, 2, bytes).adopt(loader)
    assert isinstance(feed, DataLoader)
    assert len(feed) == 3
    for name in ("dataset", "batch_size", "sampler", "batch_sampler", "drop_last", "num_workers", "collate_fn"):
        assert getattr(feed, name) is getattr(loader, name)
    assert feed.generator is g
    assert feed.multiprocessing_context is None
    assert not hasattr(feed, "no_such_thing")
    feed.collate_fn = torch.tensor
    assert loader.collate_fn is torch.tensor
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        feed.batch_size = 3
    with pytest.raises(TypeError, match="has no len"):
        len(Rank(0, 2, bytes).adopt(DataLoader(Chunks(), batch_size=None)))


def test_settings_reach_the_workers() -> None:
    def program(job: Any) -> list[list[int]]:
        options: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": start, "timeout": 60}
        map_style = job.adopt(DataLoader(Where(), batch_size=4, num_workers=1, **options))
        iterable = job.adopt(DataLoader(Stream(8), batch_size=4, num_workers=1, **options))
        return [rows_of(batch) for feed in (map_style, iterable) for batch in feed]

    ranks = run_ranks(program, 2)
    assert ranks[1].result == [[42, 42], [42, 42], [2, 3], [6, 7]]


def test_what_goes_to_workers_can_be_sent_to_a_fresh_interpreter() -> None:
    # As a "spawn" context does; starting one here would take seconds.
    for workers, data in ((0, Rows(3)), (2, Rows(3)), (2, Stream(3))):
        loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=noisy_collate)
        inner, _ = build(loader, Cut(1, 2), Streams(1, 2), lambda: True)
        assert inner.collate_fn is noisy_collate or pickle.loads(pickle.dumps(inner.collate_fn))([4, 5]) is not None


STARTED = [0]


def start(worker: int) -> None:
    STARTED[0] = 42


class Where(Rows):
    def __init__(self) -> None:
        super().__init__(8)

    def __getitem__(self, index: int) -> int:
        return STARTED[0]


@pytest.mark.parametrize("kind", ["long", "float", "strided", "negative", "two"])
def test_gathering_equals_row_by_row(kind: str) -> None:
    x = torch.arange(60, dtype=torch.float64 if kind == "float" else torch.int64).view(12, 5)
    if kind == "strided":
        x = x.t().contiguous().t()
    data = TensorDataset(x, torch.arange(12)) if kind == "two" else TensorDataset(x)
    sampler = list(range(-6, 6)) if kind == "negative" else None

    def program(job: Any) -> Any:
        return list(job.adopt(DataLoader(data, batch_size=5, sampler=sampler)))

    for got, expected in zip(run_ranks(program, 1)[0].result, run_plain(program), strict=True):
        assert type(got) is type(expected)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def test_an_index_out_of_range_is_torchs_own_error() -> None:
    def program(job: Any) -> Any:
        return list(job.adopt(DataLoader(TensorDataset(torch.zeros(3)), batch_size=2, sampler=[0, 5])))

    with pytest.raises(IndexError, match="index 5 is out of bounds for dimension 0 with size 3"):
        run_ranks(program, 1)


class Slow(Rows):
    """Takes longer for its first row than the loader is ready to wait."""

    def __getitem__(self, index: int) -> int:
        if index == 0:
            time.sleep(0.6)
        return index


def test_after_a_timeout_the_same_batch_is_waited_for_again() -> None:
    def program(job: Any) -> list[list[int]]:
        it, seen = iter(job.adopt(DataLoader(Slow(8), batch_size=4, num_workers=1, timeout=0.3))), []
        while len(seen) < 2:
            try:
                seen.append(rows_of(next(it)))
            except RuntimeError as error:
                notes.extend(getattr(error, "__notes__", []))
        return seen

    notes: list[str] = []
    ranks = run_ranks(program, 2)
    assert reassembled(ranks) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "rows 0 to 1 of epoch 0" in notes[0]
