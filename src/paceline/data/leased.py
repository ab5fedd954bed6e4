"""A loader whose batches are leased: whoever asks next trains the next one.

With parameter servers no worker waits for another, so none has a fixed share. The order is still that of the user's sampler under
the user's seed, the same on all workers; the lead server says who takes which piece of which batch (``exchange.server``), and a
piece that a worker did not finish is leased to another. Passes in which nothing is trained (evaluation) are cut evenly among those
who are there, as by :class:`~paceline.data.feed.Feed`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from torch.utils.data import DataLoader

from paceline.data.course import Course
from paceline.data.feed import Feed
from paceline.data.generators import RandomState
from paceline.data.inner import reader
from paceline.data.loop import Hooks
from paceline.data.position import Origin, Rewind
from paceline.data.rows import Slice
from paceline.data.split import Cut
from paceline.data.walk import Walk
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import AdoptError

_REMEMBERED = 4  # orders of earlier passes


class Leased(Protocol):
    """A piece of a batch, see ``exchange.server.Piece``; `parts` is 0 for one that counts nothing."""

    @property
    def epoch(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def part(self) -> int: ...
    @property
    def parts(self) -> int: ...


class Leases(Protocol):
    """Who gives them out."""

    @property
    def free(self) -> bool:
        """What was taken ahead may be trained at any time: no other worker waits for it, and none for this one."""

    def ask(self, loader: int, epoch: int, ahead: bool = False) -> Leased | None:
        """The next piece of a pass, or None at its end. Waits, but not when looking `ahead`."""

    def over(self, loader: int, epoch: int, batches: int, rows: int, order: int) -> None:
        """The pass has so many batches; the piece that was given last does not exist."""

    def begins(self, loader: int, origin: str) -> tuple[int, str]:
        """A pass begins: its number, and the random states from which the first who came there draws its order.

        Args:
            origin: Those of this worker, as JSON.
        """

    def drawn(self, loader: int, after: str, length: tuple[int, int, int]) -> None:
        """The order of the pass is drawn.

        Args:
            after: The random states since then, as JSON.
            length: Batches, rows, and the checksum of the order.
        """

    def origin(self, loader: int, epoch: int) -> str:
        """The random states of a pass that others have begun."""

    def ends(self, loader: int) -> None:
        """The loop has come to the end of a pass."""

    def given(self, piece: Any, rows: Slice) -> None:
        """The loop gets this piece now."""

    def view(self, loader: int) -> tuple[int, int]:
        """All look at the same parameters now: which of how many this worker is."""


class LeasedFeed(Feed):
    """What ``job.adopt(loader)`` returns where batches are leased. See :class:`~paceline.data.feed.Feed` for the arguments.

    Raises:
        AdoptError: PL305, the data set can only be walked, or the loader does not batch: then pieces cannot be read out of turn.
    """

    def __init__(self, loader: DataLoader[Any], leases: Leases, **settings: Any) -> None:
        super().__init__(loader, rank=0, size=1, **settings)
        self._leases = leases
        self._orders: dict[int, Order] = {}
        if self._walked or loader.batch_sampler is None:
            kind = type(loader.dataset).__name__ if self._walked else "a loader with batch_size=None"
            raise AdoptError(
                "PL305",
                f"{kind} can only be walked in order, and with parameter servers batches are leased one by one",
                help="give a map-style data set and a batch size; or use a synchronous strategy such as ddp().",
            )

    def __iter__(self) -> Any:
        self._before_pass()
        if not self._hooks.want_phantom():
            rank, size = self._leases.view(self._index)
            self._cut, self._inner = Cut(rank, size), None
            return super().__iter__()
        self._streams.begin()
        sources = self._sources()
        mine = json.dumps(_to_json(sources.snapshot()))
        self._epoch, theirs = self._leases.begins(self._index, mine)
        if theirs != mine:
            sources.restore(_from_json(theirs))
        order = self._orders[self._epoch] = self._drawn_order(self._epoch)
        length = len(order.batches), order.rows, order.checksum
        self._leases.drawn(self._index, json.dumps(_to_json(sources.snapshot())), length)
        while len(self._orders) > _REMEMBERED:
            del self._orders[next(iter(self._orders))]
        return LeasedPass(self._leases, order, self._earlier, self._loader, self._hooks, self._activity)

    def _drawn_order(self, epoch: int) -> Order:
        """Draw the whole order, with the draws that a plain loop would make."""
        sampler = self._loader.batch_sampler
        assert sampler is not None
        walk = Walk(
            sampler,
            Cut(0, 1),
            self._streams,
            batched=True,
            generator=self._loader.generator,
            want_phantom=lambda: True,
        )
        walk.course = Course(self._index, epoch)
        batches = [list(batch) for batch in walk]
        return Order(self._index, epoch, batches, walk.course.order)

    def _earlier(self, epoch: int) -> Order:
        """The order of a pass that this worker has left, or never saw: a piece of it was left over."""
        if epoch not in self._orders:
            origin = _from_json(self._leases.origin(self._index, epoch))
            with Rewind(self._sources(), origin)():
                self._orders[epoch] = self._drawn_order(epoch)
        return self._orders[epoch]

    def commit(self) -> None:
        """The lead keeps the position."""


def _to_json(origin: Origin) -> dict[str, Any]:
    return {"stream": origin.stream.to_json(), "held": list(origin.held)}


def _from_json(text: str) -> Origin:
    said = json.loads(text)
    return Origin(RandomState.from_json(said["stream"]), tuple(said["held"]))


class Order:
    """All batches of one pass.

    Args:
        loader, epoch: Which pass.
        batches: The indices of each.
        checksum: Of all of them.
    """

    def __init__(self, loader: int, epoch: int, batches: Sequence[Sequence[Any]], checksum: int) -> None:
        self.loader, self.epoch, self.batches, self.checksum = loader, epoch, batches, checksum
        self._starts = [0, *accumulate(map(len, batches))]

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def slice(self, piece: Leased) -> tuple[Slice, Sequence[Any]]:
        """What a piece is, and the indices of its rows: for one that counts nothing, those of the batch's first row."""
        indices, start = self.batches[piece.batch], self._starts[piece.batch]
        at, count = Cut(piece.part, piece.parts).of(len(indices), start) if piece.parts else (0, 0)
        own = Slice(self.loader, self.epoch, piece.batch, start, len(indices), at, count, phantom=not count)
        return own, indices[at : at + max(count, 1)]


class LeasedPass(Iterator[Any]):
    """One pass over a leased loader.

    Loader workers, where there are some, read ahead of the loop; not in synchronous runs, where a worker must be free to take what
    another one has left undone.
    """

    def __init__(
        self,
        leases: Leases,
        order: Order,
        earlier: Callable[[int], Order],
        loader: DataLoader[Any],
        hooks: Hooks,
        activity: Activity,
    ) -> None:
        self._leases, self._order, self._earlier = leases, order, earlier
        self._hooks, self._activity = hooks, activity
        self._ahead: deque[tuple[Leased, Slice]] = deque()
        self._load = reader(loader)
        self._queue: Iterator[Any] | None = None
        if loader.num_workers and leases.free:
            self._queue = iter(reader(loader, self._look_ahead()))

    def __next__(self) -> Any:
        self._hooks.before_batch()
        with self._activity.during(Phase.INPUT, "next batch"):
            found = self._read_ahead() or self._read()
        if found is None:
            self._leases.ends(self._order.loader)
            raise StopIteration
        (piece, own), rows = found
        self._leases.given(piece, own)
        self._hooks.on_batch(own)
        return rows

    def _read(self) -> tuple[tuple[Leased, Slice], Any] | None:
        """Ask, and read here and now."""
        taken = self._take(ahead=False)
        return None if taken is None else (taken[0], self._load(taken[1]))

    def _read_ahead(self) -> tuple[tuple[Leased, Slice], Any] | None:
        """What loader workers have read. They stop where nothing is free at once; the rest is asked for one by one."""
        if self._queue is None:
            return None
        for rows in self._queue:
            return self._ahead.popleft(), rows
        self._queue = None
        return None

    def _look_ahead(self) -> Iterator[Any]:
        """Index lists for loader workers, which ask for some more than the loop has had."""
        while (taken := self._take(ahead=bool(self._ahead))) is not None:
            self._ahead.append(taken[0])
            yield taken[1]

    def _take(self, *, ahead: bool) -> tuple[tuple[Leased, Slice], Sequence[Any]] | None:
        loader, epoch = self._order.loader, self._order.epoch
        while (piece := self._leases.ask(loader, epoch, ahead)) is not None:
            order = self._order if piece.epoch == epoch else self._earlier(piece.epoch)
            if piece.batch < len(order.batches):
                own, indices = order.slice(piece)
                return (piece, own), indices
            self._leases.over(loader, piece.epoch, len(order.batches), order.rows, order.checksum)
        return None
