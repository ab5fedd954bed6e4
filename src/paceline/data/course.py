"""One pass over a loader: which batches were drawn, how far the loop has come."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from paceline.data.position import Cursor, Rewind
from paceline.data.rows import EpochEnd, Slice
from paceline.terms.errors import StepError


@dataclass(slots=True)
class Drawn:
    """One global batch that was drawn and has not arrived yet.

    Attributes:
        slice: This rank's part; None where the number of rows is known only after reading.
        indices: The indices that this rank reads.
        order: Checksum of the order up to and with this batch.
        read: False when the rank has no row of it and nobody wanted a phantom at the time of drawing.
    """

    slice: Slice | None
    indices: Any
    order: int
    read: bool = True


@dataclass(slots=True)
class Course:
    """What is known of one pass. Prefetching moves `num_drawn`, the loop moves `seen`, an optimizer step commits it.

    Attributes:
        skip: Batches that were committed before a resume: drawn again, not given again.
        rewind: Where the order of a resumed pass is drawn from.
        ahead: A resumed pass had drawn more than was committed.
        again: Workers of an earlier pass serve this one (or did, before a resume): torch draws no seed for them.
        drawn: Batches on their way.
        num_drawn, order: How many batches were drawn so far, and the checksum of their order.
        seen: How far the loop has come.
        ended, reported: Whether the pass ran to its end, and whether the job was told how far it came.
    """

    loader: int
    epoch: int
    skip: Cursor = field(default_factory=Cursor)
    rewind: Rewind | None = None
    ahead: bool = False
    again: bool = False
    drawn: deque[Drawn] = field(default_factory=deque)
    num_drawn: int = 0
    order: int = 0
    seen: Cursor = field(default_factory=Cursor)
    ended: bool = False
    reported: bool = False

    def draw(self, batch: Any) -> None:
        """Count one batch of indices; `batch` has any type that a sampler may yield."""
        try:
            raw: Any = array("q", batch)
        except (TypeError, ValueError, OverflowError):
            raw = repr(batch).encode()
        self.num_drawn += 1
        self.order = zlib.crc32(raw, self.order)

    def see(self, piece: Slice, order: int) -> None:
        """The loop got, or let pass by, one batch."""
        self.seen = Cursor(piece.batch + 1, piece.start + piece.rows, order)

    def check_replay(self, order: int) -> None:
        """Raise StepError (PL308) unless the batches before a resume had the order that was saved."""
        if order != self.skip.order:
            raise StepError(
                "PL308",
                f"the first {self.skip.batch} batches of epoch {self.epoch} of loader {self.loader} are not the ones "
                "after which this position was saved",
            )

    def report(self) -> EpochEnd:
        """The report on the pass as it stands."""
        seen = self.seen
        return EpochEnd(self.loader, self.epoch, seen.rows, seen.batch, self.ended, seen.order)
