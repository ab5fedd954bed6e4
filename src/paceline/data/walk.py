"""The walk over the user's sampler: every rank draws the whole global order and hands its loader its own indices.

torch's iterator asks for indices through ``iter()`` and ``next()`` exactly as it would ask the user's sampler, in the
same places, so the draws happen in plain ``python``'s order with or without worker processes:

1. ``iter()`` of the user's sampler, then torch's ``base_seed``, both from the data stream. The second ``iter()`` that
   torch makes when it has started workers is passed on too; it draws no second seed.
2. ``next()``: the next global batch from the data stream (only the first one where the sampler is known to draw no more),
   a checksum of its indices, and this rank's piece of it. A note about it waits in `Course.drawn` until the rows arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from paceline.data.course import Course, Drawn
from paceline.data.generators import derive
from paceline.data.order import KeyedSampler
from paceline.data.rows import Slice
from paceline.data.split import Cut, turns
from paceline.data.streams import Streams

_END = object()
_NOT_YET = object()
_DRAW_AT_FIRST = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    KeyedSampler,
    list,
    tuple,
    range,
)


class Walk:
    """A batch sampler (or, where the loader does not batch, a sampler) for one rank's own loader.

    Args:
        sampler: The user's batch sampler or sampler.
        batched: Whether its elements are lists of indices, to be cut.
        generator: The user's generator for ``base_seed``, as in ``DataLoader(generator=...)``.
        want_phantom: Whether a rank without a row needs one anyway.
        seeded: Each list of indices begins with a seed (see ``rows.Seeded``).
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        cut: Cut,
        streams: Streams,
        *,
        batched: bool,
        generator: torch.Generator | None,
        want_phantom: Callable[[], bool],
        seeded: bool = False,
    ) -> None:
        self._sampler = sampler
        self._cut = cut
        self._streams = streams
        self._batched = batched
        self._generator = generator
        self._want_phantom = want_phantom
        self._seed = seeded
        self._draws_at_first = draws_at_first(sampler)
        self._seeded = False
        self.workers = torch.Generator()  # torch draws this rank's base_seed from it
        self.course = Course(0, 0)

    def __iter__(self) -> Iterator[Any]:
        course, starts = self.course, not self._seeded
        self._seeded = True
        if starts and course.again and course.rewind:
            # The pass was begun by workers that ran already: this call of torch's, and its seed, were not made then.
            with course.rewind.copy()(), self._streams.drawing():
                self._seed_workers()
            return iter(())
        rewind = course.rewind or nullcontext
        with rewind(), self._streams.drawing():
            indices = iter(self._sampler)
            if starts:
                self._seed_workers()
        cut = self._cut_batches if self._batched else self._note_items
        return cut(self._draw(indices, course), course)

    def _seed_workers(self) -> None:
        """Draw ``base_seed`` as torch would; rank 0's workers get it, others a seed of their own derived from it."""
        source = self._generator or torch.default_generator
        before = source.get_state()
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=source).item())
        if self._cut.rank:
            self.workers.manual_seed(derive(seed, self._cut.rank))
        else:
            self.workers.set_state(before)

    def _draw(self, indices: Iterator[Any], course: Course) -> Iterator[Any]:
        """The global order, from the batch at which the pass goes on."""
        if self._batched:
            indices = map(_sliceable, indices)
        batch = self._catch_up(indices, course) if course.rewind else _NOT_YET
        drawing: Callable[[], AbstractContextManager[None]] = self._streams.drawing
        while batch is not _END:
            if batch is not _NOT_YET:
                course.draw(batch)
                yield batch
            with drawing():
                batch = next(indices, _END)
            if self._draws_at_first:
                drawing = nullcontext
        course.num_drawn += 1  # the end has been drawn too: samplers may draw once more there

    def _catch_up(self, indices: Iterator[Any], course: Course) -> Any:
        """Draw again what was committed, and the first batch after it if it had been drawn already.

        That batch is drawn from the past. So are all that follow, unless the sampler is known to have drawn everything
        by then; other loaders' draws in between are lost in this one case. Whatever had not been drawn comes from the
        present.
        """
        assert course.rewind is not None
        with course.rewind(), self._streams.drawing():
            for batch in islice(indices, course.skip.batch):
                course.draw(batch)
            following = next(indices, _END) if course.ahead else _NOT_YET
        if course.ahead:
            course.rewind.stay(stream=not self._draws_at_first, held=keeps_drawing(self._sampler))
        course.check_replay(course.order)
        return following

    def _cut_batches(self, batches: Iterator[Any], course: Course) -> Iterator[Any]:
        number, position = course.skip.batch, course.skip.rows
        for batch in batches:
            rows = len(batch)
            if self._cut.shards and self._want_phantom():
                whole = Slice(course.loader, course.epoch, number, position, rows, 0, 0)
                yield from self._cut_shards(batch, whole, course)
                number, position = number + 1, position + rows
                continue
            start, count = self._cut.of(rows, position)
            phantom = not count
            piece = Slice(course.loader, course.epoch, number, position, rows, start, count, phantom)
            own = batch[:1] if phantom else batch if count == rows else batch[start : start + count]
            number, position = number + 1, position + rows
            wanted = not phantom or self._want_phantom()
            course.drawn.append(Drawn(piece, own, course.order, wanted))
            if wanted:
                yield self._keyed(own, piece)

    def _cut_shards(self, batch: Any, whole: Slice, course: Course) -> Iterator[Any]:
        """A batch to train on, shard by shard."""
        rounds = turns(whole.rows, self._cut.shards, self._cut.size, self._cut.rank)
        for number, turn in enumerate(rounds):
            piece = replace(
                whole,
                local_start=turn.start,
                local_rows=0 if turn.filler else turn.rows,
                phantom=turn.filler,
                shard=turn.shard,
                round=number,
                rounds=len(rounds),
            )
            own = batch[turn.start : turn.start + turn.rows]
            course.drawn.append(Drawn(piece, own, course.order))
            yield self._keyed(own, piece)

    def _keyed(self, own: Any, piece: Slice) -> Any:
        """Indices as the data set wants them."""
        if not self._seed:
            return own
        which = piece.shard if piece.shard >= 0 else ("rank", self._cut.rank)
        return [self._streams.seed("rows", piece.loader, piece.epoch, piece.batch, which), *own]

    def _note_items(self, items: Iterator[Any], course: Course) -> Iterator[Any]:
        for item in items:
            course.drawn.append(Drawn(None, item, course.order))
            yield item


def draws_at_first(sampler: Iterable[Any]) -> bool:
    """Whether all draws of `sampler` from the process's generators are known to happen by its first element.

    Then the process need not change streams for each batch. A sampler of the user's own may draw at any time.
    """
    return type(_innermost(sampler)) in _DRAW_AT_FIRST


def keeps_drawing(sampler: Iterable[Any]) -> bool:
    """Whether `sampler` may draw from a generator that it holds after its first element.

    torch's RandomSampler does: the permutation of the next round, used or not, when a round is over.
    """
    inner = _innermost(sampler)
    return not draws_at_first(sampler) or (type(inner) is RandomSampler and inner.generator is not None)


def _innermost(sampler: Iterable[Any]) -> Iterable[Any]:
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def _sliceable(batch: Any) -> Any:
    """A batch of indices that can be cut: samplers may yield any iterable."""
    return batch if hasattr(batch, "__getitem__") and hasattr(batch, "__len__") else list(batch)
