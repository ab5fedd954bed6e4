"""Where a loader stands, as JSON, and the way back there without loading data.

A pass is resumed by drawing its order again: the random states are set back to where the pass began, the sampler is
walked to the batch that was reached, and the states are set forward to where they were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from paceline.data.generators import RandomState, held_generators, read, write
from paceline.data.streams import Streams
from paceline.terms.errors import UsageError


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a pass has come: batches, rows, and the checksum of their order (see ``EpochEnd.order``)."""

    batch: int = 0
    rows: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """The random states that an order is drawn from: the data stream, and what the loader itself holds."""

    stream: RandomState
    held: tuple[Any, ...]


class Sources:
    """Everything that the order of one loader is drawn from."""

    def __init__(self, loader: DataLoader[Any], streams: Streams, *, walked: bool) -> None:
        self._streams = streams
        sampler, batches = loader.sampler, loader.batch_sampler
        holders = [loader, sampler, batches, getattr(batches, "sampler", None)]
        # A data set that is walked decides about the order itself; one that is indexed only about the rows' contents.
        self._held = held_generators([*holders, loader.dataset] if walked else holders)

    def align(self) -> None:
        """Give what the loader holds rank 0's states; a collective."""
        self._streams.align(self._held)

    def read_held(self) -> list[Any]:
        """The states of what the loader holds, as JSON values."""
        return [read(generator) for generator in self._held]

    def write_held(self, states: list[Any] | tuple[Any, ...]) -> None:
        """Set what :meth:`read_held` gave."""
        for generator, state in zip(self._held, states, strict=False):
            write(generator, state)

    def snapshot(self) -> Origin:
        """All states now."""
        return Origin(self._streams.snapshot(), tuple(self.read_held()))

    def restore(self, origin: Origin) -> None:
        """Set all states."""
        self._streams.restore(origin.stream)
        self.write_held(origin.held)


class Rewind:
    """Draws from an earlier origin, in as many goes as it takes, and leaves the present states alone until the end."""

    def __init__(self, sources: Sources, origin: Origin) -> None:
        self._sources = sources
        self._origin = origin

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, draws go on from the origin, or from where the last go ended."""
        found = self._sources.snapshot()
        self._sources.restore(self._origin)
        try:
            yield
        finally:
            self._origin = self._sources.snapshot()
            self._sources.restore(found)

    def copy(self) -> Rewind:
        """Another one that stands where this one does."""
        return Rewind(self._sources, self._origin)

    def stay(self, *, stream: bool, held: bool) -> None:
        """Let the present go on from here: for orders that are drawn bit by bit, of which the rest is yet to come.

        Args:
            stream, held: Which of the two the rest is drawn from.
        """
        found = self._sources.snapshot()
        origin = self._origin
        self._sources.restore(Origin(origin.stream if stream else found.stream, origin.held if held else found.held))


@dataclass(frozen=True, slots=True)
class Position:
    """A loader's place in the run.

    Attributes:
        length: Batches of a pass, None where the loader does not know.
        epoch: The pass that was begun last, from 0; -1 before the first.
        cursor: How far it was committed.
        ahead: Whether more than that had been drawn: by prefetching, or for a step that was not over.
        again: Whether the pass was served by workers of an earlier pass.
        begin: Where its order came from, or None when the pass is over (to its end, or left early).
        held: States of what the loader holds, at the moment of saving.
    """

    length: int | None
    epoch: int
    cursor: Cursor
    ahead: bool
    again: bool
    begin: Origin | None
    held: tuple[Any, ...]

    def to_json(self) -> dict[str, Any]:
        begin = self.begin and {"stream": self.begin.stream.to_json(), "held": list(self.begin.held)}
        return {
            "length": self.length,
            "epoch": self.epoch,
            "batch": self.cursor.batch,
            "rows": self.cursor.rows,
            "order": self.cursor.order,
            "ahead": self.ahead,
            "again": self.again,
            "begin": begin,
            "held": list(self.held),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Position:
        begin = saved["begin"]
        origin = begin and Origin(RandomState.from_json(begin["stream"]), tuple(begin["held"]))
        cursor = Cursor(saved["batch"], saved["rows"], saved["order"])
        return cls(
            saved["length"], saved["epoch"], cursor, saved["ahead"], saved["again"], origin, tuple(saved["held"])
        )

    def check(self, loader: DataLoader[Any]) -> None:
        """Raise UsageError (PL308) unless this can be a position of `loader`."""
        length = length_of(loader)
        if length != self.length:
            raise UsageError(
                "PL308",
                f"the position is one of a loader with {_batches(self.length)}, this one has {_batches(length)}",
            )
        if length is not None and self.cursor.batch > length:
            raise UsageError("PL308", f"the position is batch {self.cursor.batch}, the loader has {_batches(length)}")


def length_of(loader: DataLoader[Any]) -> int | None:
    """``len(loader)``, or None where the sampler or the data set has no length."""
    try:
        return len(loader)
    except TypeError:
        return None


def _batches(length: int | None) -> str:
    return "unknown length" if length is None else f"{length} batches"
