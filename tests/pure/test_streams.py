"""The data stream is one for all ranks, the model streams are one each, and the process is left as it was."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from paceline.data.generators import RandomState, held_generators, read, seed_all, write
from paceline.data.streams import Streams
from support.feeds import seeded


def draw() -> tuple[float, float, float, float, float]:
    return torch.rand(()).item(), torch.randn(()).item(), random.random(), random.gauss(0, 1), np.random.randn()


def ranks(size: int) -> list[Streams]:
    said: list[bytes] = []

    def share(raw: bytes) -> bytes:
        said.append(raw)
        return said[0]

    return [Streams(rank, size, share) for rank in range(size)]


@pytest.fixture(autouse=True)
def _state_is_kept() -> Any:
    with seeded(1):
        yield


def test_a_state_survives_json() -> None:
    draw()
    state = RandomState.from_json(json.loads(json.dumps(RandomState.take().to_json())))
    expected = [draw() for _ in range(700)]
    state.put()
    assert [draw() for _ in range(700)] == expected
    assert len(json.dumps(state.to_json())) < 16_000


def test_rank_0_keeps_its_stream_and_others_get_their_own() -> None:
    seed_all(5)
    draw()
    start, drawn = RandomState.take(), []
    expected = draw()
    for streams in ranks(3):
        start.put()
        streams.begin()
        drawn.append(draw())
    assert drawn[0] == expected
    assert len(set(sum(drawn, ()))) == 15


def test_the_data_stream_is_the_one_that_rank_0_had() -> None:
    seed_all(5)
    start, drawn = RandomState.take(), []
    expected = [draw(), draw()]
    for rank, streams in enumerate(ranks(3)):
        seed_all(5 + rank)
        streams.begin()
        own = []
        for _ in range(2):
            with streams.drawing():
                own.append(draw())
                with streams.drawing():
                    pass
            draw()
        drawn.append(own)
    assert drawn == [expected] * 3
    start.put()


def test_resting_is_the_model_stream_again() -> None:
    _, streams = ranks(2)
    streams.begin()
    before = RandomState.take()
    # Two normals at a time: NumPy then has none in store, which is the one thing that the model stream loses.
    model = [(draw(), np.random.randn()) for _ in range(2)]
    before.put()
    with streams.drawing():
        first = draw()
        with streams.resting():
            assert (draw(), np.random.randn()) == model[0]
        second = draw()
    assert (draw(), np.random.randn()) == model[1]
    assert len({first, second, model[0][0], model[1][0]}) == 4


def test_the_data_stream_keeps_the_normal_that_numpy_has_in_store() -> None:
    seed_all(3)
    expected = [np.random.randn() for _ in range(5)]
    seed_all(3)
    streams, seen = ranks(2)[0], []
    streams.begin()
    for _ in range(5):
        with streams.drawing():
            seen.append(np.random.randn())
        np.random.randn()
    assert seen == expected


def test_another_engine_of_numpy_is_kept() -> None:
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(4))
        start = RandomState.take()
        expected = [np.random.rand() for _ in range(3)]
        start.put()
        streams, seen = ranks(2)[0], []
        streams.begin()
        for _ in range(3):
            with streams.drawing():
                seen.append(np.random.rand())
            np.random.rand()
        assert seen == expected
    finally:
        np.random.set_bit_generator(usual)


def test_an_exception_restores_the_model_stream() -> None:
    _, streams = ranks(2)
    streams.begin()
    before = RandomState.take()
    expected = draw()
    before.put()
    with contextlib.suppress(KeyError), streams.drawing():
        draw()
        raise KeyError
    assert draw() == expected


def test_one_rank_has_one_stream() -> None:
    streams = Streams()
    seed_all(9)
    expected = [draw(), draw(), draw()]
    seed_all(9)
    streams.begin()
    seen = [draw()]
    with streams.drawing():
        seen.append(draw())
    assert [*seen, draw()] == expected


def test_nothing_is_shared_twice_unless_the_script_seeds_again() -> None:
    calls: list[bytes] = []

    def share(raw: bytes) -> bytes:
        calls.append(raw)
        return raw

    streams = Streams(0, 2, share)
    for _ in range(3):
        streams.begin()
        draw()
    assert len(calls) == 1
    torch.manual_seed(3)
    streams.begin()
    streams.begin()
    assert len(calls) == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_saved_stream_goes_on_with_any_number_of_ranks(size: int) -> None:
    streams = ranks(2)[0]
    streams.begin()
    with streams.drawing():
        draw()
    saved = json.loads(json.dumps(streams.state_dict()))
    with streams.drawing():
        expected = draw()
    models = set()
    for resumed in ranks(size):
        seed_all(77)
        resumed.load_state_dict(saved)
        resumed.begin()
        with resumed.drawing():
            assert draw() == expected
        models.add(draw())
    assert len(models) == size


def test_restoring_a_ranks_own_generators_after_the_stream_is_not_taken_for_a_reseeding() -> None:
    first = ranks(2)[1]
    first.begin()
    model, saved = torch.get_rng_state(), first.state_dict()
    resumed = ranks(2)[1]
    resumed.load_state_dict(saved)
    torch.set_rng_state(model)
    resumed._share = None  # type: ignore[assignment]
    resumed.begin()
    assert torch.equal(torch.get_rng_state(), model)


def test_held_generators_are_read_and_written() -> None:
    class Holder:
        def __init__(self) -> None:
            self.a = torch.Generator().manual_seed(1)
            self.b = random.Random(2)
            self.c = np.random.default_rng(3)
            self.d = np.random.RandomState(4)
            self.e = random.SystemRandom()
            self.epoch = 7

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def draw(self) -> tuple[Any, ...]:
            self.epoch += 1
            return torch.rand((), generator=self.a).item(), self.b.random(), self.c.random(), self.d.randn(), self.epoch

    holder = Holder()
    held = held_generators([holder, holder, None, [1, 2]])
    assert len(held) == 5
    holder.draw()
    saved = json.loads(json.dumps([read(g) for g in held]))
    expected = holder.draw()
    for generator, state in zip(held, saved, strict=True):
        write(generator, state)
    assert holder.draw() == expected
