"""A pass that is resumed gives the batches that the uninterrupted one gave, without reading those before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from paceline.terms.errors import StepError, UsageError
from support.feeds import Rank, Rows, Stream, reassembled, run_ranks, seeded
from support.loaders import LOADERS, N, rows_of


def script(job: Any, make: Any, options: dict[str, Any], *, stop: int | None = None, saved: Any = None) -> list[Any]:
    """Three epochs with an evaluation every third step; a step is every batch.

    Args:
        stop: Steps after which the state is saved and the script ends.
        saved: A saved state to go on from.
    """
    train = job.adopt(make(**options))
    test = job.adopt(DataLoader(Rows(6), batch_size=4, shuffle=True))
    step, epoch, seen = 0, 0, []
    if saved:
        state = json.loads(saved)
        step, epoch = state["step"], state["epoch"]
        job.streams.load_state_dict(state["streams"])
        for feed, position in zip(job.feeds, state["feeds"], strict=True):
            feed.load_state_dict(position)
    while epoch < 3:
        for batch in train:
            seen.append(rows_of(batch))
            step += 1
            for feed in job.feeds:
                feed.commit()
            if step % 3 == 0:
                seen += [rows_of(batch) for batch in test]
            if step == stop:
                feeds = [feed.state_dict() for feed in job.feeds]
                state = {"step": step, "epoch": epoch, "streams": job.streams.state_dict(), "feeds": feeds}
                job.saved = json.dumps(state)
                return seen
        epoch += 1
    return seen


# Lazily drawing samplers in workers are prefetched; then draws of other loaders in between cannot be told apart.
IN_MAIN = [name for name in LOADERS if name != "less than a batch"]
IN_WORKERS = ["shuffled", "own generator", "own generator, full batches", "keyed", "iterable", "no batching"]


@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("name", IN_MAIN)
def test_resuming_gives_the_rest(name: str, stop: int) -> None:
    check_resume(name, {}, stop, 2, 2)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (4, 2)])
def test_resuming_with_another_number_of_ranks(sizes: tuple[int, int]) -> None:
    for name in ("shuffled", "buckets", "iterable, no batching"):
        check_resume(name, {}, 4, *sizes)


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
@pytest.mark.parametrize("name", IN_WORKERS)
def test_prefetching_does_not_move_the_position(name: str, options: dict[str, Any]) -> None:
    for stop in (8, 10):  # amid the second epoch, and at the last step of an epoch
        check_resume(name, options, stop, 1, 1)


def check_resume(name: str, options: dict[str, Any], stop: int, before: int, after: int) -> None:
    make = LOADERS[name]
    whole = run_ranks(lambda job: script(job, make, options), before)
    first = run_ranks(lambda job: script(job, make, options, stop=stop), before)
    rest = run_ranks(lambda job: script(job, make, options, saved=first[0].saved), after, seed=99)
    assert reassembled(first) + reassembled(rest) == reassembled(whole)


def test_rows_before_the_position_are_not_read() -> None:
    read: list[int] = []

    class Told(Rows):
        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    def program(job: Any, saved: Any = None) -> Any:
        feed = job.adopt(DataLoader(Told(N), batch_size=5))
        if saved:
            feed.load_state_dict(saved)
        it = iter(feed)
        for _ in range(3 - bool(saved)):
            next(it)
        feed.commit()
        return feed.state_dict()

    saved = run_ranks(program, 1)[0].result
    assert (saved["epoch"], saved["batch"], saved["rows"], saved["length"]) == (0, 3, 15, 5)
    read.clear()
    run_ranks(lambda job: program(job, saved), 1)
    assert read == list(range(15, 23))


def feed_of(loader: Any) -> Any:
    return Rank(0, 1, bytes).adopt(loader)


def test_positions_between_passes() -> None:
    with seeded(0):
        feed = feed_of(DataLoader(Rows(10), batch_size=5))
        assert feed.state_dict()["epoch"] == -1
        for _ in feed:
            break
        left = feed.state_dict()
        assert (left["epoch"], left["begin"]) == (0, None)
        list(feed)
        assert (feed.state_dict()["epoch"], feed.state_dict()["begin"]) == (1, None)
        again = feed_of(DataLoader(Rows(10), batch_size=5))
        again.load_state_dict(left)
        assert [rows_of(batch) for batch in again] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert again.state_dict()["epoch"] == 1


def test_uncommitted_batches_come_again() -> None:
    with seeded(0):
        feed = feed_of(DataLoader(Rows(30), batch_size=5, shuffle=True))
        it = iter(feed)
        batches = [rows_of(next(it)) for _ in range(2)]
        feed.commit()
        batches += [rows_of(next(it)) for _ in range(2)]
        saved = feed.state_dict()
        assert saved["batch"] == 2
        batches += [rows_of(batch) for batch in it]
        again = feed_of(DataLoader(Rows(30), batch_size=5, shuffle=True))
        again.load_state_dict(saved)
        torch.manual_seed(1)
        assert [rows_of(batch) for batch in again] == batches[2:]


def test_a_loaded_position_can_be_saved_again_before_it_is_used() -> None:
    with seeded(0):
        feed = feed_of(DataLoader(Rows(30), batch_size=5, shuffle=True))
        it = iter(feed)
        next(it)
        feed.commit()
        saved = feed.state_dict()
        again = feed_of(DataLoader(Rows(30), batch_size=5, shuffle=True))
        again.load_state_dict(saved)
        assert again.state_dict() == saved


def test_a_position_at_the_very_end_of_a_pass_ends_it() -> None:
    with seeded(0):
        feed = feed_of(DataLoader(Rows(10), batch_size=5))
        it = iter(feed)
        next(it), next(it)
        feed.commit()
        again = feed_of(DataLoader(Rows(10), batch_size=5))
        again.load_state_dict(feed.state_dict())
        assert list(again) == []
        assert len(list(again)) == 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (DataLoader(Rows(30), batch_size=5), "5 batches, this one has 6 batches"),
        (DataLoader(Stream(23), batch_size=5), "5 batches, this one has unknown length"),
    ],
)
def test_a_position_of_another_length_is_refused(other: Any, said: str) -> None:
    feed = feed_of(DataLoader(Rows(23), batch_size=5))
    with pytest.raises(UsageError, match=f"PL308.*{said}"):
        feed_of(other).load_state_dict(feed.state_dict())


def test_a_position_past_the_end_is_refused() -> None:
    feed = feed_of(DataLoader(Rows(23), batch_size=5))
    with pytest.raises(UsageError, match=r"PL308.*batch 6, the loader has 5 batches"):
        feed.load_state_dict(feed.state_dict() | {"batch": 6})


@pytest.mark.parametrize(
    ("loader", "other"),
    [
        (DataLoader(Rows(23), batch_size=5), DataLoader(Rows(23), batch_size=5, sampler=list(range(22, -1, -1)))),
        (DataLoader(Rows(23), batch_size=5), DataLoader(Rows(23), 5, sampler=[4, 3, 2, 1, 0, *range(5, 23)])),
        (DataLoader(Stream(23), batch_size=5), DataLoader(Stream(23), batch_size=4)),
        (DataLoader(Stream(23), batch_size=5), DataLoader(Stream(4), batch_size=5)),
    ],
)
def test_a_position_of_another_order_is_refused(loader: Any, other: Any) -> None:
    with seeded(0):
        feed = feed_of(loader)
        it = iter(feed)
        next(it), next(it)
        feed.commit()
        again = feed_of(other)
        again.load_state_dict(feed.state_dict())
        with pytest.raises(StepError, match="PL308: the first 2 batches of epoch 0 of loader 0"):
            next(iter(again))
