"""Where the training loop stands: the current batch, its weight, the rows of the open step, the clock, the ledger.

A batch belongs to the step that first applies a gradient of it. So a batch handed out is *pending*; the first backward
makes it part of the *open* step; ``opt.step()`` commits the open rows. A pending batch that is replaced by the next one
without a backward was only viewed (evaluation). Only commits move a loader's position.
"""

from __future__ import annotations

import math
import time
from typing import Literal

from paceline.data.feed import Feed
from paceline.data.rows import EpochEnd, Slice
from paceline.place.replicate import Scale
from paceline.terms.activity import Activity
from paceline.terms.clock import Clock
from paceline.terms.errors import StepError, Stopped
from paceline.terms.event import Event, Sink
from paceline.train.ledger import Ledger, Range
from paceline.train.step import Verdict

REPORT_EVERY = 0.1  # seconds between `step` events of one rank


class Loop:
    """The bookkeeping of one rank.

    Args:
        size: World size.
        activity: Where progress is published.
        sink: Where events go.
        ledger: Where committed rows go.
        stop_on_nan: Raise PL409 on every rank instead of only reporting it.
    """

    def __init__(self, size: int, activity: Activity, sink: Sink, ledger: Ledger, stop_on_nan: bool) -> None:
        self.steps = 0
        self.samples = 0
        self.epoch = 0
        self.report_nonfinite = True
        self._size, self._activity, self._sink, self._ledger = size, activity, sink, ledger
        self._stop_on_nan = stop_on_nan
        self._pending: Slice | None = None
        self._latest: Slice | None = None
        self._open: list[Range] = []
        self._open_feeds: set[int] = set()
        self._feeds: dict[int, Feed] = {}
        self._weight: float | Literal["sum"] | None = None
        self._reference = 0.0
        self._stopping = False
        self._reported = 0.0

    @property
    def clock(self) -> Clock:
        return Clock(self.steps, self.samples, self.epoch)

    # ---- data -----------------------------------------------------------------------------------------------------
    def add_feed(self, index: int, feed: Feed) -> None:
        """Know one more loader."""
        self._feeds[index] = feed

    def before_batch(self) -> None:
        """The step boundary at which a run that was asked to stop ends."""
        if self._stopping or (self._size == 1 and self._activity.board.stop_requested):
            raise Stopped

    def on_batch(self, batch: Slice, training: bool) -> None:
        """A batch is handed out. `training`: gradients are on, so a backward may follow."""
        self._put_aside()
        self._pending = self._latest = batch
        self._weight = None
        if self._size == 1 and training:
            self._take()

    def on_epoch_end(self, end: EpochEnd) -> None:
        """A walk over a loader has ended."""
        self._put_aside()
        self._ledger.epoch_end(end.loader, end.epoch, end.rows, end.batches, end.complete, end.order)

    def _put_aside(self) -> None:
        if self._pending is not None:
            self._ledger.viewed([_range(self._pending)])
            self._pending = None

    def _take(self) -> None:
        """A gradient was taken of the pending batch: it belongs to the open step."""
        if self._pending is not None:
            self._open.append(_range(self._pending))
            self._open_feeds.add(self._pending.loader)
            self.samples += self._pending.rows
            self._pending = None

    # ---- weights --------------------------------------------------------------------------------------------------
    def set_weight(self, weight: float | Literal["sum"]) -> None:
        """What the loss of the current batch is a mean over. Raises StepError PL408 for an impossible amount."""
        if weight != "sum":
            weight = float(weight)
            if not (math.isfinite(weight) and weight >= 0):
                raise StepError("PL408", f"job.weight({weight!r}): a weight is a finite amount of 0 or more")
        self._weight = weight

    @property
    def log_weight(self) -> float:
        """How much a value logged now counts in the mean over ranks."""
        if self._latest is not None and self._latest.phantom:
            return 0.0
        if isinstance(self._weight, float):
            return self._weight
        return float(self._latest.local_rows) if self._latest is not None else 1.0

    @property
    def phantom(self) -> bool:
        """True while this rank holds a stand-in row because the batch had fewer rows than there are ranks."""
        return self._latest is not None and self._latest.phantom

    def scale(self) -> Scale:
        """The scale of the backward that begins now; its batch joins the open step."""
        self._take()
        if self._weight == "sum":
            return Scale(1.0, float(self._size), 0.0 if self.phantom else 1.0)
        if self._weight is not None:
            return Scale.mean(0.0 if self.phantom else self._weight, self._reference or self._rows)
        if self._latest is not None:
            return Scale.mean(float(self._latest.local_rows), self._rows)
        return Scale.mean(1.0, float(self._size))

    @property
    def _rows(self) -> float:
        return float(self._latest.rows) if self._latest is not None else float(self._size)

    # ---- steps ----------------------------------------------------------------------------------------------------
    def on_verdict(self, verdict: Verdict) -> None:
        """The exchange of a backward has ended; the same news on all ranks."""
        if isinstance(self._weight, float):
            self._reference = verdict.weight
        self._stopping = self._stopping or verdict.stop
        if verdict.nonfinite and self.report_nonfinite:
            self._report_nonfinite(verdict)

    def _report_nonfinite(self, verdict: Verdict) -> None:
        message = f"step {self.steps + 1}: the gradient of {verdict.nonfinite} of {self._size} ranks is not finite"
        batch = self._latest
        if batch is not None and verdict.mine:
            first = batch.start + batch.local_start
            message += f"; epoch {batch.epoch}, this rank's rows {first}..{first + batch.local_rows - 1}"
        elif batch is not None:
            message += f"; epoch {batch.epoch}, rows {batch.start}..{batch.start + batch.rows - 1}"
        if self._stop_on_nan:
            raise StepError("PL409", message)
        if verdict.mine:
            self._sink(Event("notice", self.steps, {"code": "PL409", "message": message}))

    def commit(self) -> None:
        """An optimizer has stepped: the open rows are trained on."""
        self.steps += 1
        self._ledger.commit(self.steps, self._open)
        self._open.clear()
        for index in self._open_feeds:
            self._feeds[index].commit()
        self._open_feeds.clear()
        self.publish()

    def publish(self) -> None:
        """Say how far this rank is: on the board always, as an event now and then."""
        self._activity.progress(self.steps, self.epoch, self.samples)
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._sink(Event("step", self.steps, {"epoch": self.epoch, "samples": self.samples}))

    def finish(self) -> None:
        """The run has ended: what was left open is written down."""
        for feed in self._feeds.values():
            feed.close()
        self._put_aside()
        self._ledger.end(self.steps, self._open)
        self._ledger.close()


def _range(batch: Slice) -> Range:
    return (batch.loader, batch.epoch, batch.start, batch.rows, batch.start + batch.local_start, batch.local_rows)
