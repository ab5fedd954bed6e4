"""Where the training loop stands: the current batch, its weight, the rows of the open step, the clock, the ledger.

A batch belongs to the step that first applies a gradient of it. So a batch handed out is *pending*; the first backward
makes it part of the *open* step; ``opt.step()`` commits the open rows. A pending batch that is replaced by the next one
without a backward was only viewed (evaluation). Only commits move a loader's position.

Where ranks step on their own (``local``), a step is taken by all ranks and counts for none before its *round* is closed: until then
its rows are not in the ledger, positions stay, and the round can be undone.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from paceline.data.feed import Feed
from paceline.data.rows import EpochEnd, Slice
from paceline.place.replicate import Scale
from paceline.terms.activity import Activity
from paceline.terms.clock import Clock
from paceline.terms.errors import StepError, Stopped
from paceline.terms.event import Event, Sink
from paceline.train import replicas
from paceline.train.ledger import Ledger, Range
from paceline.train.parts import refuse_unlike_shares, shard_of
from paceline.train.redo import Redo
from paceline.train.step import Verdict

_TELL = (1, 10, 100, 1000, 10_000)  # of many such steps in a row
REPORT_EVERY = 0.1  # seconds between `step` events of one rank


class Loop:
    """The bookkeeping of one rank.

    Args:
        size: World size; more than one, or an elastic run, exchanges gradients.
        activity: Where progress is published.
        sink: Where events go.
        ledger: Where committed rows go.
        stop_on_nan: Raise PL409 on every rank instead of only reporting it.
    """

    def __init__(self, size: int, activity: Activity, sink: Sink, ledger: Ledger, stop_on_nan: bool) -> None:
        self.steps = 0
        self.samples = 0
        self.epoch = 0
        self.passed = 0  # epochs that are over
        self.in_epochs = False
        self.report_nonfinite = True
        self.shards = 0
        self._shard: Slice | None = None  # what the last backward was of, where batches are cut into shards
        self._unstepped = False
        self.redo = Redo()
        self.exchanges = size > 1
        self.change_due = False
        self.on_boundary: Callable[[], None] | None = None
        self.on_step_end: Callable[[], None] = _nothing
        self.on_look: Callable[[], None] = _nothing
        self.on_iteration: Callable[[], None] = _nothing
        self.on_begin_round: Callable[[], None] = _nothing
        self.on_close: Callable[[], bool] = bool
        self.local = False
        self.round_due = False
        self.save_due = False
        self.level = True  # all ranks hold the same parameters, but for the open round
        self.settled = 0  # steps that count
        self._inner: list[tuple[int, list[Range], bool]] = []  # steps of the open round
        self._round_feeds: set[int] = set()
        self._round_mark = 0
        self._last: dict[int, Slice] = {}  # what the last step was taken on
        self._stepped_samples = 0
        self._looked = 0
        self._committed_samples = 0
        self.size, self._activity, self._sink, self._ledger = size, activity, sink, ledger
        self._stop_on_nan = stop_on_nan
        self._pending: dict[int, Slice] = {}  # by loader: handed out, and nobody knows yet what for
        self._latest: Slice | None = None
        self._open: list[Range] = []
        self._open_feeds: set[int] = set()
        self._given: dict[int, Slice] = {}  # by loader: the last batch to train on since the last step
        self._feeds: dict[int, Feed] = {}
        self._split_to: tuple[int, int] | None = None
        self._weight: float | Literal["sum"] | None = None
        self._reference = 0.0
        self._stopping = False
        self._streak = 0  # steps in a row whose gradient was not finite
        self._reported = 0.0

    @property
    def clock(self) -> Clock:
        return Clock(self.steps, self.samples, self.epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the last commit has left it."""
        steps = self.settled_steps
        return {"steps": steps, "samples": self._committed_samples, "epoch": self.epoch, "passed": self.passed}

    def load_state_dict(self, saved: Mapping[str, int]) -> None:
        """Stand there again."""
        self.steps, self.epoch, self.passed = saved["steps"], saved["epoch"], saved["passed"]
        self._looked = self.steps // replicas.EVERY
        self.samples = self._committed_samples = self._stepped_samples = saved["samples"]
        self.settled = self.steps
        self._forget_round()
        self.publish()

    def resumed(self) -> None:
        """The run goes on from where a checkpoint was: the ledger begins there."""
        positions = [(index, feed.state_dict()) for index, feed in self._feeds.items()]
        done = [(index, p["epoch"], 0, p["rows"], 0, p["rows"]) for index, p in positions if p["begin"] is not None]
        self._ledger.resumed(self.steps, done)

    # ---- data -----------------------------------------------------------------------------------------------------
    def add_feed(self, index: int, feed: Feed) -> None:
        """Know one more loader."""
        self._feeds[index] = feed
        self.redo.rounds = True

    def before_batch(self, training: bool = False) -> bool:
        """The step boundary: here a run that was asked to stop ends, and members come. True: the loop gets a filler."""
        if training and self.redo.next_round():
            self._latest = replace(self._latest, local_rows=0, phantom=True) if self._latest is not None else None
            return True
        if training and not self._open:
            self.on_iteration()
        if self._stopping or (self.size == 1 and self._activity.board.stop_requested and not self.mid_step):
            raise Stopped
        if training and not self._open and not self.round_open:
            self._at_boundary()
        return False

    def _at_boundary(self) -> None:
        """Between two steps that count."""
        if self.steps // replicas.EVERY > self._looked:
            self._looked = self.steps // replicas.EVERY
            if not self.local:  # a round compares what came out of it
                self.on_look()
        if self.level or not self.local:
            self.on_step_end()
        if self.change_due and self.on_boundary is not None:
            self.change_due = False
            self.on_boundary()
        if self.local:
            self.on_begin_round()

    def on_batch(self, batch: Slice, training: bool) -> None:
        """A batch is handed out. `training`: gradients are on, so a backward may follow."""
        if training and self.shards:
            self._refuse_open_shard(batch)
        self._put_aside(batch.loader)
        self._pending[batch.loader] = self._latest = batch
        self._weight = None
        if training:
            self._given[batch.loader] = batch
        if training and not self.exchanges:  # nobody tells of a backward: a batch that could be trained on is
            self._take()

    def on_epoch_end(self, end: EpochEnd) -> None:
        """A walk over a loader has ended."""
        self._put_aside(end.loader)
        self._ledger.epoch_end(end.loader, end.epoch, end.rows, end.batches, end.complete, end.order)

    def before_end(self, loader: int) -> bool:
        """A pass over a loader is about to end, and with it the round. True: it goes on, because the round was undone."""
        return self.local and (loader in self._round_feeds or self._feeds[loader].trained) and self.on_close()

    def _put_aside(self, loader: int) -> None:
        """The loader goes on, and no gradient was taken of its last batch: it was only viewed."""
        if loader in self._pending:
            self._ledger.viewed([_range(self._pending.pop(loader))])

    def _take(self) -> None:
        """A gradient was taken of the pending batches: they belong to the open step."""
        for batch in self._pending.values():
            if not self.redo.replaying:
                self._note(batch)
            self._open_feeds.add(batch.loader)
        self._pending.clear()

    def _note(self, batch: Slice) -> None:
        """The open step is made of this batch; of shards of one batch it has one range, as they are consecutive."""
        mine = _range(batch)
        if batch.round and self._open and self._open[-1][:4] == mine[:4]:
            *place, start, rows = self._open.pop()
            mine = (*place, start if rows else mine[4], rows + mine[5])  # type: ignore[assignment]
        else:
            self.samples += batch.rows
        self._open.append(mine)

    @property
    def mark(self) -> int:
        """A small number that is the same on all ranks exactly (but for one chance in 64) when they train on the same batches."""
        return self._round_mark % 64 if self.local else self._mark_given(0) % 64

    def _mark_given(self, before: int) -> int:
        where = [(b.loader, b.epoch, b.batch) for _, b in sorted(self._given.items())]
        return zlib.crc32(repr(where).encode(), before)

    @property
    def leaves_out(self) -> bool:
        """A step whose gradient is not finite is left out; with a gradient scaler that is the scaler's business."""
        return self.report_nonfinite

    def where(self) -> str:
        """What this rank trains on, for people."""
        given = self._given or self._last
        told = [f"batch {b.batch} of epoch {b.epoch} of loader {b.loader}" for _, b in sorted(given.items())]
        return " and ".join(told) or "no batch"

    # ---- with parameter servers -----------------------------------------------------------------------------------
    def spend(self, rows: Sequence[Slice]) -> tuple[float, bool]:
        """These rows are pushed now: what they weigh, and whether the gradient is a sum over them."""
        self._open, self._pending = [], {}
        self._open_feeds.clear()
        weight, self._weight = self._weight, None
        if weight == "sum":
            return float(any(r.local_rows for r in rows)), True
        if weight is not None:
            return weight, False
        return float(sum(r.local_rows for r in rows)) if rows else 1.0, False

    @property
    def given_weight(self) -> float | Literal["sum"] | None:
        """What the script has said of the current batch."""
        return self._weight

    def stand(self, steps: int, samples: int) -> None:
        """The servers have come so far."""
        self.steps, self.samples = steps, samples
        self.publish()

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
        self.redo.backward()
        if self.shards:
            return self._scale_of_shard()
        self._take()
        if self._weight == "sum" and self.local:
            raise StepError("PL408", 'job.weight("sum"): a rank that steps on its own steps on a mean')
        if self._weight == "sum":
            return Scale(1.0, float(self.size), 0.0 if self.phantom else 1.0)
        if self._weight is not None:
            return Scale.mean(0.0 if self.phantom else self._weight, self._reference or self._rows)
        if self._latest is not None:
            refuse_unlike_shares((batch.rows for batch in self._given.values()), self.size)
            return Scale.mean(float(self._latest.local_rows), self._rows)
        return Scale.mean(1.0, float(self.size))

    # ---- shards (``exchange/exact.py``) -----------------------------------------------------------------------------
    @property
    def mid_step(self) -> bool:
        """Shards of the current batch follow, so that ``opt.step()`` does nothing yet."""
        return self._shard is not None and not self._shard.last

    def cut_into(self, shards: int) -> None:
        """Batches to train on come in so many shards, and every round of the loop ends in ``opt.step()``."""
        self.shards, self.redo.fills = shards, False

    def stepped(self) -> None:
        """``opt.step()`` was called, whatever it did."""
        self._unstepped = False

    def _scale_of_shard(self) -> Scale:
        """How the gradient of one shard counts; nothing in it may depend on the number of ranks."""
        shard = self._shard = shard_of(list(self._pending.values()), self._unstepped, self._weight is not None)
        self._take()
        self._unstepped = True
        rows, mine = float(shard.rows), float(shard.local_rows)
        weight, divisor = (mine if self._weight is None else self._weight), rows
        if weight == "sum":
            weight, divisor = 1.0, float(min(self.shards, shard.rows))
        weight = 0.0 if shard.phantom else weight
        factor = float(not shard.phantom) if self._weight == "sum" else weight / divisor
        return Scale(weight, divisor, factor, shard.shard, shard.round == 0, shard.last)

    def _refuse_open_shard(self, batch: Slice) -> None:
        """Raise StepError PL450 when the loop goes on as it must not."""
        if self._unstepped and not self.redo.aborted and batch.loader in self._open_feeds:
            raise StepError("PL450", "exact=True: a gradient was taken, and no optimizer step followed it")
        if batch.round == 0 and self._open and self.mid_step:
            raise StepError("PL450", "exact=True: the loop was left before all shards of a batch had come")

    @property
    def _rows(self) -> float:
        return float(self._latest.rows) if self._latest is not None else float(self.size)

    # ---- steps ----------------------------------------------------------------------------------------------------
    def on_verdict(self, verdict: Verdict) -> None:
        """The exchange of a backward has ended; the same news on all ranks."""
        if isinstance(self._weight, float):
            self._reference = verdict.weight
        self._stopping = self._stopping or verdict.stop
        self.change_due = self.change_due or verdict.change
        if not self.report_nonfinite:
            return
        self._streak = self._streak + 1 if verdict.nonfinite else 0
        if verdict.nonfinite:
            self.redo.skip = True
            if self._streak in _TELL or self._stop_on_nan:
                self._report_nonfinite(verdict)

    def _report_nonfinite(self, verdict: Verdict) -> None:
        message = f"step {self.steps + 1}: the gradient of {verdict.nonfinite} of {self.size} ranks is not finite"
        batch = self._latest
        if batch is not None and verdict.mine:
            first, count = self._open[-1][4:] if self._open else (batch.start + batch.local_start, batch.local_rows)
            message += f"; epoch {batch.epoch}, this rank's rows {first}..{first + count - 1} of the order"
        elif batch is not None:
            message += f"; epoch {batch.epoch}, rows {batch.start}..{batch.start + batch.rows - 1} of the order"
        if self._stop_on_nan:
            raise StepError("PL409", message)
        message += "; every rank leaves this step out"
        if self._streak > 1:
            message += f", the {self._streak}th in a row"
        if verdict.mine:
            self._sink(Event("notice", self.steps, {"code": "PL409", "message": message}))

    def commit(self) -> None:
        """An optimizer has stepped (or left out a step that is not finite): the open rows are used up."""
        self.steps += 1
        skipped = self.redo.skip
        self.redo.commit()
        if self.local:
            self._hold_back(skipped)
        else:
            self._ledger.commit(self.steps, self._open, skipped=skipped)
            self._committed_samples = self.samples
            for index in self._open_feeds:
                self._feeds[index].commit()
        self._open.clear()
        self._open_feeds.clear()
        self._given.clear()
        if self._split_to is not None:
            self.resplit(*self._split_to)
            self._split_to = None
        self.publish()

    # ---- rounds ---------------------------------------------------------------------------------------------------
    @property
    def round_open(self) -> bool:
        """Steps were taken that do not count yet."""
        return bool(self._inner)

    @property
    def settled_steps(self) -> int:
        """Steps that count."""
        return self.settled if self.local else self.steps

    @property
    def repeatable(self) -> bool:
        """The loop can be given all rows of the open round once more."""
        return bool(self._round_feeds) and all(self._feeds[index].live for index in self._round_feeds)

    def be_local(self, local: bool) -> None:
        """From now on ranks step on their own, or together."""
        self.local, self.settled, self._stepped_samples = local, self.steps, self.samples

    def _hold_back(self, skipped: bool) -> None:
        """A step was taken; it counts when its round does."""
        self._inner.append((self.steps, list(self._open), skipped))
        self._round_mark = self._mark_given(self._round_mark)
        self._stepped_samples, self._last = self.samples, dict(self._given)
        self._streak *= skipped
        for index in self._open_feeds:
            self._feeds[index].step()
        self._round_feeds |= self._open_feeds

    def close_round(self, *, stop: bool, change: bool) -> None:
        """The steps of the round count, on all ranks."""
        self._ledger.commit_round(self._inner)
        for index in self._round_feeds:
            self._feeds[index].commit_steps()
        self.settled, self._committed_samples = self.steps, self._stepped_samples
        self._stopping, self.change_due = self._stopping or stop, self.change_due or change
        self._forget_round()
        self.publish()

    def rewind(self, rank: int, size: int) -> None:
        """A member was lost in the open round, which is undone: its rows are cut anew, and given once more."""
        feeds = set(self._round_feeds)
        self.steps, self.samples = self.settled, self._committed_samples
        self.redo.rewind()
        self._open.clear()
        self._open_feeds.clear()
        self._pending.clear()
        self._given.clear()
        self._forget_round()
        self.resplit(rank, size, open_ones=feeds)

    def _forget_round(self) -> None:
        self._inner.clear()
        self._round_feeds.clear()
        self._round_mark, self.round_due = 0, False

    def not_finite(self) -> None:
        """The gradient of this rank is not finite: it leaves out its own step, which counts. Raises StepError PL409."""
        self.redo.skip = True
        self._streak += 1
        message = f"step {self.steps + 1}: the gradient of this rank is not finite; trained on {self.where()}"
        if self._stop_on_nan:
            raise StepError("PL409", message)
        if self._streak in _TELL:
            message += "; this rank leaves its own step out, and the others take theirs"
            self._sink(Event("notice", self.steps, {"code": "PL409", "message": message}))

    def abort(self, rank: int, size: int, *, healed: bool) -> None:
        """A member was lost in the open step: whatever of it was done here is forgotten, and its rows are cut anew.

        Args:
            rank, size: Who this is among those who are left.
            healed: The others have applied the step, and this rank was given the result.
        """
        if healed:
            again = False
            self.redo.healed()
        else:
            again = self.redo.abort()
        self._forget_open()
        self._unstepped = False
        self.resplit(rank, size, again=again)

    @property
    def holds_batch(self) -> bool:
        """The script was given rows to train on, and no step has used them yet."""
        return bool(self._given)

    def resplit_later(self, rank: int, size: int) -> None:
        """The ranks have changed while an optimizer stepped: loaders follow when that step is committed."""
        self._split_to = (rank, size)

    def _forget_open(self) -> None:
        self._open.clear()
        self._open_feeds.clear()
        self._pending.clear()
        self.samples = self._committed_samples

    def resplit(self, rank: int, size: int, *, again: bool = False, open_ones: Container[int] = ()) -> None:
        """The ranks have changed: open passes that are trained on go on from the last commit, cut anew.

        Args:
            open_ones: Loaders that were trained on in a round that was undone.
        """
        self.size, self._reference = size, 0.0  # who has just come knows no earlier weights
        for index, feed in self._feeds.items():
            now = feed.trained or index in self._given or index in open_ones
            feed.resplit(rank, size, again=again, now=now)

    def publish(self) -> None:
        """Say how far this rank is: on the board always, as an event now and then."""
        self._activity.progress(self.steps, self.epoch, self.samples)
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._sink(Event("step", self.steps, {"epoch": self.epoch, "samples": self.samples}))

    def finish(self, whole: bool = True) -> None:
        """The run has ended, well (`whole`) or not: what was left open is written down."""
        for feed in self._feeds.values():
            feed.close()
        for loader in list(self._pending) if whole else ():  # what else would have become of them is not known
            self._put_aside(loader)
        self._ledger.end(self.steps, self._open)
        self._ledger.close()


def _nothing() -> None:
    return None


def _range(batch: Slice) -> Range:
    return (batch.loader, batch.epoch, batch.start, batch.rows, batch.start + batch.local_start, batch.local_rows)
