"""The iterator that the user's loop holds: one pass over this rank's rows of each global batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from paceline.data.course import Course, Drawn
from paceline.data.rows import EpochEnd, Piece, Slice
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import AdoptError, PacelineError

_SHOWN = 8  # indices of the data set named in a note


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the job wants to decide and to hear.

    Attributes:
        before_batch: Called first in each ``next()``; may raise, to end the loop there. True: the rows given last are given
            once more, as a stand-in that does not count.
        want_phantom: Whether a rank without a row in a batch takes part in it anyway.
        on_batch: Called with the slice that the loop is about to get.
        before_end: Called when a pass has no more batches. True: it goes on all the same, because the ranks have changed and what
            followed the last commit is given once more.
        on_epoch: Called when a pass ends, before ``StopIteration``, and when one was left early (see ``Feed.close``).
    """

    before_batch: Callable[[], bool | None]
    want_phantom: Callable[[], bool]
    on_batch: Callable[[Slice], None]
    on_epoch: Callable[[EpochEnd], None]
    before_end: Callable[[], bool] = bool


@dataclass(frozen=True, slots=True)
class Reader:
    """How the rows of a pass are read.

    Attributes:
        rows: torch's iterator over this rank's loader.
        entered: Entered around each read.
        counted: It yields a :data:`Piece`, because a batch's rows are known only after reading.
        load: Reads rows in this process, by their indices.
        rank: Of this process, for messages.
    """

    rows: Iterator[Any]
    entered: Callable[[], AbstractContextManager[None]]
    counted: bool
    load: Callable[[Any], Any]
    rank: int


class Pass(Iterator[Any]):
    """One pass, and the place where it stands, which it writes to `course`."""

    def __init__(self, reader: Reader, course: Course, hooks: Hooks, activity: Activity) -> None:
        self._reader = reader
        self._course = course
        self._hooks = hooks
        self._activity = activity
        self._heir: Pass | None = None
        self._latest: Any = None

    def leave_to(self, heir: Pass) -> None:
        """From now on give what `heir` gives: persistent workers serve one pass at a time, or the ranks have changed."""
        self._heir, heir._latest = heir, self._latest
        self._reader = replace(self._reader, rows=iter(()))  # and with it torch's iterator, and its workers

    def __next__(self) -> Any:
        if self._heir is None and self._hooks.before_batch():
            return self._latest
        if self._heir is not None:  # before the batch the ranks may have changed
            self._latest = next(self._heir)
            return self._latest
        with self._activity.during(Phase.INPUT, "next batch"):
            arrived = self._arrive()
        if arrived is None:
            if self._hooks.before_end():
                return next(self)
            self._end()
            raise StopIteration
        piece, rows = arrived
        self._hooks.on_batch(piece)
        self._latest = rows
        return rows

    def catch_up(self) -> None:
        """Read and drop what was committed before a resume, where there is no sampler to walk instead."""
        course = self._course
        for _ in range(course.skip.batch):
            item = next(self._reader.rows, None)
            if item is None:
                break
            course.see(*self._place(item, None))
        course.check_replay(course.seen.order)

    def _arrive(self) -> tuple[Slice, Any] | None:
        """This rank's next rows and what they are, or None at the end."""
        course, reader = self._course, self._reader
        while True:
            if course.drawn and not course.drawn[0].read and (late := self._revive()):
                return late
            try:
                with reader.entered():
                    item = next(reader.rows)
            except StopIteration:
                self._take()
                return None
            except Exception as error:
                self._explain(error)
                raise
            note = self._take()
            if reader.counted:
                piece, order = self._place(item, note)
                rows = item[3]
            else:
                assert note is not None
                assert note.slice is not None
                piece, order, rows = note.slice, note.order, item
            course.see(piece, order)
            if not piece.phantom or self._hooks.want_phantom():
                return piece, rows

    def _take(self) -> Drawn | None:
        """The note on what has just arrived; what was drawn before it without being read has passed by."""
        drawn = self._course.drawn
        while drawn:
            note = drawn.popleft()
            if note.read:
                return note
            self._pass_by(note)
        return None

    def _pass_by(self, note: Drawn) -> None:
        assert note.slice is not None
        self._course.see(note.slice, note.order)

    def _revive(self) -> tuple[Slice, Any] | None:
        """Workers run ahead: a phantom that nobody wanted when it was drawn may be wanted when its turn comes."""
        drawn = self._course.drawn
        while drawn and not drawn[0].read:
            note = drawn.popleft()
            self._pass_by(note)
            if note.slice is not None and self._hooks.want_phantom():
                return note.slice, self._reader.load(note.indices)
        return None

    def _place(self, piece: Piece, note: Drawn | None) -> tuple[Slice, int]:
        """The slice and the checksum for a batch whose rows were counted after reading."""
        rows, start, count, content = piece
        course, seen = self._course, self._course.seen
        if rows < 0:
            raise AdoptError(
                "PL305",
                f"loader {course.loader} has batch_size=None and yields {content[:200]}; that has no rows to divide",
            )
        order = note.order if note else zlib.crc32(rows.to_bytes(8, "little"), seen.order)
        return Slice(course.loader, course.epoch, seen.batch, seen.rows, rows, start, count, not count), order

    def _end(self) -> None:
        if not self._course.ended:
            self._course.ended = self._course.reported = True
            self._hooks.on_epoch(self._course.report())

    def _explain(self, error: Exception) -> None:
        """Add to the user's own exception which rows were being read; its type and its traceback stay."""
        if isinstance(error, PacelineError):
            return
        course, seen = self._course, self._course.seen
        # torch's time-out leaves the batch where it is: the same one is waited for again. All others are used up.
        late = str(error).startswith("DataLoader timed out")
        note = course.drawn[0] if course.drawn and late else self._take()
        where = f"batch {seen.batch} of epoch {course.epoch} of loader {course.loader}, from row {seen.rows}"
        if note and note.slice:
            first = note.slice.start + note.slice.local_start
            last = first + max(note.slice.local_rows, 1) - 1
            where = (
                f"rows {first} to {last} of epoch {course.epoch} of loader {course.loader} (batch {note.slice.batch})"
            )
            if not late:
                self._pass_by(note)
        if note:
            where += f", indices {_few(note.indices)}"
        error.add_note(f"PL307: rank {self._reader.rank} was reading {where}")


def _few(indices: Any) -> str:
    """The first few of `indices`."""
    if not hasattr(indices, "__len__") or len(indices) <= _SHOWN:
        return str(indices)
    return f"[{', '.join(map(str, indices[:_SHOWN]))}, ...]"
