"""The data stream: the random numbers that orders are drawn from, the same on every rank.

Under plain ``python`` samplers and models draw from the same global generators. Here these are two streams:

1. At the first iteration of any adopted loader the global random state of rank 0 becomes the *data stream* of all.
2. What decides about an order (starting a sampler, its draws, torch's ``base_seed``) runs inside :meth:`Streams.drawing`,
   where the process's global generators are in the state of the data stream. So all loaders of the job draw from one
   stream, in the order in which they would under plain ``python``.
3. Everything else (dropout, noise, augmentation in the main process) draws from the *model stream*. Rank 0 keeps the
   one it has; rank `r` > 0 is reseeded by a value derived from the captured state and `r`, so no two ranks drop the
   same units.

Orders equal those of plain ``python`` exactly where the model draws nothing between them; where it does, they are the
same on all ranks, and another shuffle than one process would have seen. With one rank there is one stream, the
process's own.

[Note: the mark] A script may call ``torch.manual_seed`` again, before each epoch for instance; then it means the order
too. The state of a model stream carries a mark where torch keeps the seed (``torch.initial_seed()`` returns it; no draw
depends on it). A loader that begins and finds another number there knows that somebody reseeded, on every rank alike,
and captures anew. A mark that returns (``torch.random.fork_rng``) brings its own data stream back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from paceline.data.generators import RandomState, derive, read, read_device, seed_all, write, write_device
from paceline.data.lane import Lane

_REMEMBERED = 4  # streams of earlier marks: a fork returns to the one before
_SEED_BYTES = 8  # torch keeps the seed in the first bytes of a CPU generator's state


def _same(raw: bytes) -> bytes:
    return raw


class Streams:
    """The data stream of a job and how this process enters and leaves it.

    Args:
        rank, size: Position of this process among the ranks.
        share: Returns rank 0's bytes on every rank. A collective: called on all ranks at the same places.
    """

    def __init__(self, rank: int = 0, size: int = 1, share: Callable[[bytes], bytes] = _same) -> None:
        self._rank = rank
        self._size = size
        self._share = share
        self._lanes: dict[int, Lane] = {}  # the data stream by its mark, the current one last
        self._mark = 0
        self._base = 0  # what seeds are derived from: of torch's state alone, because few scripts seed the others
        self._installed = 0
        self._inside = False

    def begin(self) -> None:
        """Called when a loader begins: captures rank 0's state the first time, and again after a reseeding."""
        if self._size == 1 or self._inside:
            return
        mark = torch.initial_seed()
        if mark not in self._lanes:
            self.install(self._share(self.capture()))
        elif mark != self._mark:
            self._remember(mark, self._lanes[mark])

    def separate(self) -> None:
        """Draw orders from a stream of their own even with one rank, as with several. Before the first loader begins."""
        self._size = max(2, self._size)

    def seed(self, *words: object) -> int:
        """A seed that depends on where torch's data stream began and on `words`, the same on every rank."""
        return derive(self._base, *words)

    def reseed(self, *words: object) -> None:
        """Let the model stream begin anew, as the one of these `words`."""
        seed_all(self.seed(*words))
        _write_mark(self._mark)

    def capture(self) -> bytes:
        """The process's global random state, as bytes that :meth:`install` takes on any rank."""
        return json.dumps(RandomState.take().to_json()).encode()

    def install(self, raw: bytes) -> None:
        """Make `raw` the data stream, and this rank's model stream its own."""
        # Counted: a fork that seeds with the same number again is another stream than the one it returns to.
        self._installed += 1
        state = json.loads(raw)
        self._base = derive(state["torch"])
        self._install(derive(raw, self._installed), RandomState.from_json(state))

    def align(self, generators: Sequence[Any]) -> None:
        """Give the generators that a loader holds rank 0's states. A collective unless there are none."""
        if self._size == 1 or not generators:
            return
        shared = json.loads(self._share(json.dumps([read(g) for g in generators]).encode()))
        for generator, state in zip(generators, shared, strict=True):
            write(generator, state)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, the process's global generators are the data stream."""
        if self._size == 1 or self._inside:
            yield
            return
        lane = self._lanes[self._mark]
        lane.enter()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            lane.leave()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Back in the model stream for a while, inside of :meth:`drawing`."""
        if not self._inside:
            yield
            return
        lane = self._lanes[self._mark]
        lane.leave()
        self._inside = False
        try:
            yield
        finally:
            self._inside = True
            lane.enter()

    def snapshot(self) -> RandomState:
        """The data stream as it is now."""
        if self._size == 1 or self._inside or not self._lanes:
            return RandomState.take()
        return self._lanes[self._mark].state()

    def restore(self, state: RandomState) -> None:
        """Let the data stream go on from `state`."""
        if self._size == 1 or self._inside:
            state.put()
        else:
            self._lanes[self._mark] = Lane(state)

    def state_dict(self) -> dict[str, Any]:
        """The data stream as JSON values, the same on every rank once a loader has begun; and this process's own stream."""
        state = self.snapshot().to_json()
        own = RandomState.take().to_json() if self._size > 1 and not self._inside else None
        seen = torch.initial_seed() if self._size > 1 else 0
        device = read_device()
        own = {"rank": self._rank, "seen": seen, "state": own, "device": device}
        return {"mark": self._mark or derive(state), "base": self._base, "state": state, "own": own}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved data stream, with any number of ranks.

        The rank that saved it goes on with its own model stream as well; those of the others start afresh, as others than
        they have had before.
        """
        mark, own = saved["mark"], saved.get("own")
        self._base = saved.get("base", mark)
        self._install(mark, RandomState.from_json(saved["state"]))
        if own is None:
            return
        if self._rank == own["rank"]:
            write_device(own["device"])
        if self._size == 1 or own["state"] is None:
            return
        if self._rank == own["rank"]:
            RandomState.from_json(own["state"]).put()
        else:
            seed_all(derive(mark, self._rank, own["state"]["torch"]))
        _write_mark(own["seen"])

    def _install(self, mark: int, state: RandomState) -> None:
        if self._size == 1:
            state.put()
            return
        self._remember(mark, Lane(state))
        if self._rank:
            seed_all(derive(mark, self._rank))
        _write_mark(mark)

    def _remember(self, mark: int, lane: Lane) -> None:
        self._lanes.pop(mark, None)
        self._lanes[mark] = lane
        self._mark = mark
        if len(self._lanes) > _REMEMBERED:
            del self._lanes[next(iter(self._lanes))]


class Aside:
    """A stream of its own for some calls in a worker process, so that they do not move the one around them.

    Args:
        rank: Makes the stream differ between ranks whose workers have equal seeds.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lane: Lane | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the process's global generators are this stream."""
        if self._lane is None:
            self._lane = self._start()
        self._lane.enter()
        try:
            yield
        finally:
            self._lane.leave()

    def _start(self) -> Lane:
        around = RandomState.take()
        seed_all(derive(torch.initial_seed(), self._rank))
        lane = Lane(RandomState.take())
        around.put()
        return lane


def _write_mark(mark: int) -> None:
    """See [Note: the mark]: the engine's state stays as it is, only the seed that it reports changes."""
    state = torch.default_generator.get_state()
    state[:_SEED_BYTES] = torch.frombuffer(bytearray(mark.to_bytes(_SEED_BYTES, "little")), dtype=torch.uint8)
    torch.default_generator.set_state(state)
    assert torch.initial_seed() == mark, "this torch keeps the seed elsewhere in a generator's state"
